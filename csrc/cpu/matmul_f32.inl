// matmul with fp32 arithmetic: x of any dtype at the levels without a bf16 multiply, fp32 and fp16 at every
// level. W's values are code * absmax in fp32, not rounded further.
#pragma once

#include "cpu/matmul.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

struct F32Kernel {
  using Elem = float;
  static constexpr int kPair = 1;
  static constexpr int kLanes = Vec::kWidth;
  static constexpr int kAccumulators = kLanes == 16 ? 24 : 12;  // of 32 or 16 registers
  static constexpr int kMaxVectors = kLanes == 16 ? 4 : 3;
  static constexpr int kDepth = 256;
  static constexpr int kPanelRows = 96;
  static constexpr int kShortPanels = 2;  // half as tall for few rows of x
  static constexpr int kPanelColumns = 96;
  static constexpr int kStrip = 96;
  static constexpr bool kAcross = false;
  static constexpr int kMaxRows = 240;
  static constexpr int kRowSplitW = 48;
  static constexpr int kRowSplitX = kAccumulators / kMaxVectors * 2;
  static constexpr int kAlignW = 1;
  static constexpr int kAlignX = 1;
  static constexpr bool kGroups = false;  // panels are in natural order
  static constexpr double kSerialWork = 1 << 17;

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

// sum[m] += w · x[m]
template <int M, class W, class X>
inline void add_dot(const W* w, const X* x, int64_t n, Vec* sum) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
    const Vec row = load(w + i);
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

// sum[m] += w · x[m] over the columns from … to of a row of a 4-bit W that starts at flat index `start`, kStep weights of
// a block at a time; absmax of the first one's block on, x in lookup_split's order. absmax multiplies the codes or else
// the sums of a step.
template <int M, bool kCodes, int kStep>
inline void add_dot_4bit(const Weight4& w, const CodeTable& table, int64_t start, const float* absmax,
                         const float* x, int64_t n, int64_t from, int64_t to, Vec* sum) {
  // Whole rows further on, because the hardware stops at each page of 4 KB.
  constexpr int64_t kAheadBytes = 16 << 10;
  const int64_t ahead = max_of<int64_t>(1, 2 * kAheadBytes / (to - from)) * n / 2;
  const int64_t first = (start + from) >> w.log2_blocksize;
  const uint8_t* packed = w.packed + ((start + from) >> 1);
  for (int64_t k = from; k < to; k += kStep, packed += kStep / 2) {
    prefetch_bytes(packed, ahead, 1);
    const float scale = absmax[((start + k) >> w.log2_blocksize) - first];
    if constexpr (kCodes) {
      alignas(64) float codes[16];
      for (int i = 0; i < 16; i += Vec::kWidth)
        store(codes + i, mul(load(code_table(w.quant_type) + i), set1(scale)));
      const CodeTable scaled = code_registers(codes);
#pragma GCC unroll 16
      for (int i = 0; i < kStep; i += Vec::kWidth) {
        const Vec values = lookup_split(scaled, packed + i / 2);
        for (int m = 0; m < M; ++m) sum[m] = fma(values, load(x + m * n + k + i), sum[m]);
      }
    } else {
      Vec part[M];
      for (int m = 0; m < M; ++m) part[m] = zero();
#pragma GCC unroll 16
      for (int i = 0; i < kStep; i += Vec::kWidth) {
        const Vec values = lookup_split(table, packed + i / 2);
        for (int m = 0; m < M; ++m) part[m] = fma(values, load(x + m * n + k + i), part[m]);
      }
      for (int m = 0; m < M; ++m) sum[m] = fma(part[m], set1(scale), sum[m]);
    }
  }
}

// Few rows of x, at most eight of them at a time: a row of W is decoded into registers and meets each there.
// x [rows, inner] and t [rows, rank] are packed. Five rows and more pass in groups of at least four, for which a
// multiplication of the codes is less than one of each sum.
constexpr int64_t kDotGroup = 8, kDotMost = Vec::kWidth == 16 ? 24 : 20, kDotTask = 16;
constexpr int64_t kDotSums = 4;  // rows for which absmax multiplies the sums

// y[m] = sums of W's rows o0 … with x[m]. `buffer` is for a row of W or u that is not contiguous, or for absmax (nested).
template <int M, bool kCodes>
inline void dot_f32(const MatmulParams& p, const CodeTable& table, const float* x, const float* t,
                    float* buffer, int64_t o0, int64_t outputs, float (*y)[kDotTask]) {
  constexpr int64_t kColumns = (32 << 10) / (4 * M) / 64 * 64;  // of x, that stay in L1
  const int64_t parts = max_of<int64_t>(1, ceil_div(p.inner, kColumns));
  const int64_t columns = round_up(ceil_div(p.inner, parts), 64);
  const Weight4& w = p.weight4;
  const bool short_step = w.log2_blocksize == 5 || p.inner % 64;
  Vec sum[kDotTask][M];
  for (auto& row : sum)
    for (Vec& v : row) v = zero();
  for (int64_t from = 0; w.packed && from < p.inner; from += columns) {
    const int64_t to = min_of(from + columns, p.inner);
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t start = (o0 + o) * p.inner, first = (start + from) >> w.log2_blocksize;
      const int64_t last = (start + to - 1) >> w.log2_blocksize;
      const float* absmax = absmax_range(w.absmax, first, last - first + 1, buffer);
      short_step ? add_dot_4bit<M, kCodes, 32>(w, table, start, absmax, x, p.inner, from, to, sum[o])
                 : add_dot_4bit<M, kCodes, 64>(w, table, start, absmax, x, p.inner, from, to, sum[o]);
    }
  }
  for (int64_t o = 0; o < outputs; ++o) {
    if (!w.packed) add_dot_row<M>(p.dense, o0 + o, x, p.inner, buffer, sum[o]);
    if (p.rank) add_dot_row<M>(p.u, o0 + o, t, p.rank, buffer, sum[o]);
    for (int m = 0; m < M; ++m) y[m][o] = reduce_add(sum[o][m]);
  }
}

