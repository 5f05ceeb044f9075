// Vectors of bytes and their dot products in int32, for weights of 8 and 4 bits: AVX-512, AVX2, or portable C++.
//
// A vector `vi` has VI lanes of int32, each of them also four bytes: one row of weights per lane, four columns of it. A
// dot product adds, in each lane, four products of a weight byte with an activation byte that is the same in all lanes.
#pragma once

#include "vec.h"

namespace tw {

#if defined(TW_AVX512)

constexpr int VI = 16;
using vi = __m512i;

TW_INLINE vi bload(const void* p) { return _mm512_loadu_si512(p); }
TW_INLINE vi bset4(const int8_t* p) {  // the same four bytes in every lane
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
TW_INLINE vi iset(int32_t x) { return _mm512_set1_epi32(x); }
TW_INLINE vi low_nibbles(vi x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
TW_INLINE vi high_nibbles(vi x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
// Byte `at` of each lane, as a number.
TW_INLINE vi unsigned_byte(vi x, int at) {
    return _mm512_and_si512(_mm512_srli_epi32(x, unsigned(8 * at)), _mm512_set1_epi32(255));
}
TW_INLINE vi signed_byte(vi x, int at) {
    return _mm512_srai_epi32(_mm512_slli_epi32(x, unsigned(24 - 8 * at)), 24);
}
TW_INLINE vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }

#if defined(__AVX512VNNI__)
TW_INLINE vi dot_unsigned(vi w, vi a, vi sum) { return _mm512_dpbusd_epi32(sum, w, a); }
#else
TW_INLINE vi dot_unsigned(vi w, vi a, vi sum) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, a), _mm512_set1_epi16(1)));
}
#endif

#elif defined(TW_AVX2)

constexpr int VI = 8;
using vi = __m256i;

TW_INLINE vi bload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
TW_INLINE vi bset4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
TW_INLINE vi iset(int32_t x) { return _mm256_set1_epi32(x); }
TW_INLINE vi low_nibbles(vi x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
TW_INLINE vi high_nibbles(vi x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
TW_INLINE vi unsigned_byte(vi x, int at) {
    return _mm256_and_si256(_mm256_srli_epi32(x, 8 * at), _mm256_set1_epi32(255));
}
TW_INLINE vi signed_byte(vi x, int at) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 24 - 8 * at), 24); }
TW_INLINE vf to_float(vi x) { return _mm256_cvtepi32_ps(x); }

#if defined(__AVXVNNI__)
TW_INLINE vi dot_unsigned(vi w, vi a, vi sum) { return _mm256_dpbusd_avx_epi32(sum, w, a); }
#else
TW_INLINE vi dot_unsigned(vi w, vi a, vi sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}
#endif

#else

constexpr int VI = 8;
typedef int32_t vi __attribute__((vector_size(32)));
static_assert(VI == VW, "a lane per float");

TW_INLINE vi bload(const void* p) {
    vi x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
TW_INLINE vi iset(int32_t x) { return vi{x, x, x, x, x, x, x, x}; }
TW_INLINE vi bset4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return iset(four);
}
TW_INLINE vi low_nibbles(vi x) { return x & 0x0f0f0f0f; }
TW_INLINE vi high_nibbles(vi x) { return (x >> 4) & 0x0f0f0f0f; }
TW_INLINE vi unsigned_byte(vi x, int at) { return (x >> (8 * at)) & 255; }
TW_INLINE vi signed_byte(vi x, int at) { return (x << (24 - 8 * at)) >> 24; }
TW_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
TW_INLINE vi dot_unsigned(vi w, vi a, vi sum) {
    for (int at = 0; at < 4; at++) sum += unsigned_byte(w, at) * signed_byte(a, at);
    return sum;
}

#endif

// dot_unsigned takes weights of at most 127 where it goes through 16 bits (two products of 255 * 127 would not fit). For
// signed weights there are two ways. With a single instruction (VNNI), weights are shifted by 128 to be unsigned, and
// 128 times the sum of the activations is taken off. Else the signs go over to the other side: |a| * (sign(a) w).
#if defined(TW_AVX512) && defined(__AVX512VNNI__)
#define TW_SHIFTED_BYTES 1
TW_INLINE vi dot_signed(vi w, vi a, vi sum) { return dot_unsigned(_mm512_xor_si512(w, _mm512_set1_epi8(-128)), a, sum); }
#elif defined(TW_AVX512)
TW_INLINE vi dot_signed(vi w, vi a, vi sum) {
    const __mmask64 negative = _mm512_movepi8_mask(a);
    const vi signed_w = _mm512_mask_sub_epi8(w, negative, _mm512_setzero_si512(), w);
    return dot_unsigned(_mm512_abs_epi8(a), signed_w, sum);
}
#elif defined(TW_AVX2) && defined(__AVXVNNI__)
#define TW_SHIFTED_BYTES 1
TW_INLINE vi dot_signed(vi w, vi a, vi sum) { return dot_unsigned(_mm256_xor_si256(w, _mm256_set1_epi8(-128)), a, sum); }
#elif defined(TW_AVX2)
TW_INLINE vi dot_signed(vi w, vi a, vi sum) {
    return dot_unsigned(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a), sum);
}
#else
TW_INLINE vi dot_signed(vi w, vi a, vi sum) {
    for (int at = 0; at < 4; at++) sum += signed_byte(w, at) * signed_byte(a, at);
    return sum;
}
#endif

// Where a sum of dot_signed starts, given the sum of the activations that will go into it.
TW_INLINE vi start_signed(int32_t activation_sum) {
#if defined(TW_SHIFTED_BYTES)
    return iset(-128 * activation_sum);
#else
    (void)activation_sum;
    return iset(0);
#endif
}

}  // namespace tw
