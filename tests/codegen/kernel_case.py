"""What a case of the list in ``triton_cases`` is: one fused kernel, its sizes and inputs; and what cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tilewright.ir.builder import Builder
from tilewright.ir.index import IndexMap, as_expr, parse_expr
from tilewright.ir.module import Function, Loc, Module, Op, make_attrs
from tilewright.ir.recurrent import state_of
from tilewright.ir.types import DType, TensorType, Value, concrete, tensor_type

CAPACITY = 48
RANGES = {"B": (1, 4), "S": (1, 40), "T": (1, CAPACITY), "L": (1, 40)}


@dataclass(frozen=True)
class Case:
    """A module, sizes of its dims, and tensors for its parameters that random numbers would not do for."""

    module: Module
    dims: dict[str, int]
    given: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kernel(self) -> Op:
        (op,) = self.module.main.ops
        return op

    def meanings(self) -> tuple[Module, ...]:
        """The modules of which a kernel may compute any: with activations rounded where it may, in runs as long as may
        be or in halves of those, and without."""
        groups = [group for op in self.kernel.body if isinstance(group := op.attr("activation_group"), int)]
        if not groups:
            return (self.module,)
        return tuple(self._rounded(group) for group in (max(groups), max(groups) // 2, None))

    def _rounded(self, group: int | None) -> Module:
        body = tuple(
            op.with_attrs(activation_group=group) if op.attr("activation_group") else op
            for op in self.kernel.body
        )
        main = self.module.main.with_ops((replace(self.kernel, body=body),))
        return self.module.with_functions((main,))

    def inputs(self) -> dict[str, Tensor]:
        """A tensor for every parameter; deterministic."""
        generator = torch.Generator().manual_seed(7)
        found = {}
        for p in self.module.main.params:
            shape = concrete(p.shape, self.dims)
            drawn = torch.randn(shape, generator=generator)
            found[p.name] = self.given.get(p.name, drawn.to(p.dtype.torch))
        return found

    @property
    def slots(self) -> dict[Value, str]:
        """The results that live in the request's state, and their slots."""
        states = ((state_of(op), str(op.attr("slot"))) for op in self.kernel.body)
        return {value: slot for value, slot in states if value is not None}

    def past(self) -> dict[str, Tensor]:
        """What the state holds before the kernel runs, by slot."""
        generator = torch.Generator().manual_seed(8)
        past = self.dims.get("T", 0) - self.dims.get("S", 1)
        found = {}
        for op in self.kernel.body:
            if op.opcode == "append":
                b, g, _, d = op.result.shape
                shape = concrete((b, g, as_expr(past), d), self.dims)
                found[op.attr("slot")] = torch.randn(shape, generator=generator).to(op.result.dtype.torch)
            elif (held := state_of(op)) is not None:
                drawn = torch.randn(concrete(held.shape, self.dims), generator=generator)
                found[op.attr("slot")] = drawn.to(held.dtype.torch)
        return found

    def exact_past(self) -> dict[str, Tensor]:
        """The same in float64; f8 is a form of storage and stays what it is."""
        return {n: t if t.dtype is DType.f8.torch else t.double() for n, t in self.past().items()}


def comparable(tensor: Tensor) -> Tensor:
    """The tensor, or its codes where it is f8: those are exact, and torch compares no f8."""
    return tensor.view(torch.uint8) if tensor.dtype is DType.f8.torch else tensor


def known(truth: Tensor, *others: Tensor) -> tuple[Tensor, ...] | None:
    """What is a number in all of them: ``truth``, and the others where it is one; None if they are NaN elsewhere."""
    lost = truth.isnan()
    if any(not torch.equal(other.isnan(), lost) for other in others):
        return None
    return tuple(tensor[~lost] for tensor in (truth, *others))


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str, *parameters: tuple[object, ...]) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Register a case, once per tuple of parameters."""

    def register(build: Callable[..., Case]) -> Callable[..., Case]:
        for values in parameters or ((),):
            full = "-".join([name, *(str(v.value if isinstance(v, DType) else v) for v in values)])
            CASES[full] = lambda values=values: build(*values)
        return build

    return register


def finish(b: Builder, *results: Value, **dims: int) -> Case:
    """One kernel of all that the builder holds."""
    used = {v for op in b.ops for v in op.operands}
    operands = tuple(p for p in b.params if p in used)
    kernel = Op("kernel", operands, make_attrs({"name": "fused"}), results, Loc(), tuple(b.ops))
    function = Function("main", tuple(b.params), (kernel,), results)
    return Case(Module((function,)).with_symbols(**RANGES), dims)


def view(b: Builder, x: Value, shape: list[int | str], *index: str) -> Value:
    """A view whose result element (i0, i1, ..) is ``x[index]``."""
    index_map = IndexMap(len(shape), tuple(map(parse_expr, index)))
    return b.add("view", x, type=TensorType(x.dtype, tuple(map(as_expr, shape))), map=index_map)


def cast(b: Builder, x: Value, dtype: DType) -> Value:
    return x if x.dtype is dtype else b.add("cast", x, type=x.type.with_dtype(dtype))


def rms_scale(b: Builder, x: Value) -> Value:
    """1 / sqrt(mean(x^2) + eps) of the last axis, in float32."""
    x = cast(b, x, DType.f32)
    total = b.add("reduce", b.add("mul", x, x), kind="sum", axes=(x.type.rank - 1,), keepdim=True)
    mean = b.add("div", total, b.const(int(x.shape[-1]), DType.f32))
    return b.add("rsqrt", b.add("add", mean, b.const(1e-5, DType.f32)))


def centred(b: Builder, x: Value) -> tuple[Value, Value]:
    """x - mean(x) of the last axis, and 1 / sqrt(variance(x) + eps), in float32."""
    x = cast(b, x, DType.f32)
    axis, count = (x.type.rank - 1,), b.const(int(x.shape[-1]), DType.f32)
    mean = b.add("div", b.add("reduce", x, kind="sum", axes=axis, keepdim=True), count)
    distance = b.add("sub", x, mean)
    square = b.add("reduce", b.add("mul", distance, distance), kind="sum", axes=axis, keepdim=True)
    return distance, b.add("rsqrt", b.add("add", b.add("div", square, count), b.const(1e-5, DType.f32)))


def layer_norm(b: Builder, x: Value, weight: Value, bias: Value) -> Value:
    """LayerNorm in float32, rounded to x's dtype."""
    dtype = x.dtype
    distance, scale = centred(b, x)
    normal = b.add("mul", b.add("mul", distance, scale), cast(b, weight, DType.f32))
    return cast(b, b.add("add", normal, cast(b, bias, DType.f32)), dtype)


FLOATS = ((DType.f32,), (DType.bf16,), (DType.f16,))


def rows_type(dtype: DType, rows: str, width: int) -> TensorType:
    """[B, S, width] for prefill, [1, 1, width] for decode of one sequence, [4, 1, width] for a batch of four."""
    shape = {"many": ["B", "S", width], "one": [1, 1, width], "four": [4, 1, width]}[rows]
    return tensor_type(dtype, shape)


ROWS = tuple((d, r) for (d,) in FLOATS for r in ("many", "one", "four"))
