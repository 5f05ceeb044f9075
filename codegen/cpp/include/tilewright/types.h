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

static inline float to_f32(float x) { return x; }
static inline float to_f32(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Subnormal halves come out right because the scaling by 2^112 is a float multiplication, not bit arithmetic.
static inline float to_f32(f16 x) {
    uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
    float scaled = bit_cast<float>(magnitude) * 0x1p112f;
    uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | (uint32_t(x.bits & 0x8000u) << 16));
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

}  // namespace tw
