"""The pass that stores weights as codes: its output means the module on weights that went through codes, no more."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.strategies import prepared_weights
from tilewright.ir.module import Module, walk
from tilewright.ir.parser import parse_module
from tilewright.ir.quantization import dequantize, quantize
from tilewright.ir.reference import evaluate
from tilewright.ir.verify import verify_module
from tilewright.passes.base import PassOptions
from tilewright.passes.dce import eliminate_dead_code
from tilewright.passes.fold_constants import fold_constants
from tilewright.passes.pipeline import run_passes
from tilewright.passes.quantize_weights import GROUP, quantize_weights

DIMS = {"B": 2, "S": 3}
HEAD = "entry @main\nsymbol B [1, 4]\nsymbol S [1, 8]\n\n"

# Modules; {A} stands for the attributes of a product whose weights are quantised.
PRODUCT = """func @main(%x: f32[B, S, 64]) -> (%y) {{
  %w = param {{name = "up"}} : f32[48, 64]
  %y = matmul %x, %w {A}: f32[B, S, 48]
}}
"""
STACKED = """func @main(%x: f32[B, S, 64]) -> (%y, %z) {{
  %q = param {{name = "q"}} : f32[32, 64]
  %k = param {{name = "k"}} : f32[16, 64]
  %w = concat %q, %k {{axis = 0}} : f32[48, 64]
  %y = matmul %x, %w {A}: f32[B, S, 48]
  %z = neg %x : f32[B, S, 64]
}}
"""
TRANSPOSED = """func @main(%x: f32[B, S, 64]) -> (%y) {{
  %c = param {{name = "conv"}} : f32[64, 32]
  %w = view %c {{map = (i0, i1) -> (i1, i0)}} : f32[32, 64]
  %y = matmul %x, %w {A}: f32[B, S, 32]
}}
"""
TIED = """func @main(%ids: i64[B, S]) -> (%x, %y) {{
  %w = param {{name = "embed"}} : f32[48, 64]
  %x = gather %w, %ids {{axis = 0}} : f32[B, S, 64]
  %y = matmul %x, %w {A}: f32[B, S, 48]
}}
"""
TWO_PRODUCTS = """func @main(%x: f32[B, S, 64]) -> (%z) {{
  %w = param {{name = "square"}} : f32[64, 64]
  %y = matmul %x, %w {A}: f32[B, S, 64]
  %z = matmul %y, %w {A}: f32[B, S, 64]
}}
"""
LAYERS = """func @main(%x: f32[B, S, 64]) -> (%z) {{
  %y = call %x {{callee = "layer0", scope = "layers.0"}} : f32[B, S, 64]
  %z = call %y {{callee = "layer0", scope = "layers.1"}} : f32[B, S, 64]
}}

