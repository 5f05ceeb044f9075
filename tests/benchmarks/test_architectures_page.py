"""The page of architectures is the one that its stored rows make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import architectures
from benchmarks.architectures import Row


def test_the_page_is_that_of_the_stored_rows() -> None:
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page(architectures.read())


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = {"some": Row("decoder", {"decode": 6, "prefill": 5}, {"aten.index.Tensor": 2}, -5)}
    architectures.write(rows, tmp_path / "rows.json")
    assert architectures.read(tmp_path / "rows.json") == rows
    line = "| some | decoder | decode 6, prefill 5 | `aten.index.Tensor` (2) | < 1e-5 |"
    assert line in architectures.page(rows).splitlines()


def test_an_error_is_relative_to_the_largest_number() -> None:
    expected = torch.tensor([1.0, -4.0])
    assert architectures.error_of([expected + 1, expected], [expected, expected]) == pytest.approx(0.25)
