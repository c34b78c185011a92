// What becomes of a matmul's sums: out[m, o] = alpha * sum + bias[o] + spread(m, o), one rounding to out's
// dtype.
//
// Every kernel writes its output through this class, some columns of one row at a time. A cyclic spread is
// walked in runs of neighbours: a long one is added from where it lies, short ones and columns with several
// addends are laid out in L1 first. Of a grouped one, a vector of outputs takes its lanes from one vector of
// values.
//
// Without a contraction (run_epilogue) this is all there is to do: it writes out once and reads values once,
// which stay in L1 while their row is written; the floor is writing out.
#pragma once

#include <type_traits>

#include "cpu/decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

class Epilogue {
  static constexpr int kWidth = Vec::kWidth;

 public:
  explicit Epilogue(const MatmulParams& params) : p(params) {}

  // What the rows of some neighbouring outputs share: their bias in fp32; for a grouped spread, where every
  // vector's groups start and which of them each lane takes.
  template <int64_t kMost>
  struct Columns {
    alignas(64) float bias[kMost];
    alignas(64) int32_t lanes[kMost];
    int64_t groups[ceil_div(kMost, kWidth)];
  };

  // Before outputs o0 … o0 + n ≤ kMost are written.
  template <int64_t kMost>
  void begin(int64_t o0, int64_t n, Columns<kMost>& columns) {
    first = o0;
    if (p.bias.data && p.bias.dtype == DType::f32 && p.bias.stride1 == 1) {
      bias = static_cast<const float*>(p.bias.data) + o0;
    } else if (p.bias.data) {
      read_row(p.bias, 0, o0, n, columns.bias);
      bias = columns.bias;
    }
    if (!p.spread.values.data || !p.spread.grouped) return;
    const Groups grouping(p.outputs, p.spread.columns);
    const int64_t last = max_of<int64_t>(0, p.spread.columns - kWidth);  // where the last whole vector starts
    int64_t g = grouping.of(o0), end = grouping.begin(g + 1) - o0;
    for (int64_t i = 0; i < n; i += kWidth) {
      const int64_t stop = min_of(i + kWidth, n);
      while (end <= i) end = grouping.begin(++g + 1) - o0;
      const int64_t from = min_of(g, last);
      columns.groups[i / kWidth] = from;
      for (int64_t j = i; j < stop;) {
        for (const int64_t until = min_of(end, stop); j < until; ++j)
          columns.lanes[j] = static_cast<int32_t>(g - from);
        if (j < stop) end = grouping.begin(++g + 1) - o0;
      }
      for (int64_t j = stop; j < i + kWidth; ++j) columns.lanes[j] = 0;
    }
    lanes = columns.lanes;
    groups = columns.groups;
  }

  // The lines of out that will be written, while the sums are being made.
  void prefetch(int64_t m, int64_t rows, int64_t o, int64_t n) const {
    const int64_t size = p.out.dtype == DType::f32 ? 4 : 2;
    if (p.out.stride1 != 1) return;
    for (int64_t r = m; r < m + rows; ++r)
      prefetch_bytes(p.out.data, (r * p.out.stride0 + o) * size, n * size);
  }

  // out[m, o … o + n) from sums [n], nullptr for sums of nothing; o - o0 is a multiple of a vector.
  void write(int64_t m, int64_t o, int64_t n, const float* sums) const {
    const int64_t at = m * p.out.stride0 + o * p.out.stride1;
    if (p.out.stride1 != 1) {
      alignas(64) float row[kBuffer];
      for (int64_t i = 0; i < n; i += kBuffer) {
        const int64_t count = min_of(kBuffer, n - i);
        write_to(row, m, o + i, count, sums ? sums + i : nullptr);
        write_row(p.out, m, o + i, row, count);
      }
      return;
    }
    switch (p.out.dtype) {
      case DType::f32:
        return write_to(static_cast<float*>(p.out.data) + at, m, o, n, sums);
      case DType::bf16:
        return write_to(static_cast<Bf16*>(p.out.data) + at, m, o, n, sums);
      case DType::f16:
        return write_to(static_cast<F16*>(p.out.data) + at, m, o, n, sums);
    }
  }

