"""What a check of a GPU found, and the tables that it is shown as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from benchmarks import stored
from benchmarks.chart_results import Chart
from benchmarks.results import CompileTimes
from benchmarks.rows import NOTHING, Rows, figure
from benchmarks.samples import Spread
from benchmarks.step_gaps import StepGap
from tilewright.report import size_text


@dataclass(frozen=True)
class KernelTime:
    """A kernel of a program: seconds of its runs, and bytes and FLOPs of one. estimate: seconds that the cost model
    expects of its default tile; 0 without one. peer: seconds that the vendor's library takes for the same product or
    attention; 0 where it has none."""

    program: str
    tuned: bool
    kernel: str
    seconds: tuple[float, ...]
    bytes: int
    flops: int
    estimate: float
    peer: float

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class CompiledKernel:
    """Seconds that torch.compile's code takes for the ops of a kernel; 0 without, and why. bytes, flops: as the
    kernel's own, since another plan may have other ops in a kernel of the same name."""

    program: str
    kernel: str
    bytes: int
    flops: int
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class LayerTime:
    """Seconds of samples of one system on the few layers, whole: ``decode`` of ``steps`` tokens at a context of
    ``size``, or ``prefill`` of ``size`` tokens."""

    system: str
    task: str
    batch: int
    size: int
    steps: int
    seconds: tuple[float, ...]

    @property
    def each(self) -> float:
        """Seconds of a step, or of the prompt."""
        return Spread.of(self.seconds).median / (self.steps if self.task == "decode" else 1)


@dataclass(frozen=True)
class Found:
    """What the parts gave. bandwidth: bytes/s that a read of device memory reaches. half_flops: FLOP/s of a large
    bfloat16 product. gaps: decode steps of the few layers. graph_bytes: memory that recorded decode steps hold on the
    device. compile_times: of the whole model, in fresh processes. chart: the points that this run measured.
    torch_kernels: of the untuned programs' kernels, those that torch.compile's time was enough for."""

    bandwidth: float = 0.0
    half_flops: float = 0.0
    kernels: tuple[KernelTime, ...] = ()
    layers: tuple[LayerTime, ...] = ()
    gaps: tuple[StepGap, ...] = ()
    graph_bytes: int = 0
    compile_times: CompileTimes | None = None
    chart: Chart | None = None
    torch_kernels: tuple[CompiledKernel, ...] = ()

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Found:
        """What plain data describes. Raises KeyError or TypeError where something is missing."""
        times = data["compile_times"]
        made = {
            "kernels": stored.records(KernelTime, data["kernels"]),
            "torch_kernels": stored.records(CompiledKernel, data.get("torch_kernels", [])),
            "layers": stored.records(LayerTime, data["layers"]),
            "gaps": stored.records(StepGap, data["gaps"]),
            "compile_times": stored.records(CompileTimes, [times])[0] if times else None,
            "chart": Chart.from_data(data["chart"]) if data["chart"] else None,
        }
        return cls(**data | made)


@dataclass(frozen=True)
class GpuCheck:
    """One run. parts: what each part said, by its name; "failed: ..." with the reason."""

    KIND: ClassVar[str] = "gpu-check"
    SCHEMA: ClassVar[int] = 3
    COMMAND: ClassVar[str] = "python -m benchmarks.gpu_check"

    date: str
    command: str
    scale: str
    machine: dict[str, Any]
    versions: dict[str, str]
    found: Found = Found()
    parts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> GpuCheck:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        return cls(**data | {"found": Found.from_data(data["found"])})

    @property
    def failed(self) -> bool:
        """Whether a part went wrong, or had no time."""
        return any(said.startswith(("failed", "left out")) for said in self.parts.values())

    def floor(self, kernel: KernelTime) -> float:
        """Seconds that the bytes or the FLOPs of a kernel take at least at the measured rates; 0 without those."""
        found = self.found
        if not found.bandwidth or not found.half_flops:
            return 0.0
        return max(kernel.bytes / found.bandwidth, kernel.flops / found.half_flops)


def tables(check: GpuCheck) -> list[Rows]:
    """Everything that was measured of kernels, layers and compiling; the chart has tables of its own."""
    found = (
        _rates(check),
        _kernels(check),
        _layers(check.found.layers),
        _gaps(check.found),
        _compiling(check.found),
    )
    return [rows for rows in found if rows.rows]


def _rates(check: GpuCheck) -> Rows:
    found = check.found
    row = (
        check.machine["device"],
        f"{found.bandwidth / 1e9:.0f} GB/s",
        f"{found.half_flops / 1e12:.3g} TFLOP/s" if found.half_flops else NOTHING,
    )
    return Rows(
        "Measured peaks, which floors and shares refer to", ("", "read bandwidth", "bfloat16 product"),
        (row,) if found.bandwidth else (),
    )  # fmt: skip


def _kernels(check: GpuCheck) -> Rows:
    rows = []
    compiled = {(c.program, c.kernel, c.bytes, c.flops): c.seconds for c in check.found.torch_kernels}
    for k in check.found.kernels:
        floor, rate = check.floor(k), 1 / k.best if k.best else 0.0
        bound = "TFLOP/s" if floor and k.flops / check.found.half_flops == floor else "GB/s"
        reached = k.flops * rate / 1e12 if bound == "TFLOP/s" else k.bytes * rate / 1e9
        rows.append(
            (
                f"{k.program}{', tuned' if k.tuned else ''}: {k.kernel}",
                _micro(k.best),
                _micro(floor),
                f"{floor * rate:.0%}" if floor else NOTHING,
                f"{figure(reached)} {bound}",
                _micro(k.estimate),
                _micro(k.peer),
                _micro(compiled.get((k.program, k.kernel, k.bytes, k.flops), 0.0)),
            )
        )
    columns = (
        "",
        "µs",
        "floor µs",
        "of floor",
        "reached",
        "estimate µs",
        "cuBLAS or sdpa µs",
        "torch.compile µs",
    )
    return Rows("Kernels, each in its place in the program", columns, tuple(rows))


def _layers(layers: Sequence[LayerTime]) -> Rows:
    systems = tuple(dict.fromkeys(t.system for t in layers))
    tasks = dict.fromkeys((t.task, t.batch, t.size) for t in layers)
    times = {(t.system, t.task, t.batch, t.size): t.each for t in layers}
    rows = tuple(
        (
            f"{task}, batch {batch}, {'context' if task == 'decode' else 'prompt'} {size}",
            *(_micro(times.get((s, task, batch, size), 0.0)) for s in systems),
        )
        for task, batch, size in tasks
    )
    return Rows(
        "Microseconds of these layers with embedding and head: a decode step, or a prompt",
        ("", *systems),
        rows,
    )


def _gaps(found: Found) -> Rows:
    rows = tuple(
        (f"batch {g.batch}", _micro(g.token), _micro(g.model), f"{g.share:.1%}" if g.known else NOTHING)
        for g in found.gaps
    )
    title = "Between decode steps of these layers"
    if found.graph_bytes:
        title += f"; recordings (CUDA graphs) hold {size_text(found.graph_bytes)}"
    return Rows(title, ("", "token to token µs", "the model's part µs", "without the model"), rows)


def _compiling(found: Found) -> Rows:
    times = found.compile_times
    row = tuple(f"{figure(min(s))} s" if s else NOTHING for s in (times.cold, times.cached)) if times else ()
    return Rows(
        "Compiling the whole model, untuned, in a fresh process",
        ("", "empty cache", "from the cache"),
        ((times.precision, *row),) if times else (),
    )


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds else NOTHING
