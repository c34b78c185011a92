// What becomes of a matmul's sums: out[m, o] = alpha * sum + bias[o] + spread(m, o), one rounding to out's dtype.
//
// Every kernel writes its output through this class, some columns of one row at a time. The spread is walked in runs
// of neighbouring columns: where a cyclic run is long it is added from where it lies; short ones, groups and columns
// with several addends are laid out in a buffer in L1 first.
//
// Without a contraction (run_epilogue) this is all there is to do: it writes out once and reads values once, which
// stay in L1 while their row is written; the floor is writing out.
#pragma once

#include "cpu/decode.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

class Epilogue {
 public:
  explicit Epilogue(const MatmulParams& params)
      : p(params), groups(p.outputs, max_of<int64_t>(1, p.spread.columns)) {}

  // Before outputs o0 … o0 + n are written. buffer [n] is for their bias, unless that can be read where it lies.
  void begin(int64_t o0, int64_t n, float* buffer) {
    first = o0;
    if (!p.bias.data) return;
    if (p.bias.dtype == DType::f32 && p.bias.stride1 == 1) {
      bias = static_cast<const float*>(p.bias.data) + o0;
    } else {
      read_row(p.bias, 0, o0, n, buffer);
      bias = buffer;
    }
  }

  // out[m, o … o + n) from sums [n]; nullptr for sums of nothing
  void write(int64_t m, int64_t o, int64_t n, const float* sums) const {
    if (!p.spread.values.data) return write_part(m, o, n, sums, nullptr);
    alignas(64) float buffer[kBuffer + Vec::kWidth];
    for (int64_t count; n > 0; n -= count, o += count) {
      count = n;
      const float* added = addends(m, o, count, buffer);
      write_part(m, o, count, sums, added);
      if (sums) sums += count;
    }
  }

 private:
  static constexpr int64_t kBuffer = 256;
  static constexpr int64_t kLong = 64;  // a run that is worth a pass of its own

  // spread(m, o) and those after it: n in, at least 1; as many as the result holds out. nullptr: all are zero.
  const float* addends(int64_t m, int64_t o, int64_t& n, float* buffer) const {
    const Spread& s = p.spread;
    const float* values = static_cast<const float*>(s.values.data) + m * s.values.stride0;
    if (s.grouped) {
      n = min_of(n, kBuffer);
      lay_out_groups(values, o, n, buffer);
      return buffer;
    }
    if (o >= s.length) return nullptr;
    if (o + p.outputs >= s.length) {
      const int64_t q = o % s.columns;
      const int64_t run = min_of(min_of(n, s.length - o), s.columns - q);
      if (run == n || run >= kLong) {
        n = run;
        return values + q;
      }
    }
    n = min_of(n, kBuffer);
    lay_out_cycles(values, o, n, buffer);
    return buffer;
  }

  void lay_out_groups(const float* values, int64_t o, int64_t n, float* out) const {
    int64_t g = groups.of(o);
    for (int64_t i = 0; i < n; ++g) {
      const int64_t end = min_of(groups.begin(g + 1) - o, n);
      const Vec value = set1(values[g]);
      for (; i < end; i += Vec::kWidth) store(out + i, value);  // the next group overwrites what is too much
      i = end;
    }
  }

  void lay_out_cycles(const float* values, int64_t o, int64_t n, float* out) const {
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

  void write_part(int64_t m, int64_t o, int64_t n, const float* sums, const float* added) const {
    const float* b = bias ? bias + (o - first) : nullptr;
    const int64_t at = m * p.out.stride0 + o * p.out.stride1;
    if (p.out.stride1 != 1) {
      alignas(64) float row[kBuffer];
      for (int64_t i = 0; i < n; i += kBuffer) {
        const int64_t count = min_of(kBuffer, n - i);
        finish(sums ? sums + i : nullptr, b ? b + i : nullptr, added ? added + i : nullptr, count, row);
        write_row(p.out, m, o + i, row, count);
      }
      return;
    }
    switch (p.out.dtype) {
      case DType::f32:
        return finish(sums, b, added, n, static_cast<float*>(p.out.data) + at);
      case DType::bf16:
        return finish(sums, b, added, n, static_cast<Bf16*>(p.out.data) + at);
      case DType::f16:
        return finish(sums, b, added, n, static_cast<F16*>(p.out.data) + at);
    }
  }

  template <class T>
  void finish(const float* sums, const float* b, const float* added, int64_t n, T* out) const {
    if (sums) {
      added ? finish<true, true>(sums, b, added, n, out) : finish<true, false>(sums, b, added, n, out);
    } else {
      added ? finish<false, true>(sums, b, added, n, out) : finish<false, false>(sums, b, added, n, out);
    }
  }

  template <bool kSums, bool kAdded, class T>
  void finish(const float* sums, const float* b, const float* added, int64_t n, T* out) const {
    constexpr int kWidth = Vec::kWidth;
    const Vec alpha = set1(p.alpha);
    const auto value = [&](int64_t i, auto read) {
      Vec y = zero();
      if (kSums) y = mul(read(sums + i), alpha);
      if (b) y = add(y, read(b + i));
      if (kAdded) y = b || kSums ? add(y, read(added + i)) : read(added + i);
      return y;
    };
    const auto whole = [](const float* from) { return load(from); };
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) store_2(out + i, value(i, whole), value(i + kWidth, whole));
    for (; i < n; i += kWidth) {
      const int left = static_cast<int>(min_of<int64_t>(kWidth, n - i));
      const Vec y = value(i, [left](const float* from) { return load_n(from, left); });
      store_n(out + i, y, left);
    }
  }

  const MatmulParams& p;
  const Groups groups;
  const float* bias = nullptr;
  int64_t first = 0;
};

inline bool epilogue_alone(const MatmulParams& p) { return p.inner == 0 && p.rank == 0; }

// A task is a few rows, or a part of one when there are too few of them to share out.
inline void run_epilogue(const MatmulParams& p) {
  constexpr int64_t kColumns = 2048, kTask = 1 << 14, kSerial = 1 << 16;
  const int threads = p.rows * p.outputs < kSerial ? 1 : p.threads;
  const int64_t task_rows = min_of(p.rows, max_of<int64_t>(1, kTask / p.outputs));
  const int64_t blocks = ceil_div(p.rows, task_rows);
  const int64_t parts = ceil_div(p.outputs, kColumns);
  const int64_t splits = blocks >= 4 * threads ? 1 : parts;  // tasks along the columns
  parallel_tasks(threads, blocks * splits, [&](int, int64_t task) {
    Epilogue epilogue(p);
    alignas(64) float bias[kColumns];
    const int64_t m0 = task / splits * task_rows, m1 = min_of(m0 + task_rows, p.rows);
    const int64_t split = task % splits;
    for (int64_t part = parts * split / splits; part < parts * (split + 1) / splits; ++part) {
      const int64_t o0 = part * kColumns, outputs = min_of(kColumns, p.outputs - o0);
      epilogue.begin(o0, outputs, bias);
      for (int64_t m = m0; m < m1; ++m) epilogue.write(m, o0, outputs, nullptr);
    }
  });
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
