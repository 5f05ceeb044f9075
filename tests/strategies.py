"""Hypothesis strategies: random valid modules with inputs, weights and KV state to run them on.

    @given(modules())
    def test(case: Case) -> None:
        results = case.run()                      # the reference evaluator
        results = case.run(other_module)          # the same inputs through a rewritten module

Every value is bounded (intervals are tracked while ops are drawn, and large values are squashed), divisors and
arguments of log, rsqrt and pow stay away from zero, and only values that no rewrite may round are compared or made
integer. So a module's result is finite, well-conditioned and continuous in everything that a pass may round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.random_functions.draft import RandomFunction, Spec
from tests.random_functions.moves import moves
from tilewright.ir.index import sym
from tilewright.ir.module import Function, Module
from tilewright.ir.reference import Evaluation, evaluate, join_scope
from tilewright.ir.types import DType, TensorType, concrete, tensor_type


def examples(count: int) -> settings:
    """Settings of a test that takes this many examples, or as many as an exploring profile asks for."""
    exploring = settings.get_current_profile_name() == "explore"
    return settings() if exploring else settings(max_examples=count)


RANGES = {"B": (1, 4), "S": (1, 8), "T": (1, 16)}


class Case(NamedTuple):
    """A module and what it takes to run it: dim sizes, inputs by parameter, weights and past KV by absolute name."""

    module: Module
    dims: dict[str, int]
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]

    def __repr__(self) -> str:
        """The module as text, for a failing example."""
        tensors = {**self.inputs, **self.weights, **self.state}
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        return f"Case: dims {self.dims}; {shapes}\n{self.module}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def run(
        self, module: Module | None = None, exact: bool = False, state: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Results under the reference evaluator, of this module or of a rewritten one.

        exact: every float as float64. state: a copy of the past to append to (default: a private one).
        """
        module = module or self.module
        weights = self.weights | prepared_weights(module, self.weights, self.dims, exact)
        past = dict(self.state) if state is None else state
        return evaluate(module, self.inputs, weights, self.dims, past, exact)

    @property
    def fixed(self) -> tuple[tuple[str, int], ...]:
        """The dims of a decode program, where this case can be one (S is 1): S, and B when it is 1."""
        return tuple((name, 1) for name in ("B", "S") if self.dims[name] == 1)


def prepared_weights(
    module: Module, weights: Mapping[str, Tensor], dims: Mapping[str, int], exact: bool = False
) -> dict[str, Tensor]:
    """What the ``.weights`` functions compute from the original weights, for every scope, by absolute name."""
    functions = {f.name: f for f in module.functions}
    scopes = [(module.entry, "")]
    scopes += [(op.attr("callee"), op.attr("scope")) for op in module.main.ops if op.opcode == "call"]
    out: dict[str, Tensor] = {}
    for name, scope in scopes:
        prepare = functions.get(f"{name}.weights")
        if prepare is not None:
            results = Evaluation(module, weights, dims, {}, exact).call(prepare, (), scope)
            out |= {join_scope(scope, v.name): t for v, t in zip(prepare.returns, results, strict=True)}
    return out


