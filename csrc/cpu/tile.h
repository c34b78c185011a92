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
//
// With PEFTKERN_EMULATE_AMX the same functions run a model of the instructions, for tests on a CPU without
// AMX. It gives the architecture's results bit by bit (order of additions, rounding, subnormals) and stops
// the process, with a word why, wherever the CPU would fault.
#pragma once

#include <cstdint>

#if defined(PEFTKERN_EMULATE_AMX)
#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#endif

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

#if !defined(PEFTKERN_EMULATE_AMX)

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

#else

constexpr int kTiles = 8;

struct TileState {
  bool configured = false;
  TileConfig config;
  alignas(64) uint8_t data[kTiles][kTileRows][kTileRowBytes];
};

inline TileState& tile_state() {
  static thread_local TileState state;
  return state;
}

[[noreturn]] inline void tile_fault(const char* instruction, const char* why) {
  std::fprintf(stderr, "emulated AMX: %s: %s\n", instruction, why);
  std::abort();
}

inline void tile_configure(const TileConfig& config) {
  const char* const name = "LDTILECFG";
  if (config.palette != 1) tile_fault(name, "palette is not 1");
  if (config.start_row >= kTileRows) tile_fault(name, "start_row out of range");
  for (uint8_t byte : config.reserved)
    if (byte) tile_fault(name, "a reserved byte is set");
  for (int t = 0; t < 16; ++t) {
    if (t >= kTiles && (config.rows[t] || config.row_bytes[t]))
      tile_fault(name, "a tile beyond the eighth has a shape");
    if (config.rows[t] > kTileRows) tile_fault(name, "more than 16 rows");
    if (config.row_bytes[t] > kTileRowBytes) tile_fault(name, "more than 64 bytes in a row");
    if (!config.rows[t] != !config.row_bytes[t]) tile_fault(name, "rows without bytes or bytes without rows");
  }
  TileState& state = tile_state();
  state.configured = true;
  state.config = config;
  std::memset(state.data, 0, sizeof(state.data));
}

inline void tile_release() { tile_state().configured = false; }

template <int T>
inline TileState& tile_checked(const char* instruction) {
  static_assert(T >= 0 && T < kTiles, "there are eight tiles");
  TileState& state = tile_state();
  if (!state.configured) tile_fault(instruction, "no configuration is loaded");
  if (!state.config.rows[T]) tile_fault(instruction, "the tile has no shape");
  if (state.config.start_row) tile_fault(instruction, "start_row is not 0");
  return state;
}

template <int T>
inline void tile_zero() {
  std::memset(tile_checked<T>("TILEZERO").data[T], 0, kTileBytes);
}

template <int T>
inline void tile_load(const void* p, int64_t stride) {
  TileState& state = tile_checked<T>("TILELOADD");
  std::memset(state.data[T], 0, kTileBytes);
  for (int r = 0; r < state.config.rows[T]; ++r)
    std::memcpy(state.data[T][r], static_cast<const uint8_t*>(p) + r * stride, state.config.row_bytes[T]);
}
template <int T>
inline void tile_stream(const void* p, int64_t stride) {
  tile_load<T>(p, stride);
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  const TileState& state = tile_checked<T>("TILESTORED");
  for (int r = 0; r < state.config.rows[T]; ++r)
    std::memcpy(static_cast<uint8_t*>(p) + r * stride, state.data[T][r], state.config.row_bytes[T]);
}

// Two sums for each element, of the even and of the odd products, both from zero; each step is one FMA. Then
// even + odd, then that onto C. The caller has set MXCSR.
__attribute__((noinline)) inline void tile_dpbf16_model(uint8_t (*c)[kTileRowBytes],
                                                        const uint8_t (*a)[kTileRowBytes],
                                                        const uint8_t (*b)[kTileRowBytes], int rows,
                                                        int pairs, __mmask16 columns) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < rows; ++m) {
    __m512 even = _mm512_setzero_ps();
    __m512 odd = _mm512_setzero_ps();
    for (int k = 0; k < pairs; ++k) {
      int32_t pair;
      std::memcpy(&pair, a[m] + 4 * k, sizeof(pair));
      const __m512i x = _mm512_set1_epi32(pair);
      const __m512i y = _mm512_load_si512(b[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
    }
    _mm512_mask_store_ps(c[m], columns, _mm512_add_ps(_mm512_load_ps(c[m]), _mm512_add_ps(even, odd)));
  }
}

template <int C, int A, int B>
inline void tile_dpbf16() {
  static_assert(C != A && C != B && A != B, "three different tiles");
  const char* const name = "TDPBF16PS";
  TileState& state = tile_checked<C>(name);
  tile_checked<A>(name);
  tile_checked<B>(name);
  const TileConfig& config = state.config;
  if (config.row_bytes[A] % 4 || config.row_bytes[B] % 4 || config.row_bytes[C] % 4)
    tile_fault(name, "row bytes are not a multiple of 4");
  if (config.rows[C] != config.rows[A]) tile_fault(name, "C and A differ in rows");
  if (config.row_bytes[C] != config.row_bytes[B]) tile_fault(name, "C and B differ in columns");
  if (config.row_bytes[A] / 4 != config.rows[B]) tile_fault(name, "the columns of A are not the rows of B");
  // Round to nearest even, denormals are zeros, flush to zero, no exceptions; the memory clobbers keep the
  // arithmetic in between.
  const uint32_t mode = 0x9fc0;
  uint32_t before;
  __asm__ volatile("stmxcsr %0" : "=m"(before) : : "memory");
  __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory");
  tile_dpbf16_model(state.data[C], state.data[A], state.data[B], config.rows[C], config.rows[B],
                    static_cast<__mmask16>((1u << (config.row_bytes[C] / 4)) - 1u));
  __asm__ volatile("ldmxcsr %0" : : "m"(before) : "memory");
}

#endif

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
