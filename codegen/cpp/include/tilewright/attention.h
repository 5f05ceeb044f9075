// Attention with an online softmax: softmax(q k^T * scale) v without a score matrix in memory (the method of
// FlashAttention, Dao et al. 2022; over splits of the context, of Flash-Decoding, 2023).
//
// All query heads of a KV head are handled together, so keys and values are read once. Masks are index arithmetic:
// query row i stands at context position keys - queries + i. A row without a valid key gives zeros.
#pragma once

#include "gemm.h"
#include "math.h"

namespace tw {

constexpr float MASKED = -1e30f;  // finite, so that differences of masked scores are no NaN
constexpr int KEY_TILE = 64;      // keys per step of the online softmax
constexpr int QUERY_ROWS = 96;    // rows (positions x heads of a group) per work item of a prompt
constexpr int FEW_ROWS = 16;      // up to this many rows, keys are used where they lie, not packed

// Strides of a [batch, heads, positions, size] tensor, in elements; where none is said, the last axis is contiguous.
// `part` is that of the splits of a partial result.
struct Strides {
    long batch, head, row, column = 1, part = 0;

    long at(long b, long h, long s, long p = 0) const { return b * batch + h * head + s * row + p * part; }
};

struct AttentionShape {
    long batch, heads, groups, queries, keys;
    Strides q, k, v, out;
    const uint8_t* mask;  // [batch, mask_row], non-zero where a key may be attended to; or null
    long mask_row;
    float scale, softcap;  // softcap 0: none
    bool causal;
    long window;       // keys further back than this are masked; 0: none
    double scale_f64;  // scale in full, for float64

    long heads_per_group() const { return heads / groups; }
    // The keys that causality and window leave to a query.
    Range visible(long query) const {
        const long at = keys - queries + query;
        const long begin = window > 0 && at - window + 1 > 0 ? at - window + 1 : 0;
        return {begin < keys ? begin : keys, causal && at + 1 < keys ? at + 1 : keys};
    }
};

// Soft cap and masks, in place, of the scores of one query row with keys [first, first + count).
static inline void mask_scores(const AttentionShape& s, long batch, long query, long first, int count, float* scores) {
    if (s.softcap > 0.0f) {
        const float inverse = 1.0f / s.softcap;
#pragma omp simd
        for (int j = 0; j < count; j++) scores[j] = s.softcap * tw::tanh(scores[j] * inverse);
    }
    const Range visible = s.visible(query);
    if (visible.begin > first || visible.end < first + count) {
        for (int j = 0; j < count; j++) {
            if (first + j < visible.begin || first + j >= visible.end) scores[j] = MASKED;
        }
    }
    if (s.mask != nullptr) {
        const uint8_t* valid = s.mask + batch * s.mask_row + first;
#pragma omp simd
        for (int j = 0; j < count; j++) scores[j] = valid[j] != 0 ? scores[j] : MASKED;
    }
}

// The running maximum and sum of one row's softmax.
struct SoftmaxRow {
    float top = MASKED, total = 0.0f;

    // Turn scores into weights relative to the new maximum; gives the factor for what was accumulated before.
    float update(float* scores, int count) {
        float highest = top;
#pragma omp simd reduction(max : highest)
        for (int j = 0; j < count; j++) highest = scores[j] > highest ? scores[j] : highest;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < count; j++) {
            const float score = scores[j], weight = tw::exp(score - highest);
            scores[j] = score > 0.5f * MASKED ? weight : 0.0f;
            sum += scores[j];
        }
        const float factor = tw::exp(top - highest);
        total = total * factor + sum;
        top = highest;
        return factor;
    }
};

static inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// Floats of scratch that one thread of `attend_many` needs.
static inline long attention_scratch_floats(long d, long dv) {
    const long dvp = round_up(dv, PANEL);
    return QUERY_ROWS * (d + KEY_TILE + dvp) + KEY_TILE * (round_up(d, VW) + dvp);
}

// One work item of a prompt: rows r = (query - q0) * heads + (head - head0), of one batch row and one KV head.
template <class T, int D, int DV>
struct PromptBlock {
    static constexpr int DVP = (DV + PANEL - 1) / PANEL * PANEL;
    static constexpr int DP = (D + VW - 1) / VW * VW;
    const AttentionShape& s;
    long batch, group, q0, head0, heads;
    int rows;
    float *q, *scores, *acc, *keys, *values;
    SoftmaxRow softmax[QUERY_ROWS];

