"""The reference evaluator: what each op means, run with torch. The oracle of every test.

It runs any stage of the IR (captured, optimised, fused), in the dtypes that the IR declares, or with every float
promoted to float64 (``exact=True``) to measure how far a result is from the true one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor

from .attention import LEAST_BIASED, MASKED, attention_extras
from .errors import VerifyError
from .experts import experts
from .experts_grouped import experts_order, grouped_matmul
from .index import IndexMap, extents_of, linear_index, simplify, sym
from .module import Function, Module, Op
from .pointwise import POINTWISE
from .quantization import Quantize, dequantize, quantize, round_activations
from .recurrent import EVALUATE, RECURRENT
from .types import F8_LARGEST, DType, Value, concrete


@dataclass
class Evaluation:
    """One run: weights by absolute name, dim sizes, and the state by absolute slot name, updated in place: keys and
    values [B, G, past, D], and what ``recurrent.py`` says of recurrent layers. quantize: computes that op, which may be
    done faster than it is defined."""

    module: Module
    weights: Mapping[str, Tensor]
    dims: Mapping[str, int]
    state: dict[str, Tensor] = field(default_factory=dict)
    exact: bool = False
    quantize: Quantize = quantize

    def dtype(self, dtype: DType) -> torch.dtype:
        """How a value of ``dtype`` is held. f8 stays what it is: it says which numbers are stored."""
        wide = self.exact and dtype.is_float and dtype is not DType.f8
        return torch.float64 if wide else dtype.torch

    def call(self, function: Function, args: Sequence[Tensor], scope: str = "") -> tuple[Tensor, ...]:
        """Run a function; ``scope`` is the prefix of its weights and state slots."""
        env: dict[Value, Tensor] = {
            p: _as_dtype(a, self.dtype(p.dtype)) for p, a in zip(function.params, args, strict=True)
        }
        for op in function.ops:
            self.run(op, env, scope)
        return tuple(env[v] for v in function.returns)

    def run(self, op: Op, env: dict[Value, Tensor], scope: str) -> None:
        """Evaluate one op into ``env``."""
        if op.opcode == "kernel":
            for inner in op.body:
                self.run(inner, env, scope)
            return
        args = [env[v] for v in op.operands]
        results = self._evaluate(op, args, scope)
        for value, tensor in zip(op.results, results, strict=True):
            expected = concrete(value.shape, self.dims)
            if tuple(tensor.shape) != expected:
                raise VerifyError(
                    f"{op.opcode} {value}: evaluated to {tuple(tensor.shape)}, declared {expected}"
                )
            env[value] = _as_dtype(tensor, self.dtype(value.dtype))

    def _evaluate(self, op: Op, args: list[Tensor], scope: str) -> tuple[Tensor, ...]:
        if op.opcode in POINTWISE:
            return (POINTWISE[op.opcode].torch(*args),)
        if op.opcode == "call":
            callee = self.module.function(op.attr("callee"))
            return self.call(callee, args, join_scope(scope, op.attr("scope")))
        if op.opcode == "call_torch":
            return run_torch_call(op.attr("target"), op.attr("template"), args)
        if op.opcode == "quantize":
            return self.quantize(args[0], op.attr("bits"), op.attr("group"))
        if op.opcode in RECURRENT:
            return self._recurrent(op, args, scope)
        if op.opcode == "experts_order":
            return experts_order(op, args[0])
        return (_RULES[op.opcode](self, op, args, scope),) if op.opcode in _RULES else self._split(op, args)

    def _recurrent(self, op: Op, args: list[Tensor], scope: str) -> tuple[Tensor, ...]:
        """A recurrent op goes on from its slot's state, and leaves the new one there."""
        slot = join_scope(scope, op.attr("slot"))
        result, self.state[slot] = EVALUATE[op.opcode](args, self.state.get(slot))
        return result, self.state[slot]

    def _split(self, op: Op, args: list[Tensor]) -> tuple[Tensor, ...]:
        """attention_split: online-softmax partials over ``splits`` equal chunks of the context."""
        scores, v = _scores(op, args)
        chunk = -(-scores.shape[-1] // op.attr("splits"))
        parts = []
        for n in range(op.attr("splits")):
            s, vs = scores[..., n * chunk : (n + 1) * chunk], v[..., n * chunk : (n + 1) * chunk, :]
            if s.shape[-1] == 0:
                s = scores.new_full((*scores.shape[:-1], 1), MASKED)
                vs = v.new_zeros((*v.shape[:-2], 1, v.shape[-1]))
            top = s.amax(-1)
            p = torch.exp(s - top[..., None]) * (s > MASKED / 2)
            parts.append((p @ vs, top, p.sum(-1)))
        acc, top, total = (torch.stack(column, dim=3) for column in zip(*parts, strict=True))
        return acc, top, total


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``; values beyond the range of f8 become its largest, in every version of torch."""
    if dtype == DType.f8.torch and tensor.dtype != dtype:
        tensor = tensor.clamp(-F8_LARGEST, F8_LARGEST)
    return tensor.to(dtype)


def evaluate(
    module: Module,
    inputs: Mapping[str, Tensor] | Sequence[Tensor],
    weights: Mapping[str, Tensor],
    dims: Mapping[str, int],
    state: dict[str, Tensor] | None = None,
    exact: bool = False,
) -> tuple[Tensor, ...]:
    """Run a module's entry function.

    inputs: the entry's parameters, by name or in order. weights: absolute name -> tensor. dims: sizes of the dim
    symbols (B, S, T, L). state: by absolute slot name; updated in place. exact: all floats as float64.
    Raises VerifyError when a shape that is evaluated differs from the declared one.
    """
    main = module.main
    args = [inputs[p.name] for p in main.params] if isinstance(inputs, Mapping) else list(inputs)
    return Evaluation(module, weights, dims, state if state is not None else {}, exact).call(main, args)


def join_scope(scope: str, name: str) -> str:
    """The absolute name of a weight or slot inside a scope."""
    return f"{scope}.{name}" if scope and name else scope or name


def torch_op(target: str) -> Any:
    """The PyTorch op of that name, such as "aten.linear.default"."""
    function: Any = torch.ops
    for part in target.split("."):
        function = getattr(function, part)
    return function


def run_torch_call(target: str, template: str, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run an ATen op. ``template`` is JSON ``[args, kwargs]`` in which ``{"t": n}`` stands for the n-th tensor
    and ``{"dtype": name}`` for a torch dtype."""

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            if "t" in node:
                return args[node["t"]]
            if "dtype" in node:
                return getattr(torch, node["dtype"])
            return {k: fill(v) for k, v in node.items()}
        return [fill(n) for n in node] if isinstance(node, list) else node

    positional, named = json.loads(template)
    result = torch_op(target)(*fill(positional), **{k: fill(v) for k, v in named.items()})
    return tuple(result) if isinstance(result, tuple | list) else (result,)


Rule = Callable[[Evaluation, Op, list[Tensor], str], Tensor]


def _param(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    name = join_scope(scope, op.attr("name"))
    if name not in run.weights:
        raise VerifyError(f"no weight named {name!r}")
    return run.weights[name]


def _const(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    return torch.tensor(op.attr("value"), dtype=run.dtype(op.result.dtype))


def _iota(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    return torch.arange(concrete(op.result.shape, run.dims)[0])


def _dim(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    return torch.tensor(concrete((op.attr("expr"),), run.dims)[0])


_REDUCE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum, "max": torch.amax, "min": torch.amin, "any": torch.any, "all": torch.all,
}  # fmt: skip


def _reduce(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    (x,) = args
    kind, keepdim = op.attr("kind"), op.attr("keepdim")
    if kind in ("max", "min", "sum") and not op.attr("axes"):
        return x
    if kind in _REDUCE and kind not in ("any", "all"):
        return _REDUCE[kind](x, dim=op.attr("axes"), keepdim=keepdim)
    function = torch.prod if kind == "prod" else _REDUCE[kind]
    for axis in reversed(op.attr("axes")):
        x = function(x, dim=axis, keepdim=keepdim)
    return x


def _view(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    shape = concrete(op.result.shape, run.dims)
    return apply_index_map(args[0], op.attr("map"), shape, run.dims)


def apply_index_map(
    x: Tensor, index_map: IndexMap, shape: tuple[int, ...], dims: Mapping[str, int]
) -> Tensor:
    """``result[i] = x[map(i)]``. A view where the map is affine in memory, else a gather."""
    bound = {sym(name): sympy.Integer(size) for name, size in dims.items()}
    exprs = tuple(e.xreplace(bound) for e in index_map.exprs)
    if 0 in shape:
        return x.new_empty(shape)
    offset, strides = memory_map(exprs, tuple(x.shape), shape)
    if strides is not None:
        return x.contiguous().as_strided(shape, strides, x.contiguous().storage_offset() + offset)
    grids = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    names = [s.name for s in extents_of(tuple(map(sympy.Integer, shape)))]
    env = dict(zip(names, grids, strict=True))
    index = tuple(_grid(e, env, shape) for e in exprs)
    return x[index]


@lru_cache(maxsize=4096)
def memory_map(
    exprs: tuple[sympy.Expr, ...], source: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, tuple[int, ...] | None]:
    """Offset and strides of the map into a contiguous ``source``; strides None when it is not affine."""
    ranges = extents_of(tuple(map(sympy.Integer, shape)))
    address = simplify(linear_index(exprs, tuple(map(sympy.Integer, source))), ranges)
    strides = tuple(sympy.diff(address, s) for s in ranges)
    if not all(s.is_Integer and s >= 0 for s in strides):
        return 0, None
    start = address.subs(dict.fromkeys(ranges, 0))
    return int(start), tuple(map(int, strides))


def _grid(expr: sympy.Expr, env: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Evaluate an index expression over index grids."""
    if expr.is_Integer:
        return torch.full(shape, int(expr))
    if expr.is_Symbol:
        return env[expr.name]
    args = [_grid(a, env, shape) for a in expr.args]
    match expr.func.__name__:
        case "Add":
            return sum(args[1:], args[0])
        case "Mul":
            total = args[0]
            for a in args[1:]:
                total = total * a
            return total
        case "FloorDiv":
            return torch.div(args[0], args[1], rounding_mode="floor")
        case "Mod":
            return torch.remainder(args[0], args[1])
    raise VerifyError(f"cannot evaluate index expression {expr}")


def _concat(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    return torch.cat(args, dim=op.attr("axis"))


def _gather(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    table, index = args
    axis = op.attr("axis")
    flat = table.index_select(axis, index.reshape(-1))
    return flat.reshape(*table.shape[:axis], *index.shape, *table.shape[axis + 1 :])


def _matmul(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    a, b = args
    if group := op.attr("activation_group"):
        a = round_activations(a, group)
    if op.attr("wide") and a.dtype != torch.float64:
        a, b = a.float(), b.float()
    return a @ b.transpose(-1, -2)


def _dequantize(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    dtype = run.dtype(op.result.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    minimum = args[2] if len(args) == 3 else None
    return dequantize(args[0], args[1], minimum, op.attr("bits"), op.attr("group"), wide).to(dtype)


def _append(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    slot = join_scope(scope, op.attr("slot"))
    past = run.state.get(slot)
    run.state[slot] = args[0] if past is None else torch.cat([past, args[0]], dim=2)
    return run.state[slot]


def _attention(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    if slot := op.attr("slot"):
        for n, which in ((1, "k"), (2, "v")):
            appended = op.with_attrs(slot=f"{slot}.{which}")
            args[n] = _append(run, appended, [args[n]], scope)
    dtype = args[0].dtype
    scores, v = _scores(op, args)
    top = scores.amax(-1, keepdim=True)
    sink = attention_extras(op, args).get("sinks")
    if sink is not None:
        sink = sink.to(scores.dtype).view(1, -1, 1, 1)
        top = torch.maximum(top, sink)
    p = torch.exp(scores - top) * (scores > MASKED / 2)
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    return ((p @ v) / total.clamp(min=1e-30)).to(dtype)


def _experts(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    return experts(op, args)


def _grouped_matmul(run: Evaluation, op: Op, args: list[Tensor], scope: str) -> Tensor:
    return grouped_matmul(op, args)


def _scores(op: Op, args: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Scaled, capped, biased and masked scores [B, H, S, T], and v [B, H, T, Dv], both in float32 or wider."""
    wide = torch.promote_types(args[0].dtype, torch.float32)
    q, k, v = (x.to(wide) for x in args[:3])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * op.attr("scale")
    if cap := op.attr("softcap"):
        scores = torch.tanh(scores / cap) * cap
    s, t = scores.shape[-2:]
    query, key = torch.arange(t - s, t)[:, None], torch.arange(t)[None]
    extras = attention_extras(op, args)
    if "slopes" in extras:
        scores = scores + extras["slopes"].to(scores.dtype).view(-1, 1, 1) * (key - query)
    if "distances" in extras:
        table = extras["distances"].to(scores.dtype)
        middle = table.shape[1] // 2
        scores = scores + table[:, (key - query).clamp(-middle, middle) + middle]
    if "bias" in extras:
        bias = extras["bias"].to(scores.dtype)
        scores = torch.where(bias == -torch.inf, MASKED, (scores + bias).clamp(min=LEAST_BIASED))
    valid = torch.ones(1, s, t, dtype=torch.bool)
    if op.attr("causal"):
        valid = valid & (key <= (extras["reach"][:, :, None] if "reach" in extras else query))
    if window := op.attr("window"):
        valid = valid & (query - key < window)
    if ahead := op.attr("ahead"):
        valid = valid & (key - query < ahead)
    valid = valid[:, None]
    if "mask" in extras:
        valid = valid & extras["mask"][:, None, None, :].bool()
    return scores.masked_fill(~valid, MASKED), v


_RULES: dict[str, Rule] = {
    "param": _param, "const": _const, "iota": _iota, "dim": _dim, "reduce": _reduce, "view": _view,
    "concat": _concat, "gather": _gather, "matmul": _matmul, "append": _append, "attention": _attention,
    "dequantize": _dequantize, "experts": _experts, "grouped_matmul": _grouped_matmul,
}  # fmt: skip
