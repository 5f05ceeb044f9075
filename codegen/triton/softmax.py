"""The softmax of an attention that walks its keys block by block, in two ways.

**Online** (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018): the highest score so far is the
reference of all weights, so each block may have to scale down what was summed before it.

**Agreed** (FlashDecoding++, Hong et al., 2023, "asynchronized softmax with unified maximum value"): every weight is
relative to a number agreed on beforehand, here 0. Blocks then depend on each other by sums alone, and nothing is
reduced across a row before the last block. Where a row's highest score is so far from 0 that its weights could
overflow, or lose digits, the program starts again with the online form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .text import Scope

MASKED, FAR_MASKED, LOWEST = "-1.0e31", "-1.0e38", "-1.0e30"
"""The score of a key that may not be seen, the same where scores are still to be scaled, and what a softmax starts
from: so far above both that the weight is zero."""
LOG2_E = 1.4426950408889634
FARTHEST = 40.0
"""The agreed form holds where all rows have their highest score within this of 0: weights stay between e^-40 and e^40,
and 2^31 of them, times values of up to 10^12, far inside float32."""


@dataclass(frozen=True)
class Sums:
    """Variables of the kernel: the weighted values [BLOCK_M, BLOCK_DV], the reference of the weights and their total,
    both [BLOCK_M, 1], in the float type ``element``. unit: 0, or what scores are still to be multiplied by; the
    reference is then one of powers of two."""

    acc: str
    top: str
    total: str
    element: str
    unit: float = 0.0


Multiply = Callable[[str], str]
"""The product of a block of weights with the block's values."""


def online_step(scope: Scope, sums: Sums, scores: str, multiply: Multiply) -> None:
    """Add a block."""
    top, p, decay = (_scaled if sums.unit else _exact)(scope, sums, scores)
    values = multiply(p)
    scope.line(f"{sums.total} = {sums.total} * {decay} + tl.sum({p}, axis=1, keep_dims=True)")
    scope.line(f"{sums.acc} = {sums.acc} * {decay} + {values}")
    scope.line(f"{sums.top} = {top}")


def _exact(scope: Scope, sums: Sums, scores: str) -> tuple[str, str, str]:
    """The new reference, the block's weights, and what those before are to be multiplied by. A difference of scores is
    exact however large they are."""
    top = scope.bind(f"tl.maximum({sums.top}, tl.max({scores}, axis=1, keep_dims=True))", "new_top")
    p = scope.bind(f"tl.exp2(({scores} - {top}) * {LOG2_E})", "p")
    return top, p, scope.bind(f"tl.exp2(({sums.top} - {top}) * {LOG2_E})", "decay")


def _scaled(scope: Scope, sums: Sums, scores: str) -> tuple[str, str, str]:
    """The same with one multiply-add per score. What is rounded off the reference changes all weights by one factor,
    which cancels: the maximum keeps a compiler from joining its product with a difference, differently each time."""
    factor = repr(LOG2_E * sums.unit)
    top = scope.bind(
        f"tl.maximum({sums.top}, tl.max({scores}, axis=1, keep_dims=True) * {factor})", "new_top"
    )
    p = scope.bind(f"tl.exp2({scores} * {factor} - {top})", "p")
    return top, p, scope.bind(f"tl.exp2({sums.top} - {top})", "decay")


@dataclass(frozen=True)
class AgreedSoftmax:
    """The agreed form in a kernel; ``highest`` and ``weights`` are blocks [BLOCK_M, BLOCK_N], reduced at the end."""

    sums: Sums
    highest: str
    weights: str

    @staticmethod
    def begin(scope: Scope, sums: Sums, shape: str) -> AgreedSoftmax:
        """Start from ``sums`` as they are before any key: a total relative to ``top``."""
        highest, weights = scope.names.fresh("highest"), scope.names.fresh("weights")
        scope.line(f"{sums.total} = {sums.total} * tl.exp2({sums.top} * {LOG2_E})")
        scope.line(f"{highest} = tl.full({shape}, {LOWEST}, {sums.element})")
        scope.line(f"{weights} = tl.zeros({shape}, {sums.element})")
        return AgreedSoftmax(sums, highest, weights)

    def step(self, scope: Scope, scores: str, multiply: Multiply) -> None:
        """Add a block."""
        p = scope.bind(f"tl.exp2({scores} * {LOG2_E})", "p")
        values = multiply(p)
        scope.line(f"{self.highest} = tl.maximum({self.highest}, {scores})")
        scope.line(f"{self.weights} += {p}")
        scope.line(f"{self.sums.acc} += {values}")

    def finish(self, scope: Scope) -> str:
        """Reduce the rows, and make each one's highest score the reference, as in the online form. Gives a scalar that
        is not 0 where that form has to do it again."""
        sums = self.sums
        scope.line(f"{sums.top} = tl.maximum({sums.top}, tl.max({self.highest}, axis=1, keep_dims=True))")
        seen = scope.bind(f"{sums.top} > 0.5 * {LOWEST}", "seen_any")
        factor = scope.bind(f"tl.where({seen}, tl.exp2({sums.top} * {-LOG2_E}), 0.0)", "factor")
        scope.line(
            f"{sums.total} = ({sums.total} + tl.sum({self.weights}, axis=1, keep_dims=True)) * {factor}"
        )
        scope.line(f"{sums.acc} = {sums.acc} * {factor}")
        far = scope.bind(f"{seen} & (tl.abs({sums.top}) > {FARTHEST})", "far")
        return scope.bind(f"tl.max(tl.max({far}.to(tl.int32), axis=1), axis=0)", "again")
