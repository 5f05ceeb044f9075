// Matrix products with weights of 8 or 4 bits.
//
// Sixteen rows of weights lie interleaved, four columns at a time: [N / 16][K / 4][16][4] codes of int8, or
// [N / 16][K / 8][16][4] bytes of int4 codes, whose low halves are columns k to k + 3 and whose high halves k + 4 to k + 7.
// A vector thus holds one row per lane, sums need no adding across lanes, and a thread that walks its share of the rows
// reads linear streams. Scales lie as [N / 16][groups][16]: for int8 f32, one per row or one per 32 columns of it; for
// int4 f16 scale and minimum per 32 columns. With few rows of activations, these are rounded to int8 in groups of 32 and
// multiplied as integers; with many, weights become floats, or pairs of bf16, once per panel of gemm.h.
#pragma once

#include "bytes.h"
#include "gemm.h"
#include "gemv.h"

namespace tw {

constexpr int ROW_BLOCK = 16;         // rows of weights that are interleaved
constexpr int ACTIVATION_GROUP = 32;  // columns whose activations share a scale
constexpr int HALVES = ROW_BLOCK / VI;

// One row of activations in int8: per group a scale, scale * sum(codes), and sum(codes).
struct ByteRow {
    int8_t* codes;
    float *scale, *sum;
    int32_t* count;
};

// Bytes of scratch for a row of k activations.
static inline long byte_row_bytes(long k) {
    const long groups = k / ACTIVATION_GROUP;
    return bytes<int8_t>(k) + 2 * bytes<float>(groups) + bytes<int32_t>(groups);
}
static inline ByteRow carve_byte_row(char*& scratch, long k) {
    const long groups = k / ACTIVATION_GROUP;
    int8_t* codes = carve<int8_t>(scratch, k);
    float* scale = carve<float>(scratch, groups);
    float* sum = carve<float>(scratch, groups);
    return {codes, scale, sum, carve<int32_t>(scratch, groups)};
}

// Round a row of k floats: in each group, the largest magnitude becomes 127. What is not finite makes its group NaN.
static inline void round_row(const float* x, long k, const ByteRow& to) {
    for (long g = 0; g < k / ACTIVATION_GROUP; g++) {
        const float* from = x + g * ACTIVATION_GROUP;
        int8_t* codes = to.codes + g * ACTIVATION_GROUP;
        // Without their sign, the bits of floats are in the order of magnitudes, with infinity and NaN at the end.
        uint32_t top = 0;
#pragma omp simd reduction(max : top)
        for (int i = 0; i < ACTIVATION_GROUP; i++) {
            uint32_t size;
            std::memcpy(&size, from + i, sizeof(size));
            size &= 0x7fffffffu;
            top = size > top ? size : top;
        }
        float largest;
        std::memcpy(&largest, &top, sizeof(largest));
        const float scale = largest / 127.0f + largest * 0.0f, inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int i = 0; i < ACTIVATION_GROUP; i++) {
            const int32_t code = int32_t(std::nearbyint(from[i] * inverse));
            codes[i] = int8_t(code);
            count += code;
        }
        to.scale[g] = scale;
        to.count[g] = count;
        to.sum[g] = scale * float(count);
    }
}

// Rows k to k + 3 of a panel of gemm.h, at some of its columns.
template <class W>
TW_INLINE void store_four(float* panel, long k, const vf (&rows)[4]) {
    constexpr int per_unit = packed<W>::per_unit;
    float* to = panel + k / per_unit * PANEL;
    for (int at = 0; at < 4; at += per_unit, to += PANEL) vstore(to, packed<W>::unit(rows + at));
}

