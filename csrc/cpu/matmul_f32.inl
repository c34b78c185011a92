// matmul with fp32 arithmetic: x of any dtype at the levels without a bf16 multiply, fp32 and fp16 at every
// level. W's values are code * absmax in fp32, not rounded further.
#pragma once

#include "cpu/dots.inl"
#include "cpu/matmul.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

struct F32Kernel {
  using Elem = float;
  static constexpr int kPair = 1;
  static constexpr int kLanes = Vec::kWidth;
  static constexpr int kAccumulators = kLanes == 16 ? 24 : 12;  // of 32 or 16 registers
  static constexpr int kMaxVectors = kLanes == 16 ? 4 : 3;
  static constexpr int kDepth = 320;
  static constexpr int kPanelRows = 192;
  static constexpr int kShortPanels = 6;  // 32 rows for few rows of x: a panel that L1 holds
  static constexpr int kPanelColumns = kLanes == 16 ? 128 : 192;
  static constexpr int kStrip = kPanelColumns;
  static constexpr bool kAcross = false;
  static constexpr int kMaxRows = 288;
  static constexpr int kRowSplitW = 48;
  static constexpr int kRowSplitX = kAccumulators / kMaxVectors * 2;
  static constexpr int kAlignW = 1;
  static constexpr int kAlignX = 1;
  static constexpr bool kGroups = true;
  static constexpr int kShortRows = kLanes == 16 ? 16 : 0;
  static constexpr int kShortDepth = 64;
  static constexpr double kSerialWork = 1 << 17;

  // n weights from flat index start on, whole groups.
  static void decode_row(const Weight4& w, const CodeTable& table, int64_t start, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += kGroup) {
      const float absmax = absmax_at(w.absmax, (start + i) >> w.log2_blocksize);
      decode_group(table, set1(absmax), w.packed + ((start + i) >> 1), out + i);
    }
  }

  // Rows row0 … row0 + depth (those from row0 + n on are zero) of W [.., width], columns o0 … o0 + outputs.
  template <int64_t kColumns>
  static void decode_rows(const Weight4& w, int64_t row0, int64_t n, int64_t depth, int64_t width, int64_t o0,
                          int64_t outputs, float* panel) {
    const CodeTable table = code_registers(code_table(w.quant_type));
    for (int64_t q = 0; q < n; ++q) {
      const int64_t start = (row0 + q) * width + o0;
      prefetch_bytes(w.packed, (start + kRowsAhead * width) >> 1, outputs / 2);
      prefetch_absmax(w, start + kRowsAhead * width, outputs);
      decode_row(w, table, start, outputs, panel + q * kColumns);
    }
    std::memset(panel + n * kColumns, 0, static_cast<size_t>((depth - n) * kColumns) * sizeof(float));
  }

  static void reorder(float* x) {
    alignas(64) float y[kGroup];
    reorder_group(x, y);
    std::memcpy(x, y, sizeof(y));
  }
  static void restore(const float* c, float* y) { restore_group(c, y); }

  // v[m * v_stride + o] = z[m] · w[o], m < rows <= kDotRows, o0 <= o < o1: w's rows, contiguous, are read where they lie.
  static constexpr int kDotRows = 4;
  template <class T>
  static void dot_rows(const Matrix& w, int64_t o0, int64_t o1, int64_t rows, const T* z, int64_t n, float* v,
                       int64_t v_stride);

  template <int R, int V>
  static void tile(int64_t depth, const float* a, int64_t a_stride, int64_t, const float* b, int64_t b_stride,
                   float* c, int64_t c_stride, bool empty) {
    Vec sum[R][V];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] = empty ? zero() : load(c + r * c_stride + v * kLanes);
    for (int64_t q = 0; q < depth; ++q, b += b_stride) {
      Vec column[V];
      for (int v = 0; v < V; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        const Vec x = set1(a[r * a_stride + q]);
        for (int v = 0; v < V; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
  }

  static void multiply(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t a_stride,
                       const float* b, int64_t b_stride, float* c, int64_t c_stride, bool empty) {
    multiply_tiles<F32Kernel>(rows, vectors, depth, a, a_stride, 1, b, b_stride, c, c_stride, empty);
  }
};

constexpr int64_t kDotAheadBytes = 4 << 10;  // what rows of W are fetched ahead

// sum[m] += w · x[m]
template <int M, class W, class X>
inline void add_dot(const W* w, const X* x, int64_t n, Vec* sum) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
    const Vec row = load(w + i);
    prefetch_bytes(w + i, kDotAheadBytes, 1);
    for (int m = 0; m < M; ++m) sum[m] = fma(row, load(x + m * n + i), sum[m]);
  }
  if (i == n) return;
  const int left = static_cast<int>(n - i);
  const Vec row = load_n(w + i, left);
  for (int m = 0; m < M; ++m) sum[m] = fma(row, load_n(x + m * n + i, left), sum[m]);
}

