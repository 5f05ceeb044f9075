// Intel's AMX: registers that hold tiles of 16 rows by 64 bytes, and a unit that multiplies two of them onto a third, of
// bf16 up to sixteen times as fast as vdpbf16ps. Operands lie as gemm.h has them for that instruction: rows of
// activations, and panels of pairs of k.
#pragma once

#include "vec.h"

#if defined(TW_DOT_BF16) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define TW_AMX 1
#if !defined(TW_AMX_EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace tw {

constexpr int AMX_COLUMNS = 32;
constexpr int AMX_UNITS = 16;  // pairs of k in a tile

#if defined(TW_AMX)

constexpr int AMX_ROWS = 32;  // of activations at a time: 2 x 2 tiles of sums, so that each operand is used twice

// The operating system lends a process the tiles' 8 KiB per thread when asked (Linux, Documentation/arch/x86/xstate.rst).
static inline bool ask_for_tiles() {
#if defined(TW_AMX_EMULATED)
    return true;
#else
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#endif
}
static inline bool has_tiles() {
    static const bool lent = ask_for_tiles();
    return lent;
}

// The shapes of the tile registers, as the processor reads them: 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

    explicit TileShapes(int count) {
        const int upper = count < 16 ? count : 16, lower = count > 16 ? count - 16 : 16;
        rows[0] = rows[1] = rows[4] = uint8_t(upper);
        rows[2] = rows[3] = rows[5] = uint8_t(lower);
    }
};

// GCC does not say that tile instructions read and write memory: this stands where they must not pass other accesses.
TW_INLINE void tile_fence() { asm volatile("" ::: "memory"); }
TW_INLINE void shape_tiles(const TileShapes& shapes) {
    tile_fence();
    _tile_loadconfig(&shapes);
}

// While it lives, this thread's tile registers are in use; multiply is called by that thread alone.
class Tiles {
  public:
    Tiles() = default;
    ~Tiles() {
        if (shaped_ != 0) _tile_release();
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // c[m * ldc + j] (+)= sum over units of a[m][unit] * panel[unit][j], for up to AMX_ROWS rows m and AMX_COLUMNS
    // columns j. Units come in whole tiles: what lies behind the last one, of a and of the panel, is zero.
    template <bool Accumulate>
    void multiply(int rows, const bf16* a, long lda, const float* panel, long units, float* c, long ldc) {
        shape(rows);
        tile_fence();
        if (rows > 16) {
            multiply_tiles<Accumulate, true>(a, lda, panel, units, c, ldc);
        } else {
            multiply_tiles<Accumulate, false>(a, lda, panel, units, c, ldc);
        }
        tile_fence();
    }

  private:
    void shape(int rows) {
        if (rows == shaped_) return;
        shape_tiles(TileShapes(rows));
        shaped_ = rows;
    }

    template <bool Accumulate, bool Lower>
    static void multiply_tiles(const bf16* a, long lda, const float* panel, long units, float* c, long ldc) {
        const long c_bytes = ldc * long(sizeof(float)), a_bytes = lda * long(sizeof(bf16));
        constexpr long panel_bytes = AMX_COLUMNS * sizeof(float);
        const bf16* a_lower = a + 16 * lda;
        float* c_lower = c + 16 * ldc;
        if constexpr (Accumulate) {
            _tile_loadd(0, c, c_bytes);
            _tile_loadd(1, c + 16, c_bytes);
            if constexpr (Lower) {
                _tile_loadd(2, c_lower, c_bytes);
                _tile_loadd(3, c_lower + 16, c_bytes);
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (Lower) {
                _tile_zero(2);
                _tile_zero(3);
            }
        }
        for (long u = 0; u < units; u += AMX_UNITS) {
            // The next tiles of activations, whose rows are too far apart for the processor to foresee them.
            for (int row = 0; row < (Lower ? 32 : 16); row++) prefetch_now(a + 2 * (u + AMX_UNITS) + row * lda);
            _tile_loadd(6, panel + u * AMX_COLUMNS, panel_bytes);
            _tile_loadd(4, a + 2 * u, a_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, panel + u * AMX_COLUMNS + 16, panel_bytes);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (Lower) {
                _tile_loadd(5, a_lower + 2 * u, a_bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c, c_bytes);
        _tile_stored(1, c + 16, c_bytes);
        if constexpr (Lower) {
            _tile_stored(2, c_lower, c_bytes);
            _tile_stored(3, c_lower + 16, c_bytes);
        }
    }

    int shaped_ = 0;
};

#else

constexpr int AMX_ROWS = 0;  // and nobody calls the rest
static constexpr bool has_tiles() { return false; }
struct Tiles {
    template <bool Accumulate>
    void multiply(int, const bf16*, long, const float*, long, float*, long) {}
};

#endif

}  // namespace tw
