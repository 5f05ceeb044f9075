"""Run a case's kernel through generated Triton code, and compare it with the reference evaluator."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.codegen.triton.device import H100, Device
from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.kernel import KernelSource, print_kernel
from tilewright.codegen.triton.program import print_source
from tilewright.estimates import gpu
from tilewright.ir.module import Module
from tilewright.ir.program import physical_shape
from tilewright.ir.reference import evaluate
from tilewright.ir.types import Value, concrete

from .kernel_case import CAPACITY, RANGES, Case, comparable, known
from .triton_cases import CASES

AS_BYTES = (torch.bool, torch.float8_e4m3fn)


def source_of(
    case: Case, interpret: bool, tuned: Mapping[str, int] | None = None, gpu: Device = H100
) -> tuple[KernelSource, str]:
    """The case's kernel for a GPU, with fields of its tile ``tuned``, and the text of a module that holds it."""
    largest = {name: high for name, (_, high) in RANGES.items()}
    tunables = {str(case.kernel.attr("name")): tuned or {}}
    env = Environment(CAPACITY, largest, interpret, tunables, gpu)
    kernel = print_kernel(case.kernel, env)
    return kernel, print_source("case", (kernel,), env.prelude)


def load(text: str, path: Path) -> Any:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _buffer(value: Value, content: Tensor | None, case: Case, device: str) -> Tensor:
    """A tensor laid out as buffers are (T at capacity), filled with ``content`` where it reaches."""
    shape = concrete(physical_shape(value.type, CAPACITY), case.dims)
    buffer = torch.zeros(shape, dtype=value.dtype.torch)
    if content is not None:
        buffer[tuple(slice(0, n) for n in content.shape)] = content
    return buffer.to(device)


def run(
    case: Case,
    interpret: bool,
    device: str,
    path: Path,
    tuned: Mapping[str, int] | None = None,
    edit: Callable[[str], str] = str,
) -> tuple[Tensor, ...]:
    """The kernel's results at their logical shapes; ``edit`` changes its text first."""
    _, text = source_of(case, interpret, tuned, gpu(torch.device(device)))
    module = load(edit(text), path)
    inputs, past = case.inputs(), case.past()
    slots = case.slots
    reads = [_buffer(v, inputs[v.name], case, device) for v in case.kernel.operands]
    writes = [_buffer(v, past[slots[v]] if v in slots else None, case, device) for v in case.kernel.results]
    pointers = [t.view(torch.uint8) if t.dtype in AS_BYTES else t for t in reads + writes]
    module.LAUNCH["fused"](pointers, case.dims)
    shapes = [concrete(v.shape, case.dims) for v in case.kernel.results]
    return tuple(w[tuple(slice(0, n) for n in s)].cpu() for w, s in zip(writes, shapes, strict=True))


def errors(
    name: str,
    interpret: bool,
    device: str,
    path: Path,
    tuned: Mapping[str, int] | None = None,
    edit: Callable[[str], str] = str,
) -> list[str]:
    """What is wrong with a case's results: nothing when each is as close to float64 as the reference is."""
    case = CASES[name]()
    found = run(case, interpret, device, path, tuned, edit)
    wrong = [_differences(case, module, found) for module in case.meanings()]
    return [] if not all(wrong) else wrong[0]


def _differences(case: Case, module: Module, found: tuple[Tensor, ...]) -> list[str]:
    """The results that are not what ``module`` computes."""
    inputs = case.inputs()
    plain = evaluate(module, inputs, {}, case.dims, case.past())
    exact = evaluate(module, inputs, {}, case.dims, case.exact_past(), exact=True)
    # Attention rounds its weights to the dtype of q, k and v, as eager does, even where partial results are float32.
    attends = any(op.opcode.startswith("attention") for op in case.kernel.body)
    coarse = case.kernel.operands[0].dtype.torch if attends else None
    wrong = []
    for value, ours, theirs, truth in zip(case.kernel.results, found, plain, exact, strict=True):
        ours, theirs = comparable(ours), comparable(theirs)
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                wrong.append(f"{value}: {ours} is not {theirs}")
            continue
        numbers = known(truth, ours, theirs)
        if numbers is None:
            wrong.append(f"{value}: NaN elsewhere than expected")
            continue
        truth, ours, theirs = numbers
        if not truth.numel():
            continue
        if not torch.isfinite(ours).all() and torch.isfinite(truth).all():
            wrong.append(f"{value}: not finite")
            continue
        size = truth.abs().nan_to_num().max().item()
        rounding = 2 * torch.finfo(coarse or ours.dtype).eps * size
        # There is no more exact result than in float64: between two of those lies the rounding of both.
        both = 2 if (coarse or ours.dtype) == torch.float64 else 1
        allowed = 1.5 * (theirs.double() - truth).abs().max().item() + both * rounding
        error = (ours.double() - truth).abs().max().item()
        if not error <= allowed:
            wrong.append(f"{value}: error {error:.3g}, allowed {allowed:.3g}")
    return wrong
