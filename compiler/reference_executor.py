"""The reference backend: runs a program step by step with the reference evaluator, in the planned arena.

Slow and simple; it checks the memory plan and the runtime without any generated code (``backend="reference"``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tilewright.ir.index import sym
from tilewright.ir.module import Module
from tilewright.ir.program import Buffer, BufferKind, Program, Step
from tilewright.ir.recurrent import state_of
from tilewright.ir.reference import Evaluation
from tilewright.ir.types import TensorType, Value, concrete
from tilewright.runtime.kv_state import RequestState


class ReferenceExecutor:
    """Runs a program with torch, one op of each kernel's body after the other."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        self.program = program
        self.weights = weights
        self.phase = program.phase
        self.batch = program.batch if program.phase == "decode" else 0

    def run(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Compute ``outputs`` in place; see ``runtime.executor.Executor``."""
        arena = torch.empty(self.program.arena_bytes, dtype=torch.uint8)
        memory = {
            BufferKind.input: inputs,
            BufferKind.output: outputs,
            BufferKind.param: self.weights,
            BufferKind.state: state.buffers if state is not None else {},
        }

        def tensor(buffer: Buffer, type: TensorType) -> Tensor:
            """The memory of a buffer as a tensor of its logical shape."""
            shape = concrete(type.shape, dims)
            if buffer.kind is BufferKind.arena:
                size = int(torch.Size(shape).numel()) * type.dtype.itemsize
                return arena[buffer.offset : buffer.offset + size].view(type.dtype.torch).view(shape)
            whole = memory[buffer.kind][buffer.name]
            # A context is laid out at capacity, and a state for as many rows as the request's bucket has.
            if buffer.kind is BufferKind.state or sym("T") in {s for d in type.shape for s in d.free_symbols}:
                return whole[tuple(slice(0, n) for n in shape)]
            return whole.view(shape) if whole.shape != shape else whole

        for step, reads, writes in self.program.trace():
            bound = zip((*step.op.operands, *step.op.results), (*reads, *writes), strict=True)
            views = {v: tensor(self.program.buffers[n], v.type) for v, n in bound}
            self._step(step, views, dims)

    def _step(self, step: Step, views: dict[Value, Tensor], dims: Mapping[str, int]) -> None:
        env = {v: views[v] for v in step.op.operands}
        run = Evaluation(Module(()), {}, dims)
        for op in step.op.body:
            if (held := state_of(op)) is not None:
                new = concrete(op.operands[0].shape, dims)[2] if op.opcode == "append" else 0
                run.state[op.attr("slot")] = views[held][:, :, : views[held].shape[2] - new]
        run.run(step.op, env, "")
        # A result may be a view of an operand whose memory another result overwrites: read all, then store.
        results = {v: env[v].clone() for v in step.op.results}
        for v, result in results.items():
            views[v].copy_(result)
