"""Weights that are used in two ways, or prepared in two ways by two phases."""

from __future__ import annotations

import torch
from torch import nn

import tilewright as tw
from tilewright.ir.parser import parse_module
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes


class _Tied(nn.Module):
    """Encodes with a matrix and decodes with its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight) @ self.weight.T


def test_a_matrix_and_its_transpose() -> None:
    """Re-pointing the parameter at the transposed buffer would leave the other use with a strided weight."""
    model = _Tied().eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(tw.compile(model, (x,))(x), model(x))


TEXT = """
entry @main
symbol B [1, 4]
symbol S [1, 4]

func @main(%x: f32[B, S, 8]) -> (%y) {
  %w = param {name = "w"} : f32[8]
  %v = param {name = "v"} : f32[8]
  %i = iota : i64[S]
  %f = cast %i : f32[S]
  %c = view %f {map = (i0, i1) -> (i0)} : f32[S, 1]
  %a = mul %w, %v : f32[8]
  %b = mul %c, %v : f32[S, 8]
  %s = add %a, %b : f32[S, 8]
  %e = exp %s : f32[S, 8]
  %y = add %x, %e : f32[B, S, 8]
}
"""


def test_phases_give_different_expressions_different_names() -> None:
    """With S = 1 more is known of weights alone; the larger expression must not pass for the smaller one."""
    module = parse_module(TEXT)
    named: dict[str, set[str]] = {}
    for fixed in ((), (("S", 1),)):
        for function in run_passes(module, PassOptions(fixed=fixed)).functions:
            if function.name.endswith(".weights"):
                for value in function.returns:
                    made = function.definitions()[value]
                    named.setdefault(value.name, set()).add(f"{made.opcode} {made.result.type}")
    assert all(len(kinds) == 1 for kinds in named.values()), named