// The same with a row of a matrix, where it lies or else in `room`.
template <int M, class X>
inline void add_dot_row(const Matrix& w, int64_t row, const X* x, int64_t n, float* room, Vec* sum) {
  const int64_t at = row * w.stride0;
  if (w.stride1 == 1) {
    if (w.dtype == DType::f32) return add_dot<M>(static_cast<const float*>(w.data) + at, x, n, sum);
    if (w.dtype == DType::bf16) return add_dot<M>(static_cast<const Bf16*>(w.data) + at, x, n, sum);
    return add_dot<M>(static_cast<const F16*>(w.data) + at, x, n, sum);
  }
  read_row(w, row, 0, n, room);
  add_dot<M>(room, x, n, sum);
}

template <int M, class T>
inline void dot_rows_of(const Matrix& w, int64_t o0, int64_t o1, const T* z, int64_t n, float* v,
                        int64_t v_stride) {
  for (int64_t o = o0; o < o1; ++o) {
    Vec sum[M];
    for (Vec& s : sum) s = zero();
    add_dot_row<M>(w, o, z, n, nullptr, sum);
    for (int m = 0; m < M; ++m) v[m * v_stride + o] = reduce_add(sum[m]);
  }
}

template <class T>
inline void F32Kernel::dot_rows(const Matrix& w, int64_t o0, int64_t o1, int64_t rows, const T* z, int64_t n,
                                float* v, int64_t v_stride) {
  if (rows == 1) return dot_rows_of<1>(w, o0, o1, z, n, v, v_stride);
  if (rows == 2) return dot_rows_of<2>(w, o0, o1, z, n, v, v_stride);
  if (rows == 3) return dot_rows_of<3>(w, o0, o1, z, n, v, v_stride);
  static_assert(kDotRows == 4, "all of them");
  return dot_rows_of<4>(w, o0, o1, z, n, v, v_stride);
}

// Few rows of x, at most eight of them at a time: a row of W is decoded into registers and meets each there, 8 kWidth
// weights (a chunk) at once. absmax multiplies the sums of a chunk; in a unit of weights it is the same.
//
//   per 128 weights (AVX-512)  7 shifts, 8 VPERMPS, 1 to spread absmax, and for a row of x 8 multiply-adds and one more
//   floor                      (16 + 9 M) / 2 cycles; memory: 72 bytes
//   range                      absmax comes last, so a sum of codes · x must itself be finite: |x| up to 4e37
//
// x of a 4-bit W is packed [chunk][M][8][kWidth], each chunk as x[j][i] = x[8 i + j], zero beyond its end. Half a chunk
// at the end, where units are that long, is four vectors, with x[8 i + j] and x[8 i + j + 4] in their halves. x of a dense W
// is [M][inner], t [rows][rank]. x passes in parts that stay in the L1 cache while kDotTask rows of W do.
constexpr int64_t kDotGroup = 8, kDotMost = Vec::kWidth == 16 ? 24 : 20, kDotTask = 64;
constexpr int64_t kDotChunk = 8 * Vec::kWidth;

// part[m] = sums of the first `end` of a chunk's vectors with x[m]
template <int M, int end, int j = 0>
inline __attribute__((always_inline)) void add_lookups(const CodeTable& table, const Words& words,
                                                       const float* x, Vec* part) {
  if constexpr (j < end) {
    const Vec values = lookup<j>(table, words);
    for (int m = 0; m < M; ++m) {
      const Vec other = load(x + m * kDotChunk + j * Vec::kWidth);
      part[m] = j ? fma(values, other, part[m]) : mul(values, other);
    }
    add_lookups<M, end, j + 1>(table, words, x, part);
  }
}

