// out[i] = round(code[q[i]] * absmax[i / blocksize]) over the flat index: an fp32 product and one rounding,
// so every level writes the same bits.
//
// A weight costs 0.5 + 4 / blocksize bytes read and 2 or 4 written: the floor is writing. So products and
// roundings are made 16 for a block, not one for a weight, and a weight is a table lookup: with AVX-512 six
// instructions for 32. 4096 x 4096 to bf16, two Zen 5 cores: 0.65 ms where a plain fill of the same cold
// memory takes 0.59; 0.40 when hot. Tried: non-temporal stores, equal when cold, and a reader that follows
// then misses the cache.
#pragma once

#include "decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

// The weights [begin, end) of one block, begin a multiple of 32.
template <class T>
inline void dequantize_part(const Weight4& w, const float* code, float absmax, int64_t begin, int64_t end,
                            T* out) {
  const BlockTable<T> table = block_table<T>(code, absmax);
  int64_t i = begin;
  for (; i + 32 <= end; i += 32) decode(table, w.packed + i / 2, out + i);
  for (; i < end; ++i) from_float(out + i, code[nibble(w.packed, i)] * absmax);
}

template <class T>
void dequantize(const DequantizeParams& p) {
  // A thread's share starts on a cache line of out and on a byte of packed.
  constexpr int64_t kGrain = 4096;
  const int64_t grains = ceil_div(p.numel, kGrain);
  const int threads = static_cast<int>(min_of<int64_t>(p.threads, ceil_div(grains, 4)));
  const float* code = code_table(p.weight.quant_type);
  T* out = static_cast<T*>(p.out);
  parallel_tasks(threads, threads, [&](int, int64_t share) {
    const int64_t begin = grains * share / threads * kGrain;
    const int64_t end = min_of(p.numel, grains * (share + 1) / threads * kGrain);
    for (int64_t i = begin; i < end;) {
      const int64_t block = i >> p.weight.log2_blocksize;
      const int64_t stop = min_of(end, (block + 1) << p.weight.log2_blocksize);
      dequantize_part(p.weight, code, absmax_at(p.weight.absmax, block), i, stop, out);
      i = stop;
    }
  });
}

}  // namespace

void dequantize_f32(const DequantizeParams& p) { dequantize<float>(p); }
void dequantize_bf16(const DequantizeParams& p) { dequantize<Bf16>(p); }
void dequantize_f16(const DequantizeParams& p) { dequantize<F16>(p); }

}  // namespace peftkern::PEFTKERN_ISA
