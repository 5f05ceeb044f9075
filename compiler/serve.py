"""``tilewright serve``: a compiled model behind transformers' own server, which speaks OpenAI's protocol.

Endpoints, chat templates and streaming are those of ``transformers serve``; what differs is in ``serve_model.py``:
above all, requests that come at once share their decode steps. This file looks after the process: the packages, the
port, the log and the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import socket
from collections.abc import Callable
from typing import Any

from tilewright.errors import MissingPackageError, OptionError
from tilewright.runtime.continuous import DEFAULT_PREFIX_BYTES

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
SERVED_BATCHES = (1, 2, 4, 8)
"""Batch sizes that a model is compiled for unless it is said otherwise."""
PREFIX_CACHE = DEFAULT_PREFIX_BYTES >> 20
"""MiB for what ended requests leave to those that begin alike, unless it is said otherwise."""
GRACE = 5
"""Seconds that running requests have to end once the server was told to stop."""


def require_packages() -> None:
    """Raise MissingPackageError where a package that the server needs is not installed."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise MissingPackageError(
            "serving needs fastapi, uvicorn, pydantic and openai, and one of them is not installed; run: "
            "pip install 'tilewright[serve]'"
        )


def check_log_level(level: str) -> None:
    """Raise OptionError for a level that there is not."""
    if level not in LOG_LEVELS:
        raise OptionError(f"log_level={level!r} is none of {', '.join(LOG_LEVELS)}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises OptionError for an address that cannot be had.

    Taken before the model is compiled, so that a port in use shows at once; connections that come meanwhile wait.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise OptionError(
            f"cannot listen at {host}, port {port}: {reason}; give another --host or --port, for example --port 0 for "
            "any free one"
        ) from error


def url_of(sock: socket.socket, host: str) -> str:
    """The base URL that clients of OpenAI's protocol take."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{sock.getsockname()[1]}/v1"


def make_server(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    enable_cors: bool = False,
    log_level: str = "warning",
    prefix_cache: int = PREFIX_CACHE,
) -> Any:
    """A ``uvicorn.Server`` for a compiled decoder, which requests call ``name``; ``run(sockets=[...])`` starts it.

    As many requests as the largest of the model's ``batch_sizes`` run at once; others wait. enable_cors: let pages of
    any origin ask. log_level: of what the server and transformers write to stderr. prefix_cache: MiB for what ended
    requests leave to those that begin alike. Raises MissingPackageError, OptionError.
    """
    require_packages()
    check_log_level(log_level)
    import uvicorn
    from transformers.utils import logging as hf_logging
    from uvicorn.config import LOGGING_CONFIG

    from .serve_model import build_app

    hf_logging.set_verbosity(hf_logging.log_levels[log_level])
    log = copy.deepcopy(LOGGING_CONFIG)
    log["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return uvicorn.Server(
        uvicorn.Config(
            _until_stopped(*build_app(name, model, tokenizer, enable_cors, prefix_cache << 20)),
            log_level=log_level,
            log_config=log,
            timeout_graceful_shutdown=GRACE,
        )
    )


def run(server: Any, sock: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM. Requests that still run then have ``GRACE`` seconds, and end with an error."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it anew once all is closed
        server.run(sockets=[sock])


def _until_stopped(app: Any, stop: Callable[[], None]) -> Any:
    """The ASGI application, at whose end ``stop`` is called.

    Its requests say so when the server stops under them: a status 503, or where the answer has begun, a last event that
    is an error. Without it each would leave a traceback, and its client without a word.
    """
    error = {
        "error": {"message": "the server was stopped", "type": "server_error", "param": None, "code": None}
    }

    async def call(scope: Any, receive: Any, send: Any) -> None:
        begun = False

        async def note(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await app(scope, receive, note)
            if scope["type"] == "lifespan":
                stop()
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            body = json.dumps(error)
            if not begun:
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 503, "headers": headers})
            text = f"data: {body}\n\n" if begun else body
            await send({"type": "http.response.body", "body": text.encode()})

    return call
