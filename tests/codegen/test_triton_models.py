"""Every kernel of real model shapes compiled for GPUs that are not there: no spills, shared memory within the limit.

The models have real widths and vocabularies, but one layer each, since all layers share their kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from benchmarks.large_models import without_values
from tilewright.codegen.triton.device import A100, H100, Device
from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.estimate import candidates
from tilewright.codegen.triton.offline import SHARED_LIMIT, compile_program
from tilewright.codegen.triton.program import emit_program

from .triton_programs import plan


def smollm2() -> PreTrainedModel:
    """The shape of SmolLM2-135M."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=1,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
        )
    )


def opt() -> PreTrainedModel:
    """The shape of OPT-125M."""
    return OPTForCausalLM(OPTConfig(num_hidden_layers=1))


def gpt2() -> PreTrainedModel:
    """The shape of GPT-2."""
    return GPT2LMHeadModel(GPT2Config(n_layer=1))


def minilm() -> PreTrainedModel:
    """The shape of all-MiniLM-L6-v2."""
    return BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=1536)
    )


DEVICES = {80: A100, 90: H100}
CASES: list[tuple[Callable[[], PreTrainedModel], torch.dtype, int]] = [
    *((smollm2, dtype, arch) for dtype in (torch.bfloat16, torch.float32) for arch in (80, 90)),
    (opt, torch.float32, 80),
    (minilm, torch.float32, 90),
    (gpt2, torch.bfloat16, 90),
]


@pytest.mark.parametrize(("build", "dtype", "arch"), CASES)
def test_every_kernel_compiles_and_fits(
    build: Callable[[], PreTrainedModel], dtype: torch.dtype, arch: int
) -> None:
    planned = plan(build().to(dtype).eval(), (1,), 512, splits=16, guesses=7 if build is gpt2 else 0)
    found = [
        r
        for p in planned.programs.values()
        for r in compile_program(emit_program(p, device=DEVICES[arch]), arch)
    ]
    assert len(found) == sum(len(p.kernels()) for p in planned.programs.values())
    assert [r for r in found if not r.fits] == []


@pytest.mark.parametrize(
    ("name", "batch_sizes", "weights"),
    [
        ("llama2-7b", (1, 16), ""),
        ("llama2-13b", (1,), "int4"),
        ("llama2-7b", (1, 8), "int8"),
        ("llama2-7b", (8,), "int4"),
        ("opt-6.7b", (64,), "int8"),
    ],
)
def test_large_models_compile_and_fit(name: str, batch_sizes: tuple[int, ...], weights: str) -> None:
    """Decoding with the widths of the models that the charts of the field are drawn for, each form of weights once."""
    planned = plan(without_values(name, layers=1), batch_sizes, 2048, splits=16, weights=weights)
    programs = [p for name, p in planned.programs.items() if name != "prefill" or not weights]
    found = [r for p in programs for r in compile_program(emit_program(p), 90)]
    assert len(found) == sum(len(p.kernels()) for p in programs)
    assert [r for r in found if not r.fits] == []
    # Nothing is known of what runs before a program, so its first kernel waits for all of it.
    assert all("griddepcontrol" not in r.ptx for r in found if r.kernel == "main_0_gather")
    for kernel in (r for r in found if r.kernel.endswith("matmul")):
        # The first weights are requested, or all that a program sums, before the kernel waits for its predecessor.
        early = kernel.ptx[: kernel.ptx.index("griddepcontrol.wait")]
        assert "prefetch.global.L2" in early or early.count("ld.global.v4.b32") >= 8
        # Codes come in whole words, never byte by byte.
        assert not re.search(r"ld\.global[.\w:]*\.[bus]8\b", kernel.ptx)


@pytest.mark.parametrize("device", [A100, H100], ids=["sm_80", "sm_90"])
def test_a_layer_as_one_persistent_kernel_compiles_and_fits(device: Device) -> None:
    """Two programs on each multiprocessor, all resident at once; a barrier counts arrivals and waits for the others."""
    planned = plan(without_values("llama2-7b", layers=1), (1,), 2048, splits=16)
    source = emit_program(planned.programs["decode_b1"], device=device, residents=2)
    kernel = next(k for k in source.kernels if k.name == "layer0_persistent")
    assert dict(kernel.options)["launch_cooperative_grid"]
    assert kernel.programs == 2 * device.multiprocessors
    (found,) = compile_program(source, device.arch, kernel.name)
    assert found.fits
    assert 2 * found.shared <= SHARED_LIMIT[device.arch]
    assert 2 * found.registers * 32 * dict(kernel.options)["num_warps"] <= 65536
    kernels = sum(k.name.startswith("layer0") for k in source.kernels) - 1
    assert found.ptx.count("atom.global.gpu.acq_rel") == kernels - 1
    assert found.ptx.count("ld.global.gpu.acquire") == kernels - 1
    assert "griddepcontrol" not in found.ptx


@pytest.mark.parametrize("device", [A100, H100], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "weights"), [("llama2-7b", ""), ("opt-6.7b", "int4")])
def test_every_way_that_a_tuner_may_try_can_be_printed(name: str, weights: str, device: Device) -> None:
    """At real sizes, where defaults and their rivals differ in every field of a tile."""
    planned = plan(without_values(name, layers=1), (1, 64), 2048, splits=16, weights=weights)
    for program in planned.programs.values():
        env = Environment.of(program, False, {}, device)
        ways = {s.name: candidates(s.op, env) for s in program.kernels()}
        assert max(map(len, ways.values())) > 3
        texts = set()
        for n in range(max(map(len, ways.values()))):
            tunables = {name: found[min(n, len(found) - 1)] for name, found in ways.items()}
            texts.add(emit_program(program, tunables=tunables, device=device).text)
        assert len(texts) == max(map(len, ways.values()))


def test_a_decoder_layer_is_few_kernels_at_decode() -> None:
    """Six for SmolLM2: QKV with RoPE and the append, split attention, its merge, output, gate and up, down."""
    planned = plan(smollm2().eval(), (1,), 512, splits=16)
    source = emit_program(planned.programs["decode_b1"])
    layer = [k for k in source.kernels if k.name.startswith("layer0")]
    templates = ["matmul", "attention", "reduction", "matmul", "matmul", "matmul"]
    assert [k.templates[0] for k in layer] == templates
    assert layer[0].templates == ("matmul",) * 3
    assert source.text == emit_program(planned.programs["decode_b1"]).text
