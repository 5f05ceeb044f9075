"""What a capture depends on, as a hash: the code that a model runs, its configuration, its modules and their tensors.

Two models with the same identity capture to the same graph, in this process or in a later one, so the graph of the
first serves the second. Values of tensors do not count: a graph refers to them by name. Where it cannot be told what
code a model runs, there is no identity, and it is captured: a class from anywhere but Transformers or PyTorch, a hook,
a method or function that somebody replaced, an attribute of an unknown kind. Code counts by the files it was loaded
from, so functions are looked at one by one: each has to come from a file of the libraries, and what each name stands
for counts, as one function of the libraries may have been put in the place of another.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import sys
import time
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from inspect import getattr_static
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import GenerationConfig, PretrainedConfig
from transformers.integrations.moe import ExpertsInterface

from tilewright import ir

from .capture_ops import configs_of
from .capture_rope import chosen_by_length

_LIBRARIES = (
    "torch", "transformers", "accelerate", "filelock", "httpx", "huggingface_hub", "jinja2", "networkx", "numpy",
    "packaging", "peft", "PIL", "regex", "requests", "safetensors", "scipy", "sympy", "tokenizers", "torchaudio",
    "torchvision", "tqdm", "typer", "typing_extensions", "yaml",
)  # fmt: skip
"""PyTorch and Transformers, and those whose functions they import."""
_OWN = (Path(__file__).parent, *map(Path, ir.__path__))
_STARTED = time.time()
"""A file that is newer may not be what this process has loaded."""
_CHECKED = ("transformers.", "torch.nn.modules.")
_BARE_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class _UnknownError(Exception):
    """Something whose part in the model's computation cannot be told."""


def identity(model: nn.Module) -> str | None:
    """A hash of all that the capture of ``model`` depends on; None where that cannot be told."""
    try:
        parts = [*_surroundings(), *_code(model), *_modules(model)]
    except (_UnknownError, RecursionError):  # a configuration may hold itself
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _surroundings() -> Iterator[str]:
    """Versions, our own code, and settings of PyTorch that a trace sees."""
    yield from (platform.python_version(), torch.__version__, transformers.__version__, _own_code())
    casts = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]
    yield f"{torch.get_default_dtype()} {casts}"
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        if type(mode) is not DeviceContext:
            raise _UnknownError(f"{mode} changes what functions do")
        yield f"{mode.device}"
    if any(getattr(torch_modules, name) for name in _GLOBAL_HOOKS):
        raise _UnknownError("hooks on all modules")


@functools.lru_cache(maxsize=1)
def _own_code() -> str:
    digest = hashlib.sha256()
    for folder in _OWN:
        for path in sorted(folder.rglob("*.py")):
            _status(path)
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _status(path: Path) -> str:
    status = path.stat()
    if status.st_mtime > _STARTED:
        raise _UnknownError(f"{path} has changed")
    return f"{path} {status.st_size} {status.st_mtime_ns}"


# --- code -----------------------------------------------------------------------------------------------------------


def _code(model: nn.Module) -> Iterator[str]:
    """The files that hold the code of the model, and what names in it stand for, once it is known that all of that is
    the libraries' own."""
    kinds = sorted({type(part) for part in (*model.modules(), *configs_of(model))}, key=_class)
    for kind in kinds:
        if not f"{kind.__module__}.".startswith(("transformers.", "torch.")):
            raise _UnknownError(f"{kind} is of neither library")
        if kind.__module__ not in sys.modules:
            raise _UnknownError(f"{kind} is of a module that is not there")
    _require_unchanged()
    root = Path(transformers.__file__).parent
    homes = {Path(sys.modules[kind.__module__].__file__ or "").parent for kind in kinds}
    for folder in sorted({root, root / "integrations", root / "utils", *homes}):
        yield from map(_status, sorted(folder.glob("*.py")))
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base.__module__ != "builtins")
    for base in bases:
        _require_own(vars(base).values())
    spaces: list[Any] = [*bases, *(sys.modules[kind.__module__] for kind in kinds)]
    for space in spaces:
        own = {k: v for k, v in vars(space).items() if isinstance(v, bool | int | float | str)}
        # Transformers remembers there what it found in its own code.
        kept = sorted((k, v) for k, v in own.items() if k[:2] != "__" and not k.endswith("_cached_value"))
        yield f"{space.__name__} {kept}"
    for space in (*_ALWAYS, *bases, *_reached({base.__module__ for base in bases})):
        yield from _bindings(space)


