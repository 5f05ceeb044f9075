// Matrix products with many rows (a prompt): arithmetic sets the time.
//
// Weights stay row-major; each thread packs panels of PANEL weight rows, transposed, into its scratch, and multiplies
// all rows of activations with them, a register tile of up to TILE_ROWS x PANEL sums at a time (bf16 with AMX: four of
// its tiles). A panel is read from the second-level cache once per register tile, which is rare enough that K need not
// be blocked for the caches. Activations may be too large for that cache: a few panels share each reading of them.
#pragma once

#include "amx.h"
#include "parallel.h"
#include "transpose.h"

namespace tw {

#if defined(TW_AVX512)
constexpr int TILE_ROWS = 12;  // 24 sums, 2 panel vectors and a broadcast in 32 registers
#else
constexpr int TILE_ROWS = 6;
#endif
constexpr int PANEL = 2 * VW;
constexpr long SUM_BLOCK = 128;  // products summed in a row: the error of a float32 sum grows with their number

// Elements widened to float, one per unit.
template <class W>
struct widened {
    static constexpr int per_unit = 1;
    TW_INLINE vf load(const W* p, long n) { return n >= VW ? vload(p) : vload_n(p, int(n)); }
};

// What a weight panel holds: 32-bit units, each one element of k, or a pair of them where bf16 has a dot product. `unit`
// makes vectors of units from vectors of floats, one for each element of a unit.
template <class W>
struct packed : widened<W> {
    TW_INLINE vf unit(const vf* x) { return x[0]; }
    TW_INLINE vf broadcast(const activation_t<W>* a, long unit) { return vset(to_f32(a[unit])); }
    TW_INLINE vf add(vf a, vf b, vf sum) { return vfma(a, b, sum); }
};
#if defined(TW_DOT_BF16)
template <>
struct packed<bf16> {
    static constexpr int per_unit = 2;
    TW_INLINE vf load(const bf16* p, long n) {
        return _mm512_castsi512_ps((__m512i)(n >= 32 ? dot<bf16>::load(p) : dot<bf16>::load_n(p, int(n))));
    }
    TW_INLINE vf unit(const vf* x) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[0]));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[1]));
        return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    TW_INLINE vf broadcast(const bf16* a, long unit) {
        int32_t pair;
        std::memcpy(&pair, a + 2 * unit, sizeof(pair));
        return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
    }
    TW_INLINE vf add(vf a, vf b, vf sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
    }
};
#endif

template <class W>
TW_INLINE long units(long k) {
    return (k + packed<W>::per_unit - 1) / packed<W>::per_unit;
}

// Rows of a panel, which are written in blocks of VW units.
template <class W>
TW_INLINE long panel_rows(long k) {
    return (units<W>(k) + VW - 1) / VW * VW;
}

// Floats of `dots` panels.
template <class W>
TW_INLINE long panel_floats(long k, int dots) {
    return long(dots) * PANEL * panel_rows<W>(k);
}

// Columns of a product with `dots` weights that share each reading of the activations, in panels: as many as leave half
// of a usual second-level cache to these.
template <class W>
TW_INLINE long panels_at_once(long k, int dots) {
    constexpr long most_bytes = 512 * 1024, most = 8;
    const long fit = most_bytes / (panel_floats<W>(k, dots) * long(sizeof(float)));
    return fit < 1 ? 1 : fit < most ? fit : most;
}

// Floats of scratch that one thread needs for gemm with `dots` weights.
template <class W>
TW_INLINE long gemm_floats(long k, int dots) {
    return panels_at_once<W>(k, dots) * panel_floats<W>(k, dots);
}

// panel[unit][PANEL] from up to PANEL rows of k elements: row(j) is the address of row j < count; the rest is zero.
template <class W, class Units, class Row>
static inline void pack_rows(float* panel, int count, long k, const Row& row) {
    constexpr long step = long(VW) * Units::per_unit;
    for (int j0 = 0; j0 < PANEL; j0 += VW) {
        const W* rows[VW];
        for (int j = 0; j < VW; j++) rows[j] = j0 + j < count ? row(j0 + j) : nullptr;
        for (long i = 0; i < k; i += step) {
            vf block[VW];
            for (int j = 0; j < VW; j++) {
                block[j] = rows[j] != nullptr ? Units::load(rows[j] + i, k - i) : vset(0.0f);
            }
            transpose_block(block);
            float* out = panel + i / Units::per_unit * PANEL + j0;
            for (int u = 0; u < VW; u++) vstore(out + u * PANEL, block[u]);
        }
    }
}

template <class W, class Row>
static inline void pack_panel(float* panel, int count, long k, const Row& row) {
    pack_rows<W, packed<W>>(panel, count, k, row);
}

// c[m * ldc + j] (+)= sum over units of a[m][unit] * panel[unit][j], for M rows of a and one panel. What is accumulated
// onto is added last, so that sums over a long k, taken in blocks, keep the accuracy of short ones.
template <class W, int M, bool Accumulate>
static __attribute__((noinline)) void multiply_tile(const activation_t<W>* a, long lda, const float* panel, long count,
                                                    float* c, long ldc) {
    vf sum[M][2];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        sum[m][0] = vset(0.0f);
        sum[m][1] = vset(0.0f);
    }
    for (long u = 0; u < count; u++) {
        const vf b0 = vload(panel + u * PANEL), b1 = vload(panel + u * PANEL + VW);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            const vf am = packed<W>::broadcast(a + m * lda, u);
            sum[m][0] = packed<W>::add(am, b0, sum[m][0]);
            sum[m][1] = packed<W>::add(am, b1, sum[m][1]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        for (int h = 0; h < 2; h++) {
            float* to = c + m * ldc + h * VW;
            vstore(to, Accumulate ? vadd(vload(to), sum[m][h]) : sum[m][h]);
        }
    }
}

