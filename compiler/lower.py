"""Lowering: captured FX graphs become one IR module, op by op, through the table of ``aten_rules``.

An ATen op without a rule (or with arguments that its rule does not cover, or tensors without a single element) becomes
``call_torch``, which PyTorch runs at run time; ops that move no data (assertions, size queries) vanish. Every op keeps
where it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from sympy import Expr
from torch import Tensor, fx

from tilewright.ir.builder import Builder
from tilewright.ir.errors import LoweringError, ParseError, VerifyError
from tilewright.ir.index import FloorDiv, Mod, sym
from tilewright.ir.module import Function, Loc, Module
from tilewright.ir.types import DType, TensorType, Value
from tilewright.ir.verify import verify_module

from . import (  # noqa: F401 (fill RULES)
    aten_rules_attention,
    aten_rules_conv,
    aten_rules_functional,
    aten_rules_matmul,
    aten_rules_pointwise,
    aten_rules_recurrent,
    aten_rules_reduce,
    aten_rules_select,
    aten_rules_view,
)
from .aten_rules import RULES, TAKES_EMPTY, Context, Result, Rule
from .capture import Captured, CapturedGraph, LayerCall
from .capture_experts import EXPERTS
from .capture_ops import ATTENTION, CAUSAL_CONV1D, LAYER, LINEAR_ATTENTION, NEW_TOKENS, SELECTIVE_SCAN
from .writes import functional, is_write, overwritten


def lower(captured: Captured, is_bounded: bool = True) -> Module:
    """The IR module of a captured model: ``main`` and one function per distinct layer, verified.

    is_bounded: no size will ever exceed the range that ``captured`` states for it, so that rules may count on that.
    Raises LoweringError, naming the op, the model module and the source line.
    """
    layers: dict[str, _FunctionLowering] = {}
    highs = {name: high for name, (_, high) in captured.symbols.items()} if is_bounded else {}
    for name, graph in captured.layers.items():
        layers[name] = _FunctionLowering(graph, captured, {}, keep_inputs=False, highs=highs)
        layers[name].run()
    main = _FunctionLowering(captured.main, captured, layers, keep_inputs=True, highs=highs)
    main.run()
    symbols = tuple((name, lo, hi) for name, (lo, hi) in sorted(captured.symbols.items()))
    module = Module((main.function, *(layer.function for layer in layers.values())), symbols)
    verify_module(module)
    return module


@dataclass
class _FunctionLowering:
    """One FX graph on its way to one IR function. ``layers`` are the already lowered callees of the outer graph."""

    graph: CapturedGraph
    captured: Captured
    layers: Mapping[str, _FunctionLowering]
    keep_inputs: bool
    highs: Mapping[str, int]
    builder: Builder = field(default_factory=Builder)
    values: dict[str, Value | tuple[Value, ...]] = field(default_factory=dict)
    used_inputs: list[int] = field(default_factory=list)
    slots: set[str] = field(default_factory=set)
    returns: tuple[Value, ...] = ()

    @property
    def function(self) -> Function:
        return Function(self.graph.name, tuple(self.builder.params), tuple(self.builder.ops), self.returns)

    def run(self) -> None:
        nodes = list(_without_mutation(self.graph).nodes)
        live = _live(nodes)
        self._declare_inputs(nodes, live)
        shared: dict[str, Value] = {}
        for node in nodes:
            if node not in live or node.name in self.values:
                continue
            self.builder.loc = _loc(node)
            if node.op in ("placeholder", "get_attr"):
                if isinstance(node.meta.get("val"), Tensor):  # sizes are resolved where they are used
                    self._tensor(node, shared)
            elif node.op == "call_function":
                self._located(node)
            elif node.op == "output":
                self.returns = tuple(self._returned(arg) for arg in node.args[0])

    # --- what graphs take and give --------------------------------------------------------------------------------

    def _declare_inputs(self, nodes: list[fx.Node], live: set[fx.Node]) -> None:
        """Function parameters. A layer drops those that it does not use; ``main`` keeps the model's interface."""
        by_name = {node.name: node for node in nodes if node.op == "placeholder"}
        for number, (placeholder, logical) in enumerate(self.graph.inputs):
            node = by_name[placeholder]
            if self.keep_inputs or node in live:
                self.used_inputs.append(number)
                self.values[placeholder] = self.builder.param_value(logical, self._type(node.meta["val"]))

    def _tensor(self, node: fx.Node, shared: dict[str, Value]) -> None:
        """A weight, buffer or constant: one ``param`` op per name; literal numbers of the source become constants."""
        name = self.graph.tensors[node.name]
        if name not in shared:
            literal = self.graph.literals.get(name)
            if literal is not None and literal.ndim == 0:
                shared[name] = self.builder.const(literal.item(), DType.from_torch(literal.dtype))
            else:
                hint = name.replace(".", "_")
                shared[name] = self.builder.add(
                    "param", type=self._type(node.meta["val"]), hint=hint, name=name
                )
        self.values[node.name] = shared[name]

    def _returned(self, arg: Any) -> Value:
        value = self._resolve(arg)
        if isinstance(value, Value):
            return value
        if isinstance(value, bool | int | float | Expr):
            dtype = (
                DType.f64
                if isinstance(value, float)
                else DType.bool
                if isinstance(value, bool)
                else DType.i64
            )
            return Context(self.builder, ()).const(value, dtype)
        raise LoweringError(f"{self.graph.name} returns {arg!r}, which is neither a tensor nor a number")

    # --- ops ------------------------------------------------------------------------------------------------------

    def _located(self, node: fx.Node) -> None:
        """Lower one node; whatever goes wrong is reported with the op, the model module and the source line."""
        try:
            self._call(node)
        except (LoweringError, VerifyError, ParseError, TypeError, ValueError, KeyError) as error:
            loc = self.builder.loc
            where = f"module {loc.module!r} of {self.graph.name}" if loc.module else self.graph.name
            raise LoweringError(f"{node.target} in {where} ({loc.source or 'no source'}): {error}") from error

    def _call(self, node: fx.Node) -> None:
        meta = node.meta.get("val")
        if isinstance(meta, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
            return  # size arithmetic: resolved from the metadata where it is used
        if node.target is not None and getattr(node.target, "__name__", "") == "getitem":
            source, index = node.args
            parts = self._resolve(source)
            self.values[node.name] = parts[index]
            return
        if node.target is LAYER:
            self.values[node.name] = self._layer_call(*self._resolve(node.args))
            return
        target, written = node.target, overwritten(node)
        if written is not None:
            target = functional(node)
        if not isinstance(target, torch._ops.OpOverload):
            raise LoweringError(
                "control flow and higher-order ops cannot be lowered; rewrite that part of the model"
            )
        metas = meta if isinstance(meta, tuple | list) else (meta,)
        outs = tuple(self._type(m) for m in metas)
        args, kwargs = self._resolve(node.args), self._resolve(node.kwargs)
        context = Context(self.builder, outs, highs=self.highs)
        if node.target is ATTENTION:
            context.slot = self._slot(causal=args[-1])
            result: Any = aten_rules_attention.opaque_attention(context, *args)
        elif node.target in _RECURRENT:
            opcode = _RECURRENT[node.target]
            context.slot = self._slot(part=f".{opcode}")
            result = aten_rules_recurrent.opaque_recurrent(context, opcode, *args)
        elif node.target is NEW_TOKENS:
            result = aten_rules_recurrent.opaque_new_tokens(context, *args)
        elif node.target is EXPERTS:
            result = aten_rules_matmul.opaque_experts(context, *args)
        else:
            name = str(target).removeprefix("aten.")
            found = RULES.get(name)
            given = [v.type for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Value)]
            empty = any(d == 0 for type_ in (*given, *outs) for d in type_.shape)
            fits = found and (not empty or name in TAKES_EMPTY)
            result = _attempt(found, context, args, kwargs) if found and fits else None
        if result is None:
            result = self._torch_call(str(target), args, kwargs, outs)
            result = result if isinstance(meta, tuple | list) else result[0]
        _check_types(result, outs)
        self.values[node.name] = result
        if written is not None:
            self.values[written.name] = result

    def _slot(self, causal: bool = True, part: str = "") -> str:
        """The slot of the stateful op at hand, its module's path (and the part of its state), or none where nothing is
        remembered."""
        if self.captured.kind != "decoder" or not causal:
            return ""
        slot = (self.builder.loc.module or "attention") + part
        if slot in self.slots:
            raise LoweringError(
                "one module runs twice in a forward, so the state that it keeps would be ambiguous"
            )
        self.slots.add(slot)
        return slot

    def _layer_call(self, x: Value, rest: list[Value], index: int) -> Value:
        call: LayerCall = self.captured.calls[index]
        callee = self.layers[call.callee]
        if callee.slots and call.scope in self.slots:
            raise LoweringError(
                f"layer {call.scope} runs twice in a forward, so its KV state would be ambiguous"
            )
        self.slots.add(call.scope)
        inputs = [x, *rest]
        operands = [inputs[n] for n in callee.used_inputs]
        types = tuple(v.type for v in callee.returns)
        self.builder.loc = Loc(call.scope, self.builder.loc.source)
        (out,) = self.builder.add_multi("call", *operands, types=types, callee=call.callee, scope=call.scope)
        return out

    def _torch_call(
        self, target: str, args: Any, kwargs: Any, outs: tuple[TensorType, ...]
    ) -> tuple[Value, ...]:
        """``call_torch``: tensors (and sizes, as rank-0 tensors) are operands, the rest is a JSON template."""
        operands: list[Value] = []

        def template(item: Any) -> Any:
            if isinstance(item, Expr):
                if item.is_Integer:
                    return int(item)
                item = Context(self.builder, ()).const(item, DType.i64)
            if isinstance(item, Value):
                operands.append(item)
                return {"t": len(operands) - 1}
            if isinstance(item, torch.dtype):
                return {"dtype": str(item).removeprefix("torch.")}
            if isinstance(item, list | tuple):
                return [template(i) for i in item]
            if item is None or isinstance(item, bool | int | float | str):
                return item
            raise LoweringError(f"argument {item!r} cannot be kept in the IR")

        placement = ("device", "layout", "memory_format", "pin_memory")
        named = {k: template(v) for k, v in kwargs.items() if k not in placement}
        text = json.dumps([template(args), named])
        return self.builder.add_multi("call_torch", *operands, types=outs, target=target, template=text)

    # --- values, types and sizes ----------------------------------------------------------------------------------

    def _resolve(self, arg: Any) -> Any:
        """FX arguments with values for nodes and size expressions for symbolic numbers."""
        if isinstance(arg, fx.Node):
            meta = arg.meta.get("val")
            if isinstance(meta, torch.SymInt):
                return self._expr(meta)
            return self.values.get(arg.name, meta)
        if isinstance(arg, list | tuple):
            return [self._resolve(a) for a in arg]
        if isinstance(arg, dict):
            return {k: self._resolve(v) for k, v in arg.items()}
        return self._expr(arg) if isinstance(arg, torch.SymInt) else arg

    def _type(self, meta: Any) -> TensorType:
        if not isinstance(meta, Tensor):
            raise LoweringError(f"gives {type(meta).__name__} where only tensors can be compiled")
        return TensorType(DType.from_torch(meta.dtype), tuple(self._expr(d) for d in meta.shape))

    def _expr(self, size: int | torch.SymInt) -> Expr:
        return sympy.Integer(size) if isinstance(size, int) else self._translate(size.node.expr)

    def _translate(self, expr: Expr) -> Expr:
        """An expression of torch.export's over our symbols and index functions."""
        if expr.is_Symbol:
            if expr not in self.graph.symbols:
                raise LoweringError(f"the size {expr} depends on data, so it cannot be compiled")
            return sym(self.graph.symbols[expr])
        if not expr.args:
            return expr
        args = [self._translate(a) for a in expr.args]
        function = _FUNCTIONS.get(type(expr).__name__)
        if function is None:
            raise LoweringError(f"the size {expr} uses {type(expr).__name__}, which the IR does not have")
        return sympy.expand(function(*args))


