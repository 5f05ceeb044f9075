"""The table of rules from ATen ops to IR ops, and what a rule has at hand.

A rule is a function ``rule(ctx, *args, **kwargs)`` with the ATen op's arguments: tensors arrive as IR values, symbolic
sizes as sympy expressions over our dim symbols, everything else as it is. It emits IR ops through ``ctx`` and returns
the result (or a tuple of them), or None where it does not cover the arguments: PyTorch then runs that op.

The rules live in ``aten_rules_*.py``, grouped by what they lower to; importing those modules fills ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from sympy import Expr

from tilewright.ir.builder import Builder
from tilewright.ir.index import IndexMap, index_symbols, reshape_map
from tilewright.ir.types import DType, TensorType, Value

Number: TypeAlias = int | float | bool | Expr
Operand: TypeAlias = Value | Number
Result: TypeAlias = Value | tuple[Value, ...] | None
Rule = Callable[..., Result]

RULES: dict[str, Rule] = {}
TAKES_EMPTY: set[str] = set()
"""Targets whose rules take tensors without elements, which kernels do not have; PyTorch runs other ops on such."""

_HALF = (DType.f16, DType.bf16)


def rule(*targets: str, takes_empty: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ATen overloads such as ``add.Tensor`` (without the ``aten.``)."""

    def register(function: Rule) -> Rule:
        TAKES_EMPTY.update(targets if takes_empty else ())
        for target in targets:
            assert target not in RULES, f"two rules for aten.{target}"
            RULES[target] = function
        return function

    return register


