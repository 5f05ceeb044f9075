"""A compiled model behind transformers' server, asked by OpenAI's client; the oracle is Hugging Face's generate."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import PreTrainedModel

import tilewright as tw
from tilewright import pretrained, serve
from tilewright.runtime.joined_rows import JoinedRows

from .test_cli import run, word_tokenizer

NAME = "smollm2"
LENGTH = 256
TOKENS = 12
GRAVITY = "What is gravity?"
DRAWING = {"generation_config": '{"do_sample": true, "max_new_tokens": 12}'}
Written = tuple[PreTrainedModel, Any]


def own_threads() -> int:
    return sum(thread.name.startswith("tilewright") for thread in threading.enumerate())


@contextmanager
def running(model: Any, tokenizer: Any) -> Iterator[tuple[openai.OpenAI, Any]]:
    """A client of a server that runs in a thread, and the server."""
    before = own_threads()
    with serve.listen("localhost", 0) as sock:
        server = serve.make_server(NAME, model, tokenizer, log_level="error")
        thread = threading.Thread(target=serve.run, args=(server, sock))
        thread.start()
        try:
            url = serve.url_of(sock, "localhost")
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
                yield client, server
        finally:
            server.should_exit = True
            thread.join()
        for _ in range(
            100
        ):  # those that run requests wait for the batch's end, and one may be told of it just now
            if own_threads() <= before:
                break
            time.sleep(0.05)
        assert own_threads() <= before


@pytest.fixture(scope="module")
def fast(smollm2: Written) -> Any:
    return tw.compile(smollm2[0], max_length=LENGTH, batch_sizes=(1, 4), backend="cpp", autotune="off")


@pytest.fixture(scope="module")
def client(fast: Any, smollm2: Written) -> Iterator[openai.OpenAI]:
    with running(fast, smollm2[1]) as (client, _):
        yield client


@pytest.fixture(scope="module")
def theirs(smollm2: Written) -> dict[str, str]:
    """Questions and the answers of Hugging Face's own generate."""
    model, tokenizer = smollm2
    questions = (GRAVITY, "Name three colours, please.")
    return {
        question: continued(model, tokenizer, pretrained.chat(tokenizer, question)) for question in questions
    }


def continued(model: PreTrainedModel, tokenizer: Any, inputs: dict[str, torch.Tensor]) -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another at each operation, on a busy machine for seconds
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    torch.set_num_threads(threads)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer(client: openai.OpenAI, question: str, stream: bool, tokens: int = TOKENS) -> str:
    """The text of a chat completion, greedy."""
    result: Any = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=stream,
    )
    if not stream:
        return result.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in result)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_gives_the_text_of_hugging_face(
    client: openai.OpenAI, theirs: dict[str, str], stream: bool
) -> None:
    assert answer(client, GRAVITY, stream) == theirs[GRAVITY]


def test_requests_that_come_at_once_share_steps_and_do_not_mix(
    client: openai.OpenAI, theirs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, step = [], JoinedRows.step

    def noted(self: JoinedRows, tokens: Sequence[int]) -> torch.Tensor:
        rows.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(JoinedRows, "step", noted)
    asked = [(question, stream) for question in theirs for stream in (False, True)] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: answer(client, *one), asked))
    assert answers == [theirs[question] for question, _ in asked]
    assert max(rows) == 4
    assert len(rows) < sum(rows) / 2


