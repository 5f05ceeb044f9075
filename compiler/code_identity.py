"""Whose code a model runs, as far as it can be told: the libraries' own, as it was loaded, or not.

Code counts by the files it was loaded from, so functions are looked at one by one: each has to come from a file of
PyTorch, Transformers or what they import, and what each name stands for counts, as one function of the libraries may
have been put in the place of another.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import sys
import time
import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from inspect import getattr_static
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from tilewright import ir

from .capture_ops import configs_of
from .sources import digest_of, files_of

_LIBRARIES = (
    "torch", "transformers", "accelerate", "filelock", "httpx", "huggingface_hub", "jinja2", "networkx", "numpy",
    "packaging", "peft", "PIL", "regex", "requests", "safetensors", "scipy", "sympy", "tokenizers", "torchaudio",
    "torchvision", "tqdm", "typer", "typing_extensions", "yaml",
)  # fmt: skip
"""PyTorch and Transformers, and those whose functions they pass on from module to module."""
_OWN = (Path(__file__).parent, *map(Path, ir.__path__))
_STARTED = time.time()
"""A file that is newer may not be what this process has loaded."""
_CHECKED = re.compile(r"transformers(\.(models|integrations|utils)\.[\w.]+|\.\w+)|torch\.nn\.modules\.\w+")
"""Names of modules whose code a forward may run: none of the libraries' command lines, pipelines or servers."""


class UnknownError(Exception):
    """Something whose part in the model's computation cannot be told."""


@functools.lru_cache(maxsize=1)
def own_code() -> str:
    """A hash of the code that captures and lowers. Raises UnknownError where it is not what this process has loaded."""
    files = files_of(_OWN)
    for file in files:
        stamp(file)
    return digest_of(files)


def stamp(path: Path) -> str:
    """A file as far as its status tells. Raises UnknownError for one that has changed since this process began."""
    status = path.stat()
    if status.st_mtime > _STARTED:
        raise UnknownError(f"{path} has changed")
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def code_of(model: nn.Module) -> Iterator[str]:
    """The files that hold the code of the model, and what names in it stand for, once it is known that all of that is
    the libraries' own. Raises UnknownError where it is not."""
    kinds = sorted({type(part) for part in (*model.modules(), *configs_of(model))}, key=class_name)
    for kind in kinds:
        if not f"{kind.__module__}.".startswith(("transformers.", "torch.")):
            raise UnknownError(f"{kind} is of neither library")
        if kind.__module__ not in sys.modules:
            raise UnknownError(f"{kind} is of a module that is not there")
    _require_unchanged()
    root = Path(transformers.__file__).parent
    homes = {Path(sys.modules[kind.__module__].__file__ or "").parent for kind in kinds}
    for folder in sorted({root, root / "integrations", root / "utils", *homes}):
        yield from map(stamp, sorted(folder.glob("*.py")))
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base.__module__ != "builtins")
    for base in bases:
        require_own(vars(base).values())
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
        require_own(_names(space).values())
    for name, module in list(sys.modules.items()):
        if not _CHECKED.fullmatch(name) or not isinstance(module, types.ModuleType):
            continue
        require_own(_names(module).values(), module)
        for kind in _classes_of(module):
            require_own(vars(kind).values(), module)


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
        if name in found or module is None or not _CHECKED.fullmatch(name):
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
            if parts := [part_text(part) for part in _parts(value, 0)]:
                yield f"{space.__name__}.{name} {parts}"
        elif not hasattr(space, "__path__"):  # a package has the modules in it that are loaded by now
            yield f"{space.__name__}.{name} {value.__name__}"


def part_text(part: Any) -> str:
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


def require_own(values: Iterable[Any], module: types.ModuleType | None = None) -> None:
    """Raise UnknownError for functions and classes from anywhere else, and for modules that stand in for others. What
    the source of the ``module`` that has them imports is no replacement."""
    for value in values:
        if isinstance(value, types.ModuleType):
            if sys.modules.get(value.__name__, value) is not value:
                raise UnknownError(f"{value} is not what was loaded")
            continue
        for part in (*_parts(value, 0), type(value)):
            if isinstance(part, type):
                if not _is_own_class(part) and not _imports(module, part.__module__):
                    raise UnknownError(f"{class_name(part)} is of neither library")
            elif isinstance(part, types.FunctionType):
                _require_own_function(part, module)


_own_classes: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes that were found to be the libraries' own; what was not may have had its module hidden for a while."""


def _is_own_class(kind: type) -> bool:
    if kind in _own_classes:
        return True
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if not (_is_of_library(file) if file else kind.__module__.partition(".")[0] in _WITHOUT_FILE):
        return False
    _own_classes.add(kind)
    return True


def _require_own_function(function: types.FunctionType, module: types.ModuleType | None) -> None:
    file, name = function.__code__.co_filename, function.__name__
    if file == "<string>" and name in _GENERATED:
        return
    home = function.__globals__.get("__name__", "")  # what a decorator copies says nothing
    if not _is_of_library(file) and not _imports(module, home):
        raise UnknownError(f"{function.__qualname__} of {file}")
    loaded = sys.modules.get(home)
    # A module may have put an object in its own place.
    if loaded is None or (type(loaded) is types.ModuleType and vars(loaded) is not function.__globals__):
        raise UnknownError(f"{function.__qualname__} sees other names than its module has")


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


def class_name(kind: type) -> str:
    """A class by its module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"
