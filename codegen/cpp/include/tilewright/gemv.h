// Matrix products with few rows (a decode step): every weight is read once, so the memory bus sets the time.
//
// Each thread walks its own contiguous range of weight rows, one row at a time, so that it reads one linear stream, and
// prefetches ahead in it (how far is measured when the model is compiled). Two rows at a time save loads of activations,
// but read a tenth less per second. Weights stay row-major [N, K].
#pragma once

#include "parallel.h"
#include "vec.h"

namespace tw {

constexpr int GEMV_TILE = 32;          // columns handed to the epilogue at a time
constexpr int GEMV_MAX_ROWS = 8;       // with more rows the packed product of gemm.h is faster

constexpr long ACTIVATION_BYTES = 24576;  // of activations that are multiplied at a time: they stay in the first cache

// How many columns of M rows of activations that is, of k.
template <int M, class W>
static inline long columns_at_a_time(long k) {
    constexpr long most = ACTIVATION_BYTES / long(M * sizeof(activation_t<W>)) / 128 * 128;
    return M > 2 && k > most ? most : k;
}

// out[m * ldo] (+)= sum over k of a[m * lda + k] * w[k], for M rows of a (zero padded to a multiple of the step).
// Line by line, what lies behind `ahead` is prefetched.
template <int M, class W>
TW_INLINE void dot_row(const activation_t<W>* a, long lda, const W* w, const W* ahead, long k, bool add, float* out,
                       long ldo) {
    constexpr int step = dot<W>::step;
    constexpr int lines = int(step * sizeof(W) + 63) / 64;
    constexpr int chains = M == 1 ? 4 : M <= 4 ? 2 : 1;  // one sum would wait for its own latency
    vf sum[M * chains];
    for (int m = 0; m < M * chains; m++) sum[m] = vset(0.0f);
    long i = 0;
    for (; i + step * chains <= k; i += step * chains) {
        for (int c = 0; c < chains; c++) {
            const long at = i + c * step;
            for (int line = 0; line < lines; line++) prefetch((const char*)(ahead + at) + line * 64);
            auto wv = dot<W>::load(w + at);
            for (int m = 0; m < M; m++) {
                sum[m * chains + c] = dot<W>::add(dot<W>::load_act(a + m * lda + at), wv, sum[m * chains + c]);
            }
        }
    }
    for (; i < k; i += step) {
        auto wv = i + step <= k ? dot<W>::load(w + i) : dot<W>::load_n(w + i, int(k - i));
        for (int m = 0; m < M; m++) {
            sum[m * chains] = dot<W>::add(dot<W>::load_act(a + m * lda + i), wv, sum[m * chains]);
        }
    }
    for (int m = 0; m < M; m++) {
        sum[m] = sum[m * chains];
        for (int c = 1; c < chains; c++) sum[m] = vadd(sum[m], sum[m * chains + c]);
    }
    int m = 0;
    for (; m + 4 <= M; m += 4) {
        float four[4];
        vsum4(sum + m, four);
        for (int j = 0; j < 4; j++) out[(m + j) * ldo] = four[j] + (add ? out[(m + j) * ldo] : 0.0f);
    }
    for (; m < M; m++) out[m * ldo] = vsum(sum[m]) + (add ? out[m * ldo] : 0.0f);
}

// The order in which one thread reads weight rows: tiles of columns, in each tile one run of rows per dot product.
template <int D, class Row>
struct RowStream {
    const Row& row;
    Range range;

    // The address of the row `n` places behind column `begin` of dot d, following the stream over tile boundaries.
    auto at(int d, long begin, long n) const {
        const long end = begin + GEMV_TILE < range.end ? begin + GEMV_TILE : range.end;
        if (begin + n < end) return row(d, begin + n);
        n -= end - begin;
        if (d + 1 < D) return row(d + 1, begin + n < end ? begin + n : end - 1);
        return row(0, end + n < range.end ? end + n : range.end - 1);
    }
};

// Products of M rows of activations with D weight rows per column, over this worker's share of the columns.
// row(d, n) is the address of the weight row of dot d at column n; the epilogue is that of gemm.h.
template <class W, int M, int D, class Row, class Epilogue>
TW_INLINE void gemv(const Worker& worker, long columns, long k, const activation_t<W>* a, long lda, const Row& row,
                    const Epilogue& epilogue) {
    const Range range = split(worker, columns, 16);
    const RowStream<D, Row> stream{row, range};
    const long row_bytes = k * long(sizeof(W)), distance = worker.team.prefetch_bytes;
    const bool within = row_bytes >= distance;  // a long row: ahead in the same row
    const long rows_ahead = (distance + row_bytes - 1) / row_bytes, part = columns_at_a_time<M, W>(k);
    alignas(64) float tile[D * M * GEMV_TILE];
    for (long n0 = range.begin; n0 < range.end; n0 += GEMV_TILE) {
        const int count = int(range.end - n0 < GEMV_TILE ? range.end - n0 : GEMV_TILE);
        for (int d = 0; d < D; d++) {
            for (long begin = 0; begin < k; begin += part) {
                const long size = k - begin < part ? k - begin : part;
                for (int j = 0; j < count; j++) {
                    const W* w = row(d, n0 + j);
                    const W* ahead = within ? w + distance / long(sizeof(W)) : stream.at(d, n0, j + rows_ahead);
                    float* out = tile + d * M * GEMV_TILE + j;
                    dot_row<M, W>(a + begin, lda, w + begin, ahead + begin, size, begin > 0, out, GEMV_TILE);
                }
            }
        }
        epilogue(0L, M, n0, count, tile, long(M) * GEMV_TILE, long(GEMV_TILE));
    }
}

}  // namespace tw
