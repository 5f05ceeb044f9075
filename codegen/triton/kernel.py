"""One kernel op as Triton source: a function, and the facts that its launch and an offline compilation need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from sympy import Expr, Integer

from tilewright.ir.index import IndexMap
from tilewright.ir.module import Op, walk
from tilewright.ir.types import Value

from .dependence import wait_for_predecessor
from .environment import Environment
from .expression import Context, Pointers, shared_nodes
from .plan import Plan, plan_parts
from .pointwise_ops import POINTER_TYPES
from .text import INDENT, Names, Scope, identifier, print_index
from .tiling import Tile


@dataclass(frozen=True)
class KernelSource:
    """A generated kernel. ``pointers`` and ``dims`` are its arguments in order: (name, element type) and names; of the
    dims, ``stored`` are passed as the address of an i32. ``options`` are Triton's launch options."""

    name: str
    text: str
    pointers: tuple[tuple[str, str], ...]
    dims: tuple[str, ...]
    programs: Expr
    options: tuple[tuple[str, int], ...]
    templates: tuple[str, ...]
    stored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Part:
    """One printed segment."""

    template: str
    scope: Scope
    programs: Expr
    tile: Tile


def print_kernel(op: Op, env: Environment) -> KernelSource:
    """Print a ``kernel`` op. Raises VerifyError when it has no loop form."""
    names = {v: f"p_{n}" for v, n in _pointer_names((*op.operands, *op.results)).items()}
    constants = env.constants.get(str(op.attr("name")), frozenset())
    pointers = Pointers(names, env.capacity, env.largest, constants)
    dims = _dims(op)
    reserved = [*names.values(), *dims]
    plans = plan_parts(op, env.sizes)
    parts = [
        _print_part(p, t, env, pointers, reserved) for p, t in zip(plans, env.tiles(op, plans), strict=True)
    ]
    name = identifier(op.attr("name"))
    arguments = [names[v] for v in (*op.operands, *op.results)] + list(dims)
    return KernelSource(
        name,
        _functions(op, name, arguments, dims, parts, env.stored),
        tuple((names[v], POINTER_TYPES[v.dtype]) for v in (*op.operands, *op.results)),
        dims,
        sympy.expand(sum((p.programs for p in parts), Integer(0))),
        _options([p.tile for p in parts]),
        tuple(p.template for p in parts),
        env.stored & set(dims),
    )


def _options(tiles: list[Tile]) -> tuple[tuple[str, int], ...]:
    """Launch options that suit every segment. Contracting a * b + c to one rounding is wanted; Triton's default for it
    changes between versions."""
    options = {"num_warps": max(t.num_warps for t in tiles), "num_stages": max(t.num_stages for t in tiles)}
    options["enable_fp_fusion"] = True
    if registers := max(t.max_registers for t in tiles):
        options["maxnreg"] = registers
    if any(t.dependent for t in tiles):
        options["launch_pdl"] = True
    return tuple(options.items())


def _pointer_names(values: Iterable[Value]) -> dict[Value, str]:
    names = Names()
    return {v: names.fresh(v.name) for v in values}


def _dims(op: Op) -> tuple[str, ...]:
    """Run-time dims that any shape, dim or index map of the kernel mentions."""
    exprs: list[Expr] = [d for v in (*op.operands, *op.results) for d in v.shape]
    for inner in walk(op.body):
        exprs += [d for v in inner.results for d in v.shape]
        for _, value in inner.attrs:
            exprs += (
                list(value.exprs)
                if isinstance(value, IndexMap)
                else [value]
                if isinstance(value, Expr)
                else []
            )
    return tuple(sorted({s.name for e in exprs for s in e.free_symbols if s.name[:1].isupper()}))


def _print_part(plan: Plan, tile: Tile, env: Environment, pointers: Pointers, reserved: list[str]) -> _Part:
    scope = Scope(Names(reserved))
    shared = shared_nodes(plan.segment.nodes()) if plan.segment is not None else frozenset()
    context = Context(scope, pointers, {}, {}, shared)
    if tile.dependent and plan.template != "matmul":
        wait_for_predecessor(scope)  # a product first requests its weights
    return _Part(plan.template, scope, plan.emit(tile, context, env.interpret), tile)


def _functions(
    op: Op, name: str, arguments: list[str], dims: tuple[str, ...], parts: list[_Part], stored: frozenset[str]
) -> str:
    """The kernel's text. Several segments become a function each, dispatched by program number."""
    header = "\n".join(_header(op, parts))
    unspecialised = ", ".join(f'"{d}"' for d in dims if d not in stored)
    decorator = f"@triton.jit(do_not_specialize=[{unspecialised}])" if unspecialised else "@triton.jit"
    given = [f"p_dim_{a}" if a in stored else a for a in arguments]
    start = [decorator, f"def {name}({', '.join(given)}):"]
    start += [f"{INDENT}{d} = tl.load(p_dim_{d})" for d in dims if d in stored]
    start.append(f"{INDENT}pid = tl.program_id(0)")
    if len(parts) == 1:
        return "\n".join([header, *start, *parts[0].scope.lines])
    blocks = [header]
    for number, part in enumerate(parts):
        lines = ["@triton.jit", f"def {name}_{number}(pid, {', '.join(arguments)}):", *part.scope.lines]
        blocks.append("\n".join(lines))
    body, indent, before = [], INDENT, Integer(0)
    for number, part in enumerate(parts):
        call = f"{name}_{number}(pid - ({print_index(before)}), {', '.join(arguments)})"
        before = sympy.expand(before + part.programs)
        if number == len(parts) - 1:
            body.append(f"{indent}{call}")
            break
        body += [f"{indent}if pid < {print_index(before)}:", f"{indent}{INDENT}{call}", f"{indent}else:"]
        indent += INDENT
    blocks.append("\n".join([*start, *body]))
    return "\n\n\n".join(blocks).replace(f"{header}\n\n\n", f"{header}\n", 1)


def _header(op: Op, parts: list[_Part]) -> list[str]:
    """Comment lines that name the ops, the templates, and the model modules and source lines they come from."""
    lines = [f"# {op.attr('name')}: {', '.join(o.opcode for o in op.body)}"]
    lines.append(f"#   as {', '.join(p.template for p in parts)}")
    origins = dict.fromkeys((o.loc.module, o.loc.source) for o in op.body if o.loc.module or o.loc.source)
    lines += [f"#   from {module or 'the model'} {source}".rstrip() for module, source in origins]
    return lines
