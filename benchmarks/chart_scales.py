"""Which points the chart has, at the size of the paper's and at one that runs anywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.large_models import BUILDERS
from benchmarks.options import known


@dataclass(frozen=True)
class Scale:
    """models, and contexts by batch. prompts: lengths at which batch 1 is timed to its first token; prefill: those of
    them at which the forward is timed too. tokens: that a sample decodes. others: models that are
    measured where they are asked for."""

    models: tuple[str, ...]
    contexts: dict[int, tuple[int, ...]]
    prompts: tuple[int, ...]
    prefill: tuple[int, ...]
    tokens: int
    others: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        """Points of all models."""
        return len(self.models) * sum(len(sizes) for sizes in self.contexts.values())

    @property
    def longest(self) -> int:
        """Positions that the model needs."""
        return max(self.positions(batch) for batch in (1, *self.contexts))

    def positions(self, batch: int) -> int:
        """Room that a batch needs. A KV state has memory for all of it, so more would take memory from the others."""
        longest = max((0, *self.contexts.get(batch, ()), *(self.prompts if batch == 1 else ())))
        return longest + 2 * self.tokens + 8

    @property
    def sizes(self) -> frozenset[tuple[int, int]]:
        """Batch and context of each point; 0 and the length of each prompt."""
        points = {(batch, size) for batch, contexts in self.contexts.items() for size in contexts}
        return frozenset(points | {(0, size) for size in self.prompts})

    def only(self, points: str) -> Scale:
        """The points of a list like ``1:1024,prompt:4096``: batch and context, or a prompt and its length. Raises
        OptionError for one that the scale does not have."""
        if not points:
            return self
        names = {f"{batch}:{size}": (batch, size) for batch, sizes in self.contexts.items() for size in sizes}
        names |= {f"prompt:{size}": (0, size) for size in self.prompts}
        keys = [names[name] for name in known("--points", points, tuple(names))]
        prompts = tuple(size for batch, size in keys if not batch)
        contexts = {
            batch: kept
            for batch, sizes in self.contexts.items()
            if (kept := tuple(size for size in sizes if (batch, size) in keys))
        }
        return replace(self, contexts=contexts, prompts=prompts)


SCALES = {
    "paper": Scale(
        tuple(BUILDERS),
        {1: (128, 1024, 2048, 8192), 2: (128, 1024, 4096), 4: (128, 1024, 2048), 8: (128, 1024, 4096)},
        prompts=(128, 1024, 4096),
        prefill=(4096,),
        tokens=32,
    ),
    "tiny": Scale(
        ("tiny-llama",),
        {1: (16,), 2: (16,)},
        prompts=(16, 32),
        prefill=(32,),
        tokens=6,
        others=("tiny-opt",),
    ),
}
"""Nearly all of the time of ``tiny`` is compiling: ours per form and batch, torch.compile per context and batch."""