    long head(int r) const { return head0 + r % heads; }
    long query(int r) const { return q0 + r / heads; }

    void load_queries(const T* source) {
        for (int r = 0; r < rows; r++) {
            const T* from = source + s.q.at(batch, head(r), query(r));
            for (int i = 0; i < D; i++) q[r * D + i] = to_f32(from[i]) * s.scale;
            for (int i = 0; i < DVP; i++) acc[r * DVP + i] = 0.0f;
            softmax[r] = SoftmaxRow{};
        }
    }

    // Values as panels [DVP / PANEL][KEY_TILE][PANEL], zero beyond DV.
    void pack_values(const T* source, int count) {
        for (int p = 0; p < DVP; p += PANEL) {
            float* panel = values + p * KEY_TILE;
            for (int j = 0; j < count; j++) {
                const T* from = source + j * s.v.row + p;
                for (int i = 0; i < PANEL; i++) panel[j * PANEL + i] = p + i < DV ? to_f32(from[i]) : 0.0f;
            }
        }
    }

    void step(const T* k, const T* v, long first, int count) {
        for (int p = 0; p < count; p += PANEL) {
            const int n = count - p < PANEL ? count - p : PANEL;
            pack_rows<T, widened<T>>(keys + p * DP, n, D, [&](int j) { return k + (first + p + j) * s.k.row; });
        }
        pack_values(v + first * s.v.row, count);
        for (int r = 0; r < rows; r += TILE_ROWS) {
            const int m = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            for (int p = 0; p < count; p += PANEL) {
                multiply_rows<float, false>(m, q + r * D, D, keys + p * DP, D, scores + r * KEY_TILE + p, KEY_TILE);
            }
            for (int i = r; i < r + m; i++) {
                float* row = scores + i * KEY_TILE;
                mask_scores(s, batch, query(i), first, count, row);
                const float factor = softmax[i].update(row, count);
                if (factor != 1.0f) {
                    for (int c = 0; c < DVP; c++) acc[i * DVP + c] *= factor;
                }
            }
            for (int p = 0; p < DVP; p += PANEL) {
                multiply_rows<float, true>(m, scores + r * KEY_TILE, KEY_TILE, values + p * KEY_TILE, count,
                                           acc + r * DVP + p, DVP);
            }
        }
    }

    void store(T* out) const {
        for (int r = 0; r < rows; r++) {
            T* to = out + s.out.at(batch, head(r), query(r));
            const float inverse = softmax[r].total > 0.0f ? 1.0f / softmax[r].total : 0.0f;
            for (int i = 0; i < DV; i++) to[i * s.out.column] = from_f32<T>(acc[r * DVP + i] * inverse);
        }
    }
};

// Attention of many queries (a prompt); every worker of the team calls it. scratch: attention_scratch_floats(D, DV).
template <class T, int D, int DV>
static inline void attend_many(const Worker& worker, const AttentionShape& s, const T* q, const T* k, const T* v,
                               T* out, float* scratch) {
    using Block = PromptBlock<T, D, DV>;
    const long per_group = s.heads_per_group();
    const long heads = per_group < QUERY_ROWS ? per_group : QUERY_ROWS, positions = QUERY_ROWS / heads;
    const long cuts = (per_group + heads - 1) / heads;  // of a group with more heads than rows
    const long blocks = (s.queries + positions - 1) / positions, parts = s.batch * s.groups * cuts;
    Block block{s};
    block.q = scratch;
    block.scores = block.q + QUERY_ROWS * D;
    block.acc = block.scores + QUERY_ROWS * KEY_TILE;
    block.keys = block.acc + QUERY_ROWS * Block::DVP;
    block.values = block.keys + KEY_TILE * Block::DP;
    // Longest blocks first, dealt out in turn: causality makes late queries the most expensive.
    for (long item = worker.id; item < blocks * parts; item += worker.size()) {
        const long part = item % parts, cut = part % cuts;
        block.group = part / cuts % s.groups;
        block.batch = part / cuts / s.groups;
        block.head0 = block.group * per_group + cut * heads;
        block.heads = per_group - cut * heads < heads ? per_group - cut * heads : heads;
        block.q0 = (blocks - 1 - item / parts) * positions;
        const long end = block.q0 + positions < s.queries ? block.q0 + positions : s.queries;
        block.rows = int((end - block.q0) * block.heads);
        block.load_queries(q);
        const T* kg = k + s.k.at(block.batch, block.group, 0);
        const T* vg = v + s.v.at(block.batch, block.group, 0);
        const long last = s.visible(end - 1).end;
        for (long first = s.visible(block.q0).begin; first < last; first += KEY_TILE) {
            block.step(kg, vg, first, int(last - first < KEY_TILE ? last - first : KEY_TILE));
        }
        block.store(out);
    }
}

