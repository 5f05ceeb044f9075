"""Triton's interpreter in less than half of its time, with the same results: for processes that only interpret.

Of every integer sum and product it works out in 64 bits whether it overflowed, which only its debug mode looks at; and
around every call of every helper it replaces the functions of triton.language by its own, and puts them back. Here the
first is left out, and the second happens once. A version of Triton that is built otherwise stays as it is.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any


def hurry() -> None:
    """To be called with TRITON_INTERPRET=1 in the environment, before the first kernel."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "interpreter_builder"):
        options = interpreter.interpreter_builder.options
        if hasattr(options, "sanitize_overflow") and not options.debug:
            interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    if not hasattr(interpreter, "_patch_lang"):
        return
    replaced, patch = set(), interpreter._patch_lang

    def patch_once(function: Any) -> _Kept:
        """As the interpreter does, for modules of the language that a function sees and that none has seen before."""
        seen = {id(v) for v in function.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)}
        if not seen <= replaced:
            patch(function)
            replaced.update(seen)
        return _Kept()

    interpreter._patch_lang = patch_once


class _Kept:
    """In place of what would put the functions back."""

    def restore(self) -> None:
        pass
