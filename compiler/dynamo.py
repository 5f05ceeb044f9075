"""``torch.compile(model, backend="tilewright")``: what Dynamo hands over, compiled for inference.

Dynamo traces Python into graphs, AOT autograd makes them functional, and each becomes a :class:`CompiledGraph`. What
Dynamo and AOT autograd promise of any backend holds here too: graph breaks, guards, writes into inputs and buffers,
outputs that share memory.
"""

from __future__ import annotations

import itertools
import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import _disable_current_modes

from tilewright.ir.errors import CaptureError, LoweringError, VerifyError

from .compiled_graph import CompiledGraph
from .options import GraphOptions
from .report import Report

log = logging.getLogger("tilewright")


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; ``torch.compile`` calls this.

    options: "kernels" ("cpp", "triton" or "reference"; by default the one for the graph's device), "autotune" and
    "dump" mean what ``backend``, ``autotune`` and ``dump`` mean to ``tilewright.compile``.

    Raises OptionError for other options, CaptureError for a graph that records gradients, DeviceError,
    CompilerNotFoundError and KernelBuildError. Dynamo wraps them in BackendCompilerFailed, as ``inner_exception``. A
    graph that the IR cannot express runs in PyTorch, with a warning, and its report says why.
    """
    chosen = GraphOptions.of(options or {}, mode)

    def compiled(functional: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        return _compiled(functional, chosen)

    with_gradients: Any = aot_autograd(fw_compiler=_refuse_training, inference_compiler=compiled)
    return with_gradients(graph, example_inputs)


def reports() -> tuple[Report, ...]:
    """A report for each graph that ``torch.compile`` holds from this backend, oldest first."""
    return tuple(found.report for ref in _made if (found := ref()) is not None)


class TorchGraph:
    """A graph that the IR cannot express: PyTorch runs it, op by op."""

    def __init__(self, graph: fx.GraphModule, name: str, reason: str) -> None:
        self.graph = graph
        self.report = Report(model=name, backend="PyTorch", notes=(reason,))

    def __call__(self, *args: Any) -> Any:
        return self.graph(*args)


_numbers = itertools.count()
_made: list[weakref.ref[CompiledGraph | TorchGraph]] = []


def _compiled(functional: fx.GraphModule, chosen: GraphOptions) -> CompiledGraph | TorchGraph:
    name = f"graph{next(_numbers)}"
    try:
        with (
            _disable_current_modes()
        ):  # constants are looked at, and kernels are timed on tensors that are real
            result: CompiledGraph | TorchGraph = CompiledGraph(functional, chosen, name)
    except (LoweringError, VerifyError) as error:
        result = TorchGraph(functional, name, f"PyTorch runs this graph: {error}")
        warnings.warn(result.report.notes[0], stacklevel=2)
    _made[:] = [ref for ref in _made if ref() is not None]
    _made.append(weakref.ref(result))
    log.info("%s", result.report)
    return result


def _refuse_training(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    raise CaptureError(
        "this graph records gradients, and tilewright compiles for inference only; call the model under "
        "torch.no_grad() or torch.inference_mode(), or call model.requires_grad_(False) first"
    )
