"""The systems of the chart for one model and one batch, built with room for that batch's longest context only."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import tilewright as tw
from benchmarks import models
from benchmarks.build import our_bytes
from benchmarks.chart_measure import reason_of_failure
from benchmarks.chart_results import FORMS
from benchmarks.results import EAGER, TORCH_COMPILE
from benchmarks.subject import Subject
from benchmarks.system import System
from benchmarks.torch_compile import TorchCompile
from tilewright.progress import Progress


@contextmanager
def built(
    source: Any, wanted: Sequence[str], batch: int, positions: int, limit: float
) -> Iterator[tuple[list[System], dict[str, str]]]:
    """The systems that could be built within ``limit`` seconds each, and why others could not; freed at the end."""
    systems: list[System] = []
    reasons: dict[str, str] = {}
    for name in wanted:
        with reason_of_failure(name, limit, reasons):
            systems.append(_build(source, name, batch, positions))
    try:
        yield systems, reasons
    finally:
        for system in systems:
            system.close()
        systems.clear()
        gc.collect()  # modules are full of cycles, and the next batch needs the room
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _build(source: Any, name: str, batch: int, positions: int) -> System:
    if name == EAGER:
        return Subject(EAGER, source, lambda context: models.bytes_per_step(source, context, batch), batch)
    if name == TORCH_COMPILE:
        return TorchCompile(source, batch)
    form = FORMS[name]
    fast = tw.compile(
        source,
        batch_sizes=(batch,),
        max_length=positions,
        weights=models.PRECISIONS[form].weights,
        progress=Progress(),
    )
    return Subject(name, fast, partial(our_bytes, fast, source, form, batch), batch)
