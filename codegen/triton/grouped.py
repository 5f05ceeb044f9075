"""Products of blocks of rows with a matrix for each block: experts of many tokens.

A program multiplies one block of the order by expert with a tile of that expert's columns, and gathers its rows where
the order says. Blocks of one tile of columns are neighbours in time, as are those of one expert: one of them brings the
weights to the second-level cache for all. Blocks that hold nobody end at once, and what pads a run is masked.
"""

from __future__ import annotations

from sympy import Expr

from tilewright.ir.errors import VerifyError
from tilewright.ir.index import sym
from tilewright.ir.loops import Apply, Axis, Dot, Load, Node, Store
from tilewright.ir.module import Op

from .expression import Block, Context, Operand
from .pointwise_ops import TRITON_TYPES, compute_dtype
from .product import index_range, multiply_add
from .row_loops import K, KBlock
from .text import Scope, ceil_div, print_index
from .tiling import Tile

PAIR, ROW, N, EXPERT = (sym(n) for n in ("pair", "row", "n", "expert"))


def emit_grouped(op: Op, tile: Tile, context: Context, pid: str, interpret: bool) -> Expr:
    """Emit the kernel into ``context.base``. Returns the number of programs.

    Raises VerifyError for blocks that tensor cores have no form for: a power of two, 16 at least.
    """
    block = int(op.attr("block"))
    if block < 16 or block & (block - 1):
        raise VerifyError(f"blocks of {block} rows have no Triton form: take 16, 32, 64, ..")
    return _Grouped(op, tile, context, interpret).emit(pid)


class _Grouped:
    def __init__(self, op: Op, tile: Tile, context: Context, interpret: bool) -> None:
        self.op, self.tile, self.context, self.interpret = op, tile, context, interpret
        self.base, self.names = context.base, context.pointers.names
        self.x, self.order, self.block_expert, self.weights, *self.bias = op.operands
        self.pairs, self.columns = op.result.shape
        self.block_m = self.base.constant("BLOCK_M", int(op.attr("block")))
        self.block_n = self.base.constant("BLOCK_N", tile.block_n)
        self.block_k = self.base.constant("BLOCK_K", tile.block_k)
        lanes = ("[None, :]", "[:, None]") if tile.transposed else ("[:, None]", "[None, :]")
        self.row_lanes, self.column_lanes = lanes

    def emit(self, pid: str) -> Expr:
        base, count = self.base, self.block_expert.shape[0]
        blocks = base.bind(print_index(count), "blocks")
        block, tile = base.bind(f"{pid} % {blocks}", "block"), base.bind(f"{pid} // {blocks}", "tile")
        expert = base.bind(f"tl.load({self.names[self.block_expert]} + {block})", "expert")
        scope = base.open(f"if {expert} < {int(self.weights.shape[0])}:")
        known = self._known(scope, block, tile, expert)
        dot = self._multiply(scope, known)
        value: Node = dot
        for bias in self.bias:
            value = Apply(dot.dtype, "add", (dot, Load(bias.dtype, bias, (EXPERT, N))))
        known.store(Store(self.op.result, (PAIR, N), value), scope, (PAIR, N))
        base.close(scope)
        return count * ceil_div(self.columns, self.tile.block_n)

    def _known(self, scope: Scope, block: str, tile: str, expert: str) -> Context:
        """A context that knows the program's pairs, their rows of x, its columns and its expert."""
        place = f"{self.names[self.order]} + {block} * {self.block_m} + tl.arange(0, {self.block_m})"
        pair = scope.bind(f"tl.load({place}){self.row_lanes}", "pair")
        ok = scope.bind(f"{pair} < {print_index(self.pairs)}", "pair_ok")
        divisor = int(self.op.attr("divisor", 1))
        row = scope.bind(f"{pair} // {divisor}", "row") if divisor > 1 else pair
        n = index_range(scope, "n", tile, self.block_n, self.tile.block_n, self.columns, self.column_lanes)
        blocks = {
            PAIR: Block(pair, ok, scope, self.pairs),
            ROW: Block(row, ok, scope, self.x.shape[0]),
            N: n,
            EXPERT: Block(expert, "", scope, self.weights.shape[0]),
        }
        return self.context.extended({s: s for s in (*blocks, K)}, blocks)

    def _multiply(self, scope: Scope, known: Context) -> Dot:
        """The product, bound in ``known`` to the variable that sums it."""
        x, weights, depth = self.x, self.weights, self.x.shape[1]
        a = Load(x.dtype, x, (ROW, K))
        b = Load(weights.dtype, weights, (EXPERT, K, N) if self.op.attr("transposed") else (EXPERT, N, K))
        dot = Dot(x.dtype, a, b, Axis(K, depth))
        acc = scope.names.fresh("acc")
        sizes = [self.block_n, self.block_m] if self.tile.transposed else [self.block_m, self.block_n]
        scope.line(f"{acc} = tl.zeros([{', '.join(sizes)}], {TRITON_TYPES[compute_dtype(x.dtype)]})")
        k = KBlock(self.block_k, self.tile.block_k, depth)
        loop = scope.open(f"for start in range(0, {print_index(depth)}, {self.block_k}):")
        rows = known.extended({}, {K: k.index(loop, "start", self.column_lanes)})
        columns = known.extended({}, {K: k.index(loop, "start", self.row_lanes, "kb")})
        left, right = rows.load(a, convert=False).text, columns.load(b, convert=False).text
        if self.tile.transposed:
            left, right = right, left
        loop.line(f"{acc} = {multiply_add(left, right, acc, x.dtype, self.interpret)}")
        scope.close(loop)
        known.bound[dot] = Operand(acc, scope)
        return dot
