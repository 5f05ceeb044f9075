"""Graphs on disk: what is read is what was stored, or nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tilewright as tw
from tilewright import graph_cache
from tilewright.capture import Captured, capture
from tilewright.ir.module import Module
from tilewright.lower import lower

from .models import random, tiny
from .test_architectures import DECODERS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    return tmp_path / "graphs"


Known = tuple[PreTrainedModel, Captured, Module]


@pytest.fixture(scope="module", params=["llama", "bloom", "bert"])
def known(request: pytest.FixtureRequest) -> Known:
    """bloom's code spells out a tensor; bert is an encoder."""
    model = tiny(request.param)
    captured = capture(model)
    return model, captured, lower(captured)


@pytest.fixture(scope="module")
def llama() -> Known:
    model = tiny("llama")
    captured = capture(model)
    return model, captured, lower(captured)


def test_what_is_loaded_is_what_was_stored(known: Known) -> None:
    model, captured, lowered = known
    assert graph_cache.store("key", model, captured, lowered)
    loaded = graph_cache.load("key", model)
    assert loaded is not None
    facts, again = loaded
    assert again == lowered
    assert {n: v for n, v in vars(facts).items() if n != "tensors"} == {
        n: v for n, v in vars(captured).items() if n in vars(facts) and n != "tensors"
    }
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert facts.tensors.keys() == captured.tensors.keys()
    for name, tensor in captured.tensors.items():
        assert (facts.tensors[name] is tensor) == (id(tensor) in own)
        torch.testing.assert_close(facts.tensors[name], tensor, rtol=0, atol=0)


def test_another_key_finds_nothing(llama: Known) -> None:
    assert graph_cache.store("key", *llama)
    assert graph_cache.load("another", llama[0]) is None


def test_damage_is_found(llama: Known, folder: Path) -> None:
    assert graph_cache.store("key", *llama)
    path = folder / "key.json"
    text = path.read_text()
    for damaged in (text[:-20], text.replace("rsqrt", "sqrt", 1), "", "x", text.replace("\n", "", 1)):
        assert damaged != text
        path.write_text(damaged)
        assert graph_cache.load("key", llama[0]) is None
    path.write_text(text)
    assert graph_cache.load("key", llama[0]) is not None


def _rewritten(path: Path, changes: dict[str, Any]) -> None:
    """A record with other contents under a right digest, as another version of this code would write it."""
    record = json.loads(path.read_text().partition("\n")[2]) | changes
    text = json.dumps({k: v for k, v in record.items() if v is not ...})
    path.write_text(f"{graph_cache._digest(text)}\n{text}")


@pytest.mark.parametrize(
    "changes",
    [
        {"ir": "func @main("},
        {"ir": "entry @main\n\nfunc @main(%x: f32[B]) -> (%y) {\n  %y = exp %x : f32[C]\n}\n"},
        {"ir": ...},
        {"tensors": ["no.such.weight"]},
        {"literals": {"x": {"dtype": "torch.nothing", "values": 1}}},
        {"output_class": "tilewright.graph_cache:CapturedFacts"},
        {"output_class": "os:system"},
        {"output_class": "transformers.models.llama.modeling_llama:LlamaModel"},
        {"output_class": "transformers.nowhere:Output"},
        {"output_spec": "[1, {}]"},
        {"output_spec": "nothing"},
        {"notes": None},
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_is_as_good_as_none(
    changes: dict[str, Any], llama: Known, folder: Path
) -> None:
    assert graph_cache.store("key", *llama)
    _rewritten(folder / "key.json", {})
    assert graph_cache.load("key", llama[0]) is not None
    _rewritten(folder / "key.json", changes)
    assert graph_cache.load("key", llama[0]) is None


def test_a_file_that_others_may_write_is_not_read(llama: Known, folder: Path) -> None:
    assert graph_cache.store("key", *llama)
    (folder / "key.json").chmod(0o666)
    assert graph_cache.load("key", llama[0]) is None


def test_the_schema_counts(llama: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    assert graph_cache.store("key", *llama)
    monkeypatch.setattr(graph_cache, "_SCHEMA", graph_cache._SCHEMA + 1)
    assert graph_cache.load("key", llama[0]) is None


def test_long_tensors_of_the_code_are_not_kept(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    model, captured, lowered = known
    monkeypatch.setattr(graph_cache, "_LONGEST", 0)
    own = graph_cache.own_tensors(model)
    assert graph_cache.store("key", model, captured, lowered) == (set(captured.tensors) <= set(own))


@pytest.mark.parametrize("literal", [torch.tensor([1j]), torch.zeros(0, 3)], ids=["complex", "empty"])
def test_tensors_that_a_record_cannot_say_are_not_kept(literal: torch.Tensor, llama: Known) -> None:
    model, captured, lowered = llama
    tensors = {**captured.tensors, "literal": literal}
    assert not graph_cache.store("key", model, replace(captured, tensors=tensors), lowered)


def test_a_second_compilation_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same results, in a model with other weights too."""
    first = tw.compile(tiny("llama"), max_length=64, backend="reference")
    assert dict(first.report().cache)["capture"] is False
    monkeypatch.setattr("tilewright.compilation.capture", None)
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    second = tw.compile(model, max_length=64, backend="reference")
    assert dict(second.report().cache)["capture"] is True
    assert second.ir("lowered") == first.ir("lowered")
    ids = torch.arange(8)[None]
    found, expected = second(input_ids=ids), model(input_ids=ids)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    again = second.generate(ids, max_new_tokens=8, do_sample=False)
    assert again.tolist() == model.generate(ids, max_new_tokens=8, do_sample=False).tolist()


def test_a_changed_model_is_traced_anew() -> None:
    tw.compile(tiny("llama"), max_length=64, backend="reference")
    model = tiny("llama")
    model.get_submodule("model.layers.0.input_layernorm").variance_epsilon = 10.0  # type: ignore[assignment]
    changed = tw.compile(model, max_length=64, backend="reference")
    assert dict(changed.report().cache)["capture"] is False
    ids = torch.arange(8)[None]
    torch.testing.assert_close(
        changed(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


def test_frequencies_that_the_graph_spells_out_are_the_models_own() -> None:
    """Those that depend on how long a sequence is are no tensors of the model any more."""
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = DECODERS["llama"].to_dict() | {"rope_parameters": scaling}
    for scale in (1.0, 0.5):
        model = random(LlamaConfig(**config), LlamaForCausalLM)
        for table in model.get_submodule("model.rotary_emb").buffers():
            table.mul_(scale)
        fast = tw.compile(model, max_length=64, backend="reference", autotune="off")
        ids = torch.arange(24)[None]
        torch.testing.assert_close(
            fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_a_model_in_training_mode_is_refused_though_its_graph_is_known() -> None:
    tw.compile(tiny("llama"), max_length=64, backend="reference")
    with pytest.raises(tw.CaptureError, match="training mode"):
        tw.compile(tiny("llama").train(), max_length=64, backend="reference")


def test_a_model_without_identity_is_traced_each_time() -> None:
    for _ in range(2):
        model = tiny("llama")
        model.get_submodule("model.norm").register_forward_hook(lambda *_: None)
        fast = tw.compile(model, max_length=64, backend="reference")
        assert "capture" not in dict(fast.report().cache)


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Known
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "file"))
    assert not graph_cache.store("key", *llama)
    fast = tw.compile(tiny("llama"), max_length=64, backend="reference")
    assert dict(fast.report().cache)["capture"] is False


def test_names_of_files_are_hashes() -> None:
    key = hashlib.sha256(b"x").hexdigest()
    assert graph_cache._path(key).name == f"{key[:40]}.json"
