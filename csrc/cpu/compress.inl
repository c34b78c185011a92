// out[m, q] = sum of x[m, i] over the columns i that go with q (CompressParams, Spread), fp32 sums, one
// rounding
//
//   cyclic    x in passes of `columns` neighbours. The whole ones are added up in registers, some columns of
//             every pass at a time; what is left, a pass cut short or one that starts over at x's first
//             column, run by run to the sums in L1. Every column's terms are added in the order of p.
//   grouped   a vector of partial sums for each group, its last elements masked; kWidth of them are then
//             folded into one vector of sums. The order depends on the group's length alone.
//
//   floor     memory: x once, out once. 16 columns of bf16 are 3 micro-operations, 32 bytes: 4096 → 256
//             columns cost 300 cycles a row, in which one core gets about 8 KB from L2, half of that from
//             memory
//
// A rotation with a single whole pass (MoRA's type 6: the middle is x itself) reads x and writes out, nothing
// between.
#pragma once

#include "cpu/decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

// (out_first, out_second) = (y cos - z sin, z cos + y sin) of n columns y of `first` and z of `second`,
// `sign` times sin.
template <class S, class D>
inline void turn(const S* first, const S* second, const float* cosine, const float* sine, Vec sign, int64_t n,
                 D* out_first, D* out_second) {
  constexpr int kWidth = Vec::kWidth;
  const Vec minus = set1(-1.0f);
  const auto turn = [&](Vec& y, Vec& z, Vec c, Vec s) {
    s = mul(s, sign);
    const Vec turned = fma(z, mul(s, minus), mul(y, c));
    z = fma(y, s, mul(z, c));
    y = turned;
  };
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    const int64_t k = j + kWidth;
    Vec y0 = load(first + j), y1 = load(first + k), z0 = load(second + j), z1 = load(second + k);
    turn(y0, z0, load(cosine + j), load(sine + j));
    turn(y1, z1, load(cosine + k), load(sine + k));
    store_2(out_first + j, y0, y1);
    store_2(out_second + j, z0, z1);
  }
  for (; j < n; j += kWidth) {
    const int left = static_cast<int>(min_of<int64_t>(kWidth, n - j));
    Vec y = load_n(first + j, left), z = load_n(second + j, left);
    turn(y, z, load_n(cosine + j, left), load_n(sine + j, left));
    store_n(out_first + j, y, left);
    store_n(out_second + j, z, left);
  }
}

template <class T>
class Compress {
 public:
  explicit Compress(const CompressParams& params)
      : p(params),
        groups(p.wide, p.columns),
        length(p.wide ? p.length : 0),
        whole(min_of(length, p.wide)),
        sign(set1(p.inverse ? -1.0f : 1.0f)) {}

  void run() {
    constexpr double kSerial = 1 << 16;
    const double work = static_cast<double>(p.rows) *
                        static_cast<double>(max_of(max_of(p.wide, p.columns), p.grouped ? 0 : length));
    parallel_tasks(work < kSerial ? 1 : p.threads, p.rows, [&](int, int64_t m) {
      switch (p.out.dtype) {
        case DType::f32:
          return row(m, static_cast<float*>(p.out.data) + m * p.out.stride0);
        case DType::bf16:
          return row(m, static_cast<Bf16*>(p.out.data) + m * p.out.stride0);
        case DType::f16:
          return row(m, static_cast<F16*>(p.out.data) + m * p.out.stride0);
      }
    });
  }

  // Row m, to out.
  template <class D>
  void row(int64_t m, D* out) const {
    const T* x = static_cast<const T*>(p.x.data) + m * p.x.stride0;
    alignas(64) float z[2][kTile];
    if (!p.rotation) {
      for (int64_t q = 0; q < p.columns; q += kTile) {
        const int64_t n = min_of(kTile, p.columns - q);
        if (in_place(q, n)) {
          convert_row(x + q, 1, n, out + q);
        } else {
          sums(x, q, n, z[0]);
          convert_row(z[0], 1, n, out + q);
        }
      }
      return;
    }
    for (int64_t block = 0; block < p.columns; block += 2 * p.half) {
      for (int64_t j = 0; j < p.half; j += kTile) {
        const int64_t n = min_of(kTile, p.half - j);
        const int64_t first = block + j, second = first + p.half;
        const float* cosine = p.rotation + first;
        if (in_place(first, n) && in_place(second, n)) {
          turn(x + first, x + second, cosine, cosine + p.half, sign, n, out + first, out + second);
        } else {
          sums(x, first, n, z[0]);
          sums(x, second, n, z[1]);
          turn(z[0], z[1], cosine, cosine + p.half, sign, n, out + first, out + second);
        }
      }
    }
  }

 private:
  static constexpr int kWidth = Vec::kWidth;
  static constexpr int64_t kTile = 512;  // columns of sums at a time