@dataclass
class Context:
    """One ATen node while it is lowered: ``outs`` are the types that the export declares for its results, ``highs``
    the largest sizes of those dim symbols that have a bound."""

    builder: Builder
    outs: tuple[TensorType, ...]
    slot: str = ""
    highs: Mapping[str, int] = field(default_factory=dict)

    @property
    def out(self) -> TensorType:
        return self.outs[0]

    def most(self, size: Expr) -> int | None:
        """The largest value of a size that is a number or a dim symbol, or None where that is not known."""
        return int(size) if size.is_Integer else self.highs.get(str(size))

    # --- values ---------------------------------------------------------------------------------------------------

    def const(self, value: Number, dtype: DType) -> Value:
        """A rank-0 value of a Python number or a size expression."""
        if isinstance(value, Expr) and not value.is_number:
            dim = self.builder.add("dim", type=TensorType(DType.i64, ()), expr=value)
            return self.cast(dim, dtype)
        number: Any = value
        if isinstance(value, Expr):
            number = int(value) if value.is_Integer else float(value)
        return self.builder.const(number, dtype)

    def cast(self, x: Value, dtype: DType) -> Value:
        """``x`` in another element type; itself when it has that type."""
        if x.dtype is dtype:
            return x
        return self.builder.add("cast", x, type=x.type.with_dtype(dtype))

    def value(self, operand: Operand, dtype: DType) -> Value:
        """A tensor or number as a value of the given element type."""
        return self.cast(operand, dtype) if isinstance(operand, Value) else self.const(operand, dtype)

    def apply(self, opcode: str, *operands: Operand, dtype: DType | None = None) -> Value:
        """A pointwise op; numbers become constants of the first tensor's type (or ``dtype``)."""
        if dtype is None:
            dtype = next(o.dtype for o in operands if isinstance(o, Value))
        return self.builder.add(
            opcode, *(o if isinstance(o, Value) else self.const(o, dtype) for o in operands)
        )

    def reduce(self, kind: str, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
        return self.builder.add("reduce", x, kind=kind, axes=tuple(sorted(axes)), keepdim=keepdim)

    # --- element types --------------------------------------------------------------------------------------------

    def promoted(self, *operands: Operand) -> DType:
        """The type that eager PyTorch computes in: Python numbers and rank-0 tensors promote by category only."""
        samples: list[Any] = []
        for operand in operands:
            if isinstance(operand, Value):
                shape = (1,) * operand.type.rank
                samples.append(torch.empty(shape, dtype=operand.dtype.torch, device="meta"))
            else:
                samples.append(1 if isinstance(operand, Expr) else operand)
        result = samples[0].dtype if len(samples) == 1 else torch.result_type(samples[0], samples[1])
        return DType.from_torch(result)

    def wide(self, dtype: DType) -> DType:
        """The type in which PyTorch's kernels compute inside: float32 for the half types."""
        return DType.f32 if dtype in _HALF else dtype

    # --- views ----------------------------------------------------------------------------------------------------

    def view(self, x: Value, shape: Sequence[Expr | int], exprs: Sequence[Expr | int]) -> Value:
        """``result[i] = x[exprs(i)]``; ``x`` itself where that changes nothing."""
        type_ = TensorType(x.dtype, tuple(map(sympy.sympify, shape)))
        index_map = IndexMap(type_.rank, tuple(map(sympy.sympify, exprs)))
        if type_ == x.type and index_map.is_identity():
            return x
        return self.builder.add("view", x, type=type_, map=index_map)

    def reshape(self, x: Value, shape: Sequence[Expr]) -> Value:
        """The elements of ``x`` in row-major order under another shape of the same size."""
        return self.view(x, shape, reshape_map(x.shape, tuple(shape)).exprs)

    def permute(self, x: Value, order: Sequence[int]) -> Value:
        """Dim n of the result is dim ``order[n]`` of ``x``."""
        order = [axis(n, x.type.rank) for n in order]
        symbols = index_symbols(x.type.rank)
        return self.view(
            x, [x.shape[n] for n in order], [symbols[order.index(n)] for n in range(x.type.rank)]
        )

    def transposed(self, x: Value) -> Value:
        """The last two dims swapped."""
        order = list(range(x.type.rank))
        order[-2:] = [order[-1], order[-2]]
        return self.permute(x, order)

    def expand(self, x: Value, shape: Sequence[Expr]) -> Value:
        """Numpy broadcast of ``x`` to ``shape``."""
        symbols = index_symbols(len(shape))
        lead = len(shape) - x.type.rank
        exprs = [0 if d == 1 and shape[lead + n] != 1 else symbols[lead + n] for n, d in enumerate(x.shape)]
        return self.view(x, shape, exprs)

    def unsqueeze(self, x: Value, at: int) -> Value:
        """A new dim of size 1 at position ``at`` of the result."""
        symbols = [s for n, s in enumerate(index_symbols(x.type.rank + 1)) if n != at]
        return self.view(x, [*x.shape[:at], 1, *x.shape[at:]], symbols)

    def drop(self, x: Value, axes: Sequence[int]) -> Value:
        """Without the given dims, each of size 1."""
        kept = [n for n in range(x.type.rank) if n not in axes]
        symbols = index_symbols(len(kept))
        exprs = [0 if n in axes else symbols[kept.index(n)] for n in range(x.type.rank)]
        return self.view(x, [x.shape[n] for n in kept], exprs)

    def narrow(self, x: Value, at: int, start: Number, size: Expr, step: Number = 1) -> Value:
        """``size`` elements of dim ``at``, from ``start`` on, every ``step``-th."""
        symbols = list(index_symbols(x.type.rank))
        shape = [size if n == at else d for n, d in enumerate(x.shape)]
        symbols[at] = symbols[at] * step + start
        return self.view(x, shape, symbols)

    def positions(self, size: Expr, shape: Sequence[Expr], at: int) -> Value:
        """i64 of ``shape`` whose value is the index along dim ``at`` (of extent ``size``)."""
        counts = self.builder.add("iota", type=TensorType(DType.i64, (size,)))
        return self.view(counts, shape, [index_symbols(len(shape))[at]])


def axis(n: int, rank: int) -> int:
    """A dim number counted from the front."""
    return n + rank if n < 0 else n


def axes_of(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dim numbers of an ATen ``dim`` argument; None and [] mean all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return list(range(rank))
    return sorted({axis(n, rank) for n in ([dims] if isinstance(dims, int) else dims)})
