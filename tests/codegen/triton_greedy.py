"""The kernels that choose tokens greedily, beside the operations of PyTorch that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tilewright.codegen.triton.greedy import greedy_source, parts_of
from tilewright.estimates import gpu
from tilewright.ir.types import DType
from tilewright.runtime.device_step import DeviceStep, Way
from tilewright.runtime.greedy import GreedyKernels

STEPS = 5


@dataclass(frozen=True)
class Greedy:
    """Logits [batch, vocab] in a bucket of ``rows``. eos: ends of sequences. minimum: columns below which no end is
    chosen; prompts have two."""

    vocab: int
    batch: int = 1
    rows: int = 1
    dtype: DType = DType.bf16
    eos: tuple[int, ...] = ()
    minimum: int = 0


CASES = {
    "one": Greedy(50),
    "large": Greedy(40_000, 2, 2, eos=(7,), minimum=4),
    "uneven": Greedy(1500, 3, 4, DType.f32, (3, 9, 11)),
    "early": Greedy(300, 3, 8, DType.f16, (1, 2), 5),
    "several_parts": Greedy(70_001, 1, 1, DType.f32, (5,)),
}


def greedy_errors(name: str, folder: Path, device: str = "cpu", interpret: bool = True) -> list[str]:
    """What differs after some steps from what PyTorch's operations keep: nothing. Some scores are equal, some are no
    numbers, and ends are likely."""
    case = CASES[name]
    source = greedy_source(case.vocab, case.dtype, (1, 2, 4, 8), interpret, gpu(torch.device(device)))
    path = folder / f"greedy_{name}.py"
    path.write_text(source.text)
    kernels = GreedyKernels(path, parts_of(case.vocab))
    way = Way(case.batch, None, case.eos, 0 if case.eos else None, case.minimum > 2)
    states = [_state(case, device) for _ in range(2)]
    steps = [DeviceStep(s, way, k) for s, k in zip(states, (None, kernels), strict=True)]
    for step in steps:
        step.begin(torch.full((case.batch, 2), 3, device=device), case.minimum)
    wrong = []
    for number in range(STEPS):
        kept = []
        for state, step in zip(states, steps, strict=True):
            state.logits.copy_(_scores(case, number))
            step.choose()
            kept.append([t.clone() for t in (state.ids, step.sequences, step.open, step.column)])
        if not all(torch.equal(a, b) for a, b in zip(*kept, strict=True)):
            wrong.append(f"step {number}: {kept[1]} instead of {kept[0]}")
    return wrong


def _state(case: Greedy, device: str) -> Any:
    """As much of a request's state as a choice sees."""
    ids = torch.zeros(case.rows, 1, dtype=torch.int64, device=device)
    logits = torch.zeros(case.rows, 1, case.vocab, dtype=case.dtype.torch, device=device)
    return SimpleNamespace(
        rows=case.rows, max_length=2 + STEPS, logits=logits, ids=ids, positions=torch.zeros_like(ids)
    )


def _scores(case: Greedy, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    scores = torch.randn(case.rows, 1, case.vocab, generator=generator).round(decimals=1)
    if number == 1:
        scores[0, 0, case.vocab * 2 // 3] = float("nan")
    elif case.eos and number > 1:  # the last row ends first
        scores[case.batch - number + 1 :, 0, case.eos[number % len(case.eos)]] = 9.0
    return scores
