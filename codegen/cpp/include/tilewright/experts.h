// A layer of experts: every token goes through the few networks that were chosen for it, so that of all weights only
// those of chosen experts are read.
//
// Pairs of token and chosen expert are sorted by expert, and are then rows of products: up to EXPERT_GEMV_ROWS rows of an
// expert (a decode step) stream its weights, as gemv.h does or strip by strip; more are multiplied as in gemm.h. Threads
// share the columns of every product. A thread has the same columns in each, so that it alone adds up those of the result.
#pragma once

#include "gemm.h"
#include "gemv.h"

namespace tw {

constexpr int EXPERT_GEMV_ROWS = 4;
constexpr long EXPERT_BLOCK = 512;  // pairs at a time: what they take of scratch does not grow with the prompt

// x[tokens, depth], `chosen` experts of each token, networks of `inner` hidden values. Weights lie as described in
// experts.py of the IR.
struct ExpertsShape {
    long tokens, chosen, experts, depth, inner;
    long prefetch_bytes;
};

// An expert's weights [rows, columns], or [columns, rows] where Transposed, as a product with D dots reads them: column
// n of dot d is the product with row `first + n`, or with row D * n + d of interleaved ones.
template <class W, int D, bool Transposed, bool Interleaved>
struct ExpertMatrix {
    const W* weights;
    long rows, depth;

    long row_of(int d, long n) const { return Interleaved ? D * n + d : d * (rows / D) + n; }
    const W* row(int d, long n) const { return weights + row_of(d, n) * depth; }

    // A panel for gemm.h of columns n0 to n0 + count.
    void pack(int d, long n0, int count, float* panel) const {
        if constexpr (!Transposed) {
            pack_panel<W>(panel, count, depth, [&](int j) { return row(d, n0 + j); });
        } else {
            const W* from = weights + row_of(d, n0);
            for (long unit = 0; unit < panel_rows<W>(depth); unit++, panel += PANEL) {
                const long k = unit * packed<W>::per_unit;
                for (int j = k < depth ? count : 0; j < PANEL; j++) panel[j] = 0.0f;
                if (k >= depth) continue;
                for (int row = 0; row < packed<W>::per_unit; row++) request(from + (k + AHEAD + row) * rows, count);
                pack_unit(from + k * rows, k + 1 < depth, count, panel);
            }
        }
    }

    static constexpr long AHEAD = 32;  // rows of transposed weights, which no hardware foresees
    static constexpr long step = Interleaved ? D : 1;  // from column to column of those

    // Prefetch a row of transposed weights; one behind the last may be named, too.
    static void request(const W* row, int count) {
        const char* first = reinterpret_cast<const char*>(row);
        for (long byte = 0; byte < count * step * long(sizeof(W)); byte += 64) prefetch_now(first + byte);
    }

