// Attention in float64, row by row: for models in double precision, where time matters less than digits.
#pragma once

#include <cmath>

#include "attention.h"

namespace tw {

// The row's weighted values and the total of their weights, both relative to its highest score.
template <int D, int DV>
static inline void attend_row(const AttentionShape& s, long batch, long head, long query, const double* q,
                              const double* k, const double* v, double* sum, double& total) {
    const double* from = q + s.q.at(batch, head, query);
    const long group = head / s.heads_per_group();
    const Range visible = s.visible(batch, query);
    double top = s.sinks != nullptr ? static_cast<const double*>(s.sinks)[head] : MASKED;
    total = s.sinks != nullptr ? 1.0 : 0.0;
    for (int i = 0; i < DV; i++) sum[i] = 0.0;
    for (long j = visible.begin; j < visible.end; j++) {
        if (s.mask != nullptr && s.mask[batch * s.mask_row + j] == 0) continue;
        const double* key = k + s.k.at(batch, group, j);
        double score = 0.0;
        for (int i = 0; i < D; i++) score += from[i] * key[i];
        score *= s.scale_f64;
        if (s.softcap > 0.0f) score = s.softcap * std::tanh(score / s.softcap);
        if (s.slopes != nullptr) score += double(s.slopes[head]) * double(j - s.position(query));
        if (s.distances != nullptr) {
            float bias = 0.0f;
            s.add_by_distance(head, query, j, 1, &bias);
            score += double(bias);
        }
        if (s.bias != nullptr) {
            const double added = static_cast<const double*>(s.bias)[s.bias_strides.at(batch, head, query) + j];
            if (added == -INFINITY) continue;
            score = score + added > LEAST_BIASED ? score + added : LEAST_BIASED;
        }
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
        double sum[DV], total;
        attend_row<D, DV>(s, batch, head, query, q, k, v, sum, total);
        double* to = out + s.out.at(batch, head, query);
        for (int i = 0; i < DV; i++) to[i * s.out.column] = total > 0.0 ? sum[i] / total : 0.0;
    }
}

}  // namespace tw
