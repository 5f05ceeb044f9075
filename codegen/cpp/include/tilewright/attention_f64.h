// Attention in float64, row by row: for models in double precision, where time matters less than digits.
#pragma once

#include <cmath>

#include "attention.h"

namespace tw {

// The row's result over keys [begin, end), relative to its highest score: sum[DV], that score, and the total weight.
template <int D, int DV>
static inline void attend_row(const AttentionShape& s, long batch, long head, long query, Range range, const double* q,
                              const double* k, const double* v, double* sum, double& top, double& total) {
    const double* from = q + s.q.at(batch, head, query);
    const long group = head / s.heads_per_group();
    const Range visible = s.visible(query);
    top = MASKED;
    total = 0.0;
    for (int i = 0; i < DV; i++) sum[i] = 0.0;
    for (long j = range.begin; j < range.end; j++) {
        if (j < visible.begin || j >= visible.end) continue;
        if (s.mask != nullptr && s.mask[batch * s.mask_row + j] == 0) continue;
        const double* key = k + s.k.at(batch, group, j);
        double score = 0.0;
        for (int i = 0; i < D; i++) score += from[i] * key[i];
        score *= s.scale_f64;
        if (s.softcap > 0.0f) score = s.softcap * std::tanh(score / s.softcap);
        const double highest = score > top ? score : top;
        const double old = std::exp(top - highest), weight = std::exp(score - highest);
        const double* value = v + s.v.at(batch, group, j);
        for (int i = 0; i < DV; i++) sum[i] = sum[i] * old + weight * value[i];
        total = total * old + weight;
        top = highest;
    }
}

// attend of attention.h for double; it needs no scratch.
template <int D, int DV>
static inline void attend_f64(const Worker& worker, const AttentionShape& s, const double* q, const double* k,
                              const double* v, double* out) {
    const Range mine = split(worker, s.batch * s.heads * s.queries);
    for (long row = mine.begin; row < mine.end; row++) {
        const long query = row % s.queries, head = row / s.queries % s.heads, batch = row / s.queries / s.heads;
        double sum[DV], top, total;
        attend_row<D, DV>(s, batch, head, query, {0, s.keys}, q, k, v, sum, top, total);
        double* to = out + s.out.at(batch, head, query);
        for (int i = 0; i < DV; i++) to[i * s.out.column] = total > 0.0 ? sum[i] / total : 0.0;
    }
}

// attend_split of attention.h for double; the parts are float32, as they are for every element type.
template <int D, int DV>
static inline void attend_split_f64(const Worker& worker, const AttentionShape& s, long splits, const double* q,
                                    const double* k, const double* v, const Partials& to) {
    const long chunk = (s.keys + splits - 1) / splits;
    const Range mine = split(worker, s.batch * s.heads * s.queries * splits);
    for (long item = mine.begin; item < mine.end; item++) {
        const long part = item % splits, row = item / splits;
        const long query = row % s.queries, head = row / s.queries % s.heads, batch = row / s.queries / s.heads;
        const long end = (part + 1) * chunk < s.keys ? (part + 1) * chunk : s.keys;
        double sum[DV], top, total;
        attend_row<D, DV>(s, batch, head, query, {part * chunk, end}, q, k, v, sum, top, total);
        float* acc = to.acc + to.acc_strides.at(batch, head, query, part);
        for (int i = 0; i < DV; i++) acc[i] = float(sum[i]);
        to.top[to.top_strides.at(batch, head, query, part)] = float(top);
        to.total[to.total_strides.at(batch, head, query, part)] = float(total);
    }
}

}  // namespace tw
