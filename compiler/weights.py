"""Binds a module's weights: the model's own tensors, and the prepared ones that passes asked for.

A prepared weight that only rearranges parameters (a stack of q, k and v; a transposed matrix) is one new buffer, and
the parameters become views of it: same values, same shapes, held once. Anything else (a product of weights) is
computed once and counted as a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewright.ir.index import IndexMap
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.quantization import Quantize, quantize
from tilewright.ir.reference import Evaluation, join_scope
from tilewright.ir.types import Value, concrete

LARGEST = 32000.0
"""Largest weight that is quantised: the difference of two still fits f16."""


@dataclass(frozen=True)
class BoundWeights:
    """Every weight by absolute name, and the bytes that are held for what.

    shared: the model's own tensors, used as they are. merged: buffers that hold rearranged parameters, which are now
    views of them (no second copy). copied: prepared weights that exist beside the originals. copied_from: addresses of
    the storages of those originals.
    """

    tensors: Mapping[str, Tensor]
    shared_bytes: int
    merged_bytes: int
    copied_bytes: int
    copied_from: frozenset[int]


def bind_weights(
    modules: Iterable[Module],
    tensors: Mapping[str, Tensor],
    used: Iterable[str],
    quantize: Quantize = quantize,
) -> BoundWeights:
    """Compute prepared weights for every call scope of the modules; ``used`` are the names that programs read.
    quantize: see ``Evaluation``.

    The modules are phases of one model, so a prepared weight that several of them name is one weight. Parameters that
    go into a rearranged weight are re-pointed at it; their values do not change.
    """
    bound = dict(tensors)
    wanted_names = frozenset(used)
    merged = copied = 0
    sources: set[str] = set()
    for module, function, scope in _prepared(modules):
        computed = []
        for value in function.returns:
            if (name := join_scope(scope, value.name)) in bound:
                continue
            buffer = _Rearrangement(function, bound, scope, wanted_names).build(value)
            if buffer is None:
                computed.append(value)
                continue
            merged += buffer.nbytes
            bound[name] = buffer
        pruned = _pruned(function, computed)
        sources |= {join_scope(scope, str(op.attr("name"))) for op in pruned.ops if op.opcode == "param"}
        for value, buffer in _compute(module, pruned, scope, bound, quantize):
            copied += buffer.nbytes
            bound[join_scope(scope, value.name)] = buffer
    # Detached, as a parameter that is moved or cast leaves the memory whose address kernels were given.
    wanted = {name: bound[name].detach() for name in wanted_names}
    seen = {t.untyped_storage().data_ptr(): t.nbytes for name, t in wanted.items() if name in tensors}
    originals = frozenset(tensors[name].untyped_storage().data_ptr() for name in sources & set(tensors))
    return BoundWeights(wanted, sum(seen.values()), merged, copied, originals)


def not_quantizable(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of matrices that hold what no code stands for: NaN, infinity, or more than the range of the f16 scales."""
    found = []
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.is_floating_point() and tensor.numel() > 0:
            low, high = (x.item() for x in torch.aminmax(tensor.detach()))
            if not (-LARGEST <= low <= high <= LARGEST):  # NaN compares false
                found.append(name)
    return tuple(found)


def _prepared(modules: Iterable[Module]) -> Iterator[tuple[Module, Function, str]]:
    """Every function that prepares weights, once per scope of the function that uses them."""
    for module in modules:
        for function in module.functions:
            if function.name.endswith(".weights"):
                for scope in _scopes(module, function.name.removesuffix(".weights")):
                    yield module, function, scope


def _pruned(function: Function, values: Sequence[Value]) -> Function:
    """A ``.weights`` function that returns ``values``, with no more ops than they need."""
    needed, ops = set(values), []
    for op in reversed(function.ops):
        if needed & set(op.results):
            needed |= set(op.operands)
            ops.append(op)
    return function.with_ops(reversed(ops), values)


def _compute(
    module: Module, function: Function, scope: str, bound: Mapping[str, Tensor], quantize: Quantize
) -> list[tuple[Value, Tensor]]:
    """Evaluate what a ``.weights`` function returns."""
    if not function.returns:
        return []
    with torch.no_grad():
        results = Evaluation(module, bound, {}, quantize=quantize).call(function, (), scope)
    return [(v, t.contiguous()) for v, t in zip(function.returns, results, strict=True)]


