"""Reads IR text (see ``printer``) back into a module. Any malformed text raises ParseError with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import sympy

from .errors import ParseError
from .index import IndexMap, index_symbols, parse_expr
from .module import Attr, Function, Loc, Module, Op
from .ops import OPS
from .types import DType, TensorType, Value

T = TypeVar("T")

_TOKEN = re.compile(
    r"(?P<space>[ \t\r]+|#.*)|(?P<newline>\n)|(?P<string>\"(?:[^\"\\\n]|\\.)*\")|(?P<value>%[\w.]+)"
    r"|(?P<symbol>@[\w.]+)|(?P<arrow>->)"
    r"|(?P<number>-?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\d+(?!\w)|inf\b|nan\b))|(?P<name>[A-Za-z_][\w.]*)"
    r"|(?P<floordiv>//)|(?P<punct>[-{}()\[\],:=@+*%])"
)


@dataclass
class _Reader:
    """A token stream over the text."""

    text: str
    tokens: list[tuple[str, str, int, int]] = field(default_factory=list)
    at: int = 0

    def __post_init__(self) -> None:
        position, line = 0, 1
        while position < len(self.text):
            match = _TOKEN.match(self.text, position)
            if match is None:
                raise ParseError(f"line {line}: unexpected character {self.text[position]!r}")
            kind = str(match.lastgroup)
            if kind == "newline":
                line += 1
            elif kind != "space":
                self.tokens.append((kind, match.group(), line, position))
            position = match.end()
        self.tokens.append(("end", "", line, position))

    @property
    def peek(self) -> str:
        return self.tokens[self.at][1]

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    def fail(self, message: str) -> ParseError:
        """The error that something else was expected here."""
        return self.error(f"{message}, found {self.peek!r}", self.at)

    def error(self, message: str, at: int) -> ParseError:
        """The error at an earlier token."""
        return ParseError(f"line {self.tokens[at][2]}: {message}")

    def take(self, kind: str | None = None) -> str:
        if kind is not None and self.kind != kind:
            raise self.fail(f"expected a {kind}")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def expect(self, text: str) -> None:
        if self.peek != text or self.kind == "string":
            raise self.fail(f"expected {text!r}")
        self.at += 1

    def accept(self, text: str) -> bool:
        if self.peek == text and self.kind != "string":
            self.at += 1
            return True
        return False

    def expression(self, stops: str) -> str:
        """Raw text up to an unnested character of ``stops``."""
        start, depth = self.tokens[self.at][3], 0
        while self.kind != "end" and not (depth == 0 and self.peek in stops):
            depth += (self.peek == "(") - (self.peek == ")")
            self.at += 1
        return self.text[start : self.tokens[self.at][3]]

    def parse_expr(self, stops: str) -> sympy.Expr:
        """An index expression up to an unnested character of ``stops``."""
        at = self.at
        try:
            return parse_expr(self.expression(stops))
        except ParseError as error:
            raise self.error(str(error), at) from error

    def string(self) -> str:
        at = self.at
        try:
            return str(json.loads(self.take("string")))
        except json.JSONDecodeError as error:
            raise self.error(f"malformed string: {error.msg}", at) from error

    def integer(self) -> int:
        if "." in self.peek or not self.peek.lstrip("-").isdecimal():
            raise self.fail("expected an integer")
        return int(self.take("number"))


def parse_module(text: str) -> Module:
    """Read a module. Raises ParseError; does not verify (see ``verify.verify_module``)."""
    reader = _Reader(text)
    symbols: list[tuple[str, int, int]] = []
    functions: list[Function] = []
    entry, entry_at = "main", 0
    while reader.kind != "end":
        if reader.accept("entry"):
            entry, entry_at = reader.take("symbol")[1:], reader.at - 1
        elif reader.accept("symbol"):
            name = reader.take("name")
            reader.expect("[")
            low = reader.integer()
            reader.expect(",")
            high = reader.integer()
            reader.expect("]")
            symbols.append((name, low, high))
        elif reader.accept("func"):
            functions.append(_function(reader))
        else:
            raise reader.fail("expected 'entry', 'symbol' or 'func'")
    if entry not in {f.name for f in functions}:
        raise reader.error(f"there is no function @{entry}", entry_at)
    return Module(tuple(functions), tuple(symbols), entry)


def _function(reader: _Reader) -> Function:
    name = reader.take("symbol")[1:]
    scope: dict[str, Value] = {}
    params = []
    reader.expect("(")
    while not reader.accept(")"):
        at, value_name = reader.at, reader.take("value")[1:]
        reader.expect(":")
        params.append(_define(reader, scope, value_name, _type(reader), at))
        if reader.peek != ")":
            reader.expect(",")
    reader.expect("->")
    reader.expect("(")
    returns_at, returns = reader.at, _names(reader)
    reader.expect(")")
    reader.expect("{")
    ops = []
    while not reader.accept("}"):
        ops.append(_op(reader, scope))
    returned = tuple(_use(reader, scope, v, returns_at) for v in returns)
    return Function(name, tuple(params), tuple(ops), returned)


def _define(reader: _Reader, scope: dict[str, Value], name: str, type: TensorType, at: int) -> Value:
    if name in scope:
        raise reader.error(f"%{name} is defined twice", at)
    scope[name] = Value(name, type)
    return scope[name]


def _use(reader: _Reader, scope: dict[str, Value], name: str, at: int) -> Value:
    if name not in scope:
        raise reader.error(f"%{name} is not defined before its use", at)
    return scope[name]


def _names(reader: _Reader) -> list[str]:
    names = []
    while reader.kind == "value":
        names.append(reader.take()[1:])
        if not reader.accept(","):
            break
    return names


def _type(reader: _Reader) -> TensorType:
    try:
        dtype = DType(reader.peek)
    except ValueError:
        raise reader.fail("expected an element type") from None
    reader.take()
    reader.expect("[")
    shape = []
    while not reader.accept("]"):
        shape.append(reader.parse_expr(",]"))
        if reader.peek != "]":
            reader.expect(",")
    return TensorType(dtype, tuple(shape))


def _op(reader: _Reader, scope: dict[str, Value], inside: bool = False) -> Op:
    """One op; ``inside`` a body, where there can be no other body."""
    at, names = reader.at, _names(reader)
    if names:
        reader.expect("=")
    opcode = reader.take("name")
    if opcode not in OPS:
        raise reader.fail(f"unknown op {opcode!r} before this")
    operands_at = reader.at
    operands = [_use(reader, scope, name, operands_at) for name in _names(reader)]
    attrs = _attrs(reader, opcode) if reader.peek == "{" else ()
    body: list[Op] = []
    if not inside and reader.accept("["):
        inner = dict(scope)
        while not reader.accept("]"):
            body.append(_op(reader, inner, inside=True))
    types = _result_types(reader, len(names))
    results = tuple(_define(reader, scope, n, t, at) for n, t in zip(names, types, strict=True))
    loc = Loc()
    if reader.accept("@"):
        loc = Loc(reader.string(), reader.string())
    return Op(opcode, tuple(operands), attrs, results, loc, tuple(body))


def _result_types(reader: _Reader, count: int) -> list[TensorType]:
    if count == 0:
        return []
    reader.expect(":")
    if count == 1:
        return [_type(reader)]
    reader.expect("(")
    types = [_type(reader)]
    while reader.accept(","):
        types.append(_type(reader))
    reader.expect(")")
    if len(types) != count:
        raise reader.fail(f"{count} results but {len(types)} types")
    return types


def _attrs(reader: _Reader, opcode: str) -> tuple[tuple[str, Attr], ...]:
    reader.expect("{")
    found: dict[str, Attr] = {}
    while not reader.accept("}"):
        name = reader.take("name")
        kind = OPS[opcode].attrs.get(name)
        if kind is None:
            raise reader.fail(f"{opcode} has no attribute {name!r}; it has {', '.join(OPS[opcode].attrs)}")
        reader.expect("=")
        found[name] = _attr(reader, kind)
        if reader.peek != "}":
            reader.expect(",")
    return tuple(sorted(found.items()))


def _number(reader: _Reader) -> int | float:
    text = reader.take("number")
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _attr(reader: _Reader, kind: str) -> Attr:
    match kind:
        case "str":
            return reader.string()
        case "bool":
            return _bool(reader)
        case "number" if reader.peek in ("true", "false"):
            return _bool(reader)
        case "int":
            return reader.integer()
        case "float":
            return float(_number(reader))
        case "number":
            return _number(reader)
        case "ints":
            return _tuple(reader, reader.integer)
        case "names":
            return _tuple(reader, lambda: reader.take("name"))
        case "expr":
            return reader.parse_expr(",}")
    return _index_map(reader)


def _tuple(reader: _Reader, item: Callable[[], T]) -> tuple[T, ...]:
    reader.expect("(")
    found = []
    while not reader.accept(")"):
        found.append(item())
        if reader.peek != ")":
            reader.expect(",")
    return tuple(found)


def _bool(reader: _Reader) -> bool:
    if reader.peek not in ("true", "false"):
        raise reader.fail("expected true or false")
    return reader.take() == "true"


def _index_map(reader: _Reader) -> IndexMap:
    reader.expect("(")
    names = reader.expression(")").split(",")
    reader.expect(")")
    reader.expect("->")
    reader.expect("(")
    exprs = []
    while not reader.accept(")"):
        exprs.append(reader.parse_expr(",)"))
        if reader.peek != ")":
            reader.expect(",")
    rank = len([n for n in names if n.strip()])
    if [n.strip() for n in names if n.strip()] != [s.name for s in index_symbols(rank)]:
        raise reader.fail("an index map's parameters are i0, i1, ... in order")
    return IndexMap(rank, tuple(exprs))
