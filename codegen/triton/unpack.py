"""Helpers in the prelude of generated modules that unpack several values of a register with few instructions.

Converting integers is slow: a multiprocessor that multiplies and adds 128 floats in a cycle converts 64 or 16 integers,
once it has cut them out of their word. But an integer below 2^23 in the low bits of a float32 is the float 2^23 plus
that integer, so a byte becomes a float by a permutation of bytes and an exact subtraction. Four bits fit higher in the
mantissa, where the float is 16 plus the code: so little that it may stay until the sum of a group is complete.

Triton's interpreter has no assembly: there, the same helpers are arithmetic, with the same results bit for bit.
"""

from __future__ import annotations

CODE_BIAS = 16
"""What ``low_codes`` and ``high_codes`` add to a code."""

ASSEMBLY = '''\
@triton.jit
def bytes_to_float(x):
    """int8 as float32: the float whose bits are 0x4B000000 + (x + 128) is 2^23 + 128 + x."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u, f<4>; xor.b32 u, $4, 0x80808080;"
        "prmt.b32 f0, u, 0x4B000000, 0x7440; add.f32 $0, f0, 0fCB000080;"
        "prmt.b32 f1, u, 0x4B000000, 0x7441; add.f32 $1, f1, 0fCB000080;"
        "prmt.b32 f2, u, 0x4B000000, 0x7442; add.f32 $2, f2, 0fCB000080;"
        "prmt.b32 f3, u, 0x4B000000, 0x7443; add.f32 $3, f3, 0fCB000080; }",
        "=f,=f,=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=4,
    )


@triton.jit
def low_codes(x):
    """16 plus the low four bits of a byte, as float32, whose bits are 0x41800000 + (code << 19)."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u; shl.b32 u, $4, 3; lop3.b32 u, u, 0x78787878, 0x80808080, 0xEA;"
        "prmt.b32 $0, u, 0x41000000, 0x7044; prmt.b32 $1, u, 0x41000000, 0x7144;"
        "prmt.b32 $2, u, 0x41000000, 0x7244; prmt.b32 $3, u, 0x41000000, 0x7344; }",
        "=r,=r,=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=4,
    )


@triton.jit
def high_codes(x):
    """16 plus the high four bits of a byte, as float32."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u; shr.b32 u, $4, 1; lop3.b32 u, u, 0x78787878, 0x80808080, 0xEA;"
        "prmt.b32 $0, u, 0x41000000, 0x7044; prmt.b32 $1, u, 0x41000000, 0x7144;"
        "prmt.b32 $2, u, 0x41000000, 0x7244; prmt.b32 $3, u, 0x41000000, 0x7344; }",
        "=r,=r,=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=4,
    )


@triton.jit
def widen(x):
    """bfloat16 as float32, two at a time."""
    return tl.inline_asm_elementwise(
        "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000; }",
        "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
    )


@triton.jit
def multiply_pairs(x, y):
    """A product in bfloat16, rounded once: x * y - 0, which every GPU with that type has."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
        "=r,r,r", [x, y], dtype=tl.bfloat16, is_pure=True, pack=2,
    )


@triton.jit
def largest_of(x):
    """The largest magnitude of each run; NaN where one of it is."""
    return tl.reduce(tl.abs(x), 2, larger, keep_dims=True)


@triton.jit
def pack_bytes(a, b, c, d, factor):
    """Four floats times a factor, rounded to bytes of a word: the float 3 * 2^22 + x has x in its lowest byte."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 f<4>;"
        "fma.rn.f32 f0, $1, $5, 0f4B400000; fma.rn.f32 f1, $2, $5, 0f4B400000;"
        "fma.rn.f32 f2, $3, $5, 0f4B400000; fma.rn.f32 f3, $4, $5, 0f4B400000;"
        "prmt.b32 f0, f0, f1, 0x0040; prmt.b32 f2, f2, f3, 0x0040; prmt.b32 $0, f0, f2, 0x5410; }",
        "=r,f,f,f,f,f", [a, b, c, d, factor], dtype=tl.int32, is_pure=True, pack=1,
    )


@triton.jit
def dot_bytes(x, y):
    """The sum of the products of the four signed bytes of two words."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1,
    )


@triton.jit
def dot_halves(low, high, x, y):
    """The sum of the products of the bytes of two words, low and high, with those of two others."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u; dp4a.s32.s32 u, $1, $3, 0; dp4a.s32.s32 $0, $2, $4, u; }",
        "=r,r,r,r,r", [low, high, x, y], dtype=tl.int32, is_pure=True, pack=1,
    )
'''

