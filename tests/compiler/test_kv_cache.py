"""Keys and values in a narrower type than the model's, against Hugging Face with a cache that rounds the same way."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tilewright as tw
from tests.closeness import FACTOR, assert_no_further
from tilewright.cache import cache_of, with_cache

from .models import DECODERS, tiny

STORED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
CLOSE = 1e-4


class RoundingCache(DynamicCache):
    """Rounds what it is given to a type, as a cache in that type would."""

    def __init__(self, config: Any, stored: torch.dtype) -> None:
        super().__init__(config=config)
        self.stored = stored

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = (x.clamp(-448, 448).to(self.stored).to(x.dtype) for x in (key, value))
        return super().update(*rounded, *args, **kwargs)


@cache
def compiled(family: str, form: str | None, backend: str, dtype: torch.dtype = torch.float32) -> Any:
    options = {"batch_sizes": (3,), "max_length": 48, "autotune": "off"}
    return tw.compile(tiny(family).to(dtype), kv_cache=form, backend=backend, **options)


def prompt(rows: int = 3, length: int = 20) -> tuple[Tensor, Tensor]:
    ids = torch.randint(10, 120, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


@torch.no_grad()
def two_steps(model: Any, past: Any = None) -> tuple[Tensor, Tensor]:
    """Logits of a prompt's last position, and of two tokens one after the other."""
    ids, mask = prompt()
    out = model(ids, attention_mask=mask, **with_cache(model.forward, past))
    first, past = out.logits[:, -1], with_cache(model.forward, cache_of(out))
    for token in (ids[:, :1], ids[:, 1:2]):
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
        out = model(token, attention_mask=mask, **past)
    return first, out.logits[:, -1]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_steps_are_those_of_a_rounding_cache(backend: str, form: str, family: str) -> None:
    """A key in the wrong place or type shows in every row; one so close to the middle of two numbers that the order of
    sums decided, in a row at most."""
    model: PreTrainedModel = tiny(family)
    found = two_steps(compiled(family, form, backend))
    expected = two_steps(model, RoundingCache(model.config, STORED[form]))
    plain = two_steps(model)
    for ours, theirs, before in zip(found, expected, plain, strict=True):
        assert (ours - theirs).abs().amax(-1).median() <= CLOSE
        assert rms(ours - before) <= FACTOR * rms(theirs - before)
        assert rms(ours - before) > 10 * rms(ours - theirs), "nothing was rounded"


def test_a_model_in_bfloat16() -> None:
    """Half precision and a cache of bytes: no further off than the rounding cache in Hugging Face."""
    model = tiny("llama")
    half, wide = tiny("llama").bfloat16(), tiny("llama").double()
    ours = two_steps(compiled("llama", "fp8", "cpp", torch.bfloat16))
    eager = two_steps(half, RoundingCache(model.config, STORED["fp8"]))
    exact = two_steps(wide)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_no_further(a, b, c)


@pytest.mark.parametrize(("form", "share"), [("bf16", 2), ("fp8", 4)])
def test_a_request_holds_fewer_bytes(form: str, share: int) -> None:
    """What the option is for."""
    whole, narrow = (cache_of(compiled("llama", f, "cpp")(*prompt()[:1])).state.nbytes for f in (None, form))
    assert whole == share * narrow


def test_the_dtype_of_the_model_is_no_change() -> None:
    """bf16 is what a bfloat16 model has."""
    plain, same = (compiled("opt", f, "reference", torch.bfloat16) for f in (None, "bf16"))
    assert plain.ir("prefill") == same.ir("prefill")


@pytest.mark.parametrize(
    ("form", "dtype", "message"),
    [
        ("int8", torch.float32, "bf16, fp8.*keep the model's own dtype"),
        ("", torch.float32, "bf16, fp8"),
        ("bf16", torch.float16, "does not go with a model in f16"),
        ("fp8", torch.float64, "does not go with a model in f64"),
    ],
)
def test_forms_that_cannot_be(form: str, dtype: torch.dtype, message: str) -> None:
    """The error says which there are, or what to convert the model to."""
    with pytest.raises(tw.OptionError, match=message):
        compiled.__wrapped__("llama", form, "reference", dtype)
