// matmul for bf16 x with bf16 multiplies and fp32 sums (VDPBF16PS or AMX tiles): how the weight gets into
// registers.
//
// Decoding 128 weights (64 bytes) costs 3 shifts, 4 ternary ands, 4 VPERMW and one 32-entry table. A 16-bit
// word holds four nibbles; shifting it right by 4, 0, 12, 8 brings weight 0, 1, 2, 3 of the word to the
// bottom, where VPERMW looks them up. Along a row weights so come in stride 4, and no shuffle puts them back
// in order: of a group of 64 weights (16 words),
//     value[16 j + i] = weight 4 i + j          j < 4, i < 16
//     few rows      x is brought into the same order
//     transposed    the result is put in order at the end
//     plain         two neighbours of a row have to share a lane: they are decoded otherwise, decode_columns
// The table holds bf16(code * absmax) for two blocks of 16 codes: the values that dequantize gives, but for
// subnormals, which these levels take as zeros.
#pragma once

#include "cpu/dots.inl"
#include "cpu/matmul.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

inline __m512i shift_word(__m512i words, int j) {
  switch (j) {
    case 0:
      return _mm512_srli_epi16(words, 4);
    case 1:
      return words;
    case 2:
      return _mm512_srli_epi16(words, 12);
    default:
      return _mm512_srli_epi16(words, 8);
  }
}

