"""One kernel op as Triton source: a function, and the facts that its launch and an offline compilation need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy
from sympy import Expr, Integer

from tilewright.ir.index import IndexMap
from tilewright.ir.module import Op, walk
from tilewright.ir.types import Value

from .dependence import wait_for_predecessor
from .descriptors import Descriptor, argument_name
from .environment import Environment
from .expression import Context, Pointers, shared_nodes
from .plan import Plan, plan_parts
from .pointwise_ops import POINTER_TYPES
from .text import INDENT, Names, Scope, identifier, print_index
from .tiling import Tile


@dataclass(frozen=True)
class KernelSource:
    """A generated kernel. ``pointers``, ``dims`` and ``descriptors`` are its arguments in order: (name, element type),
    names, and matrices that some of the pointers point to; of the dims, ``stored`` are passed as the address of an i32.
    ``options`` are Triton's launch options."""

    name: str
    text: str
    pointers: tuple[tuple[str, str], ...]
    dims: tuple[str, ...]
    programs: Expr
    options: tuple[tuple[str, int], ...]
    templates: tuple[str, ...]
    stored: frozenset[str] = frozenset()
    descriptors: tuple[Descriptor, ...] = ()


@dataclass(frozen=True)
class _Part:
    """One printed segment."""

    template: str
    scope: Scope
    programs: Expr


@dataclass(frozen=True)
class _Grid:
    """How programs come to tiles: one each, or, with ``walkers``, each takes every ``walkers``-th of all ``tiles``."""

    tiles: Expr
    walkers: int
    dependent: bool

    @staticmethod
    def of(parts: Iterable[_Part], walkers: int, dependent: bool) -> _Grid:
        tiles = sympy.expand(sum((p.programs for p in parts), Integer(0)))
        # The grid of a number of tiles that is known at run time only may be larger than that: some find no tile.
        return _Grid(tiles, min(walkers, int(tiles)) if tiles.is_Integer else walkers, dependent)

    @property
    def programs(self) -> Expr:
        return Integer(self.walkers) if self.walkers else self.tiles

    def lines(self) -> list[str]:
        """The begin of the kernel's body: its ``pid``, the number of a tile."""
        scope = Scope(Names())
        if not self.walkers:
            scope.line("pid = tl.program_id(0)")
            return scope.lines
        if self.dependent:
            wait_for_predecessor(scope)
        # Flattened, the loads of the next tile are under way while this one's results are stored.
        steps = f"tl.program_id(0), {print_index(self.tiles)}, {self.walkers}"
        scope.line(f"for pid in tl.range({steps}, flatten=True):")
        return scope.lines


def print_kernel(op: Op, env: Environment) -> KernelSource:
    """Print a ``kernel`` op. Raises VerifyError when it has no loop form."""
    names = {v: f"p_{n}" for v, n in _pointer_names((*op.operands, *op.results)).items()}
    constants = env.constants.get(str(op.attr("name")), frozenset())
    pointers = Pointers(names, env.capacity, env.largest, constants)
    dims = _dims(op)
    plans = plan_parts(op, env.sizes)
    tiles = env.tiles(op, plans)
    walkers = max(t.persistent for t in tiles)
    blocks = {block for t in tiles for block in ((t.block_m, t.block_k), (t.block_n, t.block_k))}
    reserved = [*names.values(), *dims, *(argument_name(n, b) for n in names.values() for b in blocks)]
    parts = [
        # Where programs walk, they have waited before the first tile.
        _print_part(p, replace(t, dependent=t.dependent and not walkers), env, pointers, reserved)
        for p, t in zip(plans, tiles, strict=True)
    ]
    name = identifier(op.attr("name"))
    descriptors = tuple(pointers.descriptors.values())
    arguments = [names[v] for v in (*op.operands, *op.results)] + [*dims, *(d.name for d in descriptors)]
    grid = _Grid.of(parts, walkers, any(t.dependent for t in tiles))
    return KernelSource(
        name,
        _functions(op, name, arguments, dims, parts, grid, env.stored),
        tuple((names[v], POINTER_TYPES[v.dtype]) for v in (*op.operands, *op.results)),
        dims,
        grid.programs,
        _options(tiles),
        tuple(p.template for p in parts),
        env.stored & set(dims),
        descriptors,
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
    return _Part(plan.template, scope, plan.emit(tile, context, env.interpret))


def _functions(
    op: Op,
    name: str,
    arguments: list[str],
    dims: tuple[str, ...],
    parts: list[_Part],
    grid: _Grid,
    stored: frozenset[str],
) -> str:
    """The kernel's text. Several segments, or one whose tiles are walked, become a function each."""
    header = "\n".join(_header(op, parts))
    unspecialised = ", ".join(f'"{d}"' for d in dims if d not in stored)
    decorator = f"@triton.jit(do_not_specialize=[{unspecialised}])" if unspecialised else "@triton.jit"
    given = [f"p_dim_{a}" if a in stored else a for a in arguments]
    start = [decorator, f"def {name}({', '.join(given)}):"]
    start += [f"{INDENT}{d} = tl.load(p_dim_{d})" for d in dims if d in stored]
    start += grid.lines()
    if len(parts) == 1 and not grid.walkers:
        return "\n".join([header, *start, *parts[0].scope.lines])
    blocks = [header]
    for number, part in enumerate(parts):
        lines = ["@triton.jit", f"def {name}_{number}(pid, {', '.join(arguments)}):", *part.scope.lines]
        blocks.append("\n".join(lines))
    body = _dispatch(name, arguments, parts, 2 * INDENT if grid.walkers else INDENT)
    blocks.append("\n".join([*start, *body]))
    return "\n\n\n".join(blocks).replace(f"{header}\n\n\n", f"{header}\n", 1)


def _dispatch(name: str, arguments: list[str], parts: list[_Part], indent: str) -> list[str]:
    """Calls of the segments' functions, by tile number."""
    body, before = [], Integer(0)
    for number, part in enumerate(parts):
        first = "pid" if before == 0 else f"pid - ({print_index(before)})"
        call = f"{name}_{number}({first}, {', '.join(arguments)})"
        before = sympy.expand(before + part.programs)
        if number == len(parts) - 1:
            body.append(f"{indent}{call}")
            break
        body += [f"{indent}if pid < {print_index(before)}:", f"{indent}{INDENT}{call}", f"{indent}else:"]
        indent += INDENT
    return body


def _header(op: Op, parts: list[_Part]) -> list[str]:
    """Comment lines that name the ops, the templates, and the model modules and source lines they come from."""
    lines = [f"# {op.attr('name')}: {', '.join(o.opcode for o in op.body)}"]
    lines.append(f"#   as {', '.join(p.template for p in parts)}")
    origins = dict.fromkeys((o.loc.module, o.loc.source) for o in op.body if o.loc.module or o.loc.source)
    lines += [f"#   from {module or 'the model'} {source}".rstrip() for module, source in origins]
    return lines
