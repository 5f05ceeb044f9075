"""A process with Triton's interpreter: reads names, a line each, and answers with what is wrong, as JSON.

A name is that of a case, perhaps with fields of its tile changed, as in ``case block_m=16 transposed=1``
(``never_again=1`` takes the second walk out of an agreed softmax);
``model:family:dtype`` or, with persistent kernels and quantised weights, ``model:family:dtype:residents:weights``;
``architecture:family``, one of ``test_architectures``; ``experts:name``, one of ``experts_cases``, or
``experts:name:block``, perhaps with fields as above, for tokens in blocks by expert; ``greedy:name``, one of
``triton_greedy``; or ``random:count``: so many random modules.

The interpreter must be chosen before triton is imported, so it cannot share a process with tests that compile.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"


def _never_again(text: str) -> str:
    """An agreed softmax that keeps its first result, whatever the scores were."""
    assert "if again != 0:" in text
    return text.replace("if again != 0:", "if False:")


def _numbers(fields: list[str]) -> dict[str, int]:
    return {key: int(value) for key, value in (f.split("=") for f in fields)}


def main() -> None:
    import torch

    from tests.quick_interpreter import hurry

    from .triton_architectures import architecture_errors
    from .triton_experts import experts_errors
    from .triton_greedy import greedy_errors
    from .triton_models import model_errors
    from .triton_random import run_random
    from .triton_run import errors

    torch.set_num_threads(1)
    hurry()
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(sys.stdin):
            try:
                kind, *rest = line.strip().split(":")
                if kind == "model":
                    family, dtype, residents, weights, guesses = *rest, *("", "", "0", "", "0")[len(rest) :]
                    answer = model_errors(
                        family,
                        getattr(torch, dtype),
                        Path(folder),
                        "cpu",
                        True,
                        int(residents),
                        weights,
                        guesses=int(guesses),
                    )
                elif kind == "architecture":
                    answer = architecture_errors(rest[0])
                elif kind == "greedy":
                    answer = greedy_errors(rest[0], Path(folder))
                elif kind == "experts":
                    block, *fields = rest[1].split() if rest[1:] else ["0"]
                    answer = experts_errors(rest[0], Path(folder), int(block), _numbers(fields))
                elif kind == "random":
                    run_random(int(rest[0]), Path(folder))
                    answer = []
                else:
                    name, *fields = kind.split()
                    tuned = _numbers(fields)
                    edit = _never_again if tuned.pop("never_again", 0) else str
                    answer = errors(name, True, "cpu", Path(folder) / f"case{number}.py", tuned, edit)
            except Exception:  # noqa: BLE001 - the parent test shows it
                answer = [traceback.format_exc()]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
