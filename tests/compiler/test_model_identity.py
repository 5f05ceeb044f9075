"""Two models of one identity capture alike. What would break: a graph of other code, or of another model, would run."""

from __future__ import annotations

import functools
import inspect
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from tilewright import code_identity, model_identity
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


def test_a_model_is_the_same_wherever_it_is_kept(tmp_path: Path) -> None:
    found = []
    for place in (tmp_path / "here", tmp_path / "there"):
        tiny("llama").save_pretrained(place)
        found.append(identity(LlamaForCausalLM.from_pretrained(place).eval()))
    assert found[0] is not None
    assert found[0] == found[1]


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
    found = {usual}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found.add(identity(model) or "")
    with torch.device("meta"):
        found.add(identity(model) or "")
    assert len(found - {""}) == 4


def test_no_identity_under_a_mode_that_changes_functions() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    with Mode():
        assert identity(tiny("llama")) is None


def test_values_of_frequencies_that_a_capture_spells_out_count() -> None:
    """A cast to half precision and back leaves other values of the same shape and type."""
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, rope_parameters=scaling)
    model = LlamaForCausalLM(config)
    before = identity(model)
    after = identity(model.bfloat16().float())
    assert before is not None
    assert after not in (None, before)


def test_a_run_under_torch_compile_leaves_it(usual: str) -> None:
    """It puts functions of its own into the modules that it traces."""
    torch.compile(tiny("llama"), backend="eager")(torch.arange(4)[None])
    assert identity(tiny("llama")) == usual


def test_no_identity_where_a_file_is_newer_than_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is not what the file says, which the next process will run."""
    monkeypatch.setattr(code_identity, "_STARTED", Path(modeling_llama.__file__).stat().st_mtime - 1)
    assert identity(tiny("llama")) is None


def test_a_long_configuration_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    text = model_identity._text
    monkeypatch.setattr(model_identity, "_text", lambda value: read.append(type(value)) or text(value))
    assert identity(tiny("llama")) is not None
    assert read.count(LlamaConfig) == 1


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
    "a class": lambda model: setattr(model.model, "helper", Opaque),
    "a method of a tensor": lambda model: setattr(model.model, "helper", torch.ones(3).mul),
    "values of a tensor": lambda model: setattr(model.model, "helper", [torch.ones(3)]),
    "a tensor of a class of its own": lambda model: setattr(
        model.model, "helper", torch.ones(3).as_subclass(OwnTensor)
    ),
    "a weight of a class of its own": lambda model: model.model.norm._parameters.update(
        weight=model.model.norm.weight.detach().as_subclass(OwnTensor)
    ),
    "a configuration of its own": lambda model: setattr(model.config, "__class__", OwnConfig),
    "a configuration that holds itself": lambda model: setattr(model.config, "itself", model.config),
    "a class that says that it is another": lambda model: setattr(
        model.model.layers[0].mlp, "__class__", OwnMLP
    ),
    "a class of a module that is gone": lambda model: setattr(
        model.model.layers[0].mlp, "__class__", type("Gone", (LlamaMLP,), {"__module__": "transformers.gone"})
    ),
}


class OwnTensor(torch.Tensor):
    """Any function of it may be another one."""


class OwnConfig(LlamaConfig):
    """Any attribute of it may be computed."""


class OwnMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


OwnMLP.__module__, OwnMLP.__qualname__ = LlamaMLP.__module__, LlamaMLP.__qualname__


def _holding(number: int) -> Callable[[], int]:
    return lambda: number


def _plain() -> None: ...


def _typed(x: torch.Tensor) -> torch.Tensor:
    return x


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


SWAPPED = {
    "function": (modeling_llama, "rotate_half", torch.nn.functional.softsign),
    "function for a module": (modeling_llama, "rotate_half", nn.Identity()),
    "part of a function": (modeling_llama, "rotate_half", functools.partial(torch.mul, other=0.5)),
    "function for a compiled one": (modeling_llama, "rotate_half", torch.jit.script(_typed)),
    "method": (LlamaRMSNorm, "forward", nn.Identity.forward),
    "builtin function of PyTorch": (torch, "rsqrt", torch.sqrt),
    "method of tensors": (torch.Tensor, "pow", torch.Tensor.mul),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_code_in_place_of_other_code_of_the_libraries_counts(
    name: str, usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*SWAPPED[name])
    assert identity(tiny("llama")) not in (None, usual)


def test_code_that_says_it_is_of_the_library_counts(usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools do that change a function's source, and compile it under the name of its file."""
    source, line = inspect.getsourcelines(modeling_llama.rotate_half)
    changed = "\n" * (line - 1) + "".join(source).replace("-x2", "x2")
    names = dict(vars(modeling_llama))
    exec(compile(changed, modeling_llama.__file__, "exec"), names)
    monkeypatch.setattr(modeling_llama.rotate_half, "__code__", names["rotate_half"].__code__)
    assert identity(tiny("llama")) not in (None, usual)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x / 2


class _Half:
    """A descriptor."""

    def __get__(self, instance: object, kind: type) -> float:
        return 0.5

    def __set__(self, instance: object, value: float) -> None: ...


def _interactive(code: str) -> Any:
    """What ``code``, typed at a prompt, calls ``made``."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<stdin>", "exec"), names)
    return names["made"]


def _with_other_names(original: Any) -> Any:
    inner = inspect.unwrap(original)
    names = {**inner.__globals__, "rotate_half": _plain}
    return types.FunctionType(inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__)


def _copied(module: types.ModuleType) -> types.ModuleType:
    copied = types.ModuleType(module.__name__)
    vars(copied).update(vars(module))
    return copied


HIDDEN: dict[str, tuple[Any, str, Any]] = {
    "behind a method of PyTorch": (modeling_llama, "rotate_half", _Halved.apply),
    "behind a cache": (modeling_llama, "rotate_half", functools.lru_cache(_plain)),
    "in a partial method": (LlamaMLP, "forward", functools.partialmethod(_plain)),
    "a descriptor": (LlamaAttention, "scaling", _Half()),
    "a call typed at a prompt": (
        nn.Linear, "__call__", _interactive("def made(self, x): ...\nmade.__name__ = '__call__'")
    ),
    "an object made at a prompt": (
        modeling_llama, "rotate_half", _interactive("class M:\n  def __call__(self, x): ...\nmade = M()")
    ),
    "other names for a function": (
        modeling_llama, "apply_rotary_pos_emb", _with_other_names(modeling_llama.apply_rotary_pos_emb)
    ),
    "a module": (modeling_llama, "torch", _copied(torch)),
    "in a table": (ROPE_INIT_FUNCTIONS, "longrope", _plain),
    "in the table of experts": (ALL_EXPERTS_FUNCTIONS, "batched_mm", _plain),
    "a function of Python": (math, "sqrt", lambda x: x),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_no_identity_where_other_code_is_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, key, value = HIDDEN[name]
    if isinstance(where, MutableMapping):
        monkeypatch.setitem(where, key, value)
    else:
        monkeypatch.setattr(where, key, value, raising=False)
    assert identity(tiny("llama")) is None


def test_no_identity_under_hooks_on_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert identity(tiny("llama")) is None
    finally:
        handle.remove()
    assert identity(tiny("llama")) is not None
