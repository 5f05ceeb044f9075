"""What a GPU program should take, kernel by kernel, by the cost model: for reports, whether or not a GPU is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.codegen.triton.cost_model import floor_seconds
from tilewright.codegen.triton.device import H100, Device, device_like
from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.estimate import estimated_seconds, tiles_text
from tilewright.codegen.tunables import Tunables, text_of
from tilewright.ir.module import walk
from tilewright.ir.program import Program, Step
from tilewright.ir.types import DType

from .costs import Cost, step_cost


@dataclass(frozen=True)
class KernelEstimate:
    """One distinct kernel of a program. runs: per run of the program. floor_seconds: of one run, from its bytes and
    FLOPs at the rates that the device reaches. seconds: the cost model's time of one run, its launch included. tuned:
    fields of the tile that a tuner has put in place of the cost model's, "" where it has put none."""

    kernel: str
    tile: str
    runs: int
    bytes: int
    flops: int
    floor_seconds: float
    seconds: float
    tuned: str = ""


def gpu(device: torch.device) -> Device:
    """The GPU that ``device`` is; for any other device an H100, which Triton programs are then meant for."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    arch = 10 * found.major + found.minor
    if "H100" in found.name and found.multi_processor_count == H100.multiprocessors:
        return H100
    shared = getattr(found, "shared_memory_per_block_optin", 0)
    return device_like(found.name, arch, found.multi_processor_count, _bandwidth(found), shared)


def _bandwidth(properties: Any) -> float:
    """Bytes/s that a device's memory reaches: nine tenths of its clock (kHz) times its bus (bits); 0 where unknown."""
    clock = getattr(properties, "memory_clock_rate", 0)
    return 0.9 * 2 * clock * 1e3 * getattr(properties, "memory_bus_width", 0) / 8


def estimates(
    program: Program, dims: Mapping[str, int], device: Device, tunables: Tunables
) -> tuple[KernelEstimate, ...]:
    """Every distinct kernel of a program at the given sizes of its dims, in order."""
    env = Environment.of(program, False, tunables, device)
    sizes = {**program.largest[0], **dims}
    runs: dict[str, int] = {}
    for step, _, _ in program.trace():
        runs[step.name] = runs.get(step.name, 0) + 1
    return tuple(_estimate(step, runs[step.name], env, sizes) for step in program.kernels())


def _estimate(step: Step, runs: int, env: Environment, sizes: Mapping[str, int]) -> KernelEstimate:
    cost: Cost = step_cost(step, sizes)
    seconds = estimated_seconds(step.op, env, sizes)
    return KernelEstimate(
        kernel=step.name,
        tile=tiles_text(step.op, env),
        runs=runs,
        bytes=cost.bytes,
        flops=cost.flops,
        floor_seconds=floor_seconds(cost.bytes, cost.flops, _is_half(step), env.device),
        seconds=seconds,
        tuned=text_of(changes) if (changes := env.tunables.get(step.name)) else "",
    )


def _is_half(step: Step) -> bool:
    """Whether a kernel's products, if it has any, go to tensor cores at half precision."""
    kinds = ("matmul", "grouped_matmul", "attention", "attention_split")
    products = [o for o in walk(step.op.body) if o.opcode in kinds]
    return all(o.operands[0].dtype in (DType.bf16, DType.f16) for o in products)
