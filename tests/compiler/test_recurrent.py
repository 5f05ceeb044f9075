"""Models whose layers are recurrent: what a request remembers has one size, and cannot forget its last step.

Hugging Face is the oracle, but for a prompt that goes on from a cache: there its scan begins anew, so the whole prompt
in one piece says what is right.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

import tilewright as tw
from tests.closeness import assert_no_further
from tilewright.cache import cache_name, cache_of, with_cache
from tilewright.runtime.engine import Engine

from .models import random

_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "mamba": hf.MambaConfig(**_SIZES),
    "mamba_biases": hf.MambaConfig(
        **_SIZES | {"state_size": 5}, use_bias=True, use_conv_bias=False, conv_kernel=3, expand=1
    ),
    "falcon_mamba": hf.FalconMambaConfig(**_SIZES),
}
PROMPT = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(PROMPT)
MASK[1, :8] = 0


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return random(CONFIGS[name], hf.AutoModelForCausalLM).to(dtype)


@cache
def compiled(name: str, backend: str = "cpp", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options = {"batch_sizes": (2, 6), "max_length": 64, "autotune": "off", **options}
    return tw.compile(model_of(name, dtype), backend=backend, **options)


@torch.no_grad()
def logits(model: Any, ids: Tensor = PROMPT, mask: Tensor | None = MASK) -> Tensor:
    return model(ids, attention_mask=mask).logits


def greedy(model: Any, ids: Tensor = PROMPT, **options: Any) -> Tensor:
    given = {"attention_mask": MASK, "max_new_tokens": 9, "do_sample": False, **options}
    return model.generate(ids, **given)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_and_steps(name: str, backend: str) -> None:
    """Left padding counts for nothing: neither the bias that a product adds to it nor what a state makes of that."""
    model, fast = model_of(name), compiled(name, backend)
    kept = MASK.bool()
    torch.testing.assert_close(logits(fast)[kept], logits(model)[kept], rtol=2e-4, atol=2e-4)
    assert torch.equal(greedy(fast), greedy(model))
    assert not fast.report().fallbacks
    assert "layer1" not in fast.ir("lowered")


@pytest.mark.parametrize("pieces", [(21,), (20, 1), (1, 20), (5, 1, 1, 2, 12), (1,) * 21])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_pieces_say_what_the_whole_says(backend: str, pieces: tuple[int, ...]) -> None:
    """Fewer tokens than the convolution looks back at, and more."""
    fast = compiled("mamba", backend)
    found, past, start = [], None, 0
    for size in pieces:
        stop = start + size
        with torch.no_grad():
            held = with_cache(fast.forward, past)
            out = fast(PROMPT[:, start:stop], attention_mask=MASK[:, :stop], **held)
        past, start = cache_of(out), stop
        found.append(out.logits)
    kept = MASK.bool()
    whole = logits(model_of("mamba"))
    torch.testing.assert_close(torch.cat(found, dim=1)[kept], whole[kept], rtol=2e-4, atol=2e-4)
    assert past.get_seq_length() == 21


def test_a_long_prompt_runs_in_chunks() -> None:
    """Each goes on from what the one before it left."""
    engine = compiled("mamba")._tilewright.engine
    spec = replace(engine.spec, chunk=4)
    chunked = Engine(list(engine.decode_executors.values()), engine.prefill_executor, spec)
    found = chunked.step(chunked.new_state(2), PROMPT, MASK)
    kept = MASK.bool()
    torch.testing.assert_close(found[kept], logits(model_of("mamba"))[kept], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("mode", ["beams", "samples of beams", "several"])
def test_rows_that_change_places(mode: str) -> None:
    options: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "samples of beams": {"num_beams": 3, "do_sample": True, "top_k": 8},
        "several": {"do_sample": True, "num_return_sequences": 3, "repetition_penalty": 1.2},
    }[mode]
    results = []
    for model in (model_of("mamba"), compiled("mamba")):
        torch.manual_seed(0)
        results.append(greedy(model, **options))
    assert torch.equal(*results)


def test_other_ways_to_ask() -> None:
    """Without a cache, transformers' own loop, rows that end apart, and fewer sequences than the program has rows."""
    model, fast = model_of("mamba"), compiled("mamba")
    free = greedy(model)
    assert torch.equal(greedy(fast, use_cache=False), free)
    assert torch.equal(greedy(fast, return_dict_in_generate=True).sequences, free)
    alone = {"attention_mask": MASK[1:], "max_new_tokens": 9}
    assert torch.equal(greedy(fast, PROMPT[1:], **alone), greedy(model, PROMPT[1:], **alone))
    end = int(free[0, -4])
    ended = greedy(model, eos_token_id=end)
    assert not torch.equal(ended, free)
    assert torch.equal(greedy(fast, eos_token_id=end), ended)


