"""The text that the Triton backend prints, without running it."""

from __future__ import annotations

import re

import pytest
import sympy

from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.kernel import print_kernel
from tilewright.codegen.triton.pointwise_ops import TRITON
from tilewright.codegen.triton.text import Names, Scope, print_index
from tilewright.ir.builder import Builder
from tilewright.ir.errors import OptionError
from tilewright.ir.index import parse_expr
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.types import DType, tensor_type

from .kernel_case import CAPACITY, RANGES, finish
from .triton_cases import CASES
from .triton_run import source_of

TEMPLATES = {
    "select": ("pointwise",),
    "embedding-bf16": ("pointwise",),
    "rms_norm-f32-64": ("reduction",),
    "softmax": ("reduction",),
    "merge": ("reduction",),
    "linear-f32-many": ("matmul",),
    "gated-bf16-one": ("matmul",),
    "rope-f32-many": ("matmul", "matmul", "matmul"),
    "batched-f32": ("matmul",),
    "nested": ("generic",),
    "attention-f32": ("attention",),
    "attention_split-f32": ("attention",),
}


@pytest.mark.parametrize(("block_m", "shared"), [(1, False), (4, True), (8, True), (64, False)])
def test_groups_of_a_row_share_its_sum(block_m: int, shared: bool) -> None:
    """A tile of some of eight groups loads their row once; one that has groups of several rows, one for each."""
    _, text = source_of(CASES["round_shared-3-f32--256"](), False, {"block_m": block_m})
    assert ("first = pid * BLOCK_M" in text) == shared
    by_row = "(first // 8)" if shared else "(m // 8)"
    assert f"{by_row} * 256" in text


def test_no_pointwise_op_is_missing() -> None:
    assert set(TRITON) == set(POINTWISE)


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(name: str) -> None:
    kernel, _ = source_of(CASES[name](), interpret=False)
    assert kernel.templates == TEMPLATES[name]


@pytest.mark.parametrize("name", ["rope-bf16-many", "layer_norm-f32-9000", "attention_split-f16"])
def test_printing_is_deterministic(name: str) -> None:
    assert source_of(CASES[name](), False)[1] == source_of(CASES[name](), False)[1]


def test_row_statistics_share_the_loop_of_the_product() -> None:
    text = source_of(CASES["gated-bf16-many"](), False)[0].text
    assert text.count("for start in") == 1
    assert text.count("tl.dot(") == 2
    assert source_of(CASES["norm_linear-bf16-many"](), False)[0].text.count("for start in") == 3


def test_loop_invariant_loads_leave_the_loop() -> None:
    lines = source_of(CASES["linear-f32-many"](), False)[0].text.splitlines()
    loop = next(n for n, line in enumerate(lines) if "for start in" in line)
    inside = [line for line in lines[loop + 1 :] if line.startswith("        ")]
    assert sum("tl.load" in line for line in inside) == 2
    assert not any("p_c" in line for line in inside)


def test_the_header_names_the_origin() -> None:
    assert print_kernel(CASES["concat"]().kernel, _environment()).text.startswith(
        "# fused: view, view, neg, concat, add\n"
    )


def test_tunables_change_blocks_and_options() -> None:
    kernel = CASES["linear-f32-many"]().kernel
    changed = print_kernel(kernel, _environment({"fused": {"block_n": 128, "num_warps": 8}}))
    assert "BLOCK_N: tl.constexpr = 128" in changed.text
    assert dict(changed.options)["num_warps"] == 8
    with pytest.raises(OptionError, match="block_q"):
        print_kernel(kernel, _environment({"fused": {"block_q": 1}}))


def test_a_transposed_tile_exchanges_rows_and_columns() -> None:
    """Rows lie along the last axis of every block, and the weight is the left operand."""
    kernel = CASES["linear-bf16-four"]().kernel
    text = print_kernel(kernel, _environment({"fused": {"transposed": 1}})).text
    assert "tl.zeros([BLOCK_N, BLOCK_M], tl.float32)" in text
    left, right = re.search(r"tl\.dot\((\w+), (\w+),", text).groups()  # type: ignore[union-attr]
    assert (left[:1], right[:1]) == ("w", "x")


