"""Building ops: names that nobody has, types that follow or are asked for, and where what is added stands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tilewright.ir.builder import Builder
from tilewright.ir.errors import VerifyError
from tilewright.ir.module import Loc, Names
from tilewright.ir.parser import parse_module
from tilewright.ir.types import DType, tensor_type
from tilewright.passes.base import Rewriter

TEXT = """\
entry @main

func @main(%x: f32[4]) -> (%b) {
  %a = neg %x : f32[4]
  %b = exp %a : f32[4]
}
"""


def test_names_are_new_and_types_follow() -> None:
    b = Builder(Names({"x"}), Loc(module="layer"))
    x = b.param_value("x", tensor_type("bf16", ["B", 4]))
    y = b.add("neg", x, hint="x")
    assert len({"x", x.name, y.name}) == 3
    assert y.type == x.type
    assert b.add("const", type=tensor_type("i64", []), value=2).dtype is DType.i64
    assert [op.loc.module for op in b.ops] == ["layer", "layer"]
    assert b.add("exp", y, loc=Loc(module="head")).type == x.type
    assert b.ops[-1].loc.module == "head"


def test_a_type_that_does_not_follow_is_asked_for() -> None:
    b = Builder()
    x = b.param_value("x", tensor_type("f32", [4]))
    with pytest.raises(VerifyError, match="cast: takes one result, not 0"):
        b.add("cast", x)
    with pytest.raises(VerifyError, match="call_torch: the result type cannot be inferred"):
        b.add("call_torch", x, target="aten.relu.default", template="$0")
    with pytest.raises(VerifyError, match="unknown op 'nonsense'"):
        b.add("nonsense", x)
    assert b.ops == []


def test_constants_are_of_their_dtype() -> None:
    b = Builder()
    for value, dtype, wanted in ((1, DType.f32, 1.0), (2.0, DType.i64, 2), (1, DType.bool, True)):
        b.const(value, dtype)
        found = b.ops[-1].attr("value")
        assert (found, type(found)) == (wanted, type(wanted))


def test_what_a_pass_adds_stands_where_the_op_does_that_it_replaces() -> None:
    function = parse_module(TEXT).main
    places = (Loc(module="first"), Loc(module="second"))
    located = [replace(op, loc=loc) for op, loc in zip(function.ops, places, strict=True)]
    rewriter = Rewriter(function.with_ops(located))
    for op in rewriter:
        rewriter.replace(op.result, rewriter.add("abs", op.operands[0]))
    made = rewriter.finish()
    assert [(op.opcode, op.loc.module) for op in made.ops] == [("abs", "first"), ("abs", "second")]
    assert made.ops[1].operands == made.ops[0].results  # operands are replaced, too
    assert made.returns == made.ops[1].results
