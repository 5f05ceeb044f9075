"""Models in which recurrent layers and attention take turns, and those whose recurrence is linear attention.

That each architecture says what Hugging Face says is in ``test_architectures``; here is what a request remembers. As
for Mamba, the whole prompt in one piece says what is right of its pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

import tilewright as tw
from tests.closeness import assert_no_further
from tilewright import capture_recurrent, capture_states
from tilewright.cache import cache_of, with_cache
from tilewright.capture import capture
from tilewright.runtime.engine import Engine

from .models import random
from .test_architectures import HYBRIDS

PROMPT = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(PROMPT)
MASK[1, :8] = 0
KINDS = {
    "lfm2": "reference", "qwen3_5": "cpp", "mamba2": "reference", "kimi_linear": "reference", "jamba": "reference",
}  # fmt: skip
"""Convolutions alone, the delta rule (by generated kernels), linear attention without it, a decay for each row of the
state, and a scan beside experts."""


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return random(HYBRIDS[name], hf.AutoModelForCausalLM).to(dtype)


@cache
def compiled(name: str, dtype: torch.dtype = torch.float32) -> Any:
    options = {"batch_sizes": (2,), "max_length": 64, "backend": KINDS[name], "autotune": "off"}
    return tw.compile(model_of(name, dtype), **options)


@torch.no_grad()
def logits(model: Any, ids: Tensor = PROMPT, mask: Tensor | None = MASK) -> Tensor:
    return model(ids, attention_mask=mask).logits


def in_pieces(fast: Any, name: str, pieces: tuple[int, ...]) -> Tensor:
    """The logits of a prompt that is given piece by piece."""
    found, past, start = [], None, 0
    for size in pieces:
        stop = start + size
        with torch.no_grad():
            held = with_cache(model_of(name).forward, past)
            out = fast(PROMPT[:, start:stop], attention_mask=MASK[:, :stop], **held)
        past, start = cache_of(out), stop
        found.append(out.logits)
    assert past.get_seq_length() == PROMPT.shape[1]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("pieces", [(21,), (1, 20), (5, 1, 1, 2, 12)])
@pytest.mark.parametrize("name", KINDS)
def test_pieces_say_what_the_whole_says(name: str, pieces: tuple[int, ...]) -> None:
    """With padding on the left, and fewer tokens than a convolution looks back at."""
    kept = MASK.bool()
    found = in_pieces(compiled(name), name, pieces)
    torch.testing.assert_close(found[kept], logits(model_of(name))[kept], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_tokens_are_generated(name: str) -> None:
    given: dict[str, Any] = {
        "attention_mask": MASK,
        "max_new_tokens": 9,
        "do_sample": False,
        "pad_token_id": 0,
    }
    fast = compiled(name)
    assert torch.equal(fast.generate(PROMPT, **given), model_of(name).generate(PROMPT, **given))
    assert not fast.report().fallbacks


def test_a_long_prompt_runs_in_chunks() -> None:
    engine = compiled("qwen3_5")._tilewright.engine
    chunked = Engine(
        list(engine.decode_executors.values()), engine.prefill_executor, replace(engine.spec, chunk=4)
    )
    found = chunked.step(chunked.new_state(2), PROMPT, MASK)
    kept = MASK.bool()
    torch.testing.assert_close(found[kept], logits(model_of("qwen3_5"))[kept], rtol=2e-4, atol=2e-4)


def test_layers_with_a_wide_residual_are_alike() -> None:
    """The first takes embeddings in half precision, the others each other's float32."""
    assert "layer1" not in compiled("mamba2", torch.bfloat16).ir("lowered")


def test_half_precision() -> None:
    """No further from float64 than eager is. Keys and states stay in float32, as there."""
    half, whole = model_of("qwen3_5", torch.bfloat16), copy.deepcopy(model_of("qwen3_5")).double()
    kept = MASK.bool()
    ours, eager, exact = (logits(m)[kept] for m in (compiled("qwen3_5", torch.bfloat16), half, whole))
    assert_no_further(ours, eager, exact)


def test_layers_of_two_classes_are_compiled_once_each() -> None:
    """Jamba has a class for layers with attention and one for the others."""
    text = compiled("jamba").ir("lowered")
    assert "func @layer1(" in text
    assert "func @layer2(" not in text


# --- states that nobody knows -------------------------------------------------------------------------------------


def as_padded(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """A convolution as it is without a past: right for a first prompt, and wrong for what goes on from it."""
    size = hidden_states.shape[2]
    return nn.functional.conv1d(
        hidden_states, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=weight.shape[0]
    )[:, :, :size]


def forgetful(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states.float()


@pytest.mark.parametrize(
    ("name", "function", "instead", "kind"),
    [
        ("lfm2", "causal_conv1d_fn", as_padded, "Lfm2ShortConv"),
        ("mamba2", "mamba2_chunk_scan", forgetful, "Mamba2Mixer"),
    ],
)
def test_what_is_kept_in_another_way_is_refused(
    name: str, function: str, instead: Callable[..., Tensor], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that keeps a state by no op of ours, alone or beside one that it does."""
    monkeypatch.setitem(capture_recurrent._STANDS_FOR, function, instead)
    with pytest.raises(
        tw.CaptureError, match=rf"unsupported state: {kind} .* run this model with Hugging Face"
    ):
        capture(model_of(name))


def test_what_is_kept_by_a_method_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside keys and values, for one: an attention's op would hide it."""
    monkeypatch.delitem(capture_states._KEPT_BY, "update_conv_state")
    with pytest.raises(tw.CaptureError, match="unsupported state: Lfm2ShortConv"):
        capture(model_of("lfm2"))


def test_functions_are_the_files_own_again() -> None:
    import transformers.models.lfm2.modeling_lfm2 as file

    own = {name: getattr(file, name) for name in ("causal_conv1d_fn", "create_recurrent_attention_mask")}
    capture(model_of("lfm2"))
    assert own == {name: getattr(file, name) for name in own}
    assert file.causal_conv1d_fn is not capture_recurrent.causal_conv1d_fn
