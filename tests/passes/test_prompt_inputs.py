"""Prompts of vectors and steps of tokens mean the same as the module that they come from."""

from __future__ import annotations

import torch

from tilewright.ir.module import Module
from tilewright.ir.parser import parse_module
from tilewright.ir.reference import evaluate
from tilewright.ir.verify import verify_module
from tilewright.passes.prompt_inputs import prompt_of_vectors, seeing_ahead, step_of_tokens

TEXT = """
symbol B [1, 4]
symbol S [1, 8]
func @main(%input_ids: i64[B, S], %position_ids: i64[3, B, S]) -> (%y) {
  %table = param {name = "embed.weight"} : f32[7, 4]
  %scale = param {name = "embed.scale"} : f32[]
  %x = gather %table, %input_ids {axis = 0} : f32[B, S, 4]  @ "embed" "model.py:1"
  %z = mul %x, %scale : f32[B, S, 4]  @ "embed" "model.py:2"
  %p = cast %position_ids : f32[3, B, S]  @ "rotary" "model.py:3"
  %r = reduce %p {axes = (0), keepdim = false, kind = "sum"} : f32[B, S]  @ "rotary" "model.py:4"
  %v = view %r {map = (i0, i1, i2) -> (i0, i1)} : f32[B, S, 1]  @ "rotary" "model.py:4"
  %y = add %z, %v : f32[B, S, 4]  @ "layer" "model.py:5"
}
"""
WEIGHTS = {"embed.weight": torch.randn(7, 4), "embed.scale": torch.tensor(3.0)}
IDS = torch.tensor([[1, 6, 0], [2, 3, 4]])


def parsed(text: str = TEXT) -> Module:
    module = parse_module(text)
    verify_module(module)
    return module


def run(module: Module, **inputs: torch.Tensor) -> torch.Tensor:
    verify_module(module)
    (found,) = evaluate(module, inputs, WEIGHTS, {"B": 2, "S": 3})
    return found


def test_a_prompt_of_vectors_begins_after_the_table() -> None:
    """What the embedding does to a row (Gemma scales it) is done already."""
    positions = torch.randint(0, 9, (3, 2, 3))
    expected = run(parsed(), input_ids=IDS, position_ids=positions)
    prompt = prompt_of_vectors(parsed(), "embed")
    assert prompt is not None
    assert [p.name for p in prompt.main.params] == ["inputs_embeds", "position_ids"]
    assert not [op for op in prompt.main.ops if op.opcode in ("param", "gather")]
    vectors = WEIGHTS["embed.weight"][IDS] * 3.0
    torch.testing.assert_close(run(prompt, inputs_embeds=vectors, position_ids=positions), expected)


def test_ids_that_are_read_otherwise_too_say_more_than_vectors() -> None:
    own = """
  %i = cast %input_ids : f32[B, S]
  %j = view %i {map = (i0, i1, i2) -> (i0, i1)} : f32[B, S, 1]
  %w = add %v, %j : f32[B, S, 1]
  %y = add %z, %w"""
    other = TEXT.replace("  %y = add %z, %v", own.lstrip("\n"))
    assert prompt_of_vectors(parsed(other), "embed") is None


LAYERS = """
symbol B [1, 4]
symbol S [1, 8]
func @main(%input_ids: i64[B, S]) -> (%b) {
  %table = param {name = "embed.weight"} : f32[7, 4]
  %x = gather %table, %input_ids {axis = 0} : f32[B, S, 4]  @ "embed" "model.py:1"
  %a = call %x {callee = "layer", scope = "layers.0"} : f32[B, S, 4]  @ "layers.0" "model.py:2"
  %b = call %a {callee = "layer", scope = "layers.1"} : f32[B, S, 4]  @ "layers.1" "model.py:2"
}
func @layer(%x: f32[B, S, 4]) -> (%y) {
  %y = mul %x, %x : f32[B, S, 4]
}
"""


def test_vectors_are_added_behind_layers() -> None:
    """The last layer's result too, which is returned."""
    prompt = prompt_of_vectors(parsed(LAYERS), "embed", ("layers.0", "layers.1"))
    assert prompt is not None
    x, first, second = torch.randn(3, 2, 3, 4)
    found = run(prompt, inputs_embeds=x, deepstack_0=first, deepstack_1=second)
    torch.testing.assert_close(found, (x * x + first).square() + second)


def test_a_layer_that_is_no_call_takes_no_vectors() -> None:
    assert prompt_of_vectors(parsed(LAYERS), "embed", ("layers.0", "layers.2")) is None


def test_a_module_without_that_embedding_stays() -> None:
    assert prompt_of_vectors(parsed(), "wte") is None


ATTENTION = """
symbol B [1, 4]
symbol S [1, 8]
symbol T [1, 8]
func @main(%x: f32[B, 2, S, 4]) -> (%b) {
  %a = call %x {callee = "wide", scope = "layers.0"} : f32[B, 2, S, 4]
  %b = call %a {callee = "near", scope = "layers.1"} : f32[B, 2, S, 4]
}
func @wide(%x: f32[B, 2, S, 4]) -> (%y) {
  %y = attention %x, %x, %x {causal = true, scale = 1.0, slot = "kept", softcap = 0.0, window = 0} : f32[B, 2, S, 4]
}
func @near(%x: f32[B, 2, S, 4]) -> (%y) {
  %y = attention %x, %x, %x {causal = true, scale = 1.0, slot = "kept", softcap = 0.0, window = 2} : f32[B, 2, S, 4]
}
"""


def test_each_window_has_a_reach_of_its_own() -> None:
    """Causal attention as it was where each token reaches itself; another where some reach further."""
    ahead = seeing_ahead(parsed(ATTENTION))
    assert [p.name for p in ahead.main.params] == ["x", "reach_0", "reach_2"]
    assert [p.name for p in ahead.function("near").params] == ["x", "reach_2"]
    x, own = torch.randn(2, 2, 3, 4), torch.arange(3).repeat(2, 1)
    causal = run(parsed(ATTENTION), x=x)
    torch.testing.assert_close(run(ahead, x=x, reach_0=own, reach_2=own), causal)
    further = own.clone()
    further[1, 0] = 1
    found = run(ahead, x=x, reach_0=own, reach_2=further)
    changed = (found - causal).abs().amax((1, 3)) > 1e-6
    assert changed.tolist() == [[False] * 3, [True, False, False]]


def test_a_step_has_one_number_for_each_position() -> None:
    step = step_of_tokens(parsed())
    assert [str(p.type) for p in step.main.params] == ["i64[B, S]", "i64[B, S]"]
    positions = torch.randint(0, 9, (2, 3))
    found = run(step, input_ids=IDS, position_ids=positions)
    torch.testing.assert_close(found, run(parsed(), input_ids=IDS, position_ids=positions.expand(3, 2, 3)))


def test_positions_of_one_number_stay() -> None:
    step = step_of_tokens(parsed())
    assert step_of_tokens(step) is step
