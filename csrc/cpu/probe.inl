// The ceilings that a benchmark compares with: multiply-adds from registers, on data as random as a model's
// (zeros and ones draw less power, and some CPUs then run faster), and loads that do nothing else.
#pragma once

#include "cpu/decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

inline float noise(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
}

// sum[r][v] += a[r] b[v]; D has kRows, kColumns, kFlops for one product, Operand, Sum, and product(a, b,
// sum).
template <class D>
inline float probe_products(int64_t iterations, uint32_t seed) {
  typename D::Operand a[D::kRows], b[D::kColumns];
  typename D::Sum sum[D::kRows][D::kColumns];
  for (auto& x : a) x = D::operand(seed);
  for (auto& x : b) x = D::operand(seed);
  for (auto& row : sum)
    for (auto& s : row) s = D::nothing();
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 8
    for (int r = 0; r < D::kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < D::kColumns; ++v) sum[r][v] = D::product(a[r], b[v], sum[r][v]);
  float total = 0.0f;
  for (auto& row : sum)
    for (auto& s : row) total += D::total(s);
  return total;
}

template <class D>
void probe(const ProbeParams& p) {
  float sink = 0.0f;
  uint64_t check = 0;
  const int64_t words = p.bytes / 8;
  const uint64_t* data = static_cast<const uint64_t*>(p.data);
#pragma omp parallel for schedule(static) num_threads(p.threads) reduction(+ : sink) reduction(^ : check)
  for (int thread = 0; thread < p.threads; ++thread) {
    if (p.iterations) sink += probe_products<D>(p.iterations, 1u + static_cast<uint32_t>(thread));
    const int64_t begin = words * thread / p.threads, end = words * (thread + 1) / p.threads;
    uint64_t lanes[32] = {};
    int64_t i = begin;
    for (; i + 32 <= end; i += 32)
      for (int j = 0; j < 32; ++j) lanes[j] ^= data[i + j];
    for (; i < end; ++i) lanes[0] ^= data[i];
    for (uint64_t lane : lanes) check ^= lane;
  }
  *p.result = static_cast<double>(p.iterations) * p.threads * D::kRows * D::kColumns * D::kFlops;
  *p.checksum = check + (sink == 0.5f);
}

struct F32Products {
  static constexpr int kRows = Vec::kWidth == 16 ? 5 : 3;
  static constexpr int kColumns = Vec::kWidth == 16 ? 4 : 3;
  static constexpr int kFlops = 2 * Vec::kWidth;
  using Operand = Vec;
  using Sum = Vec;
  static Vec operand(uint32_t& seed) {
    float x[Vec::kWidth];
    for (float& e : x) e = noise(seed);
    return load(x);
  }
  static Vec nothing() { return zero(); }
  static Vec product(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  static float total(Vec sum) { return reduce_add(sum); }
};

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
