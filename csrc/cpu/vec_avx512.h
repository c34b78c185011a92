// AVX-512 F + BW + VL + DQ: sixteen floats. The interface is explained in vec_scalar.h. A file that defines
// PEFTKERN_VEC_BF16 rounds to bf16 by AVX512_BF16's instructions; the compiler's own macro would say what a user's
// -march allows, and the level avx512 would change its bits.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "vec_scalar.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline __m512 widen_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
#if defined(PEFTKERN_VEC_BF16)
// Flushes subnormals, as the products of these levels do.
inline __m256i narrow_bf16(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
#else
inline __m256i narrow_bf16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
}
#endif
inline __m256i narrow_f16(__m512 x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const Bf16* p) {
  return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const F16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load_n(const Bf16* p, int n) { return {widen_bf16(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline Vec load_n(const F16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(Bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a.v)); }
inline void store(F16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a.v)); }
#if defined(PEFTKERN_VEC_BF16)
inline void store_2(Bf16* p, Vec a, Vec b) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
}
#endif
inline void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store_n(Bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a.v)); }
inline void store_n(F16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a.v)); }

struct CodeTable {
  __m512 code;
};
inline CodeTable code_registers(const float* code) { return {_mm512_loadu_ps(code)}; }
inline Vec lookup(CodeTable t, const uint8_t* p) {
  // qword j holds byte j twice; the even dword takes its high nibble, the odd one its low nibble (vpermps
  // reads 4 bits)
  __m512i q = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  q = _mm512_or_si512(_mm512_srli_epi64(q, 4), _mm512_slli_epi64(q, 32));
  return {_mm512_permutexvar_ps(q, t.code)};
}
struct Words {
  __m512i v;
};
inline Words load_words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Words half_words(const uint8_t* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_inserti64x4(_mm512_castsi256_si512(v), _mm256_srli_epi32(v, 16), 1)};
}
template <int j>
inline Vec lookup(CodeTable t, Words w) {  // vpermps reads 4 bits; the first of a byte is the high nibble
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(w.v, 4 * (j ^ 1)), t.code)};
}
constexpr int64_t kGroup = 64;
constexpr int64_t group_place(int64_t k) { return k % 4 * 16 + k % 8 / 4 * 8 + k / 8; }
template <int j = 0>
inline void decode_group(CodeTable t, Vec scale, Words w, float* out) {
  store(out + 16 * j, mul(lookup<j>(t, w), scale));
  if constexpr (j < 3) decode_group<j + 1>(t, scale, w, out);
}
inline void decode_group(CodeTable t, Vec scale, const uint8_t* p, float* out) {
  decode_group<0>(t, scale, half_words(p), out);
}
template <int n>
inline Vec spread(const float* p) {
  static_assert(n == 1 || n == 2 || n == 4, "of sixteen lanes");
  if constexpr (n == 1) return set1(p[0]);
  const __m128i values = n == 2 ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))
                                : _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return {_mm512_permutexvar_ps(n == 2 ? _mm512_srli_epi32(quarters, 1) : quarters,
                                _mm512_castps128_ps512(_mm_castsi128_ps(values)))};
}

inline Vec gather_codes(const float* code, const uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return {_mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), code, 4)};
}

template <class T>
struct BlockTable {
  __m512i values;  // 16 of 32 bits, or 16 of 16 bits twice: vpermw reads five bits of an index
};
template <class T>
inline BlockTable<T> block_table(const float* code, float absmax) {
  const __m512 values = mul(load(code), set1(absmax)).v;
  if constexpr (sizeof(T) == 4) {
    return {_mm512_castps_si512(values)};
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return {_mm512_broadcast_i64x4(narrow_bf16(values))};
  } else {
    return {_mm512_broadcast_i64x4(narrow_f16(values))};
  }
}
inline void decode(const BlockTable<float>& t, const uint8_t* p, float* out) {
  const CodeTable values = {_mm512_castsi512_ps(t.values)};
  store(out, lookup(values, p));
  store(out + 16, lookup(values, p + 8));
}
template <class T>
inline void decode(const BlockTable<T>& t, const uint8_t* p, T* out) {
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  // each dword: the even word is the byte's high nibble, the odd one the byte itself, whose bit 4 doesn't
  // matter
  const __m512i q = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(q, t.values));
}

inline Vec max_abs(Vec largest, Vec x) {
  const __m512i u = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(largest.v), u))};
}
inline float reduce_max(Vec largest) {
  return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_castps_si512(largest.v))));
}

