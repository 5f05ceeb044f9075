"""``compile(module, example_inputs)``: what a module returns and writes into is what callers see of the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw

from .sameness import assert_same, assert_same_call


class _Function(nn.Module):
    """A function as a module, without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _views_of_inputs(x: Tensor) -> Any:
    return x[1:], x, x.t(), x.unsqueeze(0)[..., 2], x.split(2, 1)


def _aliased_outputs(x: Tensor) -> Any:
    y = x + 1
    y[0] = 5
    return y, y[1:], y.t(), y, (x * 2).split(2, 1)


def _written_inputs(x: Tensor) -> Any:
    x[1:].mul_(2)
    y = x + 1
    x.t().add_(y.t())
    return x[0], y, x


def _nested(x: Tensor) -> Any:
    return {"a": [x * 2, None], "b": (3, "text", 1.5, True), "c": {"d": (x.sum(1),), "n": x.shape[0] * 2}}


def _integers(x: Tensor) -> Any:
    i = x.mul(3).long()
    return i // 2, (i > 1) & (i < 5), ~(i > 0), i.sum(1), i.to(torch.uint8) + 1


def _no_elements(x: Tensor) -> Any:
    none = x[:, :0]
    return none, none.sum(1), none @ none.t(), torch.cat([x, none], 1) + 1


FUNCTIONS = [_views_of_inputs, _aliased_outputs, _written_inputs, _nested, _integers, _no_elements]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: Callable[..., Any]) -> None:
    """Also with one row, without any, and at strides that the example did not have, which results need not keep."""
    model = _Function(function).eval()
    fast = tw.compile(model, (torch.randn(3, 4),), backend="reference")
    assert "sizes are fixed" not in str(fast.report())
    for x in (torch.randn(3, 4), torch.randn(7, 4), torch.randn(1, 4), torch.randn(4, 5).t()):
        assert_same_call(model, fast, x, strides=x.is_contiguous())
    if function not in (_aliased_outputs, _written_inputs):  # eager has no first row to write or show either
        assert_same_call(model, fast, torch.randn(0, 4))


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.linear(x) - self.mean, self.calls


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_buffers_are_updated(backend: str) -> None:
    model = _Counts().eval()
    twin = copy.deepcopy(model)
    fast = tw.compile(twin, (torch.randn(3, 4),), backend=backend, autotune="off")
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
    assert_same(model.state_dict(), twin.state_dict())
    assert twin.calls == 2


class _Adds(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y


def test_arguments_that_share_memory() -> None:
    model = _Adds().eval()
    fast = tw.compile(model, (torch.randn(3, 4), torch.randn(3, 4)), backend="reference")
    whole = torch.randn(6, 4)
    for args in ((whole, whole), (whole[1:], whole[:-1]), (whole, whole.clone())):
        assert_same_call(model, fast, *args)
