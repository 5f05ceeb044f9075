"""One kernel op as Triton source: a function, and the facts that its launch and an offline compilation need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import sympy
from sympy import Expr, Integer

from tilewright.codegen.tunables import NONE, Changes, Tunables, tuned
from tilewright.ir.index import IndexMap
from tilewright.ir.module import Op, walk
from tilewright.ir.program import Program
from tilewright.ir.types import Value

from .candidates import interpreter_tile, ranked
from .cost_model import seconds, start_seconds
from .device import H100, Device
from .expression import Context, Pointers, shared_nodes
from .plan import Plan, plan_parts
from .pointwise_ops import POINTER_TYPES
from .text import INDENT, Names, Scope, identifier, print_index
from .tiling import Tile
from .work import Sizes, Work, sizes_of


@dataclass(frozen=True)
class Environment:
    """What printing a kernel depends on besides the kernel: capacity of T, largest dims, target, tuned sizes.

    stored: dims that kernels read from memory, so that a recorded launch (a CUDA graph) serves every size of them.
    """

    capacity: int
    largest: Mapping[str, int]
    interpret: bool = False
    tunables: Tunables = field(default_factory=dict)
    device: Device = H100
    stored: frozenset[str] = frozenset()

    @staticmethod
    def of(program: Program, interpret: bool, tunables: Tunables, device: Device) -> Environment:
        """The environment of a program's kernels."""
        largest = {name: high for name, _, high in program.symbols} | {"T": program.capacity}
        return Environment(program.capacity, largest, interpret, tunables, device)

    @property
    def sizes(self) -> Sizes:
        """Largest sizes; generation asks for one position's logits, so L counts as 1."""
        return sizes_of({**self.largest, "L": 1})

    def tiles(self, op: Op, plans: Sequence[Plan]) -> list[Tile]:
        """The tile of each segment: the default, changed where a tuner said so."""
        changes = self.tunables.get(str(op.attr("name")), NONE)
        return [tuned(self.default(plan.work), changes) for plan in plans]

    def default(self, work: Work) -> Tile:
        return interpreter_tile(work) if self.interpret else ranked(work, self.device)[0]


def candidates(op: Op, env: Environment, most: int = 6) -> tuple[Changes, ...]:
    """Ways to print a kernel that are worth a measurement: the default, then what the cost model puts next.

    They are tiles of the segment that takes longest; the other segments change with it.
    """
    plans = plan_parts(op, env.sizes)
    heaviest = max(plans, key=lambda plan: seconds(plan.work, env.default(plan.work), env.device))
    default, *others = ranked(heaviest.work, env.device)
    return (NONE, *(_differences(default, tile) for tile in others[: most - 1]))


def _differences(default: Tile, tile: Tile) -> Changes:
    named = ((f.name, getattr(default, f.name), getattr(tile, f.name)) for f in fields(Tile))
    return {name: int(new) for name, old, new in named if old != new}


def estimated_seconds(op: Op, env: Environment, dims: Mapping[str, int]) -> float:
    """The cost model's time of a kernel with the tiles that it is printed with, at the given sizes of the dims."""
    tiles = env.tiles(op, plan_parts(op, env.sizes))
    times = [
        seconds(plan.work, tile, env.device)
        for plan, tile in zip(plan_parts(op, sizes_of(dims)), tiles, strict=True)
    ]
    start = start_seconds(env.device)
    return start + sum(time - start for time in times)


def tiles_text(op: Op, env: Environment) -> str:
    """The tile of the segment that takes longest, for people."""
    plans = plan_parts(op, env.sizes)
    pairs = list(zip(plans, env.tiles(op, plans), strict=True))
    plan, tile = max(pairs, key=lambda pair: seconds(pair[0].work, pair[1], env.device))
    blocks = {"matmul": (tile.block_m, tile.block_n, tile.block_k), "attention": (tile.block_m, tile.block_n)}
    size = "x".join(map(str, blocks.get(plan.template, (tile.block_m, tile.block_n))))
    turned = " transposed" if tile.transposed else ""
    return f"{plan.template} {size}{turned}, {tile.num_warps} warps, {tile.num_stages} stages"


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
    pointers = Pointers(names, env.capacity, env.largest)
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
