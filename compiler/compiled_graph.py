"""One graph of ``torch.compile``, compiled: kernels for its roots at any size, PyTorch for the views of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Expr
from torch import Tensor, fx

from tilewright.codegen.tunables import Tunables
from tilewright.ir.index import FloorDiv
from tilewright.ir.module import Module
from tilewright.ir.program import BufferKind, InputError, Program
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.plan_memory import plan_memory
from tilewright.runtime.executor import EngineSpec, Executor, TensorSpec
from tilewright.runtime.idle_states import IdleStates

from .aten_graph import AtenGraph
from .backends import build, candidates, measures, no_candidates
from .costs import eager_peak
from .dump import Dump
from .interface import index_bounds, lookups
from .lower import lower
from .options import GraphOptions
from .phases import phase_report
from .report import Fallback, Report
from .trials import Trial
from .tune_kernels import KernelTuner, changes_of
from .weights import bind_weights

_PLANS = 16
"""Memory plans that a graph keeps; each new range of sizes needs one."""


@dataclass(frozen=True)
class _Plan:
    """An executor whose arena suffices for a range of sizes, and the states of calls that are over."""

    executor: Executor
    spec: EngineSpec
    idle: IdleStates

    def run(self, inputs: Mapping[str, Tensor], dims: Mapping[str, int]) -> list[Tensor]:
        """The program's outputs, fresh tensors."""
        outputs = {o.name: o.empty(dims, self.spec.device) for o in self.spec.outputs}
        state = self.idle.take(0, 0)
        self.executor.run(inputs, dims, state, outputs)
        self.idle.give_back(state)
        return list(outputs.values())


