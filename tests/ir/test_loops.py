"""The loop form against the reference evaluator: kernels of random bodies, run element by element."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.scalar_loops import Interpreter, evaluate_expr, run_loops
from tests.strategies import Case, examples, modules
from tilewright.ir.errors import VerifyError
from tilewright.ir.index import as_expr
from tilewright.ir.loops import (
    PRIMITIVES,
    Apply,
    Axis,
    Dot,
    Load,
    Loops,
    attention_form,
    elementwise_inputs,
    flops,
    free_symbols,
    print_loops,
    product_form,
    scalarize,
)
from tilewright.ir.module import Function, Op, make_attrs
from tilewright.ir.parser import parse_module
from tilewright.ir.reference import Evaluation
from tilewright.ir.types import Value, concrete

LOOP_FREE = (*PRIMITIVES, "call", "call_torch", "kernel")


def kernel_of(ops: Iterable[Op], results: Iterable[Value], name: str = "k") -> Op:
    """Ops as one kernel."""
    body = tuple(ops)
    made = {v for op in body for v in op.results}
    reads = dict.fromkeys(v for op in body for v in op.operands if v not in made)
    return Op("kernel", tuple(reads), make_attrs({"name": name}), tuple(results), body=body)


def fuse_greedily(function: Function) -> list[Op]:
    """The function's ops, weights first, with consecutive ones in one kernel as long as that has a loop form."""
    function = function.with_ops(sorted(function.ops, key=lambda op: op.opcode != "param"))
    out: list[Op] = []
    group: list[Op] = []
    outside = set(function.returns)
    uses: dict[Value, set[int]] = {}
    for n, op in enumerate(function.ops):
        for v in op.operands:
            uses.setdefault(v, set()).add(n)

    def kernel(ops: list[Op], last: int) -> Op:
        made = [v for op in ops for v in op.results]
        return kernel_of(
            ops, [v for v in made if v in outside or any(n > last for n in uses.get(v, ()))], f"k{len(out)}"
        )

    def close(last: int) -> None:
        if group and (op := kernel(group, last)).results:
            out.append(op)
        group.clear()

    for n, op in enumerate(function.ops):
        if op.opcode in (*LOOP_FREE, "param"):
            close(n - 1)
            out.append(op)
            continue
        if group:
            try:
                scalarize(kernel([*group, op], n))
            except VerifyError:
                close(n - 1)
        group.append(op)
    close(len(function.ops) - 1)
    return out


def runs(case: Case) -> Iterator[tuple[Op, dict[Value, Tensor]]]:
    """Every kernel of the greedily fused entry function with the values around it, in float64."""
    run = Evaluation(case.module, case.weights, case.dims, dict(case.state), exact=True)
    main = case.module.main
    env: dict[Value, Tensor] = {p: case.inputs[p.name].to(run.dtype(p.dtype)) for p in main.params}
    for op in fuse_greedily(main):
        run.run(op, env, "")
        if op.opcode == "kernel":
            yield op, env


def empty_like(value: Value, dims: dict[str, int]) -> Tensor:
    dtype = torch.float64 if value.dtype.is_float else value.dtype.torch
    return torch.zeros(concrete(value.shape, dims), dtype=dtype)


def check_loops(loops: Loops, env: dict[Value, Tensor], dims: dict[str, int]) -> None:
    """Every element is stored once, with the value that the reference gives."""
    outputs = {v: empty_like(v, dims) for v in loops.outputs}
    written = run_loops(loops, {v: env[v] for v in loops.inputs}, dims, outputs)
    for v, tensor in outputs.items():
        assert bool((written[v] == 1).all()), f"{v} is not stored exactly once:\n{loops}"
        torch.testing.assert_close(tensor, env[v], rtol=1e-9, atol=1e-9, msg=lambda m, v=v: f"{v}: {m}")