  // out[m + r, o … o + n) from sums[r * stride … + n), r < rows.
  void write_rows(int64_t m, int64_t rows, int64_t o, int64_t n, const float* sums, int64_t stride) const {
    const auto plain = [&](auto* out) {
      const float* b = bias ? bias + (o - first) : nullptr;
      out += m * p.out.stride0 + o;
      for (int64_t r = 0; r < rows; ++r, out += p.out.stride0, sums += stride)
        finish<true>(out, n, sums, b, Nothing());
    };
    const bool simple = p.out.stride1 == 1 && !p.spread.values.data;
    if (simple && p.out.dtype == DType::f32) return plain(static_cast<float*>(p.out.data));
    if (simple && p.out.dtype == DType::bf16) return plain(static_cast<Bf16*>(p.out.data));
    if (p.out.stride0 == 1 && rows > 1) {
      if (p.out.dtype == DType::f32)
        return write_columns(static_cast<float*>(p.out.data), m, rows, o, n, sums, stride);
      if (p.out.dtype == DType::bf16)
        return write_columns(static_cast<Bf16*>(p.out.data), m, rows, o, n, sums, stride);
      return write_columns(static_cast<F16*>(p.out.data), m, rows, o, n, sums, stride);
    }
    for (int64_t r = 0; r < rows; ++r) write(m + r, o, n, sums + r * stride);
  }

 private:
  static constexpr int64_t kBuffer = 256;
  static constexpr int64_t kLong = 64;  // a run that is worth a pass of its own

  struct Nothing {};
  struct Run {
    const float* values;
    Vec operator()(int64_t i) const { return load(values + i); }
    Vec operator()(int64_t i, int n) const { return load_n(values + i, n); }
  };
  struct Lanes {
    const float* values;
    int64_t columns;
    const int32_t* lanes;
    const int64_t* groups;
    __attribute__((always_inline)) Vec operator()(int64_t i) const {
      const Vec from = columns < kWidth ? load_n(values, static_cast<int>(columns))
                                        : load(values + groups[static_cast<uint64_t>(i) / kWidth]);
      return permute(from, lanes + i);
    }
    Vec operator()(int64_t i, int) const { return (*this)(i); }
  };

  // The same for an out whose rows are neighbours: a vector of them at a time, in order by a transposition.
  template <class T>
  void write_columns(T* out, int64_t m, int64_t rows, int64_t o, int64_t n, const float* sums,
                     int64_t stride) const {
    constexpr int64_t kColumns = 64;
    alignas(64) float block[kWidth][kColumns], turned[kWidth][kWidth];
    for (int64_t r = 0; r < rows; r += kWidth) {
      const int64_t some = min_of<int64_t>(kWidth, rows - r);
      for (int64_t i = 0; i < n; i += kColumns) {
        const int64_t count = min_of(kColumns, n - i);
        for (int64_t k = 0; k < some; ++k)
          write_to(block[k], m + r + k, o + i, count, sums + (r + k) * stride + i);
        for (int64_t j = 0; j < count; j += kWidth) {
          transpose(&block[0][j], kColumns, turned[0], kWidth);
          for (int64_t q = 0; q < min_of<int64_t>(kWidth, count - j); ++q)
            store_n(out + m + r + (o + i + j + q) * p.out.stride1, load(turned[q]), static_cast<int>(some));
        }
      }
    }
  }

  template <class T>
  void write_to(T* out, int64_t m, int64_t o, int64_t n, const float* sums) const {
    const Spread& s = p.spread;
    const float* b = bias ? bias + (o - first) : nullptr;
    if (!s.values.data) return finish(out, n, sums, b, Nothing());
    const float* values = static_cast<const float*>(s.values.data) + m * s.values.stride0;
    if (s.grouped) {
      const Lanes taken = {values, s.columns, lanes + (o - first), groups + (o - first) / kWidth};
      return finish(out, n, sums, b, taken);
    }
    alignas(64) float buffer[kBuffer];
    int64_t q = o % s.columns;
    for (int64_t i = 0, count; i < n; i += count) {
      const int64_t at = o + i, left = n - i;
      const float* more = sums ? sums + i : nullptr;
      const float* more_bias = b ? b + i : nullptr;
      if (at >= s.length) return finish(out + i, left, more, more_bias, Nothing());
      count = min_of(min_of(left, s.length - at), s.columns - q);
      if (at + p.outputs >= s.length &&
          (count == left || count >= kLong)) {  // one addend each, where they lie
        finish(out + i, count, more, more_bias, Run{values + q});
      } else {
        count = min_of(left, kBuffer);
        lay_out(values, at, count, buffer);
        finish(out + i, count, more, more_bias, Run{buffer});
      }
      q = (q + count) % s.columns;
    }
  }