inline __m512i bf16_pair(__m512 high, __m512 low) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// The first 16 words of two vectors alternate.
inline __m512i alternate() {
  alignas(64) static constexpr uint16_t kIndex[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_load_si512(kIndex);
}

struct Bf16Panels {
  using Elem = Bf16;
  static constexpr int kPair = 2;

  // v[m * v_stride + o] = z[m] · w[o], m < rows <= kDotRows, o0 <= o < o1: w's rows, contiguous and bf16 or
  // fp32, are read where they lie.
  static constexpr int kDotRows = 4;
  static void dot_rows(const Matrix& w, int64_t o0, int64_t o1, int64_t rows, const Bf16* z, int64_t n,
                       float* v, int64_t v_stride);

  // x[16 j + i] = x[4 i + j]
  static void reorder(Bf16* x) {
    alignas(64) static constexpr uint16_t kOrder[64] = {
        0,  4,  8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 1,  5,  9,  13, 17, 21,
        25, 29, 33, 37, 41, 45, 49, 53, 57, 61, 2,  6,  10, 14, 18, 22, 26, 30, 34, 38, 42, 46,
        50, 54, 58, 62, 3,  7,  11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63};
    const __m512i low = _mm512_loadu_si512(x);
    const __m512i high = _mm512_loadu_si512(x + 32);
    _mm512_storeu_si512(x, _mm512_permutex2var_epi16(low, _mm512_load_si512(kOrder), high));
    _mm512_storeu_si512(x + 32, _mm512_permutex2var_epi16(low, _mm512_load_si512(kOrder + 32), high));
  }

  // y[4 i + j] = c[16 j + i]: three rounds of interleaving
  static void restore(const float* c, float* y) {
    const __m512i lo = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i hi = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i lo2 = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i hi2 = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512 c0 = _mm512_loadu_ps(c), c1 = _mm512_loadu_ps(c + 16);
    const __m512 c2 = _mm512_loadu_ps(c + 32), c3 = _mm512_loadu_ps(c + 48);
    for (int half = 0; half < 2; ++half) {
      const __m512i index = half ? hi : lo;
      const __m512d a = _mm512_castps_pd(_mm512_permutex2var_ps(c0, index, c1));
      const __m512d b = _mm512_castps_pd(_mm512_permutex2var_ps(c2, index, c3));
      _mm512_storeu_pd(y + 32 * half, _mm512_permutex2var_pd(a, lo2, b));
      _mm512_storeu_pd(y + 32 * half + 16, _mm512_permutex2var_pd(a, hi2, b));
    }
  }

  // Rows row0 … row0 + depth (those from row0 + n on are zero) of W [.., width], columns o0 … o0 + outputs,
  // two rows a time: the packed words of both alternate before the look-up, so pairs come out ready.
  // panel[strip][q][16 j + i][2] = W[row0 + 2 q + {0, 1}, 4 i + j] in each group of 64 columns of a strip.
  template <int64_t kStrip>
  static void decode_rows(const Weight4& w, int64_t row0, int64_t n, int64_t depth, int64_t width, int64_t o0,
                          int64_t outputs, Bf16* panel) {
    const __m512 code = _mm512_loadu_ps(code_table(w.quant_type));
    const __m512i nibble_mask = _mm512_set1_epi16(15);
    const __m512i second = _mm512_set1_epi32(16 << 16);
    const __m512i order = alternate();
    for (int64_t q = 0; q < depth; q += 2, panel += 2 * kStrip) {
      if (q >= n) {
        for (int64_t o = 0; o < outputs; o += kStrip)
          std::memset(panel + o * depth, 0,
                      static_cast<size_t>(min_of(kStrip, outputs - o)) * 2 * sizeof(Bf16));
        continue;
      }
      const bool odd = q + 1 == n;  // the second row of the pair is not there: absmax 0
      const int64_t flat0 = (row0 + q) * width + o0;
      const int64_t flat1 = odd ? flat0 : flat0 + width;
      // twice as far: 128 columns of a row take only some ten cycles
      prefetch_bytes(w.packed, (flat0 + 2 * kRowsAhead * width) >> 1, outputs / 2);
      prefetch_bytes(w.packed, (flat1 + 2 * kRowsAhead * width) >> 1, outputs / 2);
      for (int64_t o = 0; o < outputs; o += kGroup) {
        Bf16* out = panel + o / kStrip * kStrip * depth + 2 * (o % kStrip);
        const float a0 = absmax_at(w.absmax, (flat0 + o) >> w.log2_blocksize);
        const float a1 = odd ? 0.0f : absmax_at(w.absmax, (flat1 + o) >> w.log2_blocksize);
        const __m256i row_0 =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.packed + ((flat0 + o) >> 1)));
        const __m256i row_1 =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.packed + ((flat1 + o) >> 1)));
        const __m512i words =
            _mm512_permutex2var_epi16(_mm512_castsi256_si512(row_0), order, _mm512_castsi256_si512(row_1));
        const __m512i table =
            bf16_pair(_mm512_mul_ps(code, _mm512_set1_ps(a1)), _mm512_mul_ps(code, _mm512_set1_ps(a0)));
        for (int j = 0; j < 4; ++j) {
          const __m512i index = _mm512_ternarylogic_epi32(shift_word(words, j), nibble_mask, second, 0xea);
          _mm512_storeu_si512(out + 32 * j, _mm512_permutexvar_epi16(index, table));
        }
      }
    }
  }

  // Rows o0 … o0 + outputs of W [.., width], columns c … c + depth (both multiples of 64), brought across:
  // each word of packed bytes becomes two dwords, weights 0 and 1 and weights 2 and 3, and 16 rows of dwords
  // are transposed.
  // panel[strip][q][j][2] = W[o0 + j, c + 2 q + {0, 1}], zero beyond `outputs`.
  template <int64_t kStrip>
  static void decode_columns(const Weight4& w, int64_t o0, int64_t outputs, int64_t width, int64_t c,
                             int64_t depth, Bf16* panel) {
    const __m512 code = _mm512_loadu_ps(code_table(w.quant_type));
    const __m512i twice = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(0x10001));
    const __m512i shift_0 = _mm512_set1_epi32(4), shift_2 = _mm512_set1_epi32(8 << 16 | 12);
    alignas(64) float words[2][16][16];
    for (int64_t j = 0; j < outputs; j += 16) {
      float* out = reinterpret_cast<float*>(panel + j / kStrip * kStrip * depth) + j % kStrip;
      const int64_t rows = min_of<int64_t>(16, outputs - j);
      if (rows < 16) std::memset(words, 0, sizeof(words));
      for (int64_t i = 0; i < depth; i += kGroup, out += 32 * kStrip) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (o0 + j + r) * width + c + i;
          const uint8_t* bytes = w.packed + (at >> 1);
          prefetch_bytes(bytes, depth >> 1, 1);
          const __m512 scaled =
              _mm512_mul_ps(code, _mm512_set1_ps(absmax_at(w.absmax, at >> w.log2_blocksize)));
          const __m512i table = bf16_pair(scaled, scaled);
          const __m512i both = _mm512_permutexvar_epi16(
              twice, _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes))));
          _mm512_store_si512(words[0][r], _mm512_permutexvar_epi16(_mm512_srlv_epi16(both, shift_0), table));
          _mm512_store_si512(words[1][r], _mm512_permutexvar_epi16(_mm512_srlv_epi16(both, shift_2), table));
        }
        transpose(words[0][0], 16, out, 2 * kStrip);
        transpose(words[1][0], 16, out + kStrip, 2 * kStrip);
      }
    }
  }

  // Two rows of n columns in natural order to pairs, zeros to the end of the last vector.
  static void interleave_n(const Bf16* row0, const Bf16* row1, int64_t n, Bf16* out) {
    const int64_t whole = n / 16 * 16;
    interleave(row0, row1, whole / 16, out);
    if (whole == n) return;
    const __mmask16 left = first(static_cast<int>(n - whole));
    const __m512i a = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(left, row0 + whole));
    const __m512i b = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(left, row1 + whole));
    _mm512_storeu_si512(out + 2 * whole, _mm512_permutex2var_epi16(a, alternate(), b));
  }

  // Two rows in natural order to pairs.
  static void interleave(const Bf16* row0, const Bf16* row1, int64_t vectors, Bf16* out) {
    const __m512i order = alternate();
    for (int64_t v = 0; v < vectors; ++v) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0 + 16 * v));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1 + 16 * v));
      _mm512_storeu_si512(out + 32 * v, _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), order,
                                                                  _mm512_castsi256_si512(b)));
    }
  }
};

// Few rows of x. Each row of W is decoded into registers and meets every row of x there; nothing is stored.
//
//   per 128 weights  3 shifts, 4 VPERMW to unscaled bf16 codes, 1 spread of absmax;
//   and row of x     4 VDPBF16PS, then absmax as one fp32 multiply-add of the sum over each block
//                    (a scaled table as in the panels costs more: 24 against 20 cycles at M = 8)
//   floor            memory: 72 bytes per 128 weights
//   range            absmax comes last, so a sum of codes · x must itself be finite: |x| up to 4e37
//
// x is packed [k / 128][M][128], each 128 as x[32 j + i] = x[4 i + j], zero beyond its end. It is walked in
// blocks that stay in the L1 cache while kDotTask rows of W pass, two at a time; the sums wait in memory, as
// vectors, between blocks. One row of x, or two that stay there whole, meet W in the order of its bytes: of a
// single stream the hardware fetches ahead too (M = 1, cold, 4096²: 255 µs, in order 210).
constexpr int64_t kDotTask = 32;
constexpr int64_t kDotGroup = 4;  // rows of x at a time
constexpr int64_t kDotAhead = 4;  // rows of W
constexpr int64_t kDotAheadBytes = 16 * 1024;
constexpr int64_t kDotBlockBytes = 32 * 1024;

inline __m512 dot(__m512 sum, __m512i a, const Bf16* b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a),
                          reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)));
}

