// matmul with fp32 arithmetic: x of any dtype at the levels without a bf16 multiply, fp32 and fp16 at every
// level. W's values are code * absmax in fp32, not rounded further.
#pragma once

#include "cpu/matmul.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

struct F32Kernel {
  using Elem = float;
  static constexpr int kDotRows = 0;
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

// sum[m] += w · x[m]; what does not fill a vector goes to tail[m].
template <int M>
inline void add_dot(const float* w, const float* x, int64_t n, Vec* sum, float* tail) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
    const Vec row = load(w + i);
    for (int m = 0; m < M; ++m) sum[m] = fma(row, load(x + m * n + i), sum[m]);
  }
  for (; i < n; ++i)
    for (int m = 0; m < M; ++m) tail[m] += w[i] * x[m * n + i];
}

// Few rows of x: each row of W is decoded into registers once and meets every row of x there. absmax enters
// as one multiply for every `step` weights, on the sum. x [M, inner] and t [M, rank] are packed; `room`
// [threads][row] is for a row of W or u as floats, or for a row's absmax (nested).
template <int M>
inline void dot_f32(const MatmulParams& p, const float* x, const float* t, float* room, int64_t row,
                    int threads) {
  const CodeTable table = code_registers(code_table(p.weight4.quant_type));
  const bool four_bit = p.weight4.packed != nullptr;
  const int64_t step = p.weight4.log2_blocksize == 5 || p.inner % 64 ? 32 : 64;
  constexpr int64_t kTask = 16;
  parallel_tasks(threads, ceil_div(p.outputs, kTask), [&](int thread, int64_t task) {
    float* buffer = room + thread * row;
    const int64_t o0 = task * kTask, outputs = min_of(kTask, p.outputs - o0);
    float y[M][kTask];
    for (int64_t o = o0; o < o0 + outputs; ++o) {
      Vec sum[M];
      for (int m = 0; m < M; ++m) sum[m] = zero();
      float tail[M] = {};
      if (four_bit) {
        const int64_t flat = o * p.inner;
        const int64_t first = flat >> p.weight4.log2_blocksize;
        const int64_t last = (flat + p.inner - 1) >> p.weight4.log2_blocksize;
        const float* absmax = absmax_range(p.weight4.absmax, first, last - first + 1, buffer);
        for (int64_t k = 0; k < p.inner; k += step) {
          Vec part[M];
          for (int m = 0; m < M; ++m) part[m] = zero();
          for (int64_t i = k; i < k + step; i += Vec::kWidth) {
            const Vec w = lookup(table, p.weight4.packed + ((flat + i) >> 1));
            for (int m = 0; m < M; ++m) part[m] = fma(w, load(x + m * p.inner + i), part[m]);
          }
          const Vec scale = set1(absmax[((flat + k) >> p.weight4.log2_blocksize) - first]);
          for (int m = 0; m < M; ++m) sum[m] = fma(part[m], scale, sum[m]);
        }
      } else {
        read_row(p.dense, o, 0, p.inner, buffer);
        add_dot<M>(buffer, x, p.inner, sum, tail);
      }
      if (p.rank) {
        read_row(p.u, o, 0, p.rank, buffer);
        add_dot<M>(buffer, t, p.rank, sum, tail);
      }
      for (int m = 0; m < M; ++m) y[m][o - o0] = reduce_add(sum[m]) + tail[m];
    }
    Epilogue epilogue(p);
    Epilogue::Columns<kTask> columns;
    epilogue.begin(o0, outputs, columns);
    for (int m = 0; m < M; ++m) epilogue.write(m, o0, outputs, y[m]);
  });
}

inline void matmul_f32_any(const MatmulParams& p) {
  if (p.rows == 0 || p.outputs == 0) return;
  if (epilogue_alone(p)) return run_epilogue(p);
  if (p.transposed || p.rows > 4 || (p.weight4.packed && p.inner % 32)) return Matmul<F32Kernel>(p).run();
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(p.outputs) * static_cast<double>(p.inner);
  const int threads = work < F32Kernel::kSerialWork ? 1 : p.threads;
  const int64_t blocks = (p.inner >> p.weight4.log2_blocksize) + 2;  // that a row of W has a part in
  const int64_t row = max_of(max_of(p.inner, p.rank), blocks);
  float* x =
      static_cast<float*>(scratch(static_cast<size_t>((p.inner + p.rank) * p.rows + row * threads) * 4));
  float* t = x + p.rows * p.inner;
  float* room = t + p.rows * p.rank;
  for (int64_t m = 0; m < p.rows; ++m) {
    read_row(p.x, m, 0, p.inner, x + m * p.inner);
    if (p.rank) read_row(p.t, m, 0, p.rank, t + m * p.rank);
  }
  switch (p.rows) {
    case 1:
      return dot_f32<1>(p, x, t, room, row, threads);
    case 2:
      return dot_f32<2>(p, x, t, room, row, threads);
    case 3:
      return dot_f32<3>(p, x, t, room, row, threads);
    default:
      return dot_f32<4>(p, x, t, room, row, threads);
  }
}

}  // namespace

void matmul_f32(const MatmulParams& p) { matmul_f32_any(p); }
void matmul_bf16(const MatmulParams& p) { matmul_f32_any(p); }
void matmul_f16(const MatmulParams& p) { matmul_f32_any(p); }

}  // namespace peftkern::PEFTKERN_ISA
