"""The API of a compiled model: everything that its Hugging Face original offers gives the same result.

Each test runs on the mixin over Hugging Face's own kernels, which isolates the API, and on the compiled model.
test_generate_parity.py goes through all of generate's options.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMConfig,
    XLMModel,
    pipeline,
)

import tilewright
from tilewright.cache import EngineCache, cache_name, cache_of, with_cache
from tilewright.errors import DeviceError, InputError, OptionError

from .hf_engine import eager_decoder, eager_encoder
from .models import DECODERS, random, tiny

Factory = Callable[..., Any]
ENGINES = ("hf", "cpp")
SLOW_ENGINES = ("reference",)
PROMPT = torch.tensor([[5, 17, 99, 23, 42, 8, 61]])
PADDED = torch.tensor([[0, 0, 0, 17, 99, 23, 42], [5, 17, 99, 23, 42, 8, 61], [0, 11, 12, 13, 14, 15, 16]])
MASK = (PADDED != 0).long()


@cache
def _compiled(family: str, engine: str) -> tuple[PreTrainedModel, Any]:
    """A model, and what it is compiled to: for "hf", itself behind our engine and mixin."""
    model = tiny(family)
    if engine == "hf":
        return model, eager_encoder(model) if family == "bert" else eager_decoder(model)
    return model, tilewright.compile(model, batch_sizes=(1, 4), max_length=64, backend=engine, autotune="off")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DECODERS)
def pair(request: pytest.FixtureRequest, engine: str) -> tuple[PreTrainedModel, Any]:
    """A decoder of each family, and what each engine makes of it."""
    return _compiled(request.param, engine)


@pytest.fixture
def llama(engine: str) -> tuple[PreTrainedModel, Any]:
    return _compiled("llama", engine)


def _same(pair: tuple[PreTrainedModel, Any], ids: Tensor, **options: Any) -> Tensor:
    """Both models' generate from one seed; asserts equal tokens."""
    results = []
    for model in pair:
        torch.manual_seed(0)
        results.append(model.generate(ids, **{"max_new_tokens": 12, "pad_token_id": 0, **options}))
    assert torch.equal(results[0], results[1])
    return results[1]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("engine", SLOW_ENGINES)
def test_slow_engines(family: str, engine: str) -> None:
    """The outline of what follows, for engines that take tens of milliseconds per step."""
    pair = _compiled(family, engine)
    test_forward_equals_the_original(pair)
    test_forward_continues_from_its_cache(pair)
    _same(pair, PADDED, attention_mask=MASK, do_sample=False, max_new_tokens=4)
    _same(pair, PROMPT, num_beams=2, do_sample=True, max_new_tokens=4)


# Forward


def test_token_types_that_are_tokens() -> None:
    """None of them are not the same as zeros there."""
    model = random(XLMConfig(vocab_size=128, emb_dim=64, n_layers=2, n_heads=4), XLMModel)
    fast = tilewright.compile(model, batch_sizes=(3,), max_length=64, backend="cpp", autotune="off")
    with torch.no_grad():
        expected = model(PADDED, attention_mask=MASK).last_hidden_state
    found = fast(PADDED, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="does not take token_type_ids"):
        fast(PADDED, attention_mask=MASK, token_type_ids=torch.zeros_like(PADDED))


def test_forward_equals_the_original(pair: tuple[PreTrainedModel, Any]) -> None:
    model, fast = pair
    with torch.no_grad():
        expected = model(input_ids=PADDED, attention_mask=MASK)
    result = fast(input_ids=PADDED, attention_mask=MASK)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.logits[MASK.bool()], expected.logits[MASK.bool()], rtol=1e-4, atol=1e-4)
    assert fast(PROMPT, logits_to_keep=2).logits.shape == (1, 2, 128)
    assert cache_of(fast(PROMPT, use_cache=False)) is None
    logits, cache = fast(PROMPT, return_dict=False)
    assert logits.shape == (1, 7, 128)
    assert cache.get_seq_length() == 7


