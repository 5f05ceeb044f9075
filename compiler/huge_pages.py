"""Asks Linux to hold weights in huge pages, so that streaming them does not wait for address translation.

A decode step reads every weight once, in order. With pages of 4 KiB each of them costs a look-up, which in a virtual
machine walks two page tables; a page of 2 MiB costs one look-up for 512 times as much.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

HUGE_PAGE = 2 << 20
_ADVISE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, which Linux has since 6.1


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Move the memory behind CPU tensors into huge pages where the system allows it; elsewhere nothing happens.

    Contents and addresses stay. Ranges are rounded to whole pages, so small tensors that lie side by side gain too.
    """
    if sys.platform != "linux":
        return
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _ranges(t for t in tensors if t.device.type == "cpu"):
        madvise(start, end - start, _ADVISE)
        madvise(start, end - start, _COLLAPSE)


def _ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Address ranges in whole huge pages, joined where they touch."""
    spans = sorted(
        (t.data_ptr() // HUGE_PAGE * HUGE_PAGE, -(-(t.data_ptr() + t.nbytes) // HUGE_PAGE) * HUGE_PAGE)
        for t in tensors
        if t.nbytes
    )
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined
