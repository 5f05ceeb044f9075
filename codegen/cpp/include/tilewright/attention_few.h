// Attention of few queries (a decode step): keys and values are used where they lie, several query rows at a time.
#pragma once

#include "attention_shape.h"

namespace tw {

constexpr int ROW_GROUP = 4;  // rows that share each load (and widening) of a key or value

// Keys per step of the online softmax. Long steps make long linear streams of keys, then of values; when a step is read
// several times, by one group of rows after the other, it had better stay in the first cache.
constexpr int LONG_TILE = 512, SHORT_TILE = 64;

// What a stream of `count` rows will read soon: its own rows, and behind them those of the stream that follows.
template <class T, int D>
struct RowsAhead {
    const T* here;
    long stride;
    int count;
    const T* then;
    long then_stride, rows;  // rows: the distance

    RowsAhead(const AttentionShape& s, const T* here, long stride, int count, const T* then, long then_stride)
        : here(here), stride(stride), count(count), then(then), then_stride(then_stride),
          rows(s.prefetch_bytes / long(D * sizeof(T)) + 1) {}

    // Prefetch `bytes` of the row that comes `rows` rows after row j, from byte `at` on.
    void prefetch_row(int j, int at = 0, int bytes = int(D * sizeof(T))) const {
        const long n = j + rows;
        const T* row = n < count ? here + n * stride : then + (n - count) * then_stride;
        for (int byte = at; byte < at + bytes; byte += 64) prefetch(reinterpret_cast<const char*>(row) + byte);
    }
};

// scores[r * LONG_TILE + j] = q_r . k_j for R rows of q (D floats each) and K keys, whose R * K sums fit the registers.
template <class T, int D, int R, int K>
TW_INLINE void score_some(const float* q, const T* k, long stride, float* scores) {
    constexpr int full = D / VW * VW;
    vf sum[R * K];
    for (int n = 0; n < R * K; n++) sum[n] = vset(0.0f);
    for (int i = 0; i < D; i += VW) {
        vf rows[R];
        for (int r = 0; r < R; r++) rows[r] = i < full ? vload(q + r * D + i) : vload_n(q + r * D + i, D - i);
        for (int j = 0; j < K; j++) {
            const vf key = i < full ? vload(k + j * stride + i) : vload_n(k + j * stride + i, D - i);
            for (int r = 0; r < R; r++) sum[r * K + j] = vfma(rows[r], key, sum[r * K + j]);
        }
    }
    float sums[R * K];
    for (int n = 0; n < R * K; n += 4) vsum4(sum + n, sums + n);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < K; j++) scores[r * LONG_TILE + j] = sums[r * K + j];
}

// The same for `count` keys.
template <class T, int D, int R>
static inline void score_keys(const float* q, const T* k, long stride, int count, float* scores,
                              const RowsAhead<T, D>& ahead) {
    constexpr int K = VW == 8 && R > 3 ? 2 : 4;
    int j = 0;
    for (; j + K <= count; j += K) {
        for (int i = 0; i < K; i++) ahead.prefetch_row(j + i);
        score_some<T, D, R, K>(q, k + j * stride, stride, scores + j);
    }
    for (; j < count; j++) {
        float some[R * LONG_TILE];
        score_some<T, D, R, K>(q, k + j * stride, 0, some);
        for (int r = 0; r < R; r++) scores[r * LONG_TILE + j] = some[r * LONG_TILE];
    }
}

