// matmul for bf16 x with bf16 multiplies and fp32 sums (VDPBF16PS or AMX tiles): how the weight gets into registers.
//
// Decoding 128 weights (64 bytes) costs 3 shifts, 4 ternary ands, 4 VPERMW and one 32-entry table. A 16-bit word
// holds four nibbles; shifting it right by 4, 0, 12, 8 brings weight 0, 1, 2, 3 of the word to the bottom, where
// VPERMW looks them up. No shuffle puts them back in order: a group of 64 weights (16 words) is kept as
//     panel[16 j + i] = weight 4 i + j          j < 4, i < 16
// and x is packed in the same order once per call (plain), or the result is put in order at the end (transposed).
// The table holds bf16(code * absmax) for two blocks of 16 codes: exactly the values that dequantize gives.
#pragma once

#include "cpu/matmul.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

inline __m512i shift_word(__m512i words, int j) {
  switch (j) {
    case 0: return _mm512_srli_epi16(words, 4);
    case 1: return words;
    case 2: return _mm512_srli_epi16(words, 12);
    default: return _mm512_srli_epi16(words, 8);
  }
}

inline __m512i bf16_pair(__m512 high, __m512 low) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// indices 0, 32, 1, 33, …: words of two vectors alternate (low: the first 16 of each, high: the last 16)
inline __m512i alternate(int from) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 16; ++i) {
    index[2 * i] = static_cast<uint16_t>(from + i);
    index[2 * i + 1] = static_cast<uint16_t>(from + i + 32);
  }
  return _mm512_load_si512(index);
}

struct Bf16Panels {
  using Elem = Bf16;
  static constexpr int kPair = 2;
  static constexpr int kGroup = 64;

  // Rows of W start on whole groups and a group has one absmax.
  static bool reorders(const MatmulParams& p) {
    return p.weight4.log2_blocksize >= 6 && (p.transposed ? p.outputs : p.inner) % kGroup == 0;
  }

  // x[16 j + i] = x[4 i + j]
  static void reorder(Bf16* x) {
    alignas(64) static constexpr uint16_t kOrder[64] = {
        0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 1, 5, 9,  13, 17, 21,
        25, 29, 33, 37, 41, 45, 49, 53, 57, 61, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46,
        50, 54, 58, 62, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63};
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

  // n weights from flat index `start` (both multiples of 64); absmax[0] belongs to the block of `row`.
  static void decode_reordered(const Weight4& w, int64_t start, const float* absmax, int64_t row, int64_t n,
                               Bf16* out) {
    const __m512 code = _mm512_loadu_ps(code_table(w.quant_type));
    const __m512i nibble_mask = _mm512_set1_epi16(15);
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const uint8_t* bytes = w.packed + (start >> 1);
    const int64_t first = row >> w.log2_blocksize;
    int64_t i = 0;
    for (; i + 128 <= n; i += 128, bytes += 64, out += 128) {
      const float a0 = absmax[((start + i) >> w.log2_blocksize) - first];
      const float a1 = absmax[((start + i + 64) >> w.log2_blocksize) - first];
      const __m512i words = _mm512_loadu_si512(bytes);
      const __m512i table = bf16_pair(_mm512_mul_ps(code, _mm512_set1_ps(a1)), _mm512_mul_ps(code, _mm512_set1_ps(a0)));
      for (int j = 0; j < 4; ++j) {
        // (shifted & 15) | 16 in the upper half
        const __m512i index = _mm512_ternarylogic_epi32(shift_word(words, j), nibble_mask, second, 0xea);
        const __m512i value = _mm512_permutexvar_epi16(index, table);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * j), _mm512_castsi512_si256(value));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 64 + 16 * j), _mm512_extracti64x4_epi64(value, 1));
      }
    }
    if (i < n) {
      const float a0 = absmax[((start + i) >> w.log2_blocksize) - first];
      const __m512 scaled = _mm512_mul_ps(code, _mm512_set1_ps(a0));
      const __m512i table = bf16_pair(scaled, scaled);
      const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
      for (int j = 0; j < 4; ++j)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * j),
                            _mm512_castsi512_si256(_mm512_permutexvar_epi16(shift_word(words, j), table)));
    }
  }

  // Rows row0 … row0 + depth (those from row0 + n on are zero) of W [.., width], columns o0 … o0 + outputs, two rows
  // a time: the packed words of both alternate before the look-up, so pairs come out ready.
  // panel[q][16 j + i][2] = W[row0 + 2 q + {0, 1}, 4 i + j] in each group of 64 columns.
  template <int kColumns>
  static void decode_pairs(const Weight4& w, int64_t row0, int64_t n, int64_t depth, int64_t width, int64_t o0,
                           int64_t outputs, Bf16* panel) {
    const __m512 code = _mm512_loadu_ps(code_table(w.quant_type));
    const __m512i nibble_mask = _mm512_set1_epi16(15);
    const __m512i second = _mm512_set1_epi32(16 << 16);
    const __m512i order = alternate(0);
    for (int64_t q = 0; q < depth; q += 2, panel += 2 * kColumns) {
      if (q >= n) {
        std::memset(panel, 0, static_cast<size_t>(outputs) * 2 * sizeof(Bf16));
        continue;
      }
      const bool odd = q + 1 == n;  // the second row of the pair is not there: absmax 0
      const int64_t flat0 = (row0 + q) * width + o0;
      const int64_t flat1 = odd ? flat0 : flat0 + width;
      for (int64_t o = 0; o < outputs; o += kGroup) {
        const float a0 = absmax_at(w.absmax, (flat0 + o) >> w.log2_blocksize);
        const float a1 = odd ? 0.0f : absmax_at(w.absmax, (flat1 + o) >> w.log2_blocksize);
        const __m256i row_0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.packed + ((flat0 + o) >> 1)));
        const __m256i row_1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.packed + ((flat1 + o) >> 1)));
        const __m512i words =
            _mm512_permutex2var_epi16(_mm512_castsi256_si512(row_0), order, _mm512_castsi256_si512(row_1));
        const __m512i table =
            bf16_pair(_mm512_mul_ps(code, _mm512_set1_ps(a1)), _mm512_mul_ps(code, _mm512_set1_ps(a0)));
        for (int j = 0; j < 4; ++j) {
          const __m512i index = _mm512_ternarylogic_epi32(shift_word(words, j), nibble_mask, second, 0xea);
          _mm512_storeu_si512(panel + 2 * (o + 16 * j), _mm512_permutexvar_epi16(index, table));
        }
      }
    }
  }

  // Two rows in natural order to pairs.
  static void interleave(const Bf16* row0, const Bf16* row1, int64_t vectors, Bf16* out) {
    const __m512i order = alternate(0);
    for (int64_t v = 0; v < vectors; ++v) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0 + 16 * v));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1 + 16 * v));
      _mm512_storeu_si512(out + 32 * v,
                          _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), order, _mm512_castsi256_si512(b)));
    }
  }
};

