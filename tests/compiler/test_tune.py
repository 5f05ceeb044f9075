"""Measured choices: the faster candidate wins, and what is on disk is used only when it can be trusted."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tilewright as tw
from tests.compiler.hf_engine import eager_decoder
from tests.compiler.models import tiny
from tilewright import choices, compilation, options
from tilewright.choices import choice_key, remember, remembered
from tilewright.ir.module import Function, Module
from tilewright.runtime.kv_state import RequestState
from tilewright.tune import measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    return tmp_path


class _Sleeper:
    phase, batch = "prefill", 0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        assert dims == {"B": 1, "S": 8, "T": 8, "L": 1}
        assert inputs["input_ids"].shape == (1, 8)
        time.sleep(self.seconds)


def test_measure_tells_candidates_apart() -> None:
    spec = eager_decoder(tiny("llama"))._tilewright.engine.spec
    slow, fast = measure([_Sleeper(0.02), _Sleeper(0.001)], spec)
    assert slow >= 0.02 > fast


def test_choices_are_remembered() -> None:
    assert remembered("a" * 64, 2) is None
    assert remember("a" * 64, 1, [0.2, 0.1])
    assert remembered("a" * 64, 2) == 1
    assert remembered("b" * 64, 2) is None
    assert remembered("a" * 64, 1) is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"chosen": "1"}', b'{"chosen": 7}', b"\xff\xfe"])
def test_damaged_records_are_measured_again(folder: Path, damage: bytes) -> None:
    remember("a" * 64, 1, [0.2, 0.1])
    (record,) = (folder / "choices").iterdir()
    record.write_bytes(damage)
    assert remembered("a" * 64, 2) is None


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path) -> None:
    (folder / "choices").write_text("in the way")
    assert not remember("a" * 64, 1, [0.2, 0.1])
    assert remembered("a" * 64, 2) is None


def test_keys_name_what_matters() -> None:
    modules = [
        Module((Function("main", (), (), ()),)),
        Module((Function("other", (), (), ()),), entry="other"),
    ]
    keys = {
        choice_key(modules, "cpp", CPU),
        choice_key(modules, "triton", CPU),
        choice_key(modules[::-1], "cpp", CPU),
    }
    assert len(keys) == 3
    assert choice_key(list(modules), "cpp", CPU) in keys


def test_keys_name_the_processor_and_the_printers(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [Module((Function("main", (), (), ()),))]
    before = choice_key(modules, "cpp", CPU)
    for part in ("processor", "_printers"):
        with monkeypatch.context() as patch:
            patch.setattr(choices, part, lambda: "another")
            assert choice_key(modules, "cpp", CPU) != before
    assert len(choices.processor()) > len(platform.machine())
    assert choices._printers() != hashlib.sha256().hexdigest()


def test_the_prefill_of_the_vendor_runs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of several chunks through PyTorch's products, then decode steps: as the model itself."""
    monkeypatch.setitem(options.CHUNK, "cpp", 8)
    monkeypatch.setattr(compilation, "measure", lambda executors, spec: [2.0, 1.0])
    model = tiny("llama")
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="cpp")
    assert [p.name for p in fast.report().phases] == ["decode_b2", "prefill_vendor"]
    assert "aten.linear" in fast.ir("prefill")
    ids = torch.randint(1, 128, (2, 21))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **given), model.generate(ids, **given))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(fast(ids).logits, expected, rtol=1e-4, atol=1e-4)
