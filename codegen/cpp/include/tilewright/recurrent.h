// Recurrent layers: every channel goes on from its state, token by token, and leaves the new state in its place.
//
// Threads share the channels of all sequences, in blocks that a thread takes through the tokens while their state stays
// in its first cache. Channels lie beside each other everywhere, so the loops over a block are vectors of them.
#pragma once

#include <cstring>
#include <type_traits>

#include "math.h"
#include "parallel.h"
#include "types.h"

namespace tw {

constexpr int CHANNELS = 64;  // of a block; whole cache lines of any type

// What a recurrence over values of T is computed in.
template <class T>
using recurrent_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
TW_MATH recurrent_t<T> as_computed(T x) {
    if constexpr (std::is_same_v<T, double>) {
        return x;
    } else {
        return to_f32(x);
    }
}
template <class T>
TW_MATH T as_stored(recurrent_t<T> x) {
    if constexpr (std::is_same_v<T, double>) {
        return x;
    } else {
        return from_f32<T>(x);
    }
}

// Run body(row, first channel, channels) for this thread's blocks; the number of channels is a constant in whole ones.
template <class Body>
static inline void for_channel_blocks(const Worker& worker, long rows, long channels, const Body& body) {
    const long blocks = (channels + CHANNELS - 1) / CHANNELS;
    const Range own = split(worker, rows * blocks);
    for (long i = own.begin; i < own.end; i++) {
        const long first = i % blocks * CHANNELS, left = channels - first;
        if (left >= CHANNELS) {
            body(i / blocks, first, std::integral_constant<int, CHANNELS>());
        } else {
            body(i / blocks, first, int(left));
        }
    }
}

// x, out[rows, tokens, channels], weight[Taps, channels], bias[channels] or null, state[rows, Taps - 1, channels].
template <class T, int Taps>
static void causal_conv1d(const Worker& worker, long rows, long tokens, long channels, const T* x, const T* weight,
                          const T* bias, T* out, T* state) {
    using F = recurrent_t<T>;
    for_channel_blocks(worker, rows, channels, [&](long row, long first, auto count) {
        const int n = count;
        F taps[Taps][CHANNELS], start[CHANNELS];
        for (int k = 0; k < Taps; k++)
            for (int c = 0; c < n; c++) taps[k][c] = as_computed(weight[k * channels + first + c]);
        for (int c = 0; c < n; c++) start[c] = bias != nullptr ? as_computed(bias[first + c]) : F(0);
        T* past = state + row * (Taps - 1) * channels + first;
        const T* own = x + row * tokens * channels + first;
        // Where token t of this run is; those before the first one are the state's.
        const auto token = [&](long t) { return t < 0 ? past + (t + Taps - 1) * channels : own + t * channels; };
        for (long s = 0; s < tokens; s++) {
            const T* seen[Taps];
            for (int k = 0; k < Taps; k++) seen[k] = token(s - (Taps - 1) + k);
            T* to = out + (row * tokens + s) * channels + first;
#pragma omp simd
            for (int c = 0; c < n; c++) {
                F sum = start[c];
                for (int k = 0; k < Taps; k++) sum += taps[k][c] * as_computed(seen[k][c]);
                to[c] = as_stored<T>(sum);
            }
        }
        for (int k = 0; k + 1 < Taps; k++) {
            const T* last = token(tokens - (Taps - 1) + k);  // never in front of the place that it goes to
            for (int c = 0; c < n; c++) past[k * channels + c] = last[c];
        }
    });
}

// x, dt, out[rows, tokens, channels], decay[States, channels], into, out_of[rows, tokens, States],
// state[rows, States, channels].
template <class T, int States>
static void selective_scan(const Worker& worker, long rows, long tokens, long channels, const T* x, const T* dt,
                           const recurrent_t<T>* decay, const T* into, const T* out_of, T* out,
                           recurrent_t<T>* state) {
    using F = recurrent_t<T>;
    for_channel_blocks(worker, rows, channels, [&](long row, long first, auto count) {
        const int n = count;
        F h[States][CHANNELS], rate[States][CHANNELS];
        F* past = state + row * States * channels + first;
        for (int i = 0; i < States; i++) {
            for (int c = 0; c < n; c++) h[i][c] = past[i * channels + c];
            for (int c = 0; c < n; c++) rate[i][c] = decay[i * channels + first + c];
        }
        for (long s = 0; s < tokens; s++) {
            const long token = row * tokens + s, at = token * channels + first;
            F time[CHANNELS], fed[CHANNELS], sum[CHANNELS];
            for (int c = 0; c < n; c++) {
                time[c] = as_computed(dt[at + c]);
                fed[c] = time[c] * as_computed(x[at + c]);
                sum[c] = F(0);
            }
            for (int i = 0; i < States; i++) {
                const F in = as_computed(into[token * States + i]), seen = as_computed(out_of[token * States + i]);
#pragma omp simd
                for (int c = 0; c < n; c++) {
                    h[i][c] = tw::exp(time[c] * rate[i][c]) * h[i][c] + fed[c] * in;
                    sum[c] += seen * h[i][c];
                }
            }
            for (int c = 0; c < n; c++) out[at + c] = as_stored<T>(sum[c]);
        }
        for (int i = 0; i < States; i++)
            for (int c = 0; c < n; c++) past[i * channels + c] = h[i][c];
    });
}

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// As many values of F as a vector of the processor has.
template <class F>
using lanes __attribute__((vector_size(VECTOR_BYTES))) = F;

// q, k[rows, tokens, groups, Size], v, out[rows, tokens, heads, depth], decay[rows, tokens, heads, Rates],
// beta[rows, tokens, heads] where values are first compared with what is found, state[rows, heads, Size, depth].
// A block of a head's state is copied to where its rows lie beside each other: they are as far apart as a multiple of
// the first cache's lines in a set, so that half of it would not be used.
template <class T, int Size, int Rates, bool Compares>
static void linear_attention(const Worker& worker, long rows, long tokens, long groups, long heads, long depth,
                             const recurrent_t<T>* q, const recurrent_t<T>* k, const T* v,
                             const recurrent_t<T>* decay, const recurrent_t<T>* beta, T* out,
                             recurrent_t<T>* state) {
    using F = recurrent_t<T>;
    using V = lanes<F>;
    constexpr int VECTORS = CHANNELS * sizeof(F) / sizeof(V);
    for_channel_blocks(worker, rows * heads, depth, [&](long unit, long first, auto count) {
        const int n = count;
        const long row = unit / heads, head = unit % heads, group = head / (heads / groups);
        F* past = state + unit * Size * depth + first;
        V h[Size][VECTORS] = {};
        for (int i = 0; i < Size; i++) std::memcpy(h[i], past + i * depth, n * sizeof(F));
        for (long s = 0; s < tokens; s++) {
            const long token = row * tokens + s, own = token * heads + head, at = own * depth + first;
            const F *key = k + (token * groups + group) * Size, *query = q + (token * groups + group) * Size;
            F kept[Rates];
            for (int i = 0; i < Rates; i++) kept[i] = tw::exp(decay[own * Rates + i]);
            alignas(64) F value[CHANNELS] = {};
            for (int c = 0; c < n; c++) value[c] = as_computed(v[at + c]);
            V taken_in[VECTORS], sum[VECTORS] = {};
            std::memcpy(taken_in, value, sizeof(value));
            if constexpr (Compares) {
                V found[VECTORS] = {};
                for (int i = 0; i < Size; i++) {
                    const F weight = key[i] * kept[Rates == 1 ? 0 : i];
                    for (int c = 0; c < VECTORS; c++) found[c] += weight * h[i][c];
                }
                for (int c = 0; c < VECTORS; c++) taken_in[c] = beta[own] * (taken_in[c] - found[c]);
            }
            for (int i = 0; i < Size; i++) {
                const F keep = kept[Rates == 1 ? 0 : i], in = key[i], seen = query[i];
                for (int c = 0; c < VECTORS; c++) {
                    h[i][c] = keep * h[i][c] + in * taken_in[c];
                    sum[c] += seen * h[i][c];
                }
            }
            std::memcpy(value, sum, sizeof(value));
            for (int c = 0; c < n; c++) out[at + c] = as_stored<T>(value[c]);
        }
        for (int i = 0; i < Size; i++) std::memcpy(past + i * depth, h[i], n * sizeof(F));
    });
}

}  // namespace tw