@examples(50)
@given(modules())
def test_loop_form_computes_what_the_ops_mean(case: Case) -> None:
    """A wrong index, range, segment or reduction in the one description that both backends print."""
    for kernel, env in runs(case):
        check_loops(scalarize(kernel), env, case.dims)


@examples(30)
@given(modules(), st.integers(0, 2**16))
def test_in_place_execution_gives_the_same(case: Case, seed: int) -> None:
    """The memory planner would let a kernel overwrite what another iteration still reads."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(count: int) -> list[Tensor]:
        points = torch.randperm(count, generator=generator)
        return list(points.split(max(1, count // 3)))

    for kernel, env in runs(case):
        loops = scalarize(kernel)
        for source, target in sorted(elementwise_inputs(loops), key=str):
            if source.dtype.is_float != target.dtype.is_float:
                continue
            inputs = {v: env[v].clone() for v in loops.inputs}
            outputs = {v: empty_like(v, case.dims) for v in loops.outputs}
            shared = inputs[source].contiguous()
            inputs[source], outputs[target] = shared, shared
            if shared.dtype != (torch.float64 if target.dtype.is_float else target.dtype.torch):
                continue
            run_loops(loops, inputs, case.dims, outputs, shuffled)
            for v, tensor in outputs.items():
                torch.testing.assert_close(
                    tensor, env[v], rtol=1e-9, atol=1e-9, msg=lambda m, v=v: f"{v}: {m}"
                )


@examples(30)
@given(modules(attention=False))
def test_product_form_separates_rows_from_columns(case: Case) -> None:
    """A tiled product would read ``a`` along columns, or the weight along rows."""
    for kernel, env in runs(case):
        for segment in scalarize(kernel).segments:
            form = product_form(segment)
            if form is None:
                continue
            parts = (form.rows, form.columns, form.batch)
            rows, columns, batch = ({a.symbol for a in axes} for axes in parts)
            assert rows | columns | batch == {a.symbol for a in segment.axes}
            assert len(rows) + len(columns) + len(batch) == len(segment.axes)
            assert free_symbols(form.a) <= rows | batch | {form.k.symbol}
            assert {n for n in segment.nodes() if isinstance(n, Dot)} == set(form.dots)
            run = Interpreter({v: env[v] for v in kernel.operands}, case.dims)
            points, count = run.points(segment)
            k = torch.zeros(count, dtype=torch.int64)
            point = dict(case.dims) | points | {form.k.symbol.name: k}
            first = run.node(form.a, point, count)
            moved = point | {s.name: torch.zeros(count, dtype=torch.int64) for s in columns}
            torch.testing.assert_close(run.node(form.a, moved, count), first, rtol=0, atol=0)
            for dot in form.dots:
                assert dot.a is form.a
                assert free_symbols(dot.b) <= columns | {form.k.symbol}


def kernel_from(text: str) -> Op:
    """The first kernel of a module's entry."""
    return next(op for op in parse_module(text).main.ops if op.opcode == "kernel")


ROPE = """
symbol B [1, 4]
symbol S [1, 8]
func @main(%x: f32[B, S, 12], %w: f32[8, 12], %cos: f32[B, S, 4], %sin: f32[B, S, 4]) -> (%y) {
  %y = kernel %x, %w, %cos, %sin {name = "rope"} [
    %q = matmul %x, %w : f32[B, S, 8]
    %h = view %q {map = (i0, i1, i2, i3) -> (i0, i2, 4*i1 + i3)} : f32[B, 2, S, 4]
    %a = view %h {map = (i0, i1, i2, i3) -> (i0, i1, i2, i3)} : f32[B, 2, S, 2]
    %b = view %h {map = (i0, i1, i2, i3) -> (i0, i1, i2, i3 + 2)} : f32[B, 2, S, 2]
    %n = neg %b : f32[B, 2, S, 2]
    %r = concat %n, %a {axis = 3} : f32[B, 2, S, 4]
    %c = view %cos {map = (i0, i1, i2, i3) -> (i0, i2, i3)} : f32[B, 1, S, 4]
    %s = view %sin {map = (i0, i1, i2, i3) -> (i0, i2, i3)} : f32[B, 1, S, 4]
    %u = mul %h, %c : f32[B, 2, S, 4]
    %v = mul %r, %s : f32[B, 2, S, 4]
    %y = add %u, %v : f32[B, 2, S, 4]
  ] : f32[B, 2, S, 4]
}
"""


