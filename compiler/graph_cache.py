"""The graph of a model on disk: what tracing it gave, lowered, for a later compilation of a model of the same identity.

Tracing takes most of a compilation whose kernels are in the cache already. A record holds the IR as text and what is
known beside it; tensors go by their names in the model. What is read is parsed and verified like any other IR, and
anything that does not fit is as good as no record.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tilewright.ir.errors import TilewrightError
from tilewright.ir.module import Module
from tilewright.ir.parser import parse_module
from tilewright.ir.verify import verify_module
from tilewright.runtime.files import require_private, write_atomically

from .capture import CapturedFacts, own_tensors
from .capture_multimodal import VectorPrompts
from .settings import cache_dir

_SCHEMA = 2
_LONGEST = 4096
"""Elements of a tensor that the code spells out, above which a graph is not kept."""


def load(key: str, model: nn.Module) -> tuple[CapturedFacts, Module] | None:
    """What was stored under the identity ``key``, with the tensors of ``model``; None where there is nothing of use."""
    path = _path(key)
    try:
        require_private(path)
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        if digest != _digest(text):
            return None
        record = json.loads(text)
        lowered = parse_module(record.pop("ir"))
        verify_module(lowered)
        own = own_tensors(model)
        return CapturedFacts(
            tensors={name: own[name] for name in record["tensors"]}
            | {name: _tensor(data, model) for name, data in record["literals"].items()},
            kind=record["kind"],
            outputs=tuple(record["outputs"]),
            output_class=_output_class(record["output_class"]),
            output_spec=None
            if record["output_spec"] is None
            else pytree.treespec_loads(record["output_spec"]),
            output_constants={},
            position_rule=record["position_rule"],
            notes=tuple(record["notes"]),
            per_request=tuple(record["per_request"]),
            vectors=_vectors(record["vectors"]),
        ), lowered
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError, TilewrightError):
        return None


def store(key: str, model: nn.Module, facts: CapturedFacts, lowered: Module) -> bool:
    """Keep a graph. False where it cannot be kept: its code spells out a tensor that is long or that JSON cannot say,
    or what it returns has no name, or the folder cannot be written."""
    own = own_tensors(model)
    literals = {name: t for name, t in facts.tensors.items() if name not in own}
    if facts.output_constants or not all(
        0 < t.numel() <= _LONGEST and not t.is_complex() for t in literals.values()
    ):
        return False
    with suppress(OSError, NotImplementedError):
        record = {
            "ir": str(lowered),
            "tensors": [name for name in facts.tensors if name in own],
            "literals": {name: _data(tensor) for name, tensor in literals.items()},
            "kind": facts.kind,
            "outputs": facts.outputs,
            "output_class": None if facts.output_class is None else _name(facts.output_class),
            "output_spec": None if facts.output_spec is None else pytree.treespec_dumps(facts.output_spec),
            "position_rule": facts.position_rule,
            "notes": facts.notes,
            "per_request": facts.per_request,
            "vectors": None if facts.vectors is None else asdict(facts.vectors),
        }
        text = json.dumps(record)
        write_atomically(_path(key), f"{_digest(text)}\n{text}")
        return True
    return False


def _vectors(record: dict[str, Any] | None) -> VectorPrompts | None:
    return (
        None if record is None else VectorPrompts(**{**record, "deep_layers": tuple(record["deep_layers"])})
    )


def _data(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype), "values": tensor.tolist()}


def _tensor(data: dict[str, Any], model: nn.Module) -> Tensor:
    dtype = getattr(torch, data["dtype"].removeprefix("torch."))
    device = next((t.device for t in model.parameters()), None)
    return torch.tensor(data["values"], dtype=dtype, device=device)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _output_class(name: str | None) -> type | None:
    """A class of results of Transformers by its name. Raises KeyError, AttributeError or TypeError for any other."""
    if name is None:
        return None
    module, _, kind = name.partition(":")
    found: Any = getattr(sys.modules[module], kind)
    if not (
        isinstance(found, type) and issubclass(found, ModelOutput) and module.startswith("transformers.")
    ):
        raise TypeError(f"{name} is no class of results")
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(f"{_SCHEMA} {text}".encode()).hexdigest()


def _path(key: str) -> Path:
    return cache_dir() / "graphs" / f"{key[:40]}.json"
