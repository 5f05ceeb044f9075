"""Where each buffer of a program lies during one call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tilewright.ir.program import (
    Buffer,
    BufferKind,
    DType,
    Program,
    Step,
    Value,
    concrete,
    physical_shape,
    run_torch_call,
)

from .kv_state import RequestState


class Memory:
    """The tensors of one call: arena, inputs, outputs, weights and the request's KV buffers.

    ``arena`` is u8[arena_bytes]; the others go by the names of the program's buffers.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        arena: Tensor,
        inputs: Mapping[str, Tensor],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        self.program, self.arena = program, arena
        self.named: dict[BufferKind, Mapping[str, Tensor]] = {
            BufferKind.input: inputs,
            BufferKind.output: outputs,
            BufferKind.param: weights,
            BufferKind.state: state.buffers if state is not None else {},
        }

    def address(self, buffer: Buffer) -> int:
        """The address of a buffer's first byte."""
        if buffer.kind is BufferKind.arena:
            return self.arena.data_ptr() + buffer.offset
        return self.named[buffer.kind][buffer.name].data_ptr()

    def pointer(self, number: int, value: Value) -> Tensor:
        """A tensor that starts at a buffer's first byte, in ``value``'s dtype; bool and f8 as bytes."""
        buffer = self.program.buffers[number]
        as_bytes = value.dtype in (DType.bool, DType.f8)
        dtype = torch.uint8 if as_bytes else value.dtype.torch
        if buffer.kind is BufferKind.arena:
            whole = self.arena[buffer.offset : buffer.offset + max(buffer.nbytes, dtype.itemsize)]
            return whole.view(dtype)
        tensor = self.named[buffer.kind][buffer.name]
        return tensor.view(torch.uint8) if as_bytes else tensor

    def tensor(self, number: int, value: Value, dims: Mapping[str, int]) -> Tensor:
        """A buffer as a tensor of ``value``'s logical shape and dtype."""
        buffer = self.program.buffers[number]
        shape = concrete(physical_shape(value.type, self.program.capacity), dims)
        logical = concrete(value.shape, dims)
        if buffer.kind is BufferKind.arena:
            nbytes = torch.Size(shape).numel() * value.dtype.itemsize
            return self.arena[buffer.offset : buffer.offset + nbytes].view(value.dtype.torch).view(shape)
        tensor = self.named[buffer.kind][buffer.name]
        if buffer.kind is BufferKind.state or logical != shape:
            return tensor[tuple(slice(0, n) for n in logical)]
        return tensor.view(shape)

    def run_torch(
        self, step: Step, reads: tuple[int, ...], writes: tuple[int, ...], dims: Mapping[str, int]
    ) -> None:
        """Let PyTorch run a ``call_torch`` step, and keep its results where the plan wants them."""
        args = [self.tensor(n, v, dims) for n, v in zip(reads, step.op.operands, strict=True)]
        results = run_torch_call(step.op.attr("target"), step.op.attr("template"), args)
        for n, v, result in zip(writes, step.op.results, results, strict=True):
            self.tensor(n, v, dims).copy_(result)
