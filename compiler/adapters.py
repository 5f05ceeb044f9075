"""PEFT's adapters (LoRA and its kin) on a compiled model: merged into the weights that the kernels read.

A compiled model shares its weights with the original, so what PEFT merges into a layer's weight in place, the kernels
compute with: no kernel is compiled anew, and a call costs what it costs without an adapter. PEFT's own functions choose
(``set_adapter``, ``disable_adapter``, ``load_adapter``); before a request the merged adapters are brought in step with
the chosen ones. Base values are kept, since subtracting what was added would not give them back in half precision.
(Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tilewright.ir.errors import CaptureError, InputError

_lock = threading.Lock()


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The model's layers that carry adapters, by name; none where PEFT is not in use."""
    if "peft" not in sys.modules:
        return []
    kind = sys.modules["peft"].tuners.tuners_utils.BaseTunerLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]


def without_wrapper(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a ``PeftModel``; any other model as it is.

    Raises CaptureError for a method that does not live in the model's layers, as prompt tuning.
    """
    if "peft" not in sys.modules:
        return model
    if not isinstance(model, sys.modules["peft"].PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise CaptureError(
            f"adapters of the kind {model.active_peft_config.peft_type.value} put tokens before the prompt, which a "
            "compiled model cannot; compile the base model, model.get_base_model(), or use adapters in layers, as LoRA"
        )
    return cast(nn.Module, model.get_base_model())


@dataclass(frozen=True)
class _Weight:
    """A parameter that adapters change: where kernels read it, and its values without adapters."""

    parameter: nn.Parameter
    home: Tensor
    base: Tensor


class MergedAdapters:
    """Keeps the weights of one model in step with its chosen adapters. Safe for several threads, but a change of the
    choice changes the weights under requests that are still running."""

    def __init__(self) -> None:
        self._base: dict[nn.Module, list[_Weight]] = {}
        self._done: dict[nn.Module, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self.version = 0  # another one whenever weights have changed

    def follow(self, model: nn.Module, copied: Collection[int] = ()) -> None:
        """Merge the chosen adapters of every layer, and no others, in place.

        copied: addresses of the storages of weights of which kernels read a copy. Raises InputError where such a weight
        would have to change.
        """
        if not (layers := adapter_layers(model)):
            return
        with _lock, torch.no_grad():
            for name, layer in layers:
                chosen = () if layer.disable_adapters else tuple(layer.active_adapters)
                if self._done.get(layer, _NONE) != (chosen, tuple(layer.merged_adapters)):
                    _require_shared(name, layer, chosen, copied)
                    self._merge(layer, chosen)
                    self.version += 1
                    self._done[layer] = (chosen, tuple(layer.merged_adapters))

    def stay(self) -> None:
        """From now on parameters stay where they are: kernels read them there."""
        self._base = {
            layer: [replace(w, home=w.parameter.data) for w in weights]
            for layer, weights in self._base.items()
        }

    def _merge(self, layer: Any, chosen: tuple[str, ...]) -> None:
        base = layer.get_base_layer()
        if layer.merged_adapters:
            layer.unmerge()
        if base not in self._base:
            self._base[base] = [
                _Weight(p, p.data, p.detach().clone()) for p in base.parameters(recurse=False)
            ]
        for weight in self._base[base]:
            weight.parameter.data.copy_(weight.base)
        if chosen:
            layer.merge(adapter_names=list(chosen))
        for weight in self._base[base]:
            # Some kinds of adapters make a new tensor, when they are merged and when they are not any more.
            if weight.parameter.data_ptr() != weight.home.data_ptr():
                weight.home.copy_(weight.parameter.data)
                weight.parameter.data = weight.home


_NONE: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def _require_shared(name: str, layer: Any, chosen: tuple[str, ...], copied: Collection[int]) -> None:
    weight = layer.get_base_layer().weight
    if weight.untyped_storage().data_ptr() in copied:
        raise InputError(
            f"the adapters of {name} were changed to {', '.join(chosen) or 'none'}, but the kernels read a copy of its "
            "weight in another form; choose adapters before compiling, or compile without weights="
        )
