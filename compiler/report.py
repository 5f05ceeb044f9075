"""What came out of a compilation, in numbers: ``print(fast.report())``, or ``fast.report().to_dict()`` for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from tilewright.ir.module import Op
from tilewright.ir.program import Program

from .costs import Dims, program_cost
from .estimates import KernelEstimate


def _is_vendor(op: Op) -> bool:
    """True for a product that ``vendor_matmul`` gave away; lowering has a rule for linear, and makes no such call."""
    return op.opcode == "call_torch" and op.attr("target") == "aten.linear.default"


@dataclass(frozen=True)
class PhaseReport:
    """One program. launches: kernels and PyTorch calls of one run. vendor: those of them that the tuner has given to
    the vendor's library. Bytes and FLOPs hold at the sizes in ``dims``. estimates: of each kernel, where there is a
    cost model for the backend; for ``device``, which need not be there.
    """

    name: str
    phase: str
    batch: int
    dims: dict[str, int]
    kernels: int
    kernels_per_layer: int
    launches: int
    vendor: int
    bytes: int
    flops: int
    arena_bytes: int
    device: str = ""
    estimates: tuple[KernelEstimate, ...] = ()

    @property
    def floor_seconds(self) -> float:
        """The least that a run's kernels could take, at the rates that the device reaches; 0 without estimates."""
        return sum(e.runs * e.floor_seconds for e in self.estimates)

    @property
    def estimated_seconds(self) -> float:
        """The cost model's time of a run; 0 without estimates."""
        return sum(e.runs * e.seconds for e in self.estimates)

    @staticmethod
    def of(
        program: Program, dims: Dims, device: str = "", estimates: tuple[KernelEstimate, ...] = ()
    ) -> PhaseReport:
        """Count what is in ``program``; the kernels of a layer are those of the longest routine that is a layer."""
        layers = {call.routine for call in program.calls if call.scope}
        cost = program_cost(program, dims)
        return PhaseReport(
            name=program.name,
            phase=program.phase,
            batch=program.batch,
            dims=dict(dims),
            kernels=len(program.kernels()),
            kernels_per_layer=max((len(program.routines[n].steps) for n in layers), default=0),
            launches=sum(len(program.routines[call.routine].steps) for call in program.calls),
            vendor=sum(_is_vendor(step.op) for step, _, _ in program.trace()),
            bytes=cost.bytes,
            flops=cost.flops,
            arena_bytes=program.arena_bytes,
            device=device,
            estimates=estimates,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes held. shared: the original model's own weights, used as they are. merged: rearranged weights of which the
    original parameters are views now, so they are held once too. prepared: weights in another form, held in addition.
    kv_per_sequence: KV state of one sequence at max_length.
    """

    shared: int = 0
    merged: int = 0
    prepared: int = 0
    kv_per_sequence: int = 0

    def plus(self, other: Memory) -> Memory:
        """What both hold."""
        return Memory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Memory)))


@dataclass(frozen=True)
class Fallback:
    """An op without a kernel, run by PyTorch. ``calls`` counts its runs per run of the program."""

    phase: str
    target: str
    module: str
    source: str
    calls: int

    @staticmethod
    def of(program: Program) -> tuple[Fallback, ...]:
        """Every PyTorch call of a program."""
        counts: dict[tuple[str, str, str], int] = {}
        for call in program.calls:
            for step in program.routines[call.routine].steps:
                if step.op.opcode == "call_torch" and not _is_vendor(step.op):
                    key = (str(step.op.attr("target")), step.op.loc.module, step.op.loc.source)
                    counts[key] = counts.get(key, 0) + 1
        return tuple(Fallback(program.name, *key, calls) for key, calls in counts.items())


@dataclass(frozen=True)
class Report:
    """Everything worth knowing about a compiled model; plain data.

    eager_peak_bytes: estimated peak activations of eager PyTorch at the largest sizes of the prefill or forward
    program, for which its arena is planned too, with the last token's logits alone (as generate() asks for).
    seconds: wall time per stage of compilation. cache: what was found ready (True) or had to be built (False).
    compiled_while_running: kernels that calls had to compile up to now; those of a GPU all run once during compilation.
    """

    model: str = ""
    backend: str = ""
    device: str = ""
    dtype: str = ""
    phases: tuple[PhaseReport, ...] = ()
    memory: Memory = Memory()
    eager_peak_bytes: int = 0
    fallbacks: tuple[Fallback, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()
    cache: tuple[tuple[str, bool], ...] = ()
    compiled_while_running: int = 0

    @property
    def kernels_per_layer(self) -> int:
        """Kernels of a layer in the first program: decode for a decoder."""
        return self.phases[0].kernels_per_layer

    @property
    def arena_bytes(self) -> int:
        """Arena of the first program: decode for a decoder."""
        return self.phases[0].arena_bytes

    def phase(self, name: str) -> PhaseReport:
        """The first program of that phase (``decode``, ``prefill``, ``forward``; of an encoder-decoder also
        ``per_request`` and ``encoder``)."""
        return next(p for p in self.phases if p.phase == name)

    def with_part(self, part: Report, name: str) -> Report:
        """This report together with that of a part of the model, whose programs are shown under ``name``."""

        def named(program: str) -> str:
            return name if program == "forward" else f"{name}.{program}"

        return replace(
            self,
            phases=(*self.phases, *(replace(p, name=named(p.name), phase=name) for p in part.phases)),
            memory=self.memory.plus(part.memory),
            eager_peak_bytes=max(self.eager_peak_bytes, part.eager_peak_bytes),
            fallbacks=(*self.fallbacks, *(replace(f, phase=named(f.phase)) for f in part.fallbacks)),
            notes=(*self.notes, *(f"{name}: {note}" for note in part.notes)),
            seconds=(*((f"{name}: {stage}", s) for stage, s in part.seconds), *self.seconds),
            cache=(*((f"{name}: {stage}", ready) for stage, ready in part.cache), *self.cache),
            compiled_while_running=self.compiled_while_running + part.compiled_while_running,
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON-ready data."""
        return asdict(self)

    def __str__(self) -> str:
        text = StringIO()
        console = Console(file=text, width=110, no_color=True)
        console.print(f"{self.model} · {self.backend} on {self.device} · {self.dtype}", highlight=False)
        kernels = (kernel_table(p) for p in self.phases)
        for table in (self._phases(), *kernels, self._memory(), self._fallbacks(), self._seconds()):
            if table.row_count:
                console.print(table)
        console.print(f"kernels compiled while running: {self.compiled_while_running}", highlight=False)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False)
        return text.getvalue().rstrip()

    def _phases(self) -> Table:
        names = ("program", "sizes", "kernels", "per layer", "launches", "vendor", "moved", "FLOPs", "arena")
        table = _table("One run of each program", *names)
        for p in self.phases:
            sizes = " ".join(f"{name}={size}" for name, size in sorted(p.dims.items()))
            counts = (str(p.kernels), str(p.kernels_per_layer), str(p.launches), str(p.vendor))
            table.add_row(
                p.name, sizes, *counts, size_text(p.bytes), _count_text(p.flops), size_text(p.arena_bytes)
            )
        return table

    def _memory(self) -> Table:
        table = _table("Memory", "what", "bytes")
        memory = self.memory
        table.add_row("weights, the original's own", size_text(memory.shared))
        table.add_row("weights, in joint buffers that the original shares", size_text(memory.merged))
        table.add_row("weights, copies in another form", size_text(memory.prepared))
        table.add_row("KV state per sequence at max_length", size_text(memory.kv_per_sequence))
        table.add_row("largest arena", size_text(max((p.arena_bytes for p in self.phases), default=0)))
        table.add_row("eager's peak activations at those sizes (estimate)", size_text(self.eager_peak_bytes))
        return table

    def _fallbacks(self) -> Table:
        table = _table("Ops that PyTorch runs", "program", "op", "module", "source", "calls")
        for f in self.fallbacks:
            table.add_row(f.phase, f.target, f.module, f.source, str(f.calls))
        return table

    def _seconds(self) -> Table:
        table = _table("Compilation", "stage", "seconds", "from the cache")
        ready = dict(self.cache)
        for stage, seconds in self.seconds:
            table.add_row(stage, f"{seconds:.2f}", {True: "yes", False: "no", None: ""}[ready.get(stage)])
        return table


