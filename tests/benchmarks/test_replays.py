"""Times of kernels that overlap, from when each of them ended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks.replays import by_kernel, kernel_ends

NAMES = ["first", "layer", "layer", "last"]


def _ends(runs: int, slow: int = 0) -> list[tuple[str, float]]:
    """Kernels that take 1, 2, 2 and 4 seconds; in the run ``slow`` the last one takes 10 more."""
    now, ends = 0.0, []
    for run in range(runs):
        for name, seconds in zip(NAMES, (1, 2, 2, 4), strict=True):
            now += seconds + (10 if name == "last" and run == slow else 0)
            ends.append((name, now))
    return ends


def test_each_kernel_takes_from_the_end_of_the_one_before() -> None:
    """In whatever order the profiler tells them; one slow run does not count."""
    expected = {"first": 1.0, "layer": 2.0, "last": 4.0}
    assert by_kernel(NAMES, _ends(3)) == expected
    assert by_kernel(NAMES, list(reversed(_ends(3)))) == expected


def test_other_kernels_than_the_programs_are_refused() -> None:
    """A run that was cut off, or kernels of somebody else, would shift all times."""
    ends = _ends(3)
    for wrong in (
        ends[:-1],
        [*ends, ("first", 99.0)],
        [("other", end) if n == 5 else (name, end) for n, (name, end) in enumerate(ends)],
        [],
    ):
        with pytest.raises(ValueError, match="other kernels"):
            by_kernel(NAMES, wrong)


def test_kernels_of_the_program_are_picked_from_the_profilers_events() -> None:
    """Each event has an object of its own for its kind of device, as the profiler makes them."""

    def event(name: str, kind: int, end: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=DeviceType(kind), time_range=SimpleNamespace(end=end))

    cpu, cuda = (int(kind.value) for kind in (DeviceType.CPU, DeviceType.CUDA))
    events = [
        event("first", cuda, 1e6),
        event("first", cpu, 2e6),
        event("copy", cuda, 3e6),
        event("last", cuda, 4e6),
    ]
    assert kernel_ends(events, NAMES) == [("first", 1.0), ("last", 4.0)]