def test_rotary_embedding_is_one_product_with_two_dots() -> None:
    """RoPE after a projection would need a kernel of its own."""
    loops = scalarize(kernel_from(ROPE))
    forms = [product_form(s) for s in loops.segments]
    assert len(forms) == 1, print_loops(loops)
    (form,) = forms
    assert form is not None
    assert len(form.dots) == 2
    assert [str(a.extent) for a in form.rows] == ["B", "S"]
    assert sympy.prod([a.extent for a in form.columns]) * len(loops.segments[0].stores) == 8


JOINED = """
symbol D [1, 8]
symbol E [1, 8]
symbol N [1, 4]
func @main(%x: f32[2, D], %y: f32[2, E]) -> (%z) {
  %z = kernel %x, %y {name = "joined"} [
    %j = concat %x, %y {axis = 1} : f32[2, D + E]
    %z = view %j {map = (i0, i1) -> (i0, AT)} : f32[2, EXTENT]
  ] : f32[2, EXTENT]
}
"""


@pytest.mark.parametrize(
    ("at", "extent"), [("D + E + i1 - 3", "3"), ("i1", "N"), ("i1 + N", "D + E - N"), ("i1 + 2", "D + E - 2")]
)
def test_a_seam_that_may_lie_outside_is_not_cut(at: str, extent: str) -> None:
    """A slice that need not reach every part would be cut into pieces of negative extents, and write elsewhere."""
    with pytest.raises(VerifyError, match="cannot split"):
        scalarize(kernel_from(JOINED.replace("AT", at).replace("EXTENT", extent)))


@pytest.mark.parametrize(
    ("parts", "view", "extent"),
    [
        (("S - 3", "4", "S - 2"), "i0", "2*S - 1"),
        (("3", "S - 3"), "i0 + 1", "S - 1"),
        (("4", "S - 3", "S - 2"), "i0", "S + 1"),
    ],
    ids=["whole", "from the second on", "the first two"],
)
def test_parts_of_sizes_that_only_their_tensors_know(parts: tuple[str, ...], view: str, extent: str) -> None:
    """A concat of slices would have no loop form: nothing but the tensor says that S is 3 at least."""
    params = ", ".join(f"%p{n}: f32[{d}]" for n, d in enumerate(parts))
    values = ", ".join(f"%p{n}" for n in range(len(parts)))
    text = f"""
    symbol S [3, 8]
    func @main({params}) -> (%z) {{
      %z = kernel {values} {{name = "parts"}} [
        %j = concat {values} {{axis = 0}} : f32[{as_expr(" + ".join(parts))}]
        %z = view %j {{map = (i0) -> ({view})}} : f32[{extent}]
      ] : f32[{extent}]
    }}"""
    kernel = kernel_from(text)
    env = {v: torch.randn(concrete(v.shape, {"S": 5}), dtype=torch.float64) for v in kernel.operands}
    Evaluation(parse_module(text), {}, {"S": 5}, {}, exact=True).run(kernel, env, "")
    check_loops(scalarize(kernel), env, {"S": 5})