    // One row of a panel, from one row of transposed weights or from a pair of them.
    void pack_unit(const W* from, bool is_pair, int count, float* panel) const {
        if constexpr (packed<W>::per_unit == 1) {
#pragma omp simd
            for (int j = 0; j < count; j++) panel[j] = to_f32(from[j * step]);
        } else {
            const W* second = is_pair ? from + rows : from;
            const uint32_t both = is_pair ? 0xffffffffu : 0xffffu;
#pragma omp simd
            for (int j = 0; j < count; j++) {
                panel[j] = bit_cast<float>((from[j * step].bits | uint32_t(second[j * step].bits) << 16) & both);
            }
        }
    }
};

template <class F, int M, int D, class Matrix, class Epilogue>
static inline void expert_gemv(const Worker& alone, long rows, long columns, const activation_t<F>* a, long lda,
                               const Matrix& matrix, long first, const Epilogue& epilogue) {
    if (rows == M) {
        const auto row = [&](int d, long n) { return matrix.row(d, first + n); };
        gemv<F, M, D, (M == 1 ? 4 : 2), 1>(alone, columns, matrix.depth, a, lda, row, epilogue);
    } else if constexpr (M > 1) {
        expert_gemv<F, M - 1, D>(alone, rows, columns, a, lda, matrix, first, epilogue);
    }
}

constexpr int EXPERT_WIDTH = 64;  // columns of transposed weights that are summed at a time

// out[m][j] = sum over k of a[m * lda + k] * from[k * stride + j], for j < width: a strip of transposed weights, walked
// downwards. What lies `ahead` rows further down is prefetched, since no hardware follows such strides.
template <int M, class W>
static inline void strip(const activation_t<W>* a, long lda, const W* from, long stride, long depth, int width, long ahead,
                         float (&out)[M][EXPERT_WIDTH]) {
    constexpr int V = EXPERT_WIDTH / VW;
    for (int m = 0; m < M; m++)
        for (int j = 0; j < EXPERT_WIDTH; j++) out[m][j] = 0.0f;
    for (long k0 = 0; k0 < depth; k0 += SUM_BLOCK) {
        const long end = k0 + SUM_BLOCK < depth ? k0 + SUM_BLOCK : depth;
        vf sum[M][V];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) sum[m][v] = vset(0.0f);
        for (long k = k0; k < end; k++) {
            const W* row = from + k * stride;
            for (long line = 0; line < width * long(sizeof(W)); line += 64) prefetch((const char*)(row + ahead * stride) + line);
            for (int v = 0; v < V; v++) {
                const int left = width - v * VW;
                if (left <= 0) break;
                const vf w = left >= VW ? vload(row + v * VW) : vload_n(row + v * VW, left);
                for (int m = 0; m < M; m++) sum[m][v] = vfma(vset(to_f32(a[m * lda + k])), w, sum[m][v]);
            }
        }
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) vstore(out[m] + v * VW, vadd(vload(out[m] + v * VW), sum[m][v]));
    }
}

// expert_gemv for transposed weights.
template <class F, int M, int D, bool Interleaved, class Matrix, class Epilogue>
static inline void expert_strips(const Worker& alone, long rows, long columns, const activation_t<F>* a, long lda,
                                 const Matrix& matrix, long first, const Epilogue& epilogue) {
    if (rows != M) {
        if constexpr (M > 1) expert_strips<F, M - 1, D, Interleaved>(alone, rows, columns, a, lda, matrix, first, epilogue);
        return;
    }
    constexpr int across = Interleaved ? D : 1, most = EXPERT_WIDTH / across;
    const long ahead = std::min<long>(64, alone.team.prefetch_bytes / (EXPERT_WIDTH * long(sizeof(*matrix.weights))));
    alignas(64) float out[M][EXPERT_WIDTH], tile[D * M * EXPERT_WIDTH];
    for (long n0 = 0; n0 < columns; n0 += most) {
        const int n = int(columns - n0 < most ? columns - n0 : most);
        for (int d = 0; d < D; d += across) {
            const auto* from = matrix.weights + matrix.row_of(d, first + n0);
            strip<M>(a, lda, from, matrix.rows, matrix.depth, n * across, ahead, out);
            for (int m = 0; m < M; m++)
                for (int j = 0; j < n * across; j++)
                    tile[((d + j % across) * M + m) * EXPERT_WIDTH + j / across] = out[m][j];
        }
        epilogue(0L, M, n0, n, tile, long(M) * EXPERT_WIDTH, long(EXPERT_WIDTH));
    }
}

// Products of `rows` rows of activations with this thread's columns of an expert's matrix. epilogue: that of gemm.h, with
// columns counted from that range's begin. panels: gemm_floats(depth, D).
template <class F, int D, bool Transposed, bool Interleaved, class Matrix, class Epilogue>
static inline void expert_product(const Worker& alone, long rows, Range columns, const activation_t<F>* a, long lda,
                                  const Matrix& matrix, float* panels, const Epilogue& epilogue) {
    const long first = columns.begin, count = columns.end - columns.begin;
    if (count <= 0) return;
    if (rows <= EXPERT_GEMV_ROWS) {
        if constexpr (Transposed) {
            expert_strips<F, EXPERT_GEMV_ROWS, D, Interleaved>(alone, rows, count, a, lda, matrix, first, epilogue);
        } else {
            expert_gemv<F, EXPERT_GEMV_ROWS, D>(alone, rows, count, a, lda, matrix, first, epilogue);
        }
        return;
    }
    const auto pack = [&](int d, long n0, int n, float* to) { matrix.pack(d, first + n0, n, to); };
    gemm<F, D>(alone, rows, count, matrix.depth, a, lda, panels, pack, epilogue);
}

