"""What transformers' server is given in place of its own: one compiled model, and requests that fit it.

Needs the packages that ``serve.require_packages`` looks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from queue import SimpleQueue
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseGenerateManager, GenerateManager, GenerationState

from tilewright.errors import InputError

from .joined import JoinedModel, can_join

_HANDLERS = {
    "chat_handler": "chat_completion.ChatCompletionHandler",
    "completion_handler": "completion.CompletionHandler",
    "response_handler": "response.ResponseHandler",
    "transcription_handler": "transcription.TranscriptionHandler",
    "systemone_handler": "systemone.SystemOneHandler",
}


class CompiledModel(ModelManager):
    """Hands out one compiled model, under one name; a request for another is refused with status 400."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self._compiled, self._tokenizer, self._since = model, tokenizer, int(time.time())
        super().__init__(force_model=name)

    def _load_processor(self, name: str, *args: Any, **options: Any) -> Any:
        return self._tokenizer

    def _load_model(self, name: str, *args: Any, **options: Any) -> Any:
        if name != self.process_model_name(self.force_model):
            raise InputError(f"this server has the model '{self.force_model}' only")
        return self._compiled

    def list_models(self, *args: Any) -> list[dict[str, Any]]:
        """The list of models as OpenAI's protocol has it; transformers would look through the hub cache."""
        return [{"id": self.force_model, "object": "model", "created": self._since, "owned_by": "tilewright"}]

    get_gen_models = list_models  # what the server calls until Transformers 5.23


class FittingRequests(GenerateManager):
    """Runs requests at once where the model can, else one after the other; none beyond the room that it has.

    Where the client says nothing, the server would ask for 1024 new tokens, beyond what most prompts within
    ``max_length`` leave room for. What is cut ends with ``finish_reason="length"``. A prompt that leaves no room at all
    is refused, streamed or not, before an answer begins.
    """

    def __init__(self, model: Any, prefix_bytes: int) -> None:
        self._joined = JoinedModel(model, prefix_bytes) if can_join(model) else None
        # What the base asks to run something: its own thread, or several that prepare requests and wait for them. One
        # more than there are rows has the next prompt ready.
        self._thread = Workers(1 if self._joined is None else model._tilewright.engine.max_batch + 1)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **options: Any
    ) -> Any:
        _fit(model, inputs, gen_config)
        return super().generate_streaming(
            self._own(model, gen_config), processor, inputs, gen_config, *args, **options
        )

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **options: Any
    ) -> Any:
        _fit(model, inputs, gen_config)
        return await super().generate_non_streaming(
            self._own(model, gen_config), processor, inputs, gen_config, *args, **options
        )

    def stop(self) -> None:
        """Fail what still runs."""
        if self._joined is not None:
            self._joined.close()
        self._thread.close()

    def _own(self, model: Any, config: Any) -> Any:
        """The model as one request is to call it. Called where a request's seed has just been set."""
        return model if self._joined is None else self._joined.for_request(config)


class Workers:
    """Daemon threads that run what is submitted, in its order; as transformers' InferenceThread, but several."""

    def __init__(self, count: int) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._count, self._threads = count, torch.get_num_threads()
        self._closed = False
        for n in range(count):
            threading.Thread(target=self._run, name=f"tilewright-request-{n}", daemon=True).start()

    def close(self) -> None:
        """Have the threads end once all that was submitted has been run. Nothing more is taken."""
        self._closed = True
        for _ in range(self._count):
            self._queue.put(None)

    def _run(self) -> None:
        # A thread that calls PyTorch for the first time may else find it limited to one, for as long as it lives.
        torch.set_num_threads(self._threads)
        while (task := self._queue.get()) is not None:
            future, run = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(run())
                except BaseException as error:  # noqa: BLE001 - whatever it is, who waits is told
                    future.set_exception(error)
            del task, future, run  # before it waits again

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a function called. Gives a future to wait for. Raises RuntimeError once these are closed."""
        if self._closed:
            raise RuntimeError("the server was stopped")
        future: Future[Any] = Future()
        self._queue.put((future, partial(fn, *args, **kwargs)))
        return future

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Have a function called. Gives a future to await; it may outlive the event loop that awaits it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(done: Future[Any]) -> None:
            if not answer.done():
                error = done.exception()
                answer.set_result(done.result()) if error is None else answer.set_exception(error)

        def deliver(done: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, done)

        self.submit(fn, *args, **kwargs).add_done_callback(deliver)
        return answer


def _fit(model: Any, inputs: Any, config: Any) -> None:
    prompt, longest = inputs["input_ids"].shape[-1], model._tilewright.engine.spec.max_length
    if prompt >= longest:
        raise InputError(
            f"the prompt has {prompt} tokens and leaves no room for an answer: this server's model takes sequences of "
            f"{longest}; send a shorter one, or start the server with a larger --max-length"
        )
    if config.max_new_tokens is not None:
        config.max_new_tokens = min(config.max_new_tokens, longest - prompt)


class OneModel(GenerationState):
    """What the handlers share: who runs the one model's requests."""

    def __init__(self, model: Any, prefix_bytes: int) -> None:
        super().__init__()
        self._requests = FittingRequests(model, prefix_bytes)

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        return self._requests

    def shutdown(self) -> None:
        """Stop what runs requests."""
        self._requests.stop()


def build_app(
    name: str, model: Any, tokenizer: Any, enable_cors: bool, prefix_bytes: int
) -> tuple[FastAPI, Callable[[], None]]:
    """Transformers' application around a compiled decoder and its tokenizer, which requests call ``name``, and what to
    call at its end. prefix_bytes: memory for what requests leave to those that begin alike."""
    manager, state = CompiledModel(name, model, tokenizer), OneModel(model, prefix_bytes)
    # Releases differ in their endpoints; what this one has are the parameters of build_server.
    handlers = {key: _HANDLERS[key] for key in inspect.signature(build_server).parameters if key in _HANDLERS}
    app = build_server(
        manager,
        generation_state=state,
        enable_cors=enable_cors,
        **{key: _handler(path)(manager, state) for key, path in handlers.items()},
    )
    # Transformers raises ValueError for options that cannot work; without this the client would be told to try again.
    app.add_exception_handler(ValueError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    return app, state.shutdown


def _handler(path: str) -> Any:
    module, name = path.split(".")
    return getattr(import_module(f"transformers.cli.serving.{module}"), name)


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    """The message where OpenAI's clients look for it, under the status that the error has, or 400."""
    message, status = str(error), 400
    if isinstance(error, HTTPException):
        message, status = str(error.detail), error.status_code
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, status
    )
