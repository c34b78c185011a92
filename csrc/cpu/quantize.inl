// absmax[b] = max |w| over block b;  nibble[i] = order[#{j < 15 : not bounds[j] >= w[i] / absmax}]
//
// The bounds are the fp32 midpoints of neighbouring codes in ascending order: a tie goes to the lower code.
// The rule is that of bitsandbytes' CPU path, bit for bit: a full block multiplies by 1 / max(absmax, 1e-38),
// the tail block divides by its absmax, which is raised to 1e-38 in memory too; a NaN is not <= any bound, so
// it takes the highest code, and spoils its own block alone. Blocks start on even weights, so no byte belongs
// to two of them.
#pragma once

#include "decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

constexpr float kLeastAbsmax = 1e-38f;

// Codes in ascending order; +0 stands twice in FP4, nibble 0 for (-bound, 0], nibble 8 for (0, bound].
constexpr uint8_t kNf4Order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr uint8_t kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

inline Buckets buckets_of(QuantType quant_type) {
  const float* code = code_table(quant_type);
  const uint8_t* order = quant_type == QuantType::nf4 ? kNf4Order : kFp4Order;
  float bounds[16];
  for (int j = 0; j < 15; ++j) bounds[j] = (code[order[j]] + code[order[j + 1]]) / 2.0f;
  bounds[15] = float_of(0x7f800000u);
  return bucket_registers(bounds, order);
}

template <class T>
float absmax_of(const T* w, int64_t n) {
  Vec largest = zero();
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) largest = max_abs(largest, load(w + i));
  if (i < n) largest = max_abs(largest, load_n(w + i, static_cast<int>(n - i)));
  return reduce_max(largest);
}

template <class T>
void quantize(const QuantizeParams& p) {
  const int64_t blocksize = int64_t{1} << p.log2_blocksize;
  const int64_t full = p.numel >> p.log2_blocksize;
  const int64_t blocks = full + (p.numel > full * blocksize);
  const T* weight = static_cast<const T*>(p.weight);
  const int threads = static_cast<int>(min_of<int64_t>(p.threads, ceil_div(p.numel, 16384)));
  const Buckets buckets = buckets_of(p.quant_type);
  parallel_tasks(threads, blocks, [&](int, int64_t block) {
    const T* w = weight + block * blocksize;
    uint8_t* packed = p.packed + block * blocksize / 2;
    const float absmax = absmax_of(w, min_of(blocksize, p.numel - block * blocksize));
    const float divisor = absmax < kLeastAbsmax ? kLeastAbsmax : absmax;
    if (block < full) {
      p.absmax[block] = absmax;
      const Vec factor = set1(1.0f / divisor);
      for (int64_t i = 0; i < blocksize; i += Vec::kWidth)
        encode(buckets, mul(load(w + i), factor), packed + i / 2);
      return;
    }
    p.absmax[block] = divisor;
    const int64_t n = p.numel - block * blocksize;
    const Vec by = set1(divisor);
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) encode(buckets, div(load(w + i), by), packed + i / 2);
    if (i < n) {
      uint8_t last[Vec::kWidth / 2], pad[Vec::kWidth / 2];
      encode(buckets, div(load_n(w + i, static_cast<int>(n - i)), by), last);
      encode(buckets, zero(), pad);
      if (n & 1) last[(n - i) / 2] = static_cast<uint8_t>((last[(n - i) / 2] & 0xf0u) | (pad[0] & 0x0fu));
      std::memcpy(packed + i / 2, last, static_cast<size_t>((n - i + 1) / 2));
    }
  });
}

}  // namespace

void quantize_f32(const QuantizeParams& p) { quantize<float>(p); }
void quantize_bf16(const QuantizeParams& p) { quantize<Bf16>(p); }
void quantize_f16(const QuantizeParams& p) { quantize<F16>(p); }

}  // namespace peftkern::PEFTKERN_ISA
