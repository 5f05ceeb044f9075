"""Encoder-decoders: a compiled model runs both halves and says what Hugging Face's own says, however it is asked."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import tilewright as tw
from tilewright.cache import cache_name, cache_of, with_cache

from .models import random

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_LAYERS = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, **_IDS,
}  # fmt: skip
_BART = {**_LAYERS, "max_position_embeddings": 64}
# Tables by distance that end within the prompts of the tests.
_T5 = {
    "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, **_IDS,
}  # fmt: skip
_BERT = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip
_SOUND = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}

MODELS: dict[str, tuple[Any, Callable[[], hf.PretrainedConfig]]] = {
    "t5": (hf.T5ForConditionalGeneration, lambda: hf.T5Config(**_T5)),
    "mt5": (hf.MT5ForConditionalGeneration, lambda: hf.MT5Config(**_T5)),
    "umt5": (hf.UMT5ForConditionalGeneration, lambda: hf.UMT5Config(**_T5)),
    "bart": (hf.BartForConditionalGeneration, lambda: hf.BartConfig(**_BART)),
    "mbart": (hf.MBartForConditionalGeneration, lambda: hf.MBartConfig(**_BART)),
    "marian": (hf.MarianMTModel, lambda: hf.MarianConfig(**_BART)),
    "pegasus": (hf.PegasusForConditionalGeneration, lambda: hf.PegasusConfig(**_BART)),
    "blenderbot": (hf.BlenderbotForConditionalGeneration, lambda: hf.BlenderbotConfig(**_BART)),
    "m2m_100": (hf.M2M100ForConditionalGeneration, lambda: hf.M2M100Config(**_BART)),
    "whisper": (hf.WhisperForConditionalGeneration, lambda: hf.WhisperConfig(**_LAYERS, **_SOUND)),
    "encoder_decoder": (
        hf.EncoderDecoderModel,
        lambda: hf.EncoderDecoderConfig.from_encoder_decoder_configs(
            hf.BertConfig(**_BERT), hf.BertConfig(**_BERT), decoder_start_token_id=1, pad_token_id=0
        ),
    ),
}


@dataclass(frozen=True)
class Pair:
    """A model and the same compiled, with two inputs for the encoder, and what is to be decoded from."""

    model: Any
    fast: Any
    given: dict[str, Tensor]
    ids: Tensor

    @property
    def states(self) -> Tensor:
        with torch.no_grad():
            return self.model.get_encoder()(**self.given).last_hidden_state


def make(name: str, backend: str = "reference", **options: Any) -> Pair:
    kind, config = MODELS[name]
    model = random(config(), kind)
    options = {"batch_sizes": (2,), "max_length": 64, "autotune": "off", "backend": backend} | options
    fast = tw.compile(model, **options)
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_features":
        given = {"input_features": torch.randn(2, 8, 40, generator=generator)}
    else:
        ids = torch.randint(3, 128, (2, 19), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 14:] = 0
        given = {"input_ids": ids, "attention_mask": mask}
    return Pair(model, fast, given, torch.randint(3, 128, (2, 17), generator=generator))


@pytest.fixture(scope="module")
def bart() -> Pair:
    return make("bart", batch_sizes=(2, 4))


@pytest.fixture(scope="module")
def whisper() -> Pair:
    return make("whisper", batch_sizes=(4,))


def same(found: Tensor, expected: Tensor) -> None:
    most = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5 * most)


def past_of(model: Any, output: Any) -> dict[str, Any]:
    """The cache in a result of ``model``, as an argument of its next call."""
    return with_cache(model.forward, cache_of(output))


def check(pair: Pair) -> tuple[Tensor, Tensor]:
    """Logits of a prompt at once, of tokens after it, and greedy tokens; gives the prompt's logits, ours and theirs."""
    model, fast, given, ids = pair.model, pair.fast, pair.given, pair.ids
    with torch.no_grad():
        expected = model(**given, decoder_input_ids=ids)
        more = model(**given, decoder_input_ids=ids[:, :3], **past_of(model, expected))
    found = fast(**given, decoder_input_ids=ids)
    assert type(found) is type(expected)
    same(found.logits, expected.logits)
    same(fast(**given, decoder_input_ids=ids[:, :3], **past_of(fast, found)).logits, more.logits)
    asked = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(fast.generate(**given, **asked), model.generate(**given, **asked))
    return found.logits, expected.logits


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_decoder_says_what_hugging_face_says(
    name: str, record_architecture: Callable[..., None]
) -> None:
    pair = make(name)
    found, expected = check(pair)
    record_architecture(name, "encoder-decoder", pair.fast.report(), [found], [expected])
    assert pair.fast.report().compiled_while_running == 0


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_and_so_do_generated_kernels(name: str) -> None:
    """A bias by distance on one side only, beside a whole context; sound, and no mask of the encoder's."""
    check(make(name, "cpp"))