// One row of a product with keys: out[j] = q . k_j for four keys.
template <class T, int D>
TW_INLINE void score_four(const float* q, const T* k, long stride, float* out) {
    constexpr int full = D / VW * VW;
    vf sum[4] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
    for (int i = 0; i < full; i += VW) {
        const vf qi = vload(q + i);
        for (int j = 0; j < 4; j++) sum[j] = vfma(qi, vload(k + j * stride + i), sum[j]);
    }
    if constexpr (full < D) {
        const vf qi = vload_n(q + full, D - full);
        for (int j = 0; j < 4; j++) sum[j] = vfma(qi, vload_n(k + j * stride + full, D - full), sum[j]);
    }
    vsum4(sum, out);
}

// scores[j] = q . k_j for `count` keys.
template <class T, int D>
static inline void score_keys(const float* q, const T* k, long stride, int count, float* scores) {
    int j = 0;
    for (; j + 4 <= count; j += 4) score_four<T, D>(q, k + j * stride, stride, scores + j);
    for (; j < count; j++) {
        float four[4];
        score_four<T, D>(q, k + j * stride, 0, four);
        scores[j] = four[0];
    }
}

// acc = acc * factor + the sum of weights[j] * v_j.
template <class T, int DV>
TW_INLINE void add_values(const float* weights, int count, float factor, const T* v, long stride, float* acc) {
    constexpr int full = DV / VW, tail = DV % VW;
    vf sum[full + 1];
    for (int i = 0; i < full; i++) sum[i] = vmul(vload(acc + i * VW), vset(factor));
    if constexpr (tail > 0) sum[full] = vmul(vload_n(acc + full * VW, tail), vset(factor));
    for (int j = 0; j < count; j++) {
        const vf weight = vset(weights[j]);
        const T* from = v + j * stride;
        for (int i = 0; i < full; i++) sum[i] = vfma(weight, vload(from + i * VW), sum[i]);
        if constexpr (tail > 0) sum[full] = vfma(weight, vload_n(from + full * VW, tail), sum[full]);
    }
    for (int i = 0; i < full; i++) vstore(acc + i * VW, sum[i]);
    if constexpr (tail > 0) vstore_n(acc + full * VW, sum[full], tail);
}

// Where partial results go: for each row and part of the context, the weighted sum of values relative to `top`, and the
// total weight. acc's last axis is contiguous.
struct Partials {
    float *acc, *top, *total;
    Strides acc_strides, top_strides, total_strides;
};