// `ahead`: which bytes to prefetch, to L1 where rows of W take turns, else to L2, far ahead. A function of its
// own: what it would be inlined into takes registers from its loop, 10 % of M = 4.
template <int M, int R>
__attribute__((noinline)) void dot_rows_4bit(const MatmulParams& p, const DotRow* w, const Bf16* x,
                                             int64_t begin, int64_t end, int64_t ahead, __m512* sums) {
  const __m512 code = _mm512_loadu_ps(code_table(p.weight4.quant_type));
  const __m512i codes = bf16_pair(code, code);
  const bool units_of_32 = p.weight4.log2_blocksize == 5;
  const int per_chunk = units_of_32 ? 4 : 2;
  // lane -> absmax of its unit within a chunk of 128
  const __m512i spread = units_of_32 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                     : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  __m512 sum[R][M];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[r][m] = begin ? _mm512_load_ps(sums + r * M + m) : _mm512_setzero_ps();

  const auto chunk = [&](int64_t k, const __m512i* words, const __m128* absmax) {
    __m512i value[R][4];
    __m512 scale[R];
    for (int r = 0; r < R; ++r) {
      scale[r] = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(absmax[r]));
      for (int j = 0; j < 4; ++j) value[r][j] = _mm512_permutexvar_epi16(shift_word(words[r], j), codes);
    }
    // j outermost: successive products go to different sums, so none waits for another
    const Bf16* row = x + k * M;
    __m512 part[R][M];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r)
          part[r][m] = dot(j ? part[r][m] : _mm512_setzero_ps(), value[r][j], row + m * 128 + 32 * j);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sum[r][m] = _mm512_fmadd_ps(part[r][m], scale[r], sum[r][m]);
  };

  int64_t k = begin;
  __m512i words[R];
  __m128 absmax[R];
  for (; k + 128 <= end; k += 128) {
    for (int r = 0; r < R; ++r) {
      const uint8_t* bytes = w[r].bytes + (k >> 1);
      words[r] = _mm512_loadu_si512(bytes);
      _mm_prefetch(
          reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(bytes) + static_cast<uintptr_t>(ahead)),
          R == 1 ? _MM_HINT_T1 : _MM_HINT_T0);
      const float* a = w[r].absmax + (k >> 7) * per_chunk;
      absmax[r] = units_of_32 ? _mm_loadu_ps(a)
                              : _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)));
    }
    chunk(k, words, absmax);
  }
  if (k < end) {  // 32, 64 or 96 weights; the missing ones meet zeros of x, and a zero absmax
    const int left = static_cast<int>(end - k);
    const __mmask16 dwords = static_cast<__mmask16>((1u << (left / 8)) - 1u);
    const __mmask8 units = static_cast<__mmask8>((1u << ceil_div(left, units_of_32 ? 32 : 64)) - 1u);
    for (int r = 0; r < R; ++r) {
      words[r] = _mm512_maskz_loadu_epi32(dwords, w[r].bytes + (k >> 1));
      absmax[r] = _mm_maskz_loadu_ps(units, w[r].absmax + (k >> 7) * per_chunk);
    }
    chunk(k, words, absmax);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) _mm512_store_ps(sums + r * M + m, sum[r][m]);
}

inline __m512i weights_32(const Bf16* w) { return _mm512_loadu_si512(w); }
inline __m512i weights_32(const float* w) { return bf16_pair(load(w + 16).v, load(w).v); }
inline __m512i weights_32(const Bf16* w, __mmask32 left) { return _mm512_maskz_loadu_epi16(left, w); }
inline __m512i weights_32(const float* w, __mmask32 left) {
  return bf16_pair(_mm512_maskz_loadu_ps(static_cast<__mmask16>(left >> 16), w + 16),
                   _mm512_maskz_loadu_ps(static_cast<__mmask16>(left), w));
}

// sum[m] += w · x[m] over n elements, natural order. What lies further on is fetched, the rows of w to come:
// cold, 16 rows of 4096 for 4 of x took 15.7 µs, so 5.5.
template <int M, class T>
inline void add_dot(const T* w, const Bf16* x, int64_t x_stride, int64_t n, __m512* sum) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i row = weights_32(w + i);
    for (uintptr_t line = 0; line < 32 * sizeof(T); line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(w + i) + kDotAheadBytes + line),
                   _MM_HINT_T1);
    for (int m = 0; m < M; ++m) sum[m] = dot(sum[m], row, x + m * x_stride + i);
  }
  if (i < n) {
    const __mmask32 left = static_cast<__mmask32>((1u << (n - i)) - 1u);
    const __m512i last = weights_32(w + i, left);
    for (int m = 0; m < M; ++m) {
      const __m512i other = weights_32(x + m * x_stride + i, left);
      sum[m] = _mm512_dpbf16_ps(sum[m], reinterpret_cast<__m512bh>(last), reinterpret_cast<__m512bh>(other));
    }
  }
}

// The same with row i of a matrix; `room` is for one that cannot be read where it lies.
template <int M>
inline void add_dot_row(const Matrix& a, int64_t i, const Bf16* x, int64_t x_stride, int64_t n, Bf16* room,
                        __m512* sum) {
  const int64_t at = i * a.stride0;
  if (a.stride1 == 1 && a.dtype == DType::bf16)
    return add_dot<M>(static_cast<const Bf16*>(a.data) + at, x, x_stride, n, sum);
  if (a.stride1 == 1 && a.dtype == DType::f32)
    return add_dot<M>(static_cast<const float*>(a.data) + at, x, x_stride, n, sum);
  read_row(a, i, 0, n, room);
  add_dot<M>(room, x, x_stride, n, sum);
}

