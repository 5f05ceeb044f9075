"""One part of the check of a GPU, in a process of its own: ``python -m benchmarks.gpu_parts kernels --into FILE``.

A process of its own can be stopped when its time is over, and a fault on the device, after which nothing more runs in a
process, takes no other part with it. Everything is written as soon as it is measured.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tilewright as tw
from benchmarks import chart_systems, compile_time, peers, torch_kernels
from benchmarks.chart_measure import Conditions, measured, reason_of_failure
from benchmarks.gpu_results import CompiledKernel, Found, KernelTime, LayerTime
from benchmarks.gpu_scales import SCALES, Scale
from benchmarks.large_models import BUILDERS, TINY
from benchmarks.measure import Task
from benchmarks.options import known
from benchmarks.peers import peer_seconds
from benchmarks.probe import device_probe
from benchmarks.results import DECODE, EAGER, OURS, PREFILL, TORCH_COMPILE
from benchmarks.step_gaps import step_gap
from benchmarks.targets import MODEL
from benchmarks.torch_kernels import Kernel
from tilewright.cli import readable_errors
from tilewright.costs import step_cost
from tilewright.errors import OptionError
from tilewright.progress import Progress
from tilewright.report import size_text
from tilewright.runtime.cuda_graph import recorded_bytes
from tilewright.runtime.files import write_atomically
from tilewright.trials import Trial

TORCH_KERNELS = "kernels, torch.compile"
PARTS = ("rates", "kernels", "compile", TORCH_KERNELS, "tuned", "layers")
_ROUNDS = 5
_GAP_TOKENS = 32
_LAYER_REPEATS = 3
_KERNEL_LIMIT = 20.0
"""Seconds for torch.compile to get ready for one kernel."""
_NO_TIME = "no time left"


@readable_errors
def main(
    part: Annotated[str, typer.Argument(help=f"{', '.join(PARTS)}.")],
    into: Annotated[Path, typer.Option(help="File for what it finds.")],
    scale: Annotated[str, typer.Option(help="paper or tiny.")] = "paper",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
) -> None:
    """Run one part."""
    if part not in PARTS:
        raise OptionError(f"part '{part}' is none of {'; '.join(PARTS)}")
    plan = SCALES[known("--scale", scale, tuple(SCALES))[0]]
    run = _Part(plan, torch.device(device), into)
    run.said = {
        "rates": run.rates,
        "kernels": lambda: run.kernels("off"),
        "compile": run.compile,
        "tuned": run.tuned,
        "layers": run.layers,
        TORCH_KERNELS: run.torch_kernels,
    }[part]()
    run.keep()


def read(file: Path) -> tuple[Found, str]:
    """What a part had found when it ended or was stopped, and what it said."""
    if not file.exists():
        return Found(), ""
    data = json.loads(file.read_text())
    return Found.from_data(data["found"]), data["said"]


@dataclass
class _Part:
    plan: Scale
    device: torch.device
    into: Path
    found: Found = field(default_factory=Found)
    said: str = ""

    def keep(self, **more: Any) -> None:
        """Write what is known so far."""
        self.found = replace(self.found, **more)
        data = {"said": self.said, "found": dataclasses.asdict(self.found)}
        write_atomically(self.into, json.dumps(data))

    def rates(self) -> str:
        """The device's bandwidth, and its rate at a large product."""
        with device_probe(self.device) as probe:
            self.keep(bandwidth=max(probe() for _ in range(3)))
        side = self.plan.side
        # Random, as the clock falls less, and the rate is higher, for numbers that are all alike.
        a, b = (torch.randn(side, side, device=self.device).to(torch.bfloat16) for _ in range(2))
        self.keep(half_flops=2.0 * side**3 / peer_seconds(lambda: a @ b, self.device))
        return (
            f"{self.found.bandwidth / 1e9:.0f} GB/s, {self.found.half_flops / 1e12:.3g} TFLOP/s in bfloat16"
        )

    def kernels(self, autotune: str) -> str:
        """Every kernel of the programs of a few layers."""
        fast, said = self._compiled(autotune)
        self._time_kernels(fast, autotune == "full")
        return said

    def torch_kernels(self) -> str:
        """What torch.compile makes of each kernel of the same programs, of those at batch 1 first."""
        fast, said = self._compiled("off")
        torch_kernels.get_ready(self.device)
        engine, end = fast._tilewright.engine, time.monotonic() + self.plan.torch_kernels
        executors = sorted((engine.prefill_executor, *engine.decode_executors.values()), key=_order)
        for executor in executors:
            trial = Trial.of(executor.program, engine.spec)
            for kernel in torch_kernels.kernels(executor.program, trial, self.device):
                cost = step_cost(kernel.step, trial.dims)
                empty = CompiledKernel(executor.program.name, kernel.step.name, cost.bytes, cost.flops)
                found = self._torch_kernel(kernel, empty, end - time.monotonic())
                self.keep(torch_kernels=(*self.found.torch_kernels, found))
        missing = [c for c in self.found.torch_kernels if c.why]
        whys = dict.fromkeys(c.why for c in missing)
        names = {why: ", ".join(f"{c.program} {c.kernel}" for c in missing if c.why == why) for why in whys}
        return "; ".join((said, *(f"{why}: {which}" for why, which in names.items())))

    def _torch_kernel(self, kernel: Kernel, empty: CompiledKernel, left: float) -> CompiledKernel:
        """One of them, within the seconds that are left; others are left out, as they do fail in rivals' compilers."""
        if left < 1:
            return replace(empty, why=_NO_TIME)
        reasons: dict[str, str] = {}
        seconds = 0.0
        with reason_of_failure(empty.kernel, min(left, _KERNEL_LIMIT), reasons):
            seconds = torch_kernels.seconds(kernel)
        return replace(empty, seconds=seconds, why=reasons.get(empty.kernel, ""))

    def tuned(self) -> str:
        """The same behind full tuning; then whole decode steps, and the device memory that recordings of them take."""
        fast, said = self._compiled("full")
        self._time_kernels(fast, True)
        for batch in self.plan.batch_sizes:
            self.keep(gaps=(*self.found.gaps, step_gap(fast, batch, _GAP_TOKENS)))
        self.keep(graph_bytes=recorded_bytes())
        gaps = ", ".join(
            f"batch {g.batch}: {1e6 * g.token:.0f} µs" + (f", {g.share:.1%} of it" if g.known else "")
            for g in self.found.gaps
        )
        recordings = size_text(self.found.graph_bytes)
        return f"{said}; from token to token {gaps} without the model; {recordings} for recordings"

    def compile(self) -> str:
        """The whole model in fresh processes, which is of use where it stands beside the project's target."""
        model = MODEL if self.plan.model in BUILDERS else self.plan.model
        threads = torch.get_num_threads()
        for times in compile_time.steps(model, "bf16", None, threads, 1, self.device.type):
            self.keep(compile_times=times)
        assert self.found.compile_times is not None
        cold, cached = min(self.found.compile_times.cold), min(self.found.compile_times.cached)
        return f"{model}: {cold:.1f} s with an empty cache, {cached:.1f} s from it"

    def layers(self) -> str:
        """A few layers beside torch.compile and eager, at each batch, and a prompt at batch 1."""
        source = self._source()
        size = self.plan.max_length // 2
        generator = torch.Generator().manual_seed(size)
        ids = torch.randint(3, 2000, (1, size), generator=generator).to(self.device)
        left_out: dict[str, str] = {}
        for batch in self.plan.batch_sizes:
            tasks = [Task(DECODE, size, min(32, size // 2), ids)]
            tasks += [Task(PREFILL, size, size, ids)] if batch == 1 else []
            names = (EAGER, TORCH_COMPILE, f"{OURS} bf16")
            with (
                device_probe(self.device) as probe,
                chart_systems.built(source, names, batch, self.plan.max_length, self.plan.limit) as (
                    some,
                    why,
                ),
            ):
                left_out |= why
                for task in tasks:
                    how = Conditions(self.device, _LAYER_REPEATS, self.plan.limit, probe, lambda _: None)
                    result = measured(task, some, how)
                    left_out |= result.left_out
                    series = result.measure.series if result.measure else ()
                    times = (
                        LayerTime(s.system, task.name, batch, size, task.steps, s.seconds) for s in series
                    )
                    self.keep(layers=(*self.found.layers, *times))
        return "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "all systems"

    def _source(self) -> Any:
        torch.manual_seed(0)
        with self.device:
            model = {**BUILDERS, **TINY}[self.plan.model](self.plan.layers, 0)
        return model.to(torch.bfloat16).eval()

    def _compiled(self, autotune: str) -> tuple[Any, str]:
        source, start = self._source(), time.monotonic()
        fast = tw.compile(
            source, batch_sizes=self.plan.batch_sizes, max_length=self.plan.max_length, autotune=autotune,
            progress=Progress(),
        )  # fmt: skip
        return fast, "; ".join((f"compiled in {time.monotonic() - start:.1f} s", *fast.report().notes))

    def _time_kernels(self, fast: Any, tuned: bool) -> None:
        engine = fast._tilewright.engine
        for executor in (*engine.decode_executors.values(), engine.prefill_executor):
            trial = Trial.of(executor.program, engine.spec)
            given = (trial.inputs, trial.dims, trial.state, trial.outputs)
            rounds = [executor.step_seconds(*given) for _ in range(_ROUNDS + 1)][1:]
            estimates = {e.kernel: e.seconds for e in _estimates(executor.program, trial.dims, self.device)}
            fastest: dict[str, tuple[float, ...]] = {}  # a kernel runs in several places
            steps = {}
            for (step, _, _), seconds in zip(
                executor.program.trace(), zip(*rounds, strict=True), strict=True
            ):
                if step.op.opcode == "kernel":
                    fastest[step.name] = min(seconds, fastest.get(step.name, seconds), key=min)
                    steps[step.name] = step
            for name, seconds in fastest.items():
                cost = step_cost(steps[name], trial.dims)
                time_ = KernelTime(
                    executor.program.name, tuned, name, seconds, cost.bytes, cost.flops,
                    estimates.get(name, 0.0), peers.of(steps[name], trial.dims, self.device),
                )  # fmt: skip
                self.keep(kernels=(*self.found.kernels, time_))


def _order(executor: Any) -> tuple[int, bool]:
    """Decoding at batch 1 first, then the prompt, which is tried at batch 1 too."""
    decodes = executor.program.phase == "decode"
    return executor.program.batch if decodes else 1, not decodes


def _estimates(program: Any, dims: dict[str, int], device: torch.device) -> tuple[Any, ...]:
    from tilewright.estimates import estimates, gpu

    return estimates(program, dims, gpu(device), {}) if device.type == "cuda" else ()


if __name__ == "__main__":
    typer.run(main)
