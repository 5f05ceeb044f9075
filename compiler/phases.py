"""The programs that a model needs: one per decode bucket and prefill, in the ways that may be measured, or forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from tilewright.codegen.tunables import Tunables
from tilewright.ir.module import Module
from tilewright.ir.program import Program
from tilewright.passes.base import PassOptions
from tilewright.passes.hoist_per_request import hoist_per_request
from tilewright.passes.pipeline import run_passes
from tilewright.passes.plan_memory import plan_memory
from tilewright.passes.prompt_inputs import prompt_of_vectors, seeing_ahead, step_of_tokens
from tilewright.passes.weight_forms import FORMS

from .backends import (
    ACTIVATION_GROUP,
    GROUP_EXPERTS,
    PLAIN_ROWS,
    ROUNDED_ROWS,
    ROW_BLOCK,
    SPELL_OUT_EXPERTS,
    SPLITS,
    measures,
)
from .capture import CapturedFacts, capture
from .estimates import estimates, gpu
from .lower import lower
from .options import Options
from .report import PhaseReport

VERIFY = "verify"
"""The phase of steps that run several tokens of one sequence, of which all but the first are guesses."""
PER_REQUEST = "per_request"
"""The phase of what a decoder computes of an encoder's states, once per request: keys and values of cross-attention."""

TOKENS_OF_FORWARD, LEAST_LENGTH = 2048, 16
"""Tokens that an encoder runs at once at least, of all its sequences together; shorter sequences count as of the least
length."""


@dataclass(frozen=True)
class Phase:
    """One program to build: its name, and what the passes have to know."""

    name: str
    phase: str
    batch: int
    passes: PassOptions
    ranges: Mapping[str, tuple[int, int]]
    together: tuple[Mapping[str, int], ...] = ()

    @property
    def rows(self) -> int:
        """Tokens of all sequences in a step; 0 where that is known at run time only."""
        fixed = dict(self.passes.fixed)
        return fixed.get("B", 0) * fixed.get("S", 0)

    def plan(self, module: Module, capacity: int) -> Program:
        """The program of what the passes have made."""
        return plan_memory(module, self.name, self.phase, self.batch, capacity, self.together)


@dataclass(frozen=True)
class Parts:
    """A lowered model, less what depends on nothing but what is known at a request's start: that is ``per_request``,
    whose results are the inputs ``names`` of ``steps``. ``prompt`` is what runs prompts where these are vectors."""

    steps: Module
    per_request: Module | None = None
    names: tuple[str, ...] = ()
    prompt: Module | None = None

    @staticmethod
    def of(captured: CapturedFacts, lowered: Module) -> Parts:
        hoisted = hoist_per_request(lowered, captured.per_request)
        if hoisted is not None:
            return Parts(hoisted.steps, hoisted.once, hoisted.names)
        prompt = None
        if (given := captured.vectors) is not None:
            prompt = prompt_of_vectors(lowered, given.embedding, given.deep_layers)
            if prompt is not None and given.sees_ahead:
                prompt = seeing_ahead(prompt)
        return Parts(step_of_tokens(lowered), prompt=prompt)

    def module(self, phase: Phase) -> Module:
        """The module that a phase's program is made of, with the sizes that the program is for."""
        part = self.steps
        if phase.phase == PER_REQUEST:
            assert self.per_request is not None
            part = self.per_request
        elif phase.phase == "prefill" and self.prompt is not None:
            part = self.prompt
        return part.with_symbols(**phase.ranges)


def phases_of(
    captured: CapturedFacts, lowered: Module, options: Options, states: tuple[int, int] = (1, 1)
) -> list[Phase]:
    """The programs of a model: one decode program per batch size, one that checks guesses where that is asked for, what
    a request computes once, and prefill; or forward alone.

    ``states``: how many states of an encoder a decoder can attend to. Prefill comes last, in the ways that may be
    measured.
    """
    spelled = PassOptions(spell_out_experts=SPELL_OUT_EXPERTS[options.backend])
    grouped = replace(
        spelled,
        group_experts=GROUP_EXPERTS[options.backend],
        plain_rows=PLAIN_ROWS[options.backend],
        plain_weights=PLAIN_ROWS[options.backend],
    )
    if captured.kind != "decoder":
        return [_forward(captured, lowered, options, grouped)]
    context = {"T": (1, options.max_length)}
    steps = replace(
        spelled,
        last_tokens=True,
        kv_cache=options.kv_cache,
        splits=SPLITS[options.backend],
        multiprocessors=gpu(options.device).multiprocessors if options.backend == "triton" else 0,
    )
    once: list[Phase] = []
    if captured.per_request:
        context["E"] = states
        ranges = {"B": (1, options.max_batch), "E": states}
        once = [Phase(PER_REQUEST, PER_REQUEST, options.max_batch, grouped, ranges)]

    def step(name: str, phase: str, batch: int, tokens: int) -> Phase:
        fixed = (("B", batch), ("S", tokens), ("L", tokens))
        # A context is at least as long as what is new of it.
        ranges = context | {"S": (tokens, tokens), "T": (tokens, max(tokens, options.max_length))}
        return Phase(name, phase, batch, replace(steps, fixed=fixed), ranges)

    several = (
        [step("verify", VERIFY, 1, options.speculative_tokens + 1)] if options.speculative_tokens else []
    )
    decode = [*(step(f"decode_b{n}", "decode", n, 1) for n in options.batch_sizes), *several]
    wide = context | {"B": (1, options.max_batch), "S": (1, options.chunk)}
    passes = replace(grouped, last_tokens=True, kv_cache=options.kv_cache)
    ours = Phase("prefill", "prefill", options.max_batch, passes, wide)
    vendor = replace(ours, name="prefill_vendor", passes=replace(ours.passes, vendor_matmul=True))
    # The vendor's library knows no quantised weights.
    if options.autotune == "off" or options.weights or not measures(options):
        return [*decode, *once, ours]
    return [*decode, *once, ours, vendor]


