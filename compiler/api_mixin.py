"""What a compiled model is: a shallow copy of the model whose class has one of these mixins in front of its own.

So ``isinstance``, ``generate``, pipelines, streamers and ``config`` work as before, while ``forward`` runs our kernels.
The copy shares the weights with the original, which stays as it was and still runs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tilewright.ir.errors import DeviceError, InputError, OptionError
from tilewright.runtime.checks import require_tensor
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import EngineSpec

from .adapters import MergedAdapters
from .capture_layers import flat_names
from .report import Report
from .shown_outputs import ShownOutputs
from .unserved import refuse_configured_outputs


@dataclass(frozen=True)
class Compiled:
    """What a compiled model needs at run time and for inspection.

    ``output_class`` and ``outputs`` name the ModelOutput and its tensors; ``output_spec`` is the pytree of a plain
    module's result, ``output_constants`` its leaves, by position, that never vary, and ``shown`` what it shows of what
    is computed and of its own ``tensors``; ``copied_from`` are addresses of the storages of weights that kernels read
    copies of, which ``adapters`` cannot change; ``encoder`` is the compiled encoder of an encoder-decoder;
    ``switch_length`` is the longest sequence that takes the first of two tables of rotary frequencies, or 0. ``stages``
    maps the name of each stage to its text, printed on demand.
    """

    engine: Engine
    report: Report
    outputs: tuple[str, ...] = ("logits",)
    output_class: type | None = None
    output_spec: pytree.TreeSpec | None = None
    output_constants: Mapping[int, Any] = field(default_factory=dict)
    shown: ShownOutputs | None = None
    copied_from: frozenset[int] = frozenset()
    adapters: MergedAdapters = field(default_factory=MergedAdapters)
    encoder: Any = None
    switch_length: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    stages: dict[str, Callable[[], str]] = field(default_factory=dict)


def attach(model: nn.Module, compiled: Compiled, mixin: type[CompiledMixin]) -> Any:
    """A shallow copy of ``model`` that runs ``compiled`` as ``mixin`` says; the model itself is not touched."""
    fast = copy.copy(model)
    # copy.copy shares the dicts that a module registers things in; what is set on the copy must not reach the original.
    for name, value in vars(model).items():
        if isinstance(value, dict):
            fast.__dict__[name] = value.copy()
    fast.__dict__.pop("forward", None)
    if getattr(model, "generation_config", None) is not None:
        fast.generation_config = copy.deepcopy(model.generation_config)
    fast.__dict__["_tilewright"] = compiled
    fast.__dict__["_tilewright_forward"] = type(model).forward
    fast.__dict__["_tilewright_home"] = _home(model)
    cls = type(model)
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "_tilewright_signature": inspect.signature(cls.forward),
        "_tilewright_class": cls,
    }
    members |= mixin._members(cls)
    fast.__class__ = type(cls.__name__, (mixin, cls), members)
    return fast


def _home(model: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Where a model's weights are, and in which dtype, by its first floating-point parameter."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return None if first is None else (first.device, first.dtype)


class CompiledMixin:
    """What every compiled model offers beyond its own class."""

    _tilewright: Compiled
    _tilewright_forward: Callable[..., Any]
    _tilewright_signature: inspect.Signature
    _tilewright_class: type[nn.Module]  # the original's
    _tilewright_home: tuple[torch.device, torch.dtype] | None

    @classmethod
    def _members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """More members of the class of a compiled model whose own class is ``original``."""
        return {}

    def ir(self, stage: str | None = None) -> str:
        """IR as text: of the named stage, or of the last one. Raises OptionError, listing them, for an unknown name."""
        stages = self._tilewright.stages
        name = next(reversed(stages), "") if stage is None else stage
        if name not in stages:
            raise OptionError(f"no stage {stage!r}; there are {', '.join(stages)}")
        return stages[name]()

    def report(self) -> Report:
        """Kernels, launches, bytes and FLOPs, memory, fallbacks and compile times; prints as a table."""
        compiled = self._tilewright
        count = compiled.engine.compiled_while_running
        if compiled.encoder is not None:
            count += compiled.encoder.report().compiled_while_running
        return replace(compiled.report, compiled_while_running=count)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Does nothing when the model is there already. Raises DeviceError otherwise."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        engine = self._tilewright.engine
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), None)  # type: ignore[attr-defined]
        moved = device is not None and device.type != engine.spec.device.type
        if moved or (dtype is not None and dtype != own):
            raise DeviceError(
                f"this model was compiled for {engine.spec.device} and {own}; move or cast the original model, then "
                "compile again"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise DeviceError(
            "a compiled model cannot be moved or cast, because it shares its weights with the original; move or cast "
            "the original, then compile again"
        )

    def train(self, mode: bool = True) -> Any:
        """Compiled models run inference only; ``eval()`` goes through and leaves the original's mode alone."""
        if mode:
            raise OptionError(
                "a compiled model runs inference only; train the original model and compile again"
            )
        return self

    def _require_weights(self) -> None:
        """Merge the adapters that are chosen now, and raise DeviceError when the original was moved or cast.

        The kernels would go on with the weights as they were, which is not what the caller sees of the model.
        """
        compiled = self._tilewright
        compiled.adapters.follow(self, compiled.copied_from)  # type: ignore[arg-type]
        now, home = _home(self), self._tilewright_home  # type: ignore[arg-type]
        if now != home and now is not None and home is not None:
            raise DeviceError(
                f"this model was compiled for {home[1]} on {home[0]}, but the original, whose weights it shares, is "
                f"now {now[1]} on {now[0]}; move it back with model.to({str(home[0])!r}, {home[1]}), or compile again"
            )

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names that the original's forward has for them, in its order.

        Raises InputError when they do not fit.
        """
        try:
            bound = self._tilewright_signature.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"the arguments do not fit this model's forward: {error}") from error
        return dict(list(bound.items())[1:])

    def _flat_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """As :meth:`_arguments`, those that the original takes by any name among the others."""
        given = self._arguments(args, kwargs)
        named = self._tilewright_signature.parameters
        for rest in [n for n in given if named[n].kind is inspect.Parameter.VAR_KEYWORD]:
            given |= given.pop(rest)
        return given

    def _refuse(self, arguments: Mapping[str, Any]) -> None:
        """Raise InputError for what the kernels do not compute: an argument that the original's forward names, or an
        output that it could be asked for. What the original would ignore (generate() passes such) is ignored here too.
        """
        named = self._tilewright_signature.parameters
        for name, value in arguments.items():
            given = value is not None and value is not False
            if given and (name in named or name.startswith("output_")):
                raise InputError(f"a compiled model does not take {name}; use the original model for that")
        refuse_configured_outputs(self.config, arguments)  # type: ignore[attr-defined]


class EncoderMixin(CompiledMixin):
    """A model without KV state."""

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the original's forward. Raises InputError for input that does not fit."""
        compiled = self._tilewright
        engine = compiled.engine
        self._require_weights()
        given = self._flat_arguments(args, kwargs)
        return_dict = given.pop("return_dict", None)
        taken = {i.name: given.pop(i.name, None) for i in engine.spec.inputs}
        self._refuse(given)
        results = engine.forward(_filled_in(engine, taken))
        assert compiled.output_spec is not None
        output = pytree.tree_unflatten(list(results.values()), compiled.output_spec)
        return output if return_dict is not False else output.to_tuple()


