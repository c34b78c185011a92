// AVX2 + FMA + F16C: eight floats. The interface is explained in vec_scalar.h.
#pragma once

#include <immintrin.h>

#include "vec_scalar.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};

inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const Bf16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline Vec load(const F16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(Bf16* p, Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(F16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <class T>
inline Vec load_n(const T* p, int n) {
  T buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
  T buffer[8];
  store(buffer, a);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

struct CodeTable {
  __m256 low, high;  // codes 0…7, 8…15
};
inline CodeTable code_registers(const float* code) {
  return {_mm256_loadu_ps(code), _mm256_loadu_ps(code + 8)};
}
// The code of the low four bits of each lane; `high` has the fourth as its sign.
inline Vec lookup(CodeTable t, __m256i q, __m256i high) {
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, q), _mm256_permutevar8x32_ps(t.high, q),
                           _mm256_castsi256_ps(high))};
}
inline Vec lookup(CodeTable t, const uint8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, 4);
  // lane j wants nibble j: byte j/2, high half first
  const __m256i q = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bytes)),
                                      _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
  return lookup(t, q, _mm256_slli_epi32(q, 28));
}

struct Words {
  __m256i v;
};
inline Words load_words(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Words half_words(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_set_m128i(_mm_srli_epi32(v, 16), v)};
}
template <int j>
inline Vec lookup(CodeTable t, Words w) {  // the first of a byte is the high nibble
  constexpr int kShift = 4 * (j ^ 1);
  return lookup(t, _mm256_srli_epi32(w.v, kShift), _mm256_slli_epi32(w.v, 28 - kShift));
}
constexpr int64_t kGroup = 64;
constexpr int64_t group_place(int64_t k) { return k % 8 * 8 + k / 8; }
template <int j = 0>
inline void decode_group(CodeTable t, Vec scale, Words w, float* out) {
  store(out + 8 * j, mul(lookup<j>(t, w), scale));
  if constexpr (j < 7) decode_group<j + 1>(t, scale, w, out);
}
inline void decode_group(CodeTable t, Vec scale, const uint8_t* p, float* out) {
  decode_group<0>(t, scale, load_words(p), out);
}
template <int n>
inline Vec spread(const float* p) {
  static_assert(n <= 2, "of eight lanes");
  if constexpr (n == 1) return set1(p[0]);
  return {_mm256_set_m128(_mm_set1_ps(p[n - 1]), _mm_set1_ps(p[0]))};
}

inline Vec gather_codes(const float* code, const uint8_t* codes) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return {_mm256_i32gather_ps(code, _mm256_cvtepu8_epi32(bytes), 4)};
}

template <class T>
struct BlockTable {
  __m256i low, high;  // the low and the high bytes of 16 values, in both halves
};
template <>
struct BlockTable<float> {
  CodeTable values;
};
template <class T>
inline BlockTable<T> block_table(const float* code, float absmax) {
  const Vec scale = set1(absmax);
  if constexpr (sizeof(T) == 4) {
    return {{mul(load(code), scale).v, mul(load(code + 8), scale).v}};
  } else {
    T values[16];
    store(values, mul(load(code), scale));
    store(values + 8, mul(load(code + 8), scale));
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(words, 8);
    // [low 0…7, high 0…7, low 8…15, high 8…15] to [low 0…15, high 0…15]
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
    return {_mm256_permute4x64_epi64(bytes, 0x44), _mm256_permute4x64_epi64(bytes, 0xee)};
  }
}
inline void decode(const BlockTable<float>& t, const uint8_t* p, float* out) {
  for (int i = 0; i < 4; ++i) store(out + 8 * i, lookup(t.values, p + 4 * i));
}
template <class T>
inline void decode(const BlockTable<T>& t, const uint8_t* p, T* out) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(b, 4), mask), second = _mm_and_si128(b, mask);
  const __m256i q = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
  const __m256i low = _mm256_shuffle_epi8(t.low, q), high = _mm256_shuffle_epi8(t.high, q);
  const __m256i even = _mm256_unpacklo_epi8(low, high),
                odd = _mm256_unpackhi_epi8(low, high);  // 0…7, 16…23; 8…15, 24…31
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
}

inline Vec max_abs(Vec largest, Vec x) {
  const __m256i u = _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff));
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(largest.v), u))};
}
inline float reduce_max(Vec largest) {
  const __m256i u = _mm256_castps_si256(largest.v);
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(s));
}

struct Buckets {
  __m256 bounds[15];
  __m256i order;  // one byte a bucket, in both halves
};
inline Buckets bucket_registers(const float* bounds, const uint8_t* order) {
  Buckets b;
  for (int j = 0; j < 15; ++j) b.bounds[j] = _mm256_set1_ps(bounds[j]);
  b.order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(order)));
  return b;
}
inline void encode(const Buckets& b, Vec x, uint8_t* p) {
  __m256i bucket = _mm256_setzero_si256();
  for (int j = 0; j < 15; ++j)  // a comparison that holds is -1
    bucket = _mm256_sub_epi32(bucket, _mm256_castps_si256(_mm256_cmp_ps(b.bounds[j], x.v, _CMP_NGE_UQ)));
  // the upper three bytes of a lane look up order[0]: masked
  const __m256i q = _mm256_and_si256(_mm256_shuffle_epi8(b.order, bucket), _mm256_set1_epi32(0xff));
  // each qword: the even lane's nibble high, the odd lane's low
  const __m256i pair = _mm256_or_si256(_mm256_slli_epi64(q, 4), _mm256_srli_epi64(q, 32));
  const __m256i bytes = _mm256_shuffle_epi8(
      pair, _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 8, -1, -1, -1,
                             -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const uint32_t low = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(bytes)));
  const uint32_t high = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1)));
  const uint32_t packed = low | high << 16;
  std::memcpy(p, &packed, 4);
}

inline void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int h = 0; h < 2; ++h) {
    r[4 * h] = _mm256_shuffle_ps(s[4 * h], s[4 * h + 2], 0x44);
    r[4 * h + 1] = _mm256_shuffle_ps(s[4 * h], s[4 * h + 2], 0xee);
    r[4 * h + 2] = _mm256_shuffle_ps(s[4 * h + 1], s[4 * h + 3], 0x44);
    r[4 * h + 3] = _mm256_shuffle_ps(s[4 * h + 1], s[4 * h + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

inline void reorder_group(const float* y, float* c) { transpose(y, 8, c, 8); }
inline void restore_group(const float* c, float* y) { transpose(c, 8, y, 8); }

inline Vec permute(Vec v, const int32_t* lanes) {
  return {_mm256_permutevar8x32_ps(v.v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)))};
}

// Three rounds that fold two vectors into one: neighbours twice, then the halves.
inline Vec reduce_each(const Vec* v) {
  __m256 pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) pairs[i] = _mm256_hadd_ps(v[2 * i].v, v[2 * i + 1].v);
  for (int i = 0; i < 2; ++i) fours[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
  return {_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                        _mm256_permute2f128_ps(fours[0], fours[1], 0x31))};
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
