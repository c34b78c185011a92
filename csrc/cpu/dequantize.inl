// out[i] = round(code[q[i]] * absmax[i / blocksize]) over the flat index: an fp32 product and one rounding,
// so every level writes the same bits.
#pragma once

#include "decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

template <class T>
void dequantize(const DequantizeParams& p) {
  // A thread's share starts on a cache line of out and on a byte of packed.
  constexpr int64_t kGrain = 4096;
  const int64_t grains = ceil_div(p.numel, kGrain);
  const int threads = static_cast<int>(min_of<int64_t>(p.threads, ceil_div(grains, 4)));
  T* out = static_cast<T*>(p.out);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int thread = 0; thread < threads; ++thread) {
    const CodeTable table = code_registers(code_table(p.weight.quant_type));
    const int64_t begin = grains * thread / threads * kGrain;
    const int64_t end = min_of(p.numel, grains * (thread + 1) / threads * kGrain);
    decode_range(p.weight, table, begin, end - begin, out + begin);
  }
}

}  // namespace

void dequantize_f32(const DequantizeParams& p) { dequantize<float>(p); }
void dequantize_bf16(const DequantizeParams& p) { dequantize<Bf16>(p); }
void dequantize_f16(const DequantizeParams& p) { dequantize<F16>(p); }

}  // namespace peftkern::PEFTKERN_ISA
