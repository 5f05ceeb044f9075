"""What Transformers lets callers ask of a model's configuration and a compiled model does not do: it is refused.

Left alone it would be ignored, as no argument tells of it: outputs would be missing and memory be spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tilewright.ir.errors import InputError, OptionError

EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Arguments of forward, with defaults in the model's config, that ask for more than the model's result."""

_CACHES = {
    "quantized": "compile with kv_cache='fp8' for a narrower one",
    "offloaded": "compile with a smaller max_length, or with kv_cache='fp8' for a narrower one",
    "paged": "leave cache_implementation out",
}


def require_plain_outputs(model: nn.Module) -> None:
    """Raise OptionError when the config of ``model``, or of a model within it, asks for extra outputs."""
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        for flag in EXTRA_OUTPUTS:
            if getattr(module.config, flag, None):
                where = f"model.{name}.config.{flag}" if name else f"model.config.{flag}"
                raise OptionError(
                    f"{where} asks for outputs that a compiled model does not compute; set it to False before "
                    f"compiling, and call the original model with {flag}=True for them"
                )


def refuse_configured_outputs(config: Any, arguments: Mapping[str, Any]) -> None:
    """Raise InputError when ``config`` asks for extra outputs and the ``arguments`` of a call do not say otherwise."""
    for flag in EXTRA_OUTPUTS:
        if getattr(config, flag, None) and arguments.get(flag) is None:
            raise InputError(
                f"config.{flag} asks for outputs that a compiled model does not compute; set config.{flag} = False, "
                "and call the original model for them"
            )


def refuse_cache(implementation: str | None) -> None:
    """Raise InputError for a ``cache_implementation`` of generate() that promises memory which our KV state takes.

    Others ("static", "dynamic", "hybrid") promise a result alone, which ours gives too.
    """
    for kind, remedy in _CACHES.items():
        if kind in (implementation or ""):
            raise InputError(
                f"cache_implementation={implementation!r}: a compiled model keeps its own KV state, on the model's "
                f"device and in one piece; {remedy}"
            )
