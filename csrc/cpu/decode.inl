// Reading matrices: strided rows of any dtype, and rows of 4-bit weights in natural order.
#pragma once

#include <cstdint>

#include "cpu/parallel.inl"
#include "format.h"
#include "params.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

template <class T>
constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `wide` columns in `count` groups of neighbours, the first wide % count of them one longer than the others.
struct Groups {
  int64_t size, longer;
  Groups(int64_t wide, int64_t count) : size(wide / count), longer(wide % count) {}
  int64_t begin(int64_t g) const { return g * size + min_of(g, longer); }
  int64_t of(int64_t column) const {
    const int64_t in_longer = longer * (size + 1);
    return column < in_longer ? column / (size + 1) : longer + (column - in_longer) / size;
  }
};

// absmax[i], nested or not: product, then sum, each rounded.
inline float absmax_at(const Absmax& a, int64_t i) {
  if (a.values) return a.values[i];
  return a.code[a.codes[i]] * a.absmax2[i >> a.log2_blocksize2] + a.offset;
}

// absmax[first … first + n): in place when it is stored plain, else decoded into buffer [n].
inline const float* absmax_range(const Absmax& a, int64_t first, int64_t n, float* buffer) {
  if (a.values) return a.values + first;
  int64_t i = first;
  const int64_t end = first + n;
  while (i < end) {
    const int64_t block = i >> a.log2_blocksize2;
    const int64_t stop = min_of(end, (block + 1) << a.log2_blocksize2);
    const Vec scale = set1(a.absmax2[block]);
    const Vec offset = set1(a.offset);
    for (; i + Vec::kWidth <= stop; i += Vec::kWidth)
      store(buffer + (i - first), add(mul(gather_codes(a.code, a.codes + i), scale), offset));
    for (; i < stop; ++i) buffer[i - first] = absmax_at(a, i);
  }
  return buffer;
}

// Where a panel takes some columns of every row of W: so many rows ahead their bytes are fetched. Rows 2 KB apart share 32
// or 64 sets of an L2 cache, which holds 512 or 1024 of them: a whole chunk ahead drives out what waits to be decoded.
constexpr int64_t kRowsAhead = 32;

inline void prefetch_bytes(const void* base, int64_t offset, int64_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset);
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(at + static_cast<uintptr_t>(i)), 0, 2);
}

inline void prefetch_l1(const void* base, int64_t offset) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset);
  __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 3);
}

// The absmax of n weights from flat index start on, wherever that is: a prefetch past the end is no access.
inline void prefetch_absmax(const Weight4& w, int64_t start, int64_t n) {
  const int64_t first = start >> w.log2_blocksize;
  const int64_t blocks = n >> w.log2_blocksize;
  if (w.absmax.values) {
    prefetch_bytes(w.absmax.values, first * 4, blocks * 4);
  } else {
    prefetch_bytes(w.absmax.codes, first, blocks);
  }
}

// out[i] = round(code[q] * absmax) for the n weights from flat index start on; T is float, Bf16 or F16.
template <class T>
inline void decode_range(const Weight4& w, CodeTable table, int64_t start, int64_t n, T* out) {
  const float* code = code_table(w.quant_type);
  int64_t i = start;
  const int64_t end = start + n;
  while (i < end) {
    const int64_t block = i >> w.log2_blocksize;
    const int64_t stop = min_of(end, (block + 1) << w.log2_blocksize);
    const float absmax = absmax_at(w.absmax, block);
    if (i & 1) {
      from_float(out++, code[nibble(w.packed, i)] * absmax);
      ++i;
    }
    const Vec scale = set1(absmax);
    for (; i + Vec::kWidth <= stop; i += Vec::kWidth, out += Vec::kWidth)
      store(out, mul(lookup(table, w.packed + (i >> 1)), scale));
    for (; i < stop; ++i) from_float(out++, code[nibble(w.packed, i)] * absmax);
  }
}

// Rows of W are whole groups of 64 weights, and a group has one absmax.
inline bool in_groups(const MatmulParams& p) {
  return p.weight4.packed && p.weight4.log2_blocksize >= 6 &&
         (p.transposed ? p.outputs : p.inner) % kGroup == 0;
}

template <class S, class D>
inline void convert_row(const S* src, int64_t stride, int64_t n, D* dst) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(dst + i, load(src + i));
    if (i < n) store_n(dst + i, load_n(src + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    return;
  }
  for (; i < n; ++i) from_float(dst + i, to_float(src[i * stride]));
}
inline void convert_row(const Bf16* src, int64_t stride, int64_t n, Bf16* dst) {
  if (stride == 1) {
    std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(Bf16));
    return;
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i * stride];
}

// dst[j] = a[i, j0 + j] for j < n
template <class D>
inline void read_row(const Matrix& a, int64_t i, int64_t j0, int64_t n, D* dst) {
  const int64_t at = i * a.stride0 + j0 * a.stride1;
  switch (a.dtype) {
    case DType::f32:
      return convert_row(static_cast<const float*>(a.data) + at, a.stride1, n, dst);
    case DType::bf16:
      return convert_row(static_cast<const Bf16*>(a.data) + at, a.stride1, n, dst);
    case DType::f16:
      return convert_row(static_cast<const F16*>(a.data) + at, a.stride1, n, dst);
  }
}

// Two neighbouring vectors. Where one instruction rounds both, vec_avx512.h has the better match.
template <class T>
inline void store_2(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + Vec::kWidth, b);
}

template <class T>
inline void write_row(T* dst, int64_t stride, const float* src, int64_t n) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(dst + i, load(src + i));
    if (i < n) store_n(dst + i, load_n(src + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    return;
  }
  for (; i < n; ++i) from_float(dst + i * stride, src[i]);
}

// a[i, j0 + j] = src[j] for j < n
inline void write_row(const Matrix& a, int64_t i, int64_t j0, const float* src, int64_t n) {
  const int64_t at = i * a.stride0 + j0 * a.stride1;
  switch (a.dtype) {
    case DType::f32:
      return write_row(static_cast<float*>(a.data) + at, a.stride1, src, n);
    case DType::bf16:
      return write_row(static_cast<Bf16*>(a.data) + at, a.stride1, src, n);
    case DType::f16:
      return write_row(static_cast<F16*>(a.data) + at, a.stride1, src, n);
  }
}

inline Matrix transposed(const Matrix& a) { return {a.data, a.dtype, a.stride1, a.stride0}; }

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
