"""What a lowered model asks of its callers and gives to them, read off its main function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy import Expr

from tilewright.ir.errors import CaptureError, OptionError
from tilewright.ir.index import sym
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.recurrent import RECURRENT
from tilewright.ir.types import Value, concrete


def require_decoder(name: str, lowered: Module, guesses: bool) -> None:
    """Raise CaptureError unless the main function returns one value per token, [B, S, ...], as decoding needs.

    A head that classifies sequences, or one with several outputs, has no last-token logits to go on from. Raises
    OptionError where steps are to check ``guesses`` and layers are recurrent: they cannot take a token back.
    """
    if guesses and any(op.opcode in RECURRENT for f in lowered.functions for op in f.ops):
        raise OptionError(
            f"{name} has recurrent layers, which cannot take back a guessed token; leave out speculative_tokens"
        )
    returns = lowered.main.returns
    if len(returns) == 1 and returns[0].type.rank >= 2 and returns[0].shape[1] == sym("S"):
        return
    shapes = ", ".join(f"[{', '.join(map(str, v.shape))}]" for v in returns)
    raise CaptureError(
        f"{name} returns {shapes}, but a model with KV state must return exactly one output with a row per token, "
        "[B, S, ...]: logits of a language model, or the hidden states of a base model. Compile the base model "
        "(model.base_model) and apply the head to its last_hidden_state"
    )


def index_bounds(lowered: Module) -> dict[str, tuple[int, int]]:
    """Least and largest value of each input of the main function that picks rows of a table as it is.

    An index that is computed (positions with an offset, counted masks) or cut out of an input is not among them. Where
    negative indices count from the end, those of the table are within bounds.
    """
    found: dict[str, tuple[int, int]] = {}
    for lookup in lookups(lowered):
        if lookup.size.is_Integer:
            least, most = lookup.bounds({})
            before = found.get(lookup.index, (least, most))
            found[lookup.index] = max(before[0], least), min(before[1], most)
    return found


@dataclass(frozen=True)
class Lookup:
    """An input that picks rows of a table of ``size`` rows; ``wraps`` where negative ones count from the end."""

    index: str
    size: Expr
    wraps: bool

    def bounds(self, dims: Mapping[str, int]) -> tuple[int, int]:
        """Least and largest value that the input may have, at the sizes ``dims``."""
        (size,) = concrete((self.size,), dims)
        return -size if self.wraps else 0, size - 1


def lookups(lowered: Module) -> tuple[Lookup, ...]:
    """Every use of an input of the main function that picks rows of a table as it is."""
    main = lowered.main
    uses = _Uses(main)
    found: list[Lookup] = []
    for op in main.ops:
        if op.opcode == "gather":
            size = op.operands[0].shape[op.attr("axis")]
            index = uses.source(op.operands[1])
            wrapped = uses.unwrapped(index, size)
            given = index if wrapped is None else wrapped
            if given in main.params and given.dtype.is_int:
                found.append(Lookup(given.name, size, wrapped is not None))
    return tuple(dict.fromkeys(found))


class _Uses:
    """Where the values of a function come from."""

    def __init__(self, function: Function) -> None:
        self.made_by = function.definitions()

    def source(self, value: Value) -> Value:
        """The value of which this one is another shape or dtype, element for element."""
        while (op := self.made_by.get(value)) is not None and (op.opcode == "cast" or _shows_all(op)):
            value = op.operands[0]
        return value

    def unwrapped(self, value: Value, size: Expr) -> Value | None:
        """i, where the value is ``where(i < 0, i + size, i)``, as PyTorch's indexing has it."""
        match [self.made_by.get(value), *self._parts(value)]:
            case [
                Op(opcode="where", operands=(_, _, index)),
                Op(opcode="lt", operands=(left, zero)),
                Op(opcode="add", operands=(first, second)),
            ] if (self._constant(zero), self._constant(second)) == (0, size):
                index = self.source(index)
                return index if index == self.source(left) == self.source(first) else None
        return None

    def _parts(self, value: Value) -> list[Op | None]:
        op = self.made_by.get(value)
        return [] if op is None else [self.made_by.get(v) for v in op.operands[:2]]

    def _constant(self, value: Value) -> object:
        op = self.made_by.get(value)
        while op is not None and op.opcode in ("view", "cast"):
            op = self.made_by.get(op.operands[0])
        return None if op is None or op.opcode not in _NUMBERS else op.attr(_NUMBERS[op.opcode])


_NUMBERS = {"const": "value", "dim": "expr"}


def _shows_all(op: Op) -> bool:
    """True for a view that hides no element of its operand: a reshape, permutation or expansion."""
    if op.opcode != "view":
        return False
    shape, result = op.operands[0].shape, op.result
    if sympy.expand(op.operands[0].type.numel - result.type.numel) == 0:
        return True
    whole = dict(zip(op.attr("map").symbols, result.shape, strict=True))
    return all(size == 1 or whole.get(e) == size for e, size in zip(op.attr("map").exprs, shape, strict=True))
