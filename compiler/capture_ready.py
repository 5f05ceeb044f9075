"""Whether a model can be captured as it is, whatever its code does."""

from __future__ import annotations

import torch
from torch import nn

from tilewright.ir.errors import CaptureError


def check_ready(model: nn.Module) -> None:
    """Raise CaptureError for a model that is in training mode, has no weights, or holds codes as weights."""
    for name, module in model.named_modules():
        if module.training:
            where = f"module {name!r} of " if name else ""
            raise CaptureError(f"{where}{type(model).__name__} is in training mode; call model.eval() first")
        _require_wide(model, name, module)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CaptureError(
                f"{type(model).__name__}: {name!r} is a meta tensor without values; load the weights before compiling"
            )


def _require_wide(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise CaptureError for a plain linear module whose weight holds codes, which it would multiply as they are.

    A subclass may have a forward that decodes them.
    """
    dtype = module.weight.dtype if type(module) is nn.Linear else torch.float32
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise CaptureError(
            f"{type(model).__name__}: the weight of {name!r} is quantized to {str(dtype).removeprefix('torch.')}, and "
            "nothing here decodes it; load the model without quantization_config= (or call model.dequantize()) and "
            "compile with weights='int8', 'int4' or 'fp8'"
        )
