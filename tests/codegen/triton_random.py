"""Random modules through generated Triton code; for a process in which Triton interprets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import conftest  # noqa: F401 - the settings of all property tests
from tests.strategies import Case, examples, modules
from tilewright.codegen.triton.program import emit_program
from tilewright.ir.program import Program
from tilewright.runtime.kernel_modules import write_module
from tilewright.runtime.triton_executor import TritonExecutor

from .random_programs import check_random


def run_random(count: int, folder: Path) -> None:
    """Check ``count`` random modules. Raises what hypothesis raises, with the smallest module that fails as a note."""

    def make(program: Program, weights: Mapping[str, Tensor]) -> TritonExecutor:
        path = write_module(folder, emit_program(program, interpret=True).text)
        return TritonExecutor(program, weights, path, torch.device("cpu"))

    @examples(count)
    @given(modules(), st.integers(0, 3))
    def check(case: Case, splits: int) -> None:
        check_random(case, make, splits)

    check()
