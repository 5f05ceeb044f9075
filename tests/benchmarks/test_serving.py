"""The benchmark of servers: what clients count of a real one, what is stored and shown, and what is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import PreTrainedModel
from typer import Typer
from typer.testing import CliRunner

import tilewright as tw
from benchmarks import compare, readme, servers, serving, serving_results, stored
from benchmarks.results import OURS
from benchmarks.serving_results import EAGER, PAGED, Load, Served, ServingResults
from tilewright import serve

from .sample_results import MACHINE, VERSIONS

RUN = ServingResults(
    date="2026-11-28T08:00:00+00:00",
    command="python -m benchmarks.serving",
    machine=MACHINE | {"device": MACHINE["cpu"]},
    versions=VERSIONS,
    settings={"model": "smollm2", "threads": 2, "tokens": 48, "each": 2},
    loads=(
        Load(
            "bf16",
            1,
            (
                Served(OURS, (1.0, 1.2), (96, 96), (0.05, 0.07)),
                Served(EAGER, (4.0, 4.8), (96, 96), (0.1, 0.1)),
            ),
        ),
        Load(
            "bf16",
            4,
            (
                Served(OURS, (2.0, 2.0), (400, 400), (0.1, 0.1)),
                Served(PAGED, (4.0, 4.0), (400, 200), (0.2, 0.4)),
            ),
        ),
        Load("bf16", 2, (Served(OURS, (2.0,), (400,), (0.1,)), Served(EAGER, (8.0,), (400,), (0.7,))), 3),
    ),
)


def invoke(*arguments: str) -> Any:
    app = Typer()
    app.command()(serving.main)
    return CliRunner().invoke(app, list(arguments))


def test_clients_count_the_tokens_of_all_answers(smollm2: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = smollm2
    fast = tw.compile(model, max_length=768, batch_sizes=(1, 4), backend="cpp", autotune="off")
    with serve.listen("localhost", 0) as sock:
        server = serve.make_server("smollm2", fast, tokenizer, log_level="error")
        thread = threading.Thread(target=serve.run, args=(server, sock))
        thread.start()
        try:
            client = openai.OpenAI(base_url=serve.url_of(sock, "localhost"), api_key="none", timeout=60)
            asked = servers.Server(OURS, client, "smollm2")
            answers = asked.ask(clients=3, each=2, tokens=5)
            talks = asked.ask(clients=2, each=1, tokens=3, turns=2)
        finally:
            server.should_exit = True
            thread.join()
    assert answers.tokens == 3 * 2 * 5
    assert 0 < answers.first < answers.seconds
    assert talks.tokens == 2 * 2 * 3
    assert 0 < talks.first < talks.seconds
    assert asked.asked == 3 * 2 + 2


def test_a_run_is_stored_and_read_as_it_was(tmp_path: Path) -> None:
    file = stored.save(RUN, tmp_path / "cpu" / "run.json")
    assert stored.of_file(ServingResults, file) == RUN
    assert serving_results.latest(tmp_path) == [RUN]


def test_the_table_shows_rates_and_how_many_times_as_fast_ours_is() -> None:
    text = serving_results.table(RUN).markdown()
    one, four, talks = text.splitlines()[-3:]
    assert "1 client, bf16 | 88.0 (84.0–92.0)<br>first 60 ms | 22.0" in one
    assert "4.00× (4.00–4.00)<br>first 100 ms: 1.7× | – |" in one
    assert "| 200 (200–200)<br>first 100 ms | – | 75.0" in four
    assert "3.00×" in four  # the median of 2 and 4
    assert "2 clients, 3 turns each, bf16" in talks
    assert "first 700 ms: 7.0×" in talks


def test_pages_show_the_newest_run(tmp_path: Path) -> None:
    stored.save(RUN, tmp_path / "cpu" / "a.json")
    newer = replace(RUN, date="2026-11-29T08:00:00+00:00", loads=RUN.loads[:1])
    stored.save(newer, tmp_path / "cpu" / "b.json")
    for page in (readme.summary(tmp_path), readme.current(tmp_path)):
        assert page.count("1 client, bf16") == 1
        assert "4 clients" not in page
        assert "answers of 48 tokens" in page


def test_a_slower_server_is_found(tmp_path: Path) -> None:
    slow = replace(
        RUN.loads[0], servers=(replace(RUN.loads[0].servers[0], seconds=(2.0, 2.4)), RUN.loads[0].servers[1])
    )
    before = stored.save(RUN, tmp_path / "a.json")
    after = stored.save(replace(RUN, loads=(slow,)), tmp_path / "b.json")
    (change,) = compare.changes(before, after)
    assert change.ratio == pytest.approx(0.5)
    assert change.before.what == "1 client, bf16"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--clients", "1,x"), "write for example 1,4"),
        (("--conversations", "0"), "write for example 1,4"),
        (("--systems", "vllm"), "none of tilewright, eager, paged"),
        (("--dtype", "f16"), "f32 or bf16"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], error: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert error in " ".join(result.output.split())
