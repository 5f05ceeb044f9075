"""Writes in place: what later ops see of them, whether or not the whole graph had to be converted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import tilewright as tw
from tilewright.capture import capture
from tilewright.lower import lower


class _Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _later(x: Tensor) -> Tensor:
    y = x + 1
    before = y * 2
    y *= 3
    return before + y


def _unused_result(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    return y - x


def _view_before(x: Tensor) -> Tensor:
    y = x + 1
    view = y[:, 1:]
    y *= 3
    return view + 1


def _twice(x: Tensor) -> Tensor:
    y = x + 1
    z = y.mul_(3)
    y.add_(x)
    return z - y * 2


def _view_after(x: Tensor) -> Tensor:
    y = x + 1
    y *= 3
    view = y.view(-1)
    y += 5
    return view * 2


@pytest.mark.parametrize(
    ("function", "is_converted"),
    [(_later, False), (_unused_result, False), (_view_before, True), (_twice, True), (_view_after, True)],
)
def test_writes(function: Any, is_converted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ExportedProgram] = []
    own = ExportedProgram.run_decompositions

    def counted(self: ExportedProgram, *args: Any, **kwargs: Any) -> ExportedProgram:
        calls.append(self)
        return own(self, *args, **kwargs)

    model, x = _Function(function).eval(), torch.randn(4, 6)
    expected = model(x.clone())
    with monkeypatch.context() as patch:
        patch.setattr(ExportedProgram, "run_decompositions", counted)
        lower(capture(model, (x,)))
    assert bool(calls) == is_converted
    fast = tw.compile(model, example_inputs=(x,), backend="reference")
    torch.testing.assert_close(fast(x), expected)


def _without_elements(x: Tensor) -> Tensor:
    return torch.cat([torch.tensor([]), x]) + torch.tensor([]).sum()


def test_a_constant_without_elements_is_no_write() -> None:
    """What code spells out is detached in place, which PyTorch refuses for what an executor hands it."""
    model, x = _Function(_without_elements).eval(), torch.randn(4, 6)
    fast = tw.compile(model, example_inputs=(x,), backend="reference")
    torch.testing.assert_close(fast(x), model(x))
