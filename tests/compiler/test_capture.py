"""Capture: what is in the graphs, what is shared with the model, and that the model is left as it was."""

from __future__ import annotations

import inspect

import pytest
import sympy
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CpmAntConfig,
    CpmAntForCausalLM,
    MPNetConfig,
    MPNetModel,
    MptConfig,
)

from tilewright.cache import cache_name
from tilewright.capture import Captured, capture
from tilewright.capture_inputs import model_kind
from tilewright.ir.errors import CaptureError

from .models import DECODERS, tiny

FAMILIES = (*DECODERS, "bert")


def _targets(captured: Captured, graph: str) -> list[str]:
    exported = (captured.main if graph == "main" else captured.layers[graph]).exported
    return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]


def _snapshot(model: nn.Module) -> list[object]:
    """Everything that capture might have touched: attributes of every module, and of every config."""
    state: list[object] = []
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") or k == "_attn_implementation"}
        values = {
            k: v if isinstance(v, int | float | str | dict | list | tuple) else id(v) for k, v in own.items()
        }
        state.append((name, type(module), values))
        if hasattr(module, "config"):
            state.append((name, module.config._attn_implementation, module.config.to_dict()))
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_captured_once(family: str) -> None:
    captured = capture(tiny(family, layers=3))
    assert list(captured.layers) == ["layer0"]
    assert [call.callee for call in captured.calls.values()] == ["layer0"] * 3
    scopes = [call.scope for call in captured.calls.values()]
    assert [scope.rsplit(".", 1)[1] for scope in scopes] == ["0", "1", "2"]
    assert _targets(captured, "main").count("tilewright.layer.default") == 3
    assert _targets(captured, "layer0").count("tilewright.attention.default") == 1
    assert captured.notes == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_do_not_grow_with_depth(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exports: list[nn.Module] = []
    real = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda m, *a, **k: exports.append(m) or real(m, *a, **k))
    shallow = capture(tiny(family, layers=4))
    assert len(exports) == 2
    deep = capture(tiny(family, layers=32))
    assert len(exports) == 4
    assert _targets(shallow, "layer0") == _targets(deep, "layer0")
    assert len(_targets(deep, "main")) - len(_targets(shallow, "main")) == 28


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_stay_symbolic(family: str) -> None:
    captured = capture(tiny(family))
    names = {"B", "S"} if family == "bert" else {"B", "S", "T"}
    assert set(captured.symbols) == names
    assert set(captured.main.symbols.values()) == names
    assert captured.symbols["S"] == (1, 256)


def test_kinds_inputs_and_outputs() -> None:
    llama, bert = capture(tiny("llama")), capture(tiny("bert"))
    assert (llama.kind, llama.outputs) == ("decoder", ("logits",))
    assert [name for _, name in llama.main.inputs] == ["input_ids", "position_ids", "attention_mask"]
    assert (bert.kind, bert.outputs) == ("encoder", ("last_hidden_state", "pooler_output"))
    assert [name for _, name in bert.main.inputs] == ["input_ids", "attention_mask", "token_type_ids"]


def test_position_rules() -> None:
    assert capture(tiny("opt")).position_rule == "mask"
    assert capture(tiny("llama")).position_rule == "past"


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_the_models_own(family: str) -> None:
    model = tiny(family)
    captured = capture(model)
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in captured.tensors.items():
        assert tensor is own[name]
    wanted = {name for name, parameter in model.named_parameters()}
    assert wanted <= set(captured.tensors) | {"embeddings.position_ids"}


