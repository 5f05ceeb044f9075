"""torch.export as capture calls it: at training IR, errors in our words, sizes under our names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import ExportedProgram

from tilewright.ir.errors import CaptureError

from .capture_layers import NotALayerError


def export(module: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any, where: str) -> ExportedProgram:
    """torch.export at training IR; anything it raises becomes a CaptureError that names the module."""
    module.eval()
    try:
        return torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
    except (CaptureError, NotALayerError):
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export could not trace {where}: {type(error).__name__}: {error}\n"
            "Look in that module's forward for control flow or sizes that depend on data, or pass other example_inputs="
        ) from error


def symbol_names(exported: ExportedProgram, named: Sequence[Sequence[str | int]]) -> dict[sympy.Symbol, str]:
    """Our name for each size symbol of the export, read off the input placeholders."""
    placeholders = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    names: dict[sympy.Symbol, str] = {}
    for user_input, dims in zip(exported.graph_signature.user_inputs, named, strict=False):
        for size, name in zip(placeholders[str(user_input)].meta["val"].shape, dims, strict=False):
            if isinstance(size, torch.SymInt) and isinstance(name, str):
                names[size.node.expr] = name
    return names
