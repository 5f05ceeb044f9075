// Attention with an online softmax: softmax(q k^T * scale) v without a score matrix in memory (the method of
// FlashAttention, Dao et al. 2022; over splits of the context, of Flash-Decoding, 2023).
//
// All query heads of a KV head are handled together, so keys and values are read once. Masks are index arithmetic:
// query row i stands at context position keys - queries + i. A row without a valid key gives zeros.
// This header holds what the forms for many and for few queries share.
#pragma once

#include <cmath>

#include "parallel.h"
#include "softmax.h"

namespace tw {

constexpr int FEW_ROWS = 16;  // up to this many rows, keys are used where they lie, not packed

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
    long window, ahead;  // keys so many positions before their query, or after it, are masked; 0: none
    double scale_f64;    // scale in full, for float64
    const void* sinks = nullptr;  // [heads] of the element type: scores without values; or null
    const float* slopes = nullptr;  // [heads]: of the bias slope * (key - query), in positions of the context; or null
    const float* distances = nullptr;  // [heads, distance_count]: a bias by key - query, in the middle 0; or null
    long distance_count = 1;
    const void* bias = nullptr;  // of the element type, by batch, head, query and key: added to scores; or null
    Strides bias_strides{};
    const int64_t* reach = nullptr;  // [batch, queries]: the last key that each query sees; or null
    long prefetch_bytes = 0;  // how far ahead of their use keys and values are requested

    // The highest score of a row before any key: its head's sink, where there are any (their weight is then 1).
    template <class T>
    float sink(long head) const {
        return sinks == nullptr ? MASKED : to_f32(static_cast<const T*>(sinks)[head]);
    }

    // Whether nothing but the scale, and masks, makes scores of the products of queries and keys.
    bool scores_are_products() const {
        return scale > 0.0f && softcap == 0.0f && slopes == nullptr && distances == nullptr && bias == nullptr;
    }
    long heads_per_group() const { return heads / groups; }
    // Where a query stands in the context.
    long position(long query) const { return keys - queries + query; }
    // Add to the scores of `count` keys their biases in the table of a head, which goes on with its first and last number
    // beyond its ends.
    void add_by_distance(long head, long query, long first, int count, float* scores) const {
        const float* table = distances + head * distance_count;
        const long place = distance_count / 2 + first - position(query);
        const auto until = [&](long end) { return int(end < 0 ? 0 : end < count ? end : count); };
        const int begin = until(-place), end = until(distance_count - place);
        for (int j = 0; j < begin; j++) scores[j] += table[0];
#pragma omp simd
        for (int j = begin; j < end; j++) scores[j] += table[place + j];
        for (int j = end; j < count; j++) scores[j] += table[distance_count - 1];
    }
    // Add to the scores of `count` keys what the array of biases has for them, of which minus infinity masks.
    template <class T>
    void add_bias(long batch, long head, long query, long first, int count, float* scores) const {
        const T* row = static_cast<const T*>(bias) + bias_strides.at(batch, head, query) + first;
#pragma omp simd
        for (int j = 0; j < count; j++) {
            const float added = to_f32(row[j]), score = scores[j] + added;
            scores[j] = added == -INFINITY ? MASKED : score > LEAST_BIASED ? score : LEAST_BIASED;
        }
    }
    // The keys that causality and window leave to a query; neither end is before that of the query before.
    Range visible(long b, long query) const {
        const long at = position(query), last = reach != nullptr ? long(reach[b * queries + query]) : at;
        const long begin = window > 0 && at >= window ? at - window + 1 : 0;
        const long end = ahead > 0 && at + ahead < keys ? at + ahead : keys;
        return {begin < keys ? begin : keys, causal && last + 1 < end ? last + 1 : end};
    }
};

// Soft cap, biases and masks, in place, of the scores of one query row with keys [first, first + count). T: the element
// type of queries.
template <class T>
static inline void finish_scores(const AttentionShape& s, long batch, long head, long query, long first, int count,
                                 float* scores) {
    if (s.softcap > 0.0f) {
        const float inverse = 1.0f / s.softcap;
#pragma omp simd
        for (int j = 0; j < count; j++) scores[j] = s.softcap * tw::tanh(scores[j] * inverse);
    }
    if (s.slopes != nullptr) {
        const float slope = s.slopes[head];
        const int distance = int(first - s.position(query));
#pragma omp simd
        for (int j = 0; j < count; j++) scores[j] += slope * float(distance + j);
    }
    if (s.distances != nullptr) {
        s.add_by_distance(head, query, first, count, scores);
    }
    if (s.bias != nullptr) {
        s.add_bias<T>(batch, head, query, first, count, scores);
    }
    const Range visible = s.visible(batch, query);
    for (int j = 0; j < count && first + j < visible.begin; j++) scores[j] = MASKED;
    for (int j = visible.end > first ? int(visible.end - first) : 0; j < count; j++) scores[j] = MASKED;
    if (s.mask != nullptr) {
        const uint8_t* valid = s.mask + batch * s.mask_row + first;
#pragma omp simd
        for (int j = 0; j < count; j++) scores[j] = valid[j] != 0 ? scores[j] : MASKED;
    }
}

}  // namespace tw