# --- ways to ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 2, "max_new_tokens": 9},
        {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 9, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "max_new_tokens": 9},
        {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 9},
        {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 12},
        {"do_sample": False, "repetition_penalty": 1.5, "max_new_tokens": 9},
        {"do_sample": False, "no_repeat_ngram_size": 2, "max_new_tokens": 9},
        {"do_sample": False, "max_new_tokens": 9, "forced_eos_token_id": 2},
        {"do_sample": False, "max_new_tokens": 9, "use_cache": False},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_every_way_to_generate_gives_what_hugging_face_gives(bart: Pair, asked: dict[str, Any]) -> None:
    tokens = []
    for model in (bart.fast, bart.model):
        torch.manual_seed(3)
        tokens.append(model.generate(**bart.given, **asked))
    assert torch.equal(*tokens)


def test_scores_are_those_of_hugging_face(bart: Pair) -> None:
    asked = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    found, expected = (m.generate(**bart.given, **asked) for m in (bart.fast, bart.model))
    assert torch.equal(found.sequences, expected.sequences)
    same(torch.stack(found.scores), torch.stack(expected.scores))


def test_a_prompt_for_the_decoder(bart: Pair) -> None:
    """Left-padded, in a batch between two buckets: the third row has nothing to do with the others."""
    ids = torch.cat([bart.ids, bart.ids.flip(1)[:1]])[:, :6]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    source = {name: torch.cat([t, t[:1].flip(1)]) for name, t in bart.given.items()}
    asked = {
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
    }
    assert torch.equal(bart.fast.generate(**source, **asked), bart.model.generate(**source, **asked))


