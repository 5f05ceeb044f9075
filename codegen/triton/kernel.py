"""One kernel op as Triton source: a function, and the facts that its launch and an offline compilation need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sympy
from sympy import Expr, Integer

from tilewright.codegen.tunables import NONE, Tunables, tuned
from tilewright.ir.index import IndexMap
from tilewright.ir.loops import Node, Reduce, Segment, attention_form, scalarize
from tilewright.ir.module import Op, walk
from tilewright.ir.types import Value

from .attention import emit_attention
from .expression import Context, Pointers, shared_nodes
from .generic import emit_generic
from .matmul import Product, emit_matmul, find_product
from .pointwise import emit_pointwise
from .pointwise_ops import POINTER_TYPES
from .reduction import emit_reduction, row_symbols
from .row_loops import plan_stages
from .text import INDENT, Names, Scope, identifier, print_index
from .tiling import Tile, attention_tile, pointwise_tile, product_tile, reduction_tile, upper_bound


@dataclass(frozen=True)
class Environment:
    """What printing a kernel depends on besides the kernel: capacity of T, largest dims, target, tuned sizes."""

    capacity: int
    largest: Mapping[str, int]
    interpret: bool = False
    tunables: Tunables = field(default_factory=dict)


@dataclass(frozen=True)
class KernelSource:
    """A generated kernel. ``pointers`` and ``dims`` are its arguments in order: (name, element type) and names.
    ``options`` are Triton's launch options."""

    name: str
    text: str
    pointers: tuple[tuple[str, str], ...]
    dims: tuple[str, ...]
    programs: Expr
    options: tuple[tuple[str, int], ...]
    templates: tuple[str, ...]


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
    pointers = Pointers(names, env.capacity, env.largest)
    dims = _dims(op)
    reserved = [*names.values(), *dims]
    parts = _print_parts(op, env, pointers, reserved)
    name = identifier(op.attr("name"))
    arguments = [names[v] for v in (*op.operands, *op.results)] + list(dims)
    return KernelSource(
        name,
        _functions(op, name, arguments, dims, parts),
        tuple((names[v], POINTER_TYPES[v.dtype]) for v in (*op.operands, *op.results)),
        dims,
        sympy.expand(sum((p.programs for p in parts), Integer(0))),
        _options([p.tile for p in parts]),
        tuple(p.template for p in parts),
    )


def _options(tiles: list[Tile]) -> tuple[tuple[str, int], ...]:
    """Launch options that suit every segment. Contracting a * b + c to one rounding is wanted; Triton's default for it
    changes between versions."""
    options = {"num_warps": max(t.num_warps for t in tiles), "num_stages": max(t.num_stages for t in tiles)}
    options["enable_fp_fusion"] = True
    if registers := max(t.max_registers for t in tiles):
        options["maxnreg"] = registers
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


def _print_parts(op: Op, env: Environment, pointers: Pointers, reserved: list[str]) -> list[_Part]:
    form = attention_form(op)
    if form is not None:
        scope, context = _start(pointers, reserved)
        q, k = form.op.operands[:2]
        share = q.shape[1] / k.shape[1]
        queries, reach = (upper_bound(e, env.largest) for e in (q.shape[2] * share, k.shape[2]))
        tile = attention_tile(queries, reach, int(q.shape[3]), q.dtype.itemsize, env.interpret)
        tile = tuned(tile, env.tunables.get(op.attr("name"), NONE))
        return [_Part("attention", scope, emit_attention(form, tile, context, "pid", env.interpret), tile)]
    loops = scalarize(op)
    return [_print_segment(segment, loops.name, env, pointers, reserved) for segment in loops.segments]


def _start(
    pointers: Pointers, reserved: list[str], shared: frozenset[Node] = frozenset()
) -> tuple[Scope, Context]:
    scope = Scope(Names(reserved))
    return scope, Context(scope, pointers, {}, {}, shared)


def _print_segment(
    segment: Segment, name: str, env: Environment, pointers: Pointers, reserved: list[str]
) -> _Part:
    """Choose the template of a segment and print it."""
    scope, context = _start(pointers, reserved, shared_nodes(segment.nodes()))
    changes = env.tunables.get(name, NONE)
    extents = sympy.prod([a.extent for a in segment.axes], start=Integer(1))
    points = upper_bound(extents, env.largest)
    product = find_product(segment)
    if product is not None:
        tile = tuned(_product_tile(product, env), changes)
        return _Part(
            "matmul", scope, emit_matmul(product, segment, tile, context, "pid", env.interpret), tile
        )
    stages = plan_stages(segment, row_symbols(segment))
    if stages:
        tile = tuned(reduction_tile(points, _longest(segment), env.interpret), changes)
        return _Part("reduction", scope, emit_reduction(segment, stages, tile, context, "pid"), tile)
    tile = tuned(pointwise_tile(points, env.interpret), changes)
    if stages is None:
        return _Part("generic", scope, emit_generic(segment, tile, context, "pid"), tile)
    return _Part("pointwise", scope, emit_pointwise(segment, tile, context, "pid"), tile)


def _product_tile(product: Product, env: Environment) -> Tile:
    form, sizes = product.form, {**env.largest, "L": 1}
    rows, columns, k = (
        upper_bound(sympy.prod([a.extent for a in axes], start=Integer(1)), sizes)
        for axes in (form.rows, form.columns, (form.k,))
    )
    itemsize = form.dots[0].b.dtype.itemsize
    return product_tile(rows if form.rows else 0, columns, k, len(form.dots), itemsize, env.interpret)


def _longest(segment: Segment) -> int | None:
    """The longest reduced extent, None when one is known at run time only."""
    extents = [
        sympy.prod([a.extent for a in n.axes], start=Integer(1))
        for n in segment.nodes()
        if isinstance(n, Reduce)
    ]
    if not all(e.is_Integer for e in extents):
        return None
    return max(int(e) for e in extents)


def _functions(op: Op, name: str, arguments: list[str], dims: tuple[str, ...], parts: list[_Part]) -> str:
    """The kernel's text. Several segments become a function each, dispatched by program number."""
    header = "\n".join(_header(op, parts))
    unspecialised = ", ".join(f'"{d}"' for d in dims)
    decorator = f"@triton.jit(do_not_specialize=[{unspecialised}])" if dims else "@triton.jit"
    start = [decorator, f"def {name}({', '.join(arguments)}):"]
    if len(parts) == 1:
        return "\n".join([header, *start, f"{INDENT}pid = tl.program_id(0)", *parts[0].scope.lines])
    blocks = [header]
    for number, part in enumerate(parts):
        lines = ["@triton.jit", f"def {name}_{number}(pid, {', '.join(arguments)}):", *part.scope.lines]
        blocks.append("\n".join(lines))
    body, indent, before = [f"{INDENT}pid = tl.program_id(0)"], INDENT, Integer(0)
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
