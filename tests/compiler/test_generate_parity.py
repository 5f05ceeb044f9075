"""Every decoding mode of Hugging Face's ``generate``: a compiled model gives the original's result from the same seed.

The modes that our own loop serves, and those of transformers that call our ``forward`` and reorder, crop or repeat our
cache. test_api.py has what varies with the model's family.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)

import tilewright as tw
from tilewright.cache import EngineCache, cache_name, cache_of, with_cache

from .models import tiny

PROMPT = torch.tensor([[5, 17, 99, 23, 42, 8, 61]])
PADDED = torch.tensor([[0, 0, 0, 17, 99, 23, 42], [5, 17, 99, 23, 42, 8, 61]])
MASK = (PADDED != 0).long()
BASE: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": 0, "do_sample": False}
DICT: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
EOS = list(range(20, 60))  # so many that rows end at different steps

Pair = tuple[PreTrainedModel, Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps of this size cost less than waking a second thread for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A model and what it is compiled to."""
    model = tiny("llama")
    options: dict[str, Any] = {"backend": "cpp", "batch_sizes": (1, 4, 8), "max_length": 96}
    return model, tw.compile(model, autotune="off", **options)


def seeded(model: Any, ids: Tensor | None, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model.generate(ids, **{**BASE, **options})


def same(pair: Pair, ids: Tensor | None = PROMPT, **options: Any) -> Tensor:
    """Both models' tokens, which must be equal."""
    expected, found = (seeded(model, ids, options) for model in pair)
    assert torch.equal(found, expected)
    return found


def same_padded(pair: Pair, **options: Any) -> Tensor:
    """As :func:`same`, for a batch whose rows begin and end apart."""
    return same(pair, PADDED, attention_mask=MASK, **options)


def differs(pair: Pair, found: Tensor, ids: Tensor = PROMPT, **options: Any) -> bool:
    """Whether an option matters at all: a test of one that changes nothing would pass without it."""
    return not torch.equal(found, seeded(pair[0], ids, options))


# Greedy search and sampling

SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_k": 0, "top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "top_h": {"top_h": 0.4},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    "renormalised": {"top_k": 9, "renormalize_logits": True},
}


@pytest.mark.parametrize("mode", SAMPLING)
def test_sampling(pair: Pair, mode: str) -> None:
    """One sequence, rows that end apart, and several sequences of each prompt."""
    options = {"do_sample": True, **SAMPLING[mode]}
    same(pair, **options)
    same_padded(pair, eos_token_id=EOS, **options)
    assert same_padded(pair, num_return_sequences=3, **options).shape[0] == 6


def test_greedy_search(pair: Pair) -> None:
    free = same_padded(pair)
    assert differs(pair, same_padded(pair, eos_token_id=EOS), PADDED, attention_mask=MASK)
    assert torch.equal(same_padded(pair, use_cache=False), free)
    assert torch.equal(same_padded(pair, prefill_chunk_size=3), free)
    assert same(pair, None, bos_token_id=1).shape == (1, 11)


def test_a_generation_config(pair: Pair) -> None:
    """An object in place of keyword arguments, and those of the model itself, which are its own copies."""
    config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=5, pad_token_id=0, eos_token_id=EOS)
    results = []
    for model in pair:
        torch.manual_seed(0)
        results.append(model.generate(PADDED, attention_mask=MASK, generation_config=config))
    assert torch.equal(*results)


# Beams

BEAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "early": {"early_stopping": True, "eos_token_id": EOS},
    "never": {"early_stopping": "never", "eos_token_id": EOS, "length_penalty": 2.0},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 1.4},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "returned": {"num_return_sequences": 3, "eos_token_id": EOS, "length_penalty": 0.1},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", BEAMS)
def test_beams(pair: Pair, mode: str) -> None:
    same_padded(pair, num_beams=4, **BEAMS[mode])


def test_a_beam_search_tells_its_scores(pair: Pair) -> None:
    options = {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": EOS, **DICT}
    expected, found = (seeded(model, PROMPT, options) for model in pair)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 4, "force_words_ids": [[7, 8]]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
    ],
    ids=["diverse", "constrained", "contrastive", "dola"],
)
def test_modes_that_have_left_transformers(pair: Pair, options: dict[str, Any]) -> None:
    """They are code of the hub now; we must not answer with plain greedy tokens instead."""
    for model in pair:
        with pytest.raises(ValueError, match="trust_remote_code"):
            seeded(model, PROMPT, options)


