"""One or more calls of every ATen op that has a lowering rule, as data: op, and arguments for a batch of n."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def f(*shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
    """Floats whose order and sign vary; the tests convert them to other float types."""
    return torch.empty(shape).uniform_(low, high, generator=torch.Generator().manual_seed(sum(shape)))


def positive(*shape: int) -> Tensor:
    return f(*shape, low=0.25, high=3.0)


def i(*shape: int, low: int = -5, high: int = 6) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape) + 1))


def b(*shape: int) -> Tensor:
    return i(*shape) > 0


def index(*shape: int, size: int) -> Tensor:
    return i(*shape, low=0, high=size)


@dataclass(frozen=True)
class Case:
    """A call ``aten.<target>(*args(n), **kwargs)``; a target of three parts names its namespace itself."""

    target: str
    args: Callable[[int], tuple[Any, ...]]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def op(self) -> Any:
        namespace, packet, overload = self.name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)

    @property
    def name(self) -> str:
        return self.target if self.target.count(".") == 2 else f"aten.{self.target}"


def case(target: str, args: Callable[[int], tuple[Any, ...]], **kwargs: Any) -> Case:
    return Case(target, args, tuple(kwargs.items()))


_ALIASES = (
    "subtract",
    "multiply",
    "divide",
    "true_divide",
    "not_equal",
    "less",
    "less_equal",
    "greater",
    "greater_equal",
)
_UNARY = (
    "neg",
    "abs",
    "exp",
    "sin",
    "cos",
    "tanh",
    "erf",
    "sigmoid",
    "floor",
    "round",
    "ceil",
    "sign",
    "square",
    "relu",
)
_UNARY += (
    "silu",
    "hardsigmoid",
    "hardswish",
    "relu6",
    "isnan",
    "clone",
    "alias",
    "detach",
    "contiguous",
    "positive",
)
_UNARY += ("lift_fresh_copy", "detach_")
_POSITIVE = ("log", "sqrt", "rsqrt", "reciprocal")

UNARY = [case(f"{name}.default", lambda n: (f(n, 4),)) for name in _UNARY]
UNARY += [case(f"{name}.default", lambda n: (positive(n, 4),)) for name in _POSITIVE]
UNARY += [
    case("exp.default", lambda n: (i(n, 4),)),
    case("floor.default", lambda n: (i(n, 4),)),
    case("ceil.default", lambda n: (i(n, 4),)),
    case("sign.default", lambda n: (b(n, 4),)),
    case("logical_not.default", lambda n: (i(n, 4),)),
    case("bitwise_not.default", lambda n: (i(n, 4),)),
    case("bitwise_not.default", lambda n: (b(n, 4),)),
    case("gelu.default", lambda n: (f(n, 4),)),
    case("gelu.default", lambda n: (f(n, 4),), approximate="tanh"),
    case("leaky_relu.default", lambda n: (f(n, 4), 0.2)),
    case("elu.default", lambda n: (f(n, 4), 1.5, 1.0, 0.5)),
    case("softplus.default", lambda n: (f(n, 4) * 10, 2.0, 8.0)),
    case("hardtanh.default", lambda n: (f(n, 4), -0.5, 1.5)),
    case("dropout.default", lambda n: (f(n, 4), 0.5, False)),
    case("feature_dropout.default", lambda n: (f(n, 4), 0.5, False)),
    case("alpha_dropout.default", lambda n: (f(n, 4), 0.5, False)),
    case("to.dtype", lambda n: (f(n, 4), torch.float64)),
    case("to.dtype", lambda n: (f(n, 4), torch.int64)),
    case("to.dtype", lambda n: (i(n, 4), torch.bool)),
    case("to.dtype_layout", lambda n: (f(n, 4),), dtype=torch.float16, device="cpu"),
    case("to.device", lambda n: (f(n, 4), "cpu", torch.float16)),
    case("to.other", lambda n: (i(n, 4), f(n, 4))),
    case("type_as.default", lambda n: (i(n, 4), f(n, 4))),
    case("_to_copy.default", lambda n: (f(n, 4),), dtype=torch.float64),
]

# Quotients that round to integers, large and small ones of all signs, infinities, zeros and NaN.
_INF, _NAN = torch.inf, torch.nan
_DIVIDENDS = torch.tensor(
    [
        1.0,
        -1.0,
        1.0,
        -1.0,
        5.0,
        -5.0,
        -1.0,
        _INF,
        -_INF,
        1.0,
        -7.0,
        0.0,
        0.0,
        -0.0,
        1e30,
        1e-20,
        -1e-20,
        _NAN,
        5.5,
    ]
)
_DIVISORS = torch.tensor(
    [0.1, 0.1, -0.1, -0.1, _INF, _INF, -_INF, 2.0, 2.0, 0.0, 0.0, 0.0, -3.0, 3.0, 0.7, -1.0, 1.0, 1.0, _NAN]
)

BINARY = [
    case("add.Tensor", lambda n: (f(n, 4), f(4)), alpha=3),
    case("add.Tensor", lambda n: (i(n, 4), f(n, 1))),
    case("add.Tensor", lambda n: (f(n, 4), i(n, 4))),
    case("add.Tensor", lambda n: (b(n, 4), b(n, 4))),
    case("add.Tensor", lambda n: (f(n, 4), torch.tensor(0.3, dtype=torch.float64))),
    case("add.Tensor", lambda n: (i(n, 4), 0.5)),
    case("add.Scalar", lambda n: (f(n, 4), 0.1)),
    case("sub.Tensor", lambda n: (f(n, 4), f(n, 4)), alpha=0.1),
    case("sub.Scalar", lambda n: (i(n, 4), 2)),
    case("rsub.Tensor", lambda n: (f(n, 4), f(n, 4))),
    case("rsub.Scalar", lambda n: (f(n, 4), 1.0)),
    case("mul.Tensor", lambda n: (f(n, 4), f(n, 1))),
    case("mul.Tensor", lambda n: (b(n, 4), b(n, 4))),
    case("mul.Tensor", lambda n: (b(n, 4), f(n, 4))),
    case("mul.Scalar", lambda n: (f(n, 4), 0.1)),
    case("div.Tensor", lambda n: (f(n, 4), positive(n, 4))),
    case("div.Tensor", lambda n: (i(n, 4), index(n, 4, size=3) + 1)),
    case("div.Scalar", lambda n: (f(n, 4), 3)),
    case("div.Tensor_mode", lambda n: (f(n, 4), positive(n, 4)), rounding_mode="floor"),
    case("div.Tensor_mode", lambda n: (f(n, 4), positive(n, 4)), rounding_mode=None),
    case("div.Scalar_mode", lambda n: (i(n, 4), 2), rounding_mode="floor"),
    case("div.Tensor_mode", lambda n: (_DIVIDENDS.repeat(n, 1), _DIVISORS), rounding_mode="floor"),
    case("floor_divide.default", lambda n: (_DIVIDENDS.repeat(n, 1), _DIVISORS)),
    case("floor_divide.Scalar", lambda n: (_DIVIDENDS.repeat(n, 1), 0.1)),
    case("floor_divide.default", lambda n: (i(n, 4), index(n, 4, size=3) + 1)),
    case("floor_divide.Scalar", lambda n: (i(n, 4), 2)),
    case("remainder.Tensor", lambda n: (i(n, 4), index(n, 4, size=3) + 1)),
    case("remainder.Scalar", lambda n: (i(n, 4), 3)),
    case("remainder.Tensor", lambda n: (_DIVIDENDS.repeat(n, 1), _DIVISORS)),
    case("maximum.default", lambda n: (f(n, 4), f(4))),
    case("minimum.default", lambda n: (f(n, 4), f(4))),
    case("max.other", lambda n: (i(n, 4), i(4))),
    case("min.other", lambda n: (i(n, 4), i(4))),
    case("clamp.default", lambda n: (f(n, 4), -0.7, 0.3)),
    case("clamp.default", lambda n: (f(n, 4), None, 0.3)),
    case("clamp.Tensor", lambda n: (f(n, 4), f(n, 4) - 1, None)),
    case("clamp_min.default", lambda n: (i(n, 4), 1)),
    case("clamp_min.Tensor", lambda n: (f(n, 4), f(4))),
    case("clamp_max.default", lambda n: (f(n, 4), 0.1)),
    case("clamp_max.Tensor", lambda n: (f(n, 4), f(4))),
    *(
        case("pow.Tensor_Scalar", lambda n, e=e: (positive(n, 4), e))
        for e in (2, 3, 0.5, -0.5, -1, -2, 1.7, 1)
    ),
    case("pow.Tensor_Scalar", lambda n: (i(n, 4), 2)),
    case("pow.Tensor_Tensor", lambda n: (positive(n, 4), f(n, 4))),
    case("pow.Scalar", lambda n: (2.0, f(n, 4))),
    case("where.self", lambda n: (b(n, 4), f(n, 4), f(4))),
    case("where.ScalarSelf", lambda n: (b(n, 4), 0.1, f(n, 4))),
    case("where.ScalarOther", lambda n: (b(n, 4), f(n, 4), 7)),
    case("where.Scalar", lambda n: (b(n, 4), 1.0, 0.0)),
    case("masked_fill.Scalar", lambda n: (f(n, 4), b(n, 4), float("-inf"))),
    case("masked_fill.Tensor", lambda n: (f(n, 4), b(n, 1), torch.tensor(2.5))),
    case("addcmul.default", lambda n: (f(n, 4), f(n, 4), f(4)), value=0.5),
    *(case(f"{name}.Tensor", lambda n: (i(n, 4), f(n, 4))) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(case(f"{name}.Scalar", lambda n: (i(n, 4), 1)) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    case("gt.Scalar", lambda n: (i(n, 4), 0.5)),
    *(case(f"{name}.Tensor", lambda n: (f(n, 4), positive(n, 4))) for name in _ALIASES),
    *(case(f"{name}.Scalar", lambda n: (f(n, 4), 2)) for name in _ALIASES),
    *(case(f"logical_{name}.default", lambda n: (i(n, 4), b(n, 4))) for name in ("and", "or", "xor")),
    *(case(f"bitwise_{name}.Tensor", lambda n: (i(n, 4), i(n, 4))) for name in ("and", "or", "xor")),
    *(case(f"bitwise_{name}.Scalar", lambda n: (i(n, 4), 6)) for name in ("and", "or", "xor")),
    *(case(f"__{name}__.Tensor", lambda n: (b(n, 4), b(n, 4))) for name in ("and", "or", "xor")),
    *(case(f"__{name}__.Scalar", lambda n: (i(n, 4), 5)) for name in ("and", "or", "xor")),
]

_INFINITE = torch.tensor(
    [[-torch.inf, -torch.inf], [torch.inf, 1.0], [torch.inf, -torch.inf], [-torch.inf, 1.0], [torch.nan, 1.0]]
)

REDUCE = [
    case("sum.default", lambda n: (f(n, 4),)),
    case("sum.default", lambda n: (b(n, 4),)),
    case("sum.dim_IntList", lambda n: (f(n, 4, 2), [0, -1], True)),
    case("sum.dim_IntList", lambda n: (f(n, 4), None)),
    case("mean.default", lambda n: (f(n, 4),)),
    case("mean.dim", lambda n: (f(n, 4, 2), [1], False)),
    case("mean.dim", lambda n: (f(n, 4), [0], True)),
    case("var.correction", lambda n: (f(n, 4), [1])),
    case("var.correction", lambda n: (f(n, 4), None), correction=0, keepdim=True),
    case("var.dim", lambda n: (f(n, 4), [1], False, True)),
    case("std.correction", lambda n: (f(n, 4), [-1]), correction=1),
    case("std.dim", lambda n: (f(n, 4), [1])),
    case("amax.default", lambda n: (f(n, 4), [1], True)),
    case("amin.default", lambda n: (f(n, 4),)),
    case("max.default", lambda n: (f(n, 4),)),
    case("min.default", lambda n: (i(n, 4),)),
    case("any.default", lambda n: (i(n, 4),)),
    case("any.dim", lambda n: (b(n, 4), 1)),
    case("any.dims", lambda n: (b(n, 4, 2), [1, 2], True)),
    case("all.default", lambda n: (b(n, 4),)),
    case("all.dim", lambda n: (i(n, 4), -1, True)),
    case("all.dims", lambda n: (b(n, 4, 2), [0, 2])),
    case("prod.default", lambda n: (f(n, 4),)),
    case("prod.dim_int", lambda n: (f(n, 4), 1, True)),
    *(
        case("linalg_vector_norm.default", lambda n, order=order: (f(n, 4), order, [-1], True))
        for order in (2, 1, 0, 3.5, -2, torch.inf, -torch.inf)
    ),
    case("linalg_vector_norm.default", lambda n: (f(n, 4).masked_fill(f(n, 4) > 0, 0.0), 0)),
    case("linalg_vector_norm.default", lambda n: (f(n, 4, 2), 2, [0, 2])),
    case("linalg_vector_norm.default", lambda n: (f(n, 4), 2, None), dtype=torch.float64),
    case("cumsum.default", lambda n: (f(n, 6), -1)),
    case("cumsum.default", lambda n: (f(n, 5, 3), 1)),
    case("cumsum.default", lambda n: (b(n, 7), 1)),
    case("cumsum.default", lambda n: (i(n, 7), 1), dtype=torch.float32),
    case("cumsum.default", lambda n: (f(n, 6) / (f(n, 6) > -1), 1)),
    case("cumsum.default", lambda n: (torch.tensor(2.5), 0)),
    case("softmax.int", lambda n: (f(n, 4), -1)),
    case("softmax.int", lambda n: (f(n, 4), 1, torch.float32)),
    case("_softmax.default", lambda n: (f(n, 4), 1, False)),
    case("log_softmax.int", lambda n: (f(n, 4), -1)),
    case("_log_softmax.default", lambda n: (f(n, 4), 1, False)),
    case("logsumexp.default", lambda n: (f(n, 4), [1], False)),
    case("logsumexp.default", lambda n: (_INFINITE.repeat(n, 1, 1), [-1])),
    case("layer_norm.default", lambda n: (f(n, 3, 4), [4], positive(4), f(4), 1e-5)),
    case("layer_norm.default", lambda n: (f(n, 3, 4), [3, 4])),
    case("rms_norm.default", lambda n: (f(n, 4), [4], positive(4), 1e-6)),
    case("rms_norm.default", lambda n: (f(n, 4), [4])),
]

VIEW = [
    case("view.default", lambda n: (f(n, 6, 2), [-1, 12])),
    case("view.default", lambda n: (f(n, 12), [-1, 3, 4])),
    case("view.default", lambda n: (f(n, 6), [-1])),
    case("reshape.default", lambda n: (f(n, 4, 3), [-1, 2, 6])),
    case("_unsafe_view.default", lambda n: (f(n, 4), [-1, 2, 2])),
    case("reshape_as.default", lambda n: (f(n, 6), f(n, 2, 3))),
    case("view_as.default", lambda n: (f(n, 4), f(n, 2, 2))),
    case("flatten.using_ints", lambda n: (f(n, 4, 3), 0, 1)),
    case("unflatten.int", lambda n: (f(n, 6), 1, [2, 3])),
    case("unsqueeze.default", lambda n: (f(n, 4), -1)),
    case("squeeze.default", lambda n: (f(n, 1, 4),)),
    case("squeeze.dim", lambda n: (f(n, 1, 4), 1)),
    case("squeeze.dim", lambda n: (f(n, 1, 4), 2)),
    case("squeeze.dims", lambda n: (f(n, 1, 4, 1), [1, -1])),
    case("transpose.int", lambda n: (f(n, 4, 3), 0, -1)),
    case("swapaxes.default", lambda n: (f(n, 4, 3), 1, 2)),
    case("permute.default", lambda n: (f(n, 4, 3), [2, 0, -2])),
    case("t.default", lambda n: (f(n, 4),)),
    case("numpy_T.default", lambda n: (f(n, 4),)),
    case("mT.default", lambda n: (f(n, 4, 3),)),
    case("adjoint.default", lambda n: (f(n, 4, 3),)),
    case("movedim.int", lambda n: (f(n, 4, 3), 0, 2)),
    case("movedim.intlist", lambda n: (f(n, 4, 3, 2), [0, 1], [3, 0])),
    case("expand.default", lambda n: (f(n, 1, 4), [2, -1, 3, 4])),
    case("broadcast_to.default", lambda n: (f(4), [2, 3, 4])),
    case("expand_as.default", lambda n: (f(n, 1), f(n, 4))),
    case("slice.Tensor", lambda n: (f(n, 8), 1, 2, -1, 2)),
    case("slice.Tensor", lambda n: (f(n, 8), -1, -3)),
    case("slice.Tensor", lambda n: (f(n, 8), 0, 1)),
    case("narrow.default", lambda n: (f(n, 8), 1, 2, 3)),
    case("select.int", lambda n: (f(n, 8), 1, -2)),
    case("select.int", lambda n: (f(n, 8), 0, 1)),
    case("split.Tensor", lambda n: (f(n, 8), 3, 1)),
    case("chunk.default", lambda n: (f(n, 8), 3, -1)),
    case("split_with_sizes.default", lambda n: (f(n, 8), [1, 5, 2], 1)),
    case("tensor_split.sections", lambda n: (f(n, 8), 3, 1)),
    case("unbind.int", lambda n: (f(n, 3), 1)),
    case("repeat.default", lambda n: (f(n, 3), [2, 1, 2])),
    case("tile.default", lambda n: (f(n, 3), [1, 2])),
    case("repeat_interleave.self_int", lambda n: (f(n, 3), 2, 1)),
    case("repeat_interleave.self_int", lambda n: (f(n, 3), 2)),
    case("flip.default", lambda n: (f(n, 3, 4), [0, -1])),
    case("roll.default", lambda n: (f(n, 5), [2], [1])),
    case("cat.default", lambda n: ([f(n, 3), f(n, 2)], -1)),
    case("cat.default", lambda n: ([i(n, 3), f(n, 3)],)),
    case("cat.default", lambda n: ([f(n, 3), f(n, 0), f(n, 2)], -1)),
    case("cat.default", lambda n: ([f(n, 3), f(n, 0)], -1)),
    case("concat.default", lambda n: ([f(n, 3), f(n, 2)], 1)),
    case("concatenate.default", lambda n: ([f(n, 3)], 1)),
    case("stack.default", lambda n: ([f(n, 3), f(n, 3)], -1)),
    case("constant_pad_nd.default", lambda n: (f(n, 3), [1, 2], 0.5)),
    case("pad.default", lambda n: (f(n, 3, 2), [1, 0, 2, 1])),
    case("embedding.default", lambda n: (f(7, 4), index(n, 3, size=7))),
    case("topk.default", lambda n: (f(n, 9), 3)),
    case("topk.default", lambda n: (f(n, 2, 5), 5, -1, True, True)),
    case("topk.default", lambda n: (f(n, 7), 1, 1)),
    case("argmax.default", lambda n: (f(n, 7), -1)),
    case("argmax.default", lambda n: (i(n, 9, 3), 1, True)),
    case("argmax.default", lambda n: (f(n, 4) * float("nan"), 1)),
    case("max.dim", lambda n: (f(n, 7), -1)),
    case("max.dim", lambda n: (i(n, 9, 3), 1, True)),
    case("min.dim", lambda n: (f(n, 4, 5), 1, True)),
    case("min.dim", lambda n: (i(n, 6), 1)),
    case("gather.default", lambda n: (f(n, 7), 1, index(n, 3, size=7))),
    case("gather.default", lambda n: (f(n, 2, 5), -1, index(n, 2, 8, size=5))),
    case("gather.default", lambda n: (f(n, 7, 3), 1, index(n, 4, 3, size=7))),
    case("gather.default", lambda n: (f(n, 3, 7), 1, index(n, 4, 5, size=3))),
    case("scatter.value", lambda n: (f(n, 7), 1, index(n, 3, size=7), 1.5)),
    case("index_select.default", lambda n: (f(n, 5), 1, index(4, size=5))),
    case("index_select.default", lambda n: (f(n, 5), 1, torch.tensor(3))),
    case("index.Tensor", lambda n: (f(n, 5, 3), [torch.arange(n), i(n, low=-5, high=5)])),
    case("index.Tensor", lambda n: (f(n, 5, 3), [None, i(4, 1, low=-5, high=5), i(2, low=-3, high=3)])),
    case("index.Tensor", lambda n: (f(n, 5), [None, i(4, low=-5, high=5)])),
    case("tril.default", lambda n: (f(n, 4, 5), 1)),
    case("triu.default", lambda n: (f(n, 4, 5), -1)),
]

CREATE = [
    case("zeros_like.default", lambda n: (f(n, 4),)),
    case("ones_like.default", lambda n: (i(n, 4),)),
    case("full_like.default", lambda n: (f(n, 4), 0.1)),
    case("new_zeros.default", lambda n: (f(n, 4), [2, 3])),
    case("new_ones.default", lambda n: (f(n, 4), [2, 3])),
    case("new_full.default", lambda n: (f(n, 4), [2, 3], 0.5)),
    case("zeros.default", lambda n: ([2, 3],)),
    case("ones.default", lambda n: ([2, 3],), dtype=torch.int64),
    case("full.default", lambda n: ([2, 3], 0.5)),
    case("scalar_tensor.default", lambda n: (2.5,)),
    case("arange.default", lambda n: (5,)),
    case("arange.start", lambda n: (2, 7), dtype=torch.float32),
    case("arange.start_step", lambda n: (1, 8, 3)),
]

MATMUL = [
    case("linear.default", lambda n: (f(n, 3, 4), f(5, 4), f(5))),
    case("linear.default", lambda n: (f(n, 4), f(5, 4))),
    case("linear.default", lambda n: (f(n, 4), f(4))),
    case("matmul.default", lambda n: (f(n, 3, 4), f(4, 5))),
    case("matmul.default", lambda n: (f(n, 3, 4), f(n, 4, 5))),
    case("matmul.default", lambda n: (f(n, 1, 3, 4), f(2, 4, 5))),
    case("matmul.default", lambda n: (f(4), f(4, 5))),
    case("matmul.default", lambda n: (f(n, 3, 4), f(4))),
    case("matmul.default", lambda n: (f(4), f(n, 4, 5))),
    case("mm.default", lambda n: (f(n, 4), f(4, 5))),
    case("bmm.default", lambda n: (f(n, 3, 4), f(n, 4, 5))),
    case("mv.default", lambda n: (f(n, 4), f(4))),
    case("dot.default", lambda n: (f(4), f(4))),
    case("addmm.default", lambda n: (f(5), f(n, 4), f(4, 5)), beta=0.5, alpha=2),
    case("addmm.default", lambda n: (f(5), f(n, 4), f(4, 5)), beta=0),
    case("addmv.default", lambda n: (f(n), f(n, 4), f(4))),
    case("baddbmm.default", lambda n: (f(n, 3, 5), f(n, 3, 4), f(n, 4, 5))),
    *(
        case("einsum.default", lambda n, text=text, a=a, b=b: (text, [f(n, *a), f(*(d or n for d in b))]))
        for text, a, b in (
            ("bhwc,hkc->bhwk", (7, 4, 9), (7, 6, 9)),
            ("ij,kj->ik", (4,), (7, 4)),
            ("bid,bjd->bij", (7, 4), (0, 9, 4)),
            ("bhid,bhjd->bihj", (2, 7, 4), (0, 2, 9, 4)),
            ("bi,bi->b", (4,), (0, 4)),
            ("bi,j->jbi", (4,), (7,)),
            ("bic,cj -> bj", (7, 4), (4, 2)),
        )
    ),
    case("conv1d.default", lambda n: (f(n, 2, 7), f(5, 2, 3), f(5), [3])),
    case("conv2d.default", lambda n: (f(n, 3, 5, 8), f(6, 3, 2, 4), f(6), [2, 4])),
    case("conv2d.default", lambda n: (f(n, 3, 4, 4), f(5, 3, 2, 2), None, [2, 2], [0, 0], [1, 1], 1)),
    case("conv2d.default", lambda n: (f(n, 3, 4, 5), f(5, 3, 1, 1), f(5))),
    case("conv1d.padding", lambda n: (f(n, 2, 7), f(5, 2, 3), f(5), [3], "valid")),
    case("conv2d.padding", lambda n: (f(n, 3, 5, 8), f(6, 3, 2, 4), None, [2, 4], "valid")),
    case("conv3d.padding", lambda n: (f(n, 2, 4, 2, 5), f(6, 2, 2, 1, 2), f(6), [2, 1, 2], "valid")),
    case("conv3d.default", lambda n: (f(n, 2, 4, 2, 5), f(6, 2, 2, 1, 2), f(6), [2, 1, 2])),
    case("conv1d.default", lambda n: (f(n, 3, 7), f(3, 1, 3), f(3), [1], [1], [1], 3)),
    case("conv1d.default", lambda n: (f(2, 3, n), f(3, 1, 3), None, [1], [2], [2], 3)),
    case("conv2d.default", lambda n: (f(n, 4, 7, 6), f(4, 1, 3, 2), f(4), [2, 1], [1, 0], [1, 2], 4)),
    case("conv2d.default", lambda n: (f(n, 4, 7, 6), f(4, 1, 3, 3), f(4), [1, 1], [1, 1], [1, 1], 4)),
    case("conv1d.padding", lambda n: (f(n, 2, 7), f(2, 1, 4), f(2), [1], "same", [1], 2)),
    case("conv2d.padding", lambda n: (f(n, 2, 5, 8), f(2, 1, 2, 3), None, [1, 1], "same", [2, 1], 2)),
    case(
        "conv3d.default",
        lambda n: (f(n, 2, 4, 3, 5), f(2, 1, 2, 1, 2), f(2), [1, 1, 2], [1, 0, 1], [1, 1, 1], 2),
    ),
    case("adaptive_avg_pool1d.default", lambda n: (f(n, 3, 7), [1])),
    case("adaptive_avg_pool2d.default", lambda n: (f(n, 3, 4, 5), [1, 1])),
    case("adaptive_avg_pool2d.default", lambda n: (f(n, 3, 5), [1, 1])),
    case("adaptive_avg_pool3d.default", lambda n: (f(n, 2, 3, 2, 3), [1, 1, 1])),
    case("avg_pool1d.default", lambda n: (f(n, 3, 7), [3], [2])),
    case("avg_pool2d.default", lambda n: (f(n, 3, 7, 6), [3, 2])),
    case("avg_pool2d.default", lambda n: (f(n, 3, 7, 6), [3, 2], [1, 2])),
    *(
        case("scaled_dot_product_attention.default", args)
        for args in (
            lambda n: (f(n, 2, 3, 4), f(n, 2, 5, 4), f(n, 2, 5, 4)),
            lambda n: (f(n, 2, 5, 4), f(n, 2, 5, 4), f(n, 2, 5, 4), None, 0.0, True),
            lambda n: (f(n, 2, 3, 4), f(n, 2, 5, 4), f(n, 2, 5, 4), None, 0.0, True),
            lambda n: (f(n, 2, 3, 4), f(n, 2, 5, 4), f(n, 2, 5, 4), f(n, 1, 1, 5)),
            lambda n: (f(n, 2, 3, 4), f(n, 2, 5, 4), f(n, 2, 5, 4), torch.arange(5).expand(n, 1, 1, 5) > 1),
            lambda n: (f(n, 3, 4), f(n, 5, 4), f(n, 5, 4)),
        )
    ),
    case(
        "scaled_dot_product_attention.default",
        lambda n: (f(n, 4, 3, 4), f(n, 2, 5, 4), f(n, 2, 5, 4), f(n, 1, 3, 5), 0.0, False),
        scale=0.3,
        enable_gqa=True,
    ),
]

FUNCTIONAL = [
    case("prims.convert_element_type.default", lambda n: (f(n, 4), torch.int64)),
    case("copy.default", lambda n: (f(n, 4), i(1, 4))),
    case(
        "batch_norm.default",
        lambda n: (f(n, 3, 4, 2), f(3), f(3), f(3), positive(3), False, 0.1, 1e-3, False),
    ),
    case("batch_norm.default", lambda n: (f(n, 3), None, None, f(3), positive(3), False, 0.1, 1e-5, False)),
    case("native_layer_norm.default", lambda n: (f(n, 3, 4), [4], positive(4), f(4), 1e-5)),
    case("native_layer_norm.default", lambda n: (f(n, 3, 4), [3, 4], None, None, 1e-5)),
    case(
        "_safe_softmax.default", lambda n: (f(n, 4).masked_fill(torch.arange(n)[:, None] == 1, -torch.inf), 1)
    ),
    case("select_scatter.default", lambda n: (f(n, 4), f(n), 1, -1)),
    case("select_scatter.default", lambda n: (f(n, 4), f(4), 0, 0)),
    case("slice_scatter.default", lambda n: (f(n, 6), f(n, 2), 1, 3, 5)),
    case("slice_scatter.default", lambda n: (f(n, 6), f(n, 6), 1)),
    case("slice_scatter.default", lambda n: (f(n, 8), f(n, 3), 1, 1, 8, 3)),
    case("slice_scatter.default", lambda n: (f(n, 9, 2), f(n, 3, 2), 1, 1, 8, 3)),
    case("slice_scatter.default", lambda n: (f(n, 5), f(n, 1), 1, 2, 4, 3)),
    *(
        case("_scaled_dot_product_flash_attention_for_cpu.default", lambda n: (f(n, 2, 5, 4),) * 3, **options)
        for options in (
            {},
            {"is_causal": True},
            {"scale": 0.3, "attn_mask": f(5, 5)},
            {"attn_mask": f(5, 5).masked_fill(torch.arange(5)[:, None] == 2, -torch.inf)},
        )
    ),
]

CASES = [*FUNCTIONAL, *UNARY, *BINARY, *REDUCE, *VIEW, *CREATE, *MATMUL]