def test_forward_continues_from_its_cache(pair: tuple[PreTrainedModel, Any]) -> None:
    """Prefill in chunks, then one token, then several: the logits are those of the whole sequence at once."""
    model, fast = pair
    ids = torch.randint(1, 128, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    first = fast(ids[:, :19])
    past = with_cache(fast.forward, cache_of(first))
    second = fast(ids[:, 19:20], **past)
    third = fast(ids[:, 20:], logits_to_keep=torch.tensor([0, 2]), **past)
    torch.testing.assert_close(first.logits, expected[:, :19], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.logits, expected[:, 19:20], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(third.logits, expected[:, [20, 22]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_cache_is_taken_by_the_names_of_other_releases(
    llama: tuple[PreTrainedModel, Any], name: str
) -> None:
    """With a warning, and by the model's own name without one."""
    model, fast = llama
    whole = torch.cat([PROMPT, PROMPT], dim=1)
    with torch.no_grad():
        expected = model(whole).logits[:, 7:]
    own = cache_name(model.forward)
    quiet = warnings.catch_warnings(action="error")
    with quiet if name == own else pytest.warns(FutureWarning, match=f"^{name} is .*as {own}="):
        found = fast(PROMPT, **{name: cache_of(fast(PROMPT))}).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    held = cache_of(fast(PROMPT))
    quiet = warnings.catch_warnings(action="error", category=FutureWarning)
    with quiet if name == own else pytest.warns(FutureWarning, match=f"^{name} is .*as {own}="):
        found = fast.generate(whole, **{name: held}, **options)
    assert torch.equal(found, model.generate(whole, **options))
    assert held.get_seq_length() == 18


def test_forward_has_the_signature_of_the_original(pair: tuple[PreTrainedModel, Any]) -> None:
    """In which arguments without names are in other places for other families."""
    model, fast = pair
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    places = list(inspect.signature(model.forward).parameters)
    given: dict[str, Any] = {"input_ids": PADDED, "attention_mask": MASK}
    in_order = [given.get(name) for name in places[: places.index("attention_mask") + 1]]
    assert torch.equal(fast(*in_order).logits, fast(**given).logits)
    with pytest.raises(InputError, match="arguments do not fit"):
        fast(*in_order, input_ids=PADDED)


def test_encoder_equals_the_original(engine: str) -> None:
    model, fast = _compiled("bert", engine)
    with torch.no_grad():
        expected = model(input_ids=PADDED, attention_mask=MASK)
    result = fast(input_ids=PADDED, attention_mask=MASK)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(result.pooler_output, expected.pooler_output)
    assert len(fast(PADDED, return_dict=False)) == 2
    with pytest.raises(InputError, match="model takes 1 to"):
        fast(torch.ones(1, 300, dtype=torch.long))
    with pytest.raises(InputError, match="attention_mask must be of shape"):
        fast(PADDED, attention_mask=MASK[:, 1:])
    for mask, message in (
        (MASK - 1, "attention_mask holds -1"),
        (MASK * 2, "holds 2"),
        (MASK.float(), "bool dtype"),
    ):
        with pytest.raises(InputError, match=f"{message}.*1 or True for what counts"):
            fast(PADDED, attention_mask=mask)


# Generation

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True},
    "all": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9},
    "minimum": {"do_sample": False, "min_new_tokens": 10, "eos_token_id": list(range(100))},
    "eos": {"do_sample": True, "top_k": 0, "eos_token_id": list(range(10, 30))},
    "no cache": {"do_sample": False, "use_cache": False},
    "static": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_equals_the_original(pair: tuple[PreTrainedModel, Any], mode: str, padded: bool) -> None:
    mask = {"attention_mask": MASK} if padded else {}
    _same(pair, PADDED if padded else PROMPT, **mask, **MODES[mode])


@pytest.mark.parametrize("sampled", [False, True])
def test_beams(pair: tuple[PreTrainedModel, Any], sampled: bool) -> None:
    _same(pair, PROMPT, num_beams=4, do_sample=sampled)
    _same(pair, PADDED[:2], attention_mask=MASK[:2], num_beams=2, num_return_sequences=2, do_sample=sampled)


def test_own_loop_is_taken_only_for_what_it_can_do(
    llama: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    import tilewright.decoder_mixin as mixin

    own = mixin.generate
    monkeypatch.setattr(mixin, "generate", lambda *a, **k: calls.append(a[3]) or own(*a, **k))

    class Favour(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(1, torch.tensor([7]), 100.0)

    tokens = _same(llama, PROMPT, do_sample=False, logits_processor=LogitsProcessorList([Favour()]))
    assert tokens[0, 7:].tolist() == [7] * 12
    _same(llama, PROMPT, do_sample=False, repetition_penalty=1.2)
    _same(llama, PROMPT, do_sample=False, max_time=60.0)
    assert calls == []
    _same(llama, PROMPT, do_sample=True, temperature=0.5, top_k=3, top_p=0.7)
    (options,) = calls
    assert (options.sampling.temperature, options.sampling.top_k, options.sampling.top_p) == (0.5, 3, 0.7)


# Text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 128)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)


def test_pipeline(llama: tuple[PreTrainedModel, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["w5 w6 w7 w8 w9", "w10 w11"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2}
    results = [pipeline("text-generation", model=m, tokenizer=tokenizer)(texts, **options) for m in llama]
    assert results[0] == results[1]


def test_generated_sources_can_be_read() -> None:
    fast = _compiled("llama", "cpp")[1]
    assert "tw_run" in fast.ir("source.decode_b1.cpp")
    assert "q_proj" in fast.ir("source.decode_b1.cpp")  # kernels name the modules that they come from


# The original


def test_original_is_left_as_it_was() -> None:
    model = tiny("llama")
    before, with_grad = dict(vars(model)), model(PROMPT).logits
    cls, forward = type(model), model.forward
    fast = eager_decoder(model)
    fast.generation_config.eos_token_id = 9
    fast.note = "mine"
    fast.eval()
    assert dict(vars(model)) == before
    assert type(model) is cls
    assert model.forward == forward
    assert model.generation_config.eos_token_id != 9
    assert torch.equal(model(PROMPT).logits, with_grad)
    assert isinstance(fast, cls)
    assert type(fast).__name__ == cls.__name__
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))


# Bad input


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "too long": (lambda f: f.generate(PROMPT, max_new_tokens=64), r"max_length=64.*max_length=71"),
    "too long a prompt": (lambda f: f(torch.ones(1, 65, dtype=torch.long)), "max_length=64"),
    "batch": (lambda f: f(PROMPT.expand(5, -1)), r"batch of 5 .*batch_sizes=\(1, 4\)"),
    "beams": (lambda f: f.generate(PROMPT, num_beams=5, max_new_tokens=3), "batch of 5"),
    "float ids": (lambda f: f(PROMPT.float()), "dtype int64"),
    "flat ids": (lambda f: f(PROMPT[0]), r"shape \[batch, tokens\]"),
    "flat prompt": (lambda f: f.generate(PROMPT[0], max_new_tokens=3), r"shape \[batch, tokens\]"),
    "empty": (lambda f: f(PROMPT[:, :0]), "empty"),
    "empty prompt": (lambda f: f.generate(PROMPT[:, :0], max_new_tokens=3), "empty"),
    "no ids": (lambda f: f(), "input_ids is missing"),
    "id too large": (lambda f: f(PROMPT + 100), "token id 199 is out of range.*128"),
    "negative id": (lambda f: f.generate(PROMPT - 50, max_new_tokens=3), "token id -45"),
    "mask shape": (lambda f: f(PROMPT, attention_mask=MASK), r"attention_mask must be of shape \(1, 7\)"),
    "mask dtype": (
        lambda f: f(PROMPT, attention_mask=torch.ones(1, 7)),
        "attention_mask must be of an integer",
    ),
    "float mask in generate": (
        lambda f: f.generate(PADDED, attention_mask=MASK.float(), max_new_tokens=3),
        "attention_mask must be of an integer",
    ),
    "negative mask in generate": (
        lambda f: f.generate(PROMPT, attention_mask=torch.full((1, 7), -1), max_new_tokens=3),
        "attention_mask holds -1; pass attention_mask as 1 or True for what counts",
    ),
    "mask of segments": (
        lambda f: f(PROMPT, attention_mask=torch.tensor([[0, 1, 1, 1, 2, 2, 2]])),
        "attention_mask holds 2; pass attention_mask as 1 or True for what counts",
    ),
    "additive mask": (
        lambda f: f(PROMPT, attention_mask=torch.zeros(1, 1, 7, 7)),
        "attention_mask must be of an integer or bool dtype, got torch.float32; pass attention_mask as 1 or True",
    ),
    "mask of four dims": (
        lambda f: f(PROMPT, attention_mask=torch.ones(1, 1, 7, 7, dtype=torch.long)),
        r"attention_mask must be of shape \(1, 7\)",
    ),
    "positions": (lambda f: f(PROMPT, position_ids=PROMPT[:, 1:]), "position_ids must be of shape"),
    "position range": (lambda f: f(PROMPT, position_ids=PROMPT), "position 99 is outside"),
    "embeds": (lambda f: f(inputs_embeds=torch.ones(1, 2, 64)), "inputs_embeds"),
    "states": (lambda f: f(PROMPT, output_hidden_states=True), "output_hidden_states"),
    "paged": (lambda f: f.generate(PROMPT, cache_implementation="paged"), "cache_implementation"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_the_model_usable(
    llama: tuple[PreTrainedModel, Any], case: str
) -> None:
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call(llama[1])
    _same(llama, PROMPT, do_sample=False, max_new_tokens=2)


def test_bad_input_leaves_the_cache_usable(llama: tuple[PreTrainedModel, Any]) -> None:
    model, fast = llama
    past = with_cache(fast.forward, cache_of(fast(PROMPT)))
    for bad in (PROMPT.expand(2, -1), torch.ones(1, 60, dtype=torch.long), PROMPT + 100):
        with pytest.raises(InputError):
            fast(bad, **past)
    other = cache_of(eager_decoder(model)(PROMPT))
    with pytest.raises(InputError, match=f"{cache_name(model.forward)} is a EngineCache of another model"):
        fast(PROMPT, **with_cache(fast.forward, other))
    with torch.no_grad():
        expected = model(torch.cat([PROMPT, PROMPT], dim=1)).logits[:, 7:]
    result = fast(PROMPT, **past).logits
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


MASKS = {
    "holes": [[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]],
    "no last key": [[1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]],
    "rows without a key": [[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("pattern", MASKS)
def test_masks_of_any_pattern(pair: tuple[PreTrainedModel, Any], pattern: str) -> None:
    """As the original has them: at every attended position, and in what follows, whatever came before."""
    model, fast = pair
    mask = torch.tensor(MASKS[pattern])
    with torch.no_grad():
        expected = model(PADDED, attention_mask=mask).logits
    found = fast(PADDED, attention_mask=mask).logits
    torch.testing.assert_close(found[mask != 0], expected[mask != 0], rtol=1e-4, atol=1e-4)
    _same(pair, PADDED, attention_mask=mask, do_sample=False)
    _same(pair, PADDED, attention_mask=mask != 0, do_sample=False)


def test_weights_that_are_no_numbers() -> None:
    """They show in the same logits as in the original, and prompts that do not meet them are not harmed."""
    model = tiny("llama", layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("nan")  # the output's row too: its weight is tied
    fast = tilewright.compile(model, batch_sizes=(1, 4), max_length=64, backend="cpp", autotune="off")
    for ids, spoilt in ((PROMPT, 1), (PROMPT.index_fill(1, torch.tensor([3]), 77), 128)):
        with torch.no_grad():
            expected = model(ids).logits[:, -1]
        assert expected.isnan().sum() == spoilt
        torch.testing.assert_close(fast(ids).logits[:, -1], expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        _same((model, fast), ids, do_sample=False)


def test_compiled_models_stay_where_they_are(llama: tuple[PreTrainedModel, Any]) -> None:
    fast = llama[1]
    assert fast.to("cpu") is fast
    assert fast.to(torch.float32) is fast
    with pytest.raises(DeviceError, match="compile again"):
        fast.to(torch.bfloat16)
    with pytest.raises(DeviceError):
        fast.half()
    with pytest.raises(OptionError, match="inference"):
        fast.train()
    with pytest.raises(OptionError, match="no stage 'nonsense'"):
        fast.ir("nonsense")


def test_a_prefix_cache_may_be_copied(llama: tuple[PreTrainedModel, Any]) -> None:
    """One prefix, continued in two ways from deep copies of its cache."""
    model, fast = llama
    prefix = cache_of(fast(PROMPT))
    for tail in (PROMPT[:, :3], PROMPT.flip(1)[:, :2]):
        whole = torch.cat([PROMPT, tail], dim=1)
        expected = model.generate(whole, max_new_tokens=5, do_sample=False, pad_token_id=0)
        twin = copy.deepcopy(prefix)
        held = with_cache(fast.forward, twin)
        result = fast.generate(whole, max_new_tokens=5, do_sample=False, pad_token_id=0, **held)
        assert torch.equal(result, expected)
        assert (prefix.get_seq_length(), twin.engine) == (7, prefix.engine)
    assert copy.deepcopy(EngineCache(prefix.engine)).state is None
