"""Keeps the figures of the README, and of the page of all results, those of the newest stored runs:
``python -m benchmarks.readme [--check]``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import (
    chart_results,
    chart_tables,
    encoder_results,
    gpu_results,
    quality_results,
    results,
    serving_results,
    speculation_results,
    stored,
    tables,
    targets,
)
from benchmarks.chart_results import Chart
from benchmarks.encoder_results import EncoderResults
from benchmarks.gpu_results import GpuCheck
from benchmarks.quality_results import QualityResults
from benchmarks.results import DECODE, LLAMA_CPP, OURS, Results
from benchmarks.serving_results import ServingResults
from benchmarks.speculation_results import SpeculationResults

README = Path(__file__).parent.parent / "README.md"
PAGE = stored.FOLDER / "README.md"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


CHART = "Speedup over Hugging Face eager"
NOTHING = "No run is stored in `benchmarks/results` yet, so there are no figures to show."


def summary(folder: Path = stored.FOLDER) -> str:
    """What should stand between the README's markers now: how fast, on one CPU and on each GPU."""
    parts = [
        speed(run, file.with_suffix(".svg"), README, rates=True) for file, run in results.latest(folder)[:1]
    ]
    parts += [serving(run) for run in serving_results.latest(folder)[:1]]
    for file, chart in chart_results.latest("paper", folder):
        parts += [_picture(CHART, file.with_suffix(".svg"), README), chart_tables.tables(chart)[0].markdown()]
        parts.append(_made_with(chart, chart.days))
    return "\n\n".join(part for part in parts if part) or NOTHING


def current(folder: Path = stored.FOLDER) -> str:
    """What should stand between the markers of the page of all results now."""
    parts = []
    for n, (file, run) in enumerate(results.latest(folder)):
        parts.append(speed(run, file.with_suffix(".svg"), PAGE, rates=n > 0))
    parts += [serving(run) for run in serving_results.latest(folder)]
    parts += [speculation(run) for run in speculation_results.latest(folder)]
    parts += [encoders(run) for run in encoder_results.latest(folder)]
    if quality := quality_results.newest(folder):
        parts.append(closeness(quality[1]))
    charts = chart_results.latest("paper", folder)
    parts += [paper(chart, file.with_suffix(".svg")) for file, chart in charts]
    drawn = {chart.machine["device"] for _, chart in charts}
    checks = [check for _, check in stored.latest(GpuCheck, "paper", folder)]
    parts += [gpu(check, whole=check.machine["device"] not in drawn) for check in checks]
    return "\n\n".join(parts) or NOTHING


def speed(found: Results, picture: Path, page: Path, rates: bool = False) -> str:
    """The picture, if it is there, the tables of a run, and what they were measured with, for a page. rates: they alone
    of the tables."""
    parts = [_picture("Tokens per second by precision and system", picture, page)]
    parts += [rows.markdown() for rows in ([tables.speed(found)] if rates else tables.tables(found))]
    versions = found.versions
    llama = f", llama-cpp-python {versions['llama-cpp-python']}" if "llama-cpp-python" in versions else ""
    threads = f"{found.settings['threads']} threads"
    parts.append(
        f"{found.model}, batch 1, {threads} of {_machine(found)}; medians, quartiles in parentheses. PyTorch "
        f"{versions['torch']}, Transformers {versions['transformers']}{llama}, Python {versions['python']}; "
        f"{found.date[:10]}; `{found.command}`."
    )
    if LLAMA_CPP in {series.system for m in found.measures for series in m.series}:
        parts[-1] += (
            " llama.cpp's files: F32, BF16, Q8_0 (for int8) and Q4_0 (for int4), KV state in f16; tilewright's int8 "
            "and int4 come from the bfloat16 model, KV state in bf16."
        )
    if not rates and any(
        m.share_of_probe(o).median > 1.1 for m in found.measures if m.task == DECODE and (o := m.of(OURS))
    ):
        parts[-1] += (
            " Shares beyond 100% come of a last cache that keeps part of the weights from one step to the next, for "
            "which the probe's buffer is too large, or of a machine whose speed changed in between."
        )
    return "\n\n".join(part for part in parts if part)


def serving(found: ServingResults) -> str:
    """Servers of one device under several clients."""
    said, versions = found.settings, found.versions
    talks = any(load.turns > 1 for load in found.loads)
    long = " or a conversation that begins with some 500 tokens" if talks else ""
    note = (
        f"{said['model']}, answers of {said['tokens']} tokens, streamed, {said['each']} questions of each client one "
        f"after the other{long}; {_where(found)}; PyTorch {versions['torch']}, Transformers "
        f"{versions['transformers']}; {found.date[:10]}; `{found.command}`."
    )
    return f"{serving_results.table(found).markdown()}\n\n{note}"


