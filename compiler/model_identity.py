"""What a capture depends on, as a hash: the code that a model runs, its configuration, its modules and their tensors.

Two models with the same identity capture to the same graph, in this process or in a later one, so the graph of the
first serves the second. Values of tensors do not count: a graph refers to them by name. Where it cannot be told what
code a model runs (see ``code_identity``), there is no identity, and it is captured: a class from anywhere but
Transformers or PyTorch, a hook, a method or function that somebody replaced, an attribute of an unknown kind.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import types
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import GenerationConfig, PretrainedConfig

from .capture_layers import BARE_MODULE
from .capture_rope import chosen_by_length
from .code_identity import UnknownError, class_name, code_of, own_code, part_text, require_own

_PLACES = ("name_or_path", "_name_or_path")
"""Attributes that say where a model was loaded from."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def identity(model: nn.Module) -> str | None:
    """A hash of all that the capture of ``model`` depends on; None where that cannot be told."""
    try:
        parts = [*_surroundings(), *code_of(model), *_modules(model)]
    except (UnknownError, RecursionError):  # a configuration may hold itself
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _surroundings() -> Iterator[str]:
    """Versions, our own code, and settings of PyTorch that a trace sees."""
    yield from (platform.python_version(), torch.__version__, transformers.__version__, own_code())
    casts = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]
    yield f"{torch.get_default_dtype()} {casts}"
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        if type(mode) is not DeviceContext:
            raise UnknownError(f"{mode} changes what functions do")
        yield f"{mode.device}"
    if any(getattr(torch_modules, name) for name in _GLOBAL_HOOKS):
        raise UnknownError("hooks on all modules")


def _modules(model: nn.Module) -> Iterator[str]:
    """Classes, attributes, and what is known of tensors, of a model and all below it."""
    numbers: dict[int, int] = {}  # tied weights and shared modules are the same object
    configs: dict[int, str] = {}  # long, and shared by many modules
    for name, module in model.named_modules(remove_duplicate=False):
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
            raise UnknownError(f"{name} has hooks")
        yield f"{name} {class_name(type(module))} {module.training} {numbers.setdefault(id(module), len(numbers))}"
        own = {k: v for k, v in vars(module).items() if k not in BARE_MODULE and k not in _PLACES}
        for key in sorted(own):
            yield f"{key} {_attribute(own[key], numbers, configs)}"
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield f"{key} {None if tensor is None else _tensor(tensor, numbers)}"
    for table in chosen_by_length(model):
        yield f"{table.tolist()}"


def _attribute(value: Any, numbers: dict[int, int], configs: dict[int, str]) -> str:
    if isinstance(value, Tensor):
        return _tensor(value, numbers)
    if not isinstance(value, PretrainedConfig):
        return _text(value)
    if id(value) not in configs:
        configs[id(value)] = hashlib.sha256(_text(value).encode()).hexdigest()
    return configs[id(value)]


def _tensor(tensor: Tensor, numbers: dict[int, int]) -> str:
    """What is known of a tensor that the model has under a name. A subclass may compute anything."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise UnknownError(f"a tensor of {type(tensor)}")
    number = numbers.setdefault(id(tensor), len(numbers))
    place = f"{tensor.layout} {tensor.device.type}"
    return f"{number} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {place}"


def _text(value: Any) -> str:
    """A value as text, equal for values that trace alike. Raises UnknownError for objects of unknown kinds."""
    match value:
        case None | bool() | int() | float() | str() | bytes() | torch.dtype() | torch.Size():
            return repr(value)
        case torch.device():
            return value.type
        case list() | tuple():
            return f"{type(value).__name__}({', '.join(map(_text, value))})"
        case set() | frozenset():
            return f"set({', '.join(sorted(map(_text, value)))})"
        case dict():
            return f"dict({', '.join(f'{_text(k)}: {_text(v)}' for k, v in value.items())})"
        case GenerationConfig():
            return "generation"  # what generate() does around the forward
        case PretrainedConfig():
            return f"{class_name(type(value))} {_text({k: v for k, v in vars(value).items() if k not in _PLACES})}"
        case type():
            require_own((value,))
            return class_name(value)
        case types.FunctionType():
            require_own((value,))
            if value.__closure__:
                raise UnknownError(f"{value.__qualname__} holds values of its own")
            return part_text(value)
        case types.BuiltinFunctionType() if isinstance(value.__self__, type | types.ModuleType | None):
            return f"{value.__module__}.{value.__name__}"
        case functools.partial():
            return f"partial {_text(value.func)} {_text(value.args)} {_text(value.keywords)}"
    raise UnknownError(f"a {type(value)}")
