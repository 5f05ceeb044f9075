"""Generated Triton kernels on a real GPU; the same cases that run on the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.codegen.triton_architectures import architecture_errors
from tests.codegen.triton_cases import CASES
from tests.codegen.triton_experts import experts_errors
from tests.codegen.triton_greedy import CASES as GREEDY
from tests.codegen.triton_greedy import greedy_errors
from tests.codegen.triton_models import model_errors
from tests.codegen.triton_run import errors
from tests.experts_cases import CASES as EXPERTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, tmp_path: Path) -> None:
    assert errors(name, False, "cuda", tmp_path / "case.py") == []


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiny_model_matches_reference(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert model_errors(family, dtype, tmp_path, "cuda", False) == []


@pytest.mark.parametrize(("weights", "rows"), [("int8", 3), ("int8", 20), ("int4", 3)])
def test_integer_weights_match_reference(weights: str, rows: int, tmp_path: Path) -> None:
    """Steps of one sequence load their weights before the last kernel has ended; kernels by themselves do not. Those of
    twenty multiply bytes on tensor cores."""
    assert model_errors("llama", torch.float32, tmp_path, "cuda", False, weights=weights, rows=rows) == []


@pytest.mark.parametrize("block", [0, 16, 128])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_match_reference(name: str, block: int, tmp_path: Path) -> None:
    """Spelled out, and in blocks of tokens that chose the same expert."""
    assert experts_errors(name, tmp_path, block, device="cuda") == []


@pytest.mark.parametrize("name", GREEDY)
def test_tokens_are_chosen_as_by_operations(name: str, tmp_path: Path) -> None:
    assert greedy_errors(name, tmp_path, "cuda", False) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_5"])
def test_models_match_hugging_face(family: str) -> None:
    """With experts, and with linear attention."""
    assert architecture_errors(family, "cuda") == []
