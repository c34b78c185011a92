// What the products of a few rows of x share, in bf16 and in fp32: rows of W met where they lie, W's bytes with
// an absmax for each unit.
#pragma once

#include "cpu/decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

// A row of a 4-bit W: its bytes and one absmax for each unit of weights.
struct DotRow {
  const uint8_t* bytes;
  const float* absmax;
};

// Floats of room that dot_weights wants for each row.
inline int64_t dot_absmax_room(const MatmulParams& p, int log2_unit) {
  return (p.inner >> p.weight4.log2_blocksize) + 2 + (p.inner >> log2_unit);
}

// Rows o0 … o0 + rows of W, in units that divide a block and a row; absmax decoded and expanded to units unless it is
// stored just so.
inline void dot_weights(const MatmulParams& p, int log2_unit, int64_t o0, int64_t rows, float* buffer,
                        DotRow* w) {
  const Weight4& weight = p.weight4;
  const int64_t units = p.inner >> log2_unit;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t flat = (o0 + r) * p.inner;
    const int64_t first = flat >> weight.log2_blocksize;
    w[r].bytes = weight.packed + (flat >> 1);
    if (weight.absmax.values && weight.log2_blocksize == log2_unit) {
      w[r].absmax = weight.absmax.values + first;
      continue;
    }
    const int64_t blocks = ((flat + p.inner - 1) >> weight.log2_blocksize) - first + 1;
    const float* a = absmax_range(weight.absmax, first, blocks, buffer);
    if (weight.log2_blocksize == log2_unit) {
      w[r].absmax = a;
    } else {
      float* expanded = buffer + blocks;
      for (int64_t u = 0; u < units; ++u)
        expanded[u] = a[((flat + (u << log2_unit)) >> weight.log2_blocksize) - first];
      w[r].absmax = expanded;
    }
    buffer += blocks + units;
  }
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