func @layer0(%x: f32[B, S, 64]) -> (%y) {{
  %w = param {{name = "up"}} : f32[64, 64]
  %h = matmul %x, %w {A}: f32[B, S, 64]
  %t = tanh %h : f32[B, S, 64]
  %y = add %x, %t : f32[B, S, 64]
}}
"""
WEIGHTS = {
    "up": (48, 64), "q": (32, 64), "k": (16, 64), "conv": (64, 32), "embed": (48, 64), "square": (64, 64),
    "layers.0.up": (64, 64), "layers.1.up": (64, 64),
}  # fmt: skip
MODULES = {
    "product": PRODUCT,
    "stacked": STACKED,
    "transposed": TRANSPOSED,
    "tied": TIED,
    "two products": TWO_PRODUCTS,
    "layers": LAYERS,
}
FORMS = [(weights, block) for weights in ("int8", "int4") for block in (1, 16)]


def parse(text: str, activation_group: int = 0) -> Module:
    attrs = f"{{activation_group = {activation_group}}} " if activation_group else ""
    module = parse_module(HEAD + text.format(A=attrs))
    verify_module(module)
    return module


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in WEIGHTS.items()}


def through_codes(
    weight: Tensor, weights: str, dtype: torch.dtype = torch.float32, table: bool = False
) -> Tensor:
    bits = 8 if table or weights == "int8" else 4
    group = GROUP if table or bits == 4 else weight.shape[1]
    codes, scale, *minimum = quantize(weight.contiguous(), bits, group)
    return dequantize(codes, scale, minimum[0] if minimum else None, bits, group, dtype)


@cache
def all_through_codes(form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """``random_weights`` after that. Rows of a matrix are quantised one by one, so a stack of matrices is a stack of
    what became of each; what a product streams of ``conv`` are its columns, and a table that lookups share is int8 with
    a scale per group of columns."""
    return {
        name: through_codes(w.T, form, dtype).T
        if name == "conv"
        else through_codes(w, form, dtype, table=name == "embed")
        for name, w in random_weights().items()
    }


def run(module: Module, weights: Mapping[str, Tensor], exact: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    inputs = {
        p.name: torch.randint(0, 48, (2, 3), generator=generator)
        if p.dtype.is_int
        else torch.randn(2, 3, 64, generator=generator)
        for p in module.main.params
    }
    prepared = prepared_weights(module, weights, DIMS, exact)
    return evaluate(module, inputs, {**weights, **prepared}, DIMS, exact=exact)


def opcodes(module: Module) -> list[str]:
    """Of everything that runs at every step."""
    return [op.opcode for f in module.functions if not f.name.endswith(".weights") for op in walk(f.ops)]


def params(module: Module, function: str = "main") -> list[str]:
    return [str(op.attr("name")) for op in module.function(function).ops if op.opcode == "param"]


# Meaning


@pytest.mark.parametrize(("form", "block"), FORMS)
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("name", MODULES)
def test_the_module_on_weights_that_went_through_codes(name: str, form: str, block: int, group: int) -> None:
    """A wrong layout, group or order of codes; activations that are rounded unasked, or in the wrong groups."""
    options = PassOptions(weights=form, row_block=block, activation_group=group)
    quantized = quantize_weights(fold_constants(parse(MODULES[name]), options), options)
    verify_module(quantized)
    assert "dequantize" in opcodes(quantized)
    assert ("view" in opcodes(quantized)) == (block > 1)
    weights, expected = random_weights(), parse(MODULES[name], group)
    for exact, dtype in ((False, torch.float32), (True, torch.float64)):
        found = run(quantized, weights, exact)
        wanted = run(expected, all_through_codes(form, dtype), exact)
        for a, b in zip(found, wanted, strict=True):
            # The same operations on the same numbers, unless a matrix lies differently in memory: then torch may add
            # 64 products in another order, which together are no larger than two rows' norms, 8 times 1.6 or so.
            reordered = 64 * torch.finfo(dtype).eps * 16 if name in ("stacked", "transposed") else 0
            torch.testing.assert_close(a, b, rtol=0, atol=reordered)


@pytest.mark.parametrize(("form", "block"), FORMS)
@pytest.mark.parametrize("name", MODULES)
def test_the_whole_pipeline_keeps_that_meaning(name: str, form: str, block: int) -> None:
    """A later pass that moves something through a dequantize. In float64, so that order of sums does not matter."""
    options = PassOptions(weights=form, row_block=block)
    module = run_passes(parse(MODULES[name]), options)
    weights = random_weights()
    found = run(module, weights, exact=True)
    wanted = run(parse(MODULES[name]), all_through_codes(form, torch.float64), exact=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_weight_that_is_also_used_as_numbers(form: str) -> None:
    """The product reads codes; what adds up the weight itself goes on reading the original."""
    text = """func @main(%x: f32[B, S, 64]) -> (%y, %s, %v) {{
  %w = param {{name = "up"}} : f32[48, 64]
  %y = matmul %x, %w : f32[B, S, 48]
  %s = reduce %w {{axes = (0, 1), keepdim = false, kind = "sum"}} : f32[]
  %v = view %w {{map = (i0) -> (i0, 3)}} : f32[48]
}}
"""
    module, weights = parse(text), random_weights()
    quantized = quantize_weights(module, PassOptions(weights=form, row_block=16))
    verify_module(quantized)
    found, before = run(quantized, weights), run(module, weights)
    coded = run(module, {"up": through_codes(weights["up"], form)})
    for n, wanted in enumerate((coded[0], before[1], before[2])):
        assert torch.equal(found[n], wanted), n
    assert not torch.equal(coded[0], before[0])
    assert "up" in params(quantized)


@pytest.mark.parametrize(
    ("dtype", "form"), [("bf16", "int8"), ("bf16", "int4"), ("f16", "int4"), ("f64", "int8")]
)
def test_other_dtypes(dtype: str, form: str) -> None:
    """The matrix that codes stand for has the weight's own dtype, and is rounded to it once."""
    module = parse_module(HEAD + PRODUCT.format(A="").replace("f32", dtype))
    quantized = quantize_weights(module, PassOptions(weights=form, row_block=16))
    verify_module(quantized)
    kind = module.main.params[0].dtype.torch
    weight = random_weights()["up"].to(kind)
    wide = torch.float64 if dtype == "f64" else torch.float32
    wanted = run(module, {"up": through_codes(weight, form, wide).to(kind)})
    (found,) = run(quantized, {"up": weight})
    assert found.dtype == kind
    assert torch.equal(found, wanted[0])