HEADS = """
%y = kernel %x, %w {name = "heads"} [
    %p = matmul %x, %w : f32[B, S, 64]
    %h = view %p {map = (i0, i1, i2) -> ((i0 // 4), i1, i2 + 16*((i0 % 4)))} : f32[4*B, S, 16]
    %y = neg %h : f32[4*B, S, 16]
  ] : f32[4*B, S, 16]
"""
SCORES = """
%y = kernel %x, %w {name = "scores"} [
    %h = view %w {map = (i0, i1, i2) -> (i1, i2 + 16*((i0 % 4)))} : f32[4*B, 40, 16]
    %p = matmul %x, %h : f32[4*B, S, 40]
    %y = view %p {map = (i0) -> ((i0 // (40*S)), ((i0 // 40) % S), (i0 % 40))} : f32[160*B*S]
  ] : f32[160*B*S]
"""


@pytest.mark.parametrize(
    ("text", "shapes", "parts"),
    [
        (HEADS, ("f32[B, S, 24]", "f32[64, 24]", "f32[4*B, S, 16]"), (["B", "S"], ["4", "16"], [])),
        (SCORES, ("f32[4*B, S, 16]", "f32[40, 64]", "f32[160*B*S]"), (["S"], ["40"], ["4*B"])),
    ],
    ids=["heads", "scores"],
)
def test_digits_of_a_merged_axis_are_axes(
    text: str, shapes: tuple[str, ...], parts: tuple[list[str], ...]
) -> None:
    """A product whose rows and columns share an axis would be a batch of tiny ones, or a sum for each result."""
    x, w, _y = shapes
    module = parse_module(
        f"symbol B [1, 4]\nsymbol S [1, 8]\nfunc @main(%x: {x}, %w: {w}) -> (%y) {{ {text} }}"
    )
    (segment,) = scalarize(module.main.ops[0]).segments
    form = product_form(segment)
    assert form is not None
    assert tuple([str(a.extent) for a in axes] for axes in (form.rows, form.columns, form.batch)) == parts


def test_rotary_kernel_by_brute_force() -> None:
    """The two halves swapped, or a sign lost, in the segment that is tiled for the matrix product."""
    kernel = kernel_from(ROPE)
    dims = {"B": 2, "S": 3}
    env = {v: torch.randn(concrete(v.shape, dims), dtype=torch.float64) for v in kernel.operands}
    run = Evaluation(parse_module(ROPE), {}, dims, {}, exact=True)
    run.run(kernel, env, "")
    check_loops(scalarize(kernel), env, dims)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("%y = neg %x : f32[4, 4]", {("x", "y")}),
        ("%a = exp %x : f32[4, 4] %y = add %a, %x : f32[4, 4]", {("x", "y")}),
        ("%y = view %x {map = (i0, i1) -> (i1, i0)} : f32[4, 4]", set()),
        ("%y = view %x {map = (i0, i1) -> (3 - i0, i1)} : f32[4, 4]", set()),
        ("%s = reduce %x {axes = (1), keepdim = true, kind = \"sum\"} : f32[4, 1] %y = add %x, %s : f32[4, 4]", set()),
        ("%y = matmul %x, %x : f32[4, 4]", set()),
        (
            "%a = view %x {map = (i0, i1) -> (i0, i1)} : f32[1, 4]"
            " %b = view %x {map = (i0, i1) -> (i0 + 1, i1)} : f32[3, 4]"
            " %y = concat %a, %b {axis = 0} : f32[4, 4]",
            {("x", "y")},
        ),
        (
            "%a = view %x {map = (i0, i1) -> (i0, i1)} : f32[2, 4]"
            " %b = view %x {map = (i0, i1) -> (i0 + 2, i1)} : f32[2, 4]"
            " %y = concat %b, %a {axis = 0} : f32[4, 4]",
            set(),
        ),
        ("%i = cast %x : i32[4, 4] %y = cast %i : f64[4, 4]", set()),
    ],
)  # fmt: skip
def test_what_may_run_in_place(body: str, what: set[tuple[str, str]]) -> None:
    """An aliasing rule that is too lax breaks results, one that is too strict costs memory for each elementwise op."""
    dtype = "f64" if "f64" in body else "f32"
    text = f'func @main(%x: f32[4, 4]) -> (%y) {{ %y = kernel %x {{name = "k"}} [ {body} ] : {dtype}[4, 4] }}'
    pairs = elementwise_inputs(scalarize(kernel_from(text)))
    assert {(a.name, b.name) for a, b in pairs} == what