// Pairs (token * chosen + place) sorted by expert: those of expert e are order[start[e]] to order[start[e + 1]]. An id
// that names no expert, which only the index of a NaN could be, counts as the nearest that there is.
template <class Id>
static inline void sort_pairs(const ExpertsShape& s, const Id* ids, int64_t* order, int64_t* start) {
    const long pairs = s.tokens * s.chosen, last = s.experts - 1;
    const auto expert = [&](long pair) {
        const long id = long(ids[pair]);
        return id < 0 ? 0 : id > last ? last : id;
    };
    for (long e = 0; e <= s.experts; e++) start[e] = 0;
    for (long p = 0; p < pairs; p++) start[expert(p) + 1]++;
    for (long e = 0; e < s.experts; e++) start[e + 1] += start[e];
    // Placing moves each begin to its end, which is the next begin; so they are moved back by one expert afterwards.
    for (long p = 0; p < pairs; p++) order[start[expert(p)]++] = p;
    for (long e = s.experts; e > 0; e--) start[e] = start[e - 1];
    start[0] = 0;
}

// The scratch that a team shares.
template <class F>
struct ExpertsScratch {
    int64_t *order, *start;
    activation_t<F>*rows, *hidden;
    float* total;

    static long block(const ExpertsShape& s) { return std::min(EXPERT_BLOCK, s.tokens * s.chosen); }
    static long nbytes(const ExpertsShape& s) {
        return bytes<int64_t>(s.tokens * s.chosen) + bytes<int64_t>(s.experts + 1) +
               bytes<activation_t<F>>(block(s) * padded<F>(s.depth)) +
               bytes<activation_t<F>>(block(s) * padded<F>(s.inner)) + bytes<float>(s.tokens * s.depth);
    }
    ExpertsScratch(const ExpertsShape& s, char* scratch) {
        order = carve<int64_t>(scratch, s.tokens * s.chosen);
        start = carve<int64_t>(scratch, s.experts + 1);
        rows = carve<activation_t<F>>(scratch, block(s) * padded<F>(s.depth));
        hidden = carve<activation_t<F>>(scratch, block(s) * padded<F>(s.inner));
        total = carve<float>(scratch, s.tokens * s.depth);
    }
};

template <class W>
static inline long experts_shared_bytes(const ExpertsShape& s) {
    return ExpertsScratch<W>::nbytes(s);
}
// Of each thread: panels of the two products, one after the other.
template <class W>
static inline long experts_private_bytes(const ExpertsShape& s) {
    return std::max(bytes<float>(gemm_floats<W>(s.depth, 2)), bytes<float>(gemm_floats<W>(s.inner, 1)));
}

