// The 4-bit code tables and the nibble layout: their only copy in C++.
#pragma once

#include <cstdint>

#include "params.h"

namespace peftkern {

// NF4: quantiles of N(0, 1) scaled to [-1, 1] (Dettmers et al., QLoRA, arXiv 2305.14314), ascending.
inline constexpr float kNf4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// FP4 (e2m1 with a subnormal at 1/192): bit 3 is the sign, the magnitudes are {0, 1/16, 8, 12, 4, 6, 2, 3}
// / 12. Nibble 8 is +0, as in bitsandbytes' table: its quantizer gives that nibble to the smallest positive
// weights.
inline constexpr float kFp4[16] = {
    0.0f,
    0.0052083334885537624f,
    0.6666666865348816f,
    1.0f,
    0.3333333432674408f,
    0.5f,
    0.1666666716337204f,
    0.25f,
    0.0f,
    -0.0052083334885537624f,
    -0.6666666865348816f,
    -1.0f,
    -0.3333333432674408f,
    -0.5f,
    -0.1666666716337204f,
    -0.25f,
};

constexpr const float* code_table(QuantType quant_type) { return quant_type == QuantType::nf4 ? kNf4 : kFp4; }

// Weight i of the flat index.
constexpr unsigned nibble(const uint8_t* packed, int64_t i) {
  return (i & 1) ? packed[i >> 1] & 0x0Fu : packed[i >> 1] >> 4;
}

}  // namespace peftkern