template <int M>
inline void dot_rows_of(const Matrix& w, int64_t o0, int64_t o1, const Bf16* z, int64_t n, float* v,
                        int64_t v_stride) {
  for (int64_t o = o0; o < o1; o += 16) {
    Vec sums[M][16];
    const int64_t some = min_of<int64_t>(16, o1 - o);
    for (int64_t e = 0; e < 16; ++e) {
      __m512 sum[M] = {};
      if (e < some) add_dot_row<M>(w, o + e, z, n, n, nullptr, sum);
      for (int m = 0; m < M; ++m) sums[m][e].v = sum[m];
    }
    for (int m = 0; m < M; ++m) store_n(v + m * v_stride + o, reduce_each(sums[m]), static_cast<int>(some));
  }
}

inline void Bf16Panels::dot_rows(const Matrix& w, int64_t o0, int64_t o1, int64_t rows, const Bf16* z,
                                 int64_t n, float* v, int64_t v_stride) {
  if (rows == 1) return dot_rows_of<1>(w, o0, o1, z, n, v, v_stride);
  if (rows == 2) return dot_rows_of<2>(w, o0, o1, z, n, v, v_stride);
  if (rows == 3) return dot_rows_of<3>(w, o0, o1, z, n, v, v_stride);
  static_assert(kDotRows == 4, "all of them");
  return dot_rows_of<4>(w, o0, o1, z, n, v, v_stride);
}

// What a thread needs beside x: kDotTask rows of sums, of absmax, one row of W.
struct DotBuffers {
  char* memory;
  int64_t sums, absmax, row;  // bytes
  int64_t total() const { return sums + absmax + row; }
};

// What one task works on: outputs o0 … o0 + rows, decoded from w if W is 4-bit.
struct DotTask {
  const DotRow* w;
  int64_t o0, rows;
  __m512* sums;  // [rows][M]
  Bf16* row;     // room for a row of dense W or u
  const Epilogue* epilogue;
};

// sums[e] += t · u[o + e], e < n <= 16: t of one row of x, `room` for a row of u.
inline void add_addend(const MatmulParams& p, int64_t o, int64_t n, const Bf16* t, Bf16* room, Vec* sums) {
  for (int64_t r = 0; r < p.rank; r += 32) {
    const int64_t left = min_of<int64_t>(32, p.rank - r);
    const __mmask32 some = static_cast<__mmask32>(0xffffffffu >> (32 - left));
    const __m512i part = weights_32(t + r, some);
    for (int64_t e = 0; e < n; ++e) {
      read_row(p.u, o + e, r, left, room);
      sums[e].v = _mm512_dpbf16_ps(sums[e].v, reinterpret_cast<__m512bh>(weights_32(room, some)),
                                   reinterpret_cast<__m512bh>(part));
    }
  }
}

// The lanes' sums of 16 vectors that lie `stride` apart, with t · u of 16 rows of at most 32 where they lie.
template <class T>
inline Vec reduce_with(const __m512* sums, int64_t stride, const T* u, int64_t u_stride, const Bf16* t,
                       int64_t rank) {
  const __mmask32 some = static_cast<__mmask32>(0xffffffffu >> (32 - rank));
  const __m512bh part = reinterpret_cast<__m512bh>(weights_32(t, some));
  Vec each[16];
#pragma GCC unroll 16
  for (int e = 0; e < 16; ++e, u += u_stride)
    each[e].v = _mm512_dpbf16_ps(sums[e * stride], reinterpret_cast<__m512bh>(weights_32(u, some)), part);
  return reduce_each(each);
}

