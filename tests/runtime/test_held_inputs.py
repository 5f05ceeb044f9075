"""Inputs that a request keeps: where they lie, and that rows which move take them along."""

from __future__ import annotations

import torch

from tilewright.ir.types import tensor_type
from tilewright.runtime.executor import TensorSpec
from tilewright.runtime.held_inputs import HeldInputs

SPECS = (
    TensorSpec("keys", tensor_type("f32", ["B", 2, "E", 3])),
    TensorSpec("seen", tensor_type("bool", ["B", "E"])),
)
CPU = torch.device("cpu")


def held(rows: int = 4, states: int = 5) -> HeldInputs:
    inputs = HeldInputs()
    assert inputs.make_room(SPECS, {"B": 2, "E": states}, rows, CPU)
    inputs.tensors["keys"].copy_(torch.arange(rows * 2 * states * 3.0).view(rows, 2, states, 3))
    inputs.ready = True
    return inputs


def test_rows_beyond_the_batch_are_neutral() -> None:
    """They are computed with: a row without any key that counts would divide by zero, and garbage may be NaN."""
    inputs = HeldInputs()
    inputs.make_room(SPECS, {"B": 2, "E": 5}, 4, CPU)
    assert inputs.tensors["keys"].shape == (4, 2, 5, 3)
    assert not inputs.tensors["keys"].any()
    assert inputs.tensors["seen"].all()
    assert inputs.dims == {"E": 5}


def test_a_request_of_the_same_sizes_finds_its_tensors_where_they_were() -> None:
    """Steps that were recorded hold addresses."""
    inputs = held()
    address = inputs.tensors["keys"].data_ptr()
    assert not inputs.make_room(SPECS, {"B": 3, "E": 5}, 4, CPU)
    assert inputs.tensors["keys"].data_ptr() == address
    assert not inputs.ready  # what they hold is the last request's
    assert inputs.make_room(SPECS, {"B": 3, "E": 6}, 4, CPU)
    assert inputs.tensors["keys"].shape == (4, 2, 6, 3)


def test_rows_change_places_in_place() -> None:
    inputs = held()
    before, address = inputs.tensors["keys"].clone(), inputs.tensors["keys"].data_ptr()
    inputs.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(inputs.tensors["keys"], before[[1, 1, 0, 3]])
    assert inputs.tensors["keys"].data_ptr() == address


def test_rows_are_repeated_and_dropped() -> None:
    inputs = held(rows=2)
    before = inputs.tensors["keys"].clone()
    inputs.select(torch.tensor([1, 0, 1]), 4)
    assert torch.equal(inputs.tensors["keys"][:3], before[[1, 0, 1]])
    assert not inputs.tensors["keys"][3].any()
    assert inputs.tensors["seen"].shape == (4, 5)


def test_a_copy_is_independent() -> None:
    inputs = held()
    twin = inputs.copy()
    inputs.tensors["keys"].zero_()
    assert twin.tensors["keys"].any()
    assert (twin.dims, twin.ready) == (inputs.dims, True)
