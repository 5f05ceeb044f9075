"""What a pass is: a named function from module to module, with the reason why it stands where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tilewright.ir.builder import Builder
from tilewright.ir.module import Function, Module, Names, Op
from tilewright.ir.types import Value


@dataclass(frozen=True)
class PassOptions:
    """What the passes need to know of the program that is being built.

    fixed: dims that are constants in it (decode: S=1, L=1). last_tokens: keep the logits of the last L positions.
    splits: chunks of the context in decode attention; 0 leaves attention whole. multiprocessors: of the GPU that
    products of a decode step are split over K to fill; 0 leaves products whole. vendor_matmul: products with weights go
    to the vendor's library. weights: "int8", "int4" or "fp8" for the weights of products, "" for their own dtype.
    row_block: rows of integer weights that are interleaved. activation_group: activations that share a scale where a
    product with integer weights rounds them to int8; 0 keeps them. round_rows: which of these products read them
    rounded, by a kernel that does it once for all of its tiles of columns: "all", "bytes" for those whose weights are
    int8 with one scale to a row, or "" for none. keep_wide: full names of weights that cannot be
    quantised. kv_cache: element type in which keys and values are kept where it is narrower than their own; "" for
    that. spell_out_experts: experts become ordinary ops, for a backend that has no kernel for them.
    group_experts: most rows of the blocks in which tokens are multiplied that chose the same expert; 0 groups none.
    plain_rows: products read their rows from memory as they are multiplied: what prepares rows (a norm) is a kernel of
    its own, which pays where each row is read for many tiles of columns. plain_weights: the same of weights that are
    made of codes, which pays where each is read for many tiles of rows.
    """

    fixed: tuple[tuple[str, int], ...] = ()
    last_tokens: bool = False
    splits: int = 0
    multiprocessors: int = 0
    vendor_matmul: bool = False
    weights: str = ""
    row_block: int = 1
    activation_group: int = 0
    round_rows: str = ""
    keep_wide: tuple[str, ...] = ()
    kv_cache: str = ""
    spell_out_experts: bool = False
    group_experts: int = 0
    plain_rows: bool = False
    plain_weights: bool = False


@dataclass(frozen=True)
class Pass:
    """A pass. ``run`` takes and gives a valid module and mutates nothing."""

    name: str
    run: Callable[[Module, PassOptions], Module]
    reason: str


def per_function(rewrite: Callable[[Function], Function]) -> Callable[[Module, PassOptions], Module]:
    """A pass that treats every function by itself. Those that prepare weights are left alone: they run once, and the
    names of what they return are what they are called for."""

    def run(module: Module, options: PassOptions) -> Module:
        return module.with_functions(
            f if f.name.endswith(".weights") else rewrite(f) for f in module.functions
        )

    return run


class Rewriter(Builder):
    """Builds a new list of ops for one function: keep ops as they are, add new ones, replace values by others.

    Iterated over, it gives the function's ops one by one; what is added meanwhile stands at that op's location.
    """

    def __init__(self, function: Function) -> None:
        super().__init__(Names.of(function))
        self.function = function
        self.table: dict[Value, Value] = {}

    def __iter__(self) -> Iterator[Op]:
        """The function's ops with the replacements made so far applied to their operands."""
        for op in self.function.ops:
            self.loc = op.loc
            yield op.with_operands(self.table)

    def keep(self, op: Op) -> None:
        self.ops.append(op)

    def replace(self, old: Value, new: Value) -> None:
        """Use ``new`` wherever ``old`` is used from here on."""
        self.table[old] = new

    def finish(self) -> Function:
        """The rewritten function."""
        return self.function.with_ops(self.ops).substitute(self.table)


def parameters_first(ops: Iterable[Op]) -> list[Op]:
    """Ops with every ``param`` moved to the front, so that any later op may use any weight."""
    ops = list(ops)
    return [op for op in ops if op.opcode == "param"] + [op for op in ops if op.opcode != "param"]
