"""The forms that ``options.weights`` names: how a matrix is stored, and how products and lookups read it.

A new form is a row of ``FORMS`` and, where it is neither integers nor f8, a class that offers what ``WeightForm`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from tilewright.ir.module import Loc, Names, Op
from tilewright.ir.types import Value

from .base import PassOptions, Rewriter
from .f8_weights import F8Form
from .integer_weights import GROUP, IntegerForm

Stored = tuple[list[Op], dict[str, Value]]
"""Ops that turn a matrix into what is stored, and what that is by name, in order."""


class WeightForm(Protocol):
    """A way to store a matrix [N, K]. ``stored`` below are the values that a function reads of it. rounds: whether
    products with it may round their rows, as ``options.activation_group`` says."""

    rounds: ClassVar[bool]

    def fits(self, rows: int, columns: int, options: PassOptions) -> bool:
        """Whether the sides of a matrix fit the layout."""

    def store(self, weight: Value, stem: str, names: Names, loc: Loc, options: PassOptions) -> Stored:
        """What happens at load; what is stored is called ``stem`` and something."""

    def read(
        self, rewriter: Rewriter, weight: Value, stored: tuple[Value, ...], options: PassOptions
    ) -> Value:
        """The matrix that is stored, as floats of the type of ``weight``."""

    def multiply(self, rewriter: Rewriter, op: Op, stored: tuple[Value, ...], options: PassOptions) -> None:
        """Put a product that reads what is stored in place of the product ``op``."""


@dataclass(frozen=True)
class Forms:
    """The form of a product's matrix, and that of one that is also a table, of which lookups read rows."""

    matrix: WeightForm
    table: WeightForm


_TABLE = IntegerForm(bits=8, group=GROUP)

FORMS: Mapping[str, Forms] = {
    "int8": Forms(IntegerForm(bits=8, group=None), _TABLE),
    "int4": Forms(IntegerForm(bits=4, group=GROUP), _TABLE),
    "fp8": Forms(F8Form(), F8Form()),
}