def test_a_streamer_sees_every_token(bart: Pair) -> None:
    class Kept(hf.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    row = {name: t[:1] for name, t in bart.given.items()}
    kept = Kept()
    tokens = bart.fast.generate(**row, max_new_tokens=6, do_sample=False, streamer=kept)
    assert kept.tokens == [*tokens[0].tolist(), -1]


def test_sound_with_timestamps_and_its_own_generate(whisper: Pair) -> None:
    """Whisper's generate() wraps that of all others, with a prompt and processors of its own."""
    asked = {"max_new_tokens": 8, "num_beams": 2}
    given = whisper.given
    assert torch.equal(whisper.fast.generate(**given, **asked), whisper.model.generate(**given, **asked))
    positional = whisper.fast.generate(given["input_features"], max_new_tokens=8)
    assert torch.equal(positional, whisper.model.generate(given["input_features"], max_new_tokens=8))


# --- the request's state --------------------------------------------------------------------------------------------


def test_keys_and_values_of_the_encoder_are_computed_once(
    bart: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, encoder = bart.fast._tilewright.engine, bart.fast.get_encoder()._tilewright.engine
    runs = {"per_request": 0, "encoder": 0}
    for name, executor in (
        ("per_request", engine.per_request_executor),
        ("encoder", encoder.prefill_executor),
    ):

        def counted(*args: Any, name: str = name, run: Any = executor.run) -> None:
            runs[name] += 1
            run(*args)

        monkeypatch.setattr(executor, "run", counted)
    bart.fast.generate(**bart.given, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert runs == {"per_request": 1, "encoder": 1}


def test_steps_read_no_weights_of_cross_attention_keys(bart: Pair) -> None:
    for weight in ("encoder_attn.k_proj", "encoder_attn.v_proj"):
        assert weight in bart.fast.ir("per_request")
        assert weight not in bart.fast.ir("decode_b2")
        assert weight not in bart.fast.ir("prefill")


def test_requests_of_other_lengths_follow_each_other(bart: Pair) -> None:
    """A state that is used again has room for the new encoder's states, and forgets the old ones."""
    for length in (19, 4, 11, 11):
        source = {name: t[:, :length] for name, t in bart.given.items()}
        asked = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(bart.fast.generate(**source, **asked), bart.model.generate(**source, **asked))


def test_a_copied_request_keeps_what_it_attends_to(bart: Pair) -> None:
    first = bart.fast(**bart.given, decoder_input_ids=bart.ids[:, :4])
    past = past_of(bart.fast, first)
    twin = copy.deepcopy(past)
    second = bart.fast(**bart.given, decoder_input_ids=bart.ids[:, 4:5], **past)
    again = bart.fast(**bart.given, decoder_input_ids=bart.ids[:, 4:5], **twin)
    assert torch.equal(second.logits, again.logits)


def test_rows_that_change_places_take_their_encoder_states_along(bart: Pair) -> None:
    whole = bart.fast(**bart.given, decoder_input_ids=bart.ids[:, :5]).logits
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        first = bart.fast(**bart.given, decoder_input_ids=bart.ids[:, :4])
        change(cache_of(first))
        mask = bart.given["attention_mask"][rows]
        past = past_of(bart.fast, first)
        step = bart.fast(attention_mask=mask, decoder_input_ids=bart.ids[rows, 4:5], **past).logits
        same(step[:, 0], whole[rows, 4])


def test_a_mask_may_change_between_steps(bart: Pair) -> None:
    """Hugging Face passes it at every step, and attends by the one of the step."""
    narrow = bart.given["attention_mask"].clone()
    narrow[:, 3:] = 0
    results = []
    for model in (bart.fast, bart.model):
        with torch.no_grad():
            first = model(**bart.given, decoder_input_ids=bart.ids[:, :4])
            given = {"attention_mask": narrow, "encoder_outputs": (first.encoder_last_hidden_state,)}
            step = model(**given, decoder_input_ids=bart.ids[:, 4:5], **past_of(model, first))
            results.append(step.logits)
    same(*results)


def test_states_from_elsewhere(bart: Pair) -> None:
    """encoder_outputs of Hugging Face's encoder, as a tuple and as its output class, stand for inputs."""
    mask, ids = bart.given["attention_mask"], bart.ids
    expected = bart.fast(**bart.given, decoder_input_ids=ids).logits
    for outputs in ((bart.states,), hf.modeling_outputs.BaseModelOutput(last_hidden_state=bart.states)):
        found = bart.fast(encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=ids).logits
        same(found, expected)


def test_threads_with_requests_of_their_own(bart: Pair) -> None:
    rows = [{n: t[i : i + 1, : 9 + i] for n, t in bart.given.items()} for i in (0, 1)]
    expected = [bart.fast.generate(**row, max_new_tokens=12, do_sample=False) for row in rows]
    found: list[list[Tensor]] = [[], []]

    def work(n: int) -> None:
        for _ in range(3):
            found[n].append(bart.fast.generate(**rows[n], max_new_tokens=12, do_sample=False))

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(tokens, expected[n]) for n in (0, 1) for tokens in found[n])
    assert [len(f) for f in found] == [3, 3]


# --- what is shown, and options -------------------------------------------------------------------------------------


def test_report_and_stages_show_both_halves(bart: Pair, tmp_path: Path) -> None:
    report = bart.fast.report()
    names = [p.name for p in report.phases]
    assert names == ["decode_b2", "decode_b4", "per_request", "prefill", "encoder"]
    assert report.phase("encoder").kernels_per_layer > 0
    assert "encoder_attn" in bart.fast.ir("per_request")
    assert "func @main" in bart.fast.ir("encoder")
    tw.compile(bart.model, backend="reference", max_length=32, dump=tmp_path)
    assert (tmp_path / "per_request" / "plan.txt").exists()
    assert (tmp_path / "encoder" / "forward" / "plan.txt").exists()


def test_quantized_weights_and_a_narrow_cache() -> None:
    """Both halves and the part between them have codes; greedy tokens stay those of the codes' own values."""
    pair = make("marian", weights="int8", kv_cache="bf16")
    assert all(
        "dequantize" in pair.fast.ir(stage) for stage in ("decode", "per_request", "prefill", "encoder")
    )
    with torch.no_grad():
        expected = pair.model(**pair.given, decoder_input_ids=pair.ids).logits
    found = pair.fast(**pair.given, decoder_input_ids=pair.ids).logits
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert cosine.min() > 0.998


def test_a_model_without_a_head() -> None:
    model = random(hf.BartConfig(**_BART), hf.BartModel)
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="reference")
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids[:, :5])
    found = fast(input_ids=ids, decoder_input_ids=ids[:, :5])
    same(found.last_hidden_state, expected.last_hidden_state)
    assert type(found) is type(expected)