def kernel_table(phase: PhaseReport) -> Table:
    """A row per kernel of a program: the least that a run could take, and what the cost model expects."""
    sizes = ", ".join(f"{name}={size}" for name, size in sorted(phase.dims.items()))
    title = f"Kernels of {phase.name} at {sizes}, estimated for {phase.device} (not measured)"
    table = _table(title, "kernel", "runs", "moved", "FLOPs", "floor µs", "estimate µs", "tile")
    for e in phase.estimates:
        tile = f"{e.tile} (tuned: {e.tuned})" if e.tuned else e.tile
        times = (f"{e.floor_seconds * 1e6:.1f}", f"{e.seconds * 1e6:.1f}")
        table.add_row(e.kernel, str(e.runs), size_text(e.bytes), _count_text(e.flops), *times, tile)
    if phase.estimates:
        whole = (f"{phase.floor_seconds * 1e6:.1f}", f"{phase.estimated_seconds * 1e6:.1f}")
        total = (str(phase.launches), size_text(phase.bytes), _count_text(phase.flops))
        table.add_row("one run", *total, *whole, "", style="bold")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 or column in _TEXT else "right")
    return table


_TEXT = ("sizes", "op", "module", "source", "tile")


def size_text(count: int) -> str:
    """Bytes for people: ``1.50 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _count_text(count: int) -> str:
    size = float(count)
    for unit in ("", "K", "M", "G"):
        if size < 1000:
            return f"{size:.0f}" if not unit else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} T"