// Of n <= 16 outputs from o on and one row of x: the lanes' sums, in which the addend meets them. On its own
// each row of u would cost a load and a store of its sums.
inline Vec reduce_outputs(const MatmulParams& p, int64_t o, int64_t n, const __m512* sums, int64_t stride,
                          const Bf16* t, Bf16* room) {
  const Matrix& u = p.u;
  if (n == 16 && p.rank && p.rank <= 32 && u.stride1 == 1 && u.dtype != DType::f16) {
    const int64_t at = o * u.stride0;
    if (u.dtype == DType::bf16)
      return reduce_with(sums, stride, static_cast<const Bf16*>(u.data) + at, u.stride0, t, p.rank);
    return reduce_with(sums, stride, static_cast<const float*>(u.data) + at, u.stride0, t, p.rank);
  }
  Vec each[16];
  for (int e = 0; e < 16; ++e) each[e] = e < n ? Vec{sums[e * stride]} : zero();
  if (p.rank) add_addend(p, o, n, t, room, each);
  return reduce_each(each);
}

// The task for rows m0 … m0 + M of x, at most kDotGroup; x and t are those rows', x packed for a 4-bit W.
template <int M>
inline void dot_group(const MatmulParams& p, const DotTask& task, int64_t m0, const Bf16* x, int64_t x_stride,
                      const Bf16* t) {
  constexpr int kRows = 2;  // of W at a time
  const int64_t o0 = task.o0, rows = task.rows;
  __m512* sums = task.sums;
  const int64_t blocks = ceil_div(p.inner * M * 2, kDotBlockBytes);
  if (p.weight4.packed && M <= 2 && blocks == 1) {
    for (int64_t r = 0; r < rows; ++r)
      dot_rows_4bit<M, 1>(p, task.w + r, x, 0, p.inner, kDotAheadBytes, sums + r * M);
  } else if (p.weight4.packed) {
    const int64_t block = round_up(ceil_div(p.inner, blocks), 128);
    for (int64_t begin = 0; begin < p.inner; begin += block) {
      const int64_t end = min_of(begin + block, p.inner);
      // The packed bytes to prefetch: those of the row kDotAhead further on in this block of x, then in the
      // next block, then in the next task.
      const int64_t row_bytes = p.inner / 2;
      const int64_t wrap = end < p.inner ? block / 2 - rows * row_bytes : -(begin / 2);
      const auto ahead = [&](int64_t r) { return kDotAhead * row_bytes + (r + kDotAhead < rows ? 0 : wrap); };
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows)
        dot_rows_4bit<M, kRows>(p, task.w + r, x, begin, end, ahead(r), sums + r * M);
      if (r < rows) dot_rows_4bit<M, 1>(p, task.w + r, x, begin, end, ahead(r), sums + r * M);
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      __m512* sum = sums + r * M;
      for (int m = 0; m < M; ++m) sum[m] = _mm512_setzero_ps();
      add_dot_row<M>(p.dense, o0 + r, x, x_stride, p.inner, task.row, sum);
    }
  }
  for (int m = 0; m < M; ++m) {
    alignas(64) float y[kDotTask];
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t n = min_of<int64_t>(16, rows - r);
      store(y + r, reduce_outputs(p, o0 + r, n, sums + r * M + m, M, t + m * p.rank, task.row));
    }
    task.epilogue->write(m0 + m, o0, rows, y);
  }
}

// Rows of x in groups as even as may be: 9 are 3 + 3 + 3. The first group brings a task's W into L2, the
// others find it there; a group's share of x stays in L1, which more rows at once would not.
inline int64_t dot_group_begin(int64_t rows, int64_t group) {
  return rows * group / ceil_div(rows, kDotGroup);
}

// Plain, few rows, and units of W that lie within one row and one block. A dense W is read anew for every
// group of rows; with few outputs that costs less than bringing it into pairs.
inline bool dot_applies(const MatmulParams& p, int64_t most) {
  const int64_t unit = p.weight4.log2_blocksize == 5 ? 32 : 64;
  if (p.transposed || p.inner == 0) return false;
  if (p.weight4.packed) return p.rows <= most && p.inner % unit == 0;
  return p.rows <= (p.outputs <= 16 ? most : min_of(most, kDotGroup));
}