def test_in_place_pair_is_lost_when_another_output_reads_the_input() -> None:
    """Two results: the first overwrites what the second still reads elsewhere."""
    text = """
    func @main(%x: f32[4, 4]) -> (%y, %z) {
      %y, %z = kernel %x {name = "k"} [
        %y = neg %x : f32[4, 4]
        %z = view %x {map = (i0, i1) -> (i1, i0)} : f32[4, 4]
      ] : (f32[4, 4], f32[4, 4])
    }"""
    assert elementwise_inputs(scalarize(kernel_from(text))) == frozenset()


def test_append_stores_at_the_end_of_the_context() -> None:
    """New keys would overwrite old ones."""
    text = """
    symbol B [1, 4]
    symbol S [1, 8]
    symbol T [1, 8]
    func @main(%x: f32[B, S, 6], %w: f32[8, 6]) -> (%c) {
      %c = kernel %x, %w {name = "k"} [
        %k = matmul %x, %w : f32[B, S, 8]
        %h = view %k {map = (i0, i1, i2, i3) -> (i0, i2, 4*i1 + i3)} : f32[B, 2, S, 4]
        %c = append %h {slot = "kv.k"} : f32[B, 2, T, 4]
      ] : f32[B, 2, T, 4]
    }"""
    loops = scalarize(kernel_from(text))
    dims = {"B": 2, "S": 2, "T": 5}
    env = {v: torch.randn(concrete(v.shape, dims), dtype=torch.float64) for v in loops.inputs}
    (target,) = loops.outputs
    cache = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    before = cache.clone()
    written = run_loops(loops, env, dims, {target: cache})[target]
    x, w = (env[v] for v in loops.inputs)
    expected = (x @ w.T).reshape(2, 2, 2, 4).transpose(1, 2)
    torch.testing.assert_close(cache[:, :, 3:], expected)
    torch.testing.assert_close(cache[:, :, :3], before[:, :, :3], rtol=0, atol=0)
    assert int(written[:, :, 3:].min()) == int(written.max()) == 1


ATTENTION = """
symbol B [1, 4]
symbol S [1, 8]
func @main(%q: f32[B, 4, S, 2], %k: f32[B, 2, S, 2], %v: f32[B, 2, S, 2]) -> (%y) {
  %y = kernel %q, %k, %v {name = "k"} [
    %a = attention %q, %k, %v {causal = true, scale = 0.7, slot = "", softcap = 0.0, window = 0} : f32[B, 4, S, 2]
    %p = view %a {map = (i0, i1, i2, i3) -> (i0, i2, i1, i3)} : f32[B, S, 4, 2]
    %y = view %p {map = (i0, i1, i2) -> (i0, i1, (i2 // 2), (i2 % 2))} : f32[B, S, 8]
  ] : f32[B, S, 8]
}
"""


def test_attention_form_inverts_the_views() -> None:
    """Attention's result would be stored in the wrong layout."""
    kernel = kernel_from(ATTENTION)
    form = attention_form(kernel)
    assert form is not None
    ((target, index),) = form.stores
    dims = {"B": 2, "S": 3}
    env = {v: torch.randn(concrete(v.shape, dims), dtype=torch.float64) for v in kernel.operands}
    Evaluation(parse_module(ATTENTION), {}, dims, {}, exact=True).run(kernel, env, "")
    result = env[form.op.result]
    stored = torch.full(concrete(target.shape, dims), torch.nan, dtype=torch.float64)
    for point in torch.cartesian_prod(*(torch.arange(n) for n in result.shape)).tolist():
        at = dims | dict(zip("bhsd", point, strict=True))
        stored[tuple(evaluate_expr(e, at) for e in index)] = result[tuple(point)]
    torch.testing.assert_close(stored, env[target], rtol=0, atol=0)


