#define PEFTKERN_ISA avx512_bf16
#define PEFTKERN_VEC_BF16
#include "cpu/vec_avx512.h"

#include "cpu/matmul_bf16.inl"
#include "cpu/mora.inl"
#include "cpu/probe.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

struct Bf16Kernel : Bf16Panels {
  static constexpr int kLanes = 16;
  static constexpr int kAccumulators = 24;
  static constexpr int kMaxVectors = 4;
  static constexpr int kDepth = 320;
  static constexpr int kPanelRows = 144;
  static constexpr int kShortPanels = 3;  // a third as tall for few rows of x
  static constexpr int kPanelColumns = 128;
  static constexpr int kStrip = 64;
  static constexpr bool kAcross = true;
  static constexpr bool kGroups = true;
  static constexpr int kMaxRows = 384;
  static constexpr int kRowSplitW = 48;
  static constexpr int kRowSplitX = 12;
  static constexpr int kAlignW = 2;
  static constexpr int kAlignX = 2;
  static constexpr int kShortRows = 0, kShortDepth = kDepth;
  static constexpr double kSerialWork = 1 << 18;

  template <int R, int V>
  static void tile(int64_t pairs, const Bf16* a, int64_t a_stride, int64_t a_step, const Bf16* b,
                   int64_t b_stride, float* c, int64_t c_stride, bool empty) {
    __m512 sum[R][V];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = empty ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * c_stride + v * kLanes);
    for (int64_t q = 0; q < pairs; ++q, a += a_step, b += b_stride) {
      __m512i column[V];
      for (int v = 0; v < V; ++v) column[v] = _mm512_loadu_si512(b + 2 * v * kLanes);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * a_stride, 4);
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        for (int v = 0; v < V; ++v)
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, reinterpret_cast<__m512bh>(column[v]));
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * c_stride + v * kLanes, sum[r][v]);
  }

  static void multiply(int64_t rows, int64_t vectors, int64_t pairs, const Bf16* a, int64_t a_stride,
                       const Bf16* b, int64_t b_stride, float* c, int64_t c_stride, bool empty) {
    multiply_tiles<Bf16Kernel>(rows, vectors, pairs, a, a_stride, kPair, b, b_stride, c, c_stride, empty);
  }
  // A as pairs of columns, a_step from one pair to the next.
  static void multiply_across(int64_t rows, int64_t vectors, int64_t pairs, const Bf16* a, int64_t a_step,
                              const Bf16* b, int64_t b_stride, float* c, int64_t c_stride, bool empty) {
    multiply_tiles<Bf16Kernel>(rows, vectors, pairs, a, kPair, a_step, b, b_stride, c, c_stride, empty);
  }
};

struct Bf16Products {
  static constexpr int kRows = 5;
  static constexpr int kColumns = 4;
  static constexpr int kFlops = 64;
  using Operand = __m512bh;
  using Sum = __m512;
  static __m512bh operand(uint32_t& seed) {
    const __m512 low = F32Products::operand(seed).v;
    return _mm512_cvtne2ps_pbh(F32Products::operand(seed).v, low);
  }
  static __m512 nothing() { return _mm512_setzero_ps(); }
  static __m512 product(__m512bh a, __m512bh b, __m512 sum) { return _mm512_dpbf16_ps(sum, a, b); }
  static float total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
};

}  // namespace

void probe_bf16(const ProbeParams& p) { probe<Bf16Products>(p); }

void matmul_bf16(const MatmulParams& p) {
  if (p.rows == 0 || p.outputs == 0) return;
  if (epilogue_alone(p)) return run_epilogue(p);
  if (dot_applies(p, 24)) return run_dot_bf16(p);
  Matmul<Bf16Kernel>(p).run();
}

// Their own, for their rounding to bf16: what mora does here is what they do.
void compress_f32(const CompressParams& p) { Compress<float>(p).run(); }
void compress_bf16(const CompressParams& p) { Compress<Bf16>(p).run(); }
void compress_f16(const CompressParams& p) { Compress<F16>(p).run(); }

void mora_bf16(const MoraParams& p) { Mora<Bf16Kernel, Bf16>(p).run(); }
void mora_grad_bf16(const MoraGradParams& p) { MoraGrad<Bf16Kernel, Bf16>(p).run(); }

}  // namespace peftkern::PEFTKERN_ISA