def _forward(captured: CapturedFacts, lowered: Module, options: Options, passes: PassOptions) -> Phase:
    """The only program of a model without KV state.

    An encoder takes many short rows, or few long ones: as many as make the largest batch at full length, or
    ``TOKENS_OF_FORWARD`` tokens.
    """
    known = {name: (low, high) for name, low, high in lowered.symbols}
    batches: list[str] = [name for name in ("B", "I") if name in known and captured.kind == "encoder"]
    ranges: dict[str, tuple[int, int]] = dict.fromkeys(batches, (1, options.max_batch))
    together: list[dict[str, int]] = []
    length = min(known["S"][1], options.max_length) if "S" in known else 0
    if length:
        ranges["S"] = (1, length)
    if length and batches == ["B"]:
        tokens = max(options.max_batch * length, TOKENS_OF_FORWARD)
        rows = max(options.max_batch, tokens // length)
        while rows <= tokens // LEAST_LENGTH or not together:
            together.append({"B": rows, "S": min(length, tokens // rows)})
            rows *= 2
        ranges["B"] = (1, together[-1]["B"])
    elif batches == ["B"]:
        ranges["B"] = (1, max(options.max_batch, TOKENS_OF_FORWARD // _positions(lowered)))
    return Phase("forward", "forward", options.max_batch, passes, ranges, tuple(together))


def _positions(module: Module) -> int:
    """The most positions, such as patches of an image, of a row of a module that has no dim for them."""
    shapes = (v.shape[1:] for op in module.main.ops for v in op.results if v.type.rank == 3)
    return max((int(min(s)) for s in shapes if all(d.is_Integer for d in s)), default=TOKENS_OF_FORWARD)


def rounded_rows(backend: str, weights: str, rows: int) -> str:
    """Which products of a step of ``rows`` tokens read rows that are rounded before, as ``PassOptions`` has it.

    weights: as of ``compile``, and such that rows may be rounded.
    """
    every, of_bytes = ROUNDED_ROWS[backend]
    if 1 < rows <= every:
        return "all"
    return "bytes" if weights == "int8" and 1 < rows <= of_bytes else ""


def quantized_phases(phases: list[Phase], options: Options, keep_wide: tuple[str, ...]) -> list[Phase]:
    """The phases with quantised weights. Where many rows share a weight, time goes into arithmetic on floats, so only
    decode steps round their activations."""

    def quantized(phase: Phase) -> PassOptions:
        group = ACTIVATION_GROUP[options.backend] if phase.rows else 0
        rounds = bool(group) and FORMS[options.weights].matrix.rounds
        rounded = rounded_rows(options.backend, options.weights, phase.rows) if rounds else ""
        return replace(
            phase.passes,
            weights=options.weights,
            row_block=ROW_BLOCK[options.backend],
            activation_group=group,
            round_rows=rounded,
            plain_rows=phase.passes.plain_rows or bool(rounded),
            keep_wide=keep_wide,
        )

    return [replace(phase, passes=quantized(phase)) for phase in phases]


def plan_programs(model: nn.Module, options: Options) -> list[Program]:
    """The programs that ``compile`` would build, from the shapes of a model alone: no weight is read.

    A weight that cannot be quantised (it holds a NaN, say) is taken for one that can, and an encoder for one that gives
    up to ``max_length`` states; its own programs are not among these. Raises CaptureError,
    LoweringError.
    """
    captured = capture(model)
    lowered = lower(captured)
    phases = phases_of(captured, lowered, options, (1, options.max_length))
    if options.weights:
        phases = quantized_phases(phases, options, ())
    parts = Parts.of(captured, lowered)
    modules = [run_passes(parts.module(phase), phase.passes) for phase in phases]
    return [phase.plan(module, options.max_length) for module, phase in zip(modules, phases, strict=True)]


def rival_phases(phases: list[Phase]) -> list[int]:
    """Numbers of the phases that are candidates for the prefill program, of which a model needs one."""
    return [n for n, phase in enumerate(phases) if phase.phase == "prefill"]


def without_losers(phases: list[Phase], chosen: int) -> list[int]:
    """Numbers of the phases that stay when ``chosen`` has won among the rivals."""
    losers = set(rival_phases(phases)) - {chosen}
    return [n for n in range(len(phases)) if n not in losers]


def report_dims(program: Program, options: Options) -> dict[str, int]:
    """Sizes that the report counts for: a decode step at a context of 512, one chunk of a prompt, or all of it."""
    highs = {name: high for name, _, high in program.symbols}
    context = min(512, options.max_length)
    if tokens := program.step_tokens:
        sizes = {"B": program.batch, "S": tokens, "L": tokens, "T": context}
        return sizes | {"E": min(context, highs["E"])} if "E" in highs else sizes
    sizes = {"B": 1, "I": 1, "S": context, "T": context, "L": 1, "E": context}
    return {name: min(size, highs[name]) for name, size in sizes.items() if name in highs}


def phase_report(
    program: Program, dims: Mapping[str, int], options: Options, tunables: Tunables
) -> PhaseReport:
    """What a run at the sizes ``dims`` costs, with the cost model's estimates where the backend has one."""
    if options.backend != "triton":
        return PhaseReport.of(program, dims)
    device = gpu(options.device)
    return PhaseReport.of(program, dims, device.name, estimates(program, dims, device, tunables))
