"""Prompts with images: the model's own code makes vectors of them, and all that follows is compiled.

Transformers itself is the oracle. Where images have positions of their own, what comes after them must not be numbered
by counting tokens.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewright as tw
from tests.closeness import assert_no_further
from tilewright import decoder_mixin, multimodal, phases
from tilewright.cache import EngineCache, cache_of, with_cache
from tilewright.errors import InputError
from tilewright.multimodal import plain_positions, reach_of
from tilewright.runtime.engine import Engine
from tilewright.runtime.kv_state import RequestState

from .multimodal import CONFIGS, IMAGE, compiled, model_of, prompts

GREEDY = {"max_new_tokens": 9, "do_sample": False}


@torch.no_grad()
def logits(model: Any, given: dict[str, Any]) -> Tensor:
    """Logits of what is no padding."""
    found: Tensor = model(**given).logits
    return found[given["attention_mask"].bool()]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_logits_are_those_of_hugging_face(name: str, backend: str) -> None:
    given = prompts(name)
    torch.testing.assert_close(
        logits(compiled(name, backend), given), logits(model_of(name), given), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["idefics3", "qwen3_5"])
def test_half_precision(name: str) -> None:
    """No further from float64 than eager is."""
    half, whole = model_of(name, torch.bfloat16), copy.deepcopy(model_of(name)).double()
    given = prompts(name)
    pixels = given.pop("pixel_values")
    ours, eager = (
        logits(m, {**given, "pixel_values": pixels.bfloat16()})
        for m in (compiled(name, "cpp", torch.bfloat16), half)
    )
    assert_no_further(ours, eager, logits(whole, {**given, "pixel_values": pixels.double()}))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "how",
    [{}, {"return_dict_in_generate": True}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["own loop", "other loop", "beams", "several of each"],
)
def test_generate_is_that_of_hugging_face(name: str, how: dict[str, Any]) -> None:
    expected, found = (m.generate(**prompts(name), **GREEDY, **how) for m in (model_of(name), compiled(name)))
    if how.get("return_dict_in_generate"):
        expected, found = expected.sequences, found.sequences
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_our_own_loop_decodes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt nothing is known of images, so no step has to go through Transformers' loop."""
    lengths: list[int] = []
    loop = decoder_mixin.generate

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        lengths.append(kwargs["logits"].shape[1])
        return loop(*args, **kwargs)

    monkeypatch.setattr(decoder_mixin, "generate", noted)
    compiled(name).generate(**prompts(name), **GREEDY)
    assert lengths == [1]


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_alone(name: str) -> None:
    """Prompts without images: no tower runs, and vectors are the model's own for the ids."""
    model, fast = model_of(name), compiled(name)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    named = inspect.signature(model.forward).parameters  # of which processors give token types
    given |= {n: torch.zeros_like(ids) for n in ("token_type_ids", "mm_token_type_ids") if n in named}
    torch.testing.assert_close(logits(fast, given), logits(model, given), atol=1e-5, rtol=1e-4)
    assert torch.equal(fast.generate(**given, **GREEDY), model.generate(**given, **GREEDY))


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_texts_without_token_types(name: str) -> None:
    """PaliGemma's tokens see each other where no types say that there is a suffix; with a mask, they do not."""
    model, fast = model_of(name), compiled(name)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        torch.testing.assert_close(fast(ids[:1]).logits, model(ids[:1]).logits, atol=1e-5, rtol=1e-4)
    given = {"input_ids": ids, "attention_mask": mask}
    torch.testing.assert_close(logits(fast, given), logits(model, given), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        ends = [m(**given, use_cache=True) for m in (fast, model)]
        whole = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)
        more = {"input_ids": ids[:, :3], "attention_mask": whole}
        found = [
            m(**more, **with_cache(m.forward, cache_of(e))).logits
            for m, e in zip((fast, model), ends, strict=True)
        ]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_a_prompt_that_ends_with_an_image(name: str) -> None:
    """generate() goes on from each number of the last position, and they differ."""
    given = prompts(name, rows=1)
    last = given["input_ids"].shape[1] - 5
    cut = {
        n: v[:, :last] if n in ("input_ids", "attention_mask", "mm_token_type_ids") else v
        for n, v in given.items()
    }
    expected, found = (
        m.generate(**cut, **GREEDY, return_dict_in_generate=False) for m in (model_of(name), compiled(name))
    )
    assert torch.equal(found, expected)