// multiply_tile for a number of rows known at run time, 1 to M.
template <class W, bool Accumulate, int M = TILE_ROWS>
static inline void multiply_rows(int rows, const activation_t<W>* a, long lda, const float* panel, long count, float* c,
                                 long ldc) {
    if constexpr (M == 1) {
        multiply_tile<W, 1, Accumulate>(a, lda, panel, count, c, ldc);
    } else if (rows == M) {
        multiply_tile<W, M, Accumulate>(a, lda, panel, count, c, ldc);
    } else {
        multiply_rows<W, Accumulate, M - 1>(rows, a, lda, panel, count, c, ldc);
    }
}

// Multiplies rows of activations with panels, for one thread. Rows: of activations that a register tile holds; AMX has
// its own number of them, where the processor has it and the operating system lends it.
template <class W, int Rows = TILE_ROWS>
class Multiplier {
    static constexpr bool may_have_tiles = std::is_same_v<activation_t<W>, bf16> && AMX_ROWS > 0;
    static_assert(!may_have_tiles || (AMX_COLUMNS == PANEL && AMX_UNITS == VW), "panels are what AMX reads");

  public:
    static constexpr int most_rows = may_have_tiles && AMX_ROWS > Rows ? AMX_ROWS : Rows;

    int rows() const { return in_tiles_ ? AMX_ROWS : Rows; }

    // c[m * ldc + j] (+)= sum over units of a[m][unit] * panel[unit][j], for count <= rows() rows m. What lies behind the
    // last unit, up to a multiple of VW, is zero in a and in the panel.
    template <bool Accumulate>
    void multiply(int count, const activation_t<W>* a, long lda, const float* panel, long units, float* c, long ldc) {
        if constexpr (may_have_tiles) {
            if (in_tiles_) return tiles_.multiply<Accumulate>(count, a, lda, panel, units, c, ldc);
        }
        multiply_rows<W, Accumulate, Rows>(count, a, lda, panel, units < SUM_BLOCK ? units : SUM_BLOCK, c, ldc);
        for (long u = SUM_BLOCK; u < units; u += SUM_BLOCK) {
            multiply_rows<W, true, Rows>(count, a + u * packed<W>::per_unit, lda, panel + u * PANEL,
                                         units - u < SUM_BLOCK ? units - u : SUM_BLOCK, c, ldc);
        }
    }

  private:
    const bool in_tiles_ = may_have_tiles && has_tiles();
    Tiles tiles_;
};

// Rows of equal blocks, of at most `most` each, in whole tiles of a matrix unit.
static inline long even_blocks(long rows, long most) {
    const long blocks = (rows + most - 1) / most, size = (rows + blocks - 1) / blocks, whole = (size + 31) / 32 * 32;
    return whole < most ? whole : most;
}

// This worker's rectangle of the result: columns are split first, rows only when there are too few panels.
struct Share {
    Range rows, columns;
};
static inline Share share_of(const Worker& worker, long rows, long columns) {
    const long panels = (columns + PANEL - 1) / PANEL;
    const int across = int(panels < worker.size() ? panels : worker.size());
    const int down = worker.size() / across;
    if (worker.id >= across * down) return {{0, 0}, {0, 0}};
    return {split(rows, worker.id / across, down), split(columns, worker.id % across, across, PANEL)};
}

// Products of `rows` rows of activations with D weight rows per column; every worker of the team calls it.
// pack(d, n0, count, panel) packs the panel of dot d that starts at column n0; epilogue(m0, m, n0, n, tile, per_dot,
// per_row) receives the product of dot d in row m0 + i and column n0 + j as tile[d * per_dot + i * per_row + j]. scratch:
// gemm_floats(k, D) floats for this worker. Rows: of activations that a register tile holds.
template <class W, int D, int Rows = TILE_ROWS, class Pack, class Epilogue>
static inline void gemm(const Worker& worker, long rows, long columns, long k, const activation_t<W>* a, long lda,
                        float* scratch, const Pack& pack, const Epilogue& epilogue) {
    const Share share = share_of(worker, rows, columns);
    const long count = units<W>(k), panel_size = panel_floats<W>(k, 1);
    const long height = share.rows.end - share.rows.begin;
    if (height <= 0) return;
    Multiplier<W, Rows> multiplier;
    const long tiles = (height + multiplier.rows() - 1) / multiplier.rows();
    constexpr long per_dot = long(Multiplier<W, Rows>::most_rows) * PANEL;
    alignas(64) float tile[D * per_dot];
    const long step = panels_at_once<W>(k, D) * PANEL;
    for (long from = share.columns.begin; from < share.columns.end; from += step) {
        const long to = share.columns.end - from < step ? share.columns.end : from + step;
        const auto each_panel = [&](const auto& use) {
            float* panels = scratch;
            for (long n0 = from; n0 < to; n0 += PANEL, panels += D * panel_size) {
                use(n0, int(to - n0 < PANEL ? to - n0 : PANEL), panels);
            }
        };
        each_panel([&](long n0, int n, float* panels) {
            for (int d = 0; d < D; d++) pack(d, n0, n, panels + d * panel_size);
        });
        for (long t = 0; t < tiles; t++) {
            const long m0 = share.rows.begin + height * t / tiles;
            const int m = int(share.rows.begin + height * (t + 1) / tiles - m0);
            each_panel([&](long n0, int n, const float* panels) {
                for (int d = 0; d < D; d++) {
                    multiplier.template multiply<false>(m, a + m0 * lda, lda, panels + d * panel_size, count,
                                                        tile + d * per_dot, PANEL);
                }
                epilogue(m0, m, n0, n, tile, per_dot, long(PANEL));
            });
        }
    }
}

}  // namespace tw
