#include "cpu/isa.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftkern {

#if defined(PEFTKERN_EMULATE_AMX)
bool executes_bf16();  // tests/amx_trap.cpp
#endif

namespace {

#if defined(__x86_64__)

uint64_t xcr0() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// The tile registers: there, enabled, and granted. Linux keeps their 8 KB of state from a process until it
// asks; the answer holds for all of its threads.
bool tiles_usable(bool has_tiles, uint64_t state) {
#if defined(PEFTKERN_EMULATE_AMX)
  if (!has_tiles) return true;
#endif
  constexpr uint64_t kTileState = 0x60000;
  constexpr long kReqXcompPerm = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kXTileData = 18;
  return has_tiles && (state & kTileState) == kTileState &&
         syscall(SYS_arch_prctl, kReqXcompPerm, kXTileData) == 0;
}

Isa detect() {
  constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6;
  const auto has = [](uint32_t word, int bit) { return (word >> bit & 1u) != 0; };
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::scalar;
  const bool osxsave = has(c, 27), avx = has(c, 28), fma = has(c, 12), f16c = has(c, 29);
  if (!osxsave || !avx || !fma || !f16c) return Isa::scalar;
  const uint64_t state = xcr0();
  if ((state & kYmmState) != kYmmState || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::scalar;
  const uint32_t subleaves = a, ebx = b, edx = d;
  if (!has(ebx, 5)) return Isa::scalar;
  const bool avx512 = has(ebx, 16) && has(ebx, 17) && has(ebx, 30) && has(ebx, 31);  // F, DQ, BW, VL
  if (!avx512 || (state & kZmmState) != kZmmState) return Isa::avx2;
  bool bf16 = subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5);
#if defined(PEFTKERN_EMULATE_AMX)
  bf16 = bf16 || executes_bf16();
#endif
  if (!bf16) return Isa::avx512;
  const bool has_tiles = has(edx, 24) && has(edx, 22);  // AMX-TILE, AMX-BF16
  return tiles_usable(has_tiles, state) ? Isa::amx : Isa::avx512_bf16;
}

#else

Isa detect() { return Isa::scalar; }

#endif

}  // namespace

const char* isa_name(Isa isa) {
  static constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

bool isa_built(Isa isa) {
  static constexpr bool kBuilt[] = {
      true,
#if defined(PEFTKERN_HAVE_AVX2)
      true,
#else
      false,
#endif
#if defined(PEFTKERN_HAVE_AVX512)
      true,
#else
      false,
#endif
#if defined(PEFTKERN_HAVE_AVX512_BF16)
      true,
#else
      false,
#endif
#if defined(PEFTKERN_HAVE_AMX)
      true,
#else
      false,
#endif
  };
  return kBuilt[static_cast<int>(isa)];
}

bool isa_available(Isa isa) {
  static const Isa best = detect();
  return isa <= best && isa_built(isa);
}

}  // namespace peftkern
