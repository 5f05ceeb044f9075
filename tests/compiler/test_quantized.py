"""Models with weights as int8, int4 and fp8, against Hugging Face running on what is left of those weights.

Prefill computes in floats, so it must equal that but for the order of sums. A decode step of the C++ backend rounds its
activations to int8 as well; it is held to what the same rounding costs Hugging Face.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import tilewright as tw
from tests.closeness import FACTOR, assert_no_further
from tilewright.cache import cache_of, with_cache
from tilewright.ir.quantization import dequantize, round_activations
from tilewright.quantize_native import quantizer

from .models import DECODERS, tiny

BACKENDS = ("reference", "cpp")
FORMS = ("int8", "int4", "fp8")
ROUNDING = ("int8", "int4")
"""Forms whose decode steps in C++ round activations as well."""
GROUP = 32
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, as for models in their own dtype (test_api.py)


def model_of(family: str, **config: Any) -> PreTrainedModel:
    """A tiny model, or "wide": a Llama whose heads are whole blocks of rows, so that every product reads blocks."""
    if family != "wide" and not config:
        return tiny(family)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 160, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 224, "head_dim": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def products(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module with a matrix that products stream."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def is_table(model: nn.Module, module: Any) -> bool:
    return isinstance(model, PreTrainedModel) and module.weight is model.get_input_embeddings().weight


def through_codes(weight: Tensor, weights: str, table: bool, backend: str) -> Tensor:
    """What is left of a matrix [N, K], in float32. (Models stack q, k and v first, but rows are coded one by one.)
    backend: each has codes of its own where two are equally good (``test_quantize_native.py``)."""
    if weights == "fp8":
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        return (weight.float() / scale).to(torch.float8_e4m3fn).float() * scale
    bits = 8 if weights == "int8" or table else 4
    group = GROUP if bits == 4 or table else weight.shape[1]
    codes, scale, *minimum = quantizer(backend)(weight.contiguous(), bits, group)
    return dequantize(codes, scale, minimum[0] if minimum else None, bits, group, torch.float32)


@torch.no_grad()
def twin_of(
    model: PreTrainedModel,
    weights: str,
    dtype: torch.dtype = torch.float32,
    wide: tuple[str, ...] = (),
    backend: str = "cpp",
) -> Any:
    """A copy with coded weights: all but those whose names end in one of ``wide``. A tied embedding is int8 in
    groups."""
    twin = copy.deepcopy(model).to(dtype)
    for (name, module), (_, original) in zip(products(twin), products(model), strict=True):
        table = is_table(model, original)
        turned = isinstance(module, Conv1D)
        if not name.endswith(wide or ("-",)):
            weight = original.weight.detach()
            coded = through_codes(weight.T if turned else weight, weights, table, backend)
            module.weight.copy_(coded.T if turned else coded)
    return twin


def rounding(twin: Any) -> Any:
    """A copy that rounds what goes into every product, as a decode step of the C++ backend may."""
    twin = copy.deepcopy(twin)
    for _, module in products(twin):
        module.register_forward_pre_hook(lambda _, args: (round_activations(args[0], GROUP),))
    return twin


@cache
def compiled(
    family: str, weights: str, backend: str, sizes: tuple[int, ...] = (3,)
) -> tuple[PreTrainedModel, Any, Any]:
    """A model, what it is compiled to, and Hugging Face on the same coded weights."""
    model = model_of(family)
    fast = compile_as(model, weights, backend, sizes)
    return model, fast, twin_of(model, weights, backend=backend)


def compile_as(model: Any, weights: str | None, backend: str = "cpp", sizes: tuple[int, ...] = (3,)) -> Any:
    return tw.compile(
        model, weights=weights, backend=backend, batch_sizes=sizes, max_length=64, autotune="off"
    )


def batch(rows: int, length: int = 9) -> tuple[Tensor, Tensor]:
    """Prompts with more or less padding on the left."""
    ids = torch.randint(10, 120, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for n in range(rows):
        mask[n, : 2 * n % 7] = 0
    return ids, mask


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# Prefill


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_prefill_is_that_of_the_coded_weights(backend: str, weights: str, family: str) -> None:
    """A wrong scale, block or column shows as more than the order of sums; so does a weight left wide, or another."""
    model, fast, twin = compiled(family, weights, backend)
    ids, mask = batch(3)
    found, expected, before = (m(ids, attention_mask=mask)[0][mask.bool()] for m in (fast, twin, model))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert rms(found - before) > 100 * rms(found - expected)


@cache
def in_two_bytes(dtype: torch.dtype) -> tuple[PreTrainedModel, Any, str]:
    """A model in that dtype, what it is compiled to, and the form of its weights."""
    model, weights = model_of("wide").to(dtype), "int4" if dtype == torch.bfloat16 else "int8"
    return model, compile_as(model, weights), weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_prefill_in_two_bytes(dtype: torch.dtype) -> None:
    """Codes become float32, or bfloat16 where the processor multiplies that: no further off than eager."""
    model, fast, weights = in_two_bytes(dtype)
    ids, mask = batch(3)
    ours, eager, exact = (
        m(ids, attention_mask=mask).logits[mask.bool()]
        for m in (fast, twin_of(model, weights, dtype), twin_of(model, weights, torch.float64))
    )
    assert_no_further(ours, eager, exact, f"{weights} {dtype}")


@torch.no_grad()
def test_prefill_in_bfloat16_on_the_reference_backend() -> None:
    """The reference rounds every op, as eager does."""
    model = tiny("llama").bfloat16()
    ids, mask = batch(3)
    ours, eager, exact = (
        m(ids, attention_mask=mask).logits[mask.bool()]
        for m in (
            compile_as(model, "int4", "reference"),
            twin_of(model, "int4", torch.bfloat16, backend="reference"),
            twin_of(model, "int4", torch.float64, backend="reference"),
        )
    )
    assert_no_further(ours, eager, exact)


# Decode


@torch.no_grad()
def decode_step(model: Any, prompt: Any, by: Any = None) -> Tensor:
    """Logits of a token after a prompt (ids and mask) that ``model`` reads; ``by`` another model where given."""
    ids, mask = prompt
    past = with_cache(model.forward, cache_of(model(ids, attention_mask=mask)))
    last, mask = ids[:, :1], torch.cat([mask, mask[:, -1:]], dim=1)
    return (by or model)(last, attention_mask=mask, **past).logits[:, -1]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("weights", FORMS)
def test_a_decode_step_of_the_reference_backend(weights: str, family: str) -> None:
    """It keeps activations as floats."""
    _, fast, twin = compiled(family, weights, "reference")
    prompt = batch(3)
    torch.testing.assert_close(decode_step(fast, prompt), decode_step(twin, prompt), **CLOSE)


def check_decode_step(fast: Any, twin: Any, rows: int, all_rounded: bool) -> None:
    """The error of a step, against floats, is that of activations rounded to int8, and no more.

    What the rounding may cost is what it costs Hugging Face in the same place: the numerics rule, with rounded products
    in the part of eager. Where our kernels round every product, as the hooks do, the results are even the same: in all
    but a few rows, in which a value so close to the middle of two codes that the order of sums decided got the other.
    """
    prompt = batch(rows)
    exact, rounded = (decode_step(twin, prompt, by=m) for m in (twin, rounding(twin)))
    found = decode_step(fast, prompt)
    assert rms(found - exact) <= FACTOR * rms(rounded - exact)
    assert rms(found - exact) > 10 * CLOSE["atol"], "activations were not rounded"
    if all_rounded and rows > 1:
        each = (found - rounded).abs().amax(-1)
        assert each.median() <= CLOSE["atol"]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("weights", ROUNDING)
def test_a_decode_step_in_cpp(weights: str, family: str) -> None:
    """Codes of activations with a wrong scale, sum or group. (Half a head of the tiny Llama is no block of rows: its
    q, k and v are read as floats.)"""
    _, fast, twin = compiled(family, weights, "cpp")
    check_decode_step(fast, twin, 3, all_rounded=family != "llama")


@pytest.mark.parametrize("family", [*DECODERS, "wide"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_decode_step_of_fp8_in_cpp(rows: int, family: str) -> None:
    """It reads codes as they are and keeps activations as floats."""
    _, fast, twin = compiled(family, "fp8", "cpp", (1, 3))
    prompt = batch(rows)
    torch.testing.assert_close(decode_step(fast, prompt), decode_step(twin, prompt), **CLOSE)


WIDE = {"int8": (1, 8), "int4": (3, 16, 17)}
"""Each number of rows has a kernel of its own. (``codegen/quantized_cases.py`` has all of them in both forms.)"""


@pytest.mark.parametrize(
    ("weights", "rows"), [("int8", 1), ("int8", 5), ("int8", 8), ("int4", 1), ("int4", 3), ("int4", 16)]
)
def test_decode_steps_of_any_batch(weights: str, rows: int) -> None:
    """Rows in each other's place, or those that fill up the batch (5 to 8, 1 to 3) among them."""
    _, fast, twin = compiled("wide", weights, "cpp", WIDE[weights])
    check_decode_step(fast, twin, rows, all_rounded=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("weights", ROUNDING)
def test_any_number_of_threads(weights: str, threads: int) -> None:
    """Columns are shared out in whole blocks, also where there are more threads than cores or blocks."""
    _, fast, twin = compiled("wide", weights, "cpp", WIDE[weights])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_decode_step(fast, twin, 3, all_rounded=True)
        ids, mask = batch(3)
        with torch.no_grad():
            found, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (fast, twin))
        torch.testing.assert_close(found, expected, **CLOSE)
    finally:
        torch.set_num_threads(before)