def test_a_second_turn_goes_on_from_the_cache() -> None:
    fast = compiled("mamba")
    first = greedy(fast, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, PROMPT.flip(1)[:, :6]], dim=1)
    mask = torch.cat([MASK, MASK.new_ones(2, turn.shape[1] - 21)], dim=1)
    past = cache_of(first)
    assert past.get_seq_length() == 29
    kept = copy.deepcopy(past)
    fresh = greedy(model_of("mamba"), turn, attention_mask=mask)
    for held in (past, kept):
        given = with_cache(fast.forward, held)
        assert torch.equal(greedy(fast, turn, attention_mask=mask, **given), fresh)


def test_a_cache_cannot_go_back() -> None:
    """So what would have to (speculation) is refused, and the request stays as it was."""
    fast = compiled("mamba")
    with torch.no_grad():
        past = cache_of(fast(PROMPT, attention_mask=MASK))
    with pytest.raises(tw.InputError, match=r"recurrent layer .* cannot go back"):
        past.crop(-1)
    past.crop(21)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        greedy(fast, PROMPT[:1], attention_mask=None, prompt_lookup_num_tokens=3)
    assert past.get_seq_length() == 21
    name = cache_name(model_of("mamba").forward)
    with pytest.raises(tw.InputError, match=f"{name} is a DynamicCache of another model"):
        fast(PROMPT, **{name: hf.DynamicCache()})


def test_a_failed_step_leaves_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have gone on by then; the tokens are given again, and must not count twice."""
    fast = compiled("mamba")
    engine = fast._tilewright.engine
    with torch.no_grad():
        past = with_cache(fast.forward, cache_of(fast(PROMPT[:, :20], attention_mask=MASK[:, :20])))

    def fails(executor: Any) -> Any:
        run = type(executor).run

        def late(self: Any, *args: Any) -> None:
            run(self, *args)
            raise KeyboardInterrupt

        return late

    with monkeypatch.context() as patched:
        executor = engine.decode_executors[2]
        patched.setattr(type(executor), "run", fails(executor))
        with pytest.raises(KeyboardInterrupt):
            fast(PROMPT[:, 20:], attention_mask=MASK, **past)
    with torch.no_grad():
        found = fast(PROMPT[:, 20:], attention_mask=MASK, **past).logits
    torch.testing.assert_close(found, logits(model_of("mamba"))[:, 20:], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_half_precision(name: str, backend: str) -> None:
    """No further from float64 than eager; the layers are one function, though the first one takes another type."""
    fast = compiled(name, backend, torch.bfloat16)
    kept = MASK.bool()
    ours, eager, exact = (
        logits(m)[kept]
        for m in (fast, model_of(name, torch.bfloat16), copy.deepcopy(model_of(name)).double())
    )
    assert_no_further(ours, eager, exact)
    assert "layer1" not in fast.ir("lowered")


def test_a_base_model_remembers_too() -> None:
    """The hidden states of a model without a head, in two pieces."""
    model = model_of("mamba").backbone
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="cpp", autotune="off")
    with torch.no_grad():
        expected = model(PROMPT, attention_mask=MASK).last_hidden_state
        first = fast(PROMPT[:, :9], attention_mask=MASK[:, :9])
        second = fast(PROMPT[:, 9:], attention_mask=MASK, **with_cache(fast.forward, cache_of(first)))
    found = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_weights_as_codes(form: str) -> None:
    """Products read codes; the scan and the convolution what they always read."""
    model, fast = model_of("mamba"), compiled("mamba", weights=form)
    assert "dequantize" in fast.ir("decode")
    exact, found = logits(model)[MASK.bool()], logits(fast)[MASK.bool()]
    share = ((found - exact).square().mean() / exact.square().mean()).sqrt()
    assert share < {"int8": 0.05, "int4": 0.4}[form]


def test_memory_does_not_grow_with_the_length() -> None:
    """What a request holds: the last tokens of the convolution, and the state of the scan, of two layers."""
    held = [compiled("mamba", max_length=n).report().memory.kv_per_sequence for n in (32, 64)]
    assert held == [2 * (3 * 128 + 8 * 128) * 4] * 2