// How weights are stored, and what a block of ROW_BLOCK rows contributes. `Scales` are the addresses of a block's factors.
template <bool Grouped>  // whether each group of columns has a scale, or each row
struct Int8 {
    static constexpr int bytes_per_group = ROW_BLOCK * ACTIVATION_GROUP;
    struct Block {
        const int8_t* codes;
        const float* scale;
    };
    // out[m * ldo + j]: products of M rows of activations with the block's rows j; weights are prefetched `ahead` bytes.
    template <int M>
    TW_INLINE void multiply(const Block& w, const ByteRow* a, long k, float* out, long ldo, long ahead) {
        vf sum[HALVES][M];
        for (int h = 0; h < HALVES; h++)
            for (int m = 0; m < M; m++) sum[h][m] = vset(0.0f);
        for (long g = 0; g < k / ACTIVATION_GROUP; g++) {
            const int8_t* codes = w.codes + g * bytes_per_group;
            for (int line = 0; line < bytes_per_group; line += 64) prefetch(codes + ahead + line);
            if (Grouped) prefetch((const char*)(w.scale + g * ROW_BLOCK) + ahead / 8);
            for (int h = 0; h < HALVES; h++) {
                vi part[M];
                for (int m = 0; m < M; m++) part[m] = start_signed(a[m].count[g]);
#pragma GCC unroll 8
                for (int quad = 0; quad < ACTIVATION_GROUP / 4; quad++) {
                    const vi wv = bload(codes + quad * 4 * ROW_BLOCK + h * 4 * VI);
                    for (int m = 0; m < M; m++) {
                        part[m] = dot_signed(wv, bset4(a[m].codes + g * ACTIVATION_GROUP + quad * 4), part[m]);
                    }
                }
                for (int m = 0; m < M; m++) {
                    vf x = to_float(part[m]);
                    if (Grouped) x = vmul(x, vload(w.scale + g * ROW_BLOCK + h * VI));
                    sum[h][m] = vfma(x, vset(a[m].scale[g]), sum[h][m]);
                }
            }
        }
        for (int h = 0; h < HALVES; h++) {
            const vf scale = Grouped ? vset(1.0f) : vload(w.scale + h * VI);
            for (int m = 0; m < M; m++) vstore(out + m * ldo + h * VI, vmul(sum[h][m], scale));
        }
    }
    // The block's rows as columns of a panel of gemm.h.
    template <class W>
    TW_INLINE void expand(const Block& w, long k, float* panel) {
        for (int h = 0; h < HALVES; h++) {
            for (long quad = 0; quad < k / 4; quad++) {
                const long g = Grouped ? quad / (ACTIVATION_GROUP / 4) : 0;
                const vf scale = vload(w.scale + g * ROW_BLOCK + h * VI);
                const vi wv = bload(w.codes + quad * 4 * ROW_BLOCK + h * 4 * VI);
                vf four[4];
                for (int at = 0; at < 4; at++) four[at] = vmul(to_float(signed_byte(wv, at)), scale);
                store_four<W>(panel + h * VI, quad * 4, four);
            }
        }
    }
};

