"""After compilation nothing is compiled any more, whatever batch, prompt and padding; and prompts come in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tilewright as tw
from benchmarks.memory import our_peak
from tests.compiler.models import tiny
from tilewright import backends, capture, compilation
from tilewright.backends import Built, build
from tilewright.options import check_options
from tilewright.reference_executor import ReferenceExecutor
from tilewright.runtime import kernels
from tilewright.runtime.kernel_modules import Launchers
from tilewright.runtime.kernels import Kernels

LENGTH = 1600  # three chunks of a prompt


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    model = tiny("llama")
    model.config.max_position_embeddings = LENGTH
    return model, tw.compile(model, batch_sizes=(1, 4), max_length=LENGTH, backend="cpp", autotune="off")


def padded(batch: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Random ids i64[batch, tokens], each row but the first with a random number of pad tokens on its left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : int(torch.randint(0, tokens, (1,), generator=generator))] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is compiled")

    monkeypatch.setattr(backends, "build_libraries", refuse)
    monkeypatch.setattr(capture, "capture", refuse)
    monkeypatch.setattr(torch.export, "export", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)


@pytest.mark.usefixtures("nothing_compiles")
def test_any_batch_prompt_and_padding_run(pair: tuple[Any, Any]) -> None:
    model, fast = pair
    for batch in (1, 2, 3, 4):
        for tokens in (1, 2, 15, 16, 17, 101, 513, 1031):
            given = padded(batch, tokens, seed=tokens)
            options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
            found = fast.generate(**given, **options)
            if tokens < 200:
                assert torch.equal(found, model.generate(**given, **options)), (batch, tokens)
    assert fast.report().compiled_while_running == 0


def test_memory_does_not_grow_with_the_prompt(pair: tuple[Any, Any]) -> None:
    """Beyond a chunk, only ids and positions, of 8 bytes a token each, and the mask grow."""
    _, fast = pair
    short, long = (our_peak(fast, padded(1, tokens, 0)["input_ids"]) for tokens in (512, 1536))
    assert 0 < short <= long < short + 64 * 1024
    arena = fast.report().phase("prefill").arena_bytes
    assert short > arena > 2 * 64 * 1024


def test_what_is_compiled_while_running_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel at its first launch, and again for an address that is not aligned; never at a launch like one before."""
    launchers = Launchers({"k": lambda pointers, dims, compiled=None: compiled or object()}, ())
    monkeypatch.setattr(kernels, "load_launchers", lambda _: launchers)
    launched, memory = Kernels(Path("unused")), torch.zeros(16, dtype=torch.uint8)
    for start, expected in ((0, 1), (0, 1), (8, 2), (8, 2), (0, 2)):
        launched.launch("k", [memory[start:]], {"B": 1})
        assert launched.compiled == expected


class _Lazy(ReferenceExecutor):
    """Compiles one kernel at its first run."""

    compiled = 0

    def run(self, *given: Any) -> None:
        self.compiled = 1
        super().run(*given)


@pytest.mark.parametrize("measures", [True, False])
def test_kernels_that_compile_late_are_launched_during_compilation(
    measures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where launches mean nothing (the interpreter) they are left to the calls, which the report then shows."""

    def lazily(programs: Any, weights: Any, *_: object) -> Built:
        executors = build(programs, weights, options).executors
        return Built(tuple(_Lazy(e.program, e.weights) for e in executors), {})  # type: ignore[attr-defined]

    model = tiny("llama")
    options = check_options(model, (1, 2), 32, None, None, "off", "reference", None)
    monkeypatch.setattr(compilation, "build", lazily)
    monkeypatch.setattr(compilation, "measures", lambda _: measures)
    fast = tw.compile(model, batch_sizes=(1, 2), max_length=32, backend="reference", autotune="off")
    assert fast.report().compiled_while_running == 0
    fast.generate(torch.ones(2, 5, dtype=torch.int64), max_new_tokens=3, pad_token_id=0)
    assert fast.report().compiled_while_running == (0 if measures else 2)
    assert f"kernels compiled while running: {0 if measures else 2}" in str(fast.report())
