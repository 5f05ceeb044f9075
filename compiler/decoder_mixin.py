"""What a compiled decoder is: forward with a cache, and generate, whose plain loops are our own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from tilewright.ir.errors import InputError
from tilewright.runtime.checks import require_mask, require_tensor
from tilewright.runtime.generate import generate
from tilewright.runtime.kv_state import RequestState
from tilewright.runtime.sampling import GenerateOptions
from tilewright.runtime.sequence import Sequence
from tilewright.runtime.speculative import Guess, PromptLookup, speculate

from .api_mixin import CompiledMixin
from .cache import EngineCache, by_own_name, cache_name, with_cache
from .generate_batch import ContinuousBatchingMixin
from .generate_options import ASSISTANTS, custom_options, plain_options
from .unserved import EXTRA_OUTPUTS, refuse_cache


@dataclass(frozen=True)
class Prompt:
    """Token ids i64[B, S], the mask over past and new tokens, and positions, as callers give them. given: what else is
    said of the tokens (see ``Engine.step``). counts_on: positions are the model's own, and go on after them."""

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    given: Mapping[str, Tensor] | None = None
    counts_on: bool = False


@dataclass(frozen=True)
class Given:
    """A prompt that generate() is to continue: ``ids`` i64[B, S], of which the cache has the first ``held``, the mask
    over all that there will have been, positions, and the ``logits`` [B, 1, V] of its end where it has been run."""

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    held: int
    logits: Tensor | None


