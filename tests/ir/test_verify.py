"""Each rule of the verifier, broken once."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, examples, modules
from tilewright.ir.errors import VerifyError
from tilewright.ir.index import IndexMap, as_expr
from tilewright.ir.module import Function, Loc, Module, Op, make_attrs
from tilewright.ir.ops import OPS, infer_types
from tilewright.ir.parser import parse_module
from tilewright.ir.types import DType, Value, tensor_type
from tilewright.ir.verify import verify_module

SYMBOLS = (("B", 1, 4), ("S", 1, 8))
X = Value("x", tensor_type("f32", ["B", 4]))


@examples(60)
@given(modules())
def test_random_modules_are_valid(case: Case) -> None:
    """The strategy would build nonsense, or the verifier refuse what passes may produce."""
    verify_module(case.module)


def attention(extras: str, names: str, keys: str = "%k") -> str:
    """An attention that has operands beside q, k and v, under the given names."""
    operands = ", ".join(["%q", keys, keys, *extras.split()])
    return f"%y = attention {operands} {{A, extras = ({names})}} : f32[B, 4, S, 8]"


BODIES = {
    "operands of two dtypes": ("%y = add %x, %h : f32[B, 4]", "operands must have one dtype"),
    "no broadcast": ("%y = add %x, %w : f32[B, 4]", "broadcast"),
    "wrong result shape": ("%y = neg %x : f32[B, 5]", "result types are f32[B, 5]; they follow as f32[B, 4]"),
    "wrong result dtype": ("%y = neg %x : f64[B, 4]", "they follow as f32[B, 4]"),
    "comparison gives bool": ("%y = lt %x, %x : f32[B, 4]", "they follow as bool[B, 4]"),
    "float op on integers": ("%y = exp %i : i64[B]", "does not take i64"),
    "logic on floats": ("%y = and %x, %x : f32[B, 4]", "does not take f32"),
    "condition of where": ("%y = where %x, %x, %x : f32[B, 4]", "condition must be bool"),
    "too few operands": ("%y = add %x : f32[B, 4]", "operand"),
    "too many operands": ("%y = neg %x, %x : f32[B, 4]", "operand"),
    "too many results": ("%y, %z = cast %x : (f32[B, 4], f32[B, 4])", "model.py:7: takes one result, not 2"),
    "missing attribute": ("%y = reduce %x {axes = (1), keepdim = true} : f32[B, 1]", "missing attributes ['kind']"),
    "unknown reduction": ('%y = reduce %x {axes = (1), keepdim = true, kind = "mean"} : f32[B, 1]', "unknown kind"),
    "reduced axis": ('%y = reduce %x {axes = (2), keepdim = true, kind = "sum"} : f32[B, 1]', "bad axes (2,)"),
    "axes in order": ('%y = reduce %x {axes = (1, 0), keepdim = false, kind = "sum"} : f32[]', "bad axes (1, 0)"),
    "map of another operand": ("%y = view %x {map = (i0) -> (i0)} : f32[B]", "one index per operand dim"),
    "map of another result": ("%y = view %x {map = (i0) -> (i0, 0)} : f32[B, 1]", "one index per result dim"),
    "map with foreign symbols": ("%y = view %x {map = (i0, i1) -> (i0, j)} : f32[B, 4]", "index map uses ['j']"),
    "view changes the dtype": ("%y = view %x {map = (i0, i1) -> (i0, i1)} : f64[B, 4]", "they follow as f32[B, 4]"),
    "concat of other shapes": ("%y = concat %x, %w {axis = 1} : f32[B, 7]", "differ outside axis 1"),
    "concat axis": ("%y = concat %x, %x {axis = 2} : f32[B, 8]", "bad axis 2"),
    "gather by floats": ("%y = gather %x, %x {axis = 0} : f32[B, 4, 4]", "index must be integer"),
    "gather axis": ("%y = gather %x, %i {axis = 2} : f32[B]", "bad axis 2"),
    "inner dims of matmul": ("%y = matmul %x, %w : f32[B, 5]", "K differs"),
    "matmul of integers": ("%y = matmul %n, %n : i64[B, B]", "needs one float dtype"),
    "batch dims of matmul": ("%y = matmul %q, %k : f32[B, 4, S, S]", "batch dims differ"),
    "const of rank 1": ("%y = const {value = 1.0} : f32[4]", "rank"),
    "iota of floats": ("%y = iota : f32[4]", "cannot have dtype f32"),
    "dim of rank 1": ("%y = dim {expr = B} : i64[1]", "rank"),
    "head counts": ("%y = attention %q, %k3, %k3 {A} : f32[B, 4, S, 8]", "multiple of KV heads"),
    "head sizes": ("%y = attention %q, %k6, %k6 {A} : f32[B, 4, S, 6]", "differ in head size"),
    "attention of rank 3": ("%y = attention %x, %k, %k {A} : f32[B, 4, S, 8]", "need rank 4"),
    "extra without a name": ("%y = attention %q, %k, %k, %m {A} : f32[B, 4, S, 8]", "takes 3 operands, has 4"),
    "unknown extra": (attention("%m", "biases"), "mask, sinks, slopes"),
    "a bias of other queries": (attention("%x", "bias"), "bias must be f32[B, 4, S, S]"),
    "order of extras": (attention("%p %m", "slopes, mask"), "in that order"),
    "an extra twice": (attention("%m %m", "mask, mask"), "in that order"),
    "no extras": (attention("", ""), "left out"),
    "mask dtype": (attention("%x", "mask"), "mask must be bool[B, S]"),
    "mask over other keys": (attention("%m", "mask", keys="%k9"), "mask must be bool[B, 9]"),
    "one sink a head": (attention("%p2", "sinks"), "sinks must be f32[4]"),
    "one slope a head": (attention("%p2", "slopes"), "slopes must be f32[4]"),
    "a table without a middle": (attention("%x", "distances"), "an odd number of columns"),
    "slopes are f32": (attention("%p16", "slopes"), "slopes must be f32[4]"),
    "slot with a whole context": (
        '%y = attention %q, %k9, %k9 {causal = true, scale = 1.0, slot = "kv", softcap = 0.0, window = 0}'
        " : f32[B, 4, S, 8]",
        "new tokens only",
    ),
    "ahead of a causal query": (
        "%y = attention %q, %k, %k {A, ahead = 3} : f32[B, 4, S, 8]", "looks at nothing ahead",
    ),
    "no bound ahead": ("%y = attention %q, %k, %k {A, ahead = 0} : f32[B, 4, S, 8]", "ahead is left out"),
    "append of rank 2": ('%y = append %x {slot = "k"} : f32[B, 4]', "needs rank 4"),
    "undeclared dim": ("%y = cast %x : f32[R, 4]", "f32[R, 4]"),
    "undeclared dim of a declared type": ('%y = param {name = "w"} : f32[R, 4]', "undeclared dims ['R']"),
    "undeclared dim of an expression": ("%y = dim {expr = B*R} : i64[]", "expr uses undeclared dims ['R']"),
    "expression of an index": ("%y = dim {expr = i0} : i64[]", "expr uses undeclared dims ['i0']"),
    "undeclared dim of a map": ("%y = view %x {map = (i0, i1) -> (i0, i1 + R)} : f32[B, 4]", "index map uses ['R']"),
    "unknown callee": ('%y = call %x {callee = "other", scope = ""} : f32[B, 4]', "no function @other"),
    "call with other types": ('%y = call %w {callee = "f", scope = ""} : f32[B, 4]', "operands do not fit @f"),
    "call with other results": ('%y = call %x {callee = "f", scope = ""} : f32[B, 5]', "they follow as f32[B, 4]"),
    "kernel without a body": ('%y = kernel %x {name = "k"} : f32[B, 4]', "exactly the kernel ops have a body"),
    "body of another op": ("%y = neg %x [ %a = neg %x : f32[B, 4] ] : f32[B, 4]", "exactly the kernel ops have a body"),
    "kernel operand unused": (
        '%y = kernel %x, %w {name = "k"} [ %y = neg %x : f32[B, 4] ] : f32[B, 4]',
        "exactly the outer values that the body uses",
    ),
    "kernel operand not listed": (
        '%y = kernel %x {name = "k"} [ %y = add %x, %x2 : f32[B, 4] ] : f32[B, 4]',
        "exactly the outer values that the body uses",
    ),
    "kernel operand twice": (
        '%y = kernel %x, %x {name = "k"} [ %y = neg %x : f32[B, 4] ] : f32[B, 4]',
        "an operand is listed twice",
    ),
    "kernel result not made": (
        '%y = kernel %x {name = "k"} [ %z = neg %x : f32[B, 4] ] : f32[B, 4]',
        "result %y is not made by the body",
    ),
    "call in a kernel": (
        '%y = kernel %x {name = "k"} [ %y = call %x {callee = "f", scope = ""} : f32[B, 4] ] : f32[B, 4]',
        "a kernel cannot contain call",
    ),
}  # fmt: skip


def module_with(line: str) -> Module:
    """A module whose entry is one op on typical operands."""
    line = line.replace("{A", '{causal = true, scale = 1.0, slot = "", softcap = 0.0, window = 0')
    return parse_module(f"""
    symbol B [1, 4]
    symbol S [1, 8]
    func @main(%x: f32[B, 4], %x2: f32[B, 4], %h: f16[B, 4], %w: f32[5, 3], %i: i64[B], %n: i64[B, 4],
               %q: f32[B, 4, S, 8], %k: f32[B, 2, S, 8], %k3: f32[B, 3, S, 8], %k6: f32[B, 2, S, 6],
               %k9: f32[B, 2, 9, 8], %m: bool[B, S], %p: f32[4], %p2: f32[2], %p16: f16[4]) -> (%y) {{
      {line}  @ "layers.0.mlp" "model.py:7"
    }}
    func @f(%x: f32[B, 4]) -> (%y) {{ %y = neg %x : f32[B, 4] }}
    """)


@pytest.mark.parametrize(("line", "message"), BODIES.values(), ids=[k.replace(" ", "-") for k in BODIES])
def test_a_broken_op_is_named_with_its_place(line: str, message: str) -> None:
    """A wrong op would reach code generation; or the message would not lead to the model's source line."""
    with pytest.raises(VerifyError, match=re.escape(message)) as caught:
        verify_module(module_with(line))
    assert "@main" in str(caught.value)
    if "undeclared" not in message:
        assert "model.py:7" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "%y = neg %x : f32[B, 4]",
        "%y = matmul %x, %x2 : f32[B, B]",
        "%y = attention %q, %k, %k {A} : f32[B, 4, S, 8]",
        '%y = call %x {callee = "f", scope = "layers.0"} : f32[B, 4]',
        '%y = kernel %x {name = "k"} [ %y = neg %x : f32[B, 4] ] : f32[B, 4]',
    ],
)
def test_the_same_ops_unbroken_are_accepted(line: str) -> None:
    """The rules above would be tested on modules that are wrong for another reason."""
    verify_module(module_with(line))


