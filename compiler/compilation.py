"""The stages of a compilation, from the model to the engine that runs it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from tilewright.codegen.tunables import Tunables
from tilewright.ir.module import Module
from tilewright.ir.program import BufferKind, Program
from tilewright.passes.base import PassOptions
from tilewright.passes.last_tokens import last_tokens
from tilewright.passes.narrow_cache import kept_wide as wide_cache
from tilewright.passes.pipeline import run_passes
from tilewright.passes.quantize_weights import kept_wide
from tilewright.runtime.device import is_out_of_memory
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import Compiling, EngineSpec, Executor, PerRequest
from tilewright.runtime.native_executor import NativeExecutor

from . import graph_cache
from .adapters import MergedAdapters
from .api_mixin import Compiled, EncoderMixin, ModuleMixin, attach
from .backends import Built, build, candidates, has_persistent_kernels, measures, no_candidates
from .capacity import require_memory
from .capture import CapturedFacts, capture
from .capture_inputs import vocabulary
from .capture_rope import switch_length
from .choices import choice_key, remember, remembered
from .costs import eager_peak
from .decoder_mixin import DecoderMixin
from .dump import Dump
from .encoder_decoder import attach_both, states_of
from .greedy import greedy_kernels
from .interface import index_bounds, require_decoder
from .lower import lower
from .model_identity import identity
from .multimodal import attach_multimodal
from .options import Options
from .phases import (
    PER_REQUEST,
    VERIFY,
    Parts,
    Phase,
    phase_report,
    phases_of,
    quantized_phases,
    report_dims,
    rival_phases,
    without_losers,
)
from .progress import Advance
from .quantize_native import quantizer
from .report import Fallback, Memory, PhaseReport, Report
from .shown_outputs import ShownOutputs, split_outputs
from .trials import Trial
from .tune import best, measure
from .tune_kernels import KernelTuner, changes_of
from .tune_launches import choose as choose_launches
from .tune_launches import recall as recall_launches
from .tune_native import choose, is_busy
from .weights import BoundWeights, bind_weights, not_quantizable

_LAST = PassOptions(last_tokens=True)
_MIXINS = {"decoder": DecoderMixin, "encoder": EncoderMixin, "module": ModuleMixin}


@dataclass
class Compilation:
    """One run of ``compile``, stage by stage, and what each leaves to the later ones."""

    model: nn.Module
    options: Options
    advance: Advance
    adapters: MergedAdapters
    encoder: Any = None  # the compiled encoder of an encoder-decoder
    seconds: dict[str, float] = field(default_factory=dict)
    stages: dict[str, Callable[[], str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tunables: dict[str, Tunables] = field(default_factory=dict)
    residents: dict[str, int] = field(default_factory=dict)
    per_request: PerRequest | None = None
    cache: tuple[tuple[str, bool], ...] = ()

    def run(self, example_inputs: tuple[Any, ...] | dict[str, Any] | None) -> Any:
        dump = Dump(self.options.dump)
        captured, lowered, shown = self._graph(example_inputs)
        if captured.kind == "decoder":
            require_decoder(type(self.model).__name__, lowered, bool(self.options.speculative_tokens))
        self.bounds = index_bounds(lowered)
        self.stages["lowered"] = partial(str, lowered)
        dump.lowered(lowered)
        parts = Parts.of(captured, lowered)
        states = (1, 1) if self.encoder is None else states_of(self.encoder)
        phases = phases_of(captured, lowered, self.options, states)
        if self.options.weights:
            phases = quantized_phases(phases, self.options, not_quantizable(captured.tensors))
        with self._stage("passes"):
            modules = [self._optimise(parts.module(phase), phase, dump) for phase in phases]
            phases, modules = self._recall(phases, modules)
        with self._stage("plan"):
            programs = [
                phase.plan(module, self.options.max_length)
                for module, phase in zip(modules, phases, strict=True)
            ]
            if once := [p for p in programs if p.phase == PER_REQUEST]:
                self.per_request = PerRequest.of(once[0], programs[-1], parts.names, captured.per_request)
            require_memory(programs, captured.tensors, self.options)
            used = {b.name for program in programs for _, b in program.of_kind(BufferKind.param)}
            bound = bind_weights(modules, captured.tensors, used, quantizer(self.options.backend))
            if self.options.weights:
                wide = (line for m, p in zip(modules, phases, strict=True) for line in kept_wide(m, p.passes))
                self.notes += tuple(dict.fromkeys(wide))
        self.notes += tuple(
            dict.fromkeys(n for m, p in zip(modules, phases, strict=True) for n in wide_cache(m, p.passes))
        )
        for program in programs:
            dump.plan(program)
        with self._stage("kernels"):
            tuners = self._tuners(programs)
            known = [t.recall() if self.options.autotune == "cached" else () for t in tuners]
            self.notes += tuple(str(choice) for choices in known for choice in choices)
            self.tunables = {p.name: changes_of(choices) for p, choices in zip(programs, known, strict=True)}
            if self.options.autotune == "cached" and has_persistent_kernels(self.options):
                self.residents = {
                    p.name: recall_launches(p, self.tunables[p.name], self.options) for p in programs
                }
            built = self._build(programs, bound)
        if len(rivals := rival_phases(phases)) > 1:
            with self._stage("tune"):
                chosen = self._choose(captured, rivals, modules, programs, built)
                kept = without_losers(phases, chosen)
                modules, programs = [modules[n] for n in kept], [programs[n] for n in kept]
                built, tuners = built.only(kept), [tuners[n] for n in kept]
        if self.options.autotune == "full":
            built = self._tune_kernels(captured, tuners, bound, built)
            built = self._tune_launches(captured, programs, bound, built)
        if self.options.autotune != "off":
            self._tune_steps(captured, modules, programs, built)
        self._run_once(captured, programs, built)
        dump.sources(built.sources)
        self._name_stages(modules, programs, built)
        report = self._report(captured, lowered, programs, bound, built)
        dump.report(report)
        engine = self._engine(captured, programs, built)
        compiled = self._compiled(captured, shown, engine, report, bound)
        self.adapters.stay()
        if self.encoder is not None:
            return attach_both(self.model, compiled, self.encoder)
        if captured.vectors is not None:
            return attach_multimodal(self.model, compiled)
        return attach(self.model, compiled, _MIXINS[captured.kind])

    def _graph(
        self, example_inputs: tuple[Any, ...] | dict[str, Any] | None
    ) -> tuple[CapturedFacts, Module, ShownOutputs | None]:
        """The lowered model, traced or from the cache, and what callers are shown of a module's results."""
        with self._stage("capture"):
            self.adapters.follow(self.model)  # what is merged leaves the graph of the base model
            key = identity(self.model) if example_inputs is None else None
            found = None if key is None else graph_cache.load(key, self.model)
            if key is not None:
                self.cache = (("capture", found is not None),)
            traced, shown = None if found else capture(self.model, example_inputs), None
            if traced is not None and traced.kind == "module":
                traced, shown = split_outputs(traced)
        with self._stage("lower"):
            if traced is None:
                assert found is not None
                return *found, shown
            lowered = lower(traced)
            if key is not None:
                graph_cache.store(key, self.model, traced, lowered)
        return traced, lowered, shown

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.advance(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        """What is not needed, and given up, with a warning and a note, where the device's memory does not suffice."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            note = f"{what}, out of memory: {str(error).splitlines()[0]}"
            warnings.warn(note, stacklevel=3)
            self.notes += (note,)

    def _optimise(self, module: Module, phase: Phase, dump: Dump) -> Module:
        def after(number: int, name: str, module: Module) -> None:
            seen = sum(
                key.split(".")[-1].rstrip("0123456789") == name for key in self.stages if phase.name in key
            )
            self.stages[f"{phase.name}.{name}{seen + 1 if seen else ''}"] = partial(str, module)
            dump.after_pass(phase.name, number, name, module)

        return run_passes(module, phase.passes, hook=after)

    def _recall(self, phases: list[Phase], modules: list[Module]) -> tuple[list[Phase], list[Module]]:
        """Drop rivals where it is known which one wins; the others have to be measured."""
        rivals = rival_phases(phases)
        if len(rivals) < 2 or self.options.autotune != "cached":
            return phases, modules
        chosen = remembered(self._choice_key(rivals, modules), len(rivals))
        if chosen is None:
            return phases, modules
        kept = without_losers(phases, rivals[chosen])
        return [phases[n] for n in kept], [modules[n] for n in kept]

    def _choose(
        self,
        captured: CapturedFacts,
        rivals: list[int],
        modules: list[Module],
        programs: list[Program],
        built: Built,
    ) -> int:
        """Measure the rival programs, given by number; gives the number of the best, or where memory does not suffice
        to measure, of the one with the least arena."""
        arenas = [programs[n].arena_bytes for n in rivals]
        seconds: list[float] = []
        with self._optional("prefill programs not measured"):
            seconds = measure([built.executors[n] for n in rivals], self._spec(captured, programs[rivals[0]]))
        if not seconds:
            return rivals[arenas.index(min(arenas))]
        chosen = best(arenas, seconds)
        remember(self._choice_key(rivals, modules), chosen, seconds)
        timed = zip((programs[n].name for n in rivals), seconds, strict=True)
        self.notes += (
            f"measured on a short prompt: {', '.join(f'{name} {s * 1000:.0f} ms' for name, s in timed)}",
        )
        return rivals[chosen]

    def _tuners(self, programs: list[Program]) -> list[KernelTuner]:
        """What may be tuned of each program's kernels: nothing where times mean nothing."""
        wanted = self.options.autotune != "off" and measures(self.options)
        offered = candidates(self.options) if wanted else no_candidates
        return [KernelTuner.of(p, offered, self.options) for p in programs]

    def _tune_kernels(
        self, captured: CapturedFacts, tuners: list[KernelTuner], bound: BoundWeights, built: Built
    ) -> Built:
        """Time the ways to print each kernel and build the programs anew with the best of them."""
        if not any(t.ways for t in tuners):
            return built
        if self.options.backend == "cpp" and is_busy():
            self.notes += ("tiles of kernels not measured, the machine is busy",)
            return built
        with self._stage("tune kernels"):
            spec = self._spec(captured, tuners[-1].program)
            for tuner in tuners:
                self.advance(f"tune kernels of {tuner.program.name}")
                variants = tuner.variants
                with self._optional(f"tiles of {tuner.program.name} not measured"):
                    tried = build([tuner.program] * len(variants), bound.tensors, self.options, variants)
                    choices = tuner.choose(tried.executors, Trial.of(tuner.program, spec))
                    self.notes += tuple(map(str, choices))
                    self.tunables[tuner.program.name] = changes_of(choices)
            return replace(self._build([t.program for t in tuners], bound), from_cache=built.from_cache)

    def _tune_launches(
        self, captured: CapturedFacts, programs: list[Program], bound: BoundWeights, built: Built
    ) -> Built:
        """Time decode steps with persistent kernels and without, and build those programs anew that are faster with."""
        decode = [p for p in programs if p.phase == "decode"]
        if not decode or not has_persistent_kernels(self.options):
            return built
        with self._stage("tune launches"):
            spec = self._spec(captured, programs[-1])
            for program in decode:
                tunables = self.tunables[program.name]

                def executors(
                    residents: Sequence[int], program: Program = program, tunables: Tunables = tunables
                ) -> tuple[Executor, ...]:
                    same = [program] * len(residents)
                    changes = [tunables] * len(residents)
                    return build(same, bound.tensors, self.options, changes, residents).executors

                with self._optional(f"persistent kernels of {program.name} not measured"):
                    chosen, note = choose_launches(program, tunables, self.options, spec, executors)
                    self.residents[program.name] = chosen
                    self.notes += (note,)
            if not any(self.residents.values()):
                return built
            return replace(self._build(programs, bound), from_cache=built.from_cache)

    def _build(self, programs: list[Program], bound: BoundWeights) -> Built:
        """Build programs as has been chosen for each of them."""
        changes = [self.tunables[p.name] for p in programs]
        residents = [self.residents.get(p.name, 0) for p in programs]
        return build(programs, bound.tensors, self.options, changes, residents)

    def _tune_steps(
        self, captured: CapturedFacts, modules: list[Module], programs: list[Program], built: Built
    ) -> None:
        """Choose how decode steps of the C++ backend run."""
        steps = [
            (module, executor)
            for module, executor in zip(modules, built.executors, strict=True)
            if isinstance(executor, NativeExecutor) and executor.phase == "decode"
        ]
        if not steps:
            return
        with self._stage("tune steps"):
            spec = self._spec(captured, programs[-1])
            for module, executor in steps:
                key = choice_key([module], self.options.backend, self.options.device)
                cached = self.options.autotune == "cached"
                self.notes += (choose(executor, spec, key, cached),)

    def _run_once(self, captured: CapturedFacts, programs: list[Program], built: Built) -> None:
        """Launch every kernel that is loaded, or even compiled, at its first launch: no call has to wait for that."""
        pairs = zip(programs, built.executors, strict=True)
        waiting = [(p, e) for p, e in pairs if isinstance(e, Compiling) and measures(self.options)]
        if not waiting:
            return
        with self._stage("first launches"):
            spec = self._spec(captured, programs[-1])
            for program, executor in waiting:
                with self._optional(f"kernels of {program.name} not launched yet"):
                    trial = Trial.of(program, spec)
                    executor.run(trial.inputs, trial.dims, trial.state, trial.outputs)

    def _choice_key(self, rivals: list[int], modules: list[Module]) -> str:
        return choice_key([modules[n] for n in rivals], self.options.backend, self.options.device)

    def _name_stages(self, modules: list[Module], programs: list[Program], built: Built) -> None:
        """Plans and sources, then the names for what is asked for most: the last IR of each phase."""
        for name, text in built.sources.items():
            self.stages[f"source.{name}"] = partial(str, text)
        for program in programs:
            self.stages[f"{program.name}.plan"] = partial(str, program)
        for module, program in reversed(list(zip(modules, programs, strict=True))):
            self.stages[program.name] = self.stages[program.phase] = partial(str, module)

    def _engine(self, captured: CapturedFacts, programs: list[Program], built: Built) -> Engine:
        by_phase: dict[str, list[Executor]] = {}
        for executor in built.executors:
            by_phase.setdefault(executor.phase, []).append(executor)
        decode = by_phase.get("decode", [])
        (once,) = by_phase.get(PER_REQUEST, [None])
        (verify,) = by_phase.get(VERIFY, [None])
        spec = self._spec(captured, programs[-1])
        embed = None
        if captured.vectors is not None and spec.has_input("inputs_embeds"):
            embed = self.model.get_submodule(captured.vectors.embedding)
        greedy = greedy_kernels(self.options, spec, [e.batch for e in decode])
        return Engine(decode, built.executors[-1], spec, once, embed, greedy, verify)

    def _spec(self, captured: CapturedFacts, program: Program) -> EngineSpec:
        return EngineSpec.of(
            program,
            captured.kind,
            self.options.device,
            vocab_size=vocabulary(self.model),
            chunk=self.options.chunk,
            positions=captured.position_rule,
            bounds=self.bounds,
            per_request=self.per_request,
            speculative_tokens=self.options.speculative_tokens,
        )

    def _report(
        self,
        captured: CapturedFacts,
        lowered: Module,
        programs: list[Program],
        bound: BoundWeights,
        built: Built,
    ) -> Report:
        options = self.options
        kernels = () if built.from_cache is None else (("kernels", built.from_cache),)
        largest = dict(programs[-1].largest[0])
        largest.update(T=largest.get("S", 1), L=1)
        floats = {
            str(p.dtype).removeprefix("torch.") for p in self.model.parameters() if p.is_floating_point()
        }
        return Report(
            model=type(self.model).__name__,
            backend=options.backend,
            device=str(options.device),
            dtype=", ".join(sorted(floats)),
            phases=tuple(self._phase_report(p) for p in programs),
            memory=Memory(
                shared=bound.shared_bytes,
                merged=bound.merged_bytes,
                prepared=bound.copied_bytes,
                kv_per_sequence=programs[-1].state_bytes_per_row,
            ),
            eager_peak_bytes=eager_peak(last_tokens(lowered, _LAST), largest),
            fallbacks=tuple(f for p in programs for f in Fallback.of(p)),
            notes=captured.notes + self.notes,
            seconds=tuple(self.seconds.items()),
            cache=self.cache + kernels,
        )

    def _phase_report(self, program: Program) -> PhaseReport:
        dims = report_dims(program, self.options)
        return phase_report(program, dims, self.options, self.tunables.get(program.name, {}))

    def _compiled(
        self,
        captured: CapturedFacts,
        shown: ShownOutputs | None,
        engine: Engine,
        report: Report,
        bound: BoundWeights,
    ) -> Compiled:
        return Compiled(
            engine=engine,
            report=report,
            outputs=captured.outputs,
            output_class=captured.output_class,
            output_spec=captured.output_spec,
            output_constants=captured.output_constants,
            shown=shown,
            copied_from=bound.copied_from,
            adapters=self.adapters,
            switch_length=switch_length(self.model),
            tensors={} if shown is None else captured.tensors,
            stages=self.stages,
        )
