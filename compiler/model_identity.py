"""What a capture depends on, as a hash: the code that a model runs, its configuration, its modules and their tensors.

Two models with the same identity capture to the same graph, in this process or in a later one, so the graph of the
first serves the second. Values of tensors do not count: a graph refers to them by name. Where it cannot be told what
code a model runs, there is no identity, and it is captured: a class from anywhere but Transformers or PyTorch, a hook,
a method or function that somebody replaced, an attribute of an unknown kind. Code counts by the files it was loaded
from, so functions are looked at one by one: each has to come from a file of the libraries.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import platform
import re
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import GenerationConfig, PretrainedConfig

from tilewright import ir

_LIBRARIES = (
    "torch", "transformers", "accelerate", "filelock", "httpx", "huggingface_hub", "jinja2", "networkx", "numpy",
    "packaging", "peft", "PIL", "regex", "requests", "safetensors", "scipy", "sympy", "tokenizers", "torchaudio",
    "torchvision", "tqdm", "typer", "typing_extensions", "yaml",
)  # fmt: skip
"""PyTorch and Transformers, and those whose functions they pass on from module to module."""
_OWN = (Path(__file__).parent, *map(Path, ir.__path__))
_CHECKED = re.compile(r"transformers(\.(models|integrations|utils)\.[\w.]+|\.\w+)|torch\.nn\.modules\.\w+")
"""Names of modules whose code a forward may run: none of the libraries' command lines, pipelines or servers."""
_BARE_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class _UnknownError(Exception):
    """Something whose part in the model's computation cannot be told."""


def identity(model: nn.Module) -> str | None:
    """A hash of all that the capture of ``model`` depends on; None where that cannot be told."""
    try:
        parts = [*_surroundings(), *_code(model), *_modules(model)]
    except _UnknownError:
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _surroundings() -> Iterator[str]:
    """Versions, our own code, and settings of PyTorch that a trace sees."""
    yield from (platform.python_version(), torch.__version__, transformers.__version__, _own_code())
    yield f"{torch.get_default_dtype()} {[torch.is_autocast_enabled(device) for device in ('cpu', 'cuda')]}"
    if any(getattr(torch_modules, name) for name in _GLOBAL_HOOKS):
        raise _UnknownError("hooks on all modules")


@functools.lru_cache(maxsize=1)
def _own_code() -> str:
    digest = hashlib.sha256()
    for folder in _OWN:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


# --- code -----------------------------------------------------------------------------------------------------------


def _code(model: nn.Module) -> Iterator[str]:
    """The files that hold the code of the model, once it is known that nothing of it was replaced."""
    kinds = sorted({type(m) for m in model.modules()}, key=_class)
    for kind in kinds:
        if not f"{kind.__module__}.".startswith(("transformers.", "torch.")):
            raise _UnknownError(f"{kind} is of neither library")
    _require_unchanged()
    root = Path(transformers.__file__).parent
    homes = {Path(sys.modules[kind.__module__].__file__ or "").parent for kind in kinds}
    for folder in sorted({root, root / "integrations", root / "utils", *homes}):
        for file in sorted(folder.glob("*.py")):
            status = file.stat()
            yield f"{file} {status.st_size} {status.st_mtime_ns}"
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base.__module__ != "builtins")
    spaces: list[Any] = [*bases, *(sys.modules[kind.__module__] for kind in kinds)]
    for space in spaces:
        own = {k: v for k, v in vars(space).items() if isinstance(v, bool | int | float | str)}
        # Transformers remembers there what it found in its own code.
        kept = sorted((k, v) for k, v in own.items() if k[:2] != "__" and not k.endswith("_cached_value"))
        yield f"{space.__name__} {kept}"


def _require_unchanged() -> None:
    """Look at every function that a model of the libraries might run. What is not loaded yet, nobody has replaced."""
    for space in (torch, torch.Tensor, torch.nn.functional, nn.Module):
        _require_own(vars(space).values())
    for name, module in list(sys.modules.items()):
        if not _CHECKED.fullmatch(name) or not isinstance(module, types.ModuleType):
            continue
        members = [v for v in vars(module).values() if not isinstance(v, types.ModuleType)]
        _require_own(members, module)
        for kind in members:
            if isinstance(kind, type) and kind.__module__ == name:
                _require_own(vars(kind).values(), module)