def op(opcode: str, operands: tuple[Value, ...], *results: Value, **attrs: object) -> Op:
    return Op(opcode, operands, make_attrs(attrs), results, Loc("m", "model.py:7"))


def function(
    *ops: Op, returns: tuple[Value, ...] = (X,), name: str = "main", params: tuple[Value, ...] = (X,)
) -> Function:
    return Function(name, params, ops, returns)


Y, Z = Value("y", X.type), Value("z", X.type)
CALL = op("call", (X,), Y, callee="f", scope="")
INNER = op("neg", (X,), Z)
KERNEL = Op("kernel", (X,), make_attrs({"name": "k"}), (Y,), body=(INNER, op("neg", (Z,), Y)))

STRUCTURE = {
    "two functions of a name": (
        Module((function(), function()), SYMBOLS), "functions share a name",
    ),
    "no entry": (Module((function(name="f"),), SYMBOLS), "there is no function @main"),
    "empty range": (Module((function(),), (("B", 4, 1),)), "symbol B has an empty range"),
    "undeclared dim of a parameter": (Module((function(),)), "%x uses undeclared dims ['B']"),
    "value defined twice": (Module((function(op("neg", (X,), X)),), SYMBOLS), "%x is defined twice"),
    "use before definition": (
        Module((function(op("neg", (Y,), Z), op("neg", (X,), Y)),), SYMBOLS), "operand %y is not defined",
    ),
    "use with another type": (
        Module((function(op("neg", (Value("x", tensor_type("f32", [4])),), Y)),), SYMBOLS), "operand %x is not defined",
    ),
    "returned value unknown": (Module((function(returns=(Y,)),), SYMBOLS), "returned %y is not defined"),
    "unknown op": (Module((function(op("softmax", (X,), Y)),), SYMBOLS), "unknown op 'softmax'"),
    "unknown attribute": (Module((function(op("neg", (X,), Y, axis=1)),), SYMBOLS), "unknown attributes ['axis']"),
    "recursion": (
        Module((function(op("call", (X,), Y, callee="main", scope=""),),), SYMBOLS), "only the entry function calls",
    ),
    "a call below the entry": (
        Module((function(), function(op("call", (X,), Y, callee="main", scope=""), name="f")), SYMBOLS),
        "only the entry function calls",
    ),
    "a value that stays inside a kernel, used": (
        Module((function(KERNEL, op("neg", (Z,), Value("o", X.type))),), SYMBOLS), "stay inside a kernel",
    ),
    "a value that stays inside a kernel, returned": (
        Module((function(KERNEL, returns=(Z,)),), SYMBOLS), "returned %z is not defined",
    ),
    "a kernel in a kernel": (
        Module((function(Op("kernel", (X,), KERNEL.attrs, (Y,), body=(KERNEL,))),), SYMBOLS), "cannot contain kernel",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "message"), STRUCTURE.values(), ids=[k.replace(" ", "-") for k in STRUCTURE]
)
def test_a_broken_structure_is_named(module: Module, message: str) -> None:
    """A pass that leaves a dangling or doubled value would be found in a kernel, if at all."""
    with pytest.raises(VerifyError, match=re.escape(message)):
        verify_module(module)


