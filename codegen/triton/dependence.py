"""Programmatic dependent launch: a kernel begins while its predecessor ends (Hopper and later).

A kernel lets its successor start as soon as all of its own programs run, and waits, before it touches what another
kernel wrote, until its predecessor has ended and its writes can be seen. As every kernel waits, what came before the
predecessor has ended too. Between start and wait lies what depends on no other kernel: indices, and requests for the
first weights, which are then on their way to the second-level cache while the predecessor drains. (CUDA programming
guide, "Programmatic Dependent Launch and Synchronization".)

More than the first block of each program gains nothing: products keep memory busy until they end, so what is requested
for the next kernel is taken from the present one. (Measured on an H100: of what an attention gained by requests for its
keys and values, the product before it lost as much, and with 8 to 24 MB of the next weights requested, by programs of
either kernel, steps of Llama2-7B took 3 to 7% longer.)
"""

from __future__ import annotations

from .text import Scope

LINE = 128
"""Bytes of a line of the second-level cache."""


def wait_for_predecessor(scope: Scope) -> None:
    scope.line("tl.extra.cuda.gdc_launch_dependents()")
    scope.line("tl.extra.cuda.gdc_wait()")


def request(scope: Scope, pointers: str) -> None:
    """Ask for the lines at a block of addresses, without waiting for them."""
    assembly = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    scope.line(
        f'tl.inline_asm_elementwise("{assembly}", "=r,l", [{pointers}], dtype=tl.int32, is_pure=False, pack=1)'
    )