// sums[m] += w · x[m] over the columns from … to; kUnits in a chunk, or one for several. The bytes `ahead` are fetched
// into L2, those `near` into L1.
template <int M, int kUnits>
__attribute__((noinline)) void dot_row_4bit(const CodeTable& table, const DotRow& w, const float* x,
                                            int log2_unit, int64_t from, int64_t to, int64_t ahead,
                                            int64_t near, Vec* sums) {
  Vec sum[M], part[M];
  for (int m = 0; m < M; ++m) sum[m] = from ? sums[m] : zero();
  const auto add_scaled = [&](Vec scale) {
    for (int m = 0; m < M; ++m) sum[m] = fma(part[m], scale, sum[m]);
  };
  int64_t k = from;
  for (; k + kDotChunk <= to; k += kDotChunk) {
    const uint8_t* bytes = w.bytes + (k >> 1);
    prefetch_bytes(bytes, ahead, 1);
    prefetch_l1(bytes, near);
    add_lookups<M, 8>(table, load_words(bytes), x + k * M, part);
    add_scaled(spread<kUnits>(w.absmax + (k >> log2_unit)));
  }
  if constexpr (kUnits == 2) {
    if (k < to) {  // half a chunk, one unit
      add_lookups<M, 4>(table, half_words(w.bytes + (k >> 1)), x + k * M, part);
      add_scaled(set1(w.absmax[k >> log2_unit]));
    }
  }
  if constexpr (kUnits == 4) {
    if (k < to) {  // one to three units; the missing ones meet zeros of x
      uint8_t bytes[kDotChunk / 2] = {};
      float scales[kUnits] = {};
      std::memcpy(bytes, w.bytes + (k >> 1), static_cast<size_t>((to - k) / 2));
      for (int u = 0; u < (to - k) / 32; ++u) scales[u] = w.absmax[(k >> log2_unit) + u];
      add_lookups<M, 8>(table, load_words(bytes), x + k * M, part);
      add_scaled(spread<kUnits>(scales));
    }
  }
  for (int m = 0; m < M; ++m) sums[m] = sum[m];
}

template <int M>
inline auto dot_row_of(int64_t units) {  // in a chunk
  if constexpr (Vec::kWidth >= 16) {
    if (units == 4) return dot_row_4bit<M, 4>;
  }
  if constexpr (Vec::kWidth >= 8) {
    if (units == 2) return dot_row_4bit<M, 2>;
  }
  return dot_row_4bit<M, 1>;
}

// What one task works on: outputs o0 … o0 + rows.
struct DotTask {
  const DotRow* w;
  int log2_unit;
  int64_t o0, rows;
  float* room;  // for a row of dense W or u
};

// y[m] = sums of the task's rows of W with x[m]
template <int M>
inline void dot_f32(const MatmulParams& p, const CodeTable& table, const DotTask& task, const float* x,
                    const float* t, float (*y)[kDotTask]) {
  constexpr int64_t kColumns = (32 << 10) / (4 * M) / kDotChunk * kDotChunk;  // of x, that stay in L1
  const int64_t columns =
      round_up(ceil_div(p.inner, max_of<int64_t>(1, ceil_div(p.inner, kColumns))), kDotChunk);
  const int64_t parts = columns ? ceil_div(p.inner, columns) : 1;
  // Whole rows further on, because the hardware stops at each page of 4 KB; after the task's last one its next part, then
  // the next task.
  const int64_t row_bytes = p.inner / 2,
                rows_ahead = max_of<int64_t>(1, 2 * kDotAheadBytes / max_of<int64_t>(1, columns));
  const int64_t near = parts == 1 || columns >= 4096 ? 512 : row_bytes;
  const auto dot_row = dot_row_of<M>(kDotChunk >> task.log2_unit);
  Vec sums[kDotTask][M];
  for (int64_t part = 0; task.w && part < parts; ++part) {
    const int64_t from = part * columns, to = min_of(from + columns, p.inner);
    const int64_t wrap = to < p.inner ? columns / 2 - task.rows * row_bytes : -from / 2;
    for (int64_t o = 0; o < task.rows; ++o) {
      const int64_t ahead = rows_ahead * row_bytes + (o + rows_ahead < task.rows ? 0 : wrap);
      dot_row(table, task.w[o], x, task.log2_unit, from, to, ahead, near, sums[o]);
    }
  }
  for (int64_t o = 0; o < task.rows; ++o) {
    if (!task.w) {
      for (int m = 0; m < M; ++m) sums[o][m] = zero();
      add_dot_row<M>(p.dense, task.o0 + o, x, p.inner, task.room, sums[o]);
    }
    if (p.rank) add_dot_row<M>(p.u, task.o0 + o, t, p.rank, task.room, sums[o]);
  }
  for (int64_t o = 0; o < task.rows; o += Vec::kWidth)
    for (int m = 0; m < M; ++m) {
      Vec each[Vec::kWidth];
      for (int e = 0; e < Vec::kWidth; ++e) each[e] = o + e < task.rows ? sums[o + e][m] : zero();
      store(y[m] + o, reduce_each(each));
    }
}

// A row of x as it meets W's: its chunks, out_stride from one to the next. `room` has kWidth values more than they.
inline void split_row(const Matrix& x, int64_t m, int64_t n, int log2_unit, float* room, float* out,
                      int64_t out_stride) {
  constexpr int64_t kWidth = Vec::kWidth;
  alignas(64) float turned[max_of(kDotChunk, kWidth * kWidth)];
  const int64_t whole = kDotChunk >> log2_unit == 2 ? n / kDotChunk * kDotChunk : round_up(n, kDotChunk);
  read_row(x, m, 0, n, room);
  std::memset(room + n, 0, static_cast<size_t>(round_up(n, kDotChunk) + kWidth - n) * sizeof(float));
  int64_t k = 0;
  for (; k < whole; k += kDotChunk, out += out_stride) {
    for (int64_t j = 0; j < 8; j += kWidth) transpose(room + k + j, 8, turned + j * kWidth, kWidth);
    std::memcpy(out, turned, kDotChunk * sizeof(float));
  }
  for (int64_t i = 0; k < n; ++i, k += 8)
    for (int64_t j = 0; j < 8; ++j) out[j % 4 * kWidth + j / 4 * kWidth / 2 + i] = room[k + j];
}