inline void run_dot_bf16(const MatmulParams& p) {
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(p.outputs) * static_cast<double>(p.inner);
  const int threads = work < (1 << 18) ? 1 : p.threads;
  const bool four_bit = p.weight4.packed != nullptr;
  const bool in_place = !four_bit && p.x.dtype == DType::bf16 && p.x.stride1 == 1;
  const int64_t x_stride = four_bit ? round_up(p.inner, 128) : in_place ? p.x.stride0 : p.inner;
  const int64_t room = in_place ? 0 : x_stride;
  const int64_t x_bytes = round_up((room + p.rank) * p.rows * 2, 64);
  const int log2_unit = p.weight4.log2_blocksize == 5 ? 5 : 6;
  DotBuffers buffers;
  buffers.sums = kDotTask * kDotGroup * 64;
  buffers.absmax = four_bit ? round_up(kDotTask * dot_absmax_room(p, log2_unit) * 4, 64) : 0;
  buffers.row = round_up(max_of(p.inner, p.rank) * 2, 64);
  char* memory = static_cast<char*>(scratch(static_cast<size_t>(x_bytes + buffers.total() * threads)));
  buffers.memory = memory + x_bytes;
  Bf16* packed = reinterpret_cast<Bf16*>(memory);
  const Bf16* x = in_place ? static_cast<const Bf16*>(p.x.data) : packed;
  Bf16* t = packed + room * p.rows;
  const int64_t groups = ceil_div(p.rows, kDotGroup);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t m0 = dot_group_begin(p.rows, g), rows = dot_group_begin(p.rows, g + 1) - m0;
    for (int64_t m = 0; m < rows; ++m) {
      if (!four_bit && !in_place) read_row(p.x, m0 + m, 0, p.inner, packed + (m0 + m) * x_stride);
      for (int64_t k = 0; four_bit && k < x_stride; k += 128) {
        alignas(64) Bf16 natural[128];
        const int64_t n = min_of<int64_t>(128, p.inner - k);
        read_row(p.x, m0 + m, k, n, natural);
        std::memset(natural + n, 0, static_cast<size_t>(128 - n) * sizeof(Bf16));
        for (int half = 0; half < 2; ++half) {
          Bf16Panels::reorder(natural + 64 * half);
          Bf16* chunk = packed + m0 * x_stride + k * rows + m * 128 + 16 * half;
          for (int j = 0; j < 4; ++j) std::memcpy(chunk + 32 * j, natural + 64 * half + 16 * j, 32);
        }
      }
      if (p.rank) read_row(p.t, m0 + m, 0, p.rank, t + (m0 + m) * p.rank);
    }
  }
  // a 4-bit W is decoded by a task for all groups; a dense one has few outputs where there are several
  const int64_t splits = four_bit ? 1 : groups;
  parallel_tasks(threads, ceil_div(p.outputs, kDotTask) * splits, [&](int thread, int64_t index) {
    char* mine = buffers.memory + buffers.total() * thread;
    DotRow w[kDotTask];
    const int64_t o0 = index / splits * kDotTask, split = index % splits;
    Epilogue epilogue(p);
    Epilogue::Columns<kDotTask> columns;
    const DotTask task = {w,
                          o0,
                          min_of(kDotTask, p.outputs - o0),
                          reinterpret_cast<__m512*>(mine),
                          reinterpret_cast<Bf16*>(mine + buffers.sums + buffers.absmax),
                          &epilogue};
    epilogue.begin(o0, task.rows, columns);
    if (p.rank) prefetch_u(p, o0, task.rows);
    if (four_bit) {
      prefetch_absmax(p.weight4, (o0 + kDotTask) * p.inner, kDotTask * p.inner);
      dot_weights(p, log2_unit, o0, task.rows, reinterpret_cast<float*>(mine + buffers.sums), w);
    }
    for (int64_t g = groups * split / splits; g < groups * (split + 1) / splits; ++g) {
      const int64_t m0 = dot_group_begin(p.rows, g), rows = dot_group_begin(p.rows, g + 1) - m0;
      const Bf16* group_x = x + m0 * x_stride;
      const Bf16* group_t = t + m0 * p.rank;
      if (rows == 1) dot_group<1>(p, task, m0, group_x, x_stride, group_t);
      if (rows == 2) dot_group<2>(p, task, m0, group_x, x_stride, group_t);
      if (rows == 3) dot_group<3>(p, task, m0, group_x, x_stride, group_t);
      if (rows == 4) dot_group<4>(p, task, m0, group_x, x_stride, group_t);
    }
  });
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
