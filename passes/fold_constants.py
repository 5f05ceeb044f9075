"""Evaluates what is known at compile time: constants here, expressions over weights once at load.

    %a = const {value = 2.0} : f32[]
    %b = const {value = 0.5} : f32[]
    %c = mul %a, %b : f32[]                =>      %c = const {value = 1.0} : f32[]

    func @layer0(..) {                             func @layer0(..) {
      %q = param {name = "q.weight"}                 %w = param {name = "prepared.w"} : f32[1152, 576]
      %k = param {name = "k.weight"}       =>      }
      %w = concat %q, %k {axis = 0}                func @layer0.weights() -> (%prepared.w) { .. concat .. }
    }

A function ``f.weights`` computes the prepared weights of ``f``; each value that it returns is named after the ``param``
that stands for it. The compiler runs it once per call scope. Views and casts of weights are not prepared (a kernel
reads through them for free), except the operand that a matmul streams, whose memory layout decides its speed, what
arithmetic reads along another axis than the weight's last (a loop would jump through it), and what a primitive such as
attention reads, which has to lie in memory as it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from torch import Tensor

from tilewright.ir.index import index_symbols
from tilewright.ir.loops import PRIMITIVES
from tilewright.ir.module import Function, Module, Names, Op, make_attrs
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.reference import Evaluation
from tilewright.ir.types import Value

from .base import PassOptions, Rewriter


def fold_constants(module: Module, options: PassOptions) -> Module:
    """Fold scalar constants, then hoist weight expressions into ``.weights`` functions."""
    out: list[Function] = []
    existing = {f.name: f for f in module.functions if f.name.endswith(".weights")}
    for function in module.functions:
        if function.name in existing:
            continue
        folded, prepared = _hoist(_fold_scalars(module, function), existing.get(f"{function.name}.weights"))
        out += [folded] + ([prepared] if prepared is not None else [])
    return module.with_functions(out)


def _fold_scalars(module: Module, function: Function) -> Function:
    rewriter = Rewriter(function)
    constants: dict[Value, Op] = {}
    for op in rewriter:
        if op.opcode in POINTWISE and op.operands and all(v in constants for v in op.operands):
            run = Evaluation(module, {}, {})
            env: dict[Value, Tensor] = {}
            for v in op.operands:
                run.run(constants[v], env, "")
            run.run(op, env, "")
            value = env[op.result].item()
            op = Op("const", (), make_attrs({"value": value}), op.results, op.loc)
        if op.opcode == "const":
            constants[op.result] = op
        rewriter.keep(op)
    return rewriter.finish()


def _weight_only(function: Function) -> set[Value]:
    """Values computed from weights and constants alone, with no run-time dim."""
    known: set[Value] = set()
    for op in function.ops:
        pure = op.opcode in POINTWISE or op.opcode in (
            "view",
            "concat",
            "gather",
            "reduce",
            "matmul",
            "const",
            "param",
        )
        fixed = all(d.is_Integer for v in op.results for d in v.shape)
        if pure and fixed and all(v in known for v in op.operands):
            known.update(op.results)
    return known


def _size(value: Value) -> int:
    return int(value.type.numel)


def _hoist(function: Function, earlier: Function | None) -> tuple[Function, Function | None]:
    known = _weight_only(function)
    made = function.definitions()
    users = function.users()

    def streams(value: Value) -> bool:
        return any(
            u.opcode in PRIMITIVES or (u.opcode == "matmul" and u.operands[1] == value)
            for u in users.get(value, [])
        )

    def worth(value: Value) -> bool:
        op = made[value]
        if value not in known or op.opcode in ("param", "const"):
            return False
        sources = [o for o in _slice(value, made) if o.opcode == "param"]
        if not sources or _size(value) > sum(_size(o.result) for o in sources):
            return False
        if op.opcode not in ("view", "cast") or streams(value):
            return True
        return _is_transposed(op) and any(u.opcode in POINTWISE for u in users.get(value, ()))

    roots = [v for op in function.ops for v in op.results if worth(v)]
    roots = [
        v
        for v in roots
        if streams(v) or v in function.returns or any(set(u.results) - known for u in users.get(v, ()))
    ]
    inner = {o.result for v in roots for o in _slice(v, made)} - set(roots)
    if not roots:
        return function, earlier
    taken = {v.name for v in earlier.returns} if earlier else set()
    named = {v: Value(_name(v, made, taken), v.type) for v in roots}
    hoisted = [op for op in function.ops if any(o in inner or o in named for o in op.results)]
    prepared = _append(function, hoisted, named, earlier)
    kept = [
        Op("param", (), make_attrs({"name": named[op.result].name}), op.results, op.loc)
        if op.results and op.results[0] in named
        else op
        for op in function.ops
    ]
    return function.with_ops(kept), prepared


def _is_transposed(op: Op) -> bool:
    """Whether a view's last axis is another axis of what it is of than the last."""
    if op.opcode != "view" or op.result.type.rank < 2:
        return False
    *others, last = op.attr("map").exprs
    inner = index_symbols(op.result.type.rank)[-1]
    return inner not in last.free_symbols and any(inner in e.free_symbols for e in others)


def _slice(value: Value, made: dict[Value, Op]) -> list[Op]:
    """The ops that compute ``value``, in order."""
    seen: dict[Value, Op] = {}
    todo = [value]
    while todo:
        v = todo.pop()
        if v not in seen:
            seen[v] = made[v]
            todo += made[v].operands
    return list(seen.values())


def _name(value: Value, made: dict[Value, Op], taken: set[str]) -> str:
    """The weights that went in, and a digest of what is done with them: two phases of a model share the prepared
    weights that bear one name, so equal names must mean equal expressions."""
    sources = [str(o.attr("name")) for o in _slice(value, made) if o.opcode == "param"]
    stem = f"prepared.{'__'.join(dict.fromkeys(reversed(sources)))}.{_digest(value, made, {})[:6]}"
    name, n = stem, 1
    while name in taken:
        name, n = f"{stem}.{n}", n + 1
    taken.add(name)
    return name


def _digest(value: Value, made: dict[Value, Op], known: dict[Value, str]) -> str:
    """A digest of the expression behind a value, whatever its values are called."""
    if value not in known:
        op = made[value]
        operands = [_digest(v, made, known) for v in op.operands]
        attrs = [f"{key} = {attr}" for key, attr in op.attrs]
        text = f"{op.opcode} {operands} {attrs} {value.type} {op.results.index(value)}"
        known[value] = hashlib.sha256(text.encode()).hexdigest()
    return known[value]


def _append(
    function: Function, ops: list[Op], named: dict[Value, Value], earlier: Function | None
) -> Function:
    """The ``.weights`` function with more ops; ``named`` gives the values that it returns for them."""
    before = earlier or Function(f"{function.name}.weights", (), (), ())
    ready = {v.name: v for v in before.returns}
    names = Names.of(before)
    names.taken |= {v.name for v in named.values()}
    table = dict(named)
    added: list[Op] = []
    for op in ops:
        op = op.with_operands(table)
        if op in before.ops and not any(v in named for v in op.results):
            continue
        if op.opcode == "param" and op.attr("name") in ready:  # prepared by an earlier run
            table[op.result] = ready[op.attr("name")]
            continue
        for v in op.results:
            table.setdefault(v, Value(names.fresh(v.name), v.type))
        added.append(replace(op, results=tuple(table[v] for v in op.results)))
    return Function(before.name, (), (*before.ops, *added), (*before.returns, *named.values()))
