"""Which keys a query sees is what the mask says that a model makes, as in eager PyTorch, and not what a module passes
beside it; and whether layers are alike depends on the masks that they are given."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    padding_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

import tilewright as tw
from tilewright import CaptureError
from tilewright.capture_distances import NOTHING, Distances, InexpressibleError, distances_of
from tilewright.capture_masks import bounds_of, distances_in, mask_forward

from .models import random, tiny
from .test_architectures import DECODERS, check_encoder, prompt


def _check(model: Any) -> Any:
    """The compiled model, whose logits for a prompt longer than any window are the model's own."""
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="reference", autotune="off")
    ids, mask = prompt()
    with torch.no_grad():
        found, expected = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (fast, model))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5 * expected.abs().max().item())
    return fast


def test_a_window_that_the_module_does_not_pass() -> None:
    config = hf.PhimoeConfig(**_PHIMOE, sliding_window=16)
    assert "window = 16" in _check(random(config, hf.AutoModelForCausalLM)).ir("lowered")


_PHIMOE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def test_a_window_that_only_the_module_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = modeling_mistral.create_causal_mask
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", causal)
    fast = _check(random(DECODERS["mistral"], hf.AutoModelForCausalLM))
    assert "window = 0" in fast.ir("lowered")


def test_layers_that_differ_in_their_mask_alone_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama each second layer of which is called with a window's mask."""
    causal = modeling_llama.create_causal_mask
    windowed = modeling_mistral.create_sliding_window_causal_mask
    called = modeling_llama.LlamaDecoderLayer.__call__

    def masks(**kwargs: Any) -> Any:
        return causal(**kwargs), windowed(**kwargs)

    def call(layer: Any, x: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = attention_mask[layer.self_attn.layer_idx % 2]
        return called(layer, x, attention_mask=mask, **kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", masks)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__call__", call)
    model = tiny("llama", layers=4)
    model.config.sliding_window = 5
    fast = _check(model)
    text = fast.ir("lowered")
    assert text.count("func @layer") == text.count("window = 5") + 1 == 2


def test_an_encoder_whose_window_is_on_both_sides() -> None:
    config = hf.ModernBertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        local_attention=8, bos_token_id=1, eos_token_id=2, pad_token_id=0, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    for backend in ("reference", "cpp"):
        fast, _, _ = check_encoder(random(config, hf.AutoModel), backend)
        assert "ahead = 5" in fast.ir("lowered")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_decoder_made_an_encoder(backend: str) -> None:
    """Gemma 3 for embeddings: its masks are causal ones or'ed with functions of the model's own, all true of some."""
    config = hf.Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, sliding_window=9, use_bidirectional_attention=True,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    fast, _, _ = check_encoder(random(config, hf.AutoModel), backend)
    assert fast.ir("lowered").count("ahead = 5") == 1


def _cases() -> dict[str, tuple[Any, Distances | None]]:
    """Functions as transformers and its models make them, and the distances that queries see in each."""
    window, behind = sliding_window_bidirectional_overlay(3), sliding_window_overlay(4)

    def uneven(batch: Any, head: Any, query: Any, key: Any) -> Any:
        distance = query - key
        return ((distance >= 0) & (distance < 5)) | ((distance < 0) & (-distance < 3))

    return {
        "causal": (causal_mask_function, Distances(highest=0)),
        "all": (bidirectional_mask_function, Distances()),
        "window": (and_masks(behind, causal_mask_function), Distances(-3, 0)),
        "around": (and_masks(window, bidirectional_mask_function), Distances(-3, 3)),
        "uneven": (uneven, Distances(-4, 2)),
        "own": (or_masks(causal_mask_function, lambda *_: torch.tensor(True)), Distances()),
        "none": (or_masks(and_masks(window, lambda *_: torch.tensor(False))), NOTHING),
        "widened": (or_masks(causal_mask_function, window), Distances(highest=3)),
        "open": (lambda b, h, q, k: k < 2 + q, Distances(highest=1)),
        "equal": (lambda b, h, q, k: k == q, Distances(0, 0)),
        "chunks": (
            and_masks(chunked_overlay(4, torch.zeros(2, dtype=torch.long)), causal_mask_function),
            None,
        ),
        "blocks": (blockwise_overlay(torch.tensor([[0, 0, 1, 1] * 4] * 2)), None),
        "padding": (padding_mask_function(torch.tensor([[True] * 15 + [False]] * 2)), None),
        "apart": (lambda b, h, q, k: abs(q - k) >= 2, None),
        "unequal": (lambda b, h, q, k: k != q, None),
        "place": (lambda b, h, q, k: k < 5, None),
        "parity": (lambda b, h, q, k: (q - k) % 2 == 0, None),
        "head": (lambda b, h, q, k: k <= q + h, None),
        "request": (lambda b, h, q, k: (b == 0) & (k <= q), None),
    }


@pytest.mark.parametrize("name", _cases())
def test_distances_of_a_mask_function(name: str) -> None:
    """Distances off by one, or of a mask that has none: the function is also called as transformers calls it."""
    function, expected = _cases()[name]
    if expected is None:
        with pytest.raises(InexpressibleError):
            distances_of(function)
        return
    found = distances_of(function)
    assert found == expected
    places = torch.arange(16)
    query, key = places[:, None], places[None]
    seen = function(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), query, key).expand(
        16, 16
    )
    assert torch.equal(seen, (found.lowest <= key - query) & (key - query <= found.highest))


def test_a_query_that_does_not_see_itself_is_refused() -> None:
    """Where its mask is used: models with a window of 0 make such a mask, for no layer."""
    mask = mask_forward(mask_function=lambda b, h, q, k: k < q)
    assert distances_in(mask) == Distances(highest=-1)
    with pytest.raises(CaptureError, match="hides each query from itself"):
        bounds_of(Distances(highest=-1))


def test_a_mask_function_without_a_name_is_refused_by_what_it_is() -> None:
    with pytest.raises(CaptureError, match=r"functools.partial.*a condition on key"):
        mask_forward(mask_function=partial(lambda most, b, h, q, k: k < most, 5))


def test_masks_that_may_not_be_left_out_are_not() -> None:
    """A mask of all keys in place of a causal one: without it, the module would have its attention be causal."""
    every = or_masks(causal_mask_function, bidirectional_mask_function)
    assert mask_forward() is None
    assert mask_forward(mask_function=bidirectional_mask_function, allow_is_bidirectional_skip=True) is None
    mask = mask_forward(mask_function=every, batch_size=2, kv_length=3, allow_is_causal_skip=False)
    assert mask is not None
    assert mask.tolist() == [[True] * 3] * 2
    assert distances_in(mask) == Distances()