def speculation(found: SpeculationResults) -> str:
    """Answers of one device with guesses and without."""
    said, versions = found.settings, found.versions
    note = (
        f"{said['model']}, greedy answers of at most {said['tokens']} tokens, {said['guesses']} guesses at a time, "
        "else each system's defaults; in half precision roundings give some answers other words with guesses than "
        f"without; {_where(found)}; PyTorch {versions['torch']}, Transformers {versions['transformers']}; "
        f"{found.date[:10]}; `{found.command}`."
    )
    return f"{speculation_results.table(found).markdown()}\n\n{note}"


def _where(found: EncoderResults | ServingResults | SpeculationResults) -> str:
    """The processor with the threads that were used, or the GPU."""
    if found.machine["device"] != found.machine["cpu"]:
        return str(found.machine["device"])
    return f"{found.settings['threads']} threads of {_machine(found)}"


def encoders(found: EncoderResults) -> str:
    """Encoders of one device over batches."""
    where = _where(found)
    versions = f"PyTorch {found.versions['torch']}, Transformers {found.versions['transformers']}"
    note = (
        f"{where}; MiniLM with its real weights, the others of the size called base with random ones; {versions}; "
        f"{found.date[:10]}; `{found.command}`."
    )
    return f"{encoder_results.table(found).markdown()}\n\n{note}"


def closeness(found: QualityResults) -> str:
    """What precision costs in quality."""
    parts = [rows.markdown() for rows in quality_results.tables(found)]
    note = f"{_machine(found)}; {found.date[:10]}; `{found.command}`."
    if any(c.precision == "Q4_1" for c in found.closeness):
        note += (
            " SmolLM2's weights come from the Q4_1 file. tilewright's int4 has a scale and a minimum for 32 weights "
            "too, so these fit it better than others would, while Q4_0 rounds them a second time. Both files keep the "
            "embedding table in Q8_0, int4 has it in eight bits as well."
        )
    parts.append(note)
    return "\n\n".join(parts)


def paper(found: Chart, picture: Path) -> str:
    """The chart of one device: its picture, if it is there, its tables, and what they were measured with."""
    parts = [_picture(CHART, picture, PAGE)]
    parts += [rows.markdown() for rows in chart_tables.tables(found)]
    parts += [rows.markdown() for rows in targets.tables(targets.of_chart(found), found.scale)]
    parts.append(_made_with(found, found.days))
    return "\n\n".join(part for part in parts if part)


def gpu(found: GpuCheck, whole: bool) -> str:
    """The check of one device. whole: with its few points of the chart and what all of it says of the targets, which
    is of interest where there is no chart of that device."""
    parts = [rows.markdown() for rows in gpu_results.tables(found)]
    chart = found.found.chart
    if whole:
        parts += [rows.markdown() for rows in (chart_tables.tables(chart) if chart else ())]
        parts += [rows.markdown() for rows in targets.tables(targets.of_check(found), found.scale)]
    parts.append(_made_with(found, found.date[:10]))
    return "\n\n".join(parts)


def _made_with(found: Chart | GpuCheck, days: str) -> str:
    named = found.versions | ({"commit": found.commits} if isinstance(found, Chart) else {})
    versions = ", ".join(
        f"{name} {named[name]}" for name in ("torch", "transformers", "triton", "commit") if name in named
    )
    return f"{found.machine['device']}; random weights; {versions}; {days}; `{found.command}`."


def _machine(found: Results | QualityResults | EncoderResults | ServingResults | SpeculationResults) -> str:
    machine = found.machine
    return f"{machine['cpu']} ({', '.join(machine['extensions'])}), load before the run {machine['load']}"


def _picture(what: str, picture: Path, page: Path) -> str:
    """A picture on a page, relative to it where it can be; "" where there is none."""
    if not picture.exists():
        return ""
    near = picture.is_relative_to(page.parent)
    return f"![{what}]({picture.relative_to(page.parent).as_posix() if near else picture.name})"


def replaced(text: str, new: str) -> str:
    """``text`` with ``new`` between the markers. Raises ValueError unless each marker is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page needs {BEGIN} and, below it, {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 when it is out of date.")
    ] = False,
) -> None:
    """Write the figures of the newest result files into the README and the page of all results."""
    stale = False
    for page, text in ((README, summary()), (PAGE, current())):
        old = page.read_text()
        new = replaced(old, text)
        if new == old:
            print(f"{page.name} of {page.parent.name} is up to date")
        elif check:
            print(f"{page} does not show the newest results; run: python -m benchmarks.readme")
            stale = True
        else:
            page.write_text(new)
            print(f"{page} has the newest results now")
    if stale:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