// out[tokens, depth] = for each token, the sum over its chosen experts of score * (down * gate(gate_up * x)), biases added
// where they are not null. gate(g, u): what becomes of a gate and its up.
template <class W, bool Transposed, bool Interleaved, class Id, class Score, class Gate>
static inline void experts(const Worker& worker, const ExpertsShape& s, const W* x, const Id* ids, const Score* scores,
                           const W* gate_up, const W* down, const W* gate_up_bias, const W* down_bias, W* out,
                           char* shared, char* own, const Gate& gate) {
    const ExpertsScratch<W> scratch(s, shared);
    const long lda = padded<W>(s.depth), ldh = padded<W>(s.inner), pairs = s.tokens * s.chosen;
    Team solo(s.prefetch_bytes);
    const Worker alone{solo, 0, 1};
    const Range hidden_columns = split(worker, s.inner, 16), columns = split(worker, s.depth, 16);
    float* panel = reinterpret_cast<float*>(own);
    if (worker.id == 0) sort_pairs(s, ids, scratch.order, scratch.start);
    for (long t = 0; t < s.tokens; t++) {
        for (long n = columns.begin; n < columns.end; n++) scratch.total[t * s.depth + n] = 0.0f;
    }
    for (long begin = 0; begin < pairs; begin += EXPERT_BLOCK) {
        const long end = std::min(begin + EXPERT_BLOCK, pairs);
        worker.barrier();  // pairs are sorted, and nobody reads the rows of the block before
        const Range mine = split(worker, end - begin);
        for (long i = mine.begin; i < mine.end; i++) {
            const W* from = x + scratch.order[begin + i] / s.chosen * s.depth;
            activation_t<W>* to = scratch.rows + i * lda;
#pragma omp simd
            for (long k = 0; k < s.depth; k++) to[k] = to_activation<W, W>(to_f32(from[k]));
            for (long k = s.depth; k < lda; k++) to[k] = activation_t<W>{};
            for (long k = s.inner; k < ldh; k++) scratch.hidden[i * ldh + k] = activation_t<W>{};
        }
        worker.barrier();
        const auto each_expert = [&](const auto& multiply) {
            for (long e = 0; e < s.experts; e++) {
                const long from = std::max<long>(scratch.start[e], begin), to = std::min<long>(scratch.start[e + 1], end);
                if (from < to) multiply(e, from, to - from);
            }
        };
        each_expert([&](long e, long from, long rows) {
            const ExpertMatrix<W, 2, Transposed, Interleaved> matrix{gate_up + e * 2 * s.inner * s.depth, 2 * s.inner, s.depth};
            const W* bias = gate_up_bias == nullptr ? nullptr : gate_up_bias + e * 2 * s.inner;
            const auto epilogue = [&](long m0, int m, long n0, int n, const float* tile, long per_dot, long per_row) {
                for (int i = 0; i < m; i++) {
                    const float* sums = tile + i * per_row;
                    activation_t<W>* to = scratch.hidden + (from - begin + m0 + i) * ldh + hidden_columns.begin + n0;
#pragma omp simd
                    for (int j = 0; j < n; j++) {
                        float g = sums[j], u = sums[per_dot + j];
                        if (bias != nullptr) {
                            const long column = hidden_columns.begin + n0 + j;
                            g += to_f32(bias[matrix.row_of(0, column)]);
                            u += to_f32(bias[matrix.row_of(1, column)]);
                        }
                        to[j] = to_activation<W, W>(gate(g, u));
                    }
                }
            };
            const activation_t<W>* a = scratch.rows + (from - begin) * lda;
            expert_product<W, 2, Transposed, Interleaved>(alone, rows, hidden_columns, a, lda, matrix, panel, epilogue);
        });
        worker.barrier();
        each_expert([&](long e, long from, long rows) {
            const ExpertMatrix<W, 1, Transposed, false> matrix{down + e * s.depth * s.inner, s.depth, s.inner};
            const W* bias = down_bias == nullptr ? nullptr : down_bias + e * s.depth + columns.begin;
            const auto epilogue = [&](long m0, int m, long n0, int n, const float* tile, long, long per_row) {
                for (int i = 0; i < m; i++) {
                    const float* sums = tile + i * per_row;
                    const long pair = scratch.order[from + m0 + i];
                    const float score = float(to_f32(scores[pair]));
                    float* to = scratch.total + pair / s.chosen * s.depth + columns.begin + n0;
#pragma omp simd
                    for (int j = 0; j < n; j++) to[j] += score * (bias == nullptr ? sums[j] : sums[j] + to_f32(bias[n0 + j]));
                }
            };
            const activation_t<W>* a = scratch.hidden + (from - begin) * ldh;
            expert_product<W, 1, Transposed, false>(alone, rows, columns, a, ldh, matrix, panel, epilogue);
        });
    }
    for (long t = 0; t < s.tokens; t++) {
        for (long n = columns.begin; n < columns.end; n++) out[t * s.depth + n] = from_f32<W>(scratch.total[t * s.depth + n]);
    }
}

}  // namespace tw
