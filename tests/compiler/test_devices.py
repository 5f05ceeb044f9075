"""GPUs that are too old, too small or no longer where the model is: typed errors, tested without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tilewright as tw
from tests.compiler.models import tiny
from tilewright import capacity, compilation
from tilewright.errors import DeviceError
from tilewright.options import check_options
from tilewright.runtime import cuda_graph, device
from tilewright.runtime.device import DeviceFacts, device_facts, is_out_of_memory, require_device
from tilewright.tune_kernels import KernelTuner

CUDA = torch.device("cuda", 0)
PROMPT = torch.tensor([[5, 17, 99, 23]])
GIVEN = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _folder(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "is_busy", lambda: False)


def test_nothing_is_known_of_a_cpu() -> None:
    assert device_facts(torch.device("cpu")) is None


@pytest.mark.parametrize(("arch", "fits"), [(75, False), (70, False), (80, True), (90, True), (120, True)])
def test_an_old_gpu_is_refused_by_name(arch: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_facts", lambda _: DeviceFacts("Tesla T4", arch, 1 << 34))
    if fits:
        require_device(CUDA)
        return
    with pytest.raises(DeviceError, match=rf"Tesla T4 of compute capability {arch / 10}.*needs 8.0"):
        require_device(CUDA)
    with pytest.raises(DeviceError, match=r"backend='cpp'"):
        check_options(torch.nn.Linear(2, 2), (1,), None, None, None, "off", "triton", None)


def facts(free: int) -> Any:
    return lambda _: DeviceFacts("Small GPU", 90, free)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_what_does_not_fit_is_named_in_bytes(weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny Llama: 2 layers, keys and values of 2 heads of 16 floats. One byte less than all is too little."""
    needs = []
    genuine = capacity.Needs.of

    def seen(*arguments: Any) -> Any:
        needs.append(genuine(*arguments))
        return needs[-1]

    monkeypatch.setattr(capacity.Needs, "of", seen)
    options: dict[str, Any] = {"batch_sizes": (1, 4), "max_length": 64, "weights": weights, "autotune": "off"}
    model = tiny("llama")
    config = model.config
    monkeypatch.setattr(capacity, "device_facts", facts(1 << 40))
    fast = tw.compile(model, backend="reference", **options)
    head = config.hidden_size // config.num_attention_heads
    assert needs[0].kv == 4 * 64 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4
    arenas = {p.name: p.arena_bytes for p in fast.report().phases}
    assert needs[0].arena == arenas["decode_b4"] + arenas["prefill"]
    assert (needs[0].prepared > 0) == (weights is not None)
    monkeypatch.setattr(capacity, "device_facts", facts(needs[0].total))
    tw.compile(model, backend="reference", **options)
    monkeypatch.setattr(capacity, "device_facts", facts(needs[0].total - 1))
    with pytest.raises(DeviceError) as caught:
        tw.compile(model, backend="reference", **options)
    words = [
        "Small GPU",
        "KV state of 4 sequences of max_length=64",
        "smaller batch_sizes",
        "a smaller max_length",
    ]
    for word in words:
        assert word in str(caught.value)
    assert (
        ("int8 copies" in str(caught.value)) == ("no weights=" in str(caught.value)) == (weights is not None)
    )


def test_too_little_memory_shows_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were bound")

    monkeypatch.setattr(capacity, "device_facts", facts(1))
    monkeypatch.setattr(compilation, "bind_weights", never)
    with pytest.raises(DeviceError, match="Small GPU"):
        tw.compile(tiny("llama"), max_length=32, backend="cpp")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_that_was_cast_is_refused_until_it_is_cast_back(family: str) -> None:
    model = tiny(family)
    fast = tw.compile(model, max_length=32, backend="reference", autotune="off")
    expected = fast(PROMPT)[0]
    model.to(torch.float64)
    with pytest.raises(
        DeviceError, match=r"compiled for torch.float32 on cpu.*now torch.float64 on cpu.*again"
    ):
        fast(PROMPT)
    if family == "llama":
        with pytest.raises(DeviceError, match=r"model.to\('cpu', torch.float32\)"):
            fast.generate(PROMPT, **GIVEN)
    model.to(torch.float32)
    assert torch.equal(fast(PROMPT)[0], expected)


def test_kernels_keep_the_memory_that_they_were_given() -> None:
    """A request has their addresses in launches that are bound or recorded, while the model comes and goes."""
    model = tiny("llama")
    fast = tw.compile(model, max_length=32, backend="reference", autotune="off")
    weights = fast._tilewright.engine.prefill_executor.weights
    places = {name: weight.data_ptr() for name, weight in weights.items()}
    kept = {name: weight.clone() for name, weight in weights.items()}
    model.to(torch.float64)
    model.to(torch.float32)
    assert {name: weight.data_ptr() for name, weight in weights.items()} == places
    assert all(torch.equal(weights[name], weight) for name, weight in kept.items())


def test_a_model_that_was_moved_is_refused() -> None:
    """To ``meta``, the one other device that every machine has; it keeps no values, so there is no way back."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    fast = tw.compile(module, example_inputs=(torch.rand(2, 4),), backend="reference")
    fast(torch.rand(2, 4))
    module.to("meta")
    with pytest.raises(DeviceError, match=r"now torch\.float32 on meta"):
        fast(torch.rand(2, 4))


def test_a_model_in_two_places_is_refused() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, device="meta"))
    with pytest.raises(DeviceError, match=r"spread over cpu, meta; move it to one device"):
        tw.compile(module, example_inputs=(torch.rand(2, 4),))


@pytest.mark.parametrize("backend", [None, "cpp", "reference"])
def test_a_model_without_values_is_refused(backend: str | None) -> None:
    """It cannot be moved to the CPU either, so that is no remedy to name."""
    with pytest.raises(DeviceError, match=r"on meta.*load its weights"):
        tw.compile(tiny("llama").to("meta"), backend=backend)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def test_out_of_memory_is_told_apart() -> None:
    assert is_out_of_memory(FULL)
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("an illegal memory access"))


@pytest.mark.usefixtures("few_candidates")
def test_tuning_that_runs_out_of_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(KernelTuner, "choose", full)
    monkeypatch.setattr(compilation, "measure", full)
    model = tiny("llama")
    with pytest.warns(UserWarning, match="tiles of decode_b1 not measured, out of memory"):
        fast = tw.compile(model, max_length=32, backend="cpp", autotune="full")
    assert torch.equal(fast.generate(PROMPT, **GIVEN), model.generate(PROMPT, **GIVEN))
    notes = "\n".join(fast.report().notes)
    assert (
        "prefill programs not measured, out of memory: CUDA out of memory. Tried to allocate 2 GiB" in notes
    )


@pytest.mark.usefixtures("few_candidates")
def test_other_errors_of_tuning_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(compilation, "measure", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        tw.compile(tiny("llama"), max_length=32, backend="cpp", autotune="full")


@pytest.mark.parametrize("where", ["CUDAGraph", "Stream"])
def test_a_recording_that_runs_out_of_memory_is_done_without(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "current")
    monkeypatch.setattr(torch.cuda, where, full)
    with pytest.warns(UserWarning, match=r"kernel by kernel: no CUDA graph, CUDA out of memory"):
        assert cuda_graph.record(lambda: None, CUDA) is None