def test_tied_weights_have_one_name_and_hidden_buffers_one_too() -> None:
    captured = capture(tiny("llama"))
    assert "lm_head.weight" not in captured.tensors
    assert "model.rotary_emb.inv_freq" in captured.tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_left_as_it_was(family: str) -> None:
    model = tiny(family)
    inputs = {
        "input_ids": torch.randint(3, 128, (2, 7)),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
    }
    with torch.no_grad():
        before = model(**inputs).to_tuple()[0]
    state = _snapshot(model)
    capture(model)
    assert _snapshot(model) == state
    with torch.no_grad():
        assert torch.equal(model(**inputs).to_tuple()[0], before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_model_is_left_as_it_was_when_capture_is_broken_off(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    state = _snapshot(model)

    def broken_norm(x: Tensor) -> Tensor:
        raise error("broken off")

    monkeypatch.setattr(model.model.norm, "forward", broken_norm)
    with pytest.raises(CaptureError if error is RuntimeError else error):
        capture(model)
    monkeypatch.undo()
    vars(model.model.norm).pop("forward", None)
    assert _snapshot(model) == state


def test_a_forward_of_its_own_is_given_back() -> None:
    model = tiny("llama")
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = own
    capture(model)
    assert vars(layer)["forward"] is own


def test_layers_that_differ_are_told_apart() -> None:
    model = tiny("llama", layers=4)
    model.model.layers[2].input_layernorm.variance_epsilon = 1e-3
    captured = capture(model)
    assert [call.callee for call in captured.calls.values()] == ["layer0", "layer0", "layer1", "layer0"]


def test_provenance_survives() -> None:
    nodes = capture(tiny("llama")).layers["layer0"].exported.graph.nodes
    linears = [node for node in nodes if str(node.target) == "aten.linear.default"]
    paths = [next(reversed(node.meta["nn_module_stack"].values()))[0] for node in linears]
    assert paths[0] == "layer.self_attn.q_proj"
    assert all("modeling_llama.py" in node.meta["stack_trace"] for node in linears)


def test_decoders_with_attention_of_their_own_are_refused() -> None:
    config = CpmAntConfig(
        vocab_size=128, hidden_size=64, num_attention_heads=4, dim_head=16, num_hidden_layers=1
    )
    with pytest.raises(CaptureError, match=r"unsupported attention: CpmAntForCausalLM"):
        capture(CpmAntForCausalLM(config).eval())


LIMIT = 77
ALIBI = {
    "bloom": BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=8),
    "mpt": MptConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=8, max_seq_len=LIMIT),
}


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_is_slopes_and_no_array_over_keys(name: str) -> None:
    """The slopes of eight heads are 1/2, 1/4 .. 1/256 (Press et al., 2022). Of values that grow with the context, or
    have the size of its limit, there is the key mask alone."""
    captured = capture(AutoModelForCausalLM.from_config(ALIBI[name]).eval())
    assert list(captured.layers) == ["layer0"]
    for graph in (captured.main, captured.layers["layer0"]):
        (context,) = (symbol for symbol, dim in graph.symbols.items() if dim == "T")
        values = [node.meta["val"] for node in graph.exported.graph.nodes if "val" in node.meta]
        over_keys = [v for v in values if isinstance(v, Tensor) and {context, LIMIT} & _sizes(v)]
        assert {v.dtype for v in over_keys} == {torch.bool}
    (slopes,) = captured.layers["layer0"].literals.values()
    assert slopes.dtype == torch.float32
    assert torch.equal(slopes, 0.5 ** torch.arange(1, 9))


def _sizes(x: Tensor) -> set[sympy.Symbol | int]:
    """The dims of a traced tensor: numbers, and the symbols that occur in the others."""
    found: set[sympy.Symbol | int] = set()
    for size in x.shape:
        found |= size.node.expr.free_symbols if isinstance(size, torch.SymInt) else {size}
    return found


def test_encoders_with_attention_of_their_own_are_captured() -> None:
    config = MPNetConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    captured = capture(MPNetModel(config).eval())
    assert captured.kind == "encoder"
    assert captured.outputs == ("last_hidden_state", "pooler_output")