inline void run_dot_f32(const MatmulParams& p) {
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(p.outputs) * static_cast<double>(p.inner);
  const int threads = work < F32Kernel::kSerialWork ? 1 : p.threads;
  const int64_t blocks = (p.inner >> p.weight4.log2_blocksize) + 2;  // that a row of W has a part in
  const int64_t room = max_of(max_of(p.inner, p.rank), blocks);
  float* x =
      static_cast<float*>(scratch(static_cast<size_t>((p.inner + p.rank) * p.rows + room * threads) * 4));
  float* t = x + p.rows * p.inner;
  float* buffers = t + p.rows * p.rank;
  for (int64_t m = 0; m < p.rows; ++m) {
    float* values = x + m * p.inner;
    read_row(p.x, m, 0, p.inner, values);
    for (int64_t i = 0; p.weight4.packed && i < p.inner; i += Vec::kWidth)
      store(values + i, permute(load(values + i), kSplit));
    if (p.rank) read_row(p.t, m, 0, p.rank, t + m * p.rank);
  }
  const CodeTable table = code_registers(code_table(p.weight4.quant_type));
  const int64_t groups = ceil_div(p.rows, kDotGroup);
  const int64_t most = min_of(kDotTask, ceil_div(p.outputs, threads));  // an adapter's rows are few
  parallel_tasks(threads, ceil_div(p.outputs, most), [&](int thread, int64_t task) {
    const int64_t o0 = task * most, outputs = min_of(most, p.outputs - o0);
    if (p.weight4.packed) prefetch_absmax(p.weight4, (o0 + most) * p.inner, most * p.inner);
    if (p.rank) prefetch_u(p, o0, outputs);
    float y[kDotMost][kDotTask];
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t m = p.rows * group / groups, n = p.rows * (group + 1) / groups - m;
      // All rows of a call round alike.
      static constexpr decltype(&dot_f32<1, false>) kSums[kDotSums] = {dot_f32<1, false>, dot_f32<2, false>,
                                                                       dot_f32<3, false>, dot_f32<4, false>};
      static constexpr decltype(&dot_f32<1, false>) kCodes[] = {
          dot_f32<4, true>, dot_f32<5, true>, dot_f32<6, true>, dot_f32<7, true>, dot_f32<8, true>};
      const auto dot = p.rows <= kDotSums ? kSums[n - 1] : kCodes[n - 4];
      dot(p, table, x + m * p.inner, t + m * p.rank, buffers + thread * room, o0, outputs, y + m);
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
