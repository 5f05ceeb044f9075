// Matrix products with few rows (a decode step): every weight is read once, so the memory bus sets the time.
//
// Each thread walks its own contiguous range of weight rows, by default one row at a time, so that it reads one linear
// stream, and prefetches ahead in it (how far is measured when the model is compiled). Weights stay row-major [N, K].
#pragma once

#include <type_traits>

#include "gemv_amx.h"
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

// out[m * ldo + r] (+)= sum over k of a[m * lda + k] * w[r][k], for M rows of a (zero padded to a multiple of the step)
// and R rows of w, U vectors of each per iteration. Line by line, what lies behind `ahead` is prefetched.
template <int M, int R, int U, class W>
TW_INLINE void dot_rows(const activation_t<W>* a, long lda, const W* const (&w)[R], const W* const (&ahead)[R], long k,
                        bool add, float* out, long ldo) {
    constexpr int step = dot<W>::step;
    constexpr int lines = int(step * sizeof(W) + 63) / 64;
    vf sum[R][M * U];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M * U; m++) sum[r][m] = vset(0.0f);
    long i = 0;
    for (; i + step * U <= k; i += step * U) {
        for (int c = 0; c < U; c++) {
            const long at = i + c * step;
            decltype(dot<W>::load(w[0])) wv[R];
            for (int r = 0; r < R; r++) {
                for (int line = 0; line < lines; line++) prefetch((const char*)(ahead[r] + at) + line * 64);
                wv[r] = dot<W>::load(w[r] + at);
            }
            for (int m = 0; m < M; m++) {
                const auto am = dot<W>::load_act(a + m * lda + at);
                for (int r = 0; r < R; r++) sum[r][m * U + c] = dot<W>::add(am, wv[r], sum[r][m * U + c]);
            }
        }
    }
    for (; i < k; i += step) {
        for (int r = 0; r < R; r++) {
            auto wv = i + step <= k ? dot<W>::load(w[r] + i) : dot<W>::load_n(w[r] + i, int(k - i));
            for (int m = 0; m < M; m++) {
                sum[r][m * U] = dot<W>::add(dot<W>::load_act(a + m * lda + i), wv, sum[r][m * U]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) {
            sum[r][m] = sum[r][m * U];
            for (int c = 1; c < U; c++) sum[r][m] = vadd(sum[r][m], sum[r][m * U + c]);
        }
        float* to = out + r;
        int m = 0;
        for (; m + 4 <= M; m += 4) {
            float four[4];
            vsum4(sum[r] + m, four);
            for (int j = 0; j < 4; j++) to[(m + j) * ldo] = four[j] + (add ? to[(m + j) * ldo] : 0.0f);
        }
        for (; m < M; m++) to[m * ldo] = vsum(sum[r][m]) + (add ? to[m * ldo] : 0.0f);
    }
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

    // The distance of `count` rows from column `begin` of dot d on, in elements; 0 where they are not evenly spaced.
    long even_stride(int d, long begin, int count) const {
        const auto* first = row(d, begin);
        const long stride = row(d, begin + 1) - first;
        for (int n = 2; n < count; n++)
            if (row(d, begin + n) - first != n * stride) return 0;
        return stride;
    }
};

// Products of M rows of activations with D weight rows per column, over this worker's share of the columns.
// row(d, n) is the address of the weight row of dot d at column n; the epilogue is that of gemm.h. U vectors of R rows are
// multiplied at a time (see tiling.py), or tiles of AMX where this worker has few_tiles_bytes(k) bytes of scratch for it.
template <class W, int M, int D, int U, int R, class Row, class Epilogue>
TW_INLINE void gemv(const Worker& worker, long columns, long k, const activation_t<W>* a, long lda, const Row& row,
                    const Epilogue& epilogue, char* scratch = nullptr) {
    const Range range = split(worker, columns, 16);
    const RowStream<D, Row> stream{row, range};
    const long row_bytes = k * long(sizeof(W)), distance = worker.team.prefetch_bytes;
    const bool within = row_bytes >= distance;  // a long row: ahead in the same row
    const long rows_ahead = (distance + row_bytes - 1) / row_bytes, part = columns_at_a_time<M, W>(k);
    static_assert(GEMV_TILE == AMX_WEIGHT_ROWS);
    FewTiles<W, M> tiles(a, lda, k, scratch);
    alignas(64) float tile[D * M * GEMV_TILE];
    for (long n0 = range.begin; n0 < range.end; n0 += GEMV_TILE) {
        const int count = int(range.end - n0 < GEMV_TILE ? range.end - n0 : GEMV_TILE);
        for (int d = 0; d < D; d++) {
            const long stride = tiles.in_use() && count == GEMV_TILE ? stream.even_stride(d, n0, count) : 0;
            if (stride != 0) {
                tiles.multiply(row(d, n0), stride, stream.at(d, n0, count), tile + d * M * GEMV_TILE, GEMV_TILE);
                continue;
            }
            for (long begin = 0; begin < k; begin += part) {
                const long size = k - begin < part ? k - begin : part;
                const auto walk = [&](int first, auto number) __attribute__((always_inline)) {
                    constexpr int rows = decltype(number)::value;
                    const W *w[rows], *ahead[rows];
                    for (int r = 0; r < rows; r++) {
                        w[r] = row(d, n0 + first + r) + begin;
                        ahead[r] = within ? w[r] + distance / long(sizeof(W))
                                          : stream.at(d, n0, first + r + rows_ahead) + begin;
                    }
                    float* out = tile + d * M * GEMV_TILE + first;
                    dot_rows<M, rows, U, W>(a + begin, lda, w, ahead, size, begin > 0, out, GEMV_TILE);
                };
                int j = 0;
                for (; j + R <= count; j += R) walk(j, std::integral_constant<int, R>());
                if constexpr (R > 1) {
                    for (; j < count; j++) walk(j, std::integral_constant<int, 1>());
                }
            }
        }
        epilogue(0L, M, n0, count, tile, long(M) * GEMV_TILE, long(GEMV_TILE));
    }
}

}  // namespace tw