def test_training_mode_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.train()
    with pytest.raises(CaptureError, match=r"model\.layers\.1\.mlp.*eval\(\)"):
        capture(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_codes_are_refused(dtype: torch.dtype) -> None:
    model = tiny("llama")
    linear = model.model.layers[1].self_attn.q_proj
    linear.weight = nn.Parameter((linear.weight.detach() * 9).to(dtype), requires_grad=False)
    with pytest.raises(CaptureError, match=r"layers\.1\.self_attn\.q_proj.*dequantize\(\).*weights='int8'"):
        capture(model)


def test_meta_tensors_are_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 4).eval()
    with pytest.raises(CaptureError, match=r"'weight' is a meta tensor"):
        capture(module, (torch.ones(2, 4),))


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
@pytest.mark.parametrize("family", ["llama", "mamba", "bert"])
def test_a_cache_is_known_by_its_name_in_any_release(
    monkeypatch: pytest.MonkeyPatch, family: str, name: str
) -> None:
    """Which does not say what kind of model it is: a decoder taken for an encoder would give no tokens."""
    model = tiny("mamba").backbone if family == "mamba" else tiny(family)  # which cannot generate
    signature = inspect.signature(model.forward)
    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    others = [p for p in signature.parameters.values() if p.name != cache_name(model.forward)]
    renamed = signature.replace(parameters=sorted([*others, parameter], key=lambda p: p.kind))
    kind = "encoder" if family == "bert" else "decoder"
    assert model_kind(model) == kind

    def forward() -> None:
        """Has the signature of another release."""

    forward.__signature__ = renamed  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", forward)
    assert cache_name(model.forward) == name
    assert model_kind(model) == kind


def test_modules_need_example_inputs() -> None:
    with pytest.raises(CaptureError, match="example_inputs"):
        capture(nn.Linear(4, 4).eval())


def test_a_mask_pattern_that_the_attention_op_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    real = modeling_llama.create_causal_mask
    monkeypatch.setattr(
        modeling_llama,
        "create_causal_mask",
        lambda **k: real(**k, or_mask_function=lambda b, h, q, kv: kv == 0),
    )
    with pytest.raises(CaptureError, match="mask pattern"):
        capture(tiny("llama"))


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, other: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": self.linear(x) + other["y"], "x": x * 2}


@pytest.mark.parametrize("batch", [1, 3])
def test_plain_modules_get_a_dynamic_batch(batch: int) -> None:
    captured = capture(_Pair().eval(), {"x": torch.ones(batch, 4), "other": {"y": torch.ones(batch, 4)}})
    assert captured.kind == "module"
    assert set(captured.symbols) == set(captured.main.symbols.values()) == {"B"}
    assert [name for _, name in captured.main.inputs] == ["x", "other_y"]
    assert captured.output_spec is not None
    assert captured.outputs == ("output0", "output1")


class _FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 6) if x.shape[0] == 3 else x


def test_plain_modules_fall_back_to_fixed_sizes() -> None:
    captured = capture(_FixedBatch().eval(), (torch.ones(3, 4),))
    assert captured.symbols == {}
    assert "fixed" in captured.notes[0]


class _DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_data_dependent_control_flow_is_named() -> None:
    with pytest.raises(CaptureError, match="_DataDependent"):
        capture(_DataDependent().eval(), (torch.ones(3, 4),))


class _SplitEmbedding(nn.Module):
    """A ModuleList whose children are no layers: they take token numbers."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Embedding(size, width), nn.Embedding(size, width)])

    def forward(self, ids: Tensor) -> Tensor:
        return self.parts[0](ids) + self.parts[1](ids)


def test_lists_that_hold_no_layers_are_captured_with_the_whole() -> None:
    model = tiny("llama")
    model.model.embed_tokens = _SplitEmbedding(128, 64).eval()
    captured = capture(model)
    assert [call.scope for call in captured.calls.values()] == ["model.layers.0", "model.layers.1"]
    assert "model.embed_tokens.parts.1.weight" in captured.tensors
    assert len(captured.notes) == 1
    assert "model.embed_tokens.parts" in captured.notes[0]
