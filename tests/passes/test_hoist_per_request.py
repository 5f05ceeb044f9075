"""What is known at a request's start leaves the steps, nothing else does, and both parts together mean the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, examples, modules
from tilewright.ir.module import Module
from tilewright.ir.parser import parse_module
from tilewright.ir.verify import verify_module
from tilewright.passes.hoist_per_request import Hoisted, hoist_per_request

from .test_meaning import assert_close


def hoisted(text: str, *known: str) -> Hoisted:
    module = parse_module(text)
    verify_module(module)
    found = hoist_per_request(module, known)
    assert found is not None
    verify_module(found.once)
    verify_module(found.steps)
    return found


def opcodes(module: Module, name: str = "main") -> list[str]:
    return [op.opcode for op in module.function(name).ops]


def test_what_depends_on_known_inputs_and_weights_alone_is_computed_once() -> None:
    found = hoisted(
        """
        symbol B [1, 4]
        symbol E [1, 8]
        symbol S [1, 4]
        func @main(%x: f32[B, S, 4], %states: f32[B, E, 4]) -> (%y) {
          %w = param {name = "w"} : f32[4, 4]
          %k = matmul %states, %w : f32[B, E, 4]
          %q = matmul %x, %w : f32[B, S, 4]
          %y = matmul %q, %k : f32[B, S, E]
        }
        """,
        "states",
    )
    assert opcodes(found.once) == ["param", "matmul"]
    assert opcodes(found.steps) == ["param", "matmul", "matmul"]  # the weight is read by both
    assert [p.name for p in found.once.main.params] == ["states"]
    assert [p.name for p in found.steps.main.params] == ["x", *found.names] == ["x", "k"]
    assert [name for name, _, _ in found.once.symbols] == ["B", "E"]


def test_a_layer_is_cut_in_two_and_each_call_has_values_of_its_own() -> None:
    found = hoisted(
        """
        symbol B [1, 4]
        symbol E [1, 8]
        symbol S [1, 4]
        func @main(%x: f32[B, S, 4], %states: f32[B, E, 4], %seen: bool[B, E]) -> (%b) {
          %a = call %x, %states, %seen {callee = "layer", scope = "layers.0"} : f32[B, S, 4]
          %b = call %a, %states, %seen {callee = "layer", scope = "layers.1"} : f32[B, S, 4]
        }
        func @layer(%x: f32[B, S, 4], %states: f32[B, E, 4], %seen: bool[B, E]) -> (%y) {
          %w = param {name = "w"} : f32[4, 4]
          %k = matmul %states, %w : f32[B, E, 4]
          %scores = matmul %x, %k : f32[B, S, E]
          %all = view %seen {map = (i0, i1, i2) -> (i0, i2)} : bool[B, S, E]
          %none = const {value = 0.0} : f32[]
          %kept = where %all, %scores, %none : f32[B, S, E]
          %total = reduce %kept {axes = (2), keepdim = true, kind = "sum"} : f32[B, S, 1]
          %y = add %x, %total : f32[B, S, 4]
        }
        """,
        "states",
        "seen",
    )
    assert found.names == ("layers_0_k", "layers_1_k")
    assert opcodes(found.once) == ["call", "call"]
    assert opcodes(found.once, "layer_once") == ["param", "matmul"]
    assert "matmul" in opcodes(found.steps, "layer")
    assert "param" not in opcodes(found.steps, "layer")
    # %all has a size that varies from step to step, so the mask itself goes on being an input of steps.
    assert [p.name for p in found.steps.main.params] == ["x", "seen", *found.names]


def test_an_argument_that_is_known_in_one_call_only_is_taken_for_one_that_varies() -> None:
    module = parse_module(
        """
        symbol B [1, 4]
        func @main(%x: f32[B, 4], %states: f32[B, 4]) -> (%b) {
          %a = call %states {callee = "layer", scope = "first"} : f32[B, 4]
          %c = call %x {callee = "layer", scope = "second"} : f32[B, 4]
          %b = add %a, %c : f32[B, 4]
        }
        func @layer(%x: f32[B, 4]) -> (%y) {
          %y = exp %x : f32[B, 4]
        }
        """
    )
    assert hoist_per_request(module, ("states",)) is None


def test_state_and_views_of_inputs_stay_where_they_are() -> None:
    """An append changes the request at every step. What nobody computes does not become memory of the request."""
    module = parse_module(
        """
        symbol B [1, 4]
        symbol S [1, 4]
        symbol T [1, 8]
        func @main(%x: f32[B, S, 4], %states: f32[B, 2, S, 4]) -> (%y) {
          %whole = append %states {slot = "k"} : f32[B, 2, T, 4]
          %y = exp %x : f32[B, S, 4]
        }
        """
    )
    verify_module(module)
    assert hoist_per_request(module, ("states",)) is None


@examples(60)
@given(modules(), st.data())
def test_both_parts_together_mean_the_same(case: Case, data: st.DataObject) -> None:
    """A value that is moved though it varies, is left out, or gets another's name."""
    names = [p.name for p in case.module.main.params]
    known = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    found = hoist_per_request(case.module, known)
    if found is None:
        return
    verify_module(found.once)
    verify_module(found.steps)
    results = case.run(found.once, exact=True)
    step = case._replace(inputs={**case.inputs, **dict(zip(found.names, results, strict=True))})
    expected_state, state = dict(case.state), dict(case.state)
    expected = case.run(exact=True, state=expected_state)
    assert_close(step.run(found.steps, exact=True, state=state), expected, 1e-9, str(found.steps))
    assert_close(list(state.values()), list(expected_state.values()), 1e-9, str(found.steps))