def _scopes(module: Module, function: str) -> list[str]:
    if function == module.entry:
        return [""]
    calls = (op for op in module.main.ops if op.opcode == "call" and op.attr("callee") == function)
    return list(dict.fromkeys(str(op.attr("scope")) for op in calls))


def _permutation(index_map: IndexMap, rank: int) -> tuple[int, ...] | None:
    """Operand dim -> result dim when the map only permutes dims, else None."""
    order = [index_map.symbols.index(e) if e in index_map.symbols else -1 for e in index_map.exprs]
    return tuple(order) if sorted(order) == list(range(rank)) else None


def _permutes(view: Op) -> bool:
    """True for a view that shows its whole operand with dims in another order: a slice may have the same map."""
    whole = view.operands[0].type.numel == view.result.type.numel
    return whole and _permutation(view.attr("map"), view.result.type.rank) is not None


class _Rearrangement:
    """Builds one prepared weight of one scope as a buffer of which its parameters become views."""

    def __init__(
        self, function: Function, tensors: Mapping[str, Tensor], scope: str, used: frozenset[str]
    ) -> None:
        self.used = used
        self.made = function.definitions()
        self.tensors = tensors
        self.scope = scope

    def build(self, value: Value) -> Tensor | None:
        """The buffer, or None when the weight is more than a rearrangement or a parameter cannot be re-pointed."""
        parts = self._parts(value)
        if parts is None or len({id(p) for p in parts}) != len(parts):
            return None
        if any(not isinstance(p, nn.Parameter) or p.dtype != value.dtype.torch for p in parts):
            return None
        standing = self._standing(value)
        return standing if standing is not None else self._fresh(value, parts[0].device)

    def _parts(self, value: Value) -> list[Tensor] | None:
        op = self.made[value]
        if op.opcode == "param":
            return [self.tensors[self._name(op)]]
        below = self.made[op.operands[0]] if op.operands else op
        if op.opcode == "view" and below.opcode == "param" and self._name(below) in self.used:
            return None  # a transposed view of the buffer would not do for a kernel that reads the parameter itself
        simple = op.opcode == "concat" or (op.opcode == "view" and _permutes(op))
        parts = [self._parts(v) for v in op.operands] if simple else [None]
        return None if any(p is None for p in parts) else [t for p in parts for t in p or []]

    def _name(self, op: Op) -> str:
        return join_scope(self.scope, str(op.attr("name")))

    def _standing(self, value: Value) -> Tensor | None:
        """The buffer of an earlier compilation, when the parameters are its views already."""
        first = self.made[value]
        while first.opcode != "param":
            first = self.made[first.operands[0]]
        origin = self.tensors[self._name(first)]
        shape = concrete(value.shape, {})
        size = int(torch.Size(shape).numel())
        if origin.untyped_storage().nbytes() < (origin.storage_offset() + size) * origin.element_size():
            return None
        strides = torch.empty(shape, device="meta").stride()
        candidate = origin.detach().as_strided(shape, strides, origin.storage_offset())
        return candidate if self._matches(value, candidate) else None

    def _matches(self, value: Value, target: Tensor) -> bool:
        """True when every parameter below ``value`` is exactly its part of ``target``."""
        op = self.made[value]
        if op.opcode == "param":
            tensor = self.tensors[self._name(op)]
            same = tensor.data_ptr() == target.data_ptr() and tensor.shape == target.shape
            return same and tensor.stride() == target.stride()
        return all(self._matches(v, part) for v, part in self._split(op, target))

    def _split(self, op: Op, target: Tensor) -> list[tuple[Value, Tensor]]:
        """The part of ``target`` that each operand fills."""
        if op.opcode == "view":
            order = _permutation(op.attr("map"), target.dim())
            assert order is not None
            return [(op.operands[0], target.permute(order))]
        axis, start, parts = op.attr("axis"), 0, []
        for v in op.operands:
            length = concrete(v.shape, {})[axis]
            parts.append((v, target.narrow(axis, start, length)))
            start += length
        return parts

    def _fresh(self, value: Value, device: torch.device) -> Tensor:
        buffer = torch.empty(concrete(value.shape, {}), dtype=value.dtype.torch, device=device)
        self._fill(value, buffer)
        return buffer

    def _fill(self, value: Value, target: Tensor) -> None:
        """Copy the parameters below ``value`` into ``target`` and make them views of it."""
        op = self.made[value]
        if op.opcode == "param":
            parameter = self.tensors[self._name(op)]
            with torch.no_grad():
                target.copy_(parameter)
                parameter.data = target
            return
        for v, part in self._split(op, target):
            self._fill(v, part)