_RECURRENT = {
    CAUSAL_CONV1D: "causal_conv1d",
    SELECTIVE_SCAN: "selective_scan",
    LINEAR_ATTENTION: "linear_attention",
}

_FUNCTIONS: dict[str, Any] = {
    "Add": sympy.Add, "Mul": sympy.Mul, "Pow": sympy.Pow, "Max": sympy.Max, "Min": sympy.Min,
    "FloorDiv": FloorDiv, "CleanDiv": FloorDiv, "Mod": Mod, "PythonMod": Mod,
}  # fmt: skip


def _attempt(rule: Rule, context: Context, args: Any, kwargs: Any) -> Result:
    """What a rule gives; None too where the IR refuses the operands, as for sizes that are equal at run time only."""
    try:
        return rule(context, *args, **kwargs)
    except (VerifyError, ParseError):
        return None


def _check_types(result: Value | tuple[Value, ...], outs: tuple[TensorType, ...]) -> None:
    """A rule must give what PyTorch gives: guards every rule, for every model."""
    values = (result,) if isinstance(result, Value) else result
    if len(values) != len(outs):
        raise LoweringError(f"the rule gives {len(values)} results, PyTorch {len(outs)}")
    for value, out in zip(values, outs, strict=True):
        same = value.dtype is out.dtype and value.type.rank == out.rank
        if not same or any(sympy.expand(a - b) != 0 for a, b in zip(value.shape, out.shape, strict=True)):
            raise LoweringError(f"the rule gives {value.type}, PyTorch {out}")