def test_a_loop_of_the_callers_own(pair: Pair) -> None:
    """What such modes are now: a function that drives ``forward`` and the cache itself."""

    def two_ahead(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        cache = kwargs[cache_name(model.forward)]
        for _ in range(4):
            fed = input_ids[:, cache.get_seq_length() :]
            logits = model(fed, use_cache=True, **with_cache(model.forward, cache)).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.topk(2).indices], dim=1)
        return input_ids

    assert same(pair, custom_generate=two_ahead).shape == (1, 15)


# Speculation


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("draft", ["hf", "compiled", "itself", "lookup"])
def test_speculation(pair: Pair, draft: str, sampled: bool) -> None:
    """Several tokens a step, and crops of what was guessed wrong; each model as target, and ours as the draft too."""
    model, fast = pair
    drafts: dict[str, Callable[[Any], dict[str, Any]]] = {
        "hf": lambda target: {"assistant_model": tiny("llama", layers=1)},
        "compiled": lambda target: {"assistant_model": fast},
        "itself": lambda target: {"assistant_model": target},
        "lookup": lambda target: {"prompt_lookup_num_tokens": 3},
    }
    options = {"do_sample": sampled, "eos_token_id": EOS[:9], "max_new_tokens": 16}
    prompt = PROMPT.repeat(1, 3)
    expected = seeded(model, prompt, options | drafts[draft](model))
    assert torch.equal(seeded(fast, prompt, options | drafts[draft](fast)), expected)
    if not sampled:
        assert torch.equal(expected, seeded(model, prompt, options))


def test_early_exit(pair: Pair) -> None:
    """A compiled model drafts with all its layers: the tokens are right, but samples draw other random numbers."""
    assert torch.equal(same(pair, assistant_early_exit=1), seeded(pair[0], PROMPT, {}))


# Logits processors


class Favour(LogitsProcessor):
    """Adds to one token more the longer the sequence is, so that it is chosen before long."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, torch.tensor([7]), torch.full_like(scores[:, :1], input_ids.shape[1] / 3))


def in_steps(batch: int, ids: Tensor) -> list[int]:
    """Allows tokens after the last one only, and wraps around."""
    last = int(ids[-1])
    return [(last + n) % 128 for n in range(1, 9)]


PROCESSORS: dict[str, dict[str, Any]] = {
    "custom": {"logits_processor": LogitsProcessorList([Favour()])},
    "bad words": {"bad_words_ids": [[38], [54], [5, 5], [17, 99]]},
    "n-grams": {"no_repeat_ngram_size": 1},
    "prefix": {"prefix_allowed_tokens_fn": in_steps},
    "suppressed": {"suppress_tokens": [5, 38, 54]},
    "suppressed at first": {"begin_suppress_tokens": [38, 54]},
    "forced eos": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "minimum": {"min_new_tokens": 6, "eos_token_id": list(range(60))},
    "minimal length": {"min_length": 12, "eos_token_id": list(range(60))},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"sequence_bias": {(11,): 4.0, (11, 12): 9.0}},
    "decay": {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 9},
    "guidance": {"guidance_scale": 1.7},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=6.0)},
}


@pytest.mark.parametrize("mode", PROCESSORS)
def test_logits_processors(pair: Pair, mode: str) -> None:
    options = PROCESSORS[mode]
    assert differs(pair, same(pair, **options))
    if mode != "guidance":  # transformers' own second batch has no cache of ours to reorder
        same_padded(pair, **options)
        same_padded(pair, num_beams=2, **options)
    same(pair, do_sample=True, **options)


def test_a_forced_first_token(pair: Pair) -> None:
    """Transformers forces it where the prompt is a single token."""
    assert same(pair, PROMPT[:, :1], forced_bos_token_id=33)[0, 1] == 33


# Stopping criteria


class Until(StoppingCriteria):
    """Each row stops for itself, at a sum of its tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.sum(dim=1) > 420


def test_stopping_criteria(pair: Pair) -> None:
    stop = {"stopping_criteria": StoppingCriteriaList([Until()])}
    assert differs(pair, same(pair, **stop))
    same_padded(pair, **stop)
    same(pair, num_beams=2, **stop)
    over = MaxTimeCriteria(max_time=1.0, initial_timestamp=time.time() - 2)
    assert same(pair, stopping_criteria=StoppingCriteriaList([over])).shape == (1, 8)


