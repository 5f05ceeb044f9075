// One vector of floats, in the widest form that the compiler flags allow: AVX-512, AVX2 + FMA, or GCC's portable
// vectors. The rest of the headers is written against these functions only.
#pragma once

#include <type_traits>

#include "types.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define TW_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TW_AVX2 1
#include <immintrin.h>
#endif
#if defined(TW_AVX512) && defined(__AVX512BF16__)
#define TW_DOT_BF16 1  // vdpbf16ps: products of bf16 pairs, accumulated in float
#endif

#define TW_INLINE static inline __attribute__((always_inline))

namespace tw {

// Into the second cache: it has more misses under way than the first, so two threads read a fifth more bytes per second.
TW_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
TW_INLINE void prefetch_now(const void* p) { __builtin_prefetch(p, 0, 3); }  // into the first cache

#if defined(TW_AVX512)

constexpr int VW = 16;  // floats per vector
using vf = __m512;

TW_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1u); }
TW_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
TW_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
TW_INLINE vf vload(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
TW_INLINE vf vload(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// As to_f32(f8), all lanes at once.
TW_INLINE vf widen_f8(__m128i codes) {
    const __m512i wide = _mm512_cvtepu8_epi32(codes), magnitude = _mm512_and_si512(wide, _mm512_set1_epi32(0x7f));
    const __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(121 << 23));
    const __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
    vf x = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0.5f));
    x = _mm512_mask_sub_ps(x, small, _mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p-6f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(0x7f), wide), 24);
    const __m512i found = _mm512_mask_mov_epi32(_mm512_castps_si512(x), nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_castsi512_ps(_mm512_or_si512(found, sign));
}
TW_INLINE vf vload(const f8* p) { return widen_f8(_mm_loadu_si128((const __m128i*)p)); }
// The first n elements, zeros behind them; 0 <= n <= VW.
TW_INLINE vf vload_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
TW_INLINE vf vload_n(const bf16* p, int n) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
TW_INLINE vf vload_n(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
TW_INLINE vf vload_n(const f8* p, int n) { return widen_f8(_mm_maskz_loadu_epi8(first_lanes(n), p)); }
TW_INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
TW_INLINE void vstore_n(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
TW_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
TW_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
TW_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
TW_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where a is NaN
TW_INLINE vf vround(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n of whole n, where that is a normal number.
TW_INLINE vf vldexp(vf x, vf n) { return _mm512_scalef_ps(x, n); }
// y, but 0 where x < limit.
TW_INLINE vf vzero_below(vf x, float limit, vf y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, vset(limit), _CMP_NLT_UQ), y);
}
TW_INLINE float vhighest(vf x) { return _mm512_reduce_max_ps(x); }
TW_INLINE float vsum(vf x) { return _mm512_reduce_add_ps(x); }
// The sums of four vectors at once: two rounds of adding interleaved halves, then across the 128-bit lanes.
TW_INLINE void vsum4(const vf* x, float* out) {
    vf p = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    vf q = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512d pd = _mm512_castps_pd(p), qd = _mm512_castps_pd(q);
    vf s = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pd, qd)), _mm512_castpd_ps(_mm512_unpackhi_pd(pd, qd)));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

#elif defined(TW_AVX2)

constexpr int VW = 8;
using vf = __m256;

