"""What a prompt may be that a step is not: vectors instead of token ids, at positions of several numbers, seeing ahead.

    main(%input_ids, %position_ids):               prompt: main(%inputs_embeds, %position_ids, %deepstack_0):
      %x = gather %table, %input_ids @ "embed"               %y = call %inputs_embeds {scope = "layers.0"}
      %y = call %x {scope = "layers.0"}                      %z = add %y, %deepstack_0
      %z = call %y {scope = "layers.1"}        =>            %0 = call %z {scope = "layers.1"}

                                                   step:   main(%input_ids, %position_ids_0):
      %position_ids : [3, B, S]                              %position_ids = view %position_ids_0 : [3, B, S]

The vectors of a prompt with images come from elsewhere, and so do those of its texts; where images have vectors for
later layers, too, those of texts are zeros. A step is one token of text, the numbers of whose position are equal.
Where tokens of an image see each other, causal attention reads the last key that each query sees, an input for all of
one window:

    %y = attention %q, %k, %v {causal, window = 8}    =>    %y = attention %q, %k, %v, %reach_8 {causal, window = 8}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tilewright.ir.index import IndexMap, index_symbols
from tilewright.ir.module import Function, Module, Names, Op, make_attrs
from tilewright.ir.types import DType, TensorType, Value

from .base import PassOptions, Rewriter, parameters_first
from .dce import eliminate_dead_code

IDS, VECTORS, POSITIONS = "input_ids", "inputs_embeds", "position_ids"
DEEP, REACH = "deepstack_", "reach_"


def prompt_of_vectors(module: Module, embedding: str, deep_layers: Sequence[str] = ()) -> Module | None:
    """The module with an input ``inputs_embeds`` instead of what the model's module at the path ``embedding`` gives,
    and inputs ``deepstack_0``, ``..._1`` that are added to the results of the layers at the paths ``deep_layers``.

    None where token ids are used otherwise, too (then vectors do not say all of a prompt), or a layer is no call.
    """
    main = module.main
    inside = {v for op in main.ops if f"{op.loc.module}.".startswith(f"{embedding}.") for v in op.results}
    used = {v for op in main.ops if not inside.issuperset(op.results) for v in op.operands} & inside
    used -= {v for op in main.ops if op.opcode == "param" for v in op.results}
    if len(used) != 1:
        return None
    (vectors,) = used
    given = Value(VECTORS, vectors.type)
    kept = main.substitute({vectors: given})
    shorter = eliminate_dead_code(_with_main(module, kept), PassOptions())
    if any(p.name == IDS and p in op.operands for op in shorter.main.ops for p in main.params):
        return None
    params = tuple(given if p.name == IDS else p for p in main.params)
    return _added_behind(_with_main(shorter, replace(shorter.main, params=params)), deep_layers)


def _added_behind(module: Module, layers: Sequence[str]) -> Module | None:
    """An input for each of the calls with these scopes, added to its result; None where one is not there."""
    rewriter, added = Rewriter(module.main), {}
    for op in rewriter:
        rewriter.keep(op)
        if op.opcode == "call" and op.attr("scope") in layers and len(op.results) == 1:
            place = layers.index(op.attr("scope"))
            added[place] = Value(f"{DEEP}{place}", op.result.type)
            rewriter.replace(op.result, rewriter.add("add", op.result, added[place]))
    if len(added) < len(layers):
        return None
    ops = tuple(rewriter.ops)
    returns = tuple(rewriter.table.get(v, v) for v in module.main.returns)
    params = (*module.main.params, *(added[n] for n in sorted(added)))
    return _with_main(module, replace(module.main, params=params, ops=ops, returns=returns))


def seeing_ahead(module: Module) -> Module:
    """The module whose attention over the request's keys has ``reach`` from an input i64[B, S] of the main function,
    ``reach_0`` where it has no window, else ``reach_<window>``."""
    functions = {f.name: _with_reach(f) for f in module.functions}
    taken = {name: [p for p in f.params if p.name.startswith(REACH)] for name, f in functions.items()}
    main = functions[module.entry]
    ops, own = [], {p.name: p for p in taken[module.entry]}
    for op in main.ops:
        more = taken[op.attr("callee")] if op.opcode == "call" else []
        own |= {p.name: p for p in more if p.name not in own}
        ops.append(replace(op, operands=(*op.operands, *(own[p.name] for p in more))))
    new = (p for p in own.values() if p not in main.params)
    functions[module.entry] = replace(main, params=(*main.params, *new), ops=tuple(ops))
    return module.with_functions(functions.values())


def _with_reach(function: Function) -> Function:
    """A function with a parameter for each window that its attention has."""
    ops, params = [], dict[str, Value]()
    for op in function.ops:
        if op.opcode == "attention" and op.attr("slot") and op.attr("causal"):
            q = op.operands[0]
            name = f"{REACH}{op.attr('window')}"
            reach = params.setdefault(name, Value(name, TensorType(DType.i64, (q.shape[0], q.shape[2]))))
            extras = (*op.attr("extras", ()), "reach")
            op = replace(op.with_attrs(extras=extras), operands=(*op.operands, reach))
        ops.append(op)
    return replace(function, params=(*function.params, *params.values()), ops=tuple(ops))


def step_of_tokens(module: Module) -> Module:
    """The module with positions [B, S], each of which stands for all numbers of a position."""
    main = module.main
    several = next((p for p in main.params if p.name == POSITIONS and p.type.rank == 3), None)
    if several is None:
        return module
    same = Value(POSITIONS, TensorType(several.dtype, several.shape[1:]))
    inner = Value(Names.of(main).fresh(POSITIONS), several.type)
    index = IndexMap(3, index_symbols(3)[1:])
    view = Op("view", (same,), make_attrs({"map": index}), (inner,))
    rest = main.substitute({several: inner})
    params = tuple(same if p == several else p for p in main.params)
    return _with_main(module, replace(rest, params=params, ops=tuple(parameters_first([view, *rest.ops]))))


def _with_main(module: Module, main: Function) -> Module:
    return module.with_functions(main if f.name == main.name else f for f in module.functions)