inline void run_dot_f32(const MatmulParams& p) {
  int log2_unit = 5;  // as long as blocks and rows let it be
  while (log2_unit < p.weight4.log2_blocksize && p.inner % (int64_t{2} << log2_unit) == 0) ++log2_unit;
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(p.outputs) * static_cast<double>(p.inner);
  const int threads = work < F32Kernel::kSerialWork ? 1 : p.threads;
  const bool four_bit = p.weight4.packed != nullptr;
  const int64_t x_stride = four_bit ? round_up(p.inner, kDotChunk) : p.inner;
  const int64_t room = max_of(x_stride + Vec::kWidth, p.rank),
                absmax_room = four_bit ? kDotTask * dot_absmax_room(p, log2_unit) : 0;
  float* x = static_cast<float*>(
      scratch(static_cast<size_t>((x_stride + p.rank) * p.rows + (room + absmax_room) * threads) * 4));
  float* t = x + p.rows * x_stride;
  float* own = t + p.rows * p.rank;
  const int64_t groups = ceil_div(p.rows, kDotGroup);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t m0 = p.rows * g / groups, rows = p.rows * (g + 1) / groups - m0;
    for (int64_t m = 0; m < rows; ++m) {
      if (four_bit) {
        split_row(p.x, m0 + m, p.inner, log2_unit, own, x + m0 * x_stride + m * kDotChunk, rows * kDotChunk);
      } else {
        read_row(p.x, m0 + m, 0, p.inner, x + (m0 + m) * x_stride);
      }
      if (p.rank) read_row(p.t, m0 + m, 0, p.rank, t + (m0 + m) * p.rank);
    }
  }
  const CodeTable table = code_registers(code_table(p.weight4.quant_type));
  // Eighths of a thread's part, and something for each: an adapter's rows are few.
  const int64_t most = min_of(min_of(kDotTask, ceil_div(p.outputs, threads)),
                              round_up(ceil_div(p.outputs, 8 * threads), Vec::kWidth));
  parallel_tasks(threads, ceil_div(p.outputs, most), [&](int thread, int64_t index) {
    float* mine = own + thread * (room + absmax_room);
    DotRow w[kDotTask];
    const int64_t o0 = index * most, outputs = min_of(most, p.outputs - o0);
    if (p.rank) prefetch_u(p, o0, outputs);
    if (four_bit) {
      prefetch_absmax(p.weight4, (o0 + most) * p.inner, most * p.inner);
      dot_weights(p, log2_unit, o0, outputs, mine + room, w);
    }
    const DotTask task = {four_bit ? w : nullptr, log2_unit, o0, outputs, mine};
    alignas(64) float y[kDotMost][kDotTask];
    for (int64_t g = 0; g < groups; ++g) {
      static constexpr decltype(&dot_f32<1>) kDot[kDotGroup] = {
          dot_f32<1>, dot_f32<2>, dot_f32<3>, dot_f32<4>, dot_f32<5>, dot_f32<6>, dot_f32<7>, dot_f32<8>};
      const int64_t m = p.rows * g / groups, n = p.rows * (g + 1) / groups - m;
      kDot[n - 1](p, table, task, x + m * x_stride, t + m * p.rank, y + m);
    }
    Epilogue epilogue(p);
    Epilogue::Columns<kDotTask> columns;
    epilogue.begin(o0, outputs, columns);
    for (int64_t m = 0; m < p.rows; ++m) epilogue.write(m, o0, outputs, y[m]);
  });
}

inline void matmul_f32_any(const MatmulParams& p) {
  if (p.rows == 0 || p.outputs == 0) return;
  if (epilogue_alone(p)) return run_epilogue(p);
  const bool dot = p.weight4.packed ? p.rows <= kDotMost && p.inner % 32 == 0 : p.rows <= F32Kernel::kDotRows;
  if (dot && !p.transposed) return run_dot_f32(p);
  Matmul<F32Kernel>(p).run();
}

}  // namespace

void matmul_f32(const MatmulParams& p) { matmul_f32_any(p); }
void matmul_bf16(const MatmulParams& p) { matmul_f32_any(p); }
void matmul_f16(const MatmulParams& p) { matmul_f32_any(p); }

}  // namespace peftkern::PEFTKERN_ISA
