// The instructions of csrc/cpu/tile.h behind C functions, for test_amx_emulation.py.
#define PEFTKERN_ISA calls
#include "cpu/tile.h"

using namespace peftkern::calls;

namespace {

TileConfig shapes(int rows, int pairs, int columns) {
  TileConfig config;
  const int height[3] = {rows, rows, pairs}, width[3] = {4 * columns, 4 * pairs, 4 * columns};
  for (int t = 0; t < 3; ++t) {
    config.rows[t] = static_cast<uint8_t>(height[t]);
    config.row_bytes[t] = static_cast<uint16_t>(width[t]);
  }
  return config;
}

}  // namespace

// c [rows, columns] fp32 += a [rows, 2 pairs] bf16 · b [pairs, columns, 2] bf16, rows of 64 bytes each
extern "C" void product(float* c, const uint16_t* a, const uint16_t* b, int rows, int pairs, int columns) {
  tile_configure(shapes(rows, pairs, columns));
  tile_load<0>(c, 64);
  tile_load<1>(a, 64);
  tile_stream<2>(b, 64);
  tile_dpbf16<0, 1, 2>();
  tile_store<0>(c, 64);
  tile_release();
}

// A tile of 16 rows from `from` to `to`, whose rows are 4 * stride bytes apart, by forms of address that the
// kernels may not have at the moment.
extern "C" void copy_by_high_registers(const uint8_t* from, uint8_t* to, int64_t stride) {
  const TileConfig config = shapes(16, 16, 16);
  register const TileConfig* shape __asm__("r12") = &config - 1;
  register const uint8_t* base __asm__("r13") = from - 64;
  register int64_t quarter __asm__("r9") = stride;
  __asm__ volatile(
      "ldtilecfg 64(%0)\n\t"
      "tileloadd 64(%1,%2,4), %%tmm2"
      :
      : "r"(shape), "r"(base), "r"(quarter)
      : "memory");
  tile_store<2>(to, 4 * stride);
  tile_release();
}
extern "C" void copy_by_low_registers(const uint8_t* from, uint8_t* to, int64_t stride) {
  static TileConfig config = shapes(16, 16, 16);  // from the instruction on
  register const uint8_t* base __asm__("rsi") = from + 4096;
  register int64_t half __asm__("rbx") = 2 * stride;
  __asm__ volatile(
      "ldtilecfg %2\n\t"
      "tileloaddt1 -4096(%0,%1,2), %%tmm2"
      :
      : "r"(base), "r"(half), "m"(config)
      : "memory");
  tile_store<2>(to, 4 * stride);
  tile_release();
}

// What the CPU answers with a fault.
extern "C" void fault(int which) {
  TileConfig config = shapes(16, 16, 16);
  if (which == 0) return tile_zero<0>();
  if (which == 1) config.rows[2] = 17;
  if (which == 2) config.row_bytes[2] = 65;
  if (which == 3) config.reserved[3] = 1;
  if (which == 4) config.palette = 2;
  if (which == 5) config.row_bytes[1] = 0;
  if (which == 6) config.rows[8] = config.row_bytes[8] = 1;
  if (which == 7) config.rows[0] = 15;
  if (which == 8) config.row_bytes[0] = 60;
  if (which == 9) config.rows[2] = 15;
  tile_configure(config);
  if (which == 10) tile_release();
  if (which == 11) return tile_zero<3>();
  tile_dpbf16<0, 1, 2>();
}

// No instruction of AMX.
extern "C" void undefined() { __asm__ volatile("ud2"); }
