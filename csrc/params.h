// One plain struct per primitive: pointers, sizes, strides in elements. Kernels see nothing else.
#pragma once

#include <cstdint>

namespace peftkern {

enum class DType : uint8_t { f32, bf16, f16 };
enum class QuantType : uint8_t { nf4, fp4 };

// A strided matrix (or, with stride1 alone, a vector). data == nullptr: absent.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride0 = 0;
  int64_t stride1 = 0;
};

// One scale per 2^log2_blocksize consecutive weights of the flat [N*K] index.
// Plain:   absmax[i] = values[i]
// Nested:  absmax[i] = code[codes[i]] * absmax2[i >> log2_blocksize2] + offset
struct Absmax {
  const float* values = nullptr;   // plain, or nullptr
  const uint8_t* codes = nullptr;  // nested, or nullptr
  const float* code = nullptr;     // [256]
  const float* absmax2 = nullptr;
  float offset = 0.0f;
  int log2_blocksize2 = 0;
};

// bitsandbytes' bytes: weight i of the flat row-major index sits in packed[i / 2], high nibble first.
struct Weight4 {
  const uint8_t* packed = nullptr;
  QuantType quant_type = QuantType::nf4;
  int log2_blocksize = 6;
  Absmax absmax;
};

// out[i] = round(code[q(i)] * absmax[i / blocksize]), i < numel; out is contiguous.
struct DequantizeParams {
  Weight4 weight;
  int64_t numel = 0;
  void* out = nullptr;
  DType out_dtype = DType::f32;
  int threads = 1;
};

// packed [ceil(numel / 2)] and absmax fp32 [ceil(numel / blocksize)] from weight, contiguous.
struct QuantizeParams {
  const void* weight = nullptr;
  DType dtype = DType::f32;
  int64_t numel = 0;
  QuantType quant_type = QuantType::nf4;
  int log2_blocksize = 6;
  uint8_t* packed = nullptr;
  float* absmax = nullptr;
  int threads = 1;
};

// An addend with a few columns that many outputs share. Wide columns (the outputs) and narrow ones (of
// values):
//   cyclic    for every p < length, wide column p mod wide goes with narrow column p mod columns
//   grouped   the wide columns are cut into `columns` neighbouring groups, the first wide mod columns of them
//             one longer than the others; group g goes with narrow column g
// spread(m, o) = sum of values[m, q] over all pairs (o, q)
struct Spread {
  Matrix values;  // fp32 [rows, columns], stride1 == 1
  int64_t columns = 0;
  bool grouped = false;
  int64_t length = 0;
};

// out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o] + spread(m, o)
//
//   m < rows, o < outputs, c < inner, r < rank
//   plain:       w(o, c) = W[o, c], W is [outputs, inner]     forward
//   transposed:  w(o, c) = W[c, o], W is [inner, outputs]     dX, and the adapters' gradients
//
// W is weight4 when weight4.packed is set, else dense (any strides). u and every other matrix may have any
// strides; dtypes mix freely: all but out is brought to the kernel's compute type, which follows x.dtype.
struct MatmulParams {
  int64_t rows = 0;
  int64_t inner = 0;
  int64_t outputs = 0;
  int64_t rank = 0;
  Matrix x;  // [rows, inner]
  Weight4 weight4;
  Matrix dense;  // as W above
  bool transposed = false;
  Matrix t;     // [rows, rank]
  Matrix u;     // [outputs, rank]
  Matrix bias;  // [outputs], stride1
  Spread spread;
  float alpha = 1.0f;
  Matrix out;  // [rows, outputs], never aliases an input
  int threads = 1;
};

// Forward of a linear layer with a low-rank adapter:
//   t = scaling * x Aᵀ [rows, rank], rounded to x's dtype        out = x Wᵀ + t Bᵀ + bias
struct LinearParams {
  MatmulParams out;  // plain; t is where it is to be written, if anywhere, u is B; rank = 0: no adapter
  Matrix a;          // [rank, inner]
  float scaling = 1.0f;
};

// Its backward, with G = scaling * dY B [rows, rank], rounded to dY's dtype:
//   dx = dY W + G A [rows, inner]        dA = Gᵀ x [rank, inner]
//   dB = dYᵀ t [outputs, rank]           dbias[o] = sum of dY[m, o] over m
// Those that have data; what only the others need may be absent. rank = 0: no adapter.
struct LinearGradParams {
  int64_t rows = 0;
  int64_t inner = 0;
  int64_t outputs = 0;
  int64_t rank = 0;
  Matrix dy;        // [rows, outputs]
  Matrix x;         // [rows, inner]
  Weight4 weight4;  // [outputs, inner]
  Matrix a;         // [rank, inner]
  Matrix b;         // [outputs, rank]
  Matrix t;         // [rows, rank]
  float scaling = 1.0f;
  Matrix dx, da, db;
  Matrix dbias;  // [outputs], stride1
  int threads = 1;
};

// out[m, q] = sum of x[m, i] over all pairs (i, q) of the walk, see Spread, with x's columns as the wide
// ones. Then, with a rotation, in every block of 2 * half columns, for j < half:
//   (out[j], out[half + j]) = (out[j] cos - out[half + j] sin, out[half + j] cos + out[j] sin), sin negated
//   if inverse
struct CompressParams {
  int64_t rows = 0;
  int64_t wide = 0;
  int64_t columns = 0;
  Matrix x;  // [rows, wide]
  bool grouped = false;
  int64_t length = 0;
  const float* rotation = nullptr;  // [columns / (2 * half)][2][half]: cos, sin; or nullptr
  int64_t half = 0;
  bool inverse = false;
  Matrix out;  // [rows, columns], stride1 == 1
  int threads = 1;
};

// MoRA: z = compress(x), turned; v = alpha * z Mᵀ (or z M) in each block of `size` columns, in fp32, turned
// back; out = bias + spread(v). mora_linear(), of a 4-bit W: out = x Wᵀ + bias + spread(v), or x W.
struct MoraParams {
  CompressParams compress;  // of x. out: where z is wanted, contiguous, of x's dtype; else without data
  int64_t size = 0;         // r̂
  Matrix matrix;            // [size, size] as w(o, c)
  float alpha = 1.0f;
  const float* turn_back = nullptr;  // [columns / size][2][size / 2]: cos, sin; or nullptr
  MatmulParams out;  // rows, outputs, bias, out, spread but for its values; for mora_linear x and W too
  int threads = 1;
};

// out = alpha * the sum over rows and blocks of g_bᵀ z_b, g = compress(dY), z = compress(x), turned.
struct MoraGradParams {
  CompressParams g, z;  // both of as many columns; no out
  int64_t size = 0;     // r̂
  float alpha = 1.0f;
  float* out = nullptr;  // [size, size], contiguous
  int threads = 1;
};

// out[m, k] = x[m, k] where hash(seed, start + m * columns + k) < threshold, else 0; out is contiguous, of
// x's dtype, and may be x. start + rows * columns fits 63 bits.
struct DropoutParams {
  Matrix x;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t start = 0;
  uint64_t seed = 0;
  uint64_t threshold = 0;  // 2^32 keeps everything
  void* out = nullptr;
  int threads = 1;
};

// What a benchmark compares with: reads `bytes` of data once and does `iterations` rounds of products in
// registers.
struct ProbeParams {
  DType dtype = DType::f32;  // of the products
  const void* data = nullptr;
  int64_t bytes = 0;
  int64_t iterations = 0;
  double* result = nullptr;      // operations done
  uint64_t* checksum = nullptr;  // so that nothing is optimised away
  int threads = 1;
};

}  // namespace peftkern
