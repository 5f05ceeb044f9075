"""Segments without a matrix product: loops over the iteration space, split over the team, the innermost vectorised."""

from __future__ import annotations

from tilewright.ir.loops import Axis, Dot, Reduce, Segment, free_symbols

from .ctypes_of import store
from .expression import print_index
from .kernel_context import KernelContext
from .reduction import COLUMNS, column_reductions, print_column_reduction
from .scalars import Scalars

CHUNK = 1024  # elements of the innermost axis per work item


def print_loops(kernel: KernelContext, segment: Segment) -> None:
    """Print one segment. Each work item is a point of the outer axes and a chunk of the innermost one."""
    outer, inner = segment.axes[:-1], segment.axes[-1] if segment.axes else None
    writer = kernel.writer
    scalars = Scalars(kernel, (s.value for s in segment.stores))
    with writer.block():
        _print_work(kernel, segment, outer, inner)
        with writer.block("for (long item = range.begin; item < range.end; item++)"), scalars.scope(outer):
            if inner is not None:
                if outer:
                    writer.line("long rest = item / chunks;")
                writer.line("const long begin = item % chunks * chunk;")
                writer.line(f"const long end = std::min<long>(begin + chunk, {print_index(inner.extent)});")
            elif outer:
                writer.line("long rest = item;")
            print_point(kernel, outer, "rest")
            scalars.hoist(s.value for s in segment.stores)
            if inner is None:
                print_stores(scalars, segment)
            else:
                _print_inner(kernel, segment, scalars, inner)


def _print_work(kernel: KernelContext, segment: Segment, outer: tuple[Axis, ...], inner: Axis | None) -> None:
    """How many work items there are and which of them are this worker's."""
    writer = kernel.writer
    items = " * ".join(["1L", *(_parenthesized(a) for a in outer)])
    if inner is not None:
        extent = print_index(inner.extent)
        # What is reduced once per row would be reduced again for every chunk of the row.
        rows = any(
            isinstance(n, Dot | Reduce) and inner.symbol not in free_symbols(n) for n in segment.nodes()
        )
        writer.line(f"const long chunk = {extent if rows else CHUNK};")
        writer.line(f"const long chunks = ({extent} + chunk - 1) / chunk;")
        items += " * chunks"
    writer.line(f"const tw::Range range = tw::split(worker, {items});")


def _parenthesized(axis: Axis) -> str:
    text = print_index(axis.extent)
    return text if axis.extent.is_Integer or axis.extent.is_Symbol else f"({text})"


def print_point(kernel: KernelContext, axes: tuple[Axis, ...], rest: str) -> None:
    """Split the flat index in the variable ``rest`` into the symbols of ``axes``, the last one fastest."""
    for axis in reversed(axes[1:]):
        extent = _parenthesized(axis)
        kernel.writer.line(f"[[maybe_unused]] const long {axis.symbol} = {rest} % {extent};")
        kernel.writer.line(f"{rest} /= {extent};")
    if axes:
        kernel.writer.line(f"[[maybe_unused]] const long {axes[0].symbol} = {rest};")


def _print_inner(kernel: KernelContext, segment: Segment, scalars: Scalars, inner: Axis) -> None:
    writer = kernel.writer
    columns = column_reductions(segment, kernel)
    if not columns:
        if columns is not None:
            writer.pragma("omp simd")
        header = f"for (long {inner.symbol} = begin; {inner.symbol} < end; {inner.symbol}++)"
        with writer.block(header), scalars.scope([inner], simd=columns is not None):
            print_stores(scalars, segment)
        return
    with writer.block(f"for (long tile = begin; tile < end; tile += {COLUMNS})"), scalars.scope():
        writer.line(f"const long count = std::min<long>({COLUMNS}, end - tile);")
        for node in columns:
            print_column_reduction(scalars, node, inner, "tile", "count")
        writer.pragma("omp simd")
        with writer.block("for (long j = 0; j < count; j++)"), scalars.scope([inner], simd=True):
            writer.line(f"const long {inner.symbol} = tile + j;")
            print_stores(scalars, segment)


def print_stores(scalars: Scalars, segment: Segment) -> None:
    """Compute and store the values of a segment at one point."""
    kernel = scalars.kernel
    values = [scalars.text(s.value) for s in segment.stores]
    for target, value in zip(segment.stores, values, strict=True):
        place = kernel.address(target.target, target.index, scalars.ranges)
        kernel.writer.line(f"{place} = {store(target.target.dtype, value)};")
