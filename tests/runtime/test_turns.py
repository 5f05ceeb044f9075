"""Turns: fair, re-entrant, and given on when a block raises."""

from __future__ import annotations

import threading
import time

import pytest

from tilewright.runtime.turns import Turns


def test_those_who_wait_come_in_their_order_though_another_asks_again_at_once() -> None:
    turns, order = Turns(), []

    def once(name: str) -> None:
        with turns:
            order.append(name)

    threads = []
    with turns:
        for name in "abc":
            threads.append(threading.Thread(target=once, args=(name,)))
            threads[-1].start()
            while len(turns._asked) < 1 + len(threads):  # until it has asked
                time.sleep(0.001)
    with turns:  # who asks anew is behind those who waited
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c", "again"]


def test_a_turn_may_be_taken_within_itself_and_ends_with_an_exception() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns, turns:
        raise KeyError
    other = threading.Thread(target=turns.__enter__)
    other.start()
    other.join(timeout=5)
    assert not other.is_alive()


def test_who_is_interrupted_while_waiting_gives_the_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(turns._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.__enter__()
    with turns:
        pass
