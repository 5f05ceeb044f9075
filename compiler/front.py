"""What a model of texts and more does before it calls its decoder of texts: its own code, up to that call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from torch import nn


class _ReachedError(Exception):
    """The decoder of texts is called, with these arguments by their names."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__("the decoder of texts is called")
        self.arguments = arguments


def front_of(model: nn.Module, path: str, kind: type[nn.Module], noted: Mapping[str, Any]) -> Any:
    """A copy of ``model``, as one of class ``kind``, with modules of its own on the way to its decoder at ``path``.

    So what a model notes of a call (as how positions go on after an image) is not seen by another one. What it has
    ``noted`` of the calls before, by attribute, is what those modules begin with that have such an attribute.
    """
    front = _shallow_copy(model)
    front.__class__ = kind
    own_way_to(front, path)
    module = front
    for below in path.split("."):
        for name in noted.keys() & vars(module).keys():
            setattr(module, name, noted[name])
        module = module.get_submodule(below)
    return front


def decoder_call(front: nn.Module, path: str, **arguments: Any) -> Mapping[str, Any] | None:
    """What a copy that ``front_of`` made, run on ``arguments``, calls its decoder at ``path`` with.

    Less what is None or False; None where it does not call it.
    """
    decoder = front.get_submodule(path)
    decoder.__dict__["forward"] = partial(_stop, inspect.signature(decoder.forward))
    try:
        front(**arguments)
    except _ReachedError as reached:
        return {n: v for n, v in reached.arguments.items() if v is not None and v is not False}
    return None


def own_way_to(model: nn.Module, path: str) -> nn.Module:
    """Give a shallow copy of a model modules of its own on the way to the one at ``path``, and that one."""
    for name in path.split("."):
        below = model.get_submodule(name)
        model._modules[name] = copied = _shallow_copy(below)
        model = copied
    return model


def _stop(signature: inspect.Signature, *args: Any, **kwargs: Any) -> NoReturn:
    raise _ReachedError(signature.bind(*args, **kwargs).arguments)


def _shallow_copy(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin
