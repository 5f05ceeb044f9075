"""The passes in order, each with the reason for its place."""

from __future__ import annotations

from collections.abc import Callable

from tilewright.ir.errors import OptionError
from tilewright.ir.module import Module
from tilewright.ir.verify import verify_module

from .base import Pass, PassOptions
from .canonicalize import canonicalize
from .commute_row_factors import commute_row_factors
from .cse import eliminate_common_subexpressions
from .dce import eliminate_dead_code
from .expose_append import expose_append
from .fold_constants import fold_constants
from .fuse import fuse
from .group_experts import group_experts
from .last_tokens import last_tokens
from .match_attention import match_attention
from .merge_matmuls import merge_matmuls
from .narrow_cache import narrow_cache
from .quantize_weights import quantize_weights
from .round_rows import round_rows
from .specialize import specialize
from .spell_out_experts import spell_out_experts
from .split_attention import split_attention
from .split_products import split_products
from .unmerge_dims import unmerge_dims
from .vendor_matmul import vendor_matmul

PIPELINE: tuple[Pass, ...] = (
    Pass("last_tokens", last_tokens, "first, so that everything after the last layer shrinks with it"),
    Pass(
        "unmerge_dims",
        unmerge_dims,
        "while each view is one step, and dims are still told apart by their sizes",
    ),
    Pass("specialize", specialize, "constants for dims let every later index map simplify"),
    Pass("canonicalize", canonicalize, "one shape per meaning before anything is compared"),
    Pass("cse", eliminate_common_subexpressions, "matmuls can be merged only if their inputs are one value"),
    Pass(
        "match_attention",
        match_attention,
        "equal factors and masks are one value, and no product is rewritten yet",
    ),
    Pass("expose_append", expose_append, "the cache append has to be visible to become an epilogue"),
    Pass("narrow_cache", narrow_cache, "what is appended can be told apart, and is not fused yet"),
    Pass("merge_matmuls", merge_matmuls, "before commuting, so that a shared row factor is moved once"),
    Pass("commute_row_factors", commute_row_factors, "after merging; frees the matmul of its row statistics"),
    Pass("split_attention", split_attention, "before fusion, so that the merge fuses like any other code"),
    Pass("fold_constants", fold_constants, "after merging has made expressions over weights"),
    Pass("quantize_weights", quantize_weights, "of the stacked weights, which products stream"),
    Pass("round_rows", round_rows, "of products that quantize_weights has given integer weights"),
    Pass(
        "split_products",
        split_products,
        "of matrices in their last form; the sum then fuses like any other code",
    ),
    Pass("group_experts", group_experts, "where spell_out_experts is, before it takes what this one leaves"),
    Pass(
        "spell_out_experts",
        spell_out_experts,
        "after folding, which would store transposed weights anew; a lookup in them fuses into its product",
    ),
    Pass("vendor_matmul", vendor_matmul, "once weights have the layout that a product streams"),
    Pass("canonicalize", canonicalize, "the rewrites above leave chains of views and casts"),
    Pass("cse", eliminate_common_subexpressions, "and duplicates"),
    Pass("dce", eliminate_dead_code, "and dead ops"),
    Pass("fuse", fuse, "last: it consumes everything that the others exposed"),
)

PASSES: dict[str, Pass] = {p.name: p for p in PIPELINE}

Hook = Callable[[int, str, Module], None]
"""Called with the running number, the pass's name and the module after it."""


def run_passes(
    module: Module,
    options: PassOptions = PassOptions(),
    passes: tuple[Pass, ...] = PIPELINE,
    hook: Hook | None = None,
    verify: bool = True,
) -> Module:
    """Run passes in order, verifying the module after each one. Raises VerifyError naming the guilty pass."""
    for number, step in enumerate(passes, start=1):
        module = step.run(module, options)
        if verify:
            try:
                verify_module(module)
            except Exception as error:
                error.add_note(f"after pass {number} ({step.name})")
                raise
        if hook is not None:
            hook(number, step.name, module)
    return module


def find_passes(names: list[str]) -> tuple[Pass, ...]:
    """Passes by name. Raises OptionError naming the known ones."""
    if unknown := [n for n in names if n not in PASSES]:
        raise OptionError(f"unknown pass {', '.join(unknown)}; there are: {', '.join(PASSES)}")
    return tuple(PASSES[n] for n in names)
