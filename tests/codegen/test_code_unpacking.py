"""The assembly that unpacks codes, in a model of the few PTX instructions that it is made of: neither Triton's
interpreter nor a machine without a GPU runs it, and one wrong digit in a permutation gives wrong weights."""

from __future__ import annotations

import re
from collections.abc import Callable

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
