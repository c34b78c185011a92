// A linear layer with its adapter: kernels one after the other. With a low-rank one forward and backward, with
// MoRA forward, which is its own adjoint.
#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"

namespace peftkern {
namespace {

Matrix transposed(const Matrix& a) { return {a.data, a.dtype, a.stride1, a.stride0}; }

// out [rows, outputs] = alpha * x [rows, inner] w, w [inner, outputs]
void product(const Matrix& out, int64_t rows, int64_t outputs, const Matrix& x, int64_t inner,
             const Matrix& w, float alpha, int threads) {
  MatmulParams p;
  p.rows = rows;
  p.inner = inner;
  p.outputs = outputs;
  p.x = x;
  p.dense = w;
  p.transposed = true;
  p.alpha = alpha;
  p.out = out;
  p.threads = threads;
  matmul(p);
}

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

Matrix scratch_matrix(int64_t rows, int64_t columns, DType dtype) {
  return {operand_scratch(static_cast<size_t>(rows * columns * size_of(dtype))), dtype, columns, 1};
}

// From row m on, which exists: one row alone may have any stride.
Matrix rows_from(Matrix a, int64_t m) {
  if (a.data && m) a.data = static_cast<char*>(a.data) + m * a.stride0 * size_of(a.dtype);
  return a;
}

// 1 in each dtype: a row of ones is this with a stride of 0.
Matrix one(DType dtype) {
  static float f32 = 1.0f;
  static uint16_t bf16 = 0x3f80, f16 = 0x3c00;
  if (dtype == DType::f32) return {&f32, dtype, 0, 0};
  return {dtype == DType::bf16 ? &bf16 : &f16, dtype, 0, 0};
}

}  // namespace

void linear(const LinearParams& p) {
  MatmulParams out = p.out;
  if (out.rank) {
    if (!out.t.data) out.t = scratch_matrix(out.rows, out.rank, out.x.dtype);
    MatmulParams t;
    t.rows = out.rows;
    t.inner = out.inner;
    t.outputs = out.rank;
    t.x = out.x;
    t.dense = p.a;
    t.alpha = p.scaling;
    t.out = out.t;
    t.threads = out.threads;
    matmul(t);
  }
  matmul(out);
}

void linear_grad(const LinearGradParams& p) {
  Matrix g;
  if (p.rank && (p.da.data || (p.dx.data && p.a.data))) {
    g = scratch_matrix(p.rows, p.rank, p.dy.dtype);
    product(g, p.rows, p.rank, p.dy, p.outputs, p.b, p.scaling, p.threads);
  }
  if (p.da.data) product(p.da, p.rank, p.inner, transposed(g), p.rows, p.x, 1.0f, p.threads);
  // dBᵀ = tᵀ dY: dY is the side that is read where it lies
  if (p.db.data) product(transposed(p.db), p.rank, p.outputs, transposed(p.t), p.rows, p.dy, 1.0f, p.threads);
  // in fp32, without a copy of dY
  if (p.dbias.data) product(p.dbias, 1, p.outputs, one(p.dy.dtype), p.rows, p.dy, 1.0f, p.threads);
  if (p.dx.data) {
    MatmulParams dx;
    dx.rows = p.rows;
    dx.inner = p.outputs;
    dx.outputs = p.inner;
    dx.x = p.dy;
    dx.weight4 = p.weight4;
    dx.transposed = true;
    if (g.data) {
      dx.rank = p.rank;
      dx.t = g;
      dx.u = transposed(p.a);
    }
    dx.out = p.dx;
    dx.threads = p.threads;
    matmul(dx);
  }
}

// v [rows, columns] in fp32, then out with v spread in the epilogue of the product; some rows at a time, for
// which W is decoded anew. With several blocks v is as wide as x: rows enough to hide the decoding. One block
// is narrow: rows enough to be next to all, and few enough for v to be kept from call to call.
void mora_linear(const MoraParams& p) {
  constexpr int64_t kWideRows = 384, kNarrowRows = 4096;
  const int64_t rows = p.out.rows, columns = p.compress.columns;
  const int64_t most = columns == p.size ? kNarrowRows : kWideRows;
  if (!rows) return;
  const int64_t parts = (rows + most - 1) / most;
  const int64_t part = (rows + parts - 1) / parts;
  const Matrix values = scratch_matrix(part, columns, DType::f32);
  MoraParams v = p;
  v.out = MatmulParams();
  v.out.outputs = v.out.spread.columns = v.out.spread.length = columns;
  v.out.out = values;
  MatmulParams out = p.out;
  out.threads = p.threads;
  out.spread.values = values;
  for (int64_t m = 0; m < rows; m += part) {
    v.compress.rows = v.out.rows = out.rows = std::min(part, rows - m);
    v.compress.x = rows_from(p.compress.x, m);
    v.compress.out = rows_from(p.compress.out, m);
    out.x = rows_from(p.out.x, m);
    out.out = rows_from(p.out.out, m);
    mora(v);
    matmul(out);
  }
}

}  // namespace peftkern