ARITHMETIC = '''\
@triton.jit
def bytes_to_float(x):
    """int8 as float32."""
    return x.to(tl.float32)


@triton.jit
def low_codes(x):
    """16 plus the low four bits of a byte, as float32."""
    return (x & 15).to(tl.float32) + 16.0


@triton.jit
def high_codes(x):
    """16 plus the high four bits of a byte, as float32."""
    return (x >> 4).to(tl.float32) + 16.0


@triton.jit
def widen(x):
    """bfloat16 as float32."""
    return x.to(tl.float32)


@triton.jit
def multiply_pairs(x, y):
    """A product in bfloat16, rounded once."""
    return (x.to(tl.float32) * y.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def largest_of(x):
    """The largest magnitude of each run; NaN where one of it is."""
    return tl.max(tl.abs(x), axis=2, keep_dims=True) + tl.sum(x * 0.0, axis=2, keep_dims=True)


@triton.jit
def round_to_byte(x):
    """The nearest integer, of two the even one, in the lowest byte."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def pack_bytes(a, b, c, d, factor):
    """Four floats times a factor, rounded to bytes of a word."""
    low = round_to_byte(a * factor) | round_to_byte(b * factor) << 8
    return low | round_to_byte(c * factor) << 16 | round_to_byte(d * factor) << 24


@triton.jit
def dot_bytes(x, y):
    """The sum of the products of the four signed bytes of two words."""
    total = (x >> 24) * (y >> 24)
    for n in tl.static_range(1, 4):
        total += (x << 8 * n >> 24) * (y << 8 * n >> 24)
    return total


@triton.jit
def dot_halves(low, high, x, y):
    """The sum of the products of the bytes of two words, low and high, with those of two others."""
    return dot_bytes(low, x) + dot_bytes(high, y)
'''

WORDS = '''\
@triton.jit
def rounded_words(x, factor, BLOCK_G: tl.constexpr, WORDS: tl.constexpr):
    """Runs of floats [1, G, 4 * WORDS] times a factor, as bytes of words [1, G, WORDS]."""
    even, odd = tl.split(tl.reshape(x, [1, BLOCK_G, WORDS, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return pack_bytes(a, b, c, d, tl.broadcast_to(factor, [1, BLOCK_G, WORDS]))


@triton.jit
def sum_bytes(x):
    """The sum of the four signed bytes of a word."""
    return dot_bytes(x, tl.full(x.shape, 0x01010101, tl.int32))


@triton.jit
def by_half(first, second, BLOCK_G: tl.constexpr):
    """Two runs of four words of a row, as those that belong to the low and to the high codes of four words of a
    weight: words of the row take turns."""
    low, high = tl.split(tl.reshape(first, [1, BLOCK_G, 2, 2]))
    more_low, more_high = tl.split(tl.reshape(second, [1, BLOCK_G, 2, 2]))
    return in_turn(low, more_low, BLOCK_G), in_turn(high, more_high, BLOCK_G)


@triton.jit
def in_turn(first, second, BLOCK_G: tl.constexpr):
    """Two words, then two others."""
    return tl.reshape(tl.permute(tl.join(first, second), [0, 1, 3, 2]), [1, BLOCK_G, 4])


@triton.jit
def words_of(x, BLOCK_G: tl.constexpr, WORDS: tl.constexpr):
    """Bytes [N, G, 4 * WORDS] as words [N, G, WORDS], which is what a register has them in already."""
    even, odd = tl.split(tl.reshape(x.to(tl.int32) & 255, [x.shape[0], BLOCK_G, WORDS, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a | b << 8 | c << 16 | d << 24
'''
"""What is made of them, the same for both."""


def unpacking(interpret: bool) -> str:
    """The helpers, for a GPU or for the interpreter."""
    return f"{ARITHMETIC if interpret else ASSEMBLY}\n\n{WORDS}"