// The part [begin, end) of the context, for all rows of one batch row and KV head. Block by block over the keys, all
// rows of a block at a time: keys and values come from memory once.
template <class T, int D, int DV>
static inline void attend_part(const AttentionShape& s, long batch, long group, long part, Range range, const T* q,
                               const T* k, const T* v, const Partials& to) {
    const long per_group = s.heads_per_group(), rows = s.queries * per_group;
    const T* kg = k + s.k.at(batch, group, 0);
    const T* vg = v + s.v.at(batch, group, 0);
    for (long first = range.begin; first == range.begin || first < range.end; first += KEY_TILE) {
        const int count = int(range.end - first < KEY_TILE ? range.end - first : KEY_TILE);
        for (int j = 0; j < count; j++) {  // the values, while the keys are being worked on
            const char* row = reinterpret_cast<const char*>(vg + (first + j) * s.v.row);
            for (int i = 0; i < int(DV * sizeof(T)); i += 64) prefetch(row + i);
        }
        for (long row = 0; row < rows; row++) {
            const long query = row / per_group, head = group * per_group + row % per_group;
            float* acc = to.acc + to.acc_strides.at(batch, head, query, part);
            float& top = to.top[to.top_strides.at(batch, head, query, part)];
            float& total = to.total[to.total_strides.at(batch, head, query, part)];
            if (first == range.begin) {
                top = MASKED;
                total = 0.0f;
                for (int i = 0; i < DV; i++) acc[i] = 0.0f;
            }
            if (count <= 0) continue;
            const T* from = q + s.q.at(batch, head, query);
            alignas(64) float scaled[D], scores[KEY_TILE];
            for (int i = 0; i < D; i++) scaled[i] = to_f32(from[i]) * s.scale;
            score_keys<T, D>(scaled, kg + first * s.k.row, s.k.row, count, scores);
            mask_scores(s, batch, query, first, count, scores);
            SoftmaxRow softmax{top, total};
            const float factor = softmax.update(scores, count);
            top = softmax.top;
            total = softmax.total;
            add_values<T, DV>(scores, count, factor, vg + first * s.v.row, s.v.row, acc);
        }
    }
}

// Attention of few queries over `splits` equal chunks of the context, results left in parts. Every worker of the team
// calls it; it needs no scratch, and s.out is unused.
template <class T, int D, int DV>
static inline void attend_split(const Worker& worker, const AttentionShape& s, long splits, const T* q, const T* k,
                                const T* v, const Partials& to) {
    const long chunk = (s.keys + splits - 1) / splits;
    const Range mine = split(worker, s.batch * s.groups * splits);
    for (long item = mine.begin; item < mine.end; item++) {
        const long pair = item / splits, part = item % splits;
        const long end = (part + 1) * chunk < s.keys ? (part + 1) * chunk : s.keys;
        attend_part<T, D, DV>(s, pair / s.groups, pair % s.groups, part, {part * chunk, end}, q, k, v, to);
    }
}

// One row of the result from its parts.
template <class T, int DV>
static inline void merge_parts(const AttentionShape& s, long batch, long head, long query, long parts,
                               const Partials& from, T* out) {
    float top = MASKED, total = 0.0f;
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
template <class T, int D, int DV>
static inline void attend_few(const Worker& worker, const AttentionShape& s, const T* q, const T* k, const T* v, T* out,
                              float* scratch) {
    const long pairs = s.batch * s.groups;
    const bool even = pairs % worker.size() == 0 || s.keys < 2 * KEY_TILE;
    const long parts = even ? 1 : worker.size(), rows = s.batch * s.heads * s.queries;
    const Strides per_row{s.heads * s.queries * parts, s.queries * parts, parts, 1, 1};
    const Strides per_acc{per_row.batch * DV, per_row.head * DV, per_row.row * DV, 1, DV};
    float* top = scratch + rows * parts * DV;
    const Partials partials{scratch, top, top + rows * parts, per_acc, per_row, per_row};
    attend_split<T, D, DV>(worker, s, parts, q, k, v, partials);
    if (parts > 1) worker.barrier();
    // Without parts, this worker's KV heads are the ones that it has just computed.
    const Range mine = parts > 1 ? split(worker, rows) : split(worker, pairs);
    const long step = parts > 1 ? 1 : s.queries * s.heads_per_group();
    for (long row = mine.begin * step; row < mine.end * step; row++) {
        merge_parts<T, DV>(s, row / s.queries / s.heads, row / s.queries % s.heads, row % s.queries, parts, partials, out);
    }
}

// Attention of any number of queries; every worker of the team calls it. own: attention_scratch_floats(D, DV) floats of
// this worker; shared: attention_parts_floats(...) floats of the team.
template <class T, int D, int DV>
static inline void attend(const Worker& worker, const AttentionShape& s, const T* q, const T* k, const T* v, T* out,
                          float* own, float* shared) {
    if (s.queries * s.heads_per_group() <= FEW_ROWS) {
        attend_few<T, D, DV>(worker, s, q, k, v, out, shared);
    } else {
        attend_many<T, D, DV>(worker, s, q, k, v, out, own);
    }
}

}  // namespace tw
