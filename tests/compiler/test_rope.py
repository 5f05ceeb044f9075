"""Rotary embeddings of every kind that transformers has, on both sides of the length at which some change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import tilewright as tw

from .models import random

_SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + n for n in range(8)],
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "dynamic": {"factor": 4.0},
    "longrope": _LONG,
}  # fmt: skip


def llama(positions: int = 64, **rope: Any) -> Any:
    rope = {"rope_theta": 10000.0} | rope
    config = hf.LlamaConfig(**_SHAPE, max_position_embeddings=positions, rope_parameters=rope)
    return random(config, hf.LlamaForCausalLM)


def prompt(tokens: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(7))


def same_logits(fast: Any, model: Any, **given: Any) -> None:
    with torch.no_grad():
        expected = model(**given).logits
    torch.testing.assert_close(
        fast(**given).logits, expected, rtol=2e-4, atol=2e-5 * expected.abs().max().item()
    )


def same_tokens(fast: Any, model: Any, ids: torch.Tensor, **given: Any) -> None:
    asked = {"do_sample": False, "pad_token_id": 0} | given
    assert torch.equal(fast.generate(ids, **asked), model.generate(ids, **asked))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_hugging_face_has(kind: str) -> None:
    """A short prompt, a long one, and tokens that cross from one to the other; the model stays as it was."""
    model = llama(**({"rope_type": kind} | KINDS[kind]))
    before = {name: b.clone() for name, b in model.named_buffers()}
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="reference")
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for tokens in (9, 24):
        same_logits(fast, model, input_ids=prompt(tokens))
        same_tokens(fast, model, prompt(tokens), max_new_tokens=12)


def test_two_tables_in_generated_kernels() -> None:
    model = llama(**_LONG)
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="cpp", autotune="off")
    for tokens in (9, 24):
        same_logits(fast, model, input_ids=prompt(tokens))
    same_tokens(fast, model, prompt(12), max_new_tokens=12)


def test_pieces_of_a_prompt_agree_on_their_table() -> None:
    """A prompt of 600 runs in two pieces: the first has positions up to 511, but belongs to a long sequence."""
    model = llama(1024, **(_LONG | {"original_max_position_embeddings": 550}))
    fast = tw.compile(model, max_length=700, backend="reference")
    for tokens in (540, 600):
        same_logits(fast, model, input_ids=prompt(tokens, rows=1))


def test_left_padding_does_not_make_a_sequence_longer() -> None:
    """The table goes by positions, not by how long the padded batch is."""
    model = llama(**_LONG)
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="reference")
    ids, mask = prompt(20), torch.ones(2, 20, dtype=torch.long)
    mask[:, :6] = 0
    same_tokens(fast, model, ids, attention_mask=mask, max_new_tokens=8)


def test_a_model_that_begins_anew_with_the_second_table_does_so() -> None:
    """Phi-3 computes the whole sequence again once it outgrows the first table, as its keys were turned by that."""
    config = hf.Phi3Config(
        **_SHAPE,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **_LONG},
    )
    model = random(config, hf.Phi3ForCausalLM)
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="reference")
    for tokens in (9, 16, 17, 24):
        same_logits(fast, model, input_ids=prompt(tokens))
        same_tokens(fast, model, prompt(tokens), max_new_tokens=14)
