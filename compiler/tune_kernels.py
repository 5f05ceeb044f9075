"""Tiles of each kernel, chosen by measurement.

Every candidate is a whole program in which each kernel uses its n-th way to be printed, so that kernels are timed where
they stand: after the one before, with weights that come from memory and activations that come from cache, as in a real
step. A kernel's time is the sum over all its runs (one per layer) of the best round; programs take turns. What wins is
kept on disk per kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from tilewright.codegen.tunables import Changes, Tunables, text_of
from tilewright.ir.module import Op
from tilewright.ir.program import Program
from tilewright.runtime.executor import Executor
from tilewright.runtime.kv_state import RequestState

from .choices import choice_key, remember, remembered
from .options import Options
from .trials import Trial, pick

_ROUNDS = 3
_CLEARLY = 0.97
"""The share of the default's time that ``trials.pick`` asks for."""

Candidates = Callable[[Op, Program], tuple[Changes, ...]]
"""Ways to print a kernel, the default first; one way where there is no choice."""


class Timed(Protocol):
    """An executor that can time its steps; those of both kernel backends can."""

    def step_seconds(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> list[float]:
        """Seconds of each step of the program's trace; infinite for one that failed."""
        ...


@dataclass(frozen=True)
class KernelChoice:
    """What was chosen for a kernel instead of its default, and the evidence for it."""

    program: str
    kernel: str
    changes: Changes
    evidence: str

    def __str__(self) -> str:
        return f"{self.program} {self.kernel}: {text_of(self.changes)}, {self.evidence}"


def changes_of(choices: Sequence[KernelChoice]) -> Tunables:
    """The choices of one program as its printer takes them."""
    return {choice.kernel: choice.changes for choice in choices}


@dataclass(frozen=True)
class KernelTuner:
    """The candidates of one program's kernels."""

    program: Program
    ways: Mapping[str, tuple[Changes, ...]]
    options: Options

    @staticmethod
    def of(program: Program, candidates: Candidates, options: Options) -> KernelTuner:
        ways = {s.name: candidates(s.op, program) for s in program.kernels()}
        return KernelTuner(program, {name: found for name, found in ways.items() if len(found) > 1}, options)

    @property
    def variants(self) -> tuple[Tunables, ...]:
        """Programs to time: in the n-th, each kernel is printed in its n-th way (or its last, where it has fewer)."""
        count = max(map(len, self.ways.values()), default=1)
        return tuple(
            {name: found[min(n, len(found) - 1)] for name, found in self.ways.items()} for n in range(count)
        )

    def recall(self) -> tuple[KernelChoice, ...]:
        """What is on record for the kernels; the others keep their default."""
        found = {name: remembered(self._key(name), len(ways)) for name, ways in self.ways.items()}
        return tuple(self._choice(name, n, "as recorded") for name, n in found.items() if n)

    def measured(self) -> dict[str, Changes]:
        """The kernels of which measurements are on record, with the way that was fastest, the default included."""
        found = {name: remembered(self._key(name), len(ways), True) for name, ways in self.ways.items()}
        return {name: self.ways[name][n] for name, n in found.items() if n is not None}

    def keep(self, kernel: str, changes: Changes) -> None:
        """Put a way on record that was not measured: those before it do not run."""
        remember(self._key(kernel), self.ways[kernel].index(changes), ())

    def choose(self, executors: Sequence[Executor], trial: Trial) -> tuple[KernelChoice, ...]:
        """Time the executors of :attr:`variants` and record what is best; gives what is not the default."""
        times = self.times(executors, trial)
        chosen = []
        for name, ways in self.ways.items():
            seconds = [times[n][name] for n in range(len(ways))]
            best = pick(seconds, _CLEARLY)
            remember(self._key(name), best, [s for s in seconds if math.isfinite(s)])
            if best:
                chosen.append(self._choice(name, best, f"{seconds[0] / seconds[best]:.2f}x its default"))
        return tuple(chosen)

    def _choice(self, kernel: str, number: int, evidence: str) -> KernelChoice:
        return KernelChoice(self.program.name, kernel, self.ways[kernel][number], evidence)

    def times(self, executors: Sequence[Executor], trial: Trial) -> list[dict[str, float]]:
        """Seconds of each kernel, over all its runs in a program, by executor; infinite where it does not run."""
        best: list[list[float]] = [[] for _ in executors]
        for _ in range(_ROUNDS + 1):  # the first round warms up
            for n, executor in enumerate(cast("Sequence[Timed]", executors)):
                taken = executor.step_seconds(trial.inputs, trial.dims, trial.state, trial.outputs)
                best[n] = list(map(min, best[n], taken)) if best[n] else [math.inf] * len(taken)
        totals: list[dict[str, float]] = []
        for seconds in best:
            total: dict[str, float] = {}
            for (step, _, _), s in zip(self.program.trace(), seconds, strict=True):
                total[step.name] = total.get(step.name, 0.0) + s
            totals.append(total)
        return totals

    def _key(self, kernel: str) -> str:
        step = next(s for s in self.program.kernels() if s.name == kernel)
        program = self.program
        texts = (step.op, program.phase, program.symbols, program.capacity, self.ways[kernel])
        return choice_key(texts, self.options.backend, self.options.device)
