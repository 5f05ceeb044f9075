"""From planned programs to executors: the one place that knows the backends by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tilewright.ir.program import Program
from tilewright.runtime.executor import Executor

from .options import Options
from .reference_executor import ReferenceExecutor

# Chunks of the context that decode attention is split into. On a CPU the heads of one sequence are enough parallel
# work for its few cores, and splitting would only add a kernel to merge the parts.
SPLITS = {"cpp": 0, "triton": 16, "reference": 4}


@dataclass(frozen=True)
class Built:
    """Executors in the order of the programs, generated sources by file name, and what came from the cache."""

    executors: tuple[Executor, ...]
    sources: Mapping[str, str]
    from_cache: bool | None = None


def build(programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options) -> Built:
    """Generate, build and load the kernels of all programs for ``options.backend``."""
    return Built(tuple(ReferenceExecutor(p, weights) for p in programs), {})