@functools.lru_cache(maxsize=1)
def _folders() -> tuple[str, ...]:
    """Where the code of the libraries is."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES]
    return tuple(file.removesuffix("__init__.py") for file in files if file)


_DEEPEST = 8
"""Decorators in one another that are looked through."""
_PYTHON = str(Path(os.__file__).parent)
_INSTALLED = ("site-packages", "dist-packages")


def _is_of_library(file: str) -> bool:
    """Whether a file of code is one of the libraries' or of Python's own."""
    if file.startswith((*_folders(), "<frozen ")):
        return True
    return file.startswith(_PYTHON) and not any(folder in file for folder in _INSTALLED)


def _require_own(values: Iterable[Any], module: types.ModuleType | None = None) -> None:
    """Raise _UnknownError for functions and classes from anywhere else, unless the source of the ``module`` that has
    them imports something of theirs. Python generates some methods, as of dataclasses."""
    for value in values:
        if isinstance(value, type):
            file = getattr(sys.modules.get(value.__module__), "__file__", None)
            if file is not None and not _is_of_library(file) and not _imports(module, value.__module__):
                raise _UnknownError(f"{value} of {file}")
        for function in _functions(value, 0):
            file, name = function.__code__.co_filename, function.__name__
            generated = file.startswith("<") and name.startswith("__") and name.endswith("__")
            home = function.__globals__.get("__name__", "")  # what a decorator copies says nothing
            if not (generated or _is_of_library(file) or _imports(module, home)):
                raise _UnknownError(f"{function.__qualname__} of {file}")


def _imports(module: types.ModuleType | None, name: str) -> bool:
    """Whether the source of a module imports anything of the package that has the module ``name``."""
    file = getattr(module, "__file__", None)
    return file is not None and bool(name) and name.partition(".")[0] in _imported_by(file)


@functools.lru_cache(maxsize=256)
def _imported_by(file: str) -> frozenset[str]:
    """The packages that a file imports anything of."""
    with suppress(OSError):
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        return frozenset(re.findall(r"(?m)^[ \t]*(?:from|import)[ \t]+(\w+)", text))
    return frozenset()


def _functions(value: Any, depth: int) -> Iterator[types.FunctionType]:
    """The Python functions that a value runs when it is called, those that decorators hold among them."""
    match value:
        case types.FunctionType():
            yield value
            for cell in (value.__closure__ or ()) if depth < _DEEPEST else ():
                with suppress(ValueError):  # a cell may be empty still
                    yield from _functions(cell.cell_contents, depth + 1)
        case staticmethod() | classmethod() | types.MethodType():
            yield from _functions(value.__func__, depth)
        case property():
            for part in (value.fget, value.fset):
                yield from _functions(part, depth)
        case functools.partial():
            yield from _functions(value.func, depth)
        case type():
            return
        case _:
            yield from _called(value, depth)


def _called(value: object, depth: int) -> Iterator[types.FunctionType]:
    call = inspect.getattr_static(type(value), "__call__", None)
    if isinstance(call, types.FunctionType):
        yield from _functions(call, depth)


# --- the model --------------------------------------------------------------------------------------------------------


def _modules(model: nn.Module) -> Iterator[str]:
    """Classes, attributes, and what is known of tensors, of a model and all below it."""
    numbers: dict[int, int] = {}  # tied weights and shared modules are the same object
    for name, module in model.named_modules(remove_duplicate=False):
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
            raise _UnknownError(f"{name} has hooks")
        yield f"{name} {_class(type(module))} {module.training} {numbers.setdefault(id(module), len(numbers))}"
        own = {k: v for k, v in vars(module).items() if k not in _BARE_MODULE}
        for key in sorted(own):
            yield f"{key} {_text(own[key])}"
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            number = None if tensor is None else numbers.setdefault(id(tensor), len(numbers))
            yield f"{key} {number} {_text(tensor)}"


def _text(value: Any) -> str:
    """A value as text, equal for values that trace alike. Raises _UnknownError for objects of unknown kinds."""
    match value:
        case None | bool() | int() | float() | str() | bytes() | torch.dtype() | torch.Size():
            return repr(value)
        case torch.device():
            return value.type
        case Tensor():
            return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device.type}"
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
            return _class(value)
        case types.FunctionType():
            _require_own((value,))
            if value.__closure__:
                raise _UnknownError(f"{value.__qualname__} holds values of its own")
            return f"{value.__module__}.{value.__qualname__}"
        case types.BuiltinFunctionType():
            return f"{value.__module__}.{value.__name__}"
        case functools.partial():
            return f"partial {_text(value.func)} {_text(value.args)} {_text(value.keywords)}"
    raise _UnknownError(f"a {type(value)}")


def _class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
