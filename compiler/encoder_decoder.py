"""A whole encoder-decoder: a compiled decoder with a compiled encoder at its side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tilewright.ir.errors import InputError
from tilewright.runtime.checks import require_tensor
from tilewright.runtime.kv_state import RequestState

from .api_mixin import Compiled, attach
from .cache import EngineCache
from .capture_seq2seq import ENCODER_MASK, ENCODER_STATES
from .decoder_mixin import DecoderMixin

# The decoder's arguments by the names that the whole model has for them.
_DECODERS = {"decoder_attention_mask": "attention_mask", "decoder_position_ids": "position_ids"}
_ENCODERS = ("encoder_outputs", "attention_mask")


def states_of(encoder: Any) -> tuple[int, int]:
    """The least and the most states that a compiled encoder gives for one input."""
    spec = encoder._tilewright.engine.spec
    length = spec.outputs[0].type.shape[1]
    if length.is_Integer:
        return int(length), int(length)
    return next((low, high) for name, low, high in spec.symbols if name == str(length))


def attach_both(model: PreTrainedModel, decoder: Compiled, encoder: Any) -> Any:
    """A shallow copy of ``model`` that runs the compiled decoder on what the compiled encoder gives, and shows what
    there is to see of both."""
    part: Compiled = encoder._tilewright
    stages = {f"encoder.{name}": text for name, text in part.stages.items()}
    stages["encoder"] = part.stages["forward"]
    compiled = replace(
        decoder,
        encoder=encoder,
        report=decoder.report.with_part(part.report, "encoder"),
        copied_from=decoder.copied_from | part.copied_from,
        stages={**stages, **decoder.stages},
    )
    return attach(model, compiled, EncoderDecoderMixin)


class EncoderDecoderMixin(DecoderMixin):
    """An encoder-decoder: forward as the original's, whose encoder runs where its states are not given, and generate.

    Keys and values of cross-attention are computed once, when a cache is still empty, and kept with it.
    """

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The compiled encoder, which generate() runs."""
        return self._tilewright.encoder

    @torch.no_grad()
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine = self._tilewright.engine
        self._require_weights()
        given = self._flat_arguments(args, kwargs)
        return_dict, use_cache = given.pop("return_dict", None), given.pop("use_cache", None)
        ids, mask = given.pop("decoder_input_ids", None), given.pop("decoder_attention_mask", None)
        positions = given.pop("decoder_position_ids", None)
        cache = self._own_cache(given.pop(self._cache_name, None))
        if ids is None:
            raise InputError("decoder_input_ids is missing")
        ids = engine.check_prompt(ids)
        encoded = self._encode(given, begun=cache.get_seq_length() > 0)
        encoder_mask = given.pop("attention_mask", None)
        self._refuse(given)
        state = self._begin(cache, ids.shape[0], encoded, encoder_mask)
        result = engine.step(state, ids, mask, positions)
        more = {} if encoded is None else {"encoder_last_hidden_state": encoded}
        return self._output(result, None if use_cache is False else cache, return_dict, **more)

    def _encode(self, given: dict[str, Any], begun: bool) -> Tensor | None:
        """The encoder's states: those that were given, or else what it makes of its inputs, taken out of ``given``.

        None for a request that has begun and is told neither.
        """
        encoder = self._tilewright.encoder
        names = [i.name for i in encoder._tilewright.engine.spec.inputs]
        inputs = {n: given.get(n) if n == "attention_mask" else given.pop(n, None) for n in names}
        states = given.pop("encoder_outputs", None)
        if states is not None:
            states = states[0]
            require_tensor("encoder_outputs[0]", states)
            return states
        main = encoder.main_input_name
        if inputs[main] is None:
            if begun:
                return None
            raise InputError(f"{main} is missing; pass it, or encoder_outputs")
        return encoder(**inputs).last_hidden_state

    def _begin(
        self, cache: EngineCache, batch: int, states: Tensor | None, mask: Tensor | None
    ) -> RequestState:
        """The request's state. Have an empty cache attend to ``states``, or one that has begun, by another mask."""
        engine, state = self._tilewright.engine, cache.state_for(batch)
        if state.length == 0:
            assert states is not None
            if mask is None:
                mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            engine.begin(state, {ENCODER_STATES: states, ENCODER_MASK: mask})
        elif mask is not None:
            engine.change_given(state, {ENCODER_MASK: mask})
        return state

    def _check_prompt(self, prompt: Any) -> None:
        """What generate() is given is for the encoder."""
        require_tensor("inputs", prompt)
        encoder = self._tilewright.encoder
        if encoder.main_input_name == "input_ids":
            encoder._tilewright.engine.check_prompt(prompt)

    def _own_arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        return {_DECODERS.get(n, n): value for n, value in model_kwargs.items() if n not in _ENCODERS}

    def _state(self, cache: EngineCache, batch: int, model_kwargs: dict[str, Any]) -> RequestState:
        return self._begin(
            cache, batch, model_kwargs["encoder_outputs"][0], model_kwargs.get("attention_mask")
        )