// Few rows of x. Each row of W is decoded into registers as unscaled bf16 codes and meets every row of x there; absmax
// enters as one fp32 multiply of the sum over a block: no table to build, nothing stored.
//
//   per 128 weights  1 load, 3 shifts, 4 VPERMW, 1 spread of absmax, and per row of x 4 VDPBF16PS and 1 FMA
//   floor            memory: 72 bytes per 128 weights
//
// x is packed in chunks of 128: x[32 j + i] = x[4 i + j], zero beyond its end.
inline __m512 dot(__m512 sum, __m512i a, const Bf16* b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)));
}

// Lane -> absmax of its block within a chunk of 128: two blocks of 64 or four of 32.
inline __m512i spread_index(int log2_blocksize) {
  return log2_blocksize == 5 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                             : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
}

template <int M, int R>
inline void dot_rows_4bit(const MatmulParams& p, const uint8_t* const* w, const float* const* absmax, const Bf16* x,
                          __m512 sum[R][M]) {
  const __m512 code = _mm512_loadu_ps(code_table(p.weight4.quant_type));
  const __m512i table = bf16_pair(code, code);
  const __m512i spread = spread_index(p.weight4.log2_blocksize);
  const int per_chunk = p.weight4.log2_blocksize == 5 ? 4 : 2;
  const int64_t x_stride = round_up(p.inner, 128);
  const auto chunk = [&](int64_t k, const __m512i* words, const __m512* scale) {
    __m512i value[R][4];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 4; ++j) value[r][j] = _mm512_permutexvar_epi16(shift_word(words[r], j), table);
    for (int m = 0; m < M; ++m) {
      const Bf16* row = x + m * x_stride + k;
      for (int r = 0; r < R; ++r) {
        __m512 part = _mm512_setzero_ps();
        for (int j = 0; j < 4; ++j) part = dot(part, value[r][j], row + 32 * j);
        sum[r][m] = _mm512_fmadd_ps(part, scale[r], sum[r][m]);
      }
    }
  };
  int64_t k = 0;
  for (; k + 128 <= p.inner; k += 128) {
    __m512i words[R];
    __m512 scale[R];
    for (int r = 0; r < R; ++r) {
      words[r] = _mm512_loadu_si512(w[r] + (k >> 1));
      _mm_prefetch(reinterpret_cast<const char*>(w[r] + (k >> 1)) + 4096, _MM_HINT_T0);
      const float* a = absmax[r] + (k >> 7) * per_chunk;
      const __m128 blocks = per_chunk == 4 ? _mm_loadu_ps(a) : _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(a)));
      scale[r] = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(blocks));
    }
    chunk(k, words, scale);
  }
  if (k < p.inner) {  // 32, 64 or 96 weights; the missing ones meet zeros of x, and a zero absmax
    const int left = static_cast<int>(p.inner - k);
    const __mmask16 dwords = static_cast<__mmask16>((1u << (left / 8)) - 1u);
    const __mmask8 blocks = static_cast<__mmask8>((1u << ceil_div(left, per_chunk == 4 ? 32 : 64)) - 1u);
    __m512i words[R];
    __m512 scale[R];
    for (int r = 0; r < R; ++r) {
      words[r] = _mm512_maskz_loadu_epi32(dwords, w[r] + (k >> 1));
      scale[r] = _mm512_permutexvar_ps(
          spread, _mm512_castps128_ps512(_mm_maskz_loadu_ps(blocks, absmax[r] + (k >> 7) * per_chunk)));
    }
    chunk(k, words, scale);
  }
}

