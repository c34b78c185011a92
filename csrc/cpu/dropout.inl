// out[m, k] = x[m, k] where hash(seed, start + m K + k) < threshold, else 0.
//
// The hash is the one that reference.dropout_mask states; it depends on the seed and the row-major index
// alone, so that rows of a larger x, whose first element is number `start`, are dropped as within it. out may
// be x. About 25 integer operations for an element, vectorised by the compiler: 0.7 cycles with AVX-512.
#pragma once

#include "cpu/decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

template <class T>  // uint32_t, uint16_t: only bits move
inline void dropout_run(const T* x, int64_t stride, int64_t n, uint32_t index, uint32_t k0, uint32_t k1,
                        uint32_t threshold, T* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t h = mix(mix((index + static_cast<uint32_t>(i)) ^ k0) + k1);
      // a mask, not a choice: gcc vectorises it for 16 bits too
      out[i] = x[i] & static_cast<T>(-static_cast<T>(h < threshold));
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t h = mix(mix((index + static_cast<uint32_t>(i)) ^ k0) + k1);
    out[i] = h < threshold ? x[i * stride] : T(0);
  }
}

template <class T>
void dropout(const DropoutParams& p) {
  const uint32_t k0 =
      mix(static_cast<uint32_t>(p.seed) + mix(static_cast<uint32_t>(p.seed >> 32) + 0x9E3779B9u));
  const bool keep_all = p.threshold > 0xFFFFFFFFu;
  const uint32_t threshold = static_cast<uint32_t>(p.threshold);
  const int threads = p.rows * p.columns < (1 << 15) ? 1 : p.threads;
  parallel_tasks(threads, p.rows, [&](int, int64_t m) {
    const T* x = static_cast<const T*>(p.x.data) + m * p.x.stride0;
    T* out = static_cast<T*>(p.out) + m * p.columns;
    for (int64_t k = 0; k < p.columns;) {
      // up to where the high half of the index changes
      const uint64_t index = static_cast<uint64_t>(p.start + m * p.columns + k);
      const int64_t left = static_cast<int64_t>((uint64_t{1} << 32) - (index & 0xFFFFFFFFu));
      const int64_t n = min_of(p.columns - k, left);
      const uint32_t k1 = mix(k0 + static_cast<uint32_t>(index >> 32) + 0x85EBCA6Bu);
      if (keep_all) {
        for (int64_t i = 0; i < n; ++i) out[k + i] = x[(k + i) * p.x.stride1];
      } else {
        dropout_run(x + k * p.x.stride1, p.x.stride1, n, static_cast<uint32_t>(index), k0, k1, threshold,
                    out + k);
      }
      k += n;
    }
  });
}

}  // namespace

void dropout_f32(const DropoutParams& p) { dropout<uint32_t>(p); }
void dropout_bf16(const DropoutParams& p) { dropout<uint16_t>(p); }
void dropout_f16(const DropoutParams& p) { dropout<uint16_t>(p); }

}  // namespace peftkern::PEFTKERN_ISA
