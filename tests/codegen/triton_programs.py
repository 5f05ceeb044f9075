"""Planned programs of models, as ``compile`` would make them for the Triton backend, without building anything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from tilewright.capture import Captured, capture
from tilewright.ir.module import Module
from tilewright.ir.program import BufferKind, Program
from tilewright.lower import lower
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.plan_memory import plan_memory
from tilewright.phases import rounded_rows
from tilewright.weights import bind_weights


@dataclass(frozen=True)
class Planned:
    """Programs by name: ``decode_b1``, .. and ``prefill``, or ``forward``; and the modules they came from."""

    captured: Captured
    modules: dict[str, Module]
    programs: dict[str, Program]

    def weights(self) -> dict[str, Tensor]:
        """Every parameter of the programs."""
        used = {b.name for p in self.programs.values() for _, b in p.of_kind(BufferKind.param)}
        return dict(bind_weights(self.modules.values(), self.captured.tensors, used).tensors)


def plan(
    model: PreTrainedModel,
    batch_sizes: tuple[int, ...] = (1,),
    max_length: int = 64,
    splits: int = 3,
    chunk: int = 512,
    weights: str = "",
    plain: bool = False,
    guesses: int = 0,
) -> Planned:
    """Capture, lower, fuse and plan a model. weights, and guesses: compile's options. plain: factors of products are,
    as they are on a GPU for prompts."""
    captured = capture(model)
    lowered = lower(captured)
    largest = max(batch_sizes)
    modules, programs = {}, {}
    options: dict[str, tuple[str, int, PassOptions, dict[str, tuple[int, int]]]] = {}
    if captured.kind == "decoder":
        steps = [(f"decode_b{size}", "decode", size, 1) for size in batch_sizes]
        steps += [("verify", "verify", 1, guesses + 1)] if guesses else []
        for name, phase, size, tokens in steps:
            dims = (("B", size), ("S", tokens), ("L", tokens))
            many = size * tokens
            rounded = rounded_rows("triton", weights, many) if weights in ("int8", "int4") else ""
            passes = PassOptions(
                dims, True, splits,
                weights=weights, activation_group=32 if many == 1 or rounded else 0, round_rows=rounded,
                plain_rows=bool(rounded),
            )  # fmt: skip
            options[name] = (phase, size, passes, {"T": (tokens, max_length), "S": (tokens, tokens)})
        ranges = {"T": (1, max_length), "B": (1, largest), "S": (1, min(chunk, max_length))}
        passes = PassOptions(last_tokens=True, weights=weights, plain_rows=plain, plain_weights=plain)
        options["prefill"] = ("prefill", largest, passes, ranges)
    else:
        ranges = {"B": (1, largest), "S": (1, max_length)}
        options["forward"] = ("forward", largest, PassOptions(weights=weights), ranges)
    for name, (phase, batch, passes, ranges) in options.items():
        modules[name] = run_passes(lowered.with_symbols(**ranges), passes)
        programs[name] = plan_memory(modules[name], name, phase, batch, max_length)
    return Planned(captured, modules, programs)