// sum[m] += w · x[m] over n elements, natural order.
template <int M>
inline void add_dot(const Bf16* w, const Bf16* x, int64_t x_stride, int64_t n, __m512* sum) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i row = _mm512_loadu_si512(w + i);
    for (int m = 0; m < M; ++m) sum[m] = dot(sum[m], row, x + m * x_stride + i);
  }
  if (i < n) {
    const __mmask32 left = static_cast<__mmask32>((1u << (n - i)) - 1u);
    const __m512i row = _mm512_maskz_loadu_epi16(left, w + i);
    for (int m = 0; m < M; ++m) {
      const __m512i other = _mm512_maskz_loadu_epi16(left, x + m * x_stride + i);
      sum[m] = _mm512_dpbf16_ps(sum[m], reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(other));
    }
  }
}

template <int M>
inline void dot_bf16(const MatmulParams& p, const Bf16* x, const Bf16* t, char* buffers, int64_t buffer_bytes,
                     int threads) {
  constexpr int kRows = 2;  // of W at a time
  const bool four_bit = p.weight4.packed != nullptr;
  const int log2_unit = p.weight4.log2_blocksize == 5 ? 5 : 6;  // weights per absmax in the expanded row
  const int64_t units = ceil_div(p.inner, int64_t{1} << log2_unit);
  const bool expand = !p.weight4.absmax.values || p.weight4.log2_blocksize > 6 || p.inner % (int64_t{1} << log2_unit);
  const int64_t x_stride = four_bit ? round_up(p.inner, 128) : p.inner;
  constexpr int64_t kTask = 32;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* buffer = buffers + buffer_bytes * omp_get_thread_num();
    float* expanded = reinterpret_cast<float*>(buffer);
    Bf16* row = reinterpret_cast<Bf16*>(buffer);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < ceil_div(p.outputs, kTask); ++task) {
      const int64_t end = min_of(p.outputs, (task + 1) * kTask);
      for (int64_t o = task * kTask; o < end; o += kRows) {
        const int rows = static_cast<int>(min_of<int64_t>(kRows, end - o));
        __m512 sum[kRows][M];
        for (int r = 0; r < kRows; ++r)
          for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
        if (four_bit) {
          const uint8_t* w[kRows];
          const float* absmax[kRows];
          for (int r = 0; r < rows; ++r) {
            const int64_t flat = (o + r) * p.inner;
            w[r] = p.weight4.packed + (flat >> 1);
            const int64_t first = flat >> p.weight4.log2_blocksize;
            if (!expand) {
              absmax[r] = p.weight4.absmax.values + first;
              continue;
            }
            const int64_t blocks = ((flat + p.inner - 1) >> p.weight4.log2_blocksize) - first + 1;
            float* own = expanded + r * 2 * (units + 16);
            const float* a = absmax_range(p.weight4.absmax, first, blocks, own + units + 16);
            for (int64_t u = 0; u < units; ++u)
              own[u] = a[((flat + (u << log2_unit)) >> p.weight4.log2_blocksize) - first];
            absmax[r] = own;
          }
          if (rows == kRows) {
            dot_rows_4bit<M, kRows>(p, w, absmax, x, sum);
          } else {
            dot_rows_4bit<M, 1>(p, w, absmax, x, sum);
          }
        } else {
          for (int r = 0; r < rows; ++r) {
            const bool direct = p.dense.dtype == DType::bf16 && p.dense.stride1 == 1;
            if (!direct) read_row(p.dense, o + r, 0, p.inner, row);
            const Bf16* source = direct ? static_cast<const Bf16*>(p.dense.data) + (o + r) * p.dense.stride0 : row;
            add_dot<M>(source, x, x_stride, p.inner, sum[r]);
          }
        }
        for (int r = 0; r < rows; ++r) {
          if (p.rank) {
            read_row(p.u, o + r, 0, p.rank, row);
            add_dot<M>(row, t, p.rank, p.rank, sum[r]);
          }
          float bias = 0.0f;
          if (p.bias.data) read_row(p.bias, 0, o + r, 1, &bias);
          for (int m = 0; m < M; ++m) {
            const float y = _mm512_reduce_add_ps(sum[r][m]) * p.alpha + bias;
            write_row(p.out, m, o + r, &y, 1);
          }
        }
      }
    }
  }
}

