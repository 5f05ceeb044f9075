"""Whether prefill computes its matrix products by generated kernels or by the vendor's library (oneDNN or cuBLAS
through torch), which a pass puts into the program. Whoever is faster at a piece of prompt wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilewright.runtime.executor import EngineSpec, Executor

from .trials import Trial, time_in_turns, wait

_RUNS = 3
_EARNED = 1.5


def measure(executors: Sequence[Executor], spec: EngineSpec) -> list[float]:
    """Seconds that each prefill executor takes for a piece of prompt: the best of a few runs, taken in turns.

    The weights of a model do not stay in cache from one run to the next, so these are the times of real prompts. A run
    before them does not count: on a GPU, it compiles and loads kernels.
    """
    trial = Trial.prefill(spec)

    def running(executor: Executor) -> Callable[[], None]:
        def run() -> None:
            executor.run(trial.inputs, trial.dims, trial.state, trial.outputs)
            wait(spec.device)

        return run

    runs = [running(e) for e in executors]
    if spec.device.type == "cuda":
        for run in runs:
            run()
    return time_in_turns(runs, _RUNS)


def best(arenas: Sequence[int], seconds: Sequence[float]) -> int:
    """The number of the candidate to take: the fastest; one that needs clearly more memory has to be clearly faster.

    Between the vendor's products lie tensors that the generated kernels keep in registers.
    """
    least = min(arenas)
    weighed = [s * (_EARNED if a > 1.1 * least else 1.0) for a, s in zip(arenas, seconds, strict=True)]
    return weighed.index(min(weighed))