@st.composite
def modules(
    draw: st.DrawFn,
    dtypes: tuple[DType, ...] = (DType.f32, DType.f32, DType.bf16, DType.f64),
    ops: tuple[int, int] = (2, 9),
    attention: bool = True,
    calls: bool = True,
    torch_calls: bool = True,
    flips: bool = True,
) -> Case:
    """A valid module over B, S (and T, when attention keeps state), with sizes, inputs, weights and past state.

    dtypes: the float dtype is drawn from these. ops: least and most *moves* drawn for a function; a move is one op or
    a small idiom (softmax, norm, rotary embedding, attention ...). The flags leave out ops that a test cannot take.
    """
    dtype = draw(st.sampled_from(dtypes))
    width = draw(st.sampled_from((2, 4, 6, 8)))
    stateful = attention and draw(st.booleans())
    drawn_from = moves(attention, stateful, torch_calls)
    main = RandomFunction(draw, dtype, RANGES, drawn_from, stateful, flips)
    x = main.input("x", tensor_type(dtype, ["B", "S", width]), Spec(-1, 1))
    main.input("ids", tensor_type("i64", ["B", "S"]), Spec(0, 5))
    if stateful or draw(st.booleans()):
        main.input("mask", tensor_type("bool", ["B", "T" if stateful else "S"]), Spec(0, 1))
    count = st.integers(*ops)
    functions: list[Function] = []
    scopes: list[tuple[str, RandomFunction]] = [("", main)]
    if calls and draw(st.booleans()):
        main.grow(draw(st.integers(0, 2)))
        layer = RandomFunction(draw, dtype, RANGES, drawn_from, stateful, flips)
        layer.input("x", x.type, Spec(-4, 4))
        shared = [v for v in main.builder.params if v.dtype is DType.bool]
        for v in shared:
            layer.input(v.name, v.type, Spec(0, 1))
        layer.grow(draw(count))
        functions.append(layer.finish("layer0", first=x.type))
        hidden = main.bounded(main.shaped(x.type), 4)
        for n in range(draw(st.integers(1, 3))):
            scope = f"layers.{n}"
            scopes.append((scope, layer))
            hidden = main.call(functions, "layer0", (hidden, *shared), scope)
    main.grow(draw(count))
    functions.insert(0, main.finish("main", first=x.type if draw(st.booleans()) else None))
    used = {s.name for f in functions for v in _values(f) for d in v.shape for s in d.free_symbols} | {
        "B",
        "S",
    }
    module = Module(tuple(functions), tuple((n, *RANGES[n]) for n in sorted(used)))
    return _with_data(draw, module, scopes, stateful)


def _values(function: Function) -> list[object]:
    return [*function.params, *(v for op in function.ops for v in op.results)]


def _with_data(
    draw: st.DrawFn, module: Module, scopes: list[tuple[str, RandomFunction]], stateful: bool
) -> Case:
    past = draw(st.integers(0, 3)) if stateful else 0
    dims = {"B": draw(st.integers(1, 3)), "S": draw(st.integers(1, 5))}
    dims["T"] = past + dims["S"]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    main = scopes[0][1]

    def data(type: TensorType, spec: Spec, sizes: Mapping[str, int] = dims) -> Tensor:
        return random_tensor(generator, type.dtype, concrete(type.shape, sizes), spec)

    inputs = {v.name: data(v.type, main.specs[v]) for v in main.builder.params}
    if "mask" in inputs:
        inputs["mask"][:, -1] = True
    weights = {
        join_scope(scope, name): data(type, spec)
        for scope, function in scopes
        for name, (type, spec) in function.weights.items()
    }
    state = {}
    if past:
        state = {
            join_scope(scope, slot): data(type, Spec(-1, 1), dims | {"S": past})
            for scope, function in scopes
            for slot, type in function.slots.items()
        }
    return Case(module, dims, inputs, weights, state)


def random_tensor(generator: torch.Generator, dtype: DType, shape: tuple[int, ...], spec: Spec) -> Tensor:
    """Multiples of 1/8 within the interval (so exact in every float dtype), or integers, or booleans."""
    steps = 8 if dtype.is_float else 1
    low, high = int(spec.low * steps), int(spec.high * steps)
    return (torch.randint(low, high + 1, shape, generator=generator) / steps).to(dtype.torch)


@st.composite
def shapes(draw: st.DrawFn, rank: st.SearchStrategy[int] = st.integers(0, 4)) -> tuple[object, ...]:
    """A small symbolic shape."""
    dims = [sym("B"), sym("S"), 1, 2, 3, 4, 6]
    return tensor_type("f32", [draw(st.sampled_from(dims)) for _ in range(draw(rank))]).shape
