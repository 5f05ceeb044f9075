"""How recordings are made, with pretended graphs and streams in place of CUDA's."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tilewright.runtime import cuda_graph
from tilewright.runtime.cuda_graph import record

CPU = torch.device("cpu")


class _Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_stream(self, other: _Stream) -> None:
        pass


class _Graph:
    """Numbers the pools of its own that a graph has; ``made`` lists all graphs."""

    made: list[_Graph]
    replayed: _Graph

    def __init__(self) -> None:
        self.shared: int | None = None
        _Graph.made.append(self)

    def capture_begin(self, pool: int | None, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.shared = pool
        self.own = len(_Graph.made) if pool is None else pool

    def capture_end(self) -> None:
        pass

    def pool(self) -> int:
        return self.own

    def replay(self) -> None:
        _Graph.replayed = self


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> list[_Stream]:
    """Two streams; the caller is on the first one of the list."""
    found = [_Stream(), _Stream()]
    _Graph.made = []
    monkeypatch.setattr(cuda_graph, "_places", {})
    monkeypatch.setattr(cuda_graph, "_failed", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: found[0])
    return found


def recorded(launches: Callable[[], None] = lambda: None) -> _Graph:
    """The graph of a recording."""
    replay = record(launches, CPU)
    assert replay is not None
    replay()
    return _Graph.replayed


def test_recordings_for_one_stream_share_their_memory(streams: list[_Stream]) -> None:
    """A request after the other takes no more of the GPU; what other streams replay meanwhile lies elsewhere."""
    first, second = recorded(), recorded()
    streams.reverse()
    other = recorded()
    assert first.shared is not None
    assert first.shared == second.shared != other.shared
    assert other.shared is not None


def test_a_recording_that_broke_off_leaves_its_memory_to_no_other() -> None:
    def broken() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    before = recorded()
    with pytest.warns(UserWarning, match="no CUDA graph, operation not permitted"):
        assert record(broken, CPU) is None
    assert cuda_graph._failed == [_Graph.made[-1]]
    assert recorded().shared != before.shared


def test_no_garbage_is_collected_while_recording() -> None:
    """A kernel that is unloaded by the way would break the recording off."""
    seen: list[bool] = []
    recorded(lambda: seen.append(gc.isenabled()))
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        recorded()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_memory_of_recordings_is_that_of_their_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pools (PyTorch's own, another library's recordings) do not count."""
    keepers = [SimpleNamespace(keeper=SimpleNamespace(pool=lambda n=n: (0, n))) for n in (3, 4)]
    monkeypatch.setattr(cuda_graph, "_places", {})
    assert cuda_graph.recorded_bytes() == 0
    monkeypatch.setattr(cuda_graph, "_places", dict(enumerate(keepers)))
    segments = [{"segment_pool_id": [0, n], "total_size": 10**n} for n in (0, 3, 4, 5)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert cuda_graph.recorded_bytes() == 11000
