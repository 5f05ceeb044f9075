"""Whether a decode step launches its kernels one by one, or those of a layer as one persistent kernel: by measurement.

Each candidate is a whole program; steps are timed as they run in use, recorded where the device records. What wins is
kept on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Protocol, cast

from tilewright.codegen.tunables import Tunables
from tilewright.ir.program import Program
from tilewright.runtime.executor import EngineSpec, Executor

from .choices import choice_key, remember, remembered
from .options import Options
from .trials import Trial, pick, time_in_turns, wait

RESIDENTS = (0, 1, 2, 4)
"""Programs of a persistent kernel on each multiprocessor; 0: one launch per kernel, the default."""
_ROUNDS = 3
_STEPS = 20
_CLEARLY = 0.97
"""The share of the default's time that ``trials.pick`` asks for."""


class Refusing(Protocol):
    """An executor that tells which of its persistent kernels did not run."""

    @property
    def refused(self) -> AbstractSet[str]: ...


def recall(program: Program, tunables: Tunables, options: Options) -> int:
    """The number of residents on record for a program, 0 where there is none."""
    chosen = remembered(_key(program, tunables, options), len(RESIDENTS))
    return RESIDENTS[chosen or 0]


def choose(
    program: Program,
    tunables: Tunables,
    options: Options,
    spec: EngineSpec,
    build: Callable[[Sequence[int]], Sequence[Executor]],
) -> tuple[int, str]:
    """Measure a decode program and record the best number of residents; gives it, and a line for the report.

    build: makes an executor of the program for each number of residents.
    """
    executors, trial = build(RESIDENTS), Trial.step(spec, program.batch)
    for executor in executors:
        _run(executor, trial)  # compiles, loads and records
    seconds = time_in_turns([partial(_run, e, trial) for e in executors], _ROUNDS)
    # Where a persistent kernel does not run, its executor has gone on without.
    whole = [not cast("Refusing", e).refused for e in executors]
    seconds = [s if ran else math.inf for s, ran in zip(seconds, whole, strict=True)]
    best = pick(seconds, _CLEARLY)
    remember(_key(program, tunables, options), best, [s for s in seconds if math.isfinite(s)])
    found = ", ".join(
        f"{f'{n} per multiprocessor' if n else 'one launch per kernel'} {1e6 * s / _STEPS:.0f} us"
        for n, s in zip(RESIDENTS, seconds, strict=True)
        if math.isfinite(s)
    )
    return RESIDENTS[best], f"{program.name}, persistent kernels: {found}"


def _run(executor: Executor, trial: Trial) -> None:
    for _ in range(_STEPS):
        executor.run(trial.inputs, trial.dims, trial.state, trial.outputs)
    if trial.state is not None:
        wait(trial.state.spec.device)


def _key(program: Program, tunables: Tunables, options: Options) -> str:
    kernels = (s.op for s in program.kernels())
    texts = ("persistent", RESIDENTS, program.symbols, program.capacity, sorted(tunables.items()), *kernels)
    return choice_key(texts, options.backend, options.device)