  // out[j] = spread(m, o + j), j < n
  void lay_out(const float* values, int64_t o, int64_t n, float* out) const {
    const Spread& s = p.spread;
    // The first addend of each: one period, then copies of it.
    const int64_t count = min_of(n, s.length - o);
    int64_t q = o % s.columns;
    int64_t filled = min_of(count, s.columns - q);
    std::memcpy(out, values + q, static_cast<size_t>(filled) * sizeof(float));
    const int64_t start = min_of(count - filled, q);
    std::memcpy(out + filled, values, static_cast<size_t>(start) * sizeof(float));
    for (filled += start; filled < count;) {
      const int64_t more = min_of(filled, count - filled);
      std::memcpy(out + filled, out, static_cast<size_t>(more) * sizeof(float));
      filled += more;
    }
    std::memset(out + filled, 0, static_cast<size_t>(n - filled) * sizeof(float));
    for (int64_t at = o + p.outputs; at < s.length; at += p.outputs) {
      const int64_t end = min_of(n, s.length - at);
      q = at % s.columns;
      for (int64_t i = 0; i < end; q = 0) {
        const int64_t run = min_of(end - i, s.columns - q);
        for (int64_t j = 0; j < run; ++j) out[i + j] += values[q + j];
        i += run;
      }
    }
  }

  template <class T, class Added>
  void finish(T* out, int64_t n, const float* sums, const float* b, const Added& added) const {
    sums ? finish<true>(out, n, sums, b, added) : finish<false>(out, n, sums, b, added);
  }

  template <bool kSums, class T, class Added>
  void finish(T* out, int64_t n, const float* sums, const float* b, const Added& added) const {
    constexpr bool kAdded = !std::is_same_v<Added, Nothing>;
    const Vec alpha = set1(p.alpha);
    // `some`: nothing, or how many elements there are
    const auto value = [&](int64_t i, auto... some) __attribute__((always_inline)) {
      const auto read = [&](const float* from) {
        if constexpr (sizeof...(some)) {
          return load_n(from, some...);
        } else {
          return load(from);
        }
      };
      Vec y = zero();
      if constexpr (kSums) y = mul(read(sums + i), alpha);
      if (b) y = kSums ? add(y, read(b + i)) : read(b + i);
      if constexpr (kAdded) y = kSums || b ? add(y, added(i, some...)) : added(i, some...);
      return y;
    };
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) store_2(out + i, value(i), value(i + kWidth));
    for (; i < n; i += kWidth) {
      const int left = static_cast<int>(min_of<int64_t>(kWidth, n - i));
      store_n(out + i, value(i, left), left);
    }
  }

  const MatmulParams& p;
  const float* bias = nullptr;
  const int32_t* lanes = nullptr;
  const int64_t* groups = nullptr;
  int64_t first = 0;
};

inline bool epilogue_alone(const MatmulParams& p) { return p.inner == 0 && p.rank == 0; }

constexpr int64_t kAloneColumns = 2048;  // of a part of run_alone

// Rows m0 … m1 of out, parts first … last of their columns, from what is added to a product of nothing.
inline void run_alone(const MatmulParams& p, int64_t m0, int64_t m1, int64_t first, int64_t last) {
  Epilogue epilogue(p);
  Epilogue::Columns<kAloneColumns> columns;
  for (int64_t part = first; part < last; ++part) {
    const int64_t o0 = part * kAloneColumns, outputs = min_of(kAloneColumns, p.outputs - o0);
    epilogue.begin(o0, outputs, columns);
    for (int64_t m = m0; m < m1; ++m) epilogue.write(m, o0, outputs, nullptr);
  }
}

// A task is some rows, or a part of one when there are too few of them to share out.
inline void run_epilogue(const MatmulParams& p) {
  constexpr int64_t kSerial = 1 << 16, kRows = 64;
  const int threads = p.rows * p.outputs < kSerial ? 1 : p.threads;
  const int64_t task_rows = min_of(kRows, ceil_div(p.rows, threads == 1 ? 1 : 8 * threads));
  const int64_t blocks = ceil_div(p.rows, task_rows);
  const int64_t parts = ceil_div(p.outputs, kAloneColumns);
  const int64_t splits = blocks >= 4 * threads ? 1 : parts;  // tasks along the columns
  parallel_tasks(threads, blocks * splits, [&](int, int64_t task) {
    const int64_t m0 = task / splits * task_rows, m1 = min_of(m0 + task_rows, p.rows);
    const int64_t split = task % splits;
    run_alone(p, m0, m1, parts * split / splits, parts * (split + 1) / splits);
  });
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
