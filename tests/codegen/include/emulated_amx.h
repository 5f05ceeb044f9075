// Intel's AMX in portable C++: the instructions that amx.h uses, with the shapes that the processor would insist on.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define TW_AMX_EMULATED 1  // no operating system has to lend these registers

namespace emulated {

struct TileRegister {
    uint8_t row[16][64];
    int rows, bytes;
};
static thread_local TileRegister tile[8];
static thread_local bool tiles_in_use = false;

// Where a processor would raise an exception.
static inline void require(bool legal) {
    if (!legal) std::abort();
}
static inline void tile_loadconfig(const void* p) {
    const uint8_t* shapes = static_cast<const uint8_t*>(p);
    require(shapes[0] == 1);
    for (int t = 0; t < 8; t++) {
        uint16_t bytes;
        std::memcpy(&bytes, shapes + 16 + 2 * t, sizeof(bytes));
        require(bytes <= 64 && shapes[48 + t] <= 16);
        tile[t] = TileRegister{{}, shapes[48 + t], bytes};
    }
    tiles_in_use = true;
}
static inline void tile_release() { tiles_in_use = false; }
static inline void tile_zero(int t) {
    require(tiles_in_use);
    std::memset(tile[t].row, 0, sizeof(tile[t].row));
}
static inline void tile_loadd(int t, const void* p, long stride) {
    tile_zero(t);
    for (int r = 0; r < tile[t].rows; r++) {
        std::memcpy(tile[t].row[r], static_cast<const uint8_t*>(p) + r * stride, size_t(tile[t].bytes));
    }
}
static inline void tile_stored(int t, void* p, long stride) {
    require(tiles_in_use);
    for (int r = 0; r < tile[t].rows; r++) {
        std::memcpy(static_cast<uint8_t*>(p) + r * stride, tile[t].row[r], size_t(tile[t].bytes));
    }
}
static inline float bf16_at(const TileRegister& t, int r, int element) {
    uint16_t half;
    std::memcpy(&half, t.row[r] + 2 * element, sizeof(half));
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
static inline void tile_dpbf16ps(int to, int left, int right) {
    TileRegister& c = tile[to];
    const TileRegister &a = tile[left], &b = tile[right];
    require(tiles_in_use && a.rows == c.rows && b.bytes == c.bytes && a.bytes == 4 * b.rows);
    for (int m = 0; m < c.rows; m++) {
        for (int n = 0; n < c.bytes / 4; n++) {
            float sum;
            std::memcpy(&sum, c.row[m] + 4 * n, sizeof(sum));
            for (int k = 0; k < 2 * b.rows; k++) sum += bf16_at(a, m, k) * bf16_at(b, k / 2, 2 * n + k % 2);
            std::memcpy(c.row[m] + 4 * n, &sum, sizeof(sum));
        }
    }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbf16ps emulated::tile_dpbf16ps
