// Attention of many queries (a prompt): blocks of query rows against packed tiles of keys and values.
#pragma once

#include "attention_shape.h"
#include "gemm.h"

namespace tw {

constexpr int KEY_TILE = 256;    // keys per step: what a row's softmax takes once per step is then little
constexpr int QUERY_ROWS = 192;  // rows (positions x heads of a group) that share each packed tile of keys and values

static inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// What queries, keys, weights and values are multiplied as: pairs of bf16 where all of them are bf16 and the processor
// multiplies those (weights of the softmax are then rounded, as eager mode rounds them), else floats.
template <class T, class C>
using attention_factor =
    std::conditional_t<std::is_same_v<T, bf16> && std::is_same_v<C, bf16>, activation_t<bf16>, float>;

// How one thread's scratch of `attend_many` is divided: rows of queries (padded to whole vectors of units) and of sums,
// packed tiles of keys and values, and scores and softmax weights of the rows that are multiplied at a time.
template <class T, class C>
struct PromptScratch {
    using F = attention_factor<T, C>;
    static constexpr int step = VW * packed<F>::per_unit, score_rows = Multiplier<F>::most_rows;
    static_assert(KEY_TILE % step == 0 && KEY_TILE % PANEL == 0, "tiles of keys need no padding");

    F *q, *weights;
    float *scores, *acc, *keys, *values;

    static long query_size(long d) { return round_up(d, step); }
    static long value_size(long dv) { return round_up(dv, PANEL); }
    static long size(long d, long dv) {
        return bytes<F>(QUERY_ROWS * query_size(d)) + bytes<F>(score_rows * KEY_TILE) +
               bytes<float>(score_rows * KEY_TILE) + bytes<float>(QUERY_ROWS * value_size(dv)) +
               bytes<float>(KEY_TILE / packed<F>::per_unit * value_size(dv)) +
               bytes<float>(KEY_TILE * query_size(d) / packed<F>::per_unit);
    }
    PromptScratch(char* from, long d, long dv) {
        q = carve<F>(from, QUERY_ROWS * query_size(d));
        weights = carve<F>(from, score_rows * KEY_TILE);
        scores = carve<float>(from, score_rows * KEY_TILE);
        acc = carve<float>(from, QUERY_ROWS * value_size(dv));
        values = carve<float>(from, KEY_TILE / packed<F>::per_unit * value_size(dv));
        keys = carve<float>(from, KEY_TILE * query_size(d) / packed<F>::per_unit);
    }
};

// One work item of a prompt: rows r = (query - q0) * heads + (head - head0), of one batch row and one KV head.
template <class T, class C, int D, int DV>
struct PromptBlock {
    using Scratch = PromptScratch<T, C>;
    using F = typename Scratch::F;
    static constexpr int per_unit = packed<F>::per_unit;
    static constexpr int DVP = (DV + PANEL - 1) / PANEL * PANEL;
    static constexpr int DP = (D + Scratch::step - 1) / Scratch::step * Scratch::step;
    const AttentionShape& s;
    Scratch buffers;
    long batch, group, q0, head0, heads;
    int rows;
    Multiplier<F> multiplier;
    SoftmaxRow softmax[QUERY_ROWS];
    long head[QUERY_ROWS], query[QUERY_ROWS];

    PromptBlock(const AttentionShape& s, char* scratch) : s(s), buffers(scratch, D, DV) {}

    void load_queries(const T* source) {
        for (int r = 0; r < rows; r++) {
            head[r] = head0 + r % heads;
            query[r] = q0 + r / heads;
            const T* from = source + s.q.at(batch, head[r], query[r]);
            for (int i = 0; i < D; i++) buffers.q[r * DP + i] = from_f32<F>(to_f32(from[i]));
            for (int i = D; i < DP; i++) buffers.q[r * DP + i] = F{};
            for (int i = 0; i < DVP; i++) buffers.acc[r * DVP + i] = 0.0f;
            softmax[r] = SoftmaxRow{s.sink<T>(head[r]), s.sinks != nullptr ? 1.0f : 0.0f};
        }
    }

    // Keys as panels [KEY_TILE / PANEL][DP / per_unit][PANEL].
    void pack_keys(const C* source, int count) {
        for (int p = 0; p < count; p += PANEL) {
            const int n = count - p < PANEL ? count - p : PANEL;
            float* panel = buffers.keys + p * (DP / per_unit);
            const auto row = [&](int j) { return source + (p + j) * s.k.row; };
            if constexpr (per_unit == 1) {
                pack_rows<C, widened<C>>(panel, n, D, row);
            } else {
                pack_rows<C, packed<C>>(panel, n, D, row);
            }
        }
    }

