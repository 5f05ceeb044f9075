// Elementary functions of float without branches, tables or library calls, so that GCC vectorises loops over them.
// The polynomials are weighted minimax fits on the reduced ranges (errors below 2e-8 before rounding); every function is within
// about two units in the last place, which the tests of this folder check. Double goes to the C library.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "types.h"

#define TW_MATH static inline __attribute__((always_inline))

namespace tw {

// Round to the nearest integer, |x| < 2^22, by adding and removing 1.5 * 2^23; the low bits hold the integer.
TW_MATH float round_with_bits(float x, int32_t& n) {
    float shifted = x + 0x1.8p23f;
    n = int32_t(bit_cast<uint32_t>(shifted) - 0x4b400000u);
    return shifted - 0x1.8p23f;
}

// exp(r) of |r| <= ln(2)/2; of a float, or of a vector of them.
template <class V>
TW_MATH V exp_near_zero(V r) {
    V q = r * 0x1.6a1a6ep-10f + 0x1.123fc6p-7f;
    q = q * r + 0x1.555916p-5f;
    q = q * r + 0x1.55548ap-3f;
    q = q * r + 0x1.fffffcp-2f;
    return (q * (r * r) + r) + 1.0f;
}

// x - k ln(2), of a whole k.
template <class V>
TW_MATH V less_powers(V x, V k) {
    return (x - k * 0x1.62e400p-1f) - k * 0x1.7f7d1cp-20f;
}

// exp(x) = 2^n exp(r), n = round(x / ln(2)). 2^n is applied in two steps, so overflow gives inf and underflow is gradual.
TW_MATH float exp(float x) {
    float y = x < -104.0f ? -104.0f : x;
    y = y > 89.0f ? 89.0f : y;
    int32_t n;
    float k = round_with_bits(y * 0x1.715476p0f, n);
    float e = exp_near_zero(less_powers(y, k));
    int32_t half = n >> 1;
    float low = bit_cast<float>(uint32_t(half + 127) << 23);
    float high = bit_cast<float>(uint32_t(n - half + 127) << 23);
    return e * low * high;
}

// exp(x) where the result is no subnormal number and no overflow: -87 <= x <= 88, or NaN.
TW_MATH float exp_in_range(float x) {
    int32_t n;
    const float k = round_with_bits(x * 0x1.715476p0f, n);
    return exp_near_zero(less_powers(x, k)) * bit_cast<float>(uint32_t(n + 127) << 23);
}

// log(x) = e ln(2) + log(1 + f), 1 + f in [sqrt(1/2), sqrt(2)); subnormals are scaled up first.
TW_MATH float log(float x) {
    bool tiny = x < 0x1p-126f;
    float scaled = tiny ? x * 0x1p24f : x;
    uint32_t u = bit_cast<uint32_t>(scaled) - 0x3f3504f3u;
    float e = float(int32_t(u) >> 23) - (tiny ? 24.0f : 0.0f);
    float f = bit_cast<float>((u & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    float p = 0x1.14c9a4p-4f;
    p = p * f + -0x1.deffd2p-4f;
    p = p * f + 0x1.e728b8p-4f;
    p = p * f + -0x1.fc07ccp-4f;
    p = p * f + 0x1.23322ap-3f;
    p = p * f + -0x1.555cccp-3f;
    p = p * f + 0x1.99a4f6p-3f;
    p = p * f + -0x1.000006p-2f;
    p = p * f + 0x1.555546p-2f;
    float z = f * f;
    float y = p * f * z + e * -0x1.bd0106p-13f - 0.5f * z;
    float result = (f + y) + e * 0x1.63p-1f;
    result = x > 3.4028235e38f ? x : result;
    result = x == 0.0f ? -std::numeric_limits<float>::infinity() : result;
    return x < 0.0f || x != x ? std::numeric_limits<float>::quiet_NaN() : result;
}

TW_MATH float sigmoid(float x) {
    float y = x < -88.0f ? -88.0f : x;
    y = y > 87.0f ? 87.0f : y;
    return 1.0f / (1.0f + exp_in_range(-y));
}

// A polynomial near zero, where 1 - 2/(exp(2x) + 1) would cancel; 1 beyond 10.
TW_MATH float tanh(float x) {
    float a = std::fabs(x), z = x * x;
    float p = -0x1.7363f4p-8f;
    p = p * z + 0x1.519c88p-6f;
    p = p * z + -0x1.b827fcp-5f;
    p = p * z + 0x1.110692p-3f;
    p = p * z + -0x1.555530p-2f;
    float small = p * z * x + x;
    const float t = a > 10.0f ? 10.0f : a;
    const float large = std::copysign(1.0f - 2.0f / (exp_in_range(2.0f * t) + 1.0f), x);
    return a < 0.625f ? small : large;
}

// A polynomial near zero; 1 - exp(log(erfc(|x|))) above, with log(erfc) a polynomial; 1 beyond 4.
TW_MATH float erf(float x) {
    float a = std::fabs(x), z = x * x;
    float p = -0x1.382258p-11f;
    p = p * z + 0x1.46c12cp-8f;
    p = p * z + -0x1.b67690p-6f;
    p = p * z + 0x1.ce18fep-4f;
    p = p * z + -0x1.8126dcp-2f;
    p = p * z + 0x1.06eba6p-3f;
    float small = p * x + x;
    const float t = a > 4.0f ? 4.0f : a;
    float g = 0x1.9d85a6p-13f;
    g = g * t + -0x1.908178p-9f;
    g = g * t + 0x1.6cfd02p-6f;
    g = g * t + -0x1.aa2324p-4f;
    g = g * t + -0x1.462cb0p-1f;
    g = g * t + -0x1.05a194p-3f;
    g = g * t + -0x1.74377ap-13f;
    const float large = std::copysign(1.0f - exp_in_range(g - t), x);
    return a < 0.93f ? small : large;
}

// x - n * pi/2 in double; the first part of pi/2 has 33 bits, so its product with n is exact for angles up to 1e6.
TW_MATH float quarter_turns(float x, int32_t& n) {
    double y = x;
    double shifted = y * 0.63661977236758134308 + 0x1.8p52;
    double k = shifted - 0x1.8p52;
    n = int32_t(uint32_t(bit_cast<uint64_t>(shifted)));
    return float((y - k * 1.57079632673412561417) - k * 6.07710050650619224932e-11);
}

// sin(r) or cos(r) on |r| <= pi/4, with the sign and choice given by the quadrant n.
TW_MATH float sine_of_quadrant(float r, int32_t n) {
    float z = r * r;
    float s = 0x1.6cc2c8p-19f;
    s = s * z + -0x1.a00f40p-13f;
    s = s * z + 0x1.111108p-7f;
    s = s * z + -0x1.555556p-3f;
    s = s * z * r + r;
    float c = 0x1.99d8d4p-16f;
    c = c * z + -0x1.6c0bf2p-10f;
    c = c * z + 0x1.55554ap-5f;
    c = c * (z * z) + (1.0f - 0.5f * z);
    float value = (n & 1) != 0 ? c : s;
    return (n & 2) != 0 ? -value : value;
}

TW_MATH float sin(float x) {
    int32_t n;
    float r = quarter_turns(x, n);
    return sine_of_quadrant(r, n);
}
TW_MATH float cos(float x) {
    int32_t n;
    float r = quarter_turns(x, n);
    return sine_of_quadrant(r, int32_t(uint32_t(n) + 1u));
}

TW_MATH float sqrt(float x) { return std::sqrt(x); }
TW_MATH float rsqrt(float x) { return 1.0f / std::sqrt(x); }

TW_MATH double exp(double x) { return std::exp(x); }
TW_MATH double log(double x) { return std::log(x); }
TW_MATH double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
TW_MATH double tanh(double x) { return std::tanh(x); }
TW_MATH double erf(double x) { return std::erf(x); }
TW_MATH double sin(double x) { return std::sin(x); }
TW_MATH double cos(double x) { return std::cos(x); }
TW_MATH double sqrt(double x) { return std::sqrt(x); }
TW_MATH double rsqrt(double x) { return 1.0 / std::sqrt(x); }

TW_MATH float square(float x) { return x * x; }
TW_MATH double square(double x) { return x * x; }
TW_MATH float cube(float x) { return x * x * x; }
TW_MATH double cube(double x) { return x * x * x; }

template <class T>
TW_MATH T absolute(T x) {
    if constexpr (std::is_floating_point_v<T>) {
        return std::fabs(x);
    } else {
        return x < 0 ? T(-x) : x;
    }
}

// A divisor for which the processor's integer division does not end the process: 1 instead of 0, and of -1, by which the
// quotient of the least integer does not fit.
template <class T>
TW_MATH T safe_divisor(T b) {
    return b == 0 || (std::is_signed_v<T> && b == T(-1)) ? T(1) : b;
}

// Quotient and remainder that round towards minus infinity, as Python and torch have them. Eager PyTorch raises an error
// for an integer divisor of 0. A kernel cannot: it may be several ops, its elements belong to many threads, and nothing
// but what it stores comes back from it. So a / 0 is 0 and a % 0 is a, with which a = (a / b) * b + a % b still holds.
template <class T>
TW_MATH T floor_div(T a, T b) {
    const T d = safe_divisor(b);
    const T q = T(a / d - ((a % d != 0) & ((a < 0) != (d < 0))));
    const T negated = T(0 - uint64_t(a));  // the least integer stays as it is
    return b == 0 ? T(0) : b != d ? negated : q;
}
template <class T>
TW_MATH T floor_mod(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
        const T r = std::fmod(a, b);
        return r != 0 && (r < 0) != (b < 0) ? r + b : r;
    } else {
        const T d = safe_divisor(b);
        const T r = T(a % d);
        const T floored = r != 0 && (r < 0) != (d < 0) ? T(r + d) : r;
        return b == 0 ? a : floored;
    }
}

// NaN in either operand gives NaN, as torch.maximum and torch.minimum do.
template <class T>
TW_MATH T maximum(T a, T b) { return a != a || a > b ? a : b; }
template <class T>
TW_MATH T minimum(T a, T b) { return a != a || a < b ? a : b; }

// The same of the lanes of a vectorised loop, each of which begins with what was found before it: OpenMP's own max and min
// compare them, and lose NaN.
#pragma omp declare reduction(maximum : float, double : omp_out = maximum(omp_out, omp_in)) initializer(omp_priv = omp_orig)
#pragma omp declare reduction(minimum : float, double : omp_out = minimum(omp_out, omp_in)) initializer(omp_priv = omp_orig)

}  // namespace tw