def test_no_time_is_one_token(pair: Pair) -> None:
    for model in pair:
        assert seeded(model, PROMPT, {"max_time": 0.0}).shape == (1, 8)
    same(pair, max_time=600.0)


def test_stop_strings(pair: Pair) -> None:
    letters = {chr(33 + n): n for n in range(94)} | {f"<{n}>": n for n in range(94, 128)}
    inner = Tokenizer(models.BPE(letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    spelling = PreTrainedTokenizerFast(tokenizer_object=inner)
    favoured = {"sequence_bias": {(n,): 50.0 for n in range(40, 90)}}  # tokens that spell letters
    free = same(pair, **favoured)
    stop = spelling.decode(free[0, 9:11])
    stopped = same(pair, stop_strings=[stop], tokenizer=spelling, **favoured)
    assert stopped.shape[1] <= 11
    same_padded(pair, stop_strings=[stop], tokenizer=spelling, **favoured)


# Results and caches


@pytest.mark.parametrize("sampled", [False, True])
def test_dict_results(pair: Pair, sampled: bool) -> None:
    """Scores are logits after the processors, so that the two differ when sampling."""
    options = {"do_sample": sampled, "top_k": 5, "attention_mask": MASK, "eos_token_id": EOS, **DICT}
    expected, found = (seeded(model, PADDED, options) for model in pair)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert isinstance(cache_of(found), EngineCache)
    transition = [
        model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
        for model, result in zip(pair, (expected, found), strict=True)
    ]
    torch.testing.assert_close(*transition, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dicts", [False, True])
@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_states_within_are_refused(pair: Pair, name: str, dicts: bool) -> None:
    with pytest.raises(tw.InputError, match=f"does not take {name}; use the original"):
        seeded(pair[1], PROMPT, {name: True, "return_dict_in_generate": dicts})


def test_embeddings_are_refused(pair: Pair) -> None:
    """Alone, and beside ids, where a loop that took no notice would continue the ids instead."""
    for ids in (None, PROMPT):
        with pytest.raises(tw.InputError, match="inputs_embeds; use the original"):
            seeded(pair[1], ids, {"inputs_embeds": torch.ones(1, 7, 64)})


def _conversation(model: Any, rows: Sequence[int], options: dict[str, Any]) -> Tensor:
    """Two turns, of which the second goes on from the first one's cache."""
    ids, mask = PADDED[list(rows)], MASK[list(rows)]
    first = seeded(model, ids, {"attention_mask": mask, "return_dict_in_generate": True})
    assert isinstance(first.sequences, Tensor)
    turn = torch.cat([first.sequences, PROMPT.expand(len(rows), -1)], dim=1)
    longer = torch.cat([mask, mask.new_ones(len(rows), turn.shape[1] - mask.shape[1])], dim=1)
    cache = cache_of(first)
    held = with_cache(model.forward, cache)
    result = seeded(model, turn, {"attention_mask": longer, **held, **options})
    fresh = seeded(model, turn, {"attention_mask": longer, **options})
    assert torch.equal(result, fresh)
    assert cache.get_seq_length() == result.shape[1] - 1
    return result


@pytest.mark.parametrize("rows", [(1,), (0, 1)])
def test_a_second_turn_continues_from_the_cache(pair: Pair, rows: Sequence[int]) -> None:
    for options in ({}, {"do_sample": True}, {"repetition_penalty": 1.3}):
        expected, found = (_conversation(model, rows, options) for model in pair)
        assert torch.equal(found, expected)


# Streamers


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 128)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def test_streamers(pair: Pair, words: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own loop and transformers': the prompt or not, then each token once, then the end."""
    for options in ({}, {"do_sample": True}, {"repetition_penalty": 1.3}):
        for skip in (False, True):
            printed = []
            for model in pair:
                seeded(model, PROMPT, {"streamer": TextStreamer(words, skip_prompt=skip), **options})
                printed.append(capsys.readouterr().out)
            assert printed[0] == printed[1]
            assert printed[1].startswith("w")
            assert printed[1].endswith("\n")


def test_a_streamer_read_from_another_thread(pair: Pair, words: PreTrainedTokenizerFast) -> None:
    expected = words.decode(seeded(pair[0], PROMPT, {})[0, 7:])
    lazy = TextIteratorStreamer(words, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=seeded, args=(pair[1], PROMPT, {"streamer": lazy}))
    thread.start()
    assert "".join(lazy).strip() == expected.strip()
    thread.join()
