// Which instruction sets this CPU has, as levels that each include all below.
#pragma once

namespace peftkern {

enum class Isa { scalar, avx2, avx512, avx512_bf16, amx };
inline constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

//   scalar       any CPU
//   avx2         AVX2, FMA, F16C
//   avx512       AVX-512 F, BW, VL, DQ
//   avx512_bf16  AVX-512 BF16
//   amx          AMX-TILE, AMX-BF16, and the kernel's permission to use the tile registers
const char* isa_name(Isa isa);

bool isa_built(Isa isa);

// True if the CPU and the operating system can run it and it is built.
bool isa_available(Isa isa);

}  // namespace peftkern
