"""Real weights through generated C++ kernels, against Hugging Face and against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tilewright as tw
from tests.closeness import FACTOR, assert_no_further
from tilewright.cache import cache_of, with_cache

CONTEXTS = (1, 2, 17, 64, 65, 511, 512, 513, 1024)
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers and explain why they are prime.",
)


@pytest.fixture(scope="module")
def text(smollm2: tuple[PreTrainedModel, Any]) -> Tensor:
    """1025 tokens of English prose and code, i64[1, 1025]."""
    _, tokenizer = smollm2
    prose = (torch.__doc__ or "") + (copy.__doc__ or "") + (torch.nn.Linear.__doc__ or "") * 8
    return tokenizer(prose, return_tensors="pt").input_ids[:, : CONTEXTS[-1] + 1]


@pytest.fixture(scope="module")
def exact(smollm2: tuple[PreTrainedModel, Any], text: Tensor) -> Tensor:
    """The float64 logits at every position, [1025, V]."""
    return _all_logits(copy.deepcopy(smollm2[0]).double(), text)


@torch.no_grad()
def _all_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits[0]


@pytest.fixture(scope="module")
def fast(smollm2: tuple[PreTrainedModel, Any]) -> Any:
    """SmolLM2 in float32, compiled for up to three sequences."""
    return tw.compile(smollm2[0], batch_sizes=(1, 3), max_length=1100)


def _check_contexts(model: PreTrainedModel, fast: Any, text: Tensor, exact: Tensor) -> None:
    """Prefill and one decode step at each context, held to the numerics rule over all contexts together, and
    each to the worst of eager's.

    The errors of one position's logits have one cause, a rounded hidden state, so that a single position compares one
    draw of ours with one of eager's.
    """
    eager = _all_logits(model, text)
    prefill, decode = [], []
    for context in CONTEXTS:
        first = fast(text[:, :context], use_cache=True, logits_to_keep=1)
        past = with_cache(fast.forward, cache_of(first))
        second = fast(text[:, context : context + 1], use_cache=True, **past)
        prefill.append(first.logits[0, -1])
        decode.append(second.logits[0, -1])
    at = torch.tensor(CONTEXTS)
    for what, ours, n in (("prefill", torch.stack(prefill), at - 1), ("decode", torch.stack(decode), at)):
        assert_no_further(ours, eager[n], exact[n], f"{model.dtype} {what}")
        errors, eagers = ((x.double() - exact[n]).square().mean(1).sqrt() for x in (ours, eager[n]))
        allowed = FACTOR * eagers.max() + torch.finfo(ours.dtype).eps * exact[n].abs().max()
        wrong = [c for c, error in zip(CONTEXTS, errors, strict=True) if error > allowed]
        assert not wrong, f"{model.dtype} {what} at contexts {wrong}: {errors}, eager's {eagers}"


def test_float32_logits(smollm2: Any, fast: Any, text: Tensor, exact: Tensor) -> None:
    """A wrong kernel, position, mask or cache slot at any context length shows as an error beyond eager's."""
    _check_contexts(smollm2[0], fast, text, exact)


def test_bfloat16_logits(smollm2_bf16: Any, text: Tensor, exact: Tensor) -> None:
    """The same in bfloat16, where rounding in the wrong place shows. Its weights are exact in float64's run too."""
    model = smollm2_bf16[0]
    exact_bf16 = _all_logits(copy.deepcopy(model).double(), text)
    _check_contexts(model, tw.compile(model, max_length=1100), text, exact_bf16)


def test_float32_greedy_tokens(smollm2: Any, fast: Any) -> None:
    """64 greedy tokens equal Hugging Face's."""
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    assert torch.equal(fast.generate(**inputs, **options), model.generate(**inputs, **options))


def test_float32_greedy_tokens_left_padded(smollm2: Any, fast: Any) -> None:
    """A left-padded batch of three gives Hugging Face's tokens in every row."""
    model, tokenizer = smollm2
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(QUESTIONS), return_tensors="pt", padding=True)
    assert (inputs.attention_mask == 0).any()
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(fast.generate(**inputs, **options), model.generate(**inputs, **options))


def test_at_most_six_kernels_per_layer(fast: Any) -> None:
    """Fusion that stops working shows as more kernels per decoder layer."""
    text = fast.ir("decode")
    layer = text[text.index("func @layer0(") :]
    assert layer[: layer.index("\n}")].count("= kernel ") <= 6


def test_embeddings_of_minilm(minilm: Any) -> None:
    """The encoder's hidden states and mean-pooled embeddings equal eager's, right-padded batches and a single row."""
    model, tokenizer = minilm
    compiled = tw.compile(model, batch_sizes=(3,))
    words = (copy.__doc__ or "").split()
    texts = [" ".join(words[n : n + 3 + n % 7]) for n in range(0, 100, 5)]
    exact_model = copy.deepcopy(model).double()
    found: list[tuple[Tensor, ...]] = []
    for rows in (QUESTIONS, QUESTIONS[2:], *(texts[n : n + 3] for n in range(0, len(texts), 3))):
        batch = tokenizer(list(rows), return_tensors="pt", padding=True)
        with torch.no_grad():
            states = [m(**batch).last_hidden_state for m in (compiled, model, exact_model)]
        valid = batch["attention_mask"].bool()
        found.append(tuple(h[valid] for h in states))
        pooled = [
            torch.nn.functional.normalize((h * valid[..., None]).sum(1) / valid.sum(1, keepdim=True), dim=-1)
            for h in states[:2]
        ]
        torch.testing.assert_close(pooled[0], pooled[1], rtol=0, atol=1e-5)
    ours, eager, exact = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert_no_further(ours, eager, exact, "MiniLM")
