"""Encoder-decoders: refused whole, with a remedy that works: a compiled encoder, from which Hugging Face decodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import tilewright as tw

from .models import random

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_BART = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
}  # fmt: skip
_SOUND = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}

MODELS: dict[str, tuple[Any, hf.PretrainedConfig]] = {
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, **_IDS),
    ),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**_BART, **_IDS, max_position_embeddings=64)),
    "marian": (hf.MarianMTModel, hf.MarianConfig(**_BART, **_IDS, max_position_embeddings=64)),
    "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig(**_BART, **_SOUND, **_IDS)),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_decoder_and_its_decoder_are_refused(name: str) -> None:
    """The decoder alone would be taken for a model that attends to its own tokens only."""
    kind, config = MODELS[name]
    model = random(config, kind)
    for part in (model, model.get_decoder()):
        with pytest.raises(
            tw.CaptureError, match=r"attends to an encoder.*not supported yet.*get_encoder\(\)"
        ):
            tw.compile(part, backend="reference")


@pytest.mark.parametrize(("name", "backend"), [("t5", "reference"), ("bart", "cpp"), ("marian", "reference")])
def test_hugging_face_decodes_from_a_compiled_encoder(name: str, backend: str) -> None:
    kind, config = MODELS[name]
    model = random(config, kind)
    encoder = tw.compile(
        model.get_encoder(), batch_sizes=(2,), max_length=64, backend=backend, autotune="off"
    )
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    states = encoder(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        expected = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    kept = mask.bool()
    torch.testing.assert_close(states.last_hidden_state[kept], expected[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(encoder_outputs=states, **given), model.generate(ids, **given))


def test_an_encoder_of_sound_takes_an_example() -> None:
    kind, config = MODELS["whisper"]
    model = random(config, kind)
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    encoder = tw.compile(model.get_encoder(), {"input_features": sound}, backend="reference")
    states = encoder(input_features=sound)
    with torch.no_grad():
        expected = model.get_encoder()(input_features=sound).last_hidden_state
    torch.testing.assert_close(states.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    given = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(encoder_outputs=states, **given), model.generate(input_features=sound, **given)
    )