# What is quantised

SHAPES = {
    "of columns that are no groups": ((64, 48), 1),
    "of rows that are no blocks": ((40, 64), 16),
    "too small": ((15, 64), 1),
    "too small in blocks": ((16, 32), 16),
}


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("case", SHAPES)
def test_matrices_that_stay(case: str, form: str) -> None:
    """A layout that does not divide would read past the matrix; and a small one costs more than it saves."""
    (rows, columns), block = SHAPES[case]
    text = f"""func @main(%x: f32[B, {columns}]) -> (%y) {{{{
  %w = param {{{{name = "w"}}}} : f32[{rows}, {columns}]
  %y = matmul %x, %w : f32[B, {rows}]
}}}}
"""
    module = parse(text)
    options = PassOptions(weights=form, row_block=block, activation_group=32)
    assert quantize_weights(module, options) == module


def test_rows_that_are_no_blocks_do_without_blocks() -> None:
    """Rows need to divide only where they are interleaved."""
    module = parse(PRODUCT.replace("48", "41"))
    assert "dequantize" in opcodes(quantize_weights(module, PassOptions(weights="int4")))
    assert "dequantize" not in opcodes(quantize_weights(module, PassOptions(weights="int4", row_block=16)))


@pytest.mark.parametrize(("text", "full"), [(PRODUCT, "up"), (STACKED, "k"), (LAYERS, "layers.1.up")])
def test_weights_that_must_stay_wide(text: str, full: str) -> None:
    """A stack with one such weight stays whole, and so does a layer's, whose code is that of its sisters."""
    options = PassOptions(weights="int8", activation_group=32, keep_wide=(full,))
    folded = eliminate_dead_code(fold_constants(parse(text), options), options)
    assert quantize_weights(folded, options) == folded


def test_weights_of_like_names_are_told_apart() -> None:
    """``group`` does not end in the name ``up``, though its letters do."""
    options = PassOptions(weights="int8", keep_wide=("layers.0.group", "layers.0.backup", "up.bias"))
    assert "dequantize" in opcodes(quantize_weights(parse(PRODUCT), options))


def test_without_the_option_nothing_happens() -> None:
    """Models keep their dtype unless asked."""
    module = parse(TIED)
    assert quantize_weights(module, PassOptions(row_block=16, activation_group=32)) is module


def test_products_of_activations_and_lookups_alone_stay() -> None:
    """A table that no product streams gains nothing; and the right operand of a product may be no weight."""
    text = """func @main(%x: f32[B, S, 64], %ids: i64[B, S]) -> (%y, %z) {{
  %w = param {{name = "embed"}} : f32[48, 64]
  %y = gather %w, %ids {{axis = 0}} : f32[B, S, 64]
  %z = matmul %x, %y : f32[B, S, S]
}}
"""
    module = parse(text)
    assert quantize_weights(module, PassOptions(weights="int4", activation_group=32)) == module