class DecoderMixin(ContinuousBatchingMixin, CompiledMixin):
    """A model with KV state: forward as a Hugging Face causal model, and generate."""

    _cache_name: str  # the argument of the original's forward that holds the cache

    @classmethod
    def _members(cls, original: type[nn.Module]) -> dict[str, Any]:
        forward = original.forward
        return {"forward": _forward_like(forward), "_cache_name": cache_name(forward) or "cache"}

    @torch.no_grad()
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``forward`` does: same arguments and result as the original's, whose cache is an EngineCache.

        Raises InputError for input that does not fit, and leaves the cache as it was.
        """
        engine = self._tilewright.engine
        self._require_weights()
        given = self._flat_arguments(args, kwargs)
        ids, mask, positions, past, use_cache, return_dict = (
            given.pop(name, None)
            for name in (
                "input_ids", "attention_mask", "position_ids", self._cache_name, "use_cache", "return_dict"
            )
        )  # fmt: skip
        kept = given.pop("logits_to_keep", 0)
        if ids is None:
            self._refuse(given)
            raise InputError("input_ids is missing")
        ids = engine.check_prompt(ids)
        cache = self._own_cache(past)
        prompt = self._prompt(Prompt(ids, mask, positions), cache, given)
        last = kept if isinstance(kept, int) else 0
        state = cache.state_for(ids.shape[0])
        result = engine.step(state, ids, prompt.mask, prompt.positions, last, prompt.given)
        if prompt.counts_on:
            state.count_on()
        if not isinstance(kept, int):
            result = result[:, kept]
        return self._output(result, None if use_cache is False else cache, return_dict)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return super()._arguments(args, by_own_name(kwargs, self._cache_name))

    def _prompt(self, prompt: Prompt, cache: EngineCache, given: dict[str, Any]) -> Prompt:
        """What a prompt is in view of the arguments ``given`` beside texts. Raises InputError for those not served."""
        self._refuse(given)
        return prompt

    def _own_cache(self, given: Any) -> EngineCache:
        """The cache that a caller goes on from, or a new one. Raises InputError for that of another model."""
        engine = self._tilewright.engine
        cache = EngineCache(engine) if given is None else given
        if not isinstance(cache, EngineCache) or cache.engine is not engine:
            raise InputError(
                f"{self._cache_name} is a {type(cache).__name__} of another model; pass what this model returned, or "
                "None"
            )
        return cache

    def _output(
        self, result: Tensor, cache: EngineCache | None, return_dict: bool | None, **more: Tensor
    ) -> Any:
        """The original's output object, of which what there is not is left out."""
        compiled = self._tilewright
        assert compiled.output_class is not None
        values: dict[str, Any] = {compiled.outputs[0]: result, **more}
        if cache is not None:
            values |= with_cache(compiled.output_class, cache)
        known = inspect.signature(compiled.output_class).parameters
        output = compiled.output_class(**{n: v for n, v in values.items() if n in known})
        return output if return_dict is not False else output.to_tuple()

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``GenerationMixin.generate``, whose preparation of options is used; see ``_sample`` for the loop."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        kwargs = by_own_name(kwargs, self._cache_name)
        self._require_weights()
        # Transformers' loop hands on no output_...=False, so that the config's has the last word.
        asked = {flag: kwargs.get(flag) or None for flag in EXTRA_OUTPUTS}
        self._refuse({"inputs_embeds": kwargs.get("inputs_embeds"), **asked})
        refuse_cache(kwargs.get("cache_implementation"))
        if ids is not None:
            self._check_prompt(ids)
        for name, require in (("attention_mask", require_mask), ("position_ids", require_tensor)):
            if kwargs.get(name) is not None:
                require(name, kwargs[name])
        given = () if inputs is None and not args else (inputs, *args)
        return super().generate(*given, **kwargs)  # type: ignore[misc]

    def _check_prompt(self, prompt: Any) -> None:
        self._tilewright.engine.check_prompt(prompt)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by generate() once lengths and batch are known: check them, and hand out our own cache."""
        engine = self._tilewright.engine
        refuse_cache(generation_config.cache_implementation)
        engine.check_length(generation_config.max_length)
        engine.bucket(batch_size * max(generation_config.num_beams, generation_config.num_return_sequences))
        name = self._cache_name
        if model_kwargs.get(name) is not None:
            model_kwargs[name]._is_user_defined = True
        elif generation_config.use_cache:
            model_kwargs[name] = EngineCache(engine)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling: our own loop when nothing else is asked for, else that of transformers."""
        own = self._own_arguments(model_kwargs)
        cache = own.pop(self._cache_name, None)
        options = self._options(input_ids, cache, logits_processor, stopping_criteria, generation_config, own)
        if options is None or synced_gpus or not self._is_ours(input_ids, cache, options):
            return super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        given = self._given(input_ids, cache, own, generation_config, model_kwargs)
        return self._decode(cache, given, options, streamer, model_kwargs)

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Guesses from the text itself are checked by our own loop where there is a program for that; a model that
        guesses is left to the loop of transformers, whose steps of several tokens run that program, too."""
        wanted, ngram = generation_config.prompt_lookup_num_tokens, generation_config.max_matching_ngram_size
        ngram = PromptLookup.NGRAM if ngram is None else ngram
        sensible = (wanted or 0) > 0 and ngram > 0  # of others transformers says what is wrong
        if sensible and not synced_gpus and len(input_ids) == 1 and self._checks_guesses():
            model_kwargs = {n: v for n, v in kwargs.items() if n not in ASSISTANTS}
            own = self._own_arguments(model_kwargs)
            cache = own.pop(self._cache_name, None)
            asked = (input_ids, cache, logits_processor, stopping_criteria, generation_config, own)
            options = self._options(*asked) or self._custom_options(*asked[2:])
            if options is not None and self._is_ours(input_ids, cache, options):
                given = self._given(input_ids, cache, own, generation_config, model_kwargs)
                lookup = PromptLookup(wanted, ngram)
                return self._speculate(cache, given, options, streamer, lookup, model_kwargs)
        return super()._assisted_decoding(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **kwargs
        )

    def _checks_guesses(self) -> bool:
        """Whether our own loop may run several tokens of a sequence at once.

        With two tables of rotary frequencies a step takes one of them for all of its tokens, guesses included.
        """
        return self._tilewright.engine.verify_executor is not None and not self._tilewright.switch_length

    def _speculate(
        self,
        cache: EngineCache,
        given: Given,
        options: GenerateOptions,
        streamer: Any,
        guess: Guess,
        model_kwargs: dict[str, Any],
    ) -> Tensor:
        """As :meth:`_decode`, for one sequence."""
        ids = cache.engine.check_prompt(given.ids)
        sequence = Sequence(ids, options, given.positions, streamer, logits=given.logits)
        state = self._state(cache, 1, model_kwargs)
        return speculate(cache.engine, state, sequence, guess, given.mask, given.held)

    def _is_ours(self, ids: Tensor, cache: Any, options: GenerateOptions) -> bool:
        """Whether our own loop can go on from a cache.

        A model may want to begin anew once a sequence outgrows its first table of rotary frequencies, which is for its
        own methods to say.
        """
        outgrows = ids.shape[1] <= self._tilewright.switch_length < options.max_length
        return isinstance(cache, EngineCache) and not outgrows

    def _given(
        self, ids: Tensor, cache: EngineCache, own: dict[str, Any], config: Any, model_kwargs: dict[str, Any]
    ) -> Given:
        """What a call of generate() is to continue; what our loop cannot run of it has been run."""
        mask = own.get("attention_mask")
        covered = getattr(config, "_mask_length", None) if mask is None else mask.shape[1]
        # A mask as long as the ids says that they repeat what the cache holds; otherwise they are all new.
        held = cache.get_seq_length() if covered == ids.shape[1] else 0
        logits = self._first_logits(ids[:, held:], model_kwargs)
        return Given(ids, mask, None if logits is not None else own.get("position_ids"), held, logits)

    def _custom_options(
        self, processors: Any, criteria: Any, config: Any, own: dict[str, Any]
    ) -> GenerateOptions | None:
        """Options for a call with one sequence that asks for more than :meth:`_options` knows."""
        return custom_options(processors, criteria, config, own, self._tilewright.engine.spec.max_length)

    def _options(
        self, ids: Tensor, cache: Any, processors: Any, criteria: Any, config: Any, own: dict[str, Any]
    ) -> GenerateOptions | None:
        """Options of our own loop for a call, or None where it lacks something."""
        options = plain_options(processors, criteria, config, own)
        if options is None:
            return None
        # An end that is no token of the vocabulary never comes; kernels and NumPy would take it for another's index.
        (*_, vocabulary) = self._tilewright.engine.spec.outputs[0].type.shape
        return replace(options, eos_ids=tuple(n for n in options.eos_ids if 0 <= n < int(vocabulary)))

    def _decode(
        self,
        cache: EngineCache,
        given: Given,
        options: GenerateOptions,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Tensor:
        """Continue what is given by our own loop. Returns i64[B, n], prompt included."""
        return generate(
            cache.engine,
            self._state(cache, given.ids.shape[0], model_kwargs),
            given.ids,
            options,
            attention_mask=given.mask,
            position_ids=given.positions,
            streamer=streamer,
            held=given.held,
            logits=given.logits,
        )

    def _own_arguments(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Those of generate()'s arguments for forward that our loop takes, by a decoder's names for them."""
        return dict(model_kwargs)

    def _first_logits(self, new_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor | None:
        """Logits[B, 1, V] of what is new of a prompt, where our loop cannot run it itself; it has been run then. None
        for texts."""
        return None

    def _state(self, cache: EngineCache, batch: int, model_kwargs: dict[str, Any]) -> RequestState:
        """The request's state, ready for our loop."""
        return cache.state_for(batch)


def _forward_like(original: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder's forward with the original's signature, where generate() and pipelines look for what may be passed."""

    @functools.wraps(original)
    def forward(self: DecoderMixin, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)

    return forward