class CompiledGraph:
    """A graph as a function of its arguments: tensors and sizes in the order of its placeholders. Thread-safe.

    One compilation serves all sizes. Memory plans go by ranges of sizes: each dim is rounded up to a power of two, so
    there are few of them; where a tensor may shrink while a dim grows, each combination of sizes has its own.
    """

    def __init__(self, graph: fx.GraphModule, chosen: GraphOptions, name: str) -> None:
        """Compile ``graph``, functional ATen. Raises LoweringError for one that the IR cannot express."""
        self.graph = graph
        self.seconds: dict[str, float] = {}
        with self._stage("lower"):
            self.parts = AtenGraph.of(graph)
            self.options = options = chosen.on(self.parts.device, name)
            lowered = lower(self.parts.captured, is_bounded=False)  # its symbols go by the first call's sizes
            self._lookups = lookups(lowered)
            self._bounds = index_bounds(lowered)
            self._grows = _grow(lowered)
        dump = Dump(options.dump)
        dump.lowered(lowered)
        with self._stage("passes"):
            self._module = run_passes(
                lowered.with_symbols(**self._ranges(self.parts.hints)),
                PassOptions(),
                hook=lambda n, name, module: dump.after_pass("forward", n, name, module),
            )
        with self._stage("plan"):
            program = self._program(self.parts.hints)
            used = [b.name for _, b in program.of_kind(BufferKind.param)]
            self._weights = bind_weights([self._module], self.parts.captured.tensors, used).tensors
        self._lock = threading.Lock()
        self._tunables, notes = self._tuned(program)
        self._plans: dict[tuple[int, ...], _Plan] = {}
        with self._stage("kernels"):
            built = build([program], self._weights, options, [self._tunables])
            self._keep(self.parts.hints, program, built.executors[0])
        dump.plan(program)
        dump.sources(built.sources)
        kernels = () if built.from_cache is None else (("kernels", built.from_cache),)
        self.report = Report(
            model=name,
            backend=options.backend,
            device=str(options.device),
            dtype=", ".join(sorted({v.dtype.value for v in lowered.main.params if v.dtype.is_float})),
            phases=(phase_report(program, self.parts.hints, options, self._tunables),),
            eager_peak_bytes=eager_peak(lowered, self.parts.hints),
            fallbacks=Fallback.of(program),
            notes=notes,
            seconds=tuple(self.seconds.items()),
            cache=kernels,
        )
        dump.report(self.report)

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs. Raises InputError for an index beyond the table that it picks rows of."""
        dims = {source.name: source.read(args) for source in self.parts.sizes}
        if any(size < 1 for size in dims.values()):
            return self.graph(*args)  # index arithmetic takes dims for positive
        self._check_lookups(args, dims)
        plan = self._plan(dims)
        roots = plan.run({spec.name: self._input(spec, args) for spec in plan.spec.inputs}, dims)
        laid_out = (_laid_out(root, order) for root, order in zip(roots, self.parts.layouts, strict=True))
        return self.parts.finish(*args, *laid_out)

    def _input(self, spec: TensorSpec, args: Sequence[Any]) -> Tensor:
        value: Tensor = args[self.parts.inputs[spec.name]]
        return value.detach().to(self.options.device).contiguous()

    def _check_lookups(self, args: Sequence[Any], dims: Mapping[str, int]) -> None:
        """Kernels do not check the indices that they are given."""
        for lookup in self._lookups:
            index: Tensor = args[self.parts.inputs[lookup.index]]
            if index.numel():
                low, high = (int(v) for v in torch.aminmax(index))
                least, most = lookup.bounds(dims)
                if low < least or high > most:
                    raise InputError(
                        f"an index is {low if low < least else high}, but its table has {most + 1} entries"
                    )

    # --- plans ----------------------------------------------------------------------------------------------------

    def _plan(self, dims: Mapping[str, int]) -> _Plan:
        key = self._range(dims)
        if (plan := self._plans.get(key)) is not None:
            return plan
        with self._lock:
            if key not in self._plans:
                program = self._program(dims)
                built = build([program], self._weights, self.options, [self._tunables])
                self._keep(dims, program, built.executors[0])
                while len(self._plans) > _PLANS:
                    del self._plans[next(iter(self._plans))]
            return self._plans[key]

    def _keep(self, dims: Mapping[str, int], program: Program, executor: Executor) -> None:
        spec = EngineSpec.of(program, "module", self.options.device, bounds=self._bounds)
        self._plans[self._range(dims)] = _Plan(executor, spec, IdleStates(spec))

    def _program(self, dims: Mapping[str, int]) -> Program:
        return plan_memory(self._module.with_symbols(**self._ranges(dims)), "forward", "forward", 1, 1)

    def _range(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The largest sizes that a plan for ``dims`` is made for."""
        return tuple(1 << (size - 1).bit_length() if self._grows else size for size in dims.values())

    def _ranges(self, dims: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        return {name: (1, high) for name, high in zip(dims, self._range(dims), strict=True)}

    # --- tuning ---------------------------------------------------------------------------------------------------

    def _tuned(self, program: Program) -> tuple[Tunables, tuple[str, ...]]:
        """Tiles of kernels that were measured, and what the report says of them."""
        wanted = self.options.autotune != "off" and measures(self.options)
        tuner = KernelTuner.of(program, candidates(self.options) if wanted else no_candidates, self.options)
        if self.options.autotune != "full" or not tuner.ways:
            choices = tuner.recall()
        else:
            with self._stage("tune kernels"):
                tried = build([program] * len(tuner.variants), self._weights, self.options, tuner.variants)
                spec = EngineSpec.of(program, "module", self.options.device, bounds=self._bounds)
                choices = tuner.choose(tried.executors, Trial.forward(spec, dict(self.parts.hints)))
        return changes_of(choices), tuple(map(str, choices))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _grow(module: Module) -> bool:
    """True when no tensor can shrink while a dim grows."""
    return all(_grows(d) for op in module.main.ops for v in op.results for d in v.shape)


def _grows(size: Expr) -> bool:
    """True when a size cannot shrink while a dim grows."""
    if size.is_Add or size.is_Mul or size.func.__name__ in ("Max", "Min"):
        return all(_grows(a) for a in size.args)
    if isinstance(size, FloorDiv):
        return bool(_grows(size.args[0]) and size.args[1].is_Integer)
    if size.is_Pow:
        return bool(size.args[1].is_Integer and size.args[1] > 0 and _grows(size.args[0]))
    return bool(size.is_Symbol or (size.is_number and size >= 0))


def _laid_out(root: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """A contiguous tensor in the memory layout that PyTorch's own would have."""
    if order is None:
        return root
    return torch.empty_permuted(root.shape, order, dtype=root.dtype, device=root.device).copy_(root)
