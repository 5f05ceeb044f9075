"""The verifier of modules: SSA form, types, attributes, kernel bodies, calls. Runs after every pass by default."""

from __future__ import annotations

from functools import lru_cache

import sympy

from .errors import VerifyError
from .index import IndexMap, extents_of, sym
from .module import Function, Module, Op
from .ops import infer_types
from .types import Value

Shape = tuple[sympy.Expr, ...]


def verify_module(module: Module) -> None:
    """Raise VerifyError, naming function, op and source, at the first broken rule."""
    names = [f.name for f in module.functions]
    if len(set(names)) != len(names):
        raise VerifyError(f"functions share a name: {sorted(names)}")
    if module.entry not in names:
        raise VerifyError(f"there is no function @{module.entry}")
    symbols = {name for name, low, high in module.symbols}
    for name, low, high in module.symbols:
        if not 0 <= low <= high:
            raise VerifyError(f"symbol {name} has an empty range [{low}, {high}]")
    for function in module.functions:
        _verify_function(function, module, symbols)
    _verify_call_order(module)


def _verify_function(function: Function, module: Module, symbols: set[str]) -> None:
    defined: dict[str, Value] = {}

    def define(value: Value, where: str) -> None:
        if value.name in defined:
            raise VerifyError(f"@{function.name}: %{value.name} is defined twice ({where})")
        unknown = {s.name for d in value.shape for s in d.free_symbols} - symbols
        if unknown:
            raise VerifyError(
                f"@{function.name}: %{value.name} uses undeclared dims {sorted(unknown)} ({where})"
            )
        defined[value.name] = value

    def visit(op: Op, inside: str) -> None:
        where = f"{op.opcode}{inside} {op.loc.module} {op.loc.source}".strip()
        for v in op.operands:
            if defined.get(v.name) != v:
                raise VerifyError(f"@{function.name}: {where}: operand {v} is not defined before its use")
        try:
            _verify_op(op, module, symbols)
        except VerifyError as error:
            message = str(error).removeprefix(f"{op.opcode}: ")  # which ``where`` says, with more
            raise VerifyError(f"@{function.name}: {where}: {message}") from error
        if op.opcode == "kernel":
            for inner in op.body:
                if inner.opcode in ("kernel", "call", "call_torch"):
                    raise VerifyError(f"@{function.name}: {where}: a kernel cannot contain {inner.opcode}")
                visit(inner, f" in kernel {op.attr('name')}")
            _verify_kernel(op, f"@{function.name}: {where}")
        else:
            for v in op.results:
                define(v, where)

    for p in function.params:
        define(p, "parameter")
    hidden: set[str] = set()
    for op in function.ops:
        if used := hidden & {v.name for v in op.operands}:
            raise VerifyError(
                f"@{function.name}: {op.opcode} uses {sorted(used)}, which stay inside a kernel"
            )
        visit(op, "")
        hidden |= {r.name for o in op.body for r in o.results} - {r.name for r in op.results}
    for v in function.returns:
        if defined.get(v.name) != v or v.name in hidden:
            raise VerifyError(f"@{function.name}: returned {v} is not defined")


def _verify_op(op: Op, module: Module, dims: set[str]) -> None:
    inferred = infer_types(op, module)
    if inferred is not None:
        declared = tuple(v.type for v in op.results)
        if declared != inferred:
            expected, found = ", ".join(map(str, inferred)), ", ".join(map(str, declared))
            raise VerifyError(f"result types are {found}; they follow as {expected}")
    if op.opcode == "view":
        index_map = op.attr("map")
        used = {s for e in index_map.exprs for s in e.free_symbols} - set(extents_of(op.result.shape))
        if stray := {s.name for s in used} - dims:
            raise VerifyError(f"index map uses {sorted(stray)}")
        _verify_reach(index_map, op.operands[0].shape, op.result.shape, module.symbols)
    if op.opcode == "dim" and (stray := {s.name for s in op.attr("expr").free_symbols} - dims):
        raise VerifyError(f"expr uses undeclared dims {sorted(stray)}")
    if bool(op.body) != (op.opcode == "kernel"):
        raise VerifyError("exactly the kernel ops have a body")


@lru_cache(maxsize=4096)
def _verify_reach(
    index_map: IndexMap, source: Shape, target: Shape, symbols: tuple[tuple[str, int, int], ...]
) -> None:
    """Try the first and last result index at the largest dims. (At the smallest, ``x[1]`` of a dim that may be 1 is an
    error of the caller's, as in eager.)"""
    sizes = {sym(n): sympy.Integer(high) for n, _, high in symbols}
    extents = [d.xreplace(sizes) for d in target]
    if not all(d.is_Integer and d > 0 for d in extents):
        return
    for corner in ([sympy.Integer(0)] * len(extents), [d - 1 for d in extents]):
        at = sizes | dict(zip(index_map.symbols, corner, strict=True))
        for expr, size in zip(index_map.exprs, source, strict=True):
            index, extent = expr.xreplace(at), size.xreplace(sizes)
            if index.is_Integer and extent.is_Integer and not 0 <= index < extent:
                raise VerifyError(f"index map {index_map} reaches {index}, outside its operand's dim {size}")


def _verify_kernel(op: Op, where: str) -> None:
    made = {v for inner in op.body for v in inner.results}
    used = {v for inner in op.body for v in inner.operands} - made
    if used != set(op.operands):
        raise VerifyError(f"{where}: operands must be exactly the outer values that the body uses")
    if len(set(op.operands)) != len(op.operands):
        raise VerifyError(f"{where}: an operand is listed twice")
    for v in op.results:
        if v not in made:
            raise VerifyError(f"{where}: result {v} is not made by the body")


def _verify_call_order(module: Module) -> None:
    """Calls must not recurse: only the entry may call, and never itself."""
    for function in module.functions:
        for op in function.ops:
            if op.opcode == "call" and (function.name != module.entry or op.attr("callee") == module.entry):
                raise VerifyError(f"@{function.name}: only the entry function calls others")
