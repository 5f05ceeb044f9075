"""What the times of arriving tokens say."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from tilewright.timing import TimedStreamer, Timing


class Recorder:
    def __init__(self) -> None:
        self.got: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.ended = True


def test_rate_leaves_out_the_first_token() -> None:
    timing = Timing(first=0.5, rest=2.0, tokens=5)
    assert timing.tokens_per_second == 2.0
    assert "first after 500 ms" in str(timing)


def test_a_single_token_has_no_rate() -> None:
    assert Timing(first=0.5, rest=0.0, tokens=1).tokens_per_second == 0.0


def test_the_prompt_is_passed_on_and_not_counted() -> None:
    inner = Recorder()
    streamer = TimedStreamer(inner)
    start = time.perf_counter()
    for value in (torch.ones(1, 7), torch.tensor([3]), torch.tensor([4])):
        streamer.put(value)
    streamer.end()
    timing = streamer.timing(start)
    assert timing.tokens == 2
    assert timing.first > 0
    assert timing.rest == pytest.approx(streamer.times[1] - streamer.times[0])
    assert [value.numel() for value in inner.got] == [7, 1, 1]
    assert inner.ended
