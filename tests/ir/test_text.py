"""IR text: it prints, reads back to an equal module, and any damage to it is a ParseError that names the line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, examples, modules
from tilewright.ir.errors import ParseError
from tilewright.ir.loops import scalarize
from tilewright.ir.module import Function, Loc, Module, Op, make_attrs
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.types import DType, Value, tensor_type
from tilewright.ir.verify import verify_module
from tilewright.passes.pipeline import run_passes

TEXTS = sorted((Path(__file__).parent / "texts").glob("*.txt"))
PIECES = re.compile(r"\s+|[A-Za-z_][\w.]*|\d+|\"[^\"\n]*\"|.", re.DOTALL)


@examples(60)
@given(modules())
def test_random_modules_read_back(case: Case) -> None:
    """Dumps, `tilewright opt` and text tests would work on another module than the one that was printed."""
    assert parse_module(print_module(case.module)) == case.module


@examples(25)
@given(modules())
def test_fused_modules_read_back(case: Case) -> None:
    """Kernel bodies, prepared weights or cache appends lost in the text."""
    module = run_passes(case.module)
    assert parse_module(print_module(module)) == module


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_hand_written_text_prints_as_it_was_written(path: Path) -> None:
    """The format would drift: old dumps and tests could no longer be read."""
    text = "".join(line for line in path.read_text().splitlines(True) if not line.startswith("#"))
    module = parse_module(text)
    verify_module(module)
    assert print_module(module) == text


@given(st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1), st.booleans()))
def test_constants_keep_every_bit(value: float | int | bool) -> None:
    """A constant that changes its value, sign of zero, or type in the text."""
    dtype = "bool" if isinstance(value, bool) else "i64" if isinstance(value, int) else "f64"
    op = Op("const", (), make_attrs({"value": value}), (Value("c", tensor_type(dtype)),))
    module = Module((Function("main", (), (op,), (op.result,)),))
    found = parse_module(print_module(module)).main.ops[0].attr("value")
    assert repr(found) == repr(value)


@given(st.text(), st.text())
def test_locations_keep_any_text(module_name: str, source: str) -> None:
    """A path with quotes, line ends or other scripts would make a dump unreadable."""
    op = Op("iota", (), (), (Value("i", tensor_type("i64", [4])),), Loc(module_name, source))
    module = Module((Function("main", (), (op,), (op.result,)),))
    assert parse_module(print_module(module)) == module


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A hand-written module with tokens left out, doubled, swapped or replaced."""
    pieces = PIECES.findall(draw(st.sampled_from(TEXTS)).read_text())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(pieces) - 1))
        other = draw(st.integers(0, len(pieces) - 1))
        match draw(st.sampled_from(["drop", "double", "swap", "copy", "text", "cut"])):
            case "drop":
                pieces[at] = ""
            case "double":
                pieces[at] *= 2
            case "swap":
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case "copy":
                pieces[at] = pieces[other]
            case "text":
                pieces[at] = draw(st.text(max_size=4))
            case "cut":
                pieces = [*pieces[:at], ""]
    return "".join(pieces)


def check_parses_or_fails_typed(text: str) -> None:
    message = ""
    try:
        module = parse_module(text)
    except ParseError as error:
        message = str(error)
    if message:
        assert re.match(r"line \d+: ", message)
    else:
        assert parse_module(print_module(module)) == module


@examples(400)
@given(damaged())
def test_damaged_text_is_a_parse_error(text: str) -> None:
    """A KeyError or a sympy error from deep inside instead of the line that is wrong."""
    check_parses_or_fails_typed(text)


@given(st.text(alphabet=st.sampled_from('%@{}()[]=:,->"#\n 0123456789abciSBTf._*+/\\é\x00'), max_size=80))
def test_random_text_is_a_parse_error(text: str) -> None:
    """The same for text that never was a module."""
    check_parses_or_fails_typed(text)
    check_parses_or_fails_typed(f"func @main(%x: f32[B]) -> (%x) {{\n {text} \n}}")


GOOD = """symbol B [1, 4]
func @main(%x: f32[B, 4]) -> (%y) {
  %y = neg %x : f32[B, 4]
}
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("neg %x", "negate %x", 3, "unknown op 'negate'"),
        ("neg %x", "neg %z", 3, "%z is not defined"),
        ("%y = neg", "%x = neg", 3, "%x is defined twice"),
        ("neg %x", "neg %x {axis = 1}", 3, "neg has no attribute 'axis'"),
        (": f32[B, 4]\n}", ": f33[B, 4]\n}", 3, "expected an element type"),
        (": f32[B, 4]\n}", ": f32[B, 4/2]\n}", 3, "unexpected character '/'"),
        (": f32[B, 4]\n}", ": f32[B, 4 4]\n}", 3, "malformed index expression"),
        (": f32[B, 4]\n}", ": f32[B, f(4)]\n}", 3, "unsupported syntax in index expression"),
        (": f32[B, 4]\n}", "\n}", 4, "expected ':'"),
        ("-> (%y)", "-> (%q)", 2, "%q is not defined"),
        ("symbol B [1, 4]", "symbol B [1; 4]", 1, "unexpected character ';'"),
        ("symbol B [1, 4]", "symbol B [a, 4]", 1, "expected an integer"),
        ("@main", "main", 2, "expected a symbol"),
        ("}\n", "", 4, "expected"),
        ("symbol B", "entry @other\nsymbol B", 1, "there is no function @other"),
    ],
)
def test_messages_name_the_line(old: str, new: str, line: int, message: str) -> None:
    """Someone who edits IR by hand would have to search the whole text."""
    assert parse_module(GOOD).main.name == "main"
    with pytest.raises(ParseError, match=rf"^line {line}: .*{re.escape(message)}"):
        parse_module(GOOD.replace(old, new, 1))


def test_a_kernel_that_is_read_back_has_the_same_scalars() -> None:
    """Codes would become scales, as the results of a kernel that is read are other objects than those of its body."""
    text = """
    func @main(%x: f32[2, 64]) -> (%c, %s) {
      %c, %s = kernel %x {name = "rounded"} [
        %y = neg %x : f32[2, 64]
        %c, %s = quantize %y {bits = 8, group = 32} : (i8[2, 64], f32[2, 2])
      ] : (i8[2, 64], f32[2, 2])
    }"""
    (kernel,) = parse_module(text).main.ops
    for same in (kernel, replace(kernel, results=kernel.body[-1].results)):
        scalarize.cache_clear()  # the two are equal
        stores = [store for segment in scalarize(same).segments for store in segment.stores]
        assert [(str(s.target), s.value.dtype) for s in stores] == [("%c", DType.i8), ("%s", DType.f32)]
