// The vector type of the scalar level: four floats that any compiler can keep in one register.
// The same interface stands in vec_avx2.h and vec_avx512.h; the .inl files are written against it.
//
//   load/store(T*)          T in float, Bf16, F16; to and from fp32, round to nearest even, NaN stays NaN
//   load_n/store_n          the first n < kWidth elements, nothing beyond is touched; missing lanes load as 0
//   CodeTable               16 fp32 codes in registers
//   lookup(table, p)        kWidth weights, the first in the high nibble of p[0]; reads kWidth/2 bytes
//   Words, load_words(p)    8 kWidth weights, the bytes of each eight in a lane of 32 bits
//   lookup<j>(table, words) lane i is weight 8 i + j
//   half_words(p)           4 kWidth weights: lookup<j>, j < 4, has 8 i + j in the lower lanes, 8 i + j + 4 in the upper
//   decode_group(table, scale, p, out)  64 weights in the order that is least work: out[group_place(k)] is weight k
//   reorder_group(y, c)     c[group_place(k)] = y[k]
//   restore_group(c, y)     y[k] = c[group_place(k)]
//   spread<n>(p)            n <= kWidth / 4 floats, each in kWidth / n neighbouring lanes
//   BlockTable<T>           the 16 values round(code * absmax) of one block, as T
//   decode(table, p, out)   32 of its weights from 16 bytes
//   max_abs, reduce_max     the largest magnitude, NaN if there is one
//   encode(buckets, x, p)   kWidth nibbles into kWidth/2 bytes:
//                           bucket = #{j : not bounds[j] >= x}, nibble = order[bucket]
//   transpose               kWidth x kWidth block of floats
//   permute(v, lanes)       lane i is v's lane lanes[i]
//   reduce_each(v)          kWidth vectors to one: lane i is the sum of v[i]'s lanes
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace peftkern::PEFTKERN_ISA {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Subnormals and normals: place the bits 13 up and rescale by 2^112; exact, no branch on the exponent.
  if (magnitude < 0x7c00u) return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
  return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
}

inline void from_float(float* out, float x) { *out = x; }
inline void from_float(Bf16* out, float x) {
  const uint32_t u = bits_of(x);
  out->bits =
      (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void from_float(F16* out, float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

#if defined(PEFTKERN_VEC_SCALAR)

struct Vec {
  static constexpr int kWidth = 4;
  float v[4];
};

inline Vec set1(float x) { return {{x, x, x, x}}; }
inline Vec zero() { return set1(0.0f); }
inline Vec add(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
  return a;
}
inline Vec mul(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Vec div(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.v[i] /= b.v[i];
  return a;
}
// a * b + c; unfused where the machine has no FMA.
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 4; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

template <class T>
inline Vec load(const T* p) {
  return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <class T>
inline Vec load_n(const T* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; ++i) a.v[i] = to_float(p[i]);
  return a;
}
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(p + i, a.v[i]);
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) from_float(p + i, a.v[i]);
}

struct CodeTable {
  const float* code;
};
inline CodeTable code_registers(const float* code) { return {code}; }
inline Vec lookup(CodeTable t, const uint8_t* p) {
  return {{t.code[p[0] >> 4], t.code[p[0] & 15], t.code[p[1] >> 4], t.code[p[1] & 15]}};
}

struct Words {
  uint8_t bytes[16];
};
inline Words load_words(const uint8_t* p) {
  Words w;
  std::memcpy(w.bytes, p, sizeof(w.bytes));
  return w;
}
inline Words half_words(const uint8_t* p) {
  Words w = {};
  for (int i = 0; i < 8; ++i) w.bytes[i / 4 * 4 + i % 2 + (i % 4 < 2 ? 0 : 8)] = p[i];
  return w;
}
template <int j>
inline Vec lookup(CodeTable t, const Words& w) {
  Vec v;
  for (int i = 0; i < 4; ++i)
    v.v[i] = t.code[j % 2 ? w.bytes[4 * i + j / 2] & 15 : w.bytes[4 * i + j / 2] >> 4];
  return v;
}
constexpr int64_t kGroup = 64;
constexpr int64_t group_place(int64_t k) { return k; }
inline void decode_group(CodeTable t, Vec scale, const uint8_t* p, float* out) {
  for (int k = 0; k < kGroup; k += Vec::kWidth) store(out + k, mul(lookup(t, p + k / 2), scale));
}
inline void reorder_group(const float* y, float* c) { std::memcpy(c, y, kGroup * sizeof(float)); }
inline void restore_group(const float* c, float* y) { std::memcpy(y, c, kGroup * sizeof(float)); }
template <int n>
inline Vec spread(const float* p) {
  static_assert(n == 1, "of four lanes");
  return set1(p[0]);
}

// The nested absmax: code[codes[i]], four of them.
inline Vec gather_codes(const float* code, const uint8_t* codes) {
  return {{code[codes[0]], code[codes[1]], code[codes[2]], code[codes[3]]}};
}

template <class T>
struct BlockTable {
  T values[16];
};
template <class T>
inline BlockTable<T> block_table(const float* code, float absmax) {
  BlockTable<T> t;
  for (int q = 0; q < 16; ++q) from_float(t.values + q, code[q] * absmax);
  return t;
}
template <class T>
inline void decode(const BlockTable<T>& t, const uint8_t* p, T* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = t.values[p[i] >> 4];
    out[2 * i + 1] = t.values[p[i] & 15];
  }
}

// max(|lanes|), a NaN wins: the magnitude's bits order like integers, NaN above infinity.
inline Vec max_abs(Vec largest, Vec x) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t u = bits_of(x.v[i]) & 0x7fffffffu;
    if (u > bits_of(largest.v[i])) largest.v[i] = float_of(u);
  }
  return largest;
}
inline float reduce_max(Vec largest) {
  uint32_t u = 0;
  for (float x : largest.v) u = bits_of(x) > u ? bits_of(x) : u;
  return float_of(u);
}

struct Buckets {
  float bounds[15];
  uint8_t order[16];
};
// bounds [16] ascending, the last one +inf; order [16] the nibble of each bucket
inline Buckets bucket_registers(const float* bounds, const uint8_t* order) {
  Buckets b;
  std::memcpy(b.bounds, bounds, sizeof(b.bounds));
  std::memcpy(b.order, order, sizeof(b.order));
  return b;
}
inline void encode(const Buckets& b, Vec x, uint8_t* p) {
  uint8_t q[4];
  for (int i = 0; i < 4; ++i) {
    int bucket = 0;
    for (int j = 0; j < 15; ++j) bucket += !(b.bounds[j] >= x.v[i]);
    q[i] = b.order[bucket];
  }
  p[0] = static_cast<uint8_t>(q[0] << 4 | q[1]);
  p[1] = static_cast<uint8_t>(q[2] << 4 | q[3]);
}

inline void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
}

inline Vec permute(Vec v, const int32_t* lanes) {
  return {{v.v[lanes[0]], v.v[lanes[1]], v.v[lanes[2]], v.v[lanes[3]]}};
}
inline Vec reduce_each(const Vec* v) {
  return {{reduce_add(v[0]), reduce_add(v[1]), reduce_add(v[2]), reduce_add(v[3])}};
}

#endif  // PEFTKERN_VEC_SCALAR

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
