"""Segments that are matrix products: a prologue that fills rows of activations, the product, and an epilogue on tiles.

Segments of a kernel that share their row operand share one prologue. With few rows (a decode step) every thread runs
the prologue for itself, which is cheaper than a barrier, and streams its share of the weights: with up to
``GEMV_MAX_ROWS`` by ``gemv.h``, and where weights are stored as codes with up to ``quantized.MAX_ROWS`` by
``quantized.h``. Otherwise the team fills a block of rows together and multiplies it (``gemm.h``). Of a batch of
products, each thread computes its share by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from sympy import Integer

from tilewright.codegen.tunables import NONE, Changes, tuned
from tilewright.ir.loops import Axis, MatmulForm, Segment
from tilewright.ir.types import DType

from .ctypes_of import STORAGE, scalar
from .expression import print_index
from .kernel_context import KernelContext, product
from .matmul_group import Group, rows_in_memory, weight_load
from .pointwise import print_point, print_stores
from .quantized import StoredWeight
from .scalars import Scalars
from .tiling import Tile, few_rows_candidates, few_rows_tile, many_rows_candidates


class _Printer:
    """Prints one group into a kernel."""

    def __init__(self, kernel: KernelContext, group: Group) -> None:
        self.kernel, self.group, self.writer = kernel, group, kernel.writer
        self.few = group.few_rows
        self.tile = tuned(few_rows_tile(int(group.row_count)) if self.few else Tile(), kernel.changes)
        self.values = group.row_values
        self.in_memory = rows_in_memory(kernel, group)
        self.scalars = Scalars(
            kernel, [group.forms[0].a, *(s.value for g in group.segments for s in g.stores)]
        )
        self.scalars.hide(d for f in group.forms for d in f.dots)
        self.weight = STORAGE[group.factor]
        self.tiled = self.few and group.weight is DType.bf16  # where the processor has a matrix unit
        self.alone = self.few or bool(group.batch)  # each thread prepares rows for itself
        self.worker = "single" if group.batch else "worker"

    # -- layout ------------------------------------------------------------------------------------------------

    def declare(self) -> None:
        writer, group = self.writer, self.group
        writer.line(f"using W = {self.weight};")
        writer.line("using A = tw::activation_t<W>;")
        writer.line(f"const long k = {print_index(group.depth)}, rows = {print_index(group.row_count)};")
        distance = "tw::padded<W>(k)"
        if self.in_memory:
            writer.line(f"constexpr bool direct = {self._is_direct('A')};")
            distance = f"direct ? {print_index(self.in_memory.distance)} : {distance}"
        writer.line(f"const long lda = {distance};")

    def _is_direct(self, factor: str) -> str:
        """Whether rows are multiplied where they lie, as C++."""
        return f"std::is_same_v<{factor}, {self.in_memory.element}>" if self.in_memory else "false"

    def reserve(self) -> None:
        """Say how much scratch the kernel needs for this group."""
        depth, rows = print_index(self.group.depth), print_index(self.group.row_count)
        space, weight = self.kernel.workspace, self.weight
        block = rows if self.few else f"std::min<long>({self.tile.row_block}, {rows})"
        needed = []
        if self.few and self.group.stored:
            needed.append(f"{rows} * tw::byte_row_bytes({depth})")
        factor = f"tw::activation_t<{weight}>"
        rows_of_factors = f"tw::bytes<{factor}>({block} * tw::padded<{weight}>({depth}))"
        needed.append(
            f"({self._is_direct(factor)} ? 0 : {rows_of_factors})" if self.in_memory else rows_of_factors
        )
        if self.values:
            needed.append(f"{len(self.values)} * tw::bytes<double>({block})")
        if self.tiled:
            needed.append(f"tw::few_tiles_bytes<{weight}, {rows}>({depth})")
        panels = ""
        if not self.few:
            # More weights per column may leave room for so many fewer columns that they take less.
            counts = sorted({len(f.dots) for f in self.group.forms})
            sizes = [f"tw::bytes<float>(tw::gemm_floats<{weight}>({depth}, {dots}))" for dots in counts]
            panels = sizes[0] if len(sizes) == 1 else f"std::max({{{', '.join(sizes)}}})"
        if self.alone:
            space.private.append(" + ".join([*needed, panels] if panels else needed))
        else:
            space.shared.append(" + ".join(needed))
            space.private.append(panels)

    def carve(self) -> None:
        """Pointers into the scratch."""
        writer = self.writer
        rows = "rows" if self.few else f"std::min<long>({self.tile.row_block}, rows)"
        writer.line(f"[[maybe_unused]] char* scratch = {'own' if self.alone else 'shared'};")
        writer.line(f"A* a = {self._unless_direct(f'tw::carve<A>(scratch, {rows} * lda)', 'nullptr')};")
        for n, value in enumerate(self.values):
            kind = scalar(value.dtype)
            writer.line(f"{kind}* row{n} = tw::carve<{kind}>(scratch, {rows});")
        if self.few and self.group.stored:
            count = self.group.row_count
            writer.line(f"tw::ByteRow byte_rows[{count}];")
            writer.line("for (tw::ByteRow& row : byte_rows) row = tw::carve_byte_row(scratch, k);")

    @contextmanager
    def each_product(self) -> Iterator[None]:
        """A loop over this thread's products of a batch, in whose body it is a team of its own; else nothing."""
        writer, batch = self.writer, self.group.batch
        if not batch:
            yield
            return
        writer.line("tw::Team one(worker.team.prefetch_bytes);")
        writer.line("const tw::Worker single{one, 0, 1};")
        writer.line(
            f"const tw::Range items = tw::split(worker, {print_index(product([a.extent for a in batch]))});"
        )
        with (
            writer.block("for (long item = items.begin; item < items.end; item++)"),
            self.scalars.scope(batch),
        ):
            writer.line("long of_batch = item;")
            print_point(self.kernel, batch, "of_batch")
            yield

    # -- prologue ----------------------------------------------------------------------------------------------

    def prologue(self, begin: str, end: str, base: str) -> None:
        """Fill rows ``begin`` to ``end`` of the scratch, which starts at row ``base``."""
        writer, scalars, form = self.writer, self.scalars, self.group.forms[0]
        with writer.block(f"for (long row = {begin}; row < {end}; row++)"), scalars.scope(self.group.rows):
            self._row_symbols("row")
            scalars.hoist(self.values)
            for n, value in enumerate(self.values):
                writer.line(f"row{n}[row - {base}] = {scalars.text(value)};")
            if self.in_memory and self.values:
                writer.line("if (direct) continue;")
            scalars.hoist([form.a])
            writer.line(f"A* to = a + (row - {base}) * lda;")
            writer.pragma("omp simd")
            k = form.k.symbol
            with writer.block(f"for (long {k} = 0; {k} < k; {k}++)"), scalars.scope([form.k], simd=True):
                writer.line(
                    f"to[{k}] = tw::to_activation<W, {STORAGE[form.a.dtype]}>({scalars.text(form.a)});"
                )
            writer.line("for (long i = k; i < lda; i++) to[i] = A{};")

    def _unless_direct(self, otherwise: str, direct: str) -> str:
        return f"direct ? {direct} : {otherwise}" if self.in_memory else otherwise

    def rows(self, first: str) -> str:
        """The address of the rows from row ``first`` on: where they lie, or in the scratch."""
        direct = (
            f"reinterpret_cast<const A*>({self.in_memory.first}) + {first} * lda" if self.in_memory else ""
        )
        return self._unless_direct("a", direct)

    def preparing(self) -> AbstractContextManager[None]:
        """A block of what need not run where rows are used where they lie, and nothing is reduced of them."""
        return self.writer.block("if (!direct)" if self.in_memory and not self.values else "")

    def _row_symbols(self, row: str) -> None:
        if len(self.group.rows) > 1:
            self.writer.line(f"long rest = {row};")
            print_point(self.kernel, self.group.rows, "rest")
        elif self.group.rows:
            self.writer.line(f"[[maybe_unused]] const long {self.group.rows[0].symbol} = {row};")

    # -- the product -------------------------------------------------------------------------------------------

    def weight_rows(self, form: MatmulForm) -> None:
        """A function from dot and column to the address of a weight row."""
        writer = self.writer
        with writer.block("const auto weight_row = [&](int d, long column) -> const W*", "};"):
            self._column_symbols(form)
            ranges = {a.symbol: a.extent for a in (*form.columns, *form.batch)}
            for n, dot in enumerate(form.dots):
                load = weight_load(dot)
                assert load is not None
                start = tuple(e.xreplace({form.k.symbol: Integer(0)}) for e in load.index)
                where = print_index(self.kernel.offset(load.value, start, ranges))
                test = f"if (d == {n}) " if n + 1 < len(form.dots) else ""
                writer.line(f"{test}return {self.kernel.names[load.value]} + {where};")

    def _column_symbols(self, form: MatmulForm) -> None:
        self.writer.line("long at = column;")
        print_point(self.kernel, form.columns, "at")

    def weight_blocks(self, form: MatmulForm, weights: tuple[StoredWeight, ...]) -> None:
        """A function from dot and column to the addresses of the block of codes that sixteen columns read."""
        writer, kind = self.writer, weights[0].kind
        ranges = {a.symbol: a.extent for a in form.columns}
        with writer.block(f"const auto weight_block = [&](int d, long column) -> {kind}::Block", "};"):
            self._column_symbols(form)
            for n, weight in enumerate(weights):
                places = []
                for load in (weight.codes, weight.scale, weight.minimum):
                    if load is not None:
                        start = (weight.block, *(Integer(0),) * (load.value.type.rank - 1))
                        offset = self.kernel.offset(load.value, start, ranges)
                        places.append(f"{self.kernel.names[load.value]} + {print_index(offset)}")
                test = f"if (d == {n}) " if n + 1 < len(weights) else ""
                writer.line(f"{test}return {{{', '.join(places)}}};")

    def pack_blocks(self, kind: str) -> None:
        """A function that packs a panel of weights from blocks of codes."""
        writer = self.writer
        with writer.block("const auto pack = [&](int d, long first, int count, float* panel)", "};"):
            writer.line(
                f"tw::pack_blocks<{kind}, W>(panel, count, k, "
                "[&](int j) { return weight_block(d, first + j); });"
            )

    def pack(self, form: MatmulForm) -> None:
        """A function that packs a panel of weights, from rows in memory or element by element."""
        writer = self.writer
        with writer.block("const auto pack = [&](int d, long first, int count, float* panel)", "};"):
            if self.group.weight is not None:
                writer.line(
                    "tw::pack_panel<W>(panel, count, k, [&](int j) { return weight_row(d, first + j); });"
                )
                return
            with writer.block(f"for (long {form.k.symbol} = 0; {form.k.symbol} < k; {form.k.symbol}++)"):
                writer.line(f"float* to = panel + {form.k.symbol} * tw::PANEL;")
                with writer.block("for (int j = 0; j < tw::PANEL; j++)"):
                    writer.line("to[j] = 0.0f;")
                    writer.line("if (j >= count) continue;")
                    writer.line("const long column = first + j;")
                    self._column_symbols(form)
                    for n, dot in enumerate(form.dots):
                        with (
                            writer.block(f"if (d == {n})"),
                            self.scalars.scope((*form.columns, form.k), simd=True),
                        ):
                            writer.line(f"to[j] = float({self.scalars.text(dot.b)});")

    def epilogue(self, form: MatmulForm, segment: Segment, base: str) -> None:
        """A function that stores a tile of products; its rows count from the row ``base``."""
        writer, scalars = self.writer, self.scalars
        inner = form.columns[-1] if form.columns else None
        arguments = "long first_row, int row_count, long first_column, int columns"
        tile = "const float* tile, long per_dot, long per_row"
        rows = "for (int i = 0; i < row_count; i++)"
        with writer.block(f"const auto epilogue = [&]({arguments}, {tile})", "};"):  # noqa: SIM117
            with writer.block(rows), scalars.scope(self.group.rows):
                writer.line(f"[[maybe_unused]] const long row = {base} + first_row + i;")
                self._row_symbols("row")
                for n, value in enumerate(self.values):
                    name = writer.fresh("s")
                    writer.line(f"const {scalar(value.dtype)} {name} = row{n}[row - {base}];")
                    scalars.bind(value, name)
                scalars.hoist(s.value for s in segment.stores)
                self._runs(form, segment, inner)

    def _runs(self, form: MatmulForm, segment: Segment, inner: Axis | None) -> None:
        """Columns of a tile in runs along the innermost column axis, so that the loop over a run vectorises."""
        writer, scalars = self.writer, self.scalars
        with writer.block("for (int j = 0; j < columns;)"), scalars.scope(form.columns[:-1]):
            if inner is None:
                writer.line("const int run = 1;")
            else:
                extent = print_index(inner.extent)
                writer.line("const long column = first_column + j;")
                if len(form.columns) > 1:
                    writer.line(f"const long start = column % ({extent});")
                    writer.line(f"long at = column / ({extent});")
                    print_point(self.kernel, form.columns[:-1], "at")
                else:
                    writer.line("const long start = column;")
                writer.line(f"const int run = int(std::min<long>(columns - j, {extent} - start));")
            for n in range(len(form.dots)):
                writer.line(f"const float* dot{n} = tile + {n} * per_dot + i * per_row + j;")
            scalars.hoist(s.value for s in segment.stores)
            writer.pragma("omp simd")
            with (
                writer.block("for (int q = 0; q < run; q++)"),
                scalars.scope([inner] if inner else [], simd=True),
            ):
                if inner is not None:
                    writer.line(f"[[maybe_unused]] const long {inner.symbol} = start + q;")
                for n, dot in enumerate(form.dots):
                    name = writer.fresh("s")
                    writer.line(f"const {scalar(dot.dtype)} {name} = dot{n}[q];")
                    scalars.bind(dot, name)
                print_stores(scalars, segment)
            writer.line("j += run;")


