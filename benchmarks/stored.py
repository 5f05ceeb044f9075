"""Result files: JSON below ``results/``, by processor and date, each of a kind and a schema that it names."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

from tilewright.errors import OptionError
from tilewright.runtime.files import write_atomically

FOLDER = Path(__file__).parent / "results"


class Result(Protocol):
    """A frozen dataclass of one run. ``KIND`` and ``SCHEMA`` say which files are its own and can be read, ``COMMAND``
    what makes one."""

    KIND: ClassVar[str]
    SCHEMA: ClassVar[int]
    COMMAND: ClassVar[str]

    @property
    def date(self) -> str: ...

    @property
    def machine(self) -> dict[str, Any]: ...

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self: ...


R = TypeVar("R", bound=Result)


def now() -> str:
    """The date that a run's result has: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def to_json(result: Result) -> str:
    """The whole run as text."""
    data = asdict(cast(Any, result))
    return json.dumps({"kind": result.KIND, "schema": result.SCHEMA, **data}, indent=1) + "\n"


def from_json(cls: type[R], text: str) -> R:
    """A run of ``cls`` from text. Raises ValueError for another kind or schema, or missing fields."""
    data = json.loads(text)
    kind, schema = data.pop("kind", None), data.pop("schema", None)
    if kind != cls.KIND:
        raise ValueError(f"a result of kind {kind}, not {cls.KIND}")
    if schema != cls.SCHEMA:
        raise ValueError(f"schema {schema}, but this version reads {cls.SCHEMA}; run {cls.COMMAND} again")
    try:
        return cls.from_data(data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a result of this benchmark: {error}") from error


def kind_of(file: Path) -> str:
    """The kind of result that a file says it holds; "" where it says nothing."""
    try:
        return str(json.loads(file.read_text()).get("kind", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def of_file(cls: type[R], file: Path) -> R:
    """A run of ``cls`` from a file. Raises OptionError for one that cannot be read or holds something else."""
    try:
        return from_json(cls, file.read_text())
    except (OSError, ValueError, AttributeError) as error:
        raise OptionError(f"{file} is no {cls.KIND} result: {error}") from error


def save(result: Result, file: Path | None = None) -> Path:
    """Write to ``file``, by default ``results/<cpu>/<date>-<kind>.json``; returns where."""
    file = file or place(result)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, to_json(result))
    return file


def place(result: Result) -> Path:
    """Where a result goes: ``results/<device>/<date>-<kind>.json``; a CPU is a device too."""
    name = f"{result.date[:19].replace(':', '')}-{result.KIND}.json"
    return FOLDER / _slug(str(result.machine.get("device") or result.machine["cpu"])) / name


def newest(cls: type[R], folder: Path) -> tuple[Path, R] | None:
    """The latest stored run of ``cls`` by its own date, and its file; None when there is none."""
    return max(all_of(cls, folder), key=lambda pair: pair[1].date, default=None)


def all_of(cls: type[R], folder: Path) -> list[tuple[Path, R]]:
    """Every stored run of ``cls``, and its file."""
    texts = {file: file.read_text() for file in folder.rglob("*.json")}
    return [(file, from_json(cls, t)) for file, t in texts.items() if json.loads(t).get("kind") == cls.KIND]


def newest_of_each(cls: type[R], fact: str, folder: Path) -> list[tuple[Path, R]]:
    """The latest stored run of ``cls`` and its file for each value of a fact of the machine, the newest first."""
    found: dict[str, tuple[Path, R]] = {}
    for file, result in sorted(all_of(cls, folder), key=lambda pair: pair[1].date):
        found.pop(result.machine[fact], None)
        found[result.machine[fact]] = (file, result)
    return list(reversed(found.values()))


def latest(cls: type[R], scale: str, folder: Path) -> list[tuple[Path, R]]:
    """The latest stored run of ``cls`` on each device at a scale, and its file, in the order of devices' names."""
    found: dict[str, tuple[Path, R]] = {}
    for file, result in sorted(all_of(cls, folder), key=lambda pair: pair[1].date):
        if cast(Any, result).scale == scale:
            found[result.machine["device"]] = (file, result)
    return [found[device] for device in sorted(found)]


def records(cls: type[Any], rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Rows of plain data as objects of ``cls``; lists become tuples."""
    return tuple(
        cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}) for row in rows
    )


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
