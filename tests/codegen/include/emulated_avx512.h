// Lets the AVX-512 paths of the headers run on a processor without AVX-512: SIMDe gives each intrinsic in portable C++.
//
// Compile with -mavx2 -mfma -mf16c and -include this file; -DEMULATE_VNNI, -DEMULATE_BF16 and -DEMULATE_AMX add those
// extensions. SIMDe 0.7 lacks a dozen intrinsics, which follow here, lane by lane.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>  // first, so that it declares nothing under the macros below

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simde/x86/avx512.h"

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if defined(EMULATE_VNNI)
#define __AVX512VNNI__ 1
#endif
#if defined(EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

namespace emulated {

// The lanes of a vector as an array, and back.
template <class Lane, class Vector>
struct Lanes {
    static constexpr int count = sizeof(Vector) / sizeof(Lane);
    Lane lane[count] = {};
    Lanes() = default;
    Lanes(const Vector& x) { std::memcpy(lane, &x, sizeof(Vector)); }
    operator Vector() const {
        Vector x;
        std::memcpy(&x, lane, sizeof(Vector));
        return x;
    }
};
using Floats = Lanes<float, __m512>;
using Ints = Lanes<int32_t, __m512i>;

static inline __m512 cvtepi32_ps(__m512i x) {
    Ints from(x);
    Floats to;
    for (int i = 0; i < 16; i++) to.lane[i] = float(from.lane[i]);
    return to;
}
static inline __m512i cvtepu16_epi32(__m256i x) {
    Lanes<uint16_t, __m256i> from(x);
    Ints to;
    for (int i = 0; i < 16; i++) to.lane[i] = from.lane[i];
    return to;
}
static inline __m512 cvtph_ps(__m256i x) {
    Lanes<uint16_t, __m256i> from(x);
    Floats to;
    for (int i = 0; i < 16; i++) to.lane[i] = _cvtsh_ss(from.lane[i]);
    return to;
}
static inline __m256i cvtneps_pbh(__m512 x) {
    Lanes<uint32_t, __m512> from(x);
    Lanes<uint16_t, __m256i> to;
    for (int i = 0; i < 16; i++) to.lane[i] = uint16_t((from.lane[i] + 0x7fffu + (from.lane[i] >> 16 & 1u)) >> 16);
    return to;
}
static inline __m512i srai_epi32(__m512i x, unsigned count) {
    Ints lanes(x);
    for (int32_t& lane : lanes.lane) lane >>= count;
    return lanes;
}
static inline float reduce_add_ps(__m512 x) {
    float sum = 0.0f;
    for (float lane : Floats(x).lane) sum += lane;
    return sum;
}
static inline float reduce_max_ps(__m512 x) {
    Floats from(x);
    float most = from.lane[0];
    for (float lane : from.lane) most = lane > most ? lane : most;
    return most;
}
static inline __m512 scalef_ps(__m512 x, __m512 n) {
    Floats from(x), powers(n), to;
    for (int i = 0; i < 16; i++) to.lane[i] = from.lane[i] * std::exp2(std::floor(powers.lane[i]));
    return to;
}
static inline __m256 extractf32x8_ps(__m512 x, int half) { return _mm256_loadu_ps(Floats(x).lane + 8 * half); }
static inline __m512 shuffle_f32x4(__m512 a, __m512 b, int control) {
    Floats first(a), second(b), to;
    for (int i = 0; i < 16; i++) {
        const Floats& from = i < 8 ? first : second;
        to.lane[i] = from.lane[4 * (control >> (i / 4 * 2) & 3) + i % 4];
    }
    return to;
}
template <class Lane, class Vector>
static inline Vector masked_load(uint32_t mask, const void* p) {
    Lanes<Lane, Vector> to;
    for (int i = 0; i < to.count; i++) {
        if (mask >> i & 1) to.lane[i] = static_cast<const Lane*>(p)[i];
    }
    return to;
}
static inline void mask_storeu_ps(float* p, uint32_t mask, __m512 x) {
    Floats from(x);
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) p[i] = from.lane[i];
    }
}

}  // namespace emulated

#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#define _mm512_maskz_loadu_ps emulated::masked_load<float, __m512>
#define _mm512_maskz_loadu_epi16 emulated::masked_load<uint16_t, __m512i>
#define _mm256_maskz_loadu_epi16 emulated::masked_load<uint16_t, __m256i>
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
// SIMDe 0.7.4 gives this name to the masked form.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

#if defined(EMULATE_AMX)
#include "emulated_amx.h"
#endif
