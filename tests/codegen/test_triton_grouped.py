"""Grouped experts of real sizes compiled for GPUs that are not there, and what the report says of them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from sympy import Integer

from tests.experts_cases import ExpertsCase
from tilewright.codegen.triton.cost_model import seconds
from tilewright.codegen.triton.device import A100, H100, Device
from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.estimate import candidates, tiles_text
from tilewright.codegen.triton.offline import compile_program
from tilewright.codegen.triton.plan import plan_parts
from tilewright.codegen.triton.program import emit_program
from tilewright.codegen.triton.work import sizes_of
from tilewright.costs import step_cost
from tilewright.ir.errors import VerifyError
from tilewright.ir.program import Program, Step
from tilewright.ir.types import DType
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.plan_memory import plan_memory

HALF = (DType.bf16, DType.bf16)
GPT_OSS = {
    "alpha": 1.702, "limit": 7.0, "offset": 1.0, "interleaved": True, "transposed": True,
    "extras": ("gate_up_bias", "down_bias"),
}  # fmt: skip
LAYERS = {
    "mixtral": ExpertsCase(512, 2, 8, 4096, 14336, *HALF),
    "mixtral in float32": ExpertsCase(512, 2, 8, 4096, 14336),
    "qwen3_moe": ExpertsCase(512, 8, 128, 2048, 768, *HALF),
    "gpt_oss": ExpertsCase(512, 4, 32, 2880, 2880, *HALF, GPT_OSS),
    "one expert": ExpertsCase(512, 1, 1, 256, 256, *HALF),
}


def planned(layer: str, block: int = 128) -> Program:
    module = run_passes(LAYERS[layer].module(), PassOptions(group_experts=block))
    return plan_memory(module, "experts", "prefill", 0, 16)


def products(program: Program) -> list[Step]:
    return [step for step in program.kernels() if step.op.body[0].opcode == "grouped_matmul"]


@pytest.mark.parametrize("device", [A100, H100], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kernel_compiles_and_fits(layer: str, device: Device) -> None:
    """In half precision on tensor cores, those of Hopper where there are any, with loads under way."""
    found = {r.kernel: r for r in compile_program(emit_program(planned(layer), device=device), device.arch)}
    assert len(found) == 5
    assert [r for r in found.values() if not r.fits] == []
    if LAYERS[layer].dtype is DType.bf16:
        for step in products(planned(layer)):
            assert ("wgmma" if device.arch == 90 else "mma.sync") in found[step.name].ptx
            assert "cp.async" in found[step.name].ptx


@pytest.mark.parametrize("layer", ["mixtral", "gpt_oss"])
def test_every_way_that_a_tuner_may_try_compiles(layer: str) -> None:
    program = planned(layer)
    env = Environment.of(program, False, {}, H100)
    for step in products(program)[:1]:
        ways: tuple[Mapping[str, int], ...] = candidates(step.op, env)
        assert len(ways) > 3
        for way in ways:
            (found,) = compile_program(emit_program(program, tunables={step.name: way}), 90, step.name)
            assert found.fits, way


@pytest.mark.parametrize("block", [8, 48])
def test_blocks_without_a_form_are_named(block: int) -> None:
    with pytest.raises(VerifyError, match=f"blocks of {block} rows"):
        emit_program(planned("one expert", block))


def test_the_cost_counts_chosen_experts() -> None:
    """Two tokens with two experts each read four of the 8 matrices at most; 512 tokens read them all."""
    first, second = products(planned("mixtral"))
    for tokens, read in ((2, 4), (512, 8)):
        pairs, blocks = 2 * tokens, (2 * tokens + 8 * 127) // 128
        indices = 4 * (128 * blocks + blocks)
        rows = tokens * 4096 + pairs * 2 * 14336
        cost = step_cost(first, {"B": tokens})
        assert cost.bytes == 2 * (rows + read * 2 * 14336 * 4096) + indices
        assert cost.flops == 2 * pairs * 2 * 14336 * 4096
    assert step_cost(second, {"B": 512}).flops == 2 * 1024 * 14336 * 4096


def test_the_estimate_grows_with_what_is_read() -> None:
    """Twice the tokens of a layer that waits for its weights cost far less than twice the time."""
    program = planned("qwen3_moe")
    (step, _), env = products(program), Environment.of(program, False, {}, H100)
    (plan,) = plan_parts(step.op, env.sizes)
    (tile,) = env.tiles(step.op, (plan,))
    times = [seconds(plan_parts(step.op, sizes_of({"B": n}))[0].work, tile, H100) for n in (256, 512)]
    assert times[0] < times[1] < 1.5 * times[0]
    assert times[1] > 128 * 2 * 768 * 2048 * 2 / H100.bandwidth
    assert tiles_text(step.op, env).startswith("grouped_matmul 64x")
    assert step.op.results[0].shape[1] == Integer(1536)
