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
class Part:
    """One printed segment."""

    template: str
    scope: Scope
    programs: Expr


@dataclass(frozen=True)
class Body:
    """The printed segments of a kernel before they are put into functions. ``pointers`` name its operands and results,
    ``descriptors`` matrices that some of them point to."""

    op: Op
    pointers: tuple[tuple[str, str], ...]
    dims: tuple[str, ...]
    descriptors: tuple[Descriptor, ...]
    parts: tuple[Part, ...]

    @property
    def arguments(self) -> list[str]:
        return [*(name for name, _ in self.pointers), *self.dims, *(d.name for d in self.descriptors)]

    @property
    def tiles(self) -> Expr:
        """The number of tiles of all segments."""
        return sympy.expand(sum((p.programs for p in self.parts), Integer(0)))

    @property
    def header(self) -> str:
        """Comment lines that name the ops, the templates, and the model modules and source lines they come from."""
        op = self.op
        lines = [f"# {op.attr('name')}: {', '.join(o.opcode for o in op.body)}"]
        lines.append(f"#   as {', '.join(p.template for p in self.parts)}")
        origins = dict.fromkeys((o.loc.module, o.loc.source) for o in op.body if o.loc.module or o.loc.source)
        return "\n".join(
            [*lines, *(f"#   from {m or 'the model'} {source}".rstrip() for m, source in origins)]
        )

    def functions(self, name: str) -> str:
        """A function per segment, of the number of a tile and the kernel's arguments, below the header."""
        given = ", ".join(self.arguments)
        texts = [
            "\n".join(["@triton.jit", f"def {name}_{n}(pid, {given}):", *part.scope.lines])
            for n, part in enumerate(self.parts)
        ]
        return f"{self.header}\n" + "\n\n\n".join(texts)

    def dispatch(self, name: str, arguments: list[str], indent: str) -> list[str]:
        """Calls of the segments' functions, by tile number."""
        body, before = [], Integer(0)
        for number, part in enumerate(self.parts):
            first = "pid" if before == 0 else f"pid - ({print_index(before)})"
            call = f"{name}_{number}({first}, {', '.join(arguments)})"
            before = sympy.expand(before + part.programs)
            if number == len(self.parts) - 1:
                body.append(f"{indent}{call}")
                break
            body += [f"{indent}if pid < {print_index(before)}:", f"{indent}{INDENT}{call}", f"{indent}else:"]
            indent += INDENT
        return body


@dataclass(frozen=True)
class _Grid:
    """How programs come to tiles: one each, or, with ``walkers``, each takes every ``walkers``-th of all ``tiles``."""

    tiles: Expr
    walkers: int
    dependent: bool

    @staticmethod
    def of(tiles: Expr, walkers: int, dependent: bool) -> _Grid:
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
    plans = plan_parts(op, env.sizes)
    tiles = env.tiles(op, plans)
    walkers = max(t.persistent for t in tiles)
    # Where programs walk, they have waited before the first tile.
    body = print_body(op, env, plans, [replace(t, dependent=t.dependent and not walkers) for t in tiles])
    name = identifier(op.attr("name"))
    grid = _Grid.of(body.tiles, walkers, any(t.dependent for t in tiles))
    return KernelSource(
        name,
        _functions(body, name, grid, env.stored),
        body.pointers,
        body.dims,
        grid.programs,
        launch_options(tiles),
        tuple(p.template for p in body.parts),
        env.stored & set(body.dims),
        body.descriptors,
    )


def print_body(op: Op, env: Environment, plans: tuple[Plan, ...], tiles: list[Tile]) -> Body:
    """Print the segments of a ``kernel`` op with these tiles."""
    names = {v: f"p_{n}" for v, n in _pointer_names((*op.operands, *op.results)).items()}
    constants = env.constants.get(str(op.attr("name")), frozenset())
    pointers = Pointers(names, env.capacity, env.largest, constants)
    dims = _dims(op)
    blocks = {block for t in tiles for block in ((t.block_m, t.block_k), (t.block_n, t.block_k))}
    reserved = [
        *names.values(),
        *dims,
        *(argument_name(n, b) for n in names.values() for b in blocks),
        *env.helpers,
    ]
    parts = tuple(_print_part(p, t, env, pointers, reserved) for p, t in zip(plans, tiles, strict=True))
    types = tuple((names[v], POINTER_TYPES[v.dtype]) for v in (*op.operands, *op.results))
    return Body(op, types, dims, tuple(pointers.descriptors.values()), parts)


def launch_options(tiles: list[Tile]) -> tuple[tuple[str, int], ...]:
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


def _print_part(plan: Plan, tile: Tile, env: Environment, pointers: Pointers, reserved: list[str]) -> Part:
    scope = Scope(Names(reserved))
    shared = shared_nodes(plan.segment.nodes()) if plan.segment is not None else frozenset()
    context = Context(scope, pointers, {}, {}, shared)
    if tile.dependent and plan.template != "matmul":
        wait_for_predecessor(scope)  # a product first requests its weights
    return Part(plan.template, scope, plan.emit(tile, context, env.interpret))


def _functions(body: Body, name: str, grid: _Grid, stored: frozenset[str]) -> str:
    """The kernel's text. Several segments, or one whose tiles are walked, become a function each."""
    start = [*signature(name, body.arguments, body.dims, stored), *grid.lines()]
    if len(body.parts) == 1 and not grid.walkers:
        return "\n".join([body.header, *start, *body.parts[0].scope.lines])
    calls = body.dispatch(name, body.arguments, 2 * INDENT if grid.walkers else INDENT)
    return "\n\n\n".join([body.functions(name), "\n".join([*start, *calls])])


def signature(name: str, arguments: list[str], dims: tuple[str, ...], stored: frozenset[str]) -> list[str]:
    """The first lines of a kernel, which load the dims that are stored in memory."""
    unspecialised = ", ".join(f'"{d}"' for d in dims if d not in stored)
    decorator = f"@triton.jit(do_not_specialize=[{unspecialised}])" if unspecialised else "@triton.jit"
    given = [f"p_dim_{a}" if a in stored else a for a in arguments]
    loads = [f"{INDENT}{d} = tl.load(p_dim_{d})" for d in dims if d in stored]
    return [decorator, f"def {name}({', '.join(given)}):", *loads]
