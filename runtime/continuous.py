"""Continuous batching: requests that come at any time take their decode steps together.

A decode step reads every weight, for one sequence or for eight, so steps that are shared cost little more than one. One
thread computes: between two steps it runs a piece of the prompt of a request that waits, which joins the others once
its prompt is done; a sequence that ends leaves at once. A prompt that begins like a sequence that has been run is not
computed that far (``prefix_cache.py``). (Yu et al., "Orca: A Distributed Serving System for
Transformer-Based Generative Models", 2022; pieces of prompts between steps: Agrawal et al., "SARATHI", 2023.)
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from .device import is_out_of_memory
from .engine import Engine, Pieces
from .generate import check_room
from .joined_rows import JoinedRows
from .kv_state import RequestState
from .prefix_cache import PrefixCache
from .row_chooser import RowChooser
from .sampling import own_generator
from .sequence import Sequence
from .turns import Turns

DEFAULT_PREFIX_BYTES = 1 << 30
"""1 GiB: in bfloat16 2,048 tokens of Llama2-7B, or 46,000 of SmolLM2-135M."""


class ContinuousBatch:
    """Decodes the sequences that are handed to :meth:`submit` from any thread, in a thread of its own.

    At most ``engine.max_batch`` at a time; others wait. Sets ``engine.turns``, so that whatever else runs steps of this
    engine does so between two of its. threads: how many of PyTorch's the thread uses. prefix_bytes: memory for what
    sequences that ended leave to prompts that begin alike.
    """

    def __init__(
        self, engine: Engine, threads: int | None = None, prefix_bytes: int = DEFAULT_PREFIX_BYTES
    ) -> None:
        self.engine = engine
        self.engine.turns = self._turns = Turns()
        self.prefixes = PrefixCache(engine, prefix_bytes)
        engine.idle.others.append(self.prefixes.clear)
        self._rows = JoinedRows(engine)
        self._running: list[Sequence] = []  # by row
        self._choosers: dict[int, RowChooser] = {}
        self._prompt: tuple[Sequence, Pieces] | None = None
        self._waiting: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = threads or torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="tilewright-batch", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> Future[Tensor]:
        """Have a sequence decoded. The result is i64[1, n], prompt included.

        Raises InputError where prompt and what is to come do not fit. An exception of its streamer ends it and is that
        of the future.
        """
        begun = 0 if sequence.state is None else sequence.state.length - sequence.ids.shape[1]
        sequence.position_ids = check_room(
            self.engine, sequence.ids, sequence.options, begun, sequence.position_ids
        )
        if sequence.options.sampling is not None and sequence.generator is None:
            sequence.generator = own_generator(sequence.ids.device)
        with self._changed:
            if self._closed:
                raise RuntimeError("this batch is closed")
            self._waiting.append(sequence)
            self._changed.notify()
        return sequence.done

    def close(self) -> None:
        """End: what has not come to its end by itself fails. The engine's steps wait for nothing any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.engine.turns = nullcontext()
        if self.prefixes.clear in self.engine.idle.others:
            self.engine.idle.others.remove(self.prefixes.clear)

    # In the thread

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.no_grad():
            while self._wait():
                with self._turns:
                    self._round()
        self._end()

    def _wait(self) -> bool:
        """Wait for something to do. False when the batch is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running or self._prompt)
            return not self._closed

    def _round(self) -> None:
        """A piece of a prompt, where there is room for its sequence, and a step of those that run."""
        if self._prompt is None and self._waiting and len(self._running) < self.engine.max_batch:
            self._begin(self._waiting.popleft())
        if self._prompt is not None:
            self._go_on(*self._prompt)
        if self._running:
            with _failing(*self._running):
                self._step()
            if any(sequence.done.done() for sequence in self._running):  # the step failed
                self._running = []
                self._rows.clear()
                self.engine.idle.make_room()  # it may have been for memory

    def _begin(self, sequence: Sequence) -> None:
        """Make a sequence the one whose prompt is run, if it can be."""
        if not sequence.done.set_running_or_notify_cancel():
            sequence.moved()
            return
        with _failing(sequence):
            if sequence.logits is None:
                sequence.state = state = self.engine.new_state(1)
                sequence.moved = functools.partial(self.engine.give_back, state)
                if sequence.is_plain:
                    self._take_prefix(sequence, state)
            self._prompt = sequence, self._pieces(sequence)

    def _take_prefix(self, sequence: Sequence, state: RequestState) -> None:
        """Copy what is known of the beginning of a prompt into its empty state."""
        running = [
            other.known(self._rows.lengths[row], functools.partial(self._rows.parts, row))
            for row, other in enumerate(self._running)
            if other.is_plain
        ]
        prompt = sequence.known(sequence.length, dict)
        self.prefixes.begin(state, prompt.tokens, prompt.weights, running)

    def _pieces(self, sequence: Sequence) -> Pieces:
        """What is left to run of a prompt."""
        if sequence.logits is not None:
            return _done(sequence.logits)
        assert sequence.state is not None
        held, positions = sequence.state.length, sequence.position_ids
        positions = None if positions is None else positions[..., held:]
        return self.engine.prompt(sequence.state, sequence.ids[:, held:], positions)

    def _go_on(self, sequence: Sequence, pieces: Pieces) -> None:
        """Run a piece of a prompt; at its end choose the first token and join the others."""
        with _failing(sequence):
            try:
                next(pieces)
                return
            except StopIteration as end:
                logits = end.value
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self.engine.idle.make_room():
                    raise
                # From its beginning, where the state is again.
                self._prompt = sequence, self._pieces(sequence)
                return
            state = sequence.state
            assert state is not None
            (token,) = RowChooser(logits).choose([sequence.choice])
            if sequence.take(token):
                self._keep(sequence, state.length, functools.partial(state.row, 0, 0, state.length))
                sequence.finish()
            else:
                self._rows.join(state)
                self._running.append(sequence)
        self._prompt = None
        sequence.moved()

    def _keep(self, sequence: Sequence, length: int, parts: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep what is held of a sequence that ends, for prompts that begin alike."""
        if sequence.is_plain:
            self.prefixes.keep(sequence.known(length, parts))

    def _step(self) -> None:
        logits = self._rows.step([sequence.tokens[-1] for sequence in self._running])
        tokens = self._chooser(logits).choose([sequence.choice for sequence in self._running])
        # From the last one on: the last row, which takes the place of one that leaves, has been told then.
        for row in reversed(range(len(tokens))):
            sequence = self._running[row]
            with _failing(sequence):
                if sequence.take(tokens[row]):
                    sequence.finish()
            if sequence.done.done():
                self._keep(sequence, self._rows.lengths[row], functools.partial(self._rows.parts, row))
                self._rows.leave(row)
                self._running[row] = self._running[-1]
                self._running.pop()

    def _chooser(self, logits: Tensor) -> RowChooser:
        found = self._choosers.get(len(logits))
        if found is None or found.logits is not logits:
            found = self._choosers[len(logits)] = RowChooser(logits)
        return found

    def _end(self) -> None:
        """Fail whatever has not come to its end, and let go of the memory."""
        prompted = [] if self._prompt is None else [self._prompt[0]]
        for sequence in (*self._running, *prompted, *self._waiting):
            with _failing(sequence):
                raise RuntimeError("the batch was closed")
        if self._prompt is not None:
            sequence, pieces = self._prompt
            pieces.close()  # which leaves the state as it was, before another request may have it
            sequence.moved()
        self._running, self._prompt = [], None
        self._choosers.clear()
        self._rows.clear()
        self.prefixes.clear()


@contextmanager
def _failing(*sequences: Sequence) -> Iterator[None]:
    """Any exception in the block is one of these sequences, which are over then, and of no others."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - whatever it is, those who wait are told
        for sequence in sequences:
            if not sequence.done.done():
                sequence.done.set_exception(error)


def _done(logits: Tensor) -> Pieces:
    """The pieces that are left of a prompt that has been run: none."""
    yield from ()
    return logits
