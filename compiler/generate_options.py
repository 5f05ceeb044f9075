"""Which calls of generate() our own loop can serve: greedy search and temperature, top-k, top-p sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from tilewright.runtime.sampling import CustomOptions, GenerateOptions, Sampling

# In the order in which transformers applies them, and our loop too.
_MINIMUM = [MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor]
_WARPERS = [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper]
# A tokenizer is for stop strings, which have a criterion of their own.
KNOWN_KWARGS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "tokenizer"}
ASSISTANTS = ("inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer")
"""Arguments of assisted decoding that are not for forward."""


def plain_options(
    processors: Sequence[Any], criteria: Sequence[Any], config: Any, model_kwargs: Mapping[str, Any]
) -> GenerateOptions | None:
    """Options of our loop for a prepared call of ``_sample``, or None when it asks for anything that the loop lacks.

    ``model_kwargs`` are the arguments for forward less the cache. Works on the processors and criteria that
    transformers has made of the user's arguments, so that every default and precedence is theirs; an object of any
    other class, a subclass included, is left to their loop.
    """
    if not _gives_tokens(config, model_kwargs):
        return None
    stops = {type(c): c for c in criteria}
    if len(stops) != len(criteria) or not {MaxLengthCriteria} <= set(stops) <= {
        MaxLengthCriteria,
        EosTokenCriteria,
    }:
        return None
    order = _MINIMUM + (_WARPERS if config.do_sample else [])
    steps = {type(p): p for p in processors}
    if list(steps) != [c for c in order if c in steps] or len(steps) != len(processors):
        return None
    if any(getattr(p, "min_tokens_to_keep", 1) != 1 for p in processors):
        return None
    eos = stops.get(EosTokenCriteria)
    eos_ids = tuple(eos.eos_token_id.tolist()) if eos is not None else ()
    if any(tuple(steps[c].eos_token_id.tolist()) != eos_ids for c in _MINIMUM if c in steps):
        return None
    pad = config._pad_token_tensor
    return GenerateOptions(
        max_length=stops[MaxLengthCriteria].max_length,
        eos_ids=eos_ids,
        pad_id=None if pad is None else int(pad),
        min_length=_min_length(steps),
        sampling=_sampling(steps) if config.do_sample else None,
    )


def custom_options(
    processors: Any, criteria: Any, config: Any, model_kwargs: Mapping[str, Any], longest: int
) -> CustomOptions | None:
    """As :func:`plain_options`, for a call with one sequence, whatever processors and criteria (``LogitsProcessorList``
    and ``StoppingCriteriaList``) it has: they are called for each token. ``longest`` is where it ends at the latest."""
    if not _gives_tokens(config, model_kwargs):
        return None
    return CustomOptions(
        max_length=min(longest, criteria.max_length or longest),
        sampling=Sampling() if config.do_sample else None,
        process=processors,
        stops=lambda ids: bool(criteria(ids, None).all()),
    )


def _gives_tokens(config: Any, model_kwargs: Mapping[str, Any]) -> bool:
    """False for a call whose result is more than tokens, or whose model is to be called in another way."""
    if config.return_dict_in_generate or config.is_assistant or config.prefill_chunk_size is not None:
        return False
    return all(value is None for name, value in model_kwargs.items() if name not in KNOWN_KWARGS)


def _min_length(steps: Mapping[type, Any]) -> int:
    total = steps.get(MinLengthLogitsProcessor)
    new = steps.get(MinNewTokensLengthLogitsProcessor)
    return max(
        0 if total is None else total.min_length,
        0 if new is None else new.prompt_length_to_skip + new.min_new_tokens,
    )


def _sampling(steps: Mapping[type, Any]) -> Sampling:
    temperature, top_k, top_p = (steps.get(c) for c in _WARPERS)
    return Sampling(
        temperature=1.0 if temperature is None else temperature.temperature,
        top_k=0 if top_k is None else top_k.top_k,
        top_p=1.0 if top_p is None else top_p.top_p,
    )
