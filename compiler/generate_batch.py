"""``generate_batch``, by which Transformers' models answer many prompts, on the batch of ``runtime.continuous``."""

from __future__ import annotations

import copy
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from tilewright.ir.errors import InputError

from .joined import JoinedModel, can_join
from .progress import SILENT, Progress

_OURS = {"persistent_manager", "warmup"}
"""Arguments about the batch itself, which is ours: what they and ``continuous_batching_config`` ask for (blocks of a
cache, recordings) there is not."""


class ContinuousBatchingMixin:
    """In front of ``transformers.ContinuousMixin``, whose batches need a model that attends to pages of a cache."""

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """Continue prompts, lists of token ids, that join and leave one batch of decode steps as they can.

        At most the largest of ``batch_sizes`` run at a time. ``kwargs`` are what ``generate`` takes. Gives the outputs
        by request, in the order of the prompts, with ``num_return_sequences`` as Transformers names them; a request
        that failed has its ``error``, and a warning. An answer ends where that of ``generate`` does. Raises InputError
        for a model whose requests cannot share steps, and for several answers of beams.
        """
        if not can_join(self):
            raise InputError("requests of this model cannot share steps; call generate for each of them")
        config = copy.deepcopy(generation_config or self.generation_config)  # type: ignore[attr-defined]
        options = config.update(**{n: v for n, v in kwargs.items() if n not in _OURS})
        copies, config.num_return_sequences = config.num_return_sequences or 1, 1
        config.return_dict_in_generate = False
        if copies > 1 and (config.num_beams or 1) > 1:
            raise InputError(
                "several answers of beams are not requests of their own; call generate for each prompt"
            )
        options["generation_config"] = config
        asked = [
            _Request(name, prompt, record_timestamps)
            for n, prompt in enumerate(inputs)
            for name in (*(f"req_{n}__child#{i}" for i in range(copies - 1)), f"req_{n}")
        ]
        joined = JoinedModel(self)
        try:
            _run_all(asked, joined, options, Progress() if progress_bar else SILENT)
        finally:
            joined.close()
        outputs = {request.name: request.output() for request in asked}
        if failed := [
            f"{name}: {output.error}" for name, output in outputs.items() if output.error is not None
        ]:
            warnings.warn(f"{len(failed)} of {len(outputs)} requests failed; {failed[0]}", stacklevel=2)
        return outputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' manager of a batch, which needs a cache of pages. Always raises InputError."""
        raise InputError(
            "a compiled model has a batch of its own: use generate_batch, or `tilewright serve` for requests that come "
            "one by one"
        )

    continuous_batching_context_manager = init_continuous_batching


class _Request:
    """One prompt on its way. As a streamer, it notes when tokens come."""

    def __init__(self, name: str, prompt: list[int], timed: bool) -> None:
        self.name, self.prompt, self.timed = name, prompt, timed
        self.ids: list[int] = []
        self.created = time.perf_counter()
        self.began = self.ended = -1.0
        self.times: list[float] = []
        self.result: Future[Tensor] = Future()

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def answer(self, model: Any, options: dict[str, Any]) -> Tensor:
        """The tokens by which ``model`` continues it, i64[n]."""
        self.began = time.perf_counter()
        self.ids = [int(token) for token in self.prompt]
        ids = torch.tensor([self.ids], dtype=torch.int64, device=model.device)
        streamer = {"streamer": self} if self.timed else {}
        tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **streamer, **options)
        self.ended = time.perf_counter()
        return tokens[0, ids.shape[1] :]

    def output(self) -> GenerationOutput:
        """What became of it, as Transformers says it."""
        output = GenerationOutput(self.name, prompt_ids=self.ids, created_time=self.created)
        if (error := self.result.exception()) is not None:
            output.error, output.status = str(error), RequestStatus.FAILED
        else:
            output.generated_tokens, output.status = self.result.result().tolist(), RequestStatus.FINISHED
        output.lifespan = (self.began, self.ended)
        output.timestamps = self.times[1:] if self.timed else None  # the first is that of the prompt
        return output


def _run_all(asked: list[_Request], joined: JoinedModel, options: dict[str, Any], progress: Progress) -> None:
    """Have all requests answered. Threads prepare them and wait: one more than run at a time has the next one ready."""
    with (
        ThreadPoolExecutor(
            joined.batch.engine.max_batch + 1,
            # A thread that calls PyTorch for the first time may else find it limited to one, for as long as it lives.
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        ) as threads,
        progress.step(f"Answering {len(asked)} prompts", total=len(asked)) as advance,
    ):
        for request in asked:
            own = joined.for_request(options["generation_config"])
            request.result = threads.submit(request.answer, own, options)
        try:
            for _ in as_completed([request.result for request in asked]):
                advance("")
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            joined.close()
            raise
