// Weights become codes of 4 bits with a scale and a minimum per 32 columns: the method and the layout of rows that
// ir/quantization.py has in torch, with every candidate of a group in registers. Two vectors of AVX-512 are a group.
#pragma once

#include <cmath>

#include "parallel.h"
#include "vec.h"

namespace tw {

constexpr int CODE_GROUP = 32;  // columns
constexpr float LARGEST_CODE = 15.0f;
constexpr float SHRINK[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f};  // of the range that a grid spans
constexpr float SMALLEST_SCALE = 0x1p-24f;
constexpr float EXACT = 0x1p-18f;  // relative to the step of the grid: a group this close to it lies on it

// Sums over a group, spelled out: GCC would add the lanes of a reduction one by one.
TW_INLINE float group_sum(const float* x) {
    vf sum = vset(0.0f);
    for (int i = 0; i < CODE_GROUP; i += VW) sum = vadd(sum, vload(x + i));
    return vsum(sum);
}
TW_INLINE float group_dot(const float* x, const float* y) {
    vf sum = vset(0.0f);
    for (int i = 0; i < CODE_GROUP; i += VW) sum = vfma(vload(x + i), vload(y + i), sum);
    return vsum(sum);
}

// A grid, the codes of a group on it, and the sum of its squared errors.
struct Grid {
    float scale, minimum, error = 0.0f;
    alignas(64) float codes[CODE_GROUP] = {};

    Grid(float scale, float minimum) : scale(to_f32(to_f16(scale))), minimum(to_f32(to_f16(minimum))) {}

    void round(const float* x) {
        const float inverse = 1.0f / (scale > 0.0f ? scale : 1.0f);
#pragma omp simd
        for (int i = 0; i < CODE_GROUP; i++) {
            const float code = std::nearbyint((x[i] - minimum) * inverse);
            codes[i] = code < 0.0f ? 0.0f : (code > LARGEST_CODE ? LARGEST_CODE : code);
        }
    }
    void measure(const float* x) {
        alignas(64) float difference[CODE_GROUP];
#pragma omp simd
        for (int i = 0; i < CODE_GROUP; i++) difference[i] = codes[i] * scale + minimum - x[i];
        error = group_dot(difference, difference);
    }
    // The grid that brings these codes closest to x, by least squares; this one where all codes are equal.
    Grid fitted(const float* x) const {
        alignas(64) float centred[CODE_GROUP];
        const float mean_code = group_sum(codes) / CODE_GROUP, mean = group_sum(x) / CODE_GROUP;
#pragma omp simd
        for (int i = 0; i < CODE_GROUP; i++) centred[i] = codes[i] - mean_code;
        const float spread = group_dot(centred, centred), product = group_dot(centred, x);
        const float slope = spread > 0.0f ? product / spread : 0.0f;
        return slope > 0.0f ? Grid(slope, mean - slope * mean_code) : *this;
    }
};

// The grid from the smallest to the largest value; where the group does not lie on it, the best of a few narrower ones,
// each refitted to its codes.
static inline Grid best_grid(const float* x) {
    float low = x[0], high = x[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int i = 0; i < CODE_GROUP; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    const float range = high - low;
    Grid best(range / LARGEST_CODE, low);
    if (range > 0.0f && best.scale < SMALLEST_SCALE) best.scale = SMALLEST_SCALE;
    best.round(x);
    best.measure(x);
    const float step = best.scale * EXACT;
    if (best.error <= CODE_GROUP * step * step) return best;
    for (const float shrink : SHRINK) {
        Grid tried(range * shrink / LARGEST_CODE, low + range * (1.0f - shrink) / 2.0f);
        tried.round(x);
        tried = tried.fitted(x);
        tried.round(x);
        tried.measure(x);
        if (tried.error < best.error) best = tried;
    }
    return best;
}

// x[groups][CODE_GROUP] -> codes[groups][CODE_GROUP / 2], scale[groups] and minimum[groups]; every worker calls it.
static inline void quantize_int4(const Worker& worker, const float* x, long groups, uint8_t* codes, f16* scale,
                                 f16* minimum) {
    const Range mine = split(worker, groups, 32);
    for (long g = mine.begin; g < mine.end; g++) {
        const Grid grid = best_grid(x + g * CODE_GROUP);
        scale[g] = to_f16(grid.scale);
        minimum[g] = to_f16(grid.minimum);
        uint8_t* to = codes + g * CODE_GROUP / 2;
        for (int octet = 0; octet < CODE_GROUP / 8; octet++) {
            const float* from = grid.codes + octet * 8;
            for (int i = 0; i < 4; i++) to[octet * 4 + i] = uint8_t(int(from[i]) | int(from[i + 4]) << 4);
        }
    }
}

}  // namespace tw
