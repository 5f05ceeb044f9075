"""What the runtime asks of a device: whether generated Triton kernels run on it, and how much memory it has left."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewright.ir.program import DeviceError

OLDEST = 80
"""Least compute capability, 80 for 8.0: below it there are no bfloat16 products and no asynchronous copies."""


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU as it is now. arch: compute capability, 90 for 9.0. free_bytes: what an allocation could still get,
    PyTorch's own reserve included."""

    name: str
    arch: int
    free_bytes: int


def device_facts(device: torch.device) -> DeviceFacts | None:
    """Facts about a GPU; None for any other device."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return DeviceFacts(found.name, 10 * found.major + found.minor, free + reserve)


def is_interpreting() -> bool:
    """True when this process runs Triton kernels on the CPU, step by step (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def require_device(device: torch.device) -> None:
    """Raise DeviceError unless Triton kernels can run on tensors of ``device``."""
    facts = device_facts(device)
    if facts is not None:
        if facts.arch < OLDEST:
            raise DeviceError(
                f"{device} is a {facts.name} of compute capability {facts.arch / 10:.1f}, but the triton backend needs "
                f"{OLDEST / 10:.1f} (Ampere) or newer; choose such a GPU, or use model.to('cpu') and backend='cpp'"
            )
        return
    if not is_interpreting():
        raise DeviceError(
            f"the triton backend needs a CUDA device, not {device}; move the model there, choose backend='cpp', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """True when an allocation failed, by PyTorch (on a CPU it can't allocate memory) or, while it loads a kernel, by
    Triton."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(said in str(error) for said in ("out of memory", "can't allocate memory"))
    )
