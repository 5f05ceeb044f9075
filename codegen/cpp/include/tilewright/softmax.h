// The online softmax of attention, a vector of scores at a time.
#pragma once

#include "math.h"
#include "vec.h"

namespace tw {

constexpr float MASKED = -1e30f;  // finite, so that differences of masked scores are no NaN
constexpr float LEAST_BIASED = -1e29f;  // what finite biases leave of a score at least: more than a masked one

// exp(x) of x <= 0, for sums that hold a 1: what is below 2^-125 is 0.
TW_INLINE vf vexp_negative(vf x) {
    const vf k = vround(x * 0x1.715476p0f);
    return vzero_below(x, -87.0f, vldexp(exp_near_zero(less_powers(x, k)), k));
}

// The running maximum and sum of one row's softmax.
struct SoftmaxRow {
    float top = MASKED, total = 0.0f;

    // Scores, times `scale` > 0, become weights relative to the new maximum; gives the factor for what was accumulated
    // before. Both arrays have room for `count` rounded up to a multiple of `step`, which VW divides: scores behind the
    // last are made masked ones, whose weights are zero. weights may be the scores.
    template <class F>
    float update(float* scores, int count, int step, float scale, F* weights) {
        const int padded = (count + step - 1) / step * step;
        for (int j = count; j < padded; j++) scores[j] = MASKED;
        vf most = vset(MASKED);
        for (int j = 0; j < padded; j += VW) most = vmax(vload(scores + j), most);
        const float found = vhighest(most), scaled = found > 0.5f * MASKED ? found * scale : MASKED;
        const float highest = scaled > top ? scaled : top;
        if (highest <= 0.5f * MASKED) {  // no key yet
            for (int j = 0; j < padded; j++) weights[j] = F{};
            return 1.0f;
        }
        const vf factor_of_scores = vset(scale), less = vset(-highest);
        vf sum = vset(0.0f);
        for (int j = 0; j < padded; j += VW) {
            const vf weight = vexp_negative(vfma(vload(scores + j), factor_of_scores, less));
            sum = vadd(sum, weight);
            vstore(weights + j, weight);
        }
        const float factor = top == highest ? 1.0f : tw::exp(top - highest);
        total = total * factor + vsum(sum);
        top = highest;
        return factor;
    }
};

}  // namespace tw