// acc_r = acc_r * factor_r + the sum over keys of weights[r * LONG_TILE + j] * v_j, for R rows and N vectors of v from
// element `at` on.
template <class T, int DV, int R, int N>
TW_INLINE void add_values(const float* weights, int count, const float* factors, const T* v, long stride,
                          float* const* acc, int at, const RowsAhead<T, DV>& ahead) {
    vf sum[R][N];
    const auto lanes = [&](int i) { return DV - at - i * VW < VW ? DV - at - i * VW : VW; };
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) sum[r][i] = vmul(vload_n(acc[r] + at + i * VW, lanes(i)), vset(factors[r]));
    for (int j = 0; j < count; j++) {
        ahead.prefetch_row(j, at * int(sizeof(T)), N * VW * int(sizeof(T)));
        vf weight[R];
        for (int r = 0; r < R; r++) weight[r] = vset(weights[r * LONG_TILE + j]);
        for (int i = 0; i < N; i++) {
            const T* from = v + j * stride + at + i * VW;
            const vf value = DV % VW == 0 ? vload(from) : vload_n(from, lanes(i));
            for (int r = 0; r < R; r++) sum[r][i] = vfma(weight[r], value, sum[r][i]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) vstore_n(acc[r] + at + i * VW, sum[r][i], lanes(i));
}

// add_values for all of DV, a few vectors at a time, so that the sums stay in registers.
template <class T, int DV, int R>
static inline void add_all_values(const float* weights, int count, const float* factors, const T* v, long stride,
                                  float* const* acc, const RowsAhead<T, DV>& ahead) {
    constexpr int vectors = (DV + VW - 1) / VW, most = VW == 8 && R > 3 ? 2 : R == 1 ? 8 : 4;
    constexpr int group = vectors < most ? vectors : most;
    int i = 0;
    for (; i + group <= vectors; i += group) {
        add_values<T, DV, R, group>(weights, count, factors, v, stride, acc, i * VW, ahead);
    }
    for (; i < vectors; i++) add_values<T, DV, R, 1>(weights, count, factors, v, stride, acc, i * VW, ahead);
}

// Where partial results go: for each row and part of the context, the weighted sum of values relative to `top`, and the
// total weight. acc's last axis is contiguous.
struct Partials {
    float *acc, *top, *total;
    Strides acc_strides, top_strides, total_strides;
};

// One tile of keys for R rows of one KV head, starting at row `row`.
template <class T, class C, int D, int DV, int R>
static inline void attend_tile(const AttentionShape& s, long batch, long group, long part, long row, long first,
                               int count, const T* q, const C* k, const C* v, const Partials& to) {
    const long per_group = s.heads_per_group();
    alignas(64) float scaled[R * D], scores[R * LONG_TILE];
    float *acc[R], *top[R], *total[R], factors[R];
    for (int r = 0; r < R; r++) {
        const long query = (row + r) / per_group, head = group * per_group + (row + r) % per_group;
        acc[r] = to.acc + to.acc_strides.at(batch, head, query, part);
        top[r] = to.top + to.top_strides.at(batch, head, query, part);
        total[r] = to.total + to.total_strides.at(batch, head, query, part);
        const T* from = q + s.q.at(batch, head, query);
        for (int i = 0; i < D; i++) scaled[r * D + i] = to_f32(from[i]) * s.scale;
    }
    const C *keys = k + first * s.k.row, *values = v + first * s.v.row;
    // Behind the last keys come the values, and behind those the next keys.
    const RowsAhead<C, D> after_key(s, keys, s.k.row, count, values, s.v.row);
    const RowsAhead<C, DV> after_value(s, values, s.v.row, count, keys + count * s.k.row, s.k.row);
    score_keys<C, D, R>(scaled, keys, s.k.row, count, scores, after_key);
    for (int r = 0; r < R; r++) {
        const long query = (row + r) / per_group, head = group * per_group + (row + r) % per_group;
        float* of_row = scores + r * LONG_TILE;
        finish_scores<T>(s, batch, head, query, first, count, of_row);
        SoftmaxRow softmax{*top[r], *total[r]};
        factors[r] = softmax.update(of_row, count, VW, 1.0f, of_row);
        *top[r] = softmax.top;
        *total[r] = softmax.total;
    }
    add_all_values<C, DV, R>(scores, count, factors, values, s.v.row, acc, after_value);
}

// The part [begin, end) of the context, for all rows of one batch row and KV head. Tile by tile over the keys, all rows
// of a tile at a time: keys and values come from memory once.
template <class T, class C, int D, int DV>
static inline void attend_part(const AttentionShape& s, long batch, long group, long part, Range range, const T* q,
                               const C* k, const C* v, const Partials& to) {
    const long per_group = s.heads_per_group(), rows = s.queries * per_group;
    const C* kg = k + s.k.at(batch, group, 0);
    const C* vg = v + s.v.at(batch, group, 0);
    for (long row = 0; row < rows; row++) {
        const long query = row / per_group, head = group * per_group + row % per_group;
        float* acc = to.acc + to.acc_strides.at(batch, head, query, part);
        for (int i = 0; i < DV; i++) acc[i] = 0.0f;
        to.top[to.top_strides.at(batch, head, query, part)] = MASKED;
        to.total[to.total_strides.at(batch, head, query, part)] = 0.0f;
    }
    const int step = rows <= ROW_GROUP ? LONG_TILE : SHORT_TILE;
    for (long first = range.begin; first < range.end; first += step) {
        const int count = int(range.end - first < step ? range.end - first : step);
        for (long row = 0; row < rows;) {
            const auto tile = [&](auto size) {
                constexpr int R = decltype(size)::value;
                attend_tile<T, C, D, DV, R>(s, batch, group, part, row, first, count, q, kg, vg, to);
                row += R;
            };
            switch (rows - row) {
                case 1: tile(std::integral_constant<int, 1>{}); break;
                case 2: tile(std::integral_constant<int, 2>{}); break;
                case 3: tile(std::integral_constant<int, 3>{}); break;
                default: tile(std::integral_constant<int, ROW_GROUP>{});
            }
        }
    }
}

// Attention of few queries over `splits` equal chunks of the context, results left in parts. Every worker of the team
// calls it; it needs no scratch, and s.out is unused.
template <class T, class C, int D, int DV>
static inline void attend_split(const Worker& worker, const AttentionShape& s, long splits, const T* q, const C* k,
                                const C* v, const Partials& to) {
    const long chunk = (s.keys + splits - 1) / splits;
    const Range mine = split(worker, s.batch * s.groups * splits);
    for (long item = mine.begin; item < mine.end; item++) {
        const long pair = item / splits, part = item % splits;
        const long end = (part + 1) * chunk < s.keys ? (part + 1) * chunk : s.keys;
        attend_part<T, C, D, DV>(s, pair / s.groups, pair % s.groups, part, {part * chunk, end}, q, k, v, to);
    }
}

// One row of the result from its parts.
template <class T, int DV>
static inline void merge_parts(const AttentionShape& s, long batch, long head, long query, long parts,
                               const Partials& from, T* out) {
    const float sink = s.sink<T>(head);
    float top = sink, total = 0.0f;
    for (long p = 0; p < parts; p++) {
        const float t = from.top[from.top_strides.at(batch, head, query, p)];
        top = t > top ? t : top;
    }
    float sum[DV] = {};
    for (long p = 0; p < parts; p++) {
        const float weight = tw::exp(from.top[from.top_strides.at(batch, head, query, p)] - top);
        const float* acc = from.acc + from.acc_strides.at(batch, head, query, p);
        total += weight * from.total[from.total_strides.at(batch, head, query, p)];
        for (int i = 0; i < DV; i++) sum[i] += weight * acc[i];
    }
    if (s.sinks != nullptr) total += tw::exp(sink - top);
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    T* to = out + s.out.at(batch, head, query);
    for (int i = 0; i < DV; i++) to[i * s.out.column] = from_f32<T>(sum[i] * inverse);
}

// Floats of scratch that the team shares in attend_few.
static inline long attention_parts_floats(long batch, long heads, long queries, long dv, int threads) {
    const long rows = queries < FEW_ROWS ? queries : FEW_ROWS;
    return batch * heads * rows * threads * (dv + 2);
}

// Attention of few rows per KV head (a decode step). The context is split over the team when there are not enough KV
// heads to go round; the parts meet in `scratch`, after a barrier.
template <class T, class C, int D, int DV>
static inline void attend_few(const Worker& worker, const AttentionShape& s, const T* q, const C* k, const C* v, T* out,
                              float* scratch) {
    const long pairs = s.batch * s.groups;
    const bool even = pairs % worker.size() == 0 || s.keys < 2 * SHORT_TILE;
    const long parts = even ? 1 : worker.size(), rows = s.batch * s.heads * s.queries;
    const Strides per_row{s.heads * s.queries * parts, s.queries * parts, parts, 1, 1};
    const Strides per_acc{per_row.batch * DV, per_row.head * DV, per_row.row * DV, 1, DV};
    float* top = scratch + rows * parts * DV;
    const Partials partials{scratch, top, top + rows * parts, per_acc, per_row, per_row};
    attend_split<T, C, D, DV>(worker, s, parts, q, k, v, partials);
    if (parts > 1) worker.barrier();
    // Without parts, this worker's KV heads are the ones that it has just computed.
    const Range mine = parts > 1 ? split(worker, rows) : split(worker, pairs);
    const long step = parts > 1 ? 1 : s.queries * s.heads_per_group();
    for (long row = mine.begin * step; row < mine.end * step; row++) {
        merge_parts<T, DV>(s, row / s.queries / s.heads, row / s.queries % s.heads, row % s.queries, parts, partials, out);
    }
}

}  // namespace tw
