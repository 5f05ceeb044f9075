"""Servers that speak OpenAI's protocol, each in a process of its own, and clients that ask them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import openai

from benchmarks.results import OURS
from benchmarks.serving_results import EAGER, PAGED
from tilewright.errors import TilewrightError

READY = 600
"""Seconds that a server may take to answer for the first time."""
QUESTIONS = (
    "What is gravity?", "Name three colours.", "Why is the sky blue?", "Tell me a story about a cat.",
    "What is two plus two?", "Who wrote Hamlet?", "Describe the sea in one sentence.", "How do planes fly?",
)  # fmt: skip
_PAGES = ("--continuous-batching", "--cb-num-blocks", "40", "--cb-max-batch-tokens", "512")
# Without a number of pages it takes most of the machine's memory for them.


class ServerError(TilewrightError):
    """A server did not start."""


@dataclass(frozen=True)
class Answers:
    """What a round of questions took: seconds in all, tokens of all answers, and the median seconds to first text."""

    seconds: float
    tokens: int
    first: float


@dataclass(frozen=True)
class Server:
    """A running server. ``model`` is its model's name."""

    system: str
    client: openai.OpenAI
    model: str

    def ask(self, clients: int, each: int, tokens: int) -> Answers:
        """Have ``clients`` ask ``each`` questions one after the other, for answers of so many tokens."""
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as threads:
            several = threads.map(
                lambda n: [self._answer(n * each + i, tokens) for i in range(each)], range(clients)
            )
            answers = [answer for some in several for answer in some]
        seconds = time.perf_counter() - start
        return Answers(seconds, sum(n for n, _ in answers), median(first for _, first in answers))

    def _answer(self, number: int, tokens: int) -> tuple[int, float]:
        """Ask a question and wait for the whole answer. Gives its tokens, and the seconds until its first text."""
        # No token ends an answer, so that all are equally long whatever the arithmetic of a server gives.
        how = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        start, first, told = time.perf_counter(), 0.0, 0
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
            stream=True,
            extra_body={"generation_config": json.dumps(how)},
        )
        for chunk in answer:
            if not first and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - start
            if chunk.usage is not None:
                told = chunk.usage.completion_tokens
        return told, first


@contextmanager
def running(system: str, folder: Path, dtype: str, options: Sequence[str], threads: int) -> Iterator[Server]:
    """A server of the model in a folder, until the block ends. Raises ServerError when it does not come up.

    dtype: f32 or bf16. options: more arguments of ours.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    command = [*_command(system, str(folder), dtype, options), "--port", port]
    log = folder / f"{system.replace(' ', '-')}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=READY)
            server = Server(system, client, str(folder))
            _wait_for(server, process, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _command(system: str, folder: str, dtype: str, options: Sequence[str]) -> list[str]:
    if system == OURS:
        return [sys.executable, "-m", "tilewright.cli", "serve", folder, "--dtype", dtype, *options]
    theirs = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    device = "cuda" if "cuda" in options else "cpu"
    return [*command, "--dtype", theirs, "--device", device, *(_PAGES if system == PAGED else ())]


def _wait_for(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ask until there is an answer."""
    end = time.monotonic() + READY
    while process.poll() is None and time.monotonic() < end:
        try:
            server.ask(1, 1, 2)
        except openai.APIConnectionError:
            time.sleep(0.5)
        except openai.APIError as error:
            raise ServerError(f"{server.system} answers with an error: {error}") from error
        else:
            return
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it says nothing"]
    raise ServerError(f"{server.system} did not start: {last[0]}")


SERVERS = {"tilewright": OURS, "eager": EAGER, "paged": PAGED}
"""Servers by their names on the command line."""
