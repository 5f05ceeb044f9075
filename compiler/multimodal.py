"""Calls with images or sound: the model's own code makes vectors of them, and the compiled decoder runs from there.

What comes before the decoder of texts is run as it is, by PyTorch, in a copy of the model that stops at its decoder:
towers, projectors, and the rules by which each model places what they give among the vectors of the prompt's tokens and
numbers the positions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tilewright.ir.errors import InputError
from tilewright.passes.prompt_inputs import DEEP, VECTORS

from .api_mixin import DecoderMixin, Prompt
from .cache import EngineCache, with_cache
from .capture_multimodal import DEEP_PLACES, DEEP_VECTORS, text_decoder
from .generate_options import KNOWN_KWARGS
from .unserved import EXTRA_OUTPUTS

_NOT_TAKEN = ("inputs_embeds", "labels", *EXTRA_OUTPUTS)


class MultimodalMixin(DecoderMixin):
    """A decoder of texts within a model that takes more: forward as the original's, and generate."""

    @cached_property
    def _decoder_path(self) -> str:
        return text_decoder(self)

    def _prompt(self, prompt: Prompt, cache: EngineCache, given: dict[str, Any]) -> Prompt:
        prompt = replace(prompt, positions=_without_repetition(prompt.positions))
        more = _more(given)
        if not more:
            return super()._prompt(prompt, cache, {n: given[n] for n in given if n in _NOT_TAKEN})
        self._refuse({name: given.get(name) for name in _NOT_TAKEN})
        front = _stopping_at(self, self._decoder_path)  # type: ignore[arg-type]
        texts = {
            "input_ids": prompt.ids,
            "attention_mask": prompt.mask,
            "position_ids": prompt.positions,
            **with_cache(self._tilewright_forward, cache),
        }
        try:
            front(**texts, **more, use_cache=True, return_dict=True)
        except _ReachedError as reached:
            return _handed_on(reached.arguments, prompt, type(self).__name__)
        raise InputError(
            f"{type(self).__name__} did not call its decoder of texts; use the original model for that"
        )

    def _own_arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What our loop takes; all there is, which it does not, where a request goes on with more than texts."""
        own = super()._own_arguments(model_kwargs)
        cache = own.get(self._cache_name)
        if isinstance(cache, EngineCache) and cache.get_seq_length() == 0:
            own = {n: v for n, v in own.items() if n in KNOWN_KWARGS or n == self._cache_name}
        return own | {"position_ids": _without_repetition(own.get("position_ids"))}

    def _first_logits(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor | None:
        if not _more({n: v for n, v in model_kwargs.items() if n != self._cache_name}):
            return None
        logits: Tensor = self(input_ids, **{**model_kwargs, "logits_to_keep": 1}).logits  # type: ignore[operator]
        return logits[:, -1:]


class _ReachedError(Exception):
    """The decoder of texts is called. ``arguments``: its own by their names, and those that it takes by any name."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__("the decoder of texts is called")
        self.arguments = arguments


def _more(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments beyond those of a text: images and sound, or what generate() has made of them beforehand."""
    texts = (*KNOWN_KWARGS, *_NOT_TAKEN)
    return {n: v for n, v in given.items() if n not in texts and not _says_nothing(n, v)}


def _says_nothing(name: str, value: Any) -> bool:
    """True for what is not there, and for a text's token types, which Transformers' processors give as zeros."""
    if isinstance(value, Tensor):
        return name.endswith("token_type_ids") and not bool(value.any())
    return not value


def _stopping_at(compiled: nn.Module, path: str) -> nn.Module:
    """The original model of ``compiled``, which raises _ReachedError where it calls its decoder, at ``path``.

    All on the way there is copied, so that what a model notes of a call (as the positions of its images) is not seen by
    another one.
    """
    front = top = _shallow_copy(compiled)
    top.__class__ = type(compiled).__bases__[1]
    *parents, last = path.split(".")
    for name in parents:
        top._modules[name] = top = _shallow_copy(top._modules[name])  # type: ignore[arg-type]
    decoder = top._modules[last] = _shallow_copy(top._modules[last])  # type: ignore[arg-type]
    decoder.__dict__["forward"] = partial(_reached, inspect.signature(decoder.forward))
    return front


def _reached(signature: inspect.Signature, *args: Any, **kwargs: Any) -> NoReturn:
    raise _ReachedError(signature.bind(*args, **kwargs).arguments)


def _shallow_copy(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


_TEXT = {"input_ids", "use_cache", "return_dict", "cache_position", "logits_to_keep", "kwargs"}


def _handed_on(arguments: Mapping[str, Any], prompt: Prompt, name: str) -> Prompt:
    """The prompt as a decoder is called with it. Raises InputError for what it is told beyond vectors, where each
    token is, and which ones are padding."""
    rest = {n: v for n, v in arguments.items() if v is not None and v is not False}
    first, mask, positions = (rest.pop(n, None) for n in (VECTORS, "attention_mask", "position_ids"))
    deep, places = rest.pop(DEEP_VECTORS, ()), rest.pop(DEEP_PLACES, None)
    told = [n for n, v in rest.items() if n not in _TEXT and not isinstance(v, EngineCache)]
    if told or first is None:
        raise InputError(
            f"{name} hands its decoder {' and '.join(told) or 'no vectors'} for this prompt, which a compiled one does "
            "not take; use the original model for prompts with images or sound"
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise InputError(
            f"{name} has its decoder see this prompt by a mask of its own, where tokens also see later ones; use the "
            "original model for prompts with images or sound"
        )
    vectors = {VECTORS: first}
    for number, some in enumerate(deep):
        vectors[f"{DEEP}{number}"] = torch.zeros_like(first)
        vectors[f"{DEEP}{number}"][places] = some.to(first)
    return Prompt(prompt.ids, mask, _without_repetition(positions), vectors)


def _without_repetition(positions: Any) -> Any:
    """Positions [B, S] where those of several numbers, [3, B, S], have equal ones; without those of the texts that
    Transformers puts before them, [4, B, S]."""
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        return positions
    if positions.shape[0] == 4:
        positions = positions[1:]
    return positions[0] if bool((positions == positions[:1]).all()) else positions
