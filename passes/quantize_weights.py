"""Stores the weights of matrix products as small integers, which a product turns back into floats as it reads them, or
in f8 (``f8_weights``).

    %w = param {name = "up.weight"} : f32[64, 32]
    %y = matmul %x, %w : f32[B, S, 64]
=>
    %c = param {name = "prepared.up.weight.int8.codes"} : i8[4, 8, 16, 4]
    %s = param {name = "prepared.up.weight.int8.scale"} : f32[4, 1, 16]
    %1 = view %c {map = (i0, i1) -> ((i0 // 16), (i1 // 4), (i0 % 16), (i1 % 4))} : i8[64, 32]
    %2 = view %s {map = (i0, i1) -> ((i0 // 16), i1, (i0 % 16))} : f32[64, 1]
    %w = dequantize %1, %2 {bits = 8, group = 32} : f32[64, 32]
    %y = matmul %x, %w {activation_group = 32} : f32[B, S, 64]

The codes are computed once at load, by the function's ``.weights``. How they lie in memory is an index map: with
``options.row_block`` = 16, sixteen rows are interleaved four columns at a time, the order in which a CPU kernel with
one row per lane reads them. int8 has one scale per output channel, int4 scale and minimum for each group of 32 columns
(``ir.quantization``). An embedding that is tied to the last product reads the same codes, of int8 with a scale for each
group of 32 columns whatever the others are: what is lost there is lost at both ends of the model. (A scale per channel
raised the perplexity of SmolLM2 by 0.42% in all matrices, by 0.25% in the table alone.)

Matrices that are small, whose sides do not fit, or that hold what has no code (``options.keep_wide``) stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from sympy import Expr, Integer

from tilewright.ir.index import FloorDiv, IndexMap, Mod, index_symbols
from tilewright.ir.module import Function, Module, Names, Op, make_attrs, walk
from tilewright.ir.ops import Builder, infer_types
from tilewright.ir.types import TensorType, Value

from .base import PassOptions, Rewriter
from .f8_weights import multiply_f8, read_f8, store_f8

BITS = {"int8": 8, "int4": 4}
FORMATS = (*BITS, "fp8")
GROUP = 32
"""Columns that share a scale in int4 and in tables, and activations that share one in any form."""
SMALLEST = 1024
"""Elements of the smallest matrix that is worth it."""


def quantize_weights(module: Module, options: PassOptions) -> Module:
    """Quantise what products stream, as ``options.weights`` says; after ``fold_constants``, which stacks weights."""
    if not options.weights:
        return module
    prepared = {f.name: f for f in module.functions if f.name.endswith(".weights")}
    out: list[Function] = []
    for function in module.functions:
        if function.name in prepared:
            continue
        name = f"{function.name}.weights"
        rewritten, loader = _Quantizer(function, prepared.get(name), options).run()
        out += [rewritten] + ([loader] if loader is not None else [])
    return module.with_functions(out)


def quantizable(weight: Value, options: PassOptions) -> bool:
    """True for a matrix that is worth it and whose sides fit the layout: of integers, columns in whole groups and rows
    in whole blocks."""
    shape = weight.shape
    if len(shape) != 2 or not weight.dtype.is_float or not all(d.is_Integer for d in shape):
        return False
    rows, columns = map(int, shape)
    if options.weights == "fp8":
        return rows * columns >= SMALLEST
    return rows % options.row_block == 0 and columns % GROUP == 0 and rows * columns >= SMALLEST


def kept_wide(module: Module, options: PassOptions) -> tuple[str, ...]:
    """What a person wants to know of weights that products still read as floats, a line each; of a fused module."""
    lines: dict[str, None] = {}
    for function in module.functions:
        params = {op.result: str(op.attr("name")) for op in function.ops if op.opcode == "param"}
        streamed = [o.operands[1] for o in walk(function.ops) if o.opcode == "matmul"]
        for weight in (w for w in streamed if w in params and w.type.rank == 2):
            why = "its sides or its size do not fit the layout"
            if quantizable(weight, options):
                why = "it holds NaN, infinity or values beyond the range of the codes"
            lines[f"{params[weight]} stays {weight.type}: {why}"] = None
    return tuple(lines)


class _Quantizer:
    """Rewrites one function and the function that prepares its weights."""

    def __init__(self, function: Function, loader: Function | None, options: PassOptions) -> None:
        self.function, self.options = function, options
        self.loader = loader or Function(f"{function.name}.weights", (), (), ())
        self.tables = {
            op.operands[0] for op in function.ops if op.opcode == "gather" and op.attr("axis") == 0
        }
        self.ops = list(self.loader.ops)
        self.returns = {v.name: v for v in self.loader.returns}
        self.names = Names.of(self.loader)

    def run(self) -> tuple[Function, Function | None]:
        streamed = {op.operands[1] for op in self.function.ops if op.opcode == "matmul"}
        rewriter = Rewriter(self.function)
        codes: dict[Value, tuple[Value, ...]] = {}
        for op in self.function.ops:
            if op.opcode == "param" and op.result in streamed and self._wanted(op):
                codes[op.result] = self._prepare(rewriter, op)
        for op in rewriter:
            if self.options.weights == "fp8" and op.opcode == "matmul" and op.operands[1] in codes:
                rewriter.replace(op.result, multiply_f8(rewriter, op, *codes[op.operands[1]]))
                continue
            table = {w: self._read(rewriter, w, codes[w]) for w in self._codes_of(op) if w in codes}
            op = op.with_operands(table)
            if table and op.opcode == "matmul" and self.options.activation_group:
                op = op.with_attrs(activation_group=self.options.activation_group)
            rewriter.keep(op)
        return self._finish(rewriter)

    def _format(self, weight: Value) -> tuple[int, int]:
        """Bits and group of a weight's codes."""
        if weight in self.tables:
            return 8, GROUP
        bits = BITS[self.options.weights]
        return bits, GROUP if bits == 4 else int(weight.shape[1])

    @staticmethod
    def _codes_of(op: Op) -> tuple[Value, ...]:
        """The operands that are read as codes: the matrix of a product, the table of a lookup by row."""
        if op.opcode == "matmul":
            return op.operands[1:]
        return op.operands[:1] if op.opcode == "gather" and op.attr("axis") == 0 else ()

    def _wanted(self, op: Op) -> bool:
        sources = self._sources(str(op.attr("name")))
        wide = any(
            full == name or full.endswith(f".{name}") for full in self.options.keep_wide for name in sources
        )
        return not wide and quantizable(op.result, self.options)

    def _sources(self, name: str) -> list[str]:
        """The model's own weights behind a prepared one."""
        if name not in self.returns:
            return [name]
        made = self.loader.definitions()
        found, todo = [], [self.returns[name]]
        while todo:
            op = made[todo.pop()]
            if op.opcode == "param":
                found.append(str(op.attr("name")))
            todo += op.operands
        return found

    # -- at load ---------------------------------------------------------------------------------------------------

    def _prepare(self, rewriter: Rewriter, op: Op) -> tuple[Value, ...]:
        """Quantise a weight in the loader; gives the ``param`` values that stand for codes, scale and minimum."""
        name = str(op.attr("name"))
        weight = self.returns.get(name)
        if weight is None:
            weight = self._load("param", (), op.result.type, name=name)
        stem = name if name.startswith("prepared.") else f"prepared.{name}"
        if self.options.weights == "fp8":
            return self._prepare_f8(rewriter, op, weight, stem)
        bits, group = self._format(op.result)
        draft = Op("quantize", (weight,), make_attrs({"bits": bits, "group": group}))
        types = _quantized_types(draft)
        full = [f"{stem}.int{bits}.{what}" for what in ("codes", "scale", "minimum")]
        blocked = self.options.row_block > 1
        parts = tuple(
            Value(self.names.fresh("q" if blocked else n), t) for n, t in zip(full, types, strict=False)
        )
        self.ops.append(replace(draft, results=parts))
        params = []
        for part, called in zip(parts, full, strict=False):
            stored = self._into_blocks(part, called) if blocked else part
            self.returns[called] = stored
            params.append(rewriter.add("param", loc=op.loc, type=stored.type, name=called))
        return tuple(params)

    def _prepare_f8(self, rewriter: Rewriter, op: Op, weight: Value, stem: str) -> tuple[Value, ...]:
        builder = Builder(self.names, op.loc)
        stored = store_f8(builder, weight, f"{stem}.f8")
        self.ops += builder.ops
        self.returns |= {value.name: value for value in stored}
        return tuple(rewriter.add("param", loc=op.loc, type=v.type, name=v.name) for v in stored)

    def _into_blocks(self, part: Value, name: str) -> Value:
        index_map, shape = _into_blocks(part, self.options.row_block, name.endswith("codes"))
        stored = Value(self.names.fresh(name), TensorType(part.dtype, shape))
        self.ops.append(Op("view", (part,), make_attrs({"map": index_map}), (stored,)))
        return stored

    def _load(self, opcode: str, operands: tuple[Value, ...], type: TensorType, **attrs: object) -> Value:
        value = Value(self.names.fresh("w"), type)
        self.ops.append(Op(opcode, operands, make_attrs(attrs), (value,)))
        return value

    # -- at run time -----------------------------------------------------------------------------------------------

    def _read(self, rewriter: Rewriter, weight: Value, stored: tuple[Value, ...]) -> Value:
        """The matrix that stored codes stand for."""
        if self.options.weights == "fp8":
            return read_f8(rewriter, weight.type, *stored)
        bits, group = self._format(weight)
        draft = Op("quantize", (weight,), make_attrs({"bits": bits, "group": group}))
        parts = []
        for param, type, codes in zip(stored, _quantized_types(draft), (True, False, False), strict=False):
            if self.options.row_block == 1:
                parts.append(param)
                continue
            index_map = _out_of_blocks(type.shape, self.options.row_block, codes)
            parts.append(rewriter.add("view", param, type=type, map=index_map))
        return rewriter.add("dequantize", *parts, type=weight.type, bits=bits, group=group)

    def _finish(self, rewriter: Rewriter) -> tuple[Function, Function | None]:
        """Weights that are read no more are not prepared either."""
        function = rewriter.finish()
        used = {v for op in function.ops if op.opcode != "param" for v in op.operands} | set(function.returns)
        function = function.with_ops(op for op in function.ops if op.opcode != "param" or op.result in used)
        names = {op.attr("name") for op in function.ops if op.opcode == "param"}
        returns = tuple(v for name, v in self.returns.items() if name in names)
        return function, self.loader.with_ops(self.ops, returns) if returns else None


def _quantized_types(draft: Op) -> tuple[TensorType, ...]:
    types = infer_types(draft)
    assert types is not None
    return types


def _into_blocks(part: Value, block: int, codes: bool) -> tuple[IndexMap, tuple[Expr, ...]]:
    """How codes [N, J] are stored as [N / block, J / 4, block, 4], and scales [N, G] as [N / block, G, block]."""
    rows, columns = part.shape
    if codes:
        i0, i1, i2, i3 = index_symbols(4)
        return IndexMap(4, (block * i0 + i2, 4 * i1 + i3)), (
            rows / block,
            columns / 4,
            Integer(block),
            Integer(4),
        )
    i0, i1, i2 = index_symbols(3)
    return IndexMap(3, (block * i0 + i2, i1)), (rows / block, columns, Integer(block))


def _out_of_blocks(shape: tuple[Expr, ...], block: int, codes: bool) -> IndexMap:
    i0, i1 = index_symbols(2)
    size, four = Integer(block), Integer(4)
    if codes:
        return IndexMap(2, (FloorDiv(i0, size), FloorDiv(i1, four), Mod(i0, size), Mod(i1, four)))
    return IndexMap(2, (FloorDiv(i0, size), i1 if shape[1] != 1 else Integer(0), Mod(i0, size)))
