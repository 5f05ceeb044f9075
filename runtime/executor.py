"""What the engine needs of a backend, and the plain data that describes a compiled model to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch

from tilewright.ir.program import BufferKind, Program, Sizes, TensorType, concrete, physical_shape

if TYPE_CHECKING:
    from .kv_state import RequestState

Kind = Literal["decoder", "encoder", "module"]


class Executor(Protocol):
    """Runs one program (one phase, one batch bucket) of a compiled model.

    An executor is shared by all requests and threads; whatever belongs to one request (arena, pointer tables, bound
    launches) it keeps in ``state.scratch[self]``, which lives and dies with the request.
    """

    @property
    def phase(self) -> str:
        """``decode``, ``verify``, ``prefill``, ``per_request`` or ``forward``."""
        ...

    @property
    def batch(self) -> int:
        """Batch bucket that a decode program is specialised for; 0 when B is a run-time dim."""
        ...

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, torch.Tensor],
    ) -> None:
        """Compute ``outputs`` in place.

        ``inputs`` are contiguous tensors by name, in the dtypes of the spec, except the key mask of a decoder
        (``attention_mask``), which is the state's bool[rows, max_length] at capacity. ``dims`` sizes every dim symbol:
        B (``batch`` itself for decode, where trailing rows may be padding), S, T = past + S, and L. The KV buffers
        are ``state.buffers[slot]``, [rows, heads, max_length, head_dim]; the program appends to them at T - S, and
        the engine advances ``state.length`` afterwards. Those of recurrent slots, [rows, ...], go on by S tokens.
        Decode calls see the same input, output and state tensors at every step of a request until ``state.version``
        changes, so their addresses may be cached.
        """
        ...


@runtime_checkable
class DeviceStepping(Protocol):
    """An executor whose decode steps can do without the host."""

    def device_step(self, state: RequestState) -> Callable[[], None] | None:
        """Set the context in the device's memory to ``state.length``, and give a function that adds one to it and
        launches a decode step there. None where steps of this program need the host, or have not run at this
        ``state.version``.

        The function, and whatever was recorded of it, hold as long as ``state.version`` does. After ``run`` or changes
        of ``state.length`` the context has to be set anew.
        """
        ...


@runtime_checkable
class Compiling(Protocol):
    """An executor whose kernels are compiled when they are launched for the first time."""

    @property
    def compiled(self) -> int:
        """How many kernels were compiled, or found compiled on disk, so far."""
        ...


@dataclass(frozen=True)
class StateSlot:
    """One KV buffer of a request, [B, heads, max_length, head_dim]; keys and values are two slots."""

    name: str
    heads: int
    head_dim: int
    dtype: torch.dtype

    def shape(self, rows: int, max_length: int) -> tuple[int, ...]:
        """The buffer's shape for that many batch rows."""
        return rows, self.heads, max_length, self.head_dim

    def nbytes(self, rows: int, max_length: int) -> int:
        """Bytes that the buffer holds for that many batch rows."""
        return math.prod(self.shape(rows, max_length)) * self.dtype.itemsize


@dataclass(frozen=True)
class RecurrentSlot:
    """What a recurrent layer of a request remembers, [B, *row]: of one size, whatever the length."""

    name: str
    row: tuple[int, ...]
    dtype: torch.dtype

    def nbytes(self, rows: int) -> int:
        """Bytes that the buffer holds for that many batch rows."""
        return rows * math.prod(self.row) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSpec:
    """Name and type of an input or output; dims are sizes or expressions over B, S, T and L.

    bounds: least and largest value of an integer input that picks rows of a table; kernels do not check them.
    """

    name: str
    type: TensorType
    bounds: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.type.dtype.torch

    def empty(self, dims: Mapping[str, int], device: torch.device) -> torch.Tensor:
        """A new contiguous tensor of this type at the given dim sizes."""
        return torch.empty(concrete(self.type.shape, dims), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class PerRequest:
    """What the steps of a decoder read unchanged for a whole request.

    inputs: of the program that runs once, at the request's start. results: of that program, in order, under the names
    of the inputs that steps read them as. given: inputs of steps that the caller gives at the start.
    """

    inputs: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]
    given: tuple[TensorSpec, ...]

    @staticmethod
    def of(once: Program, steps: Program, names: Sequence[str], known: Collection[str]) -> PerRequest:
        """``once`` computes the inputs ``names`` of ``steps``; those among ``known`` are given."""
        inputs = {b.name: TensorSpec(b.name, b.type) for _, b in steps.of_kind(BufferKind.input)}
        return PerRequest(
            inputs=tuple(TensorSpec(b.name, b.type) for _, b in once.of_kind(BufferKind.input)),
            results=tuple(inputs[name] for name in names),
            given=tuple(spec for name, spec in inputs.items() if name in known),
        )

    @property
    def asked(self) -> tuple[TensorSpec, ...]:
        """What a caller has to give at the start, each once."""
        return tuple(dict.fromkeys((*self.inputs, *self.given)))

    @property
    def held(self) -> tuple[TensorSpec, ...]:
        """What the request keeps."""
        return (*self.results, *self.given)