def test_an_answer_to_a_seed_is_the_same_in_any_company(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> str:
        result = client.completions.create(
            model=NAME, prompt="the", max_tokens=TOKENS, seed=seed, extra_body=DRAWING
        )
        return result.choices[0].text

    alone = [drawn(seed) for seed in (1, 2, 1, 3)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(drawn, (1, 2, 1, 3))) == alone
    assert alone[0] == alone[2] != alone[1]


def test_completions_continue_the_text_as_it_is(client: openai.OpenAI, smollm2: Written) -> None:
    text = "The capital of France is"
    result = client.completions.create(model=NAME, prompt=text, max_tokens=TOKENS, temperature=0)
    assert result.choices[0].text == continued(*smollm2, pretrained.plain(smollm2[1], text))


def test_responses_and_their_events(client: openai.OpenAI, theirs: dict[str, str]) -> None:
    options: Any = {"model": NAME, "input": GRAVITY, "max_output_tokens": TOKENS, "temperature": 0}
    assert client.responses.create(**options, stream=False).output_text == theirs[GRAVITY]
    events = list(client.responses.create(**options, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == theirs[GRAVITY]
    assert events[-1].type == "response.completed"


def test_an_answer_ends_at_a_stop_string(client: openai.OpenAI, theirs: dict[str, str]) -> None:
    word = theirs[GRAVITY].split()[3]
    result = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": GRAVITY}],
        max_tokens=TOKENS,
        temperature=0,
        stop=[word],
    )
    text = result.choices[0].message.content
    assert text == theirs[GRAVITY][: theirs[GRAVITY].index(word) + len(word)]
    assert result.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_and_the_server_goes_on(
    client: openai.OpenAI, theirs: dict[str, str], stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"no room for an answer.*{LENGTH}"):
        answer(client, "word " * LENGTH, stream)
    assert answer(client, GRAVITY, stream) == theirs[GRAVITY]


@pytest.mark.parametrize("wanted", [{}, {"max_tokens": 4 * LENGTH}])
def test_an_answer_ends_where_the_room_ends(client: openai.OpenAI, wanted: dict[str, int]) -> None:
    result = client.completions.create(model=NAME, prompt="the " * (LENGTH - 8), temperature=0, **wanted)
    assert result.usage is not None
    assert result.usage.total_tokens == LENGTH
    assert result.choices[0].finish_reason == "length"


def test_the_one_model_is_listed_and_others_are_refused(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    with pytest.raises(openai.BadRequestError, match="pinned to 'smollm2'"):
        client.completions.create(model="another", prompt="hello")


def test_a_batch_beyond_the_largest_is_refused(client: openai.OpenAI) -> None:
    beams = {"generation_config": '{"num_beams": 5, "max_new_tokens": 4}'}
    with pytest.raises(openai.BadRequestError, match="batch of 5"):
        client.completions.create(model=NAME, prompt="hello", extra_body=beams)


def test_a_reset_leaves_the_server_as_it_was(client: openai.OpenAI, theirs: dict[str, str]) -> None:
    """Transformers' endpoint that lets its models go; ours is loaded again."""
    client.post(f"{str(client.base_url).removesuffix('/v1/')}/reset", cast_to=object)
    assert answer(client, GRAVITY, stream=True) == theirs[GRAVITY]


def test_a_client_that_leaves_does_not_keep_the_next_one_waiting(
    client: openai.OpenAI, theirs: dict[str, str]
) -> None:
    stream = client.completions.create(model=NAME, prompt="the the", max_tokens=LENGTH, stream=True)
    next(iter(stream))
    stream.close()
    assert answer(client, GRAVITY, stream=False) == theirs[GRAVITY]


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_tells_those_who_wait(
    fast: Any, smollm2: Written, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(serve, "GRACE", 0.1)
    with running(fast, smollm2[1]) as (client, server), ThreadPoolExecutor(1) as pool:
        first = client.completions.create(model=NAME, prompt="the the", max_tokens=200, stream=True)
        next(iter(first))
        waiting = pool.submit(answer, client, GRAVITY, stream)
        while len(server.server_state.tasks) < 2:
            time.sleep(0.01)
        server.should_exit = True
        with pytest.raises(openai.APIError, match="the server was stopped"):
            waiting.result()


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: PreTrainedModel) -> str:
    """A tiny model and a tokenizer without chat template, as ``save_pretrained`` writes them."""
    tiny_llama.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_command_serves_until_ctrl_c(folder: str, tiny_llama: PreTrainedModel) -> None:
    command = [sys.executable, "-m", "tilewright.cli", "serve", folder, "--port", "0", "--autotune", "off"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = next(
                m[1] for line in process.stderr if (m := re.match(r"Serving .* at (http://\S+) ", line))
            )
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            text = client.completions.create(model=folder, prompt="hello", max_tokens=4).choices[0].text
            with pytest.raises(openai.BadRequestError, match="chat_template"):
                client.chat.completions.create(model=folder, messages=[{"role": "user", "content": "hello"}])
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    tokens = tiny_llama.generate(torch.tensor([[0]]), max_new_tokens=4, do_sample=False)[0, 1:]
    assert text == word_tokenizer().decode(tokens, skip_special_tokens=True)
    assert process.returncode == 0
    assert output == ""
    assert "Traceback" not in errors


def test_a_port_in_use_shows_before_the_model_is_loaded() -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        _, errors = run("serve", "no such model", "--port", port, status=1)
    assert f"cannot listen at localhost, port {port}: Address already in use" in errors


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("no such model",), "WeightsError"),
        (("minilm",), "is an encoder"),
        ((NAME, "--log-level", "loud"), "debug, info"),
        ((NAME, "--host", "no.such.host.invalid"), "cannot listen at no.such.host.invalid"),
    ],
)
def test_serve_names_what_is_wrong(arguments: tuple[str, ...], error: str) -> None:
    assert error in run("serve", *arguments, "--port", "0", status=1)[1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    _, errors = run("serve", NAME, status=1)
    assert "MissingPackageError" in errors
    assert "pip install 'tilewright[serve]'" in errors
