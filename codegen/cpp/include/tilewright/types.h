// Storage types of half precision and their conversions to float: branch-free, so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace tw {

template <class To, class From>
static inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// bfloat16: the upper half of a float. Stored as an integer so that arrays of it are plain data.
struct bf16 {
    uint16_t bits;
};

// IEEE binary16.
struct f16 {
    uint16_t bits;
};

// e4m3: 4 bits of exponent (bias 7), 3 of mantissa, no infinity.
struct f8 {
    uint8_t bits;
};

static inline float to_f32(float x) { return x; }
static inline float to_f32(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Subnormal halves come out right because the scaling by 2^112 is a float multiplication, not bit arithmetic.
static inline float to_f32(f16 x) {
    uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
    float scaled = bit_cast<float>(magnitude) * 0x1p112f;
    uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | (uint32_t(x.bits & 0x8000u) << 16));
}

// Read with an exponent one too high, a normal number is twice what it stands for, and a subnormal one 2^-6 too large.
static inline float to_f32(f8 x) {
    const uint32_t magnitude = x.bits & 0x7fu;
    const float high = bit_cast<float>((magnitude << 20) + (121u << 23));
    const float finite = magnitude < 8u ? high - 0x1p-6f : 0.5f * high;
    const uint32_t nan = magnitude == 0x7fu ? 0x7fc00000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(finite) | nan | uint32_t(x.bits & 0x80u) << 24);
}

// Round to nearest, ties to even; what is too large becomes 448. Subnormal results are rounded by adding a float whose
// last bit weighs 2^-9.
static inline f8 to_f8(float x) {
    const uint32_t u = bit_cast<uint32_t>(x), a = u & 0x7fffffffu;
    const uint32_t normal = (a - (120u << 23) + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(a) + 0x1p14f) - bit_cast<uint32_t>(0x1p14f);
    const uint32_t finite = a < (121u << 23) ? subnormal : (a < bit_cast<uint32_t>(448.0f) ? normal : 0x7eu);
    return f8{uint8_t((a > 0x7f800000u ? 0x7fu : finite) | (u >> 24 & 0x80u))};
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
static inline bf16 to_bf16(float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    uint32_t quiet = (u >> 16) | 0x0040u;
    return bf16{uint16_t((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

// Round to nearest, ties to even. Subnormal results are rounded by adding a float whose last bit weighs 2^-24.
static inline f16 to_f16(float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t a = u & 0x7fffffffu;
    uint32_t normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000u;
    uint32_t finite = a < 0x38800000u ? subnormal : normal;
    uint32_t large = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return f16{uint16_t(sign | (a >= 0x477ff000u ? large : finite))};
}

// from_f32<T>(x): x rounded to the storage type T.
template <class T>
static inline T from_f32(float x);
template <>
inline float from_f32<float>(float x) { return x; }
template <>
inline bf16 from_f32<bf16>(float x) { return to_bf16(x); }
template <>
inline f16 from_f32<f16>(float x) { return to_f16(x); }
template <>
inline f8 from_f32<f8>(float x) { return to_f8(x); }

}  // namespace tw
