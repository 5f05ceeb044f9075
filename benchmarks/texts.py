"""Real text that every machine has: what Python and the packages that tilewright needs say of themselves.

English prose and code in the proportions of documentation, and licences. What is chosen depends on the contents alone,
neither on the order of files nor on where they are.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

MODULES = (
    "argparse", "asyncio", "collections", "concurrent.futures", "contextlib", "csv", "datetime", "difflib",
    "email.message", "functools", "heapq", "inspect", "itertools", "json", "logging", "os", "pathlib", "pickle",
    "random", "re", "sqlite3", "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "typing",
    "unittest", "zipfile",
)  # fmt: skip
PACKAGES = ("networkx", "numpy", "rich", "safetensors", "sympy", "torch", "tqdm", "transformers", "typer")
SHORTEST = 1500
"""Characters below which a text is left out."""
NEIGHBOURS = 6
"""Pairs of neighbours that one text gives at most."""
SENTENCE = re.compile(r"[A-Z][^.!?:]{30,200}[.!?](?=\s|$)")


def texts() -> list[str]:
    """Every text once, ordered by the hash of its contents, which mixes the sources."""
    found = {text.strip() for text in (*topics.values(), *_docstrings(), *_licences())}
    return sorted((text for text in found if len(text) >= SHORTEST), key=_digest)


def windows(tokenizer: Any, count: int, length: int, among: Iterable[str] | None = None) -> Tensor:
    """Token ids i64[count, length]: the first ``length`` tokens of each text, then the next of each, until enough.

    So no source counts for much more than another. Raises ValueError when there are too few.
    """
    encoded = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in among or texts()]
    longest = max(map(len, encoded), default=0)
    starts = range(0, longest - length + 1, length)
    rows = [ids[n : n + length] for n in starts for ids in encoded if len(ids) >= n + length]
    if len(rows) < count:
        raise ValueError(
            f"the texts on this machine have {len(rows)} windows of {length} tokens, not {count}"
        )
    return torch.tensor(rows[:count])


def sentence_pairs(count: int, among: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """``count`` pairs of sentences: half of them neighbours in one text, half from two texts.

    So the similarities spread over most of their range. Raises ValueError when there are too few.
    """
    found = [s for s in map(sentences, among or texts()) if len(s) > 1]
    # Neighbours, but only some of each text: licences and long references would else be all there is.
    near = [pair for s in found for pair in list(pairwise(s))[:NEIGHBOURS]]
    far = [
        (a[shift % len(a)], b[2 * shift % len(b)])
        for shift in range(1, len(found))
        for a, b in zip(found, found[shift:], strict=False)
    ]
    half = count // 2
    if len(near) < count - half or len(far) < half:
        raise ValueError(f"the texts on this machine have too few sentences for {count} pairs")
    return near[: count - half] + far[:half]


def sentences(text: str) -> list[str]:
    """What looks like a whole sentence of prose, in order, each on one line."""
    prose = [p for p in re.split(r"\n\s*\n", text) if not p.startswith(("   ", ">>>"))]
    return [" ".join(match.split()) for p in prose for match in SENTENCE.findall(p)]


def _docstrings() -> Iterator[str]:
    """Of each module: its documentation, and that of the classes and functions that it exports, as one text."""
    for name in MODULES:
        module = importlib.import_module(name)
        public = [getattr(module, n) for n in sorted(getattr(module, "__all__", dir(module))) if n[0] != "_"]
        parts = [inspect.getdoc(module), *(inspect.getdoc(o) for o in public if callable(o))]
        yield "\n\n".join(dict.fromkeys(part for part in parts if part))


def _licences() -> Iterator[str]:
    """Of each installed package: the licence files that it ships at the top of its metadata."""
    for package in PACKAGES:
        for file in importlib.metadata.files(package) or ():
            if re.fullmatch(r"[^/]*\.dist-info/(licenses/)?LICEN[CS]E(\.\w+)?", str(file)):
                yield file.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