def test_a_lookup_along_columns_reads_the_original() -> None:
    """Only rows of a quantised table are rows of codes."""
    text = """func @main(%x: f32[B, S, 64], %ids: i64[B, S]) -> (%y, %z) {{
  %w = param {{name = "square"}} : f32[64, 64]
  %y = gather %w, %ids {{axis = 1}} : f32[64, B, S]
  %z = matmul %x, %w : f32[B, S, 64]
}}
"""
    module, weights = parse(text), random_weights()
    quantized = quantize_weights(module, PassOptions(weights="int8", row_block=16))
    found, before = run(quantized, weights), run(module, weights)
    assert torch.equal(found[0], before[0])
    assert torch.equal(found[1], run(module, {"square": through_codes(weights["square"], "int8")})[1])


# What is prepared


@pytest.mark.parametrize(("form", "block"), FORMS)
@pytest.mark.parametrize("name", MODULES)
def test_running_it_again_changes_nothing(name: str, form: str, block: int) -> None:
    """Codes are no weights to quantise a second time, and none may be prepared twice."""
    options = PassOptions(weights=form, row_block=block, activation_group=32)
    once = quantize_weights(fold_constants(parse(MODULES[name]), options), options)
    assert quantize_weights(once, options) == once
    again = quantize_weights(fold_constants(once, options), options)
    assert again == once


def test_weights_that_are_read_no_more_are_not_prepared() -> None:
    """A stack that only its codes need would be held beside them, as large as before."""
    options = PassOptions(weights="int4", row_block=16)
    folded = eliminate_dead_code(fold_constants(parse(STACKED), options), options)
    (stack,) = params(folded)
    quantized = quantize_weights(folded, options)
    parts = [f"{stack}.int4.{what}" for what in ("codes", "scale", "minimum")]
    assert params(quantized) == parts
    assert [v.name for v in quantized.function("main.weights").returns] == parts


def test_a_stack_that_something_else_reads_is_prepared_too() -> None:
    """Dropping it would leave the other reader without its weight."""
    text = STACKED.replace("%z = neg %x : f32[B, S, 64]", "%z = view %w {{map = (i0) -> (i0, 0)}} : f32[48]")
    options = PassOptions(weights="int8")
    module, weights = parse(text), random_weights()
    folded = eliminate_dead_code(fold_constants(module, options), options)
    quantized = quantize_weights(folded, options)
    assert set(params(folded)) < set(params(quantized))
    assert torch.equal(run(quantized, weights)[1], run(module, weights)[1])


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_forms_do_not_share_a_name(form: str) -> None:
    """Two compilations of one model would take each other's codes."""
    quantized = quantize_weights(parse(TWO_PRODUCTS), PassOptions(weights=form))
    assert params(quantized)[0] == f"prepared.square.{form}.codes"
    assert all(f".{form}." in name for name in params(quantized))


def test_a_weight_is_prepared_once_however_often_it_is_read() -> None:
    """Two products and a lookup by row read the same codes."""
    for text, parts in ((TWO_PRODUCTS, 3), (TIED, 2)):
        quantized = quantize_weights(parse(text), PassOptions(weights="int4", row_block=16))
        assert len(params(quantized)) == parts
        prepared = [op.opcode for op in quantized.function("main.weights").ops]
        assert prepared == ["param", "quantize", *("view",) * parts]


# Fusion


@pytest.mark.parametrize(("form", "block"), FORMS)
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("fixed", [(), (("B", 1), ("S", 1))])
@pytest.mark.parametrize("name", MODULES)
def test_no_matrix_of_floats_is_stored(
    name: str, form: str, block: int, group: int, fixed: tuple[tuple[str, int], ...]
) -> None:
    """A matrix written out before its product would move more bytes than the original weight."""
    options = PassOptions(fixed, weights=form, row_block=block, activation_group=group)
    module = run_passes(parse(MODULES[name]), options)
    sides = {frozenset(shape) for shape in (*WEIGHTS.values(), (48, 64))}
    for function in module.functions:
        if function.name.endswith(".weights"):
            continue
        assert "dequantize" not in [op.opcode for op in function.ops]
        for op in function.ops:
            for v in op.results if op.opcode == "kernel" else ():
                assert frozenset(v.shape) not in sides, str(module)
    assert "dequantize" in opcodes(module)