_DEFAULTS = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}


def _filled_in(engine: Engine, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """An encoder's inputs with the defaults that Hugging Face has, and images in the model's dtype, as it has them."""
    inputs = dict(given)
    if isinstance(images := given.get("pixel_values"), Tensor) and images.is_floating_point():
        spec = engine.spec.input("pixel_values")
        assert spec is not None
        inputs["pixel_values"] = images.to(spec.dtype)
    if (ids := given.get("input_ids")) is not None:
        ids = inputs["input_ids"] = engine.check_prompt(ids)
        inputs |= {n: make(ids) for n, make in _DEFAULTS.items() if n in given and given[n] is None}
    if missing := [name for name, value in inputs.items() if value is None]:
        raise InputError(f"{missing[0]} is missing")
    return {name: value for name, value in inputs.items() if value is not None}


class ModuleMixin(CompiledMixin):
    """Any other module: tensors in, tensors out, nested as the original nests them."""

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the original's forward. Raises InputError for input that does not fit."""
        compiled = self._tilewright
        self._require_weights()
        given = flat_tensors(self._arguments(args, kwargs))
        assert compiled.output_spec is not None
        assert compiled.shown is not None
        if not _covered(given, compiled.engine.spec, compiled.shown.written):
            return self._tilewright_forward(self, *args, **kwargs)
        tensors = {**compiled.tensors, **given}
        read = {i.name: tensors[i.name] for i in compiled.engine.spec.inputs if i.name in tensors}
        results = compiled.engine.forward({**given, **read})
        varying, constants = (
            iter(compiled.shown.show(tensors, tuple(results.values()))),
            compiled.output_constants,
        )
        leaves = [
            constants[n] if n in constants else next(varying) for n in range(compiled.output_spec.num_leaves)
        ]
        return pytree.tree_unflatten(leaves, compiled.output_spec)


def _covered(given: Mapping[str, Tensor], spec: EngineSpec, written: Collection[str]) -> bool:
    """False for what kernels do not do as PyTorch does: fewer rows than the graph was captured for, no element at all,
    or an argument that is written in place and also seen through another one."""
    least = {name: low for name, low, _ in spec.symbols}
    for wanted in spec.inputs:
        shape = given[wanted.name].shape if wanted.name in given else ()
        small = (n < least.get(str(d), 1) for d, n in zip(wanted.type.shape, shape, strict=False))
        if any(small):
            return False
    memory = [t.untyped_storage().data_ptr() for t in given.values()]
    return not set(written) & set(given) or len(set(memory)) == len(memory)


def flat_tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in a forward's arguments by the names that capture gives them: ``x``, ``pair_0``, ``batch_mask``."""
    flat: dict[str, Tensor] = {}
    for key, leaf in zip(flat_names(arguments), pytree.tree_leaves(list(arguments.values())), strict=True):
        require_tensor(key, leaf)
        flat[key] = leaf
    return flat