@dataclass(frozen=True)
class EngineSpec:
    """Everything that the engine knows about a compiled model; plain data.

    symbols: inclusive range of each dim. largest: sizes that memory is planned for, as ``Program.largest``. outputs: a
    decoder's first one is what its steps return: logits[B, L, V], or the hidden states of a model without a head.
    positions: how position ids default, counted from the past length or over the attended keys of the mask (as OPT
    does). slots, recurrent: what a request keeps between calls.
    per_request: what its steps read unchanged, of a decoder that attends to an encoder.
    speculative_tokens: guesses that a step of one sequence can check beside a token of its own.
    """

    kind: Kind
    device: torch.device
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    symbols: tuple[tuple[str, int, int], ...] = ()
    largest: tuple[Sizes, ...] = ()
    slots: tuple[StateSlot, ...] = ()
    recurrent: tuple[RecurrentSlot, ...] = ()
    vocab_size: int = 0
    max_length: int = 0
    chunk: int = 512
    positions: Literal["past", "mask"] = "past"
    per_request: PerRequest | None = None
    speculative_tokens: int = 0

    @staticmethod
    def of(
        program: Program,
        kind: Kind,
        device: torch.device,
        vocab_size: int = 0,
        chunk: int = 512,
        positions: Literal["past", "mask"] = "past",
        bounds: Mapping[str, tuple[int, int]] | None = None,
        per_request: PerRequest | None = None,
        speculative_tokens: int = 0,
    ) -> EngineSpec:
        """The spec that a model's prefill or forward program implies; ``bounds`` are those of its inputs by name."""

        def specs(of_kind: BufferKind) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(b.name, b.type, (bounds or {}).get(b.name)) for _, b in program.of_kind(of_kind)
            )

        states = specs(BufferKind.state)
        # Keys and values have a place for each position; what else is kept has one size.
        keys = [s for s in states if physical_shape(s.type, program.capacity) != s.type.shape]
        slots = tuple(StateSlot(s.name, int(s.type.shape[1]), int(s.type.shape[3]), s.dtype) for s in keys)
        recurrent = tuple(
            RecurrentSlot(s.name, tuple(map(int, s.type.shape[1:])), s.dtype) for s in states if s not in keys
        )
        return EngineSpec(
            kind=kind,
            device=device,
            inputs=specs(BufferKind.input),
            outputs=specs(BufferKind.output),
            symbols=program.symbols,
            largest=program.largest,
            slots=slots,
            recurrent=recurrent,
            vocab_size=vocab_size,
            max_length=program.capacity,
            chunk=chunk,
            positions=positions,
            per_request=per_request,
            speculative_tokens=speculative_tokens,
        )

    @property
    def is_per_row(self) -> bool:
        """True for an encoder whose tensors have a row per member of one batch: rows do not depend on each other."""
        firsts = {str(t.type.shape[0]) if t.type.shape else "" for t in (*self.inputs, *self.outputs)}
        return self.kind == "encoder" and firsts == {"B"}

    def rows_at_once(self, dims: Sizes) -> int:
        """The largest batch that memory is planned for at the other sizes in ``dims``; 0 where one is too large."""

        def fits(sizes: Sizes) -> bool:
            return all(dims[name] <= high for name, high in sizes.items() if name != "B" and name in dims)

        return max((sizes.get("B", 0) for sizes in self.largest if fits(sizes)), default=0)

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, or None when the program reads none."""
        return next((i for i in self.inputs if i.name == name), None)

    @property
    def prompt_inputs(self) -> tuple[TensorSpec, ...]:
        """What a decoder's prompts say of each token beside its id and position, [B, S, ..]: vectors, which are floats,
        and the last keys that tokens see, which are integers."""
        known = ("input_ids", "position_ids")
        of_tokens = (i for i in self.inputs if [str(d) for d in i.type.shape[:2]] == ["B", "S"])
        return tuple(i for i in of_tokens if i.name not in known) if self.kind == "decoder" else ()

    @property
    def reaches(self) -> tuple[TensorSpec, ...]:
        """Those of ``prompt_inputs`` that say which key is the last that a token sees."""
        return tuple(i for i in self.prompt_inputs if not i.dtype.is_floating_point)

    def has_input(self, name: str) -> bool:
        """True when the program reads an input of that name."""
        return self.input(name) is not None