_MAKING = ("__init__", "__setstate__")
"""What no forward runs, and torch.compile decorates."""
_ALWAYS: tuple[Any, ...] = (math, torch, torch.Tensor, torch.nn.functional, nn.Module)


def _require_unchanged() -> None:
    """Look at every function that a model of the libraries might run. What is not loaded yet, nobody has replaced."""
    _folders.cache_clear()  # more of the libraries may be loaded by now
    for space in _ALWAYS:
        _require_own(_names(space).values())
    for name, module in list(sys.modules.items()):
        if not name.startswith(_CHECKED) or not isinstance(module, types.ModuleType):
            continue
        _require_own(_names(module).values())
        for kind in _classes_of(module):
            _require_own(vars(kind).values())


def _names(space: Any) -> dict[str, Any]:
    """What a class or module holds, but for what Python and its tracers (torch.compile) put into a module."""
    if isinstance(space, type):
        return dict(vars(space))
    held = dict(vars(space))  # at once: another thread may be loading the module
    return {name: value for name, value in held.items() if not name.startswith("__")}


def _classes_of(module: types.ModuleType) -> list[type]:
    return [k for k in _names(module).values() if isinstance(k, type) and k.__module__ == module.__name__]


def _reached(names: Iterable[str]) -> Iterator[Any]:
    """The modules of the code of these names, those whose functions and classes they import, and so on; with their
    classes. What else is loaded does not matter."""
    found, pending = set[str](), sorted(names)
    while pending:
        name = pending.pop()
        module = sys.modules.get(name)
        if name in found or module is None or not name.startswith(_CHECKED):
            continue
        found.add(name)
        members = [v for v in _names(module).values() if isinstance(v, type | types.FunctionType)]
        pending += {str(v.__module__) for v in members}
    for name in sorted(found):
        yield sys.modules[name]
        yield from _classes_of(sys.modules[name])


def _bindings(space: Any) -> Iterator[str]:
    """What the names in a module or class stand for, where that is code."""
    for name, value in _names(space).items():
        if space is nn.Module and name in _MAKING:
            continue
        if not isinstance(value, types.ModuleType):
            if parts := [_part(part) for part in _parts(value, 0)]:
                yield f"{space.__name__}.{name} {parts}"
        elif not hasattr(space, "__path__"):  # a package has the modules in it that are loaded by now
            yield f"{space.__name__}.{name} {value.__name__}"


def _part(part: Any) -> str:
    """A part of ``_parts`` as text, without its closure, whose functions are parts too."""
    if isinstance(part, torch.jit.ScriptFunction):
        return str(part.inlined_graph)
    if not isinstance(part, types.FunctionType):
        return f"{getattr(part, '__module__', '')}.{part.__qualname__}"
    defaults = (*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values())
    simple = [d for d in defaults if isinstance(d, bool | int | float | str | None)]
    code = part.__code__
    return f"{part.__qualname__} {code.co_filename} {code.co_firstlineno} {_instructions(code)} {simple}"