    // Values as panels [DVP / PANEL][KEY_TILE / per_unit][PANEL], a unit being as many keys; zero beyond DV and `count`.
    void pack_values(const C* source, int count) {
        const int padded = int(round_up(count, Scratch::step));
        for (int p = 0; p < DVP; p += PANEL) {
            float* panel = buffers.values + p * (KEY_TILE / per_unit);
            for (int j = 0; j < padded; j += per_unit, panel += PANEL) {
                const C* from = source + j * s.v.row + p;
                const int width = j >= count ? 0 : DV - p < PANEL ? DV - p : PANEL;
                if constexpr (per_unit == 1) {
                    for (int i = 0; i < width; i++) panel[i] = to_f32(from[i]);
                } else {
                    const C* second = from + (j + 1 < count ? s.v.row : 0);
                    const uint32_t both = j + 1 < count ? 0xffffffffu : 0xffffu;
                    for (int i = 0; i < width; i++) {
                        panel[i] = bit_cast<float>((from[i].bits | uint32_t(second[i].bits) << 16) & both);
                    }
                }
                for (int i = width; i < PANEL; i++) panel[i] = 0.0f;
            }
        }
    }

    // Scores of row r become weights of its values, and what it summed before is scaled to them.
    void weigh(int r, float* scores, F* weights, long first, int count) {
        const bool scale_last = s.scores_are_products();
        for (int j = 0; j < count && !scale_last; j++) scores[j] *= s.scale;
        finish_scores<T>(s, batch, head[r], query[r], first, count, scores);
        const float factor = softmax[r].update(scores, count, Scratch::step, scale_last ? s.scale : 1.0f, weights);
        if (factor != 1.0f) {
            for (int c = 0; c < DVP; c++) buffers.acc[r * DVP + c] *= factor;
        }
    }

    void step(const C* k, const C* v, long first, int count) {
        pack_keys(k + first * s.k.row, count);
        pack_values(v + first * s.v.row, count);
        const long units = (count + per_unit - 1) / per_unit;
        for (int r = 0, m; r < rows; r += m) {
            m = rows - r < multiplier.rows() ? rows - r : multiplier.rows();
            for (int p = 0; p < count; p += PANEL) {
                multiplier.template multiply<false>(m, buffers.q + r * DP, DP, buffers.keys + p * (DP / per_unit),
                                                    (D + per_unit - 1) / per_unit, buffers.scores + p, KEY_TILE);
            }
            for (int i = 0; i < m; i++) {
                weigh(r + i, buffers.scores + i * KEY_TILE, buffers.weights + i * KEY_TILE, first, count);
            }
            for (int p = 0; p < DVP; p += PANEL) {
                multiplier.template multiply<true>(m, buffers.weights, KEY_TILE,
                                                   buffers.values + p * (KEY_TILE / per_unit), units,
                                                   buffers.acc + r * DVP + p, DVP);
            }
        }
    }

    void store(T* out) const {
        for (int r = 0; r < rows; r++) {
            T* to = out + s.out.at(batch, head[r], query[r]);
            const float inverse = softmax[r].total > 0.0f ? 1.0f / softmax[r].total : 0.0f;
            for (int i = 0; i < DV; i++) to[i * s.out.column] = from_f32<T>(buffers.acc[r * DVP + i] * inverse);
        }
    }
};

// Attention of many queries (a prompt); every worker of the team calls it. scratch: PromptScratch::size(D, DV) bytes.
template <class T, class C, int D, int DV>
static inline void attend_many(const Worker& worker, const AttentionShape& s, const T* q, const C* k, const C* v,
                               T* out, char* scratch) {
    const long per_group = s.heads_per_group();
    const long heads = per_group < QUERY_ROWS ? per_group : QUERY_ROWS;
    const long cuts = (per_group + heads - 1) / heads;  // of a group with more heads than rows
    const long parts = s.batch * s.groups * cuts;
    long positions = QUERY_ROWS / heads;
    const auto blocks_of = [&](long size) { return (s.queries + size - 1) / size; };
    // Smaller blocks, where a large team would have too few for an even share.
    while (positions * heads >= QUERY_ROWS / 4 && positions > 1 && blocks_of(positions) * parts < 4 * worker.size()) {
        positions /= 2;
    }
    const long blocks = blocks_of(positions);
    PromptBlock<T, C, D, DV> block(s, scratch);
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
        const long last = s.visible(block.batch, end - 1).end;
        for (long first = s.visible(block.batch, block.q0).begin; first < last; first += KEY_TILE) {
            block.step(kg, vg, first, int(last - first < KEY_TILE ? last - first : KEY_TILE));
        }
        block.store(out);
    }
}

}  // namespace tw