struct Buckets {
  __m512 bounds;
  __m512i order;
};
inline Buckets bucket_registers(const float* bounds, const uint8_t* order) {
  return {_mm512_loadu_ps(bounds),
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(order)))};
}
inline void encode(const Buckets& b, Vec x, uint8_t* p) {
  // Binary search: after a step, all bounds below `bucket` are known not to be >= x.
  __m512i bucket = _mm512_setzero_si512();
  for (int step = 8; step; step /= 2) {
    const __m512 bound =
        _mm512_permutexvar_ps(_mm512_add_epi32(bucket, _mm512_set1_epi32(step - 1)), b.bounds);
    const __mmask16 above = _mm512_cmp_ps_mask(bound, x.v, _CMP_NGE_UQ);
    bucket = _mm512_mask_add_epi32(bucket, above, bucket, _mm512_set1_epi32(step));
  }
  const __m512i q = _mm512_permutexvar_epi32(bucket, b.order);
  // each qword: the even lane's nibble high, the odd lane's low
  const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(q, 4), _mm512_srli_epi64(q, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pair));
}

// Four rounds of pairwise exchange: dwords, qwords, 128-bit lanes, 256-bit halves.
inline void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(dst + i * dst_stride, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_ps(dst + (i + 8) * dst_stride, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_ps(dst + (i + 4) * dst_stride, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_ps(dst + (i + 12) * dst_stride, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
  }
}

// Lane l of vector v is weight 8 (l % 8) + v, + 4 in the upper half: of rows 0 to 3 of eight weights, then of 4 to 7.
inline void reorder_group(const float* y, float* c) {
  const __m512 y0 = _mm512_loadu_ps(y), y1 = _mm512_loadu_ps(y + 16);
  const __m512 y2 = _mm512_loadu_ps(y + 32), y3 = _mm512_loadu_ps(y + 48);
  __m512i at = _mm512_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24, 4, 12, 20, 28, 4, 12, 20, 28);
  for (int v = 0; v < 4; ++v, at = _mm512_add_epi32(at, _mm512_set1_epi32(1)))
    _mm512_storeu_ps(c + 16 * v, _mm512_mask_blend_ps(0xf0f0, _mm512_permutex2var_ps(y0, at, y1),
                                                      _mm512_permutex2var_ps(y2, at, y3)));
}
// Two rounds in 128-bit lanes bring four rows of c across, for i and for i + 4, below and above; a third sorts lanes.
inline void restore_group(const float* c, float* y) {
  const __m512 c0 = _mm512_loadu_ps(c), c1 = _mm512_loadu_ps(c + 16);
  const __m512 c2 = _mm512_loadu_ps(c + 32), c3 = _mm512_loadu_ps(c + 48);
  const __m512 a0 = _mm512_unpacklo_ps(c0, c1), a1 = _mm512_unpackhi_ps(c0, c1);
  const __m512 b0 = _mm512_unpacklo_ps(c2, c3), b1 = _mm512_unpackhi_ps(c2, c3);
  const __m512 i0 = _mm512_shuffle_ps(a0, b0, 0x44), i1 = _mm512_shuffle_ps(a0, b0, 0xee);
  const __m512 i2 = _mm512_shuffle_ps(a1, b1, 0x44), i3 = _mm512_shuffle_ps(a1, b1, 0xee);
  _mm512_storeu_ps(y, _mm512_shuffle_f32x4(i0, i1, 0x88));
  _mm512_storeu_ps(y + 16, _mm512_shuffle_f32x4(i2, i3, 0x88));
  _mm512_storeu_ps(y + 32, _mm512_shuffle_f32x4(i0, i1, 0xdd));
  _mm512_storeu_ps(y + 48, _mm512_shuffle_f32x4(i2, i3, 0xdd));
}

inline Vec permute(Vec v, const int32_t* lanes) {
  return {_mm512_permutexvar_ps(_mm512_loadu_si512(lanes), v.v)};
}

// Four rounds that fold two vectors into one.
inline Vec reduce_each(const Vec* v) {
  __m512 a[16];
  for (int e = 0; e < 16; ++e) {
    // where the rounds bring vector e's sum: 128-bit lane e / 4, element e % 4
    constexpr int kLane[4] = {0, 8, 4, 12};
    constexpr int kElement[4] = {0, 2, 1, 3};
    a[kLane[e / 4] + kElement[e % 4]] = v[e].v;
  }
  for (int i = 0; i < 8; ++i)
    a[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
  for (int i = 0; i < 4; ++i)
    a[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  for (int i = 0; i < 2; ++i)
    a[i] = _mm512_add_ps(_mm512_shuffle_ps(a[i], a[i + 2], 0x44), _mm512_shuffle_ps(a[i], a[i + 2], 0xee));
  return {_mm512_add_ps(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xdd))};
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
