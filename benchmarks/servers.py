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
from typing import Any

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
class Answer:
    """One answer: its text, its number of tokens, and the seconds until its first text."""

    text: str
    tokens: int
    first: float


@dataclass(frozen=True)
class Answers:
    """What a round of questions took: seconds in all, tokens of all answers, and the median seconds to first text; of
    conversations, that of all turns but the first."""

    seconds: float
    tokens: int
    first: float


@dataclass
class Server:
    """A running server. ``model`` is its model's name. ``asked``: conversations so far; none is like another, so that a
    server that keeps what was said before has only what a conversation itself, and the chat template, repeat."""

    system: str
    client: openai.OpenAI
    model: str
    asked: int = 0

    def ask(self, clients: int, each: int, tokens: int, turns: int = 1) -> Answers:
        """Have ``clients`` hold ``each`` conversations one after the other, with answers of so many tokens."""
        begun, self.asked = self.asked, self.asked + clients * each

        def one_client(n: int) -> list[list[Answer]]:
            return [self._talk(begun + n * each + i, turns, tokens) for i in range(each)]

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as threads:
            talks = [talk for some in threads.map(one_client, range(clients)) for talk in some]
        seconds = time.perf_counter() - start
        later = [answer.first for talk in talks for answer in talk[min(1, turns - 1) :]]
        return Answers(seconds, sum(answer.tokens for talk in talks for answer in talk), median(later))

    def _talk(self, number: int, turns: int, tokens: int) -> list[Answer]:
        """A conversation. One of several turns begins with some 500 tokens of text."""
        messages: list[Any] = []
        answers = []
        for turn in range(turns):
            question = f"{number + 1}. {QUESTIONS[(number + turn) % len(QUESTIONS)]}"
            text = f"{_page(number)}\n{question}" if turns > 1 and not turn else question
            messages.append({"role": "user", "content": text})
            answers.append(self._answer(messages, tokens))
            messages.append({"role": "assistant", "content": answers[-1].text})
        return answers

    def _answer(self, messages: list[Any], tokens: int) -> Answer:
        """Ask and wait for the whole answer."""
        # No token ends an answer, so that all are equally long whatever the arithmetic of a server gives.
        how = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        start, first, told, text = time.perf_counter(), 0.0, 0, ""
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=messages,
            stream=True,
            extra_body={"generation_config": json.dumps(how)},
        )
        for chunk in answer:
            if chunk.choices and (new := chunk.choices[0].delta.content):
                first = first or time.perf_counter() - start
                text += new
            if chunk.usage is not None:
                told = chunk.usage.completion_tokens
        return Answer(text, told, first)


def _page(number: int) -> str:
    """A text that no other number has, from its beginning."""
    return " ".join(
        f"Voyage {number + 1}, day {day}: {day * 7 % 23} gulls, {day * 31 % 97} miles, and a wind from the "
        f"{('north', 'east', 'south', 'west')[(number + day) % 4]}."
        for day in range(1, 21)
    )


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