def test_turns_of_a_model_that_counts_from_one() -> None:
    """What generate() has run is numbered as what forward runs after it."""
    more = torch.randint(3, 90, (1, 5), generator=torch.Generator().manual_seed(2))
    found = []
    for m in (compiled("paligemma"), model_of("paligemma")):
        first = m.generate(**prompts("paligemma", rows=1), **GREEDY, return_dict_in_generate=True)
        with torch.no_grad():
            for ids in (more, more[:, :1]):
                found.append(m(input_ids=ids, **with_cache(m.forward, cache_of(first))).logits)
    for ours, expected in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_padded_texts_go_on_as_those_of_hugging_face() -> None:
    """Where images have positions of their own, texts alone are still numbered by their tokens."""
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    found = []
    for m in (compiled("qwen2_vl"), model_of("qwen2_vl")):
        model_of("qwen2_vl").model.rope_deltas = None
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            cache = cache_of(m(ids, attention_mask=mask, position_ids=positions, use_cache=True))
            found.append(m(ids[:, :2], **with_cache(m.forward, cache)).logits[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_a_base_model_goes_on_after_an_image() -> None:
    """Which holds its decoder itself."""
    model = model_of("qwen2_vl").model
    fast = tw.compile(model, max_length=96, backend="reference", autotune="off")
    found = []
    for m in (fast, model):
        model.rope_deltas = None
        with torch.no_grad():
            cache = cache_of(m(**prompts("qwen2_vl", rows=1), use_cache=True))
            second = prompts("qwen2_vl", seed=3, rows=1)
            del second["attention_mask"]
            found.append(m(**second, **with_cache(m.forward, cache)).last_hidden_state)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_an_emptied_cache_begins_anew() -> None:
    fast = compiled("qwen2_vl")
    cache = cache_of(fast(**prompts("qwen2_vl", rows=1)))
    assert cache.state.shift[0].item() < 0
    cache.crop(-cache.get_seq_length())
    assert not cache.state.shift.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_request_goes_on_after_an_image(name: str) -> None:
    """Several tokens and then one, without a word about positions: they go on where the image's end."""
    model, fast = model_of(name), compiled(name)
    more = torch.randint(3, 90, (1, 5), generator=torch.Generator().manual_seed(2))
    given = prompts(name, rows=1)
    found: dict[Any, list[Tensor]] = {model: [], fast: []}
    for m, results in found.items():
        with torch.no_grad():
            cache = cache_of(m(**given, use_cache=True))
            for ids in (more, more[:, :1]):
                results.append(m(input_ids=ids, **with_cache(m.forward, cache)).logits)
    for ours, expected in zip(found[fast], found[model], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_another_image_comes_later(name: str) -> None:
    """Its tokens see each other and what is in the cache, behind a window or not."""
    model, fast = model_of(name), compiled(name)
    first, second = prompts(name, rows=1), prompts(name, seed=3, rows=1)
    whole = torch.ones(1, 2 * second["input_ids"].shape[1], dtype=torch.int64)
    found = []
    for m in (fast, model):
        with torch.no_grad():
            cache = cache_of(m(**first, use_cache=True))
            given = {**second, "attention_mask": whole}
            found.append(m(**given, **with_cache(m.forward, cache)).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_another_image_comes_later_where_images_have_positions(name: str) -> None:
    """Positions go on from those of the request's own first image, whatever else ran in between."""
    model, fast = model_of(name), compiled(name)
    first, second = prompts(name, rows=1), prompts(name, seed=3, rows=1)
    found = []
    for m in (model, fast):
        with torch.no_grad():
            cache = cache_of(m(**first, use_cache=True))
            if m is fast:
                fast.generate(**prompts(name, seed=5), **GREEDY)
                model(**prompts(name, seed=6))
            given = {n: v for n, v in second.items() if n != "attention_mask"}
            found.append(m(**given, **with_cache(m.forward, cache)).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_logits_at_the_end_of_a_padded_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are numbered wrongly change logits before they change tokens."""
    model, fast, given = model_of(name), compiled(name), prompts(name)
    states: list[RequestState] = []
    loop = decoder_mixin.generate

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        states.append(args[1])
        return loop(*args, **kwargs)

    monkeypatch.setattr(decoder_mixin, "generate", noted)
    fast.generate(**given, **GREEDY)
    expected = model.generate(**given, **GREEDY, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(states[0].logits[:2, 0], expected.logits[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["idefics3", "qwen3_5", "gemma3", "paligemma"])
def test_a_conversation(name: str) -> None:
    """The second turn repeats all ids, whose image is in the cache already; another request runs in between."""
    more = torch.randint(3, 90, (1, 5), generator=torch.Generator().manual_seed(2))
    answers = []
    for m in (model_of(name), compiled(name)):
        given = prompts(name, rows=1)
        first = m.generate(**given, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        if m is not model_of(name):
            m.generate(**prompts(name, seed=5), **GREEDY)
        known = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "image_grid_thw" in given:
            known |= {
                "mm_token_type_ids": (ids == IMAGE).int(),
                "image_grid_thw": given["image_grid_thw"],
            }
        answers.append(m.generate(**known, **with_cache(m.forward, cache_of(first)), **GREEDY))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_a_long_prompt_runs_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, given = compiled(name), prompts(name)
    expected = logits(fast, given)
    engine: Engine = fast._tilewright.engine
    monkeypatch.setattr(engine, "spec", replace(engine.spec, chunk=5))
    torch.testing.assert_close(logits(fast, given), expected, atol=1e-5, rtol=1e-4)


def test_tokens_that_see_each_other_stay_in_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, given = compiled("gemma3"), prompts("gemma3")
    engine: Engine = fast._tilewright.engine
    monkeypatch.setattr(engine, "spec", replace(engine.spec, chunk=3))
    with pytest.raises(
        InputError, match="4 tokens of a prompt see each other, but prompts run in pieces of 3"
    ):
        fast(**given)


def test_calls_leave_nothing_behind() -> None:
    """Qwen2-VL notes in itself how positions went on after an image; the model that is compiled must not be changed."""
    model = model_of("qwen2_vl")
    fast, given = compiled("qwen2_vl"), prompts("qwen2_vl", rows=1)
    model.model.rope_deltas = None
    first = logits(fast, given)
    logits(fast, prompts("qwen2_vl", seed=5))
    fast.generate(**prompts("qwen2_vl", seed=5), **GREEDY)
    assert model.model.rope_deltas is None
    assert torch.equal(logits(fast, given), first)


def again(name: str) -> Any:
    """The model compiled anew, as something else is to be seen of it."""
    return tw.compile(model_of(name), max_length=96, batch_sizes=(2,), backend="reference", autotune="off")


def test_a_tower_may_attend_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some models (GOT-OCR2) only the decoder asks what attention to use; a tower is not compiled."""
    monkeypatch.setattr(
        type(model_of("llava")), "_can_set_attn_implementation", classmethod(lambda cls: False)
    )
    given = prompts("llava")
    torch.testing.assert_close(
        logits(again("llava"), given), logits(model_of("llava"), given), atol=1e-5, rtol=1e-4
    )


def test_a_model_that_needs_ids_takes_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n looks ids up once more for its layers."""
    monkeypatch.setattr(phases, "prompt_of_vectors", lambda *_: None)
    fast, model = again("llava"), model_of("llava")
    assert any("before model.language_model" in note for note in fast.report().notes)
    with pytest.raises(InputError, match="takes texts alone; use the original model for prompts with images"):
        fast(**prompts("llava"))
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    assert torch.equal(fast.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_positions_in_another_form() -> None:
    """With those of the text before them, and as floats; numbers that differ stay, and so do fractions."""
    text, other = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]])
    same, apart = text.expand(3, 1, 3), torch.stack([text, text, other])
    assert torch.equal(plain_positions(torch.cat([text[None], same]).float(), 3), text)
    assert torch.equal(plain_positions(torch.cat([text[None], apart]), 3), apart)
    four = torch.cat([apart, apart[:1]])
    assert torch.equal(plain_positions(four, 4), four)
    assert plain_positions(text + 0.5, 1).is_floating_point()
    assert plain_positions(None, 1) is None


BACKWARDS = torch.ones(1, 1, 22, 22, dtype=torch.bool).triu()


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"cross_attention_states": torch.ones(1)}, "hands its decoder cross_attention_states"),
        ({"inputs_embeds": None}, "no vectors"),
        ({"attention_mask": BACKWARDS}, "a mask that a compiled one cannot follow"),
        ({"attention_mask": {"full_attention": BACKWARDS}}, "a mask that a compiled one cannot follow"),
        ({"attention_mask": {"chunked_attention": BACKWARDS}}, "a mask that a compiled one cannot follow"),
        ({"kwargs": {"grid": torch.ones(1)}}, "hands its decoder grid"),
        (None, "did not call its decoder"),
    ],
)
def test_what_a_decoder_cannot_be_told_is_refused(
    told: dict[str, Any] | None, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names a remedy, the cache stays as it was, and texts go on working."""
    model, fast = model_of("llava"), compiled("llava")
    call = multimodal.decoder_call
    monkeypatch.setattr(
        multimodal, "decoder_call", lambda *a, **k: None if told is None else {**call(*a, **k), **told}
    )
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    cache = EngineCache(fast._tilewright.engine)
    with pytest.raises(InputError, match=f"{what}.*use the original model for prompts with images"):
        fast(**prompts("llava", rows=1), **with_cache(model.forward, cache))
    assert cache.get_seq_length() == 0
    assert torch.equal(fast.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def blockwise(tokens: int, blocks: list[tuple[int, int]], past: int = 0, window: int = 0) -> Tensor:
    """A mask bool[1, 1, S, past + S]: causal, tokens of a block see each other, all within a window."""
    own, keys = torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens)
    seen = keys <= own
    for first, end in blocks:
        seen |= (own >= first) & (own < end) & (keys >= first) & (keys < end)
    return (seen & (own - keys < (window or past + tokens + 1)))[None, None]


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("past", [0, 4])
def test_how_far_tokens_see_is_read_off_a_mask(past: int, window: int) -> None:
    mask = blockwise(9, [(past + 2, past + 5), (past + 6, past + 8)], past, window)
    expected = torch.tensor([[0, 1, 4, 4, 4, 5, 7, 7, 8]]) + past
    shape = torch.Size([1, 9])
    for form in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
        reach = reach_of(form, None, shape, past, window)
        assert reach is not None
        assert torch.equal(reach, expected)


def test_masks_that_say_more_are_not_read() -> None:
    """A hole, keys that a later token no longer sees, another window, another size, no tensor at all."""
    shape = torch.Size([1, 9])
    hole = blockwise(9, [])
    hole[..., 5, 2] = False
    apart = blockwise(9, [])
    apart[..., 2, 7] = True
    for mask in (hole, apart, blockwise(9, [], window=3), blockwise(8, []), "flex"):
        assert reach_of(mask, None, shape, 0, 0) is None


def test_what_padding_sees_is_not_asked() -> None:
    """Transformers lets rows of padding see everything, to keep their softmax free of NaN."""
    mask, valid = blockwise(6, [(3, 5)]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    mask[..., :2, :] = True
    mask[..., 2:, :2] = False
    reach = reach_of(mask, valid, torch.Size([1, 6]), 0, 0)
    assert reach is not None
    assert reach.tolist() == [[0, 1, 2, 4, 4, 5]]


def test_other_arguments_are_refused() -> None:
    fast, given = compiled("llava"), prompts("llava", rows=1)
    vectors = torch.zeros(1, given["input_ids"].shape[1], 32)
    for name, value in {"output_hidden_states": True, "inputs_embeds": vectors}.items():
        with pytest.raises(InputError, match=f"does not take {name}"):
            fast(**given, **{name: value})


def test_an_engine_checks_vectors_and_positions() -> None:
    """Those that do not fit would be read beyond their end."""
    engine: Engine = compiled("qwen2_vl")._tilewright.engine
    ids = torch.tensor([[5, 6, 7]])
    for vectors in (torch.zeros(1, 2, 32), torch.zeros(1, 3, 31), torch.zeros(1, 3, 32).double()):
        with pytest.raises(InputError, match="inputs_embeds must be"):
            engine.step(engine.new_state(1), ids, given={"inputs_embeds": vectors})
    for positions in (torch.zeros(2, 1, 3).long(), torch.zeros(3, 1, 2).long()):
        with pytest.raises(InputError, match=r"position_ids must be of shape \(3, 1, 3\)"):
            engine.step(engine.new_state(1), ids, position_ids=positions)


def test_models_of_texts_take_no_vectors() -> None:
    """Their prompts are ids, looked up by the first kernel."""
    model = model_of("llava").model.language_model
    engine: Engine = tw.compile(model, max_length=32, backend="reference", autotune="off")._tilewright.engine
    with pytest.raises(InputError, match="does not take inputs_embeds"):
        engine.step(engine.new_state(1), torch.tensor([[5]]), given={"inputs_embeds": torch.zeros(1, 1, 32)})
