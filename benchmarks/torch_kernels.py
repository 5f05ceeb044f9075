"""What torch.compile makes of the ops of one of our kernels: they are said in torch, compiled, checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.peers import cold_copies, peer_seconds
from tilewright.ir.index import sym
from tilewright.ir.module import Module, Op
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.program import BufferKind, Program, Step
from tilewright.ir.reference import Evaluation, apply_index_map, memory_map
from tilewright.ir.types import DType, Value, concrete
from tilewright.trials import Trial

Function = Callable[..., Sequence[Tensor]]
_SAID = frozenset(
    ("const", "iota", "dim", "reduce", "view", "concat", "gather", "matmul", "append", "attention", "dequantize")
) | frozenset(POINTWISE)  # fmt: skip
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
_CLOSE_HALF = 2e-2


class CannotCompareError(Exception):
    """A kernel that torch.compile cannot be set beside; the text says why."""


@dataclass(frozen=True)
class Kernel:
    """A kernel step where it is run. weights: its operands that are the model's. integers: tensors of the operands that
    are integers, which pick rows of tables, so that not any value will do."""

    step: Step
    weights: Collection[Value]
    integers: Mapping[Value, Tensor]
    dims: Mapping[str, int]
    device: torch.device

    @property
    def caches(self) -> dict[str, Value]:
        """The results that are appended to, by their slot."""
        return {str(o.attr("slot")): o.result for o in self.step.op.body if o.opcode == "append"}

    def tensors(self) -> list[Tensor]:
        """Random numbers for every operand, then for every cache; masks let everything through."""
        return [self._tensor(v) for v in (*self.step.op.operands, *self.caches.values())]

    def _tensor(self, value: Value) -> Tensor:
        shape = concrete(value.shape, self.dims)
        if value.dtype is DType.bool:
            return torch.ones(shape, dtype=torch.bool, device=self.device)
        if not value.dtype.is_float:
            if value not in self.integers:
                raise CannotCompareError("takes integers that another kernel computes")
            return self.integers[value]
        return torch.randn(shape, device=self.device).to(value.dtype.torch)


def kernels(program: Program, trial: Trial, device: torch.device) -> Iterator[Kernel]:
    """Every distinct kernel of a program, where it runs first."""
    seen = set()
    for step, reads, _ in program.trace():
        if step.op.opcode != "kernel" or step.name in seen:
            continue
        seen.add(step.name)
        buffers = {v: program.buffers[n] for v, n in zip(step.op.operands, reads, strict=True)}
        integers = {
            v: trial.inputs[b.name].view(concrete(v.shape, trial.dims))
            for v, b in buffers.items()
            if b.kind is BufferKind.input and not v.dtype.is_float and v.dtype is not DType.bool
        }
        weights = {v for v, b in buffers.items() if b.kind is BufferKind.param}
        yield Kernel(step, weights, integers, trial.dims, device)


def seconds(kernel: Kernel) -> float:
    """Seconds of a run of what torch.compile makes of a kernel, its weights coming from memory.

    Raises CannotCompareError where torch has no form of the kernel, or gives another result than the reference.
    """
    with torch.no_grad():
        given = kernel.tensors()
        run = compiled(traced(kernel, given), kernel.device)
        check(run, kernel, given)
        return peer_seconds(_with_cold_weights(run, kernel, given), kernel.device)


def get_ready(device: torch.device) -> None:
    """Have torch.compile load what it does once in a process, which takes longer than most kernels."""

    def function(x: Tensor) -> Tensor:
        return x + 1

    torch.compile(function)(torch.ones(8, device=device))


def traced(kernel: Kernel, given: Sequence[Tensor]) -> GraphModule:
    """A kernel's ops as ATen's, for the shapes of ``given``: operands, then caches, which are appended to in place."""
    op = kernel.step.op
    for inner in op.body:
        if inner.opcode not in _SAID or (inner.attr("slot") and inner.opcode == "attention"):
            raise CannotCompareError(f"torch has no form of {inner.opcode}")

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        env = dict(zip((*op.operands, *kernel.caches.values()), args, strict=True))
        held = {slot: env[value] for slot, value in kernel.caches.items()}
        _InTorch(Module(()), {}, kernel.dims, held).run(op, env, "")
        return tuple(env[v] for v in op.results)

    with kernel.device:
        return make_fx(function)(*given)


def compiled(graph: GraphModule, device: torch.device) -> Function:
    """As ``torch_compile.py`` compiles models; without a CUDA graph of its own, since calls are queued in a row."""
    torch._dynamo.reset()  # what it knows of the kernels before
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    run: Function = torch.compile(graph, dynamic=False, mode=mode)
    return run


def check(run: Function, kernel: Kernel, given: Sequence[Tensor]) -> None:
    """Raise CannotCompareError where ``run`` gives another result than the reference evaluator."""
    op = kernel.step.op
    env = dict(zip(op.operands, given, strict=False))
    new = {
        str(o.attr("slot")): concrete(o.operands[0].shape, kernel.dims)[2]
        for o in op.body
        if o.opcode == "append"
    }
    held = dict(zip(kernel.caches, given[len(op.operands) :], strict=True))
    past = {slot: cache[:, :, : cache.shape[2] - new[slot]].clone() for slot, cache in held.items()}
    with kernel.device:  # where the evaluator makes tensors of its own
        Evaluation(Module(()), {}, kernel.dims, past).run(op, env, "")
    for value, found in zip(op.results, run(*given), strict=True):
        off = _distance(found, env[value])
        if not off <= _CLOSE.get(value.dtype.torch, _CLOSE_HALF):
            raise CannotCompareError(f"another result: {value} is off by {off:.2g} of its norm")


def _distance(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over that of ``b``."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def _with_cold_weights(run: Function, kernel: Kernel, given: Sequence[Tensor]) -> Callable[[], object]:
    """``run`` on copies of the weights that take turns, so that none is in a cache when it is read."""
    which = [n for n, v in enumerate(kernel.step.op.operands) if v in kernel.weights]
    copies = cold_copies(sum(given[n].nbytes for n in which))
    sets = [[t.clone() if n in which else t for n, t in enumerate(given)] for _ in range(copies - 1)]
    turns = cycle([list(given), *sets])
    return lambda: run(*next(turns))


class _InTorch(Evaluation):
    """The reference evaluator in the form that a compiler of torch can do most with: views that it can follow,
    constants that it sees, the library's attention, and caches that are written in place."""

    def _evaluate(self, op: Op, args: list[Tensor], scope: str) -> tuple[Tensor, ...]:
        match op.opcode:
            case "const":
                return (torch.full((), op.attr("value"), dtype=self.dtype(op.result.dtype)),)
            case "dim":
                return (torch.full((), concrete((op.attr("expr"),), self.dims)[0]),)
            case "view":
                return (self._view(op, args[0]),)
            case "append":
                cache = self.state[op.attr("slot")]
                cache[:, :, cache.shape[2] - args[0].shape[2] :].copy_(args[0])
                return (cache,)
            case "attention" if _plain(op, self.dims):
                q, k, v = args[0], args[1].to(args[0].dtype), args[2].to(args[0].dtype)
                causal = op.attr("causal") and q.shape[2] > 1
                grouped = q.shape[1] != k.shape[1]
                scale = op.attr("scale")
                return (
                    scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped),
                )
        return super()._evaluate(op, args, scope)

    def _view(self, op: Op, x: Tensor) -> Tensor:
        shape = concrete(op.result.shape, self.dims)
        bound = {sym(name): sympy.Integer(size) for name, size in self.dims.items()}
        exprs = tuple(e.xreplace(bound) for e in op.attr("map").exprs)
        offset, strides = memory_map(exprs, tuple(x.shape), shape)
        found = None if strides is None else strided(x, shape, offset, strides)
        return apply_index_map(x, op.attr("map"), shape, self.dims) if found is None else found


