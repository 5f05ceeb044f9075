"""Calls with images or sound: the model's own code makes vectors of them, and the compiled decoder runs from there.

What comes before the decoder of texts is run as it is, by PyTorch: towers, projectors, and the rules by which each
model places what they give among the vectors of the prompt's tokens, numbers positions and builds masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from tilewright.ir.errors import InputError
from tilewright.passes.prompt_inputs import DEEP, REACH, VECTORS

from .api_mixin import Compiled, attach
from .cache import EngineCache, with_cache
from .capture_multimodal import DEEP_PLACES, DEEP_VECTORS, causal_flags, text_decoder
from .decoder_mixin import DecoderMixin, Prompt
from .front import decoder_call, front_of, own_way_to
from .generate_options import KNOWN_KWARGS
from .unserved import EXTRA_OUTPUTS

_NOT_TAKEN = ("inputs_embeds", "labels", *EXTRA_OUTPUTS)
_TEXT = {"input_ids", "use_cache", "return_dict", "cache_position", "logits_to_keep", "kwargs"}
_MASKS = ("full_attention", "sliding_attention")
"""What Transformers calls the masks of layers without and with a window."""
_REMEDY = "use the original model for prompts with images or sound"


def attach_multimodal(model: PreTrainedModel, compiled: Compiled) -> Any:
    """As ``attach``, with copies of the modules on the way to the decoder of texts.

    Models note in them how positions go on after an image, and the original must not change.
    """
    fast = attach(model, compiled, MultimodalMixin)
    own_way_to(fast, text_decoder(model))
    return fast


class MultimodalMixin(DecoderMixin):
    """A decoder of texts within a model that takes more: forward as the original's, and generate."""

    @cached_property
    def _decoder_path(self) -> str:
        return text_decoder(self)

    def _front(self, cache: EngineCache | None) -> Any:
        """The original, to be run up to its decoder; with what it had noted at the end of the request in a cache."""
        state = None if cache is None or not cache.get_seq_length() else cache.state
        deltas = None if state is None else state.shift[: state.batch].clone()
        return front_of(self, self._decoder_path, self._tilewright_class, {"rope_deltas": deltas})  # type: ignore[arg-type]

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Any:
        """Called by generate(): as the original has it, for the request at hand and no other."""
        cache = model_kwargs.get(self._cache_name)
        front = self._front(cache if isinstance(cache, EngineCache) else None)
        return front._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _plain(self, positions: Any) -> Any:
        return plain_positions(positions, self._tilewright.engine.position_axes)

    def _prompt(self, prompt: Prompt, cache: EngineCache, given: dict[str, Any]) -> Prompt:
        prompt = replace(prompt, positions=self._plain(prompt.positions))
        if not self._asks(given, prompt.ids.shape[1], prompt.positions):
            return super()._prompt(prompt, cache, {n: given[n] for n in given if n in _NOT_TAKEN})
        self._refuse({name: given.get(name) for name in _NOT_TAKEN})
        if self._tilewright.engine.embed is None:
            raise InputError(
                f"{type(self).__name__} looks token ids up for later layers, too, so that a compiled one takes texts "
                f"alone; {_REMEDY}"
            )
        arguments = {n: v for n, v in given.items() if v is not None and n not in _NOT_TAKEN} | {
            "input_ids": prompt.ids,
            "attention_mask": None if prompt.mask is None else prompt.mask.to(prompt.ids.device),
            "position_ids": prompt.positions,
            "use_cache": True,
            "return_dict": True,
        }
        if (
            cache.get_seq_length()
        ):  # an empty one of ours says that it is begun, and PaliGemma would believe it
            arguments |= with_cache(self._tilewright_forward, cache)
        told = decoder_call(self._front(cache), self._decoder_path, **arguments)
        if told is None:
            raise InputError(
                f"{type(self).__name__} did not call its decoder of texts for this prompt; {_REMEDY}"
            )
        # What a caller passes through to the decoder's layers is ignored there, as ever.
        through = {n: v for n, v in told.get("kwargs", {}).items() if n not in arguments and _is_said(v)}
        return self._as_told(prompt, cache, {**told, **through})

    def _asks(self, given: Mapping[str, Any], tokens: int, positions: Any) -> bool:
        """Whether the model's own code has to say what a prompt is: where there is more than a text in it, and where it
        builds masks, which depend on more than that, and may number positions its own way."""
        return bool(self._more(given)) or bool(self._reaching and (tokens > 1 or positions is None))

    def _as_told(self, prompt: Prompt, cache: EngineCache, told: dict[str, Any]) -> Prompt:
        """The prompt as the decoder is called with it. Raises InputError for what it cannot be told."""
        name = type(self).__name__
        first, mask, positions = (told.pop(n, None) for n in (VECTORS, "attention_mask", "position_ids"))
        deep, places = told.pop(DEEP_VECTORS, ()), told.pop(DEEP_PLACES, None)
        rest = [n for n, v in told.items() if n not in _TEXT and not isinstance(v, Cache)]
        if rest or first is None:
            what = " and ".join(rest) or "no vectors"
            raise InputError(
                f"{name} hands its decoder {what} for this prompt, which a compiled one does not take; {_REMEDY}"
            )
        given = {VECTORS: first}
        for number, some in enumerate(deep):
            given[f"{DEEP}{number}"] = torch.zeros_like(first)
            given[f"{DEEP}{number}"][places] = some.to(first)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            prompt = replace(prompt, mask=mask)
        else:
            masks = mask if isinstance(mask, Mapping) else dict.fromkeys(_MASKS, mask)
            given |= self._reaches(masks, prompt, cache.get_seq_length())
        positions = self._plain(positions)
        by_model = prompt.positions is None and positions is not None
        return replace(prompt, positions=positions, given=given, counts_on=by_model)

    def _reaches(self, masks: Mapping[str, Any], prompt: Prompt, past: int) -> dict[str, Tensor]:
        """The last key that each token sees in layers of each window, as the masks say that the model has built."""
        windows = {name: int(name.removeprefix(REACH)) for name in self._reaching}
        unknown = any(m is not None and (not windows or name not in _MASKS) for name, m in masks.items())
        found: dict[str, Tensor] = {}
        for name, window in windows.items():
            mask = masks.get(_MASKS[bool(window)])
            reach = None
            if mask is not None:
                reach = reach_of(mask, prompt.mask, prompt.ids.shape, past, window)
                unknown |= reach is None
            elif not self._is_causal:
                reach = torch.full_like(prompt.ids, past + prompt.ids.shape[1] - 1)
            found |= {} if reach is None else {name: reach}
        if unknown:
            raise InputError(
                f"{type(self).__name__} has its decoder see this prompt by a mask that a compiled one cannot follow; "
                f"{_REMEDY}"
            )
        return found

    @property
    def _reaching(self) -> list[str]:
        """Inputs of prompts that say how far tokens see."""
        return [spec.name for spec in self._tilewright.engine.spec.reaches]

    @cached_property
    def _is_causal(self) -> bool:
        """What the decoder's attention takes no mask at all for."""
        flags = causal_flags(self.get_submodule(self._decoder_path))  # type: ignore[attr-defined]
        return any(flags) or not flags

    def _more(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments beyond those of a text: images and sound, or what generate() has made of them beforehand.

        The token types of a text, which Transformers' processors give as zeros, are none.
        """
        texts = (*KNOWN_KWARGS, *_NOT_TAKEN, self._cache_name)
        more = {n: v for n, v in given.items() if (isinstance(v, Tensor) or v) and n not in texts}
        types = [n for n, v in more.items() if n.endswith("token_type_ids") and not bool(v.any())]
        return {} if len(types) == len(more) else more

    def _own_arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What our loop takes; all there is, which it does not, where a request goes on with more than texts, or a
        prompt ends with an image: its loop goes on from each of the last position's numbers."""
        own = super()._own_arguments(model_kwargs)
        cache, positions = own.get(self._cache_name), self._plain(own.get("position_ids"))
        begins = isinstance(cache, EngineCache) and cache.get_seq_length() == 0
        ends = isinstance(positions, Tensor) and positions.ndim == 3
        if ends and bool((positions[..., -1] != positions.amax((0, 2))).any()):
            return own
        if begins or not self._more(model_kwargs):
            own = {n: v for n, v in own.items() if n in KNOWN_KWARGS or n == self._cache_name}
        return own | {"position_ids": positions}

    def _first_logits(self, new_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor | None:
        positions = model_kwargs.get("position_ids")
        if not self._asks(model_kwargs, new_ids.shape[1], positions):
            return None
        if positions is not None:
            model_kwargs = {**model_kwargs, "position_ids": positions[..., -new_ids.shape[1] :]}
        prepared = self.prepare_inputs_for_generation(new_ids, is_first_iteration=True, **model_kwargs)  # type: ignore[attr-defined]
        logits: Tensor = self(**{**prepared, "logits_to_keep": 1}).logits  # type: ignore[operator]
        return logits[:, -1:]


def reach_of(mask: object, valid: Tensor | None, shape: torch.Size, past: int, window: int) -> Tensor | None:
    """The last key that each of the tokens [B, S] after ``past`` others sees by a mask [B, 1, S, past + S], i64[B, S].

    valid: [B, past + S], zero where a key is padding. None for a mask that says anything else than that a token sees
    the keys up to there, less those further back than the window, and less padding.
    """
    batch, tokens = shape
    total = past + tokens
    if not isinstance(mask, Tensor) or mask.shape[1:] != (1, tokens, total):
        return None
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(batch, tokens, total)
    keys = torch.arange(total, device=seen.device)
    own = keys[past:]
    real = torch.ones_like(seen[:, 0]) if valid is None else valid != 0
    # What padding itself sees is nobody's concern.
    concerned = real[:, None, :] & real[:, past:, None]
    last = torch.where(seen & concerned, keys, -1).amax(-1)
    reach = torch.maximum(last, own).cummax(1).values
    expected = keys <= reach[:, :, None]
    if window:
        expected = expected & (own[:, None] - keys < window)
    return reach if torch.equal(expected & concerned, seen & concerned) else None


def _is_said(value: object) -> bool:
    return value is not None and value is not False


def plain_positions(positions: Any, axes: int) -> Any:
    """Positions [B, S] where those of several numbers, [axes, B, S], have equal ones; without those of the texts that
    Transformers puts before them; integers where a model has whole numbers among floats (Qwen3-Omni)."""
    if not isinstance(positions, Tensor):
        return positions
    if positions.is_floating_point() and bool((positions == positions.round()).all()):
        positions = positions.long()
    if positions.ndim != 3:
        return positions
    if positions.shape[0] == axes + 1:
        positions = positions[1:]
    return positions[0] if bool((positions == positions[:1]).all()) else positions