def group_candidates(group: Group) -> tuple[Changes, ...]:
    """Walks of a group's products that are worth a measurement, the default first."""
    if not group.few_rows:
        return many_rows_candidates()
    # Stored codes are read in blocks of sixteen rows, in the one order that they lie in.
    return (NONE,) if group.stored is not None else few_rows_candidates(int(group.row_count))


def print_matmuls(kernel: KernelContext, group: Group) -> None:
    """Print the products of a group."""
    printer, writer = _Printer(kernel, group), kernel.writer
    with writer.block():
        printer.declare()
        printer.reserve()
        with printer.each_product():
            printer.carve()
            if printer.few:
                _print_few_rows(printer)
            else:
                _print_blocks(printer)


def _print_few_rows(printer: _Printer) -> None:
    writer = printer.writer
    with printer.preparing():
        printer.prologue("0", "rows", "0")
    writer.line(f"const A* from = {printer.rows('0')};")
    stored = printer.group.stored
    if stored is not None:
        writer.line(
            "for (long row = 0; row < rows; row++) tw::round_row(from + row * lda, k, byte_rows[row]);"
        )
    for number, (form, segment) in enumerate(zip(printer.group.forms, printer.group.segments, strict=True)):
        with writer.block():
            columns = print_index(product([a.extent for a in form.columns]))
            printer.epilogue(form, segment, "0")
            if stored is not None:
                weights = stored[number]
                printer.weight_blocks(form, weights)
                call = f"tw::gemv_quantized<{weights[0].kind}, {printer.group.row_count}, {len(form.dots)}>"
                writer.line(f"{call}(worker, {columns}, k, byte_rows, weight_block, epilogue);")
                continue
            printer.weight_rows(form)
            shape = f"{printer.group.row_count}, {len(form.dots)}, {printer.tile.unroll}, {printer.tile.weight_rows}"
            call = f"tw::gemv<W, {shape}>"
            spare = "scratch" if printer.tiled else "nullptr"
            writer.line(f"{call}(worker, {columns}, k, from, lda, weight_row, epilogue, {spare});")