def _plain(op: Op, dims: Mapping[str, int]) -> bool:
    """Whether the library's attention computes this, all keys being let through by the mask."""
    new, context = (concrete(v.shape[2:3], dims)[0] for v in op.operands[:2])
    extras = tuple(op.attr("extras", ()))
    return (
        not op.attr("softcap")
        and not op.attr("window")
        and not op.attr("ahead")
        and extras in ((), ("mask",))
        and (new in (1, context) or not op.attr("causal"))
    )


def strided(x: Tensor, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> Tensor | None:
    """What ``as_strided`` gives of a contiguous ``x``, by slices, permutations and expansions, for which a compiler
    need not have ``x`` in memory. None where that takes more: where strides do not divide each other."""
    kept = sorted((n for n, size in enumerate(shape) if size > 1 and strides[n]), key=lambda n: -strides[n])
    found, size = x.reshape(-1), x.numel()
    for done, n in enumerate(kept):
        start, offset = divmod(offset, strides[n])
        if size % strides[n] or start + shape[n] > size // strides[n]:
            return None
        rows = found.reshape(*found.shape[:done], size // strides[n], strides[n])
        found, size = rows.narrow(done, start, shape[n]), strides[n]
    found = found.select(-1, offset).permute([kept.index(n) for n in sorted(kept)])
    return found.reshape([n if k in kept else 1 for k, n in enumerate(shape)]).expand(shape)
