// A linear layer with a low-rank adapter, forward and backward: products by matmul(), one after the other.
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

// 1 in each dtype: a row of ones is this with a stride of 0.
Matrix one(DType dtype) {
  static float f32 = 1.0f;
  static uint16_t bf16 = 0x3f80, f16 = 0x3c00;
  if (dtype == DType::f32) return {&f32, dtype, 0, 0};
  return {dtype == DType::bf16 ? &bf16 : &f16, dtype, 0, 0};
}

}  // namespace

void linear(const LinearParams& p) {
  if (p.out.rank) {
    MatmulParams t;
    t.rows = p.out.rows;
    t.inner = p.out.inner;
    t.outputs = p.out.rank;
    t.x = p.out.x;
    t.dense = p.a;
    t.alpha = p.scaling;
    t.out = p.out.t;
    t.threads = p.out.threads;
    matmul(t);
  }
  matmul(p.out);
}

void linear_grad(const LinearGradParams& p) {
  Matrix g;
  if (p.rank && (p.da.data || (p.dx.data && p.a.data))) {
    const size_t elements = static_cast<size_t>(p.rows) * static_cast<size_t>(p.rank);
    g = {operand_scratch(elements * (p.dy.dtype == DType::f32 ? 4 : 2)), p.dy.dtype, p.rank, 1};
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

}  // namespace peftkern