def _print_blocks(printer: _Printer) -> None:
    writer, size = printer.writer, printer.tile.row_block
    writer.line(f"const long even = tw::even_blocks(rows, {size});")
    with writer.block("for (long block = 0; block < rows; block += even)"):
        writer.line("const long height = std::min<long>(even, rows - block);")
        with printer.preparing():
            writer.line(f"const tw::Range mine = tw::split({printer.worker}, height);")
            printer.prologue("block + mine.begin", "block + mine.end", "block")
            writer.line(f"{printer.worker}.barrier();")
        writer.line(f"const A* from = {printer.rows('block')};")
        for number in range(len(printer.group.forms)):
            with writer.block():
                _print_product(printer, number)
        with printer.preparing():
            writer.line(f"if (block + height < rows) {printer.worker}.barrier();")


def _print_product(printer: _Printer, number: int) -> None:
    writer, group = printer.writer, printer.group
    form, segment = group.forms[number], group.segments[number]
    if group.stored is not None:
        printer.weight_blocks(form, group.stored[number])
        printer.pack_blocks(group.stored[number][0].kind)
    else:
        if group.weight is not None:
            printer.weight_rows(form)
        printer.pack(form)
    printer.epilogue(form, segment, "block")
    extent = print_index(product([a.extent for a in form.columns]))
    writer.line(f"float* panels = reinterpret_cast<float*>({'scratch' if group.batch else 'own'});")
    shape = f"{len(form.dots)}" + (f", {printer.tile.tile_rows}" if printer.tile.tile_rows else "")
    writer.line(
        f"tw::gemm<W, {shape}>({printer.worker}, height, {extent}, k, from, lda, panels, pack, epilogue);"
    )