def test_every_op_declares_what_it_takes() -> None:
    """An op without type inference rules would accept anything."""
    declared = {name for name in OPS if infer_or_none(name) is None}
    assert declared <= {"call", "call_torch", "kernel"}


def infer_or_none(name: str) -> object:
    """What an op without operands and attributes infers; the error counts as an answer."""
    try:
        return infer_types(Op(name, (), tuple((k, None) for k in OPS[name].attrs)))
    except (VerifyError, ValueError, TypeError, AttributeError) as error:
        return error


@examples(60)
@given(modules(), st.data())
def test_a_changed_type_anywhere_is_found(case: Case, data: st.DataObject) -> None:
    """A pass that declares the wrong shape or dtype of one value somewhere."""
    main = case.module.main
    sites = [
        n
        for n, o in enumerate(main.ops)
        if o.results and o.opcode not in ("param", "call_torch", "const", "cast")
    ]
    if not sites:
        return
    n = data.draw(st.sampled_from(sites))
    victim = main.ops[n]
    other = DType.f16 if victim.results[0].dtype is not DType.f16 else DType.f32
    wrong = Value(victim.results[0].name, victim.results[0].type.with_dtype(other))
    table = {victim.results[0]: wrong}
    ops = tuple(
        replace(o.with_operands(table), results=tuple(table.get(v, v) for v in o.results)) for o in main.ops
    )
    broken = replace(main, ops=ops, returns=tuple(table.get(v, v) for v in main.returns))
    rest = (f for f in case.module.functions if f is not main)
    with pytest.raises(VerifyError, match="@main"):
        verify_module(case.module.with_functions((broken, *rest)))


def test_map_reaching_outside_the_operand_is_found() -> None:
    """A view that reads past the end of its operand: garbage on a device, silently."""
    small = Value("s", tensor_type("f32", [4]))
    for expr in (4, -1, "i0 + 3", "2*i0 + 2"):
        index = IndexMap(1, (as_expr(expr),))
        view = op("view", (small,), Value("v", tensor_type("f32", [2])), map=index)
        with pytest.raises(VerifyError, match="outside its operand's dim 4"):
            verify_module(Module((Function("main", (small,), (view,), view.results),), SYMBOLS))


def test_map_of_the_last_positions_stays_inside() -> None:
    """The check above would refuse a slice whose dims depend on each other."""
    verify_module(
        parse_module("""
        symbol L [1, 8]
        symbol S [1, 8]
        func @main(%x: f32[S, 4]) -> (%y) { %y = view %x {map = (i0, i1) -> (S - L + i0, i1)} : f32[L, 4] }
        """)
    )