struct Int4 {
    static constexpr int bytes_per_group = ROW_BLOCK * ACTIVATION_GROUP / 2;
    struct Block {
        const uint8_t* codes;
        const f16 *scale, *minimum;
    };
    template <int M>
    TW_INLINE void multiply(const Block& w, const ByteRow* a, long k, float* out, long ldo, long ahead) {
        vf sum[HALVES][M];
        for (int h = 0; h < HALVES; h++)
            for (int m = 0; m < M; m++) sum[h][m] = vset(0.0f);
        for (long g = 0; g < k / ACTIVATION_GROUP; g++) {
            const uint8_t* codes = w.codes + g * bytes_per_group;
            for (int line = 0; line < bytes_per_group; line += 64) prefetch(codes + ahead + line);
            // A group's scales are an eighth of the bytes of its codes.
            prefetch((const char*)(w.scale + g * ROW_BLOCK) + ahead / 8);
            prefetch((const char*)(w.minimum + g * ROW_BLOCK) + ahead / 8);
            for (int h = 0; h < HALVES; h++) {
                vi part[M];
                for (int m = 0; m < M; m++) part[m] = iset(0);
#pragma GCC unroll 4
                for (int octet = 0; octet < ACTIVATION_GROUP / 8; octet++) {
                    const vi both = bload(codes + octet * 4 * ROW_BLOCK + h * 4 * VI);
                    const vi low = low_nibbles(both), high = high_nibbles(both);
                    for (int m = 0; m < M; m++) {
                        const int8_t* act = a[m].codes + g * ACTIVATION_GROUP + octet * 8;
                        part[m] = dot_unsigned(low, bset4(act), part[m]);
                        part[m] = dot_unsigned(high, bset4(act + 4), part[m]);
                    }
                }
                const vf scale = vload(w.scale + g * ROW_BLOCK + h * VI);
                const vf minimum = vload(w.minimum + g * ROW_BLOCK + h * VI);
                for (int m = 0; m < M; m++) {
                    sum[h][m] = vfma(vmul(to_float(part[m]), scale), vset(a[m].scale[g]), sum[h][m]);
                    sum[h][m] = vfma(minimum, vset(a[m].sum[g]), sum[h][m]);
                }
            }
        }
        for (int h = 0; h < HALVES; h++)
            for (int m = 0; m < M; m++) vstore(out + m * ldo + h * VI, sum[h][m]);
    }
    template <class W>
    TW_INLINE void expand(const Block& w, long k, float* panel) {
        for (int h = 0; h < HALVES; h++) {
            for (long octet = 0; octet < k / 8; octet++) {
                const long g = octet / (ACTIVATION_GROUP / 8);
                const vf scale = vload(w.scale + g * ROW_BLOCK + h * VI);
                const vf minimum = vload(w.minimum + g * ROW_BLOCK + h * VI);
                const vi both = bload(w.codes + octet * 4 * ROW_BLOCK + h * 4 * VI);
                const vi low = low_nibbles(both), high = high_nibbles(both);
                vf first[4], second[4];
                for (int at = 0; at < 4; at++) {
                    first[at] = vfma(to_float(unsigned_byte(low, at)), scale, minimum);
                    second[at] = vfma(to_float(unsigned_byte(high, at)), scale, minimum);
                }
                store_four<W>(panel + h * VI, octet * 8, first);
                store_four<W>(panel + h * VI, octet * 8 + 4, second);
            }
        }
    }
};

// A panel of gemm.h from blocks of codes: block(j) gives the addresses of the block at column j < count of the panel.
template <class Q, class W, class Block>
static inline void pack_blocks(float* panel, int count, long k, const Block& block) {
    for (int j = 0; j < PANEL; j += ROW_BLOCK) {
        if (j < count) {
            Q::template expand<W>(block(j), k, panel + j);
            continue;
        }
        for (long i = 0; i < units<W>(k); i++)
            for (int lane = 0; lane < ROW_BLOCK; lane++) panel[i * PANEL + j + lane] = 0.0f;
    }
}

// Products of M rows of activations with D blocks of rows per 16 columns, over this worker's share of the columns.
// block(d, n) gives the addresses of the block that columns n to n + 15 of dot d read; the epilogue is that of gemm.h.
template <class Q, int M, int D, class Block, class Epilogue>
TW_INLINE void gemv_quantized(const Worker& worker, long columns, long k, const ByteRow* a, const Block& block,
                              const Epilogue& epilogue) {
    const Range range = split(worker, columns, ROW_BLOCK);
    alignas(64) float tile[D * M * GEMV_TILE];
    for (long n0 = range.begin; n0 < range.end; n0 += GEMV_TILE) {
        const int count = int(range.end - n0 < GEMV_TILE ? range.end - n0 : GEMV_TILE);
        for (int d = 0; d < D; d++) {
            for (int j = 0; j < count; j += ROW_BLOCK) {
                float* out = tile + d * M * GEMV_TILE + j;
                Q::template multiply<M>(block(d, n0 + j), a, k, out, GEMV_TILE, worker.team.prefetch_bytes);
            }
        }
        epilogue(0L, M, n0, count, tile, long(M) * GEMV_TILE, long(GEMV_TILE));
    }
}

}  // namespace tw