def test_a_batch_that_is_too_large_to_round() -> None:
    """With more rows than the byte kernels take, weights become floats, and so the step is exact."""
    _, fast, twin = compiled("wide", "int4", "cpp", WIDE["int4"])
    prompt = batch(17)
    torch.testing.assert_close(decode_step(fast, prompt), decode_step(twin, prompt), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decode_step_in_two_bytes(dtype: torch.dtype) -> None:
    """The dtype costs something and the rounding to int8 does, independently: the errors add up in squares."""
    model, fast, weights = in_two_bytes(dtype)
    twin, prompt = twin_of(model, weights), batch(3)
    exact, rounded = (decode_step(twin, prompt, by=m) for m in (twin, rounding(twin)))
    eager = decode_step(twin_of(model, weights, dtype), prompt)
    allowed = (rms(rounded - exact) ** 2 + rms(eager - exact) ** 2) ** 0.5
    assert rms(decode_step(fast, prompt) - exact) <= FACTOR * allowed


# Generation


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_greedy_tokens(backend: str, weights: str) -> None:
    """Every token is the best one by the coded weights, or as close to it as rounding activations can make it."""
    _, fast, twin = compiled("llama", weights, backend)
    ids, mask = batch(3)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = fast.generate(ids, attention_mask=mask, **options)
    assert tokens.shape == (3, 17)
    if backend == "reference":
        assert torch.equal(tokens, twin.generate(ids, attention_mask=mask, **options))
    whole = torch.cat([mask, torch.ones(3, 8, dtype=mask.dtype)], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    logits, rounded = (
        m(tokens, attention_mask=whole, position_ids=positions).logits[:, 8:16]
        for m in (twin, rounding(twin))
    )
    chosen = logits.gather(2, tokens[:, 9:, None]).squeeze(2)
    # Both the best token and the chosen one may be off by the largest error that rounding makes.
    allowed = 2 * FACTOR * (rounded - logits).abs().max() if weights in ROUNDING else CLOSE["atol"]
    assert (logits.amax(-1) - chosen <= allowed).all()


def test_beams_and_samples() -> None:
    """The loops of Transformers run on a quantised model as well."""
    _, fast, _ = compiled("llama", "int8", "cpp")
    ids, _ = batch(1)
    options = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    assert fast.generate(ids, num_beams=3, do_sample=False, **options).shape == (1, 14)
    assert fast.generate(ids, do_sample=True, top_k=5, num_return_sequences=2, **options).shape == (2, 14)


# What compiling leaves behind


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
@torch.no_grad()
def test_the_model_is_unchanged(family: str) -> None:
    """Codes are made beside the weights: values, names and results of the original stay bit for bit."""
    model = tiny(family)
    ids, mask = batch(3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(ids, attention_mask=mask)[0]
    compile_as(model, "int8", "reference")
    assert torch.equal(model(ids, attention_mask=mask)[0], expected)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_formats_live_side_by_side() -> None:
    """Three compilations of one model: the last must not move or recode what the first ones read."""
    model = tiny("llama")
    fasts = {form: compile_as(model, form, "cpp" if form else "reference") for form in ("int8", "int4", None)}
    ids, mask = batch(3)
    for form, fast in fasts.items():
        found = fast(ids, attention_mask=mask).logits[mask.bool()]
        expected = (twin_of(model, form) if form else model)(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(found, expected, **CLOSE)
    for form, fast in fasts.items():
        if form:
            check_decode_step(fast, twin_of(model, form), 3, all_rounded=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_report_counts_the_codes(backend: str) -> None:
    """Codes and scales are held in addition, and together they are smaller than the weights that they stand for."""
    table = (128, 64)
    for weights in FORMS:
        model, fast, _ = compiled("llama", weights, backend)
        matrices = [tuple(m.weight.shape) for _, m in products(model) if not is_table(model, m)]
        # int8: a byte and an f32 per row, in the tied embedding per group of 32; int4: half a byte, and two f16 per
        # group.
        # fp8: as int8, and so is the tied embedding.
        byte, half = (lambda n, k: n * k + 4 * n), (lambda n, k: n * k // 2 + 4 * n * k // 32)
        form = half if weights == "int4" else byte
        of_table = byte(*table) if weights == "fp8" else 128 * 64 * (1 + 4 / 32)
        memory = fast.report().memory
        assert memory.prepared == sum(form(n, k) for n, k in matrices) + of_table
        assert memory.merged == 0
        original = 4 * sum(n * k for n, k in (*matrices, table))
        assert memory.prepared < original / (4 if weights == "int4" else 3.5)
        assert memory.shared < original / 20
        assert fast.report().notes == ()


def test_a_decode_step_moves_fewer_bytes() -> None:
    """What the report says of a step is what quantising is for."""
    moved = [
        compile_as(model_of("wide"), form, "reference", (1,)).report().phase("decode").bytes
        for form in ("int4", "int8", None)
    ]
    assert moved[0] < moved[1] < moved[2] / 2


# What stays wide


def test_unknown_formats_are_refused() -> None:
    """The error says which there are."""
    for unknown in ("int3", "INT8", "fp4", ""):
        with pytest.raises(tw.OptionError, match=r"int8, int4, fp8.*keep the model's own dtype"):
            tw.compile(tiny("llama"), weights=unknown, backend="reference")


SPOILED = {
    "product": ("model.layers.1.mlp.up_proj", ("gate_proj", "up_proj"), "up_proj"),
    "last product": ("lm_head", ("lm_head",), "embed_tokens"),
}
"""Where: the module, the names of those that stay wide with it (its stack, in every layer), and what the note names."""


@pytest.mark.parametrize(
    ("where", "value"),
    [("product", float("nan")), ("product", 1e6), ("last product", float("inf")), ("last product", -1e6)],
)
@torch.no_grad()
def test_weights_without_a_code_stay_wide(where: str, value: float) -> None:
    """Such a value would take every other weight of its row or group with it; all else is quantised."""
    model = tiny("llama")
    place, stay, named = SPOILED[where]
    # Token 5 is not in the batch, so that a tied embedding does not spoil every result.
    model.get_submodule(place).weight[5, 7] = value
    fast = compile_as(model, "int4", "reference")
    twin = twin_of(model, "int4", wide=stay, backend="reference")
    ids, mask = batch(3)
    found, expected, before = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (fast, twin, model))
    torch.testing.assert_close(found, expected, **CLOSE, equal_nan=True)
    if expected.isfinite().all():
        assert rms(found - before) > 0.01
    assert any(named in note and "stays" in note for note in fast.report().notes)


@torch.no_grad()
def test_weights_without_a_code_in_cpp() -> None:
    """The same in kernels that read one weight as floats and the others as codes."""
    model = tiny("llama")
    model.lm_head.weight[5, 7] = float("nan")
    fast, twin = compile_as(model, "int8"), twin_of(model, "int8", wide=("lm_head",))
    ids, mask = batch(3)
    found, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (fast, twin))
    torch.testing.assert_close(found, expected, **CLOSE, equal_nan=True)


@torch.no_grad()
def test_widths_that_are_no_groups() -> None:
    """Nothing fits here: the model runs as it would without ``weights``."""
    model = model_of("wide", hidden_size=72, intermediate_size=80, head_dim=24, num_attention_heads=3)
    fast = compile_as(model, "int4")
    ids, mask = batch(3)
    found, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (fast, model))
    torch.testing.assert_close(found, expected, **CLOSE)
    prompt = batch(3)
    torch.testing.assert_close(decode_step(fast, prompt), decode_step(model, prompt), **CLOSE)
    assert fast.report().memory.prepared == 0
    assert all("stays" in note for note in fast.report().notes)
    assert len(fast.report().notes) == 5  # q, k and v; output; gate and up; down; head


@torch.no_grad()
def test_some_widths_that_are_no_groups() -> None:
    """48 columns are no groups and 152 rows no blocks: two products of floats among products of codes."""
    model = model_of("wide", intermediate_size=48, vocab_size=152)
    fast, twin = compile_as(model, "int4"), twin_of(model, "int4", wide=("down_proj", "lm_head"))
    ids, mask = batch(3)
    found, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (fast, twin))
    torch.testing.assert_close(found, expected, **CLOSE)
    notes = " ".join(fast.report().notes)
    assert "down_proj" in notes
    assert "lm_head" in notes
    assert "o_proj" not in notes


# Real weights


@torch.no_grad()
def test_minilm(minilm: Any) -> None:
    """Real weights of real sizes, with biases, in an encoder that takes a batch in several goes."""
    model, tokenizer = minilm
    texts = ["What is the capital of France?", "A sentence about the sea.", "Prime numbers"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    fast, twin = compile_as(model, "int8", sizes=(2,)), twin_of(model, "int8")
    valid = inputs["attention_mask"].bool()
    found, expected = (m(**inputs).last_hidden_state[valid] for m in (fast, twin))
    torch.testing.assert_close(found, expected, **CLOSE)