def test_scores_are_scaled_late_only_where_that_loses_nothing() -> None:
    """Differences of scores are exact where they may be large: in float32, and where a kernel stores its reference."""
    for name in ("attention-f32", "attention_split-bf16"):
        assert re.search(
            r"tl\.exp2\(\((\w+) - new_top\) \*", print_kernel(CASES[name]().kernel, _environment()).text
        )
    text = print_kernel(CASES["attention-bf16"]().kernel, _environment()).text
    factor = 16**-0.5 * 1.4426950408889634
    assert text.count(f"keep_dims=True) * {factor!r})") == text.count(f" * {factor!r} - new_top") == 2
    assert "-1.0e38" in text


def test_keys_that_all_queries_see_are_walked_without_conditions() -> None:
    """One loop with conditions on indices and mask, one without; no second one for a single query."""
    both = print_kernel(CASES["attention-bf16"]().kernel, _environment()).text
    inner, edge = both.split("for start in range(0, inner_1, BLOCK_N):")[1].split(
        "for start in range(inner_1, "
    )
    assert "mask=" not in inner
    assert "seen" not in inner
    assert "<= position" in edge
    assert "valid" in edge
    assert "inner" not in print_kernel(CASES["attention_decode"]().kernel, _environment()).text


def test_offsets_into_large_tensors_are_64_bits_wide() -> None:
    b = Builder()
    x = b.param_value("x", tensor_type("f16", ["B", "S", 16384]))
    w = b.param_value("w", tensor_type("f16", [200_000, 16384]))
    kernel = finish(b, b.add("matmul", x, w)).kernel
    lines = print_kernel(kernel, _environment({"fused": {"descriptors": 0}})).text.splitlines()
    (weight,) = (line for line in lines if "tl.load(p_w" in line)
    (row,) = (line for line in lines if "tl.load(p_x" in line)
    assert "n.to(tl.int64) * 16384" in weight
    assert "int64" not in row


@pytest.mark.parametrize("dtype", ["i32", "i64"])
def test_offsets_of_rows_looked_up_in_large_tables_are_64_bits_wide(dtype: str) -> None:
    b = Builder()
    ids = b.param_value("ids", tensor_type(dtype, ["B", "S"]))
    table = b.param_value("table", tensor_type("f16", [200_000, 16384]))
    text = print_kernel(finish(b, b.add("gather", table, ids, axis=0)).kernel, _environment()).text
    (row,) = re.findall(r"tl\.load\(p_table \+ \((\w+) \* 16384", text)
    (found,) = re.findall(rf"\b{row} = (.*)", text)
    assert found.startswith("tl.load(p_ids" if dtype == "i64" else "tl.cast(ids, tl.int64)")


@pytest.mark.parametrize("name", ["tanh", "larger", "low_codes"])
def test_no_variable_hides_a_helper(name: str) -> None:
    """A model may call its weights what the helpers are called."""
    b = Builder()
    x = b.add("tanh", b.param_value(name, tensor_type("f32", [40])))
    text = print_kernel(finish(b, b.add("maximum", x, b.const(0.5, DType.f32))).kernel, _environment()).text
    assert not re.search(rf"\b{name} = ", text)
    assert f"{name}_1 = tl.load" in text


def _environment(tunables: dict[str, dict[str, int]] | None = None) -> Environment:
    return Environment(CAPACITY, {name: high for name, (_, high) in RANGES.items()}, False, tunables or {})


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        ("64*i1 + i0 % 8", "i1 * 64 + i0 % 8"),
        ("i0 // 4 - 3", "i0 // 4 - 3"),
        ("(i0 + 1) % 8 * 4", "((i0 + 1) % 8) * 4"),
        ("S*i0", "S * i0"),
        ("Max(i0, S)", "tl.maximum(S, i0)"),
    ],
)
def test_index_text(expr: str, text: str) -> None:
    shown = print_index(parse_expr(expr))
    values = {"i0": 13, "i1": 5, "S": 7}
    wanted = parse_expr(expr).subs(
        {sympy.Symbol(n, integer=True, nonnegative=True): v for n, v in values.items()}
    )
    assert sorted(shown) == sorted(text)
    if "tl." not in shown:
        assert eval(shown, {}, values) == wanted.subs({s: values[s.name] for s in wanted.free_symbols})


def test_scopes_hoist_and_share() -> None:
    base = Scope(Names())
    loop = base.open("for k in range(4):")
    assert base.bind("p + 1") == loop.bind("p + 1")
    loop.line("use(t)")
    base.close(loop)
    assert base.lines == ["    t = p + 1", "    for k in range(4):", "        use(t)"]
