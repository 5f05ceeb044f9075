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

from .api_mixin import Compiled, DecoderMixin, Prompt, attach
from .cache import EngineCache, with_cache
from .capture_multimodal import DEEP_PLACES, DEEP_VECTORS, text_decoder
from .front import decoder_call, front_of, own_way_to
from .generate_options import KNOWN_KWARGS
from .unserved import EXTRA_OUTPUTS

_NOT_TAKEN = ("inputs_embeds", "labels", *EXTRA_OUTPUTS)
_TEXT = {"input_ids", "use_cache", "return_dict", "cache_position", "logits_to_keep", "kwargs"}
_REMEDY = "use the original model for prompts with images or sound"


def attach_multimodal(model: PreTrainedModel, compiled: Compiled) -> Any:
    """As ``attach``. Models note in themselves how positions go on after an image, and the original must not change."""
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
        return front_of(self, self._decoder_path, type(self).__bases__[1], {"rope_deltas": deltas})  # type: ignore[arg-type]

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Any:
        """Called by generate(): as the original has it, for the request at hand and no other."""
        cache = model_kwargs.get(self._cache_name)
        front = self._front(cache if isinstance(cache, EngineCache) else None)
        return front._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _plain(self, positions: Any) -> Any:
        return _without_repetition(positions, self._tilewright.engine.position_axes)

    def _prompt(self, prompt: Prompt, cache: EngineCache, given: dict[str, Any]) -> Prompt:
        prompt = replace(prompt, positions=self._plain(prompt.positions))
        more = self._more(given)
        if not more:
            return super()._prompt(prompt, cache, {n: given[n] for n in given if n in _NOT_TAKEN})
        self._refuse({name: given.get(name) for name in _NOT_TAKEN})
        if self._tilewright.engine.embed is None:
            raise InputError(
                f"{type(self).__name__} looks token ids up for later layers, too, so that a compiled one takes texts "
                f"alone; {_REMEDY}"
            )
        texts = {
            "input_ids": prompt.ids,
            "attention_mask": prompt.mask,
            "position_ids": prompt.positions,
            # An empty one of ours counts as begun: it needs no layers to be made first.
            **(with_cache(self._tilewright_forward, cache) if cache.get_seq_length() else {}),
        }
        told = decoder_call(
            self._front(cache), self._decoder_path, **texts, **more, use_cache=True, return_dict=True
        )
        if told is None:
            raise InputError(
                f"{type(self).__name__} did not call its decoder of texts for this prompt; {_REMEDY}"
            )
        return self._as_told(prompt, cache, dict(told))

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
        elif mask is not None:
            masks = mask if isinstance(mask, Mapping) else {"full_attention": mask, "sliding_attention": mask}
            given |= self._reaches(masks, prompt, cache.get_seq_length())
        positions = self._plain(positions)
        by_model = prompt.positions is None and positions is not None
        return replace(prompt, positions=positions, given=given, counts_on=by_model)

    def _reaches(self, masks: Mapping[str, Any], prompt: Prompt, past: int) -> dict[str, Tensor]:
        """The last key that each token sees in layers of each window, as the masks say that the model has built."""
        found = {}
        for name in self._reach_inputs or [f"{REACH}0"]:
            window = int(name.removeprefix(REACH))
            mask = masks.get("sliding_attention" if window else "full_attention")
            if mask is None:  # as causality has it
                continue
            reach = reach_of(mask, prompt.mask, prompt.ids.shape, past, window)
            if reach is None or not self._reach_inputs:
                raise InputError(
                    f"{type(self).__name__} has its decoder see this prompt by a mask that a compiled one cannot "
                    f"follow; {_REMEDY}"
                )
            found[name] = reach
        return found

    def _more(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments beyond those of a text: images and sound, or what generate() has made of them beforehand.

        The token types of a text, which Transformers' processors give as zeros, are none, unless masks depend on them.
        """
        more = {
            n: v
            for n, v in given.items()
            if (isinstance(v, Tensor) or v) and n not in (*KNOWN_KWARGS, *_NOT_TAKEN, self._cache_name)
        }
        types = [n for n, v in more.items() if n.endswith("token_type_ids") and not bool(v.any())]
        return {} if len(types) == len(more) and not self._reach_inputs else more

    @property
    def _reach_inputs(self) -> list[str]:
        names = (i.name for i in self._tilewright.engine.spec.prompt_inputs)
        return [name for name in names if name.startswith(REACH)]

    def _own_arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What our loop takes; all there is, which it does not, where a request goes on with more than texts."""
        own = super()._own_arguments(model_kwargs)
        cache = own.get(self._cache_name)
        if isinstance(cache, EngineCache) and cache.get_seq_length() == 0:
            own = {n: v for n, v in own.items() if n in KNOWN_KWARGS or n == self._cache_name}
        return own | {"position_ids": self._plain(own.get("position_ids"))}

    def _first_logits(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor | None:
        if not self._more(model_kwargs):
            return None
        logits: Tensor = self(input_ids, **{**model_kwargs, "logits_to_keep": 1}).logits  # type: ignore[operator]
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


def _without_repetition(positions: Any, axes: int) -> Any:
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
