"""What looks like attention that a model spells out, and means something else."""

from __future__ import annotations

import pytest
import torch

from tilewright.ir.module import Module
from tilewright.ir.parser import parse_module
from tilewright.ir.reference import evaluate
from tilewright.ir.verify import verify_module
from tilewright.passes.base import PassOptions
from tilewright.passes.match_attention import match_attention

MASKED = """
  %low = const {value = -1000.0} : f32[]
  %masked = where %hidden, %low, %scores : f32[8, 8, 8]
"""
TOP = """
  %top = reduce %rated {axes = (2), keepdim = true, kind = "max"} : f32[8, 8, 1]
"""
SUM = """
  %total = reduce %e {axes = (2), keepdim = true, kind = "sum"} : f32[8, 8, 1]
"""
SAFE = """
  %sum = reduce %e {axes = (2), keepdim = true, kind = "sum"} : f32[8, 8, 1]
  %none = const {value = NONE} : f32[]
  %other = const {value = OTHER} : f32[]
  %empty = eq %sum, %none : bool[8, 8, 1]
  %total = where %empty, %other, %sum : f32[8, 8, 1]
"""


def spelled(rated: str, top: str = TOP, total: str = SUM) -> Module:
    """A function whose softmax is taken of ``rated``, made of %scores, and whose rows have that top and total."""
    return parse_module(f"""
    func @main(%q: f32[8, 8, 4], %k: f32[8, 8, 4], %v: f32[8, 4, 8], %hidden: bool[8, 8, 8], %row: f32[8, 8, 1],
               %all: f32[8, 8, 8]) -> (%y) {{
      %scores = matmul %q, %k : f32[8, 8, 8]
      {rated}
      {top}
      %less = sub %rated, %top : f32[8, 8, 8]
      %e = exp %less : f32[8, 8, 8]
      {total}
      %w = div %e, %total : f32[8, 8, 8]
      %y = matmul %w, %v : f32[8, 8, 4]
    }}""")


def plain(reduction: str) -> str:
    return reduction.replace("keepdim = true", "keepdim = false").replace("f32[8, 8, 1]", "f32[8, 8]")


def scaled(factor: float) -> str:
    return f"{MASKED} %by = const {{value = {factor}}} : f32[] %rated = mul %masked, %by : f32[8, 8, 8]"


SCORES = "%one = const {value = 2.0} : f32[] %rated = mul %scores, %one : f32[8, 8, 8]"
ATTENTION = {
    "plain": spelled(SCORES),
    "a row without weight": spelled(SCORES, total=SAFE.replace("NONE", "0.0").replace("OTHER", "1.0")),
    "hidden enough": spelled(scaled(1.5)),
}
OTHERS = {
    "rows meet columns": spelled(SCORES, plain(TOP), plain(SUM)),
    "a total meets columns": spelled(SCORES, total=plain(SUM)),
    "hidden too little": spelled(scaled(1e-3)),
    "shown by a sign": spelled(scaled(-1.0)),
    "hidden by an unknown factor": spelled(f"{MASKED} %rated = mul %masked, %row : f32[8, 8, 8]"),
    "another total": spelled(SCORES, total=SAFE.replace("NONE", "8.0").replace("OTHER", "1.0")),
    "another total of nothing": spelled(SCORES, total=SAFE.replace("NONE", "0.0").replace("OTHER", "2.0")),
    "a top of each": spelled(
        SCORES, f"{TOP.replace('%top', '%most')} %top = maximum %most, %all : f32[8, 8, 8]"
    ),
    "a top of all": spelled(
        SCORES, '%top = reduce %rated {axes = (0, 1, 2), keepdim = false, kind = "max"} : f32[]'
    ),
}


@pytest.mark.parametrize("name", [*ATTENTION, *OTHERS])
def test_only_what_means_attention_becomes_one(name: str) -> None:
    """Keys would be hidden that a model sees, or rows divided by what belongs to others."""
    module = (ATTENTION | OTHERS)[name]
    verify_module(module)
    found = match_attention(module, PassOptions())
    assert any(op.opcode == "attention" for op in found.main.ops) == (name in ATTENTION)
    inputs = {p.name: torch.randn([int(d) for d in p.shape]) for p in module.main.params}
    inputs["hidden"] = inputs["hidden"] > 0
    (expected,), (result,) = (evaluate(m, inputs, {}, {}) for m in (module, found))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
