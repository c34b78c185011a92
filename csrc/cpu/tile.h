// The AMX instructions that we use, each wrapped once. A tile is 16 rows of 64 bytes at most; its shape comes
// from the thread's configuration, which every thread loads for itself.
//
//   tile_configure(config)      LDTILECFG    shapes of all tiles; their contents become zero
//   tile_release()              TILERELEASE  the initial state, which costs nothing at a context switch
//   tile_zero<T>()              TILEZERO
//   tile_load<T>(p, stride)     TILELOADD    row r from p + r * stride (bytes)
//   tile_stream<T>(p, stride)   TILELOADDT1  the same for data that will not be used again soon
//   tile_store<T>(p, stride)    TILESTORED
//   tile_dpbf16<C, A, B>()      TDPBF16PS    C[m][n] += sum_k A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1]
//
// Inline assembly: gcc 12's _tile_loadconfig names 8 bytes of its 64 as read, and its _tile_loadd none at
// all, so that stores to either can be removed or moved behind them.
#pragma once

#include <cstdint>

namespace peftkern::PEFTKERN_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the instruction reads 64 bytes");

inline void tile_configure(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
inline void tile_release() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_stream(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dpbf16() {
  static_assert(C != A && C != B && A != B, "three different tiles");
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