// At most 8 rows, plain, blocks that don't straddle 32 weights of a row.
inline bool dot_applies(const MatmulParams& p, int64_t most) {
  return !p.transposed && p.rows <= most && (!p.weight4.packed || p.inner % (p.weight4.log2_blocksize == 5 ? 32 : 64) == 0);
}

inline void run_dot_bf16(const MatmulParams& p) {
  const double work = static_cast<double>(p.rows) * static_cast<double>(p.outputs) * static_cast<double>(p.inner);
  const int threads = work < (1 << 18) ? 1 : p.threads;
  const int64_t x_stride = p.weight4.packed ? round_up(p.inner, 128) : p.inner;
  const int64_t units = ceil_div(p.inner, int64_t{32});
  const int64_t buffer_bytes = round_up(max_of<int64_t>(4 * (units + 16), max_of(p.inner, p.rank)) * 4, 64);
  const int64_t x_bytes = round_up((x_stride + p.rank) * p.rows * 2, 64);
  char* memory = static_cast<char*>(scratch(static_cast<size_t>(x_bytes + buffer_bytes * threads)));
  Bf16* x = reinterpret_cast<Bf16*>(memory);
  Bf16* t = x + x_stride * p.rows;
  for (int64_t m = 0; m < p.rows; ++m) {
    Bf16* row = x + m * x_stride;
    if (!p.weight4.packed) {
      read_row(p.x, m, 0, p.inner, row);
    } else {
      for (int64_t k = 0; k < x_stride; k += 128) {
        alignas(64) Bf16 natural[128];
        const int64_t n = min_of<int64_t>(128, p.inner - k);
        read_row(p.x, m, k, n, natural);
        std::memset(natural + n, 0, static_cast<size_t>(128 - n) * sizeof(Bf16));
        Bf16Panels::reorder(natural);
        Bf16Panels::reorder(natural + 64);
        for (int j = 0; j < 4; ++j) {
          std::memcpy(row + k + 32 * j, natural + 16 * j, 32);
          std::memcpy(row + k + 32 * j + 16, natural + 64 + 16 * j, 32);
        }
      }
    }
    if (p.rank) read_row(p.t, m, 0, p.rank, t + m * p.rank);
  }
  char* buffers = memory + x_bytes;
  switch (p.rows) {
    case 1: return dot_bf16<1>(p, x, t, buffers, buffer_bytes, threads);
    case 2: return dot_bf16<2>(p, x, t, buffers, buffer_bytes, threads);
    case 3: return dot_bf16<3>(p, x, t, buffers, buffer_bytes, threads);
    case 4: return dot_bf16<4>(p, x, t, buffers, buffer_bytes, threads);
    case 5: return dot_bf16<5>(p, x, t, buffers, buffer_bytes, threads);
    case 6: return dot_bf16<6>(p, x, t, buffers, buffer_bytes, threads);
    case 7: return dot_bf16<7>(p, x, t, buffers, buffer_bytes, threads);
    default: return dot_bf16<8>(p, x, t, buffers, buffer_bytes, threads);
  }
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
