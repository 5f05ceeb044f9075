// Matrix products with a few rows of bf16 on AMX. A tile of weights is sixteen rows by 32 columns as they lie in memory;
// the rows of activations become the columns of the other tile, in pairs of k, once per product. So weights are read as
// fast with eight rows of activations as with one.
#pragma once

#include "amx.h"
#include "parallel.h"

namespace tw {

constexpr int AMX_WEIGHT_ROWS = 32;  // at a time: two tiles, whose sums do not wait for each other
constexpr int AMX_FEWEST_ROWS = 3;   // of activations; with fewer, vdpbf16ps keeps up with memory

template <class W, int M>
constexpr bool few_in_tiles = AMX_ROWS > 0 && std::is_same_v<activation_t<W>, bf16> && M >= AMX_FEWEST_ROWS;

// Bytes of scratch that FewTiles needs for k columns.
template <class W, int M>
static inline long few_tiles_bytes(long k) {
    return few_in_tiles<W, M> ? bytes<uint32_t>(k / 2 * M) : 0;
}

// M rows of activations, ready to meet weights in tiles, for one thread. Without scratch, where nothing is to be had of
// AMX, or where the last tile would reach beyond a row of weights (what follows need not be a number), it stays unused.
template <class W, int M, bool Possible = few_in_tiles<W, M>>
class FewTiles {
  public:
    FewTiles(const activation_t<W>*, long, long, char*) {}
    static constexpr bool in_use() { return false; }
    void multiply(const W*, long, const W*, float*, long) {}
};

#if defined(TW_AMX)

template <class W, int M>
class FewTiles<W, M, true> {
  public:
    FewTiles(const bf16* a, long lda, long k, char* scratch)
        : units_(reinterpret_cast<uint32_t*>(scratch)), count_(k / 2),
          in_use_(scratch != nullptr && k % (2 * AMX_UNITS) == 0 && has_tiles()) {
        if (!in_use_) return;
        for (int m = 0; m < M; m++) {
            const bf16* row = a + m * lda;
            for (long u = 0; u < count_; u++) std::memcpy(units_ + u * M + m, row + 2 * u, sizeof(uint32_t));
        }
        TileShapes shapes(AMX_WEIGHT_ROWS);
        for (const int t : {0, 1, 6}) shapes.bytes[t] = M * sizeof(float);
        shape_tiles(shapes);
    }
    ~FewTiles() {
        if (in_use_) _tile_release();
    }
    FewTiles(const FewTiles&) = delete;
    FewTiles& operator=(const FewTiles&) = delete;

    bool in_use() const { return in_use_; }

    // out[m * ldo + r]: products of the rows with AMX_WEIGHT_ROWS rows of weights, `stride` elements apart. As much as
    // they are, from `ahead` on, is prefetched.
    void multiply(const W* w, long stride, const W* ahead, float* out, long ldo) {
        const long w_bytes = stride * long(sizeof(W));
        constexpr long unit_bytes = M * sizeof(uint32_t);
        const char* next = reinterpret_cast<const char*>(ahead);
        alignas(64) float sums[AMX_WEIGHT_ROWS * M];
        tile_fence();
        _tile_zero(0);
        _tile_zero(1);
        for (long u = 0; u < count_; u += AMX_UNITS, next += AMX_WEIGHT_ROWS * 64) {
            for (int line = 0; line < AMX_WEIGHT_ROWS; line++) prefetch(next + line * 64);
            _tile_loadd(6, units_ + u * M, unit_bytes);
            _tile_loadd(4, w + 2 * u, w_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, w + 16 * stride + 2 * u, w_bytes);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, sums, M * long(sizeof(float)));
        _tile_stored(1, sums + 16 * M, M * long(sizeof(float)));
        tile_fence();
        for (int m = 0; m < M; m++)
            for (int r = 0; r < AMX_WEIGHT_ROWS; r++) out[m * ldo + r] = sums[r * M + m];
    }

  private:
    uint32_t* const units_;
    const long count_;
    const bool in_use_;
};

#endif

}  // namespace tw
