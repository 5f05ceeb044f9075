"""Measures what a chart lacks, model by model and batch by batch, and writes it after each point."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import chart_results, chart_systems, machine, stored
from benchmarks.chart_measure import Conditions, Measured, measured, reason_of_failure, released
from benchmarks.chart_results import FORMS, Chart, Gap, Key, Missing, Point, Prompt
from benchmarks.chart_scales import Scale
from benchmarks.large_models import with_random_values
from benchmarks.measure import Task
from benchmarks.probe import device_probe
from benchmarks.results import DECODE, FIRST_TOKEN, OURS, PREFILL, TORCH_COMPILE
from benchmarks.step_gaps import step_gap
from benchmarks.subject import Subject
from benchmarks.system import System
from benchmarks.time_limit import TOO_LATE
from tilewright.progress import Progress
from tilewright.runtime.cuda_graph import recorded_bytes

BF16 = f"{OURS} bf16"
_GAP_TOKENS = 32
notes = Console(stderr=True)


@dataclass(frozen=True)
class Settings:
    """What a run measures. limit: seconds that a system may take to get ready. minutes: begin no point later; None for
    no limit. compiled: sizes (as of ``Scale``) at which torch.compile takes part."""

    plan: Scale
    systems: Sequence[str]
    device: torch.device
    repeats: int
    limit: float
    minutes: float | None
    compiled: frozenset[tuple[int, int]]

    def asked(self, key: Key) -> list[str]:
        """The systems that are asked for at a point or prompt."""
        return [s for s in self.systems if s != TORCH_COMPILE or key[1:] in self.compiled]


@dataclass
class Run:
    """Adds to a chart and writes it after each point."""

    file: Path
    chart: Chart
    given: Settings
    begun: float = field(default_factory=time.monotonic)

    def model(self, name: str) -> None:
        """Everything that one model lacks."""
        plan = self.given.plan
        batches = sorted({*plan.contexts, *([1] if plan.prompts else [])})
        todo = {batch: self._missing(name, batch) for batch in batches}
        if not any(todo.values()) or self._late():
            return
        with Progress().step(f"Making {name}"):
            source = with_random_values(name, self.given.device, plan.longest)
        for batch, keys in todo.items():
            if keys and not self._late():
                self._batch(source, name, batch, keys)
        del source
        gc.collect()
        if self.given.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batch(self, source: object, name: str, batch: int, keys: Sequence[Key]) -> None:
        given = self.given
        wanted = self._wanted(keys)
        room = given.plan.positions(batch)
        with (
            device_probe(given.device) as probe,
            chart_systems.built(source, wanted, batch, room, given.limit) as (systems, reasons),
        ):
            self._leave_out((name, batch, 0), reasons)
            for key in keys:
                if self._late():
                    notes.print("[yellow]out of time[/yellow]; run again to go on", highlight=False)
                    return
                if not systems:
                    return
                able = [s for s in systems if s.name in self._wanted([key])]
                late = self._point(key, able, probe) if key[1] else self._prompt(key, able, probe)
                for system in [s for s in systems if s.name in late]:
                    system.close()
                    systems.remove(system)
            if batch == 1:
                self._gap(name, systems)

    def _missing(self, name: str, batch: int) -> list[Key]:
        plan = self.given.plan
        keys = [(name, batch, context) for context in plan.contexts.get(batch, ())]
        keys += [(name, 0, size) for size in plan.prompts if batch == 1]
        return [key for key in keys if self._lacks(key)]

    def _lacks(self, key: Key) -> bool:
        entry = self._entry(key)
        return entry is None or any(
            entry.measures[-1].of(s) is None and not self._covered(key, s)
            for s in self.given.asked(key)
            if s != TORCH_COMPILE or entry.measures[-1].task != FIRST_TOKEN
        )

    def _covered(self, key: Key, system: str) -> bool:
        return any(missing.covers(key, system) for missing in self.chart.left_out)

    def _entry(self, key: Key) -> Point | Prompt | None:
        model, batch, size = key
        return self.chart.point(*key) if batch else self.chart.prompt(model, size)

    def _wanted(self, keys: Sequence[Key]) -> list[str]:
        """The systems that were asked for, and those of points to be measured anew: ratios are of one run."""
        entries = [entry for key in keys if (entry := self._entry(key)) is not None]
        there = {s for s in chart_results.SYSTEMS for e in entries for m in e.measures if m.of(s)}
        able = {s for key in keys for s in self.given.asked(key) if not self._covered(key, s)}
        return [s for s in chart_results.SYSTEMS if s in there | able]

    def _late(self) -> bool:
        minutes = self.given.minutes
        return minutes is not None and time.monotonic() > self.begun + 60 * minutes

    def _point(self, key: Key, systems: Sequence[System], probe: Callable[[], float]) -> set[str]:
        """Measure one point; gives the systems that took too long."""
        name, batch, context = key
        task = Task(DECODE, context, self.given.plan.tokens, self._ids(context))
        found = self._measured(task, f"{name}, batch {batch}, context {context}", systems, probe)
        if found.measure is not None:
            arenas = {
                s.name: s.model.report().arena_bytes
                for s in systems
                if s.name in FORMS and isinstance(s, Subject)
            }
            self._keep(
                Point(*key, found.measure, found.peak_bytes, arenas, recorded_bytes(), *_date_and_commit())
            )
        return self._leave_out(key, found.left_out)

    def _prompt(self, key: Key, systems: Sequence[System], probe: Callable[[], float]) -> set[str]:
        """Measure one prompt; gives the systems that took too long."""
        name, _, size = key
        able = [s for s in systems if FIRST_TOKEN in s.tasks]
        first = self._measured(
            Task(FIRST_TOKEN, size, 1, self._ids(size)), f"{name}, first token after {size}", able, probe
        )
        forward = Measured(None, {}, {})
        if size in self.given.plan.prefill:
            task = Task(PREFILL, size, size, self._ids(size))
            forward = self._measured(task, f"{name}, prefill of {size}", systems, probe)
        if first.measure is not None:
            self._keep(Prompt(name, size, first.measure, forward.measure, *_date_and_commit()))
        return self._leave_out(key, first.left_out | forward.left_out)

    def _gap(self, name: str, systems: Sequence[System]) -> None:
        """What lies between decode steps of our bfloat16 model, once per model."""
        ours = next((s for s in systems if s.name == BF16), None)
        if not isinstance(ours, Subject) or self._late():
            return
        if any((g.model, g.system) == (name, BF16) for g in self.chart.gaps):
            return
        with (
            Progress().step(f"{name}, between decode steps"),
            reason_of_failure(f"{name}, between decode steps", self.given.limit, {}),
        ):
            self._keep(Gap(name, BF16, step_gap(ours.model, 1, _GAP_TOKENS)))
        released(systems, self.given.device)

    def _measured(
        self, task: Task, title: str, systems: Sequence[System], probe: Callable[[], float]
    ) -> Measured:
        given = self.given
        with Progress().step(title, total=2 * len(systems) + given.repeats) as advance:
            return measured(
                task, systems, Conditions(given.device, given.repeats, given.limit, probe, advance)
            )

    def _ids(self, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(size)
        return torch.randint(3, 2000, (1, size), generator=generator).to(self.given.device)

    def _keep(self, new: Point | Prompt | Gap) -> None:
        self.chart = self.chart.having(new)
        stored.save(self.chart, self.file)

    def _leave_out(self, key: Key, reasons: dict[str, str]) -> set[str]:
        """Note what is missing and why; gives the systems that took too long, which the model's other points do
        without: a rival could else take a limit's time at every one of them."""
        late = {system for system, why in reasons.items() if why.startswith(TOO_LATE)}
        for system, why in reasons.items():
            missing = Missing(*key, system, why)
            if system in late:
                missing = replace(missing, batch=0, context=0, reason=f"{why} ({missing.where})")
            self.chart = self.chart.lacking(missing)
        if reasons:
            stored.save(self.chart, self.file)
        return late


def _date_and_commit() -> tuple[str, str]:
    now = stored.now()
    return now, machine.versions().get("commit", "")
