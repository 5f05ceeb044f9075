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


def decoder_call(
    model: nn.Module, path: str, kind: type[nn.Module], **arguments: Any
) -> Mapping[str, Any] | None:
    """What ``model``, run as one of class ``kind`` on ``arguments``, calls its decoder at ``path`` with, less what is
    None or False; None where it does not call it.

    All on the way to the decoder is copied, so that what a model notes of a call (as the positions of its images) is
    not seen by another one.
    """
    front = _shallow_copy(model)
    front.__class__ = kind
    decoder = own_way_to(front, path)
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
