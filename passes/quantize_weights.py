"""Stores the weights of matrix products in a form that ``weight_forms`` lists: as small integers, which
a product turns back into floats as it reads them (``integer_weights``), or in f8 (``f8_weights``).

    %w = param {name = "up.weight"} : f32[64, 32]
    %y = matmul %x, %w : f32[B, S, 64]
=>
    %c = param {name = "prepared.up.weight.int8.codes"} : i8[4, 8, 16, 4]
    %s = param {name = "prepared.up.weight.int8.scale"} : f32[4, 1, 16]
    %1 = view %c {map = (i0, i1) -> ((i0 // 16), (i1 // 4), (i0 % 16), (i1 % 4))} : i8[64, 32]
    %2 = view %s {map = (i0, i1) -> ((i0 // 16), i1, (i0 % 16))} : f32[64, 1]
    %w = dequantize %1, %2 {bits = 8, group = 32} : f32[64, 32]
    %y = matmul %x, %w {activation_group = 32} : f32[B, S, 64]

The codes are computed once at load, by the function's ``.weights``. int8 has one scale per output channel, int4 scale
and minimum for each group of 32 columns (``ir.quantization``). An embedding that is tied to the last product reads the
same codes, of int8 with a scale for each group of 32 columns whatever the others are: what is lost there is lost at
both ends of the model. (A scale per channel raised the perplexity of SmolLM2 by 0.42% in all matrices, by 0.25% in the
table alone.)

Matrices that are small, whose sides do not fit, or that hold what has no code (``options.keep_wide``) stay as they are.
"""

from __future__ import annotations

from tilewright.ir.module import Function, Module, Names, Op, make_attrs, walk
from tilewright.ir.types import TensorType, Value

from .base import PassOptions, Rewriter
from .integer_weights import GROUP as GROUP
from .weight_forms import FORMS, WeightForm

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
    """True for a matrix that is worth it and whose sides fit the layout of ``options.weights``."""
    shape = weight.shape
    if len(shape) != 2 or not weight.dtype.is_float or not all(d.is_Integer for d in shape):
        return False
    rows, columns = map(int, shape)
    return rows * columns >= SMALLEST and FORMS[options.weights].matrix.fits(rows, columns, options)


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


_WEIGHT_AT = {"matmul": 1, "gather": 0}
"""Which operand is read as codes: the matrix of a product, the table of a lookup by row."""


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
            weight = op.operands[_WEIGHT_AT[op.opcode]] if op.opcode in _WEIGHT_AT else None
            if weight not in codes or op.attr("axis", 0) != 0:
                rewriter.keep(op)
            elif op.opcode == "matmul":
                self._form(weight).multiply(rewriter, op, codes[weight], self.options)
            else:
                read = self._form(weight).read(rewriter, weight, codes[weight], self.options)
                rewriter.keep(op.with_operands({weight: read}))
        return self._finish(rewriter)

    def _form(self, weight: Value) -> WeightForm:
        forms = FORMS[self.options.weights]
        return forms.table if weight in self.tables else forms.matrix

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
        ops, stored = self._form(op.result).store(weight, stem, self.names, op.loc, self.options)
        self.ops += ops
        self.returns |= stored
        return tuple(rewriter.add("param", loc=op.loc, type=v.type, name=name) for name, v in stored.items())

    def _load(self, opcode: str, operands: tuple[Value, ...], type: TensorType, **attrs: object) -> Value:
        value = Value(self.names.fresh("w"), type)
        self.ops.append(Op(opcode, operands, make_attrs(attrs), (value,)))
        return value

    def _finish(self, rewriter: Rewriter) -> tuple[Function, Function | None]:
        """Weights that are read no more are not prepared either."""
        function = rewriter.finish()
        used = {v for op in function.ops if op.opcode != "param" for v in op.operands} | set(function.returns)
        function = function.with_ops(op for op in function.ops if op.opcode != "param" or op.result in used)
        names = {op.attr("name") for op in function.ops if op.opcode == "param"}
        returns = tuple(v for name, v in self.returns.items() if name in names)
        return function, self.loader.with_ops(self.ops, returns) if returns else None
