"""Generated Triton kernels on a real GPU; the same cases that run on the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.codegen.triton_cases import CASES
from tests.codegen.triton_models import model_errors
from tests.codegen.triton_run import errors

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