def _without_mutation(graph: CapturedGraph) -> fx.Graph:
    """The graph in functional form. Only exported graphs that write in place pay for the conversion."""
    exported = graph.exported
    if isinstance(exported, fx.GraphModule):
        return exported.graph
    if any(is_write(node) and overwritten(node) is None for node in exported.graph.nodes):
        exported = exported.run_decompositions({})
    mutated = {**exported.graph_signature.buffers_to_mutate, **exported.graph_signature.user_inputs_to_mutate}
    if mutated:
        raise LoweringError(
            f"{graph.name} writes to {', '.join(sorted(mutated.values()))} in its forward; only pure functions of the "
            "inputs can be compiled: compute a new tensor instead"
        )
    return exported.graph


def _live(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that outputs depend on through tensors: no assertions, no size queries."""
    nodes = list(nodes)
    live: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "output" or node in live or overwritten(node) in live:
            live.add(node)
            if not isinstance(node.meta.get("val"), torch.SymInt):
                live.update(node.all_input_nodes)
    return live


_PACKAGE = PurePath(__file__).parent
_TORCH = PurePath(torch.__file__).parent


def _loc(node: fx.Node) -> Loc:
    """Module path (less the wrapper that was exported) and the innermost source line that is not PyTorch's or ours."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    _, _, module = path.partition(".")
    source = ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        parts = line.strip().split(", ")
        if len(parts) < 2 or not parts[0].startswith('File "'):
            continue
        file = PurePath(parts[0][6:-1])
        if file.is_absolute() and not file.is_relative_to(_TORCH) and not file.is_relative_to(_PACKAGE):
            source = f"{file.name}:{parts[1].removeprefix('line ')}"
    return Loc(module, source)