def _instructions(code: types.CodeType) -> str:
    """What code does, whatever file it says that it is from."""
    held = []
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            held.append(_instructions(value))
        else:
            held.append(str(sorted(map(repr, value)) if isinstance(value, frozenset) else value))
    text = code.co_code + f"{code.co_names} {held}".encode()
    return hashlib.sha256(text).hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _folders() -> tuple[str, ...]:
    """Where the code of the libraries is."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES]
    own = [f"{folder}/" for folder in _OWN]  # which registers functions
    return (*(file.removesuffix("__init__.py") for file in files if file), *own)


_DEEPEST = 8
"""Decorators in one another that are looked through."""
_PYTHON = str(Path(os.__file__).parent)
_INSTALLED = ("site-packages", "dist-packages")
_WITHOUT_FILE = frozenset({*sys.builtin_module_names, "_regex", "pybind11_builtins", "torch"})
_GENERATED = frozenset(
    f"__{name}__"
    for name in ("init", "new", "eq", "hash", "repr", "lt", "le", "gt", "ge", "setattr", "delattr")
)
"""Methods that Python writes, for dataclasses and named tuples."""


def _is_of_library(file: str) -> bool:
    """Whether a file of code is one of the libraries' or of Python's own."""
    if file.startswith((*_folders(), "<frozen ")):
        return True
    return file.startswith(_PYTHON) and not any(folder in file for folder in _INSTALLED)


def _require_own(values: Iterable[Any]) -> None:
    """Raise _UnknownError for functions and classes from anywhere else, and for modules that stand in for others."""
    for value in values:
        if isinstance(value, types.ModuleType):
            if sys.modules.get(value.__name__, value) is not value:
                raise _UnknownError(f"{value} is not what was loaded")
            continue
        for part in (*_parts(value, 0), type(value)):
            if isinstance(part, type):
                _require_own_class(part)
            elif isinstance(part, types.FunctionType):
                _require_own_function(part)


@functools.lru_cache(maxsize=1 << 14)
def _require_own_class(kind: type) -> None:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if not (_is_of_library(file) if file else kind.__module__.partition(".")[0] in _WITHOUT_FILE):
        raise _UnknownError(f"{kind} of {file}")


def _require_own_function(function: types.FunctionType) -> None:
    file, name = function.__code__.co_filename, function.__name__
    if file == "<string>" and name in _GENERATED:
        return
    if not _is_of_library(file):
        raise _UnknownError(f"{function.__qualname__} of {file}")
    home = sys.modules.get(function.__globals__.get("__name__", ""))
    # A module may have put an object in its own place.
    if home is None or (type(home) is types.ModuleType and vars(home) is not function.__globals__):
        raise _UnknownError(f"{function.__qualname__} sees other names than its module has")


def _parts(value: Any, depth: int) -> Iterator[Any]:
    """The functions and classes that a value stands for or runs when it is called, those that decorators hold among
    them."""
    if depth > _DEEPEST:
        return
    match value:
        case types.FunctionType():
            yield value
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # a cell may be empty still
                    yield from _parts(cell.cell_contents, depth + 1)
        case (
            type()
            | types.BuiltinFunctionType()
            | types.MethodDescriptorType()
            | types.WrapperDescriptorType()
            | torch.jit.ScriptFunction()
        ):
            yield value
        case types.MethodType():
            yield from _parts(value.__func__, depth)
            yield value.__self__ if isinstance(value.__self__, type) else type(value.__self__)
        case staticmethod() | classmethod():
            yield from _parts(value.__func__, depth)
        case property():
            for part in (value.fget, value.fset):
                yield from _parts(part, depth)
        case functools.partial() | functools.partialmethod():
            yield type(value)
            for part in (value.func, *value.args, *value.keywords.values()):
                yield from _parts(part, depth + 1)
        case dict():
            for part in dict.values(value):  # a subclass may load what it gives
                if callable(part):
                    yield from _parts(part, depth + 1)
        case ExpertsInterface():  # a table, of which modules that no op stands for take a function
            for part in dict(value).values():
                yield from _parts(part, depth + 1)
        case _ if callable(value) or hasattr(type(value), "__get__"):
            yield type(value)
            for part in (
                getattr_static(value, "__wrapped__", None),
                getattr_static(type(value), "__call__", None),
            ):
                if part is not None:
                    yield from _parts(part, depth + 1)


# --- the model --------------------------------------------------------------------------------------------------------


def _modules(model: nn.Module) -> Iterator[str]:
    """Classes, attributes, and what is known of tensors, of a model and all below it."""
    numbers: dict[int, int] = {}  # tied weights and shared modules are the same object
    configs: dict[int, str] = {}  # long, and shared by many modules
    for name, module in model.named_modules(remove_duplicate=False):
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
            raise _UnknownError(f"{name} has hooks")
        yield f"{name} {_class(type(module))} {module.training} {numbers.setdefault(id(module), len(numbers))}"
        own = {k: v for k, v in vars(module).items() if k not in _BARE_MODULE}
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
        raise _UnknownError(f"a tensor of {type(tensor)}")
    number = numbers.setdefault(id(tensor), len(numbers))
    place = f"{tensor.layout} {tensor.device.type}"
    return f"{number} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {place}"


def _text(value: Any) -> str:
    """A value as text, equal for values that trace alike. Raises _UnknownError for objects of unknown kinds."""
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
            return f"{_class(type(value))} {_text(vars(value))}"
        case type():
            _require_own((value,))
            return _class(value)
        case types.FunctionType():
            _require_own((value,))
            if value.__closure__:
                raise _UnknownError(f"{value.__qualname__} holds values of its own")
            return _part(value)
        case types.BuiltinFunctionType() if isinstance(value.__self__, type | types.ModuleType | None):
            return f"{value.__module__}.{value.__name__}"
        case functools.partial():
            return f"partial {_text(value.func)} {_text(value.args)} {_text(value.keywords)}"
    raise _UnknownError(f"a {type(value)}")


def _class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