def test_adapters_in_both_halves() -> None:
    """PEFT's LoRA on an encoder-decoder, chosen and switched off between calls."""
    from peft import LoraConfig, get_peft_model

    model = random(hf.BartConfig(**_BART), hf.BartForConditionalGeneration)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    fast = tw.compile(wrapped, batch_sizes=(2,), max_length=64, backend="reference")
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(1))
    asked = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    with torch.no_grad():
        expected = wrapped(**asked).logits
        same(fast(**asked).logits, expected)
        with wrapped.disable_adapter():
            plain = wrapped(**asked).logits
            same(fast(**asked).logits, plain)
        same(fast(**asked).logits, expected)
    assert not torch.allclose(plain, expected, rtol=1e-2)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_leaves_the_model_usable(bart: Pair) -> None:
    fast, given, ids = bart.fast, bart.given, bart.ids
    source, mask = given["input_ids"], given["attention_mask"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({**given}, "decoder_input_ids is missing"),
        ({"decoder_input_ids": ids}, "input_ids is missing; pass it, or encoder_outputs"),
        ({"input_ids": source + 1000, "decoder_input_ids": ids}, "out of range"),
        ({**given, "decoder_input_ids": ids + 1000}, "out of range"),
        ({**given, "decoder_input_ids": ids[:1]}, "shape"),
        ({"input_ids": source, "attention_mask": mask[:, :3], "decoder_input_ids": ids}, "attention_mask"),
        ({"encoder_outputs": (bart.states[:, :, :9],), "decoder_input_ids": ids}, "encoder_hidden_states"),
        ({"encoder_outputs": ([1.0],), "decoder_input_ids": ids}, "must be a tensor"),
        (
            {"input_ids": source.repeat(1, 4), "decoder_input_ids": ids},
            "dim S is 76.*compile with max_length=76",
        ),
        (
            {"encoder_outputs": (bart.states.repeat(1, 4, 1),), "decoder_input_ids": ids},
            "dim E is 76.*compile with max_length=76",
        ),
        ({**given, "decoder_input_ids": ids, "labels": ids}, "does not take labels"),
        (
            {**given, "decoder_input_ids": ids, **with_cache(fast.forward, hf.DynamicCache())},
            f"{cache_name(bart.model.forward)} is a DynamicCache of another model",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(tw.InputError, match=message):
            fast(**arguments)
    same(
        fast(**given, decoder_input_ids=ids).logits,
        bart.model(**given, decoder_input_ids=ids).logits.detach(),
    )


def test_half_a_model_is_refused_where_it_cannot_stand_alone(bart: Pair) -> None:
    """The decoder alone would be taken for a model that attends to its own tokens only."""
    with pytest.raises(tw.CaptureError, match="compile the whole model"):
        tw.compile(bart.model.get_decoder(), backend="reference")
    encoder = tw.compile(bart.model.get_encoder(), batch_sizes=(2,), max_length=64, backend="reference")
    kept = bart.given["attention_mask"].bool()
    same(encoder(**bart.given).last_hidden_state[kept], bart.states[kept])


def test_an_encoder_of_sound_of_unknown_length_takes_an_example() -> None:
    config = hf.Speech2TextConfig(
        **_LAYERS,
        max_source_positions=40,
        max_target_positions=64,
        input_feat_per_channel=8,
        conv_channels=32,
    )
    model = random(config, hf.Speech2TextForConditionalGeneration)
    with pytest.raises(tw.CaptureError, match="Speech2TextEncoder: its config does not say"):
        tw.compile(model, backend="reference")
