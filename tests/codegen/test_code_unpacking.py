"""The assembly that unpacks codes, in a model of the few PTX instructions that it is made of: neither Triton's
interpreter nor a machine without a GPU runs it, and one wrong digit in a permutation gives wrong weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tilewright.codegen.triton.unpack import ASSEMBLY, CODE_BIAS

BYTES = np.arange(256, dtype=np.uint8)


def _prmt(low: int, high: int, selector: int) -> int:
    """Byte n of the result is the one of ``high:low`` that digit n of the selector names."""
    source = (high << 32 | low).to_bytes(8, "little")
    assert all(selector >> 4 * n & 8 == 0 for n in range(4))  # the eighth bit would replicate a sign
    return int.from_bytes(bytes(source[selector >> 4 * n & 7] for n in range(4)), "little")


def _lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit, the bit of ``table`` whose number the three bits form."""
    return sum((table >> (4 * (a >> n & 1) + 2 * (b >> n & 1) + (c >> n & 1)) & 1) << n for n in range(32))


def _add(a: int, b: int) -> int:
    return _bits(_float(a) + _float(b))


def _fma(a: int, b: int, c: int) -> int:
    """Rounded once: a product of two float32 is exact in float64, and so is its sum with a number of this size."""
    return _bits(np.float32(np.float64(_float(a)) * np.float64(_float(b)) + np.float64(_float(c))))


def _dp4a(a: int, b: int, c: int) -> int:
    """A sum of four products of signed bytes."""
    x, y = (np.array([n], np.uint32).view(np.int8).astype(np.int64) for n in (a, b))
    return (int((x * y).sum()) + c) & 0xFFFFFFFF


def _fma_pairs(a: int, b: int, c: int) -> int:
    """In bfloat16, twice: of float64 both the product and the sum are exact here, so it is rounded once."""
    x, y, z = (
        torch.tensor([n & 0xFFFF, n >> 16]).to(torch.uint16).view(torch.bfloat16).double() for n in (a, b, c)
    )
    low, high = (x * y + z).to(torch.bfloat16).view(torch.uint16).tolist()
    return int(high << 16 | low)


def _float(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def _bits(value: np.float32) -> int:
    return int(value.view(np.uint32))


MODEL: dict[str, Callable[..., int]] = {
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
    "shr.b32": lambda a, n: a >> n,
    "mov.b32": lambda a: a,
    "add.f32": _add,
    "fma.rn.f32": _fma,
    "dp4a.s32.s32": _dp4a,
    "fma.rn.bf16x2": _fma_pairs,
}


def run(name: str, *operands: int) -> list[int]:
    """The results of a helper's assembly for registers ``operands``."""
    body = ASSEMBLY[ASSEMBLY.index(f"def {name}(") :]
    body = body[: body.index("@triton.jit")] if "@triton.jit" in body else body
    *lines, constraints = re.findall(r'"([^"]*)"', body.split('"""')[2])
    results = constraints.count("=")
    registers = {f"${results + n}": value for n, value in enumerate(operands)}
    for text in "".join(lines).strip("{} ").split(";"):
        if not text.strip() or text.split()[0] == ".reg":
            continue
        opcode, rest = text.split(maxsplit=1)
        target, *given = (word.strip() for word in rest.split(","))
        registers[target] = MODEL[opcode](*(_value(word, registers) for word in given))
    return [registers[f"${n}"] for n in range(results)]


def _value(word: str, registers: dict[str, int]) -> int:
    if word in registers:
        return registers[word]
    return int(word[2:], 16) if word.startswith("0f") else int(word, 0)


def _floats(name: str, codes: np.ndarray) -> np.ndarray:
    """What a helper makes of bytes, four to a register."""
    words = codes.view(np.uint32).tolist()
    return np.array([bits for word in words for bits in run(name, word)], np.uint32).view(np.float32)


def test_bytes() -> None:
    assert _floats("bytes_to_float", BYTES).tolist() == BYTES.view(np.int8).astype(np.float32).tolist()


@pytest.mark.parametrize(("name", "shift"), [("low_codes", 0), ("high_codes", 4)])
def test_halves_of_bytes(name: str, shift: int) -> None:
    expected = (BYTES >> shift & 15).astype(np.float32) + CODE_BIAS
    assert _floats(name, BYTES).tolist() == expected.tolist()


def test_pairs_are_widened() -> None:
    values = torch.tensor([1.0, -2.5, 3e38, -0.0, float("inf"), 1e-40]).to(torch.bfloat16)
    words = values.view(torch.int32).tolist()
    found = [_float(bits).item() for word in words for bits in run("widen", word & 0xFFFFFFFF)]
    assert found == values.float().tolist()


def test_pairs_are_multiplied() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, generator=generator).to(torch.bfloat16) for _ in range(2))
    words = zip(*(t.view(torch.int32).tolist() for t in (x, y)), strict=True)
    found = [run("multiply_pairs", a & 0xFFFFFFFF, b & 0xFFFFFFFF)[0] for a, b in words]
    expected = (x * y).view(torch.int32).tolist()
    assert found == [n & 0xFFFFFFFF for n in expected]


def _words(values: Sequence[int]) -> int:
    """Four bytes as a word, the first lowest."""
    return int.from_bytes(bytes(n & 255 for n in values), "little")


def test_rows_are_rounded_to_words_of_bytes() -> None:
    """To the nearest integer, of two to the even one, from one end to the other."""
    values = [0.0, 1.0, 0.5, 1.5, -0.5, -1.5, -2.49, 126.6, -127.0, 127.0, 63.499, -0.0]
    for four in (values[n : n + 4] for n in range(0, len(values), 4)):
        halves = [_bits(np.float32(x / 2)) for x in four]
        (word,) = run("pack_bytes", *halves, _bits(np.float32(2.0)))
        assert word == _words([int(np.rint(x)) for x in four])


def test_dot_products_of_words() -> None:
    """Of bytes at both ends of their range; of codes of four bits, whose high ones meet a word of their own."""
    rng = np.random.default_rng(0)
    x, y = np.array([127, -127, 1, -128]), np.array([127, 127, -1, 127])
    assert run("dot_bytes", _words(x.tolist()), _words(y.tolist())) == [int((x * y).sum()) & 0xFFFFFFFF]
    low, high = rng.integers(0, 16, 4), rng.integers(0, 16, 4)
    expected = int((low * x + high * y).sum()) & 0xFFFFFFFF
    assert run("dot_halves", *(_words(v.tolist()) for v in (low, high, x, y))) == [expected]
