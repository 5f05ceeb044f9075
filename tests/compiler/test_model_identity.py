"""Two models of one identity capture alike. What would break: a graph of other code, or of another model, would run."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from tilewright.model_identity import identity

from .models import tiny


@pytest.fixture(scope="module")
def usual() -> str:
    found = identity(tiny("llama"))
    assert found is not None
    return found


def test_equal_models_are_the_same_whatever_their_weights(usual: str) -> None:
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert identity(model) == usual


def test_another_process_finds_the_same(usual: str) -> None:
    """Whatever its hashes are, and whatever else it has loaded: a server and a trainer bring code of other packages."""
    code = (
        "import transformers.models.bert.modeling_bert, transformers.trainer, transformers.pipelines\n"
        "from tests.compiler.models import tiny\n"
        "from tilewright.model_identity import identity\n"
        "try: import tilewright.serve_model\n"
        "except ImportError: pass\n"
        "print(identity(tiny('llama')))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[-1] == usual


def test_a_capture_leaves_it(usual: str) -> None:
    from tilewright.capture import capture

    model = tiny("llama")
    capture(model)
    assert identity(model) == usual


def _set(path: str, value: object) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        where, _, name = path.rpartition(".")
        setattr(functools.reduce(getattr, where.split(".") if where else [], model), name, value)

    return change


def _untie(model: PreTrainedModel) -> None:
    assert isinstance(model, LlamaForCausalLM)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "config": _set("config.rms_norm_eps", 0.5),
    "attribute": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5),
    "epsilon of one norm": lambda model: setattr(
        model.model.layers[0].input_layernorm, "variance_epsilon", 0.5
    ),
    "type": lambda model: model.to(torch.bfloat16),
    "weights that are not tied": _untie,
    "mode": lambda model: model.train(),
    "fewer layers": lambda model: model.model.layers.__delitem__(1),
    "another activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_trace_sees_counts(name: str, usual: str) -> None:
    model = tiny("llama")
    CHANGES[name](model)
    assert identity(model) not in (None, usual)


def test_attributes_of_classes_and_modules_count(usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "slope", 0.5, raising=False)
    first = identity(tiny("llama"))
    monkeypatch.undo()
    monkeypatch.setattr(modeling_llama, "LIMIT", 0.5, raising=False)
    second = identity(tiny("llama"))
    assert len({usual, first, second, None}) == 4


def test_settings_of_pytorch_count(usual: str) -> None:
    model = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert identity(model) not in (None, usual)


class Own(nn.Module):
    """A module that is of no library."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Opaque:
    """Something that a forward might look at."""


def _add_hook(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *_: None)


UNKNOWN: dict[str, Callable[[PreTrainedModel], Any]] = {
    "a class of its own": lambda model: setattr(model.model.layers[0].mlp, "act_fn", Own()),
    "a hook": _add_hook,
    "a forward of its own": lambda model: setattr(model.model.norm, "forward", lambda x: x),
    "an object": lambda model: setattr(model.model, "helper", Opaque()),
    "a function that holds values": lambda model: setattr(model.model, "helper", _holding(3)),
    "a function": lambda model: setattr(model.model, "helper", _plain),
}


def _holding(number: int) -> Callable[[], int]:
    return lambda: number


def _plain() -> None: ...


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_identity_where_something_is_unknown(name: str) -> None:
    model = tiny("llama")
    UNKNOWN[name](model)
    assert identity(model) is None


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    """As users replace functions: it says that it is the original."""

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return replacement


REPLACED = {
    "method": (LlamaAttention, "forward"),
    "function of the model's module": (modeling_llama, "apply_rotary_pos_emb"),
    "function of another module": (sys.modules["transformers.masking_utils"], "create_causal_mask"),
    "function of PyTorch": (torch.nn.functional, "silu"),
    "method of tensors": (torch.Tensor, "softmax"),
    "call of modules": (nn.Module, "__call__"),
    "initialiser": (nn.Linear, "forward"),
}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize(
    "decorate", [_wrapped, lambda f: torch.no_grad()(_wrapped(f))], ids=["plain", "decorated"]
)
def test_no_identity_where_code_was_replaced(
    name: str, decorate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decorator of PyTorch's own does not hide what it decorates."""
    where, attribute = REPLACED[name]
    monkeypatch.setattr(where, attribute, decorate(getattr(where, attribute)))
    assert identity(tiny("llama")) is None


def test_no_identity_where_a_class_stands_in_for_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand:
        def __call__(self, *args: Any) -> Any: ...

    for value in (Stand, Stand(), functools.partial(_plain)):
        monkeypatch.setattr(modeling_llama, "rotate_half", value)
        assert identity(tiny("llama")) is None


def test_no_identity_under_hooks_on_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert identity(tiny("llama")) is None
    finally:
        handle.remove()
    assert identity(tiny("llama")) is not None
