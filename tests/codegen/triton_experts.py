"""A layer of experts through the whole pipeline and generated Triton code, compared with float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tests.experts_cases import CASES
from tilewright.codegen.triton.program import emit_program
from tilewright.estimates import gpu
from tilewright.ir.reference import evaluate
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.plan_memory import plan_memory
from tilewright.runtime.kernel_modules import write_module
from tilewright.runtime.triton_executor import TritonExecutor

from .random_programs import worst_excess


def experts_errors(
    name: str, folder: Path, block: int = 0, tuned: Mapping[str, int] | None = None, device: str = "cpu"
) -> list[str]:
    """By how much a layer's results are further from float64 than they may be; nothing where they are not.

    block: most rows of the blocks in which tokens are grouped by expert; 0 spells experts out. tuned: fields of every
    tile. device: a GPU, or the CPU for Triton's interpreter.
    """
    case = CASES[name]
    inputs, dims, module = case.inputs(), {"B": case.tokens}, case.module()
    fused = run_passes(module, PassOptions(spell_out_experts=True, group_experts=block))
    program, where = plan_memory(fused, "experts", "forward", 0, 16), torch.device(device)
    tunables = {step.name: tuned or {} for step in program.kernels()}
    source = emit_program(program, device == "cpu", tunables=tunables, device=gpu(where))
    found = torch.full_like(inputs["x"], float("nan"), device=where)
    executor = TritonExecutor(program, {}, write_module(folder, source.text), where)
    executor.run({n: t.to(where) for n, t in inputs.items()}, dims, None, {"output0": found})
    (plain,), (exact,) = evaluate(module, inputs, {}, dims), evaluate(module, inputs, {}, dims, exact=True)
    excess = worst_excess(found.cpu(), plain, exact, found.dtype)
    return [] if excess <= 0 else [f"{excess:.3g} too far from float64"]
