// Attention of many queries (a prompt): blocks of query rows against packed tiles of keys and values.
#pragma once

#include "attention_shape.h"
#include "gemm.h"

namespace tw {

static inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// Floats of scratch that one thread of `attend_many` needs.
static inline long attention_scratch_floats(long d, long dv) {
    const long dvp = round_up(dv, PANEL);
    return QUERY_ROWS * (d + KEY_TILE + dvp) + KEY_TILE * (round_up(d, VW) + dvp);
}

// One work item of a prompt: rows r = (query - q0) * heads + (head - head0), of one batch row and one KV head.
template <class T, class C, int D, int DV>
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
            softmax[r] = SoftmaxRow{s.sink<T>(head(r)), s.sinks != nullptr ? 1.0f : 0.0f};
        }
    }

    // Values as panels [DVP / PANEL][KEY_TILE][PANEL], zero beyond DV.
    void pack_values(const C* source, int count) {
        for (int p = 0; p < DVP; p += PANEL) {
            float* panel = values + p * KEY_TILE;
            for (int j = 0; j < count; j++) {
                const C* from = source + j * s.v.row + p;
                for (int i = 0; i < PANEL; i++) panel[j * PANEL + i] = p + i < DV ? to_f32(from[i]) : 0.0f;
            }
        }
    }

    void step(const C* k, const C* v, long first, int count) {
        for (int p = 0; p < count; p += PANEL) {
            const int n = count - p < PANEL ? count - p : PANEL;
            pack_rows<C, widened<C>>(keys + p * DP, n, D, [&](int j) { return k + (first + p + j) * s.k.row; });
        }
        pack_values(v + first * s.v.row, count);
        for (int r = 0; r < rows; r += TILE_ROWS) {
            const int m = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            for (int p = 0; p < count; p += PANEL) {
                multiply_rows<float, false>(m, q + r * D, D, keys + p * DP, D, scores + r * KEY_TILE + p, KEY_TILE);
            }
            for (int i = r; i < r + m; i++) {
                float* row = scores + i * KEY_TILE;
                finish_scores(s, batch, head(i), query(i), first, count, row);
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
template <class T, class C, int D, int DV>
static inline void attend_many(const Worker& worker, const AttentionShape& s, const T* q, const C* k, const C* v,
                               T* out, float* scratch) {
    using Block = PromptBlock<T, C, D, DV>;
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
        const C* kg = k + s.k.at(block.batch, block.group, 0);
        const C* vg = v + s.v.at(block.batch, block.group, 0);
        const long last = s.visible(end - 1).end;
        for (long first = s.visible(block.q0).begin; first < last; first += KEY_TILE) {
            block.step(kg, vg, first, int(last - first < KEY_TILE ? last - first : KEY_TILE));
        }
        block.store(out);
    }
}

}  // namespace tw
