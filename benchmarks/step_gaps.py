"""What lies between the model's kernels of two decode steps: the choice of a token, and whatever a device waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tilewright.trials import wait

_PROMPT = 16
_REPEATS = 5
_NOISE = 0.02  # as much as the share is meant to stay below


@dataclass(frozen=True)
class StepGap:
    """batch: sequences. token: seconds from one token to the next while generate() runs, by the difference of two runs.
    model: seconds of the model's part, step behind step without a choice of tokens."""

    batch: int
    token: float
    model: float

    @property
    def known(self) -> bool:
        """Whether the share means something: where a step took less time than its model, noise is larger than it."""
        return 0 < self.model <= (1 + _NOISE) * self.token

    @property
    def share(self) -> float:
        """The part of a step's time in which the model does not run."""
        return max(0.0, 1.0 - self.model / self.token) if self.token > 0 else 0.0


@torch.no_grad()
def step_gap(fast: Any, batch: int, tokens: int) -> StepGap:
    """Measure greedy decoding over ``tokens`` steps behind a prompt of 16 tokens: the best of a few runs of each, taken
    in turns, as a GPU's clock goes up while it works, and what ran first would seem slower."""
    engine = fast._tilewright.engine
    ids = torch.ones(batch, _PROMPT, dtype=torch.int64, device=engine.spec.device)

    def generate(new: int) -> None:
        fast.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    state = engine.new_state(batch)

    def advance() -> None:
        state.crop(_PROMPT)
        for _ in range(tokens):
            engine.advance(state)

    engine.step(state, ids)
    runs = (partial(generate, 4), partial(generate, 4 + tokens), advance)
    short, long, model = _least(runs, engine.spec.device)
    return StepGap(batch, (long - short) / tokens, model / tokens)


def _least(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The least seconds of each, over rounds of all of them after one that compiles and records."""
    rounds = [[_seconds(run, device) for run in runs] for _ in range(_REPEATS + 1)]
    return [min(times) for times in zip(*rounds[1:], strict=True)]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start
