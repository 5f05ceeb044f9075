"""Building the ops of a function: values are named, and types inferred, as they are added."""

from __future__ import annotations

from .errors import VerifyError
from .module import Attr, Loc, Module, Names, Op, make_attrs
from .ops import infer_types
from .types import DType, TensorType, Value


class Builder:
    """A list of ops that grows. ``loc`` is that of all which are given none.

    >>> b = Builder()
    >>> x = b.param_value("x", tensor_type("f32", ["B", 4]))
    >>> y = b.add("mul", x, x)
    """

    def __init__(self, names: Names | None = None, loc: Loc = Loc()) -> None:
        self.names = Names() if names is None else names
        self.ops: list[Op] = []
        self.params: list[Value] = []
        self.loc = loc

    def param_value(self, name: str, type: TensorType) -> Value:
        """Declare a function parameter."""
        value = Value(self.names.fresh(name), type)
        self.params.append(value)
        return value

    def add(
        self,
        opcode: str,
        *operands: Value,
        type: TensorType | None = None,
        hint: str = "",
        loc: Loc | None = None,
        **attrs: Attr,
    ) -> Value:
        """Append an op with one result and give that result. ``type`` is needed where it cannot be inferred."""
        types = None if type is None else (type,)
        (value,) = self.add_multi(opcode, *operands, types=types, hint=hint, loc=loc, **attrs)
        return value

    def add_multi(
        self,
        opcode: str,
        *operands: Value,
        types: tuple[TensorType, ...] | None = None,
        hint: str = "",
        loc: Loc | None = None,
        module: Module | None = None,
        **attrs: Attr,
    ) -> tuple[Value, ...]:
        """Append an op with any number of results.

        Raises VerifyError for a misuse of the op, and where the types can neither be inferred nor are given.
        """
        loc = self.loc if loc is None else loc
        draft = Op(opcode, operands, make_attrs(attrs), tuple(Value("?", t) for t in types or ()), loc)
        inferred = infer_types(draft, module) or types
        if inferred is None:
            raise VerifyError(f"{opcode}: the result type cannot be inferred; pass it")
        results = tuple(Value(self.names.fresh(hint), t) for t in inferred)
        self.ops.append(Op(opcode, operands, draft.attrs, results, loc))
        return results

    def const(self, value: float | int | bool, dtype: DType) -> Value:
        """A rank-0 constant."""
        typed = float(value) if dtype.is_float else bool(value) if dtype is DType.bool else int(value)
        return self.add("const", type=TensorType(dtype, ()), value=typed)
