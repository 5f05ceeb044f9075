"""A compiled decoder whose ``generate`` decodes what several threads ask for at once in one batch."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright.runtime.continuous import DEFAULT_PREFIX_BYTES, ContinuousBatch
from tilewright.runtime.sampling import GenerateOptions, own_generator
from tilewright.runtime.sequence import Sequence

from .cache import EngineCache
from .generate_options import ASSISTANTS

if TYPE_CHECKING:
    from .decoder_mixin import Given


def can_join(model: Any) -> bool:
    """Whether requests of a compiled model can share steps: those of a decoder that attends to nothing but its past."""
    spec = model._tilewright.engine.spec
    return spec.kind == "decoder" and spec.per_request is None


class JoinedModel:
    """Hands out the model as requests call it, each in a thread of its own; see ``runtime.continuous``.

    The compiled model itself goes on as before. prefix_bytes: memory for what ended requests leave to those that begin
    alike.
    """

    def __init__(self, model: Any, prefix_bytes: int = DEFAULT_PREFIX_BYTES) -> None:
        compiled = model._tilewright
        engine = copy.copy(compiled.engine)  # whose steps wait for turns, as those of the model's own do not
        self.batch = ContinuousBatch(engine, prefix_bytes=prefix_bytes)
        self._model = copy.copy(model)
        self._model.__dict__["_tilewright"] = replace(compiled, engine=engine)
        self._model.__dict__["_tilewright_batch"] = self.batch
        cls = type(model)
        members = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        self._model.__class__ = type(cls.__name__, (_Joining, cls), members)

    def for_request(self, config: Any = None) -> Any:
        """The model for one call of ``generate`` with that ``GenerationConfig``, or any.

        Where it draws, it does as if it were alone from here on.
        """
        own = copy.copy(self._model)
        asked = True if config is None else config.do_sample
        draws = self._model.generation_config.do_sample if asked is None else asked
        device = self.batch.engine.spec.device
        own.__dict__["_tilewright_generator"] = own_generator(device) if draws else None
        return own

    def close(self) -> None:
        """Let the batch's memory go; what still runs fails."""
        self.batch.close()


class _Joining:
    """In front of a compiled decoder's class: requests of one new sequence join the batch.

    All others are left to transformers' loop, whose steps wait for their turns.
    """

    _tilewright: Any  # Compiled; transformers evaluates the annotations of a model's classes
    _tilewright_batch: ContinuousBatch
    _tilewright_generator: torch.Generator | None

    def _options(
        self, ids: Tensor, cache: Any, processors: Any, criteria: Any, config: Any, own: dict[str, Any]
    ) -> GenerateOptions | None:
        mask = own.get("attention_mask")
        empty = isinstance(cache, EngineCache) and cache.get_seq_length() == 0
        if len(ids) > 1 or not empty or not (mask is None or bool(mask.all())):
            return None
        options: GenerateOptions | None = super()._options(ids, cache, processors, criteria, config, own)  # type: ignore[misc]
        if options is None:
            options = self._custom_options(processors, criteria, config, own)  # type: ignore[attr-defined]
        # A step has one table of rotary frequencies for all of its rows: the one of short sequences.
        short = self._tilewright.switch_length or math.inf
        return options if options is not None and options.max_length <= short else None

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Without guesses from the text, which change no token: so the request shares steps, and has its own draws."""
        if kwargs.get("assistant_model") is None and kwargs["generation_config"].prompt_lookup_num_tokens:
            rest = {name: value for name, value in kwargs.items() if name not in ASSISTANTS}
            return self._sample(*args, **rest)  # type: ignore[attr-defined]
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]

    def _decode(
        self, cache: EngineCache, given: Given, options: GenerateOptions, streamer: Any, model_kwargs: Any
    ) -> Tensor:
        ready = given.logits is not None
        sequence = Sequence(
            cache.engine.check_prompt(given.ids),
            options,
            given.positions,
            streamer,
            state=cache.state if ready else None,
            logits=given.logits,
            moved=cache.reset if ready else lambda: None,
            generator=self._tilewright_generator,
            weights=self._tilewright.adapters.version,
        )
        return self._tilewright_batch.submit(sequence).result()
