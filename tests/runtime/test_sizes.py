"""Sizes that memory is planned for: how many rows fit at once, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright.ir.program import InputError
from tilewright.ir.types import tensor_type
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import EngineSpec, Kind, TensorSpec

ROWS = TensorSpec("x", tensor_type("f32", ["B", "S"]))


class _Copying:
    """Gives what it is given, and notes how many rows that were."""

    batch, phase, compiled = 0, "forward", 0

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(
        self, inputs: Mapping[str, Tensor], dims: Mapping[str, int], state: Any, outputs: Mapping[str, Tensor]
    ) -> None:
        self.rows.append(dims["B"])
        outputs["y"].copy_(inputs["x"])


def engine(kind: Kind) -> tuple[Engine, _Copying]:
    """Of a model that takes 8 rows of up to 8 columns, or 64 of one."""
    spec = EngineSpec(
        kind, torch.device("cpu"), (ROWS,), (TensorSpec("y", ROWS.type),), (("B", 1, 64), ("S", 1, 8)),
        largest=({"B": 8, "S": 8}, {"B": 64, "S": 1}), max_length=8,
    )  # fmt: skip
    executor = _Copying()
    return Engine([], executor, spec), executor


def test_as_many_rows_as_fit() -> None:
    spec = engine("encoder")[0].spec
    sizes: tuple[dict[str, int], ...] = ({"S": 1}, {"S": 2}, {"S": 8}, {"S": 9}, {})
    assert [spec.rows_at_once(dims) for dims in sizes] == [64, 8, 8, 0, 64]


@pytest.mark.parametrize(
    ("shape", "goes"), [((64, 1), [64]), ((65, 1), [64, 1]), ((20, 2), [8, 8, 4]), ((8, 8), [8])]
)
def test_independent_rows_run_in_goes(shape: tuple[int, int], goes: list[int]) -> None:
    made, executor = engine("encoder")
    x = torch.randn(shape)
    assert torch.equal(made.forward({"x": x})["y"], x)
    assert executor.rows == goes


def test_rows_that_depend_on_each_other_are_refused() -> None:
    """Beyond what the arena has room for, a kernel would write over what is not its own."""
    made, executor = engine("module")
    made.forward({"x": torch.randn(64, 1)})
    with pytest.raises(InputError, match=r"a batch of 20 .* more than the 8 .* batch_sizes=\(20,\)"):
        made.forward({"x": torch.randn(20, 2)})
    with pytest.raises(InputError, match="dim S is 9, but this model takes 1 to 8"):
        made.forward({"x": torch.randn(4, 9)})
    assert executor.rows == [64]