  // The sums of columns q … q + n are x's columns of the same numbers.
  bool in_place(int64_t q, int64_t n) const {
    return !p.grouped && p.x.stride1 == 1 && q + n <= whole && q + p.columns >= length;
  }

  // z[j] = the sum of column q + j, j < n
  void sums(const T* x, int64_t q, int64_t n, float* z) const {
    p.grouped ? group_sums(x, q, n, z) : cyclic_sums(x, q, n, z);
  }

  void cyclic_sums(const T* x, int64_t q, int64_t n, float* z) const {
    const int64_t passes = whole < q + n ? 0 : (whole - q - n) / p.columns + 1;
    if (passes == 0) {
      std::memset(z, 0, static_cast<size_t>(n) * sizeof(float));
    } else if (p.x.stride1 == 1) {
      int64_t j = 0;
      for (; j + 8 * kWidth <= n; j += 8 * kWidth) add_passes<8>(x + q + j, passes, z + j);
      for (; j + 2 * kWidth <= n; j += 2 * kWidth) add_passes<2>(x + q + j, passes, z + j);
      for (; j < n; j += kWidth) {
        const int left = static_cast<int>(min_of<int64_t>(kWidth, n - j));
        Vec sum = load_n(x + q + j, left);
        for (int64_t pass = 1; pass < passes; ++pass)
          sum = add(sum, load_n(x + q + j + pass * p.columns, left));
        store_n(z + j, sum, left);
      }
    } else {
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t j = 0; j < n; ++j) {
          const float value = to_float(x[(pass * p.columns + q + j) * p.x.stride1]);
          z[j] = pass ? z[j] + value : value;
        }
    }
    for (int64_t at = passes * p.columns + q; at < length; at += p.columns) {
      const int64_t end = min_of(n, length - at);
      int64_t i = at % p.wide;
      for (int64_t j = 0; j < end; i = 0) {
        const int64_t run = min_of(end - j, p.wide - i);
        add_run(x + i * p.x.stride1, run, z + j);
        j += run;
      }
    }
  }

  template <int V>
  void add_passes(const T* x, int64_t passes, float* z) const {
    Vec sum[V];
    for (int v = 0; v < V; ++v) sum[v] = load(x + v * kWidth);
    for (int64_t pass = 1; pass < passes; ++pass) {
      x += p.columns;
      for (int v = 0; v < V; ++v) sum[v] = add(sum[v], load(x + v * kWidth));
    }
    for (int v = 0; v < V; ++v) store(z + v * kWidth, sum[v]);
  }

  void add_run(const T* x, int64_t n, float* z) const {
    int64_t j = 0;
    if (p.x.stride1 == 1) {
      for (; j + kWidth <= n; j += kWidth) store(z + j, add(load(z + j), load(x + j)));
    }
    for (; j < n; ++j) z[j] += to_float(x[j * p.x.stride1]);
  }

  void group_sums(const T* x, int64_t q, int64_t n, float* z) const {
    const int64_t size = groups.size, longer = groups.longer;
    int64_t begin = groups.begin(q);
    Vec parts[kWidth];
    for (int64_t j = 0; j < n; j += kWidth) {
      const int count = static_cast<int>(min_of<int64_t>(kWidth, n - j));
      if (p.x.stride1 == 1) {
        const T* at = x + begin;
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          const int64_t wide = i < count ? size + (q + j + i < longer) : 0;
          parts[i] = vector_sum(at, wide);
          at += wide;
        }
        begin = at - x;
      } else {
        for (int i = 0; i < kWidth; ++i) {
          const int64_t wide = i < count ? size + (q + j + i < longer) : 0;
          parts[i] = strided_sum(x, begin, wide);
          begin += wide;
        }
      }
      store_n(z + j, reduce_each(parts), count);
    }
  }

  // A vector whose lanes add up to the sum of n elements.
  static Vec vector_sum(const T* x, int64_t n) {
    if (n < kWidth) return load_n(x, static_cast<int>(n));
    Vec sum = load(x);
    int64_t i = kWidth;
    for (; i + kWidth <= n; i += kWidth) sum = add(sum, load(x + i));
    return i < n ? add(sum, load_n(x + i, static_cast<int>(n - i))) : sum;
  }

  __attribute__((noinline)) Vec strided_sum(const T* x, int64_t begin, int64_t n) const {
    Vec sum = zero();
    for (int64_t i = 0; i < n; i += kWidth) {
      float buffer[kWidth] = {};
      for (int64_t j = 0; j < min_of<int64_t>(kWidth, n - i); ++j)
        buffer[j] = to_float(x[(begin + i + j) * p.x.stride1]);
      sum = i ? add(sum, load(buffer)) : load(buffer);
    }
    return sum;
  }

  const CompressParams& p;
  const Groups groups;
  const int64_t length;  // nothing to walk without columns
  const int64_t whole;   // up to here a pass reads x's columns once, in order
  const Vec sign;
};

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
