"""Fixtures shared by all tests: tiny models with random weights, and the real ones, loaded once a session."""

from __future__ import annotations

import gc
import os

# Before PyTorch is loaded: its threads, as many in each process as there are cores, are to sleep while they have
# nothing to do. By default they spin for milliseconds after each operation, on cores that the other processes need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import architectures
from benchmarks.architectures import Row, error_of
from tests.compiler.models import tiny
from tilewright import backends
from tilewright.codegen.cpp import build
from tilewright.pretrained import load_minilm, load_smollm2
from tilewright.report import Report

# The same examples on every machine; `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", max_examples=50, deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "explore", parent=settings.get_profile("repeatable"), max_examples=1000, derandomize=False
)
settings.load_profile("repeatable")

# What tells whether the libraries' code is as it was loaded comes before tests that replace some of it. Then what takes
# longest, longest first: a long file that starts last leaves all other processes idle.
FIRST = (
    "test_model_identity.py",
    "test_graph_cache.py",
    "test_triton_interpreter.py",
    "test_architectures.py",
    "test_triton_models.py",
    "test_real_models.py",
    "test_cpp_kernels.py",
    "test_triton_offline.py",
    "test_api.py",
    "test_quantized.py",
    "test_serve.py",
    "test_cpp_experts.py",
    "test_chart.py",
    "test_gpu_check.py",
    "test_tune_kernels.py",
    "test_compile.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put some files first; the rest stay in order (``--no-loadscope-reorder`` lets them)."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """What is loaded by now stays loaded: no collection of garbage is to go through all of PyTorch's objects again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """The last collection, at the end of the process, is of everything: libraries complain of what it leaves."""
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-architectures",
        action="store_true",
        help="store what the tests of architectures see as the rows of MODELS.md (one process only)",
    )


@pytest.fixture
def record_architecture(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(name, kind, report, found, expected)``: the table's row of an architecture is what a test sees.

    found, expected: tensors of our result and of Hugging Face's. With ``--record-architectures`` the row is stored.
    """

    def record(
        name: str, kind: str, report: Report, found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> None:
        row = Row.of(kind, report, error := error_of(found, expected))
        rows = architectures.read()
        if request.config.getoption("--record-architectures"):
            architectures.write(rows | {name: row})
            return
        assert name in rows, f"{name} has no row yet: run pytest --record-architectures on this test"
        stored = rows[name]
        assert error <= 10.0**stored.magnitude
        assert replace(row, magnitude=stored.magnitude) == stored

    return record


@pytest.fixture(scope="module", autouse=True)
def _quick_builds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels of models are optimised less: building takes a third of such tests' time, and what they are to find are
    errors in what is printed and how it is called, not GCC's. Real models, and all of tests/codegen, build as users do.
    """
    if "codegen" in request.path.parts or request.path.name == "test_real_models.py":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS))
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("libraries")
    path.chmod(0o700)
    return path


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _libraries: Path) -> Path:
    """A cache folder that remembers nothing: no graphs, choices or weights.

    Only compiled libraries, which are found by all that they are made of, are those of other tests with such a folder.
    """
    (tmp_path / "cpp").symlink_to(_libraries)
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways to print each kernel, as all of them take most of a minute to build."""
    every = backends._cpp_candidates
    monkeypatch.setattr(backends, "_cpp_candidates", lambda op, program: every(op, program)[:2])


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Two layers, RMSNorm, RoPE, grouped heads, tied embeddings."""
    return tiny("llama")


@pytest.fixture
def tiny_opt() -> PreTrainedModel:
    """Two layers, LayerNorm, learned positions, biases, ReLU."""
    return tiny("opt")


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    """Two layers, LayerNorm, learned positions, one QKV matrix, tanh-GELU."""
    return tiny("gpt2")


@pytest.fixture
def tiny_bert() -> PreTrainedModel:
    """Two layers of an encoder: no state, no causality, GELU."""
    return tiny("bert")


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct with its real weights in float32, and its tokenizer."""
    return load_smollm2(torch.float32)


@pytest.fixture(scope="session")
def smollm2_bf16() -> tuple[PreTrainedModel, Any]:
    """The same weights rounded to bfloat16."""
    return load_smollm2(torch.bfloat16)


@pytest.fixture(scope="session")
def minilm() -> tuple[PreTrainedModel, Any]:
    """all-MiniLM-L6-v2 with its real weights in float32, and its tokenizer."""
    return load_minilm(torch.float32)