def test_attention_form_refuses_other_ops() -> None:
    """Arithmetic after attention would be dropped silently."""
    kernel = kernel_from(ATTENTION)
    more = replace(
        kernel, body=(*kernel.body, Op("neg", kernel.results, (), (Value("z", kernel.result.type),)))
    )
    assert attention_form(more) is None
    assert attention_form(kernel_from(ROPE)) is None


def test_scalarize_refuses_what_has_no_loop_form() -> None:
    """A printer would meet a node that it cannot print."""
    with pytest.raises(VerifyError, match="attention has no loop form"):
        scalarize(kernel_from(ATTENTION))


def test_a_row_of_ids_that_is_itself_looked_up() -> None:
    """The outer lookup's symbol would be left in the index of the inner one's ids, bound by nothing."""
    text = """
    func @main(%t: f32[100], %ids: i64[4, 6], %columns: i64[3]) -> (%y) {
      %y = kernel %t, %ids, %columns {name = "k"} [
        %a = gather %t, %ids {axis = 0} : f32[4, 6]
        %y = gather %a, %columns {axis = 1} : f32[4, 3]
      ] : f32[4, 3]
    }"""
    with pytest.raises(VerifyError, match="itself gathered"):
        scalarize(kernel_from(text))


def test_equal_scalars_are_one_node() -> None:
    """A value used twice would be computed twice, at every level: exponential work in deep kernels."""
    lines = ["%v0 = add %x, %x : f32[4]"] + [
        f"%v{n} = add %v{n - 1}, %v{n - 1} : f32[4]" for n in range(1, 60)
    ]
    text = f'func @main(%x: f32[4]) -> (%v59) {{ %v59 = kernel %x {{name = "k"}} [ {" ".join(lines)} ] : f32[4] }}'
    (segment,) = scalarize(kernel_from(text)).segments
    nodes = list(segment.nodes())
    assert len(nodes) == 61
    assert sum(isinstance(n, Load) for n in nodes) == 1
    assert flops(scalarize(kernel_from(text))) == 60 * 4


def test_flops_of_a_product_with_bias() -> None:
    """The report's FLOPs and the tuner's cost model would be off."""
    text = """
    symbol B [1, 4]
    func @main(%x: f32[B, 6], %w: f32[8, 6], %b: f32[8]) -> (%y) {
      %y = kernel %x, %w, %b {name = "k"} [
        %m = matmul %x, %w : f32[B, 8]
        %y = add %m, %b : f32[B, 8]
      ] : f32[B, 8]
    }"""
    batch = sympy.Symbol("B", integer=True, positive=True)
    assert flops(scalarize(kernel_from(text))) == 2 * batch * 8 * 6 + batch * 8


@pytest.mark.parametrize(("size", "axes"), [(1, 0), (3, 1)])
def test_unit_axes_vanish(size: int, axes: int) -> None:
    """A decode kernel would loop over dims of size 1."""
    shape = f"f32[1, {size}]"
    text = f'func @main(%x: {shape}) -> (%y) {{ %y = kernel %x {{name = "k"}} [ %y = neg %x : {shape} ] : {shape} }}'
    (segment,) = scalarize(kernel_from(text)).segments
    assert len(segment.axes) == axes
    assert all(isinstance(a, Axis) for a in segment.axes)
    assert isinstance(segment.stores[0].value, Apply)


def test_loops_print_every_store() -> None:
    """The text that people read would hide part of a kernel."""
    loops = scalarize(kernel_from(ROPE))
    text: Any = print_loops(loops)
    assert text.count("dot(") == 4
    assert text.count("%y[") == sum(len(s.stores) for s in loops.segments)
