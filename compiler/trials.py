"""A made-up request that programs are timed on, and timing that a machine's drift does not bend."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.ir.program import Program
from tilewright.runtime.executor import EngineSpec
from tilewright.runtime.kv_state import RequestState
from tilewright.runtime.prompts import completed

# On a CPU enough for kernels to be timed, and that products are bound by arithmetic as those of a full chunk are; a GPU
# is filled by far more.
CONTEXT, TOKENS = {"cpu": 64, "cuda": 1024}, {"cpu": 128, "cuda": 2048}
_BEHIND = 1.5


def pick(seconds: Sequence[float], share: float) -> int:
    """The number of the fastest way, or of the first one, the default, unless that takes less than such a share of the
    default's time: what is closer is noise. A way that did not run takes infinitely long, or no time at all."""
    fastest = min(range(len(seconds)), key=seconds.__getitem__)
    return fastest if 0 < seconds[fastest] < share * seconds[0] else 0


@dataclass(frozen=True)
class Trial:
    """The arguments of ``Executor.run`` for a request."""

    inputs: Mapping[str, Tensor]
    dims: dict[str, int]
    state: RequestState | None
    outputs: Mapping[str, Tensor]

    @staticmethod
    def of(program: Program, spec: EngineSpec) -> Trial:
        """A request for a program of any phase: where it has no KV state, one sequence of up to ``TOKENS``, or the
        least of every other dim."""
        if tokens := program.step_tokens:
            return Trial.step(spec, program.batch, tokens)
        if program.phase == "prefill":
            return Trial.prefill(spec)
        if program.phase == "per_request":
            return Trial.per_request(program, spec)
        tokens = TOKENS[spec.device.type]
        sizes = {name: min(high, tokens) if name == "S" else low for name, low, high in program.symbols}
        return Trial.forward(spec, sizes)

    @staticmethod
    def step(spec: EngineSpec, rows: int, tokens: int = 1) -> Trial:
        """A step of so many ``tokens`` of ``rows`` sequences at a context of up to ``CONTEXT``.

        Weights that do not fit the caches come from memory, as in use: a step reads each of them once.
        """
        context = min(CONTEXT[spec.device.type], spec.max_length)
        dims = {"B": rows, "S": tokens, "T": max(tokens, context), "L": tokens}
        return Trial._of(spec, dims, rows)

    @staticmethod
    def prefill(spec: EngineSpec) -> Trial:
        """A piece of prompt, of up to ``TOKENS``."""
        tokens = min(spec.chunk, spec.max_length, TOKENS[spec.device.type])
        rows = next((high for name, _, high in spec.symbols if name == "B"), 1)
        return Trial._of(spec, {"B": 1, "S": tokens, "T": tokens, "L": 1}, max(1, rows))

    @staticmethod
    def forward(spec: EngineSpec, dims: dict[str, int]) -> Trial:
        """A run at these sizes; integers are ones, which in a mask means that everything counts."""
        inputs = {}
        for given in spec.inputs:
            tensor = given.empty(dims, spec.device)
            if tensor.is_floating_point():
                inputs[given.name] = tensor.normal_()
            else:
                inputs[given.name] = tensor.fill_(min(1, given.bounds[1]) if given.bounds else 1)
        return Trial(inputs, dims, None, {o.name: o.empty(dims, spec.device) for o in spec.outputs})

    @staticmethod
    def _of(spec: EngineSpec, dims: dict[str, int], rows: int) -> Trial:
        batch, tokens = dims["B"], dims["S"]
        state = RequestState(spec, batch, rows)
        ids = torch.arange(tokens, device=spec.device).remainder(max(spec.vocab_size, 1))
        positions = torch.arange(tokens, device=spec.device)
        several = spec.input("position_ids")
        axes = several.type.shape[:-2] if several is not None and tokens > 1 else ()
        inputs = {
            "input_ids": ids.repeat(batch, 1),
            "position_ids": positions.repeat(*map(int, axes), batch, 1),
            "attention_mask": state.mask,
            "call_length": state.no_length,
        }
        inputs |= completed(spec, inputs["input_ids"], 0, {}, None)
        if spec.per_request is not None:
            state.hold({name: low for name, low, _ in spec.symbols if name not in dims})
            inputs |= {name: tensor[:batch] for name, tensor in state.held.tensors.items()}
            dims = dims | state.held.dims
        outputs = {o.name: o.empty(dims, spec.device) for o in spec.outputs}
        return Trial(inputs, dims, state, outputs)

    @staticmethod
    def per_request(program: Program, spec: EngineSpec) -> Trial:
        """What a request of one sequence computes at its start, of as many states as a piece of prompt has tokens."""
        tokens = TOKENS[spec.device.type]
        dims = {n: 1 if n == "B" else max(low, min(high, tokens)) for n, low, high in program.symbols}
        assert spec.per_request is not None
        inputs = {s.name: s.empty(dims, spec.device).fill_(1) for s in spec.per_request.inputs}
        results = enumerate(spec.per_request.results)
        return Trial(inputs, dims, None, {f"output{n}": s.empty(dims, spec.device) for n, s in results})


def wait(device: torch.device) -> None:
    """Until everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each run, the best of several rounds in which all take turns, since a machine's speed drifts.

    One that is clearly behind after its first turn is not run again; its one time stands.
    """
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for n, run in enumerate(runs):
            if best[n] != float("inf") and best[n] > _BEHIND * min(best):
                continue
            start = time.perf_counter()
            run()
            best[n] = min(best[n], time.perf_counter() - start)
    return best