alignas(32) static const int32_t lane_table[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
TW_INLINE __m256i first_lanes(int n) { return _mm256_loadu_si256((const __m256i*)(lane_table + 8 - n)); }
TW_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
TW_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
TW_INLINE vf vload(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TW_INLINE vf vload(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
// As to_f32(f8), all lanes at once.
TW_INLINE vf vload(const f8* p) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi32(0x7f));
    const vf high = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(121 << 23)));
    const vf small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude));
    const vf finite = _mm256_blendv_ps(_mm256_mul_ps(high, _mm256_set1_ps(0.5f)),
                                       _mm256_sub_ps(high, _mm256_set1_ps(0x1p-6f)), small);
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)),
                                         _mm256_set1_epi32(0x7fc00000));
    const __m256i sign = _mm256_slli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(0x7f), wide), 24);
    return _mm256_or_ps(finite, _mm256_castsi256_ps(_mm256_or_si256(nan, sign)));
}
TW_INLINE vf vload_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
template <class Narrow>
TW_INLINE vf vload_narrow_n(const Narrow* p, int n) {
    Narrow full[8] = {};
    std::memcpy(full, p, size_t(n) * sizeof(Narrow));
    return vload(full);
}
TW_INLINE vf vload_n(const bf16* p, int n) { return vload_narrow_n(p, n); }
TW_INLINE vf vload_n(const f16* p, int n) { return vload_narrow_n(p, n); }
TW_INLINE vf vload_n(const f8* p, int n) { return vload_narrow_n(p, n); }
TW_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
TW_INLINE void vstore_n(float* p, vf x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
TW_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
TW_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
TW_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
TW_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
TW_INLINE vf vround(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TW_INLINE vf vldexp(vf x, vf n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
TW_INLINE vf vzero_below(vf x, float limit, vf y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, vset(limit), _CMP_NLT_UQ), y);
}
TW_INLINE float vhighest(vf x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
TW_INLINE float vsum(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// As with AVX-512: horizontal additions (hadd) would take twice as many micro-operations.
TW_INLINE void vsum4(const vf* x, float* out) {
    vf p = _mm256_add_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
    vf q = _mm256_add_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
    __m256d pd = _mm256_castps_pd(p), qd = _mm256_castps_pd(q);
    vf s = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(pd, qd)), _mm256_castpd_ps(_mm256_unpackhi_pd(pd, qd)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

#else

constexpr int VW = 8;
typedef float vf __attribute__((vector_size(32)));

TW_INLINE vf vset(float x) { return vf{x, x, x, x, x, x, x, x}; }
template <class T>
TW_INLINE vf vload_n(const T* p, int n) {
    vf x = vset(0.0f);
    for (int i = 0; i < n; i++) x[i] = to_f32(p[i]);
    return x;
}
TW_INLINE vf vload(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
TW_INLINE vf vload(const bf16* p) { return vload_n(p, VW); }
TW_INLINE vf vload(const f16* p) { return vload_n(p, VW); }
TW_INLINE vf vload(const f8* p) { return vload_n(p, VW); }
TW_INLINE void vstore(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }
TW_INLINE void vstore_n(float* p, vf x, int n) { std::memcpy(p, &x, size_t(n) * sizeof(float)); }
TW_INLINE vf vadd(vf a, vf b) { return a + b; }
TW_INLINE vf vmul(vf a, vf b) { return a * b; }
TW_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
// Lane by lane of one or two vectors: GCC vectorises such loops better than comparisons of its own vectors.
template <class Function>
TW_INLINE vf vmap(vf a, vf b, const Function& function) {
    float x[VW], y[VW];
    std::memcpy(x, &a, sizeof(a));
    std::memcpy(y, &b, sizeof(b));
#pragma omp simd
    for (int i = 0; i < VW; i++) x[i] = function(x[i], y[i]);
    return vload(x);
}
TW_INLINE vf vmax(vf a, vf b) {
    return vmap(a, b, [](float p, float q) { return p > q ? p : q; });
}
TW_INLINE vf vround(vf x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
TW_INLINE vf vldexp(vf x, vf n) {
    return vmap(x, n, [](float p, float q) {
        return p * bit_cast<float>(uint32_t(int32_t(q > -127.0f ? q : -127.0f) + 127) << 23);
    });
}
TW_INLINE vf vzero_below(vf x, float limit, vf y) {
    return vmap(x, y, [limit](float p, float q) { return p < limit ? 0.0f : q; });
}
TW_INLINE float vhighest(vf x) {
    float highest = x[0];
    for (int i = 1; i < VW; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
}
TW_INLINE float vsum(vf x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
TW_INLINE void vsum4(const vf* x, float* out) {
    for (int i = 0; i < 4; i++) out[i] = vsum(x[i]);
}

#endif

#if defined(TW_DOT_BF16)
TW_INLINE void vstore(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#endif

// What a matrix of W multiplies: floats, but pairs of bf16 where the processor multiplies those.
template <class W>
struct activation {
    using type = float;
};
#if defined(TW_DOT_BF16)
template <>
struct activation<bf16> {
    using type = bf16;
};
#endif
template <class W>
using activation_t = typename activation<W>::type;

// Activations are rounded to what eager mode would store them as, T, even when they are kept in float.
template <class W, class T>
inline __attribute__((always_inline)) activation_t<W> to_activation(float x) {
    if constexpr (std::is_same_v<activation_t<W>, float>) {
        return to_f32(from_f32<T>(x));
    } else {
        return from_f32<W>(x);
    }
}

// One step of a dot product over k: `step` elements of an activation row and of a weight row.
template <class W>
struct dot {
    static constexpr int step = VW;
    using act = vf;
    using wgt = vf;
    TW_INLINE act load_act(const activation_t<W>* p) { return vload(p); }
    TW_INLINE wgt load(const W* p) { return vload(p); }
    TW_INLINE wgt load_n(const W* p, int n) { return vload_n(p, n); }
    TW_INLINE vf add(act a, wgt w, vf sum) { return vfma(a, w, sum); }
};
#if defined(TW_DOT_BF16)
template <>
struct dot<bf16> {
    static constexpr int step = 32;
    using act = __m512bh;
    using wgt = __m512bh;
    TW_INLINE act load_act(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    TW_INLINE wgt load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    TW_INLINE wgt load_n(const bf16* p, int n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, p);
    }
    TW_INLINE vf add(act a, wgt w, vf sum) { return _mm512_dpbf16_ps(sum, a, w); }
};
#endif

// Elements to allocate for one activation row of k elements: loads of it never need a mask.
template <class W>
TW_INLINE long padded(long k) {
    return (k + dot<W>::step - 1) / dot<W>::step * dot<W>::step;
}

}  // namespace tw
