// peftkern._cpu: tensors in, parameter structs out. What reaches a kernel has been checked here.
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "tensor.h"

namespace peftkern {
namespace {

// libgomp's worker threads do not survive fork() and a parallel region in the child would wait for them for
// ever.
bool forked = false;

int checked_threads(int threads) {
  if (threads < 1 || threads > kMostThreads)
    throw py::value_error(text("threads: expected 1 to ", kMostThreads, ", got ", threads));
  return forked ? 1 : threads;
}

int64_t integer(const char* name, py::handle object) {
  if (!PyLong_Check(object.ptr()))
    throw py::type_error(text(name, ": expected an int, got ", Py_TYPE(object.ptr())->tp_name));
  const int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw py::value_error(
        text(name, ": expected an int of 64 bits, got ", py::str(object).cast<std::string>()));
  }
  return value;
}

int log2_blocksize(const char* name, int64_t blocksize) {
  constexpr int kLowest = 5, kHighest = 12;
  for (int log2 = kLowest; log2 <= kHighest; ++log2) {
    if (blocksize == int64_t{1} << log2) return log2;
  }
  throw py::value_error(text(name, ": expected a power of two from 32 to 4096, got ", blocksize));
}

QuantType quant_type(const char* name, py::handle object) {
  if (PyUnicode_Check(object.ptr())) {
    if (PyUnicode_CompareWithASCIIString(object.ptr(), "nf4") == 0) return QuantType::nf4;
    if (PyUnicode_CompareWithASCIIString(object.ptr(), "fp4") == 0) return QuantType::fp4;
  }
  throw py::value_error(
      text(name, ": expected \"nf4\" or \"fp4\", got ", py::repr(object).cast<std::string>()));
}

int64_t blocks_of(int64_t numel, int log2) {
  return (numel >> log2) + ((numel & ((int64_t{1} << log2) - 1)) != 0);
}

void expect_tuple(const char* name, const char* fields, py::handle object, Py_ssize_t size) {
  const bool is_tuple = PyTuple_Check(object.ptr());
  if (is_tuple && PyTuple_GET_SIZE(object.ptr()) == size) return;
  throw py::type_error(text(name, ": expected ", fields, ", got a ", Py_TYPE(object.ptr())->tp_name,
                            is_tuple ? text(" of ", PyTuple_GET_SIZE(object.ptr())) : std::string()));
}

// What a call writes: its elements share no memory with each other, nor with what is read.
class Outputs {
 public:
  Outputs() = default;
  explicit Outputs(const TensorView& v) { add(v); }

  void add(const TensorView& v) {
    expect_no_self_overlap(v);
    for (int i = 0; i < count_; ++i) expect_disjoint(v, views_[i]);
    views_[count_++] = v;
  }
  void expect_apart(const TensorView& input) const {
    for (int i = 0; i < count_; ++i) expect_disjoint(views_[i], input);
  }
  // Of no tensor's sizes, which may change once the GIL is released.
  void prefer_huge_pages() const {
    for (int i = 0; i < count_; ++i)
      peftkern::prefer_huge_pages(views_[i].data, static_cast<size_t>(views_[i].bytes));
  }

 private:
  static constexpr int kMost = 4;
  TensorView views_[kMost];
  int count_ = 0;
};

// A 2-D tensor that is read.
TensorView input_matrix(const char* name, py::handle object, const Outputs& outputs) {
  const TensorView v = matrix_view(name, object);
  outputs.expect_apart(v);
  return v;
}

// A bias of so many outputs, or nothing.
Matrix bias_vector(py::handle object, int64_t count, const Outputs& outputs) {
  if (object.is_none()) return {};
  const TensorView bias = view("bias", object);
  float_dtype(bias);
  expect_shape(bias, {count});
  outputs.expect_apart(bias);
  return matrix(bias);
}

// (packed, absmax, nested or None, quant_type, blocksize, N, K), nested = (absmax, code, offset, blocksize)
struct PackedWeight {
  Weight4 weight;
  int64_t n, k, numel;
};

PackedWeight packed_weight(py::handle object, const Outputs& outputs) {
  expect_tuple("weight", "(packed, absmax, nested, quant_type, blocksize, N, K)", object, 7);
  const auto item = [&](int i) { return py::handle(PyTuple_GET_ITEM(object.ptr(), i)); };
  PackedWeight w;
  w.weight.quant_type = quant_type("weight quant_type", item(3));
  w.weight.log2_blocksize = log2_blocksize("weight blocksize", integer("weight blocksize", item(4)));
  w.n = integer("weight N", item(5));
  w.k = integer("weight K", item(6));
  if (w.n < 0 || w.k < 0 || __builtin_mul_overflow(w.n, w.k, &w.numel))
    throw py::value_error(
        text("weight: expected N and K whose product fits 63 bits, got ", w.n, " and ", w.k));

  const TensorView packed = view("weight packed", item(0));
  expect_dtype(packed, {ScalarType::u8});
  expect_flat(packed, w.numel / 2 + w.numel % 2);
  outputs.expect_apart(packed);
  w.weight.packed = static_cast<const uint8_t*>(packed.data);

  const int64_t blocks = blocks_of(w.numel, w.weight.log2_blocksize);
  const TensorView absmax = view("weight absmax", item(1));
  Absmax& scale = w.weight.absmax;
  if (item(2).is_none()) {
    expect_dtype(absmax, {ScalarType::f32});
    scale.values = static_cast<const float*>(absmax.data);
  } else {
    PyObject* nested = item(2).ptr();
    expect_tuple("weight nested", "None or (absmax, code, offset, blocksize)", nested, 4);
    const auto part = [&](int i) { return py::handle(PyTuple_GET_ITEM(nested, i)); };
    expect_dtype(absmax, {ScalarType::u8});
    scale.codes = static_cast<const uint8_t*>(absmax.data);
    scale.log2_blocksize2 =
        log2_blocksize("weight nested blocksize", integer("weight nested blocksize", part(3)));
    const auto floats = [&](const char* name, py::handle tensor, int64_t count) {
      const TensorView v = view(name, tensor);
      expect_dtype(v, {ScalarType::f32});
      expect_flat(v, count);
      outputs.expect_apart(v);
      return static_cast<const float*>(v.data);
    };
    scale.absmax2 = floats("weight nested absmax", part(0), blocks_of(blocks, scale.log2_blocksize2));
    scale.code = floats("weight nested code", part(1), 256);
    scale.offset = *floats("weight nested offset", part(2), 1);
  }
  expect_flat(absmax, blocks);
  outputs.expect_apart(absmax);
  return w;
}

// grouped or cyclic, and how far the cycles go: no further than a tensor can have columns.
void expect_walk(const char* grouped_name, py::handle grouped, const char* length_name, py::handle length) {
  if (!PyBool_Check(grouped.ptr()))
    throw py::type_error(text(grouped_name, ": expected a bool, got ", Py_TYPE(grouped.ptr())->tp_name));
  const int64_t value = integer(length_name, length);
  if (value < 0 || value > kMostElements)
    throw py::value_error(text(length_name, ": expected 0 to 2^48, got ", value));
}

void expect_neighbouring_columns(const TensorView& v) {
  if (v.shape[1] > 1 && v.strides[1] != 1)
    throw py::value_error(text(v.name, ": expected neighbouring columns, got strides [", v.strides[0], ", ",
                               v.strides[1], "]"));
}

Spread spread(py::handle object, int64_t rows, const Outputs& outputs) {
  expect_tuple("spread", "None or (values, grouped, length)", object, 3);
  const auto item = [&](int i) { return py::handle(PyTuple_GET_ITEM(object.ptr(), i)); };
  const TensorView values = input_matrix("spread values", item(0), outputs);
  expect_dtype(values, {ScalarType::f32});
  if (values.shape[1] < 1)
    throw py::value_error(text("spread values: expected 1 column or more, got ", values.shape_text()));
  expect_shape(values, {rows, values.shape[1]});
  expect_neighbouring_columns(values);
  expect_walk("spread grouped", item(1), "spread length", item(2));
  return {matrix(values), values.shape[1], item(1).ptr() == Py_True, integer("spread length", item(2))};
}

// out and x of a product.
void set_sides(MatmulParams& p, const TensorView& out, py::handle x_object, const Outputs& outputs) {
  p.out = matrix(out);
  p.rows = out.shape[0];
  p.outputs = out.shape[1];
  const TensorView x = input_matrix("x", x_object, outputs);
  p.x = matrix(x);
  p.inner = x.shape[1];
  expect_shape(x, {p.rows, p.inner});
}

void set_packed_weight(MatmulParams& p, py::handle object, const Outputs& outputs) {
  const PackedWeight w = packed_weight(object, outputs);
  p.weight4 = w.weight;
  const int64_t rows = p.transposed ? p.inner : p.outputs, columns = p.transposed ? p.outputs : p.inner;
  if (w.n != rows || w.k != columns)
    throw py::value_error(text("weight: expected ",
                               p.transposed ? "[inner, outputs] = [" : "[outputs, inner] = [", rows, ", ",
                               columns, "] from the shapes of x and out, got [", w.n, ", ", w.k, "]"));
}

// t [rows, rank] and u [outputs, rank]; t may be an output itself.
void set_addend(MatmulParams& p, const TensorView& t, const TensorView& u) {
  const int64_t rank = t.shape[1];
  expect_shape(t, {p.rows, rank});
  expect_shape(u, {p.outputs, rank});
  if (rank == 0) return;
  p.rank = rank;
  p.t = matrix(t);
  p.u = matrix(u);
}

// rows, rank: of a matrix that the kernels make for themselves
void expect_fits(const char* names, const char* matrix, int64_t rows, int64_t rank) {
  if (int64_t elements; __builtin_mul_overflow(rows, rank, &elements) || elements > kMostElements)
    throw py::value_error(text(names, ": expected at most 2^48 elements of ", matrix, " [M, R], got shape [",
                               rows, ", ", rank, "]"));
}

void bind_matmul(py::handle out_object, py::handle x, py::handle weight, bool transposed, float alpha,
                 py::handle t, py::handle u, py::handle bias, py::handle spread_object, int threads) {
  MatmulParams p;
  p.threads = checked_threads(threads);
  p.transposed = transposed;
  p.alpha = alpha;
  const TensorView out = matrix_view("out", out_object);
  const Outputs outputs(out);
  set_sides(p, out, x, outputs);
  if (PyTuple_Check(weight.ptr())) {
    set_packed_weight(p, weight, outputs);
  } else {
    const TensorView dense = input_matrix("weight", weight, outputs);
    if (transposed) {
      expect_shape(dense, {p.inner, p.outputs});
    } else {
      expect_shape(dense, {p.outputs, p.inner});
    }
    p.dense = matrix(dense);
  }
  if (t.is_none() != u.is_none())
    throw py::value_error(text("t, u: expected both or neither, got only ", t.is_none() ? "u" : "t"));
  if (!t.is_none()) set_addend(p, input_matrix("t", t, outputs), input_matrix("u", u, outputs));
  p.bias = bias_vector(bias, p.outputs, outputs);
  if (!spread_object.is_none()) p.spread = spread(spread_object, p.rows, outputs);
  if (out.numel == 0) return;
  py::gil_scoped_release release;
  outputs.prefer_huge_pages();
  matmul(p);
}

void bind_linear(py::handle out_object, py::handle t_object, py::handle x, py::handle weight,
                 py::handle a_object, py::handle b_object, float scaling, py::handle bias, int threads) {
  LinearParams p;
  p.out.threads = checked_threads(threads);
  p.scaling = scaling;
  const bool adapter = !a_object.is_none();
  if (b_object.is_none() == adapter || (!adapter && !t_object.is_none())) {
    const auto given = [](py::handle object) { return object.is_none() ? "None" : "a value"; };
    throw py::value_error(text("A, B: expected both or neither of them, and t only beside them, got ",
                               given(a_object), ", ", given(b_object), " and ", given(t_object)));
  }
  const TensorView out = matrix_view("out", out_object);
  Outputs outputs(out);
  std::optional<TensorView> t;
  if (!t_object.is_none()) {
    t = matrix_view("t", t_object);
    expect_flat(*t, t->numel);
    outputs.add(*t);
  }
  set_sides(p.out, out, x, outputs);
  set_packed_weight(p.out, weight, outputs);
  if (adapter) {
    const TensorView a = input_matrix("A", a_object, outputs), b = input_matrix("B", b_object, outputs);
    const int64_t rank = t ? t->shape[1] : a.shape[0];
    if (t) {
      expect_shape(*t, {p.out.rows, rank});
      if (static_cast<DType>(t->dtype) != p.out.x.dtype)
        throw py::value_error(text("t: expected x's dtype, ", name_of(static_cast<ScalarType>(p.out.x.dtype)),
                                   ", got ", name_of(t->dtype)));
    }
    expect_shape(a, {rank, p.out.inner});
    expect_shape(b, {p.out.outputs, rank});
    expect_fits("x, A", "t", p.out.rows, rank);
    if (rank) {
      p.out.rank = rank;
      p.a = matrix(a);
      p.out.u = matrix(b);
      if (t) p.out.t = matrix(*t);
    }
  }
  p.out.bias = bias_vector(bias, p.out.outputs, outputs);
  py::gil_scoped_release release;
  outputs.prefer_huge_pages();
  linear(p);
}

void bind_linear_grad(py::handle dx_object, py::handle da_object, py::handle db_object,
                      py::handle dbias_object, py::handle dy_object, py::handle x_object, py::handle weight,
                      py::handle a_object, py::handle b_object, py::handle t_object, float scaling,
                      int threads) {
  using Given = std::optional<TensorView>;
  LinearGradParams p;
  p.threads = checked_threads(threads);
  p.scaling = scaling;
  Outputs outputs;
  const auto written = [&](const char* name, py::handle object) -> Given {
    if (object.is_none()) return {};
    const TensorView v = matrix_view(name, object);
    outputs.add(v);
    return v;
  };
  const Given dx = written("dx", dx_object), da = written("dA", da_object), db = written("dB", db_object);
  Given dbias;
  if (!dbias_object.is_none()) {
    dbias = view("dbias", dbias_object);
    float_dtype(*dbias);
    outputs.add(*dbias);
  }
  const auto read = [&](const char* name, py::handle object, bool needed) -> Given {
    if (object.is_none() && !needed) return {};
    return input_matrix(name, object, outputs);
  };
  const TensorView dy = input_matrix("dY", dy_object, outputs);
  const Given x = read("x", x_object, da.has_value()), t = read("t", t_object, db.has_value());
  const Given a = read("A", a_object, false), b = read("B", b_object, da.has_value());
  if (dx && a.has_value() != b.has_value())
    throw py::value_error(text("A, B: expected both or neither for dx, got only ", a ? "A" : "B"));

  p.rows = dy.shape[0];
  p.outputs = dy.shape[1];
  if (!weight.is_none() || dx) {
    const PackedWeight w = packed_weight(weight, outputs);
    p.weight4 = w.weight;
    p.inner = dx ? dx->shape[1] : w.k;
    if (w.n != p.outputs || w.k != p.inner)
      throw py::value_error(text("weight: expected [N, K] = [", p.outputs, ", ", p.inner,
                                 "] from the shapes of dY and dx, got [", w.n, ", ", w.k, "]"));
  } else {
    p.inner = da ? da->shape[1] : x ? x->shape[1] : a ? a->shape[1] : 0;
  }
  p.rank = da ? da->shape[0] : db ? db->shape[1] : b ? b->shape[1] : t ? t->shape[1] : a ? a->shape[0] : 0;
  expect_fits("dY, B", "G", p.rows, p.rank);
  const auto take = [](Matrix& to, const Given& from, std::initializer_list<int64_t> shape) {
    if (!from) return;
    expect_shape(*from, shape);
    to = matrix(*from);
  };
  p.dy = matrix(dy);
  take(p.dx, dx, {p.rows, p.inner});
  take(p.da, da, {p.rank, p.inner});
  take(p.db, db, {p.outputs, p.rank});
  take(p.dbias, dbias, {p.outputs});
  take(p.x, x, {p.rows, p.inner});
  take(p.a, a, {p.rank, p.inner});
  take(p.b, b, {p.outputs, p.rank});
  take(p.t, t, {p.rows, p.rank});
  py::gil_scoped_release release;
  outputs.prefer_huge_pages();
  linear_grad(p);
}

void bind_dequantize(py::handle out_object, py::handle weight, int threads) {
  DequantizeParams p;
  p.threads = checked_threads(threads);
  const TensorView out = view("out", out_object);
  p.out_dtype = float_dtype(out);
  expect_flat(out, out.numel);
  const Outputs outputs(out);
  const PackedWeight w = packed_weight(weight, outputs);
  expect_flat(out, w.numel);
  p.weight = w.weight;
  p.numel = w.numel;
  p.out = out.data;
  if (p.numel == 0) return;
  py::gil_scoped_release release;
  outputs.prefer_huge_pages();
  dequantize(p);
}

void bind_quantize(py::handle weight_object, py::handle packed_object, py::handle absmax_object,
                   py::handle quant, int64_t blocksize, int threads) {
  QuantizeParams p;
  p.threads = checked_threads(threads);
  p.quant_type = quant_type("quant_type", quant);
  p.log2_blocksize = log2_blocksize("blocksize", blocksize);
  const TensorView weight = view("weight", weight_object);
  p.dtype = float_dtype(weight);
  expect_flat(weight, weight.numel);
  p.numel = weight.numel;
  p.weight = weight.data;
  const TensorView packed = view("packed", packed_object);
  expect_dtype(packed, {ScalarType::u8});
  expect_flat(packed, p.numel / 2 + p.numel % 2);
  p.packed = static_cast<uint8_t*>(packed.data);
  const TensorView absmax = view("absmax", absmax_object);
  expect_dtype(absmax, {ScalarType::f32});
  expect_flat(absmax, blocks_of(p.numel, p.log2_blocksize));
  p.absmax = static_cast<float*>(absmax.data);
  Outputs outputs(packed);
  outputs.add(absmax);
  outputs.expect_apart(weight);
  if (p.numel == 0) return;
  py::gil_scoped_release release;
  outputs.prefer_huge_pages();  // every later product reads them all
  quantize(p);
}

void bind_dropout(py::handle out_object, py::handle x_object, double p, py::handle seed_object,
                  py::handle start_object, int threads) {
  DropoutParams params;
  params.threads = checked_threads(threads);
  if (!(p >= 0.0 && p <= 1.0)) throw py::value_error(text("p: expected a probability in [0, 1], got ", p));
  const TensorView out = view("out", out_object);
  const TensorView x = matrix_view("x", x_object);
  expect_dtype(out, {x.dtype});
  expect_flat(out, x.numel);
  if (out.data != x.data || !x.contiguous()) expect_disjoint(out, x);
  params.x = matrix(x);
  params.rows = x.shape[0];
  params.columns = x.shape[1];
  params.start = integer("start", start_object);
  if (params.start < 0 || params.start > std::numeric_limits<int64_t>::max() - x.numel)
    throw py::value_error(text("start: expected 0 or more, and start + ", x.numel,
                               " elements to fit 63 bits, got ", params.start));
  params.seed = static_cast<uint64_t>(integer("seed", seed_object));
  params.threshold = static_cast<uint64_t>(std::nearbyint((1.0 - p) * 0x1p32));
  params.out = out.data;
  if (x.numel == 0) return;
  py::gil_scoped_release release;
  dropout(params);
}

// Contiguous fp32 [n, 2, h] for columns that are n blocks of 2 h.
TensorView rotation(py::handle object, int64_t columns, const Outputs& outputs) {
  const TensorView v = view("rotation", object);
  expect_dtype(v, {ScalarType::f32});
  if (v.ndim != 3 || v.shape[1] != 2 || v.numel != columns)
    throw py::value_error(text("rotation: expected shape [n, 2, h] with 2 n h = ", columns,
                               ", the columns of the middle, got ", v.shape_text()));
  expect_flat(v, columns);
  outputs.expect_apart(v);
  return v;
}

void bind_compress(py::handle out_object, py::handle x_object, py::handle grouped, py::handle length,
                   py::handle rotation_object, bool inverse, int threads) {
  CompressParams p;
  p.threads = checked_threads(threads);
  const TensorView out = matrix_view("out", out_object);
  const Outputs outputs(out);
  expect_neighbouring_columns(out);
  const TensorView x = input_matrix("x", x_object, outputs);
  expect_shape(x, {out.shape[0], x.shape[1]});
  expect_walk("grouped", grouped, "length", length);
  p.rows = out.shape[0];
  p.wide = x.shape[1];
  p.columns = out.shape[1];
  p.x = matrix(x);
  p.out = matrix(out);
  p.grouped = grouped.ptr() == Py_True;
  p.length = integer("length", length);
  p.inverse = inverse;
  if (!rotation_object.is_none()) {
    const TensorView turns = rotation(rotation_object, p.columns, outputs);
    p.rotation = static_cast<const float*>(turns.data);
    p.half = turns.shape[2];
  }
  if (out.numel == 0) return;
  py::gil_scoped_release release;
  outputs.prefer_huge_pages();
  compress(p);
}

// How far and in which way an end of the middle is walked: (grouped, length).
std::pair<bool, int64_t> walk(const char* name, py::handle object) {
  expect_tuple(name, "(grouped, length)", object, 2);
  const py::handle grouped = PyTuple_GET_ITEM(object.ptr(), 0), length = PyTuple_GET_ITEM(object.ptr(), 1);
  expect_walk(name, grouped, name, length);
  return {grouped.ptr() == Py_True, integer(name, length)};
}

// The middle's columns, in blocks of `size`: as many blocks as the wider one of its ends takes, at most.
// Working memory for a row of them, for every thread, has to fit 63 bits: with r̂ = 1 over a hundred bytes each.
int64_t block_columns(py::handle object, int64_t size, int64_t widest) {
  constexpr int64_t kMost = int64_t{1} << 40;
  const int64_t columns = integer("columns", object);
  if (columns > kMost) throw py::value_error(text("columns: expected at most 2^40, got ", columns));
  if (size < 1 || columns < 1 || columns % size != 0 || columns - size >= std::max<int64_t>(widest, 1))
    throw py::value_error(text("columns: expected a multiple of the matrix's rows, ", size, ", that covers ",
                               widest, " columns and no block more, got ", columns));
  return columns;
}

TensorView block_rotation(py::handle object, int64_t columns, int64_t size, const Outputs& outputs) {
  const TensorView turns = rotation(object, columns, outputs);
  if (2 * turns.shape[2] != size)
    throw py::value_error(text("rotation: expected blocks of the matrix's rows, [n, 2, ", size, " / 2], got ",
                               turns.shape_text()));
  return turns;
}

void bind_mora(py::handle out_object, py::handle z_object, py::handle x_object, py::handle weight,
               bool transposed, py::handle matrix_object, float alpha, py::handle bias_object,
               py::handle inner, py::handle outer, py::handle columns_object, py::handle rotation_object,
               int threads) {
  MoraParams p;
  p.threads = checked_threads(threads);
  p.alpha = alpha;
  const TensorView out = matrix_view("out", out_object);
  Outputs outputs(out);
  p.out.out = matrix(out);
  p.out.transposed = transposed;
  p.out.rows = p.compress.rows = out.shape[0];
  p.out.outputs = out.shape[1];
  TensorView z;
  if (!z_object.is_none()) {
    z = matrix_view("z", z_object);
    expect_flat(z, z.numel);
    outputs.add(z);
    p.compress.out = matrix(z);
  }

  const TensorView x = input_matrix("x", x_object, outputs);
  expect_shape(x, {out.shape[0], x.shape[1]});
  p.compress.x = matrix(x);
  p.compress.wide = x.shape[1];
  if (!weight.is_none()) {
    p.out.x = matrix(x);
    p.out.inner = x.shape[1];
    set_packed_weight(p.out, weight, outputs);
  }
  std::tie(p.compress.grouped, p.compress.length) = walk("inner", inner);

  const TensorView square = input_matrix("matrix", matrix_object, outputs);
  p.size = square.shape[0];
  expect_shape(square, {p.size, p.size});
  const int64_t columns = block_columns(columns_object, p.size, std::max(x.shape[1], out.shape[1]));
  p.matrix = transposed ? Matrix{square.data, float_dtype(square), square.strides[1], square.strides[0]}
                        : matrix(square);
  p.compress.columns = p.out.spread.columns = columns;
  std::tie(p.out.spread.grouped, p.out.spread.length) = walk("outer", outer);
  if (!rotation_object.is_none()) {
    const TensorView turns = block_rotation(rotation_object, columns, p.size, outputs);
    const float* table = static_cast<const float*>(turns.data);
    if (transposed) {
      p.turn_back = table;
    } else {
      p.compress.rotation = table;
      p.compress.half = turns.shape[2];
    }
  }
  p.out.bias = bias_vector(bias_object, p.out.outputs, outputs);
  if (!z_object.is_none()) {
    expect_dtype(z, {x.dtype});
    expect_shape(z, {out.shape[0], columns});
  }
  if (out.numel == 0 && (z_object.is_none() || out.shape[0] == 0)) return;
  py::gil_scoped_release release;
  outputs.prefer_huge_pages();
  p.out.weight4.packed ? mora_linear(p) : mora(p);
}

void bind_mora_grad(py::handle out_object, py::handle grad_object, py::handle x_object, float alpha,
                    py::handle columns_object, py::handle rotation_object, int threads) {
  MoraGradParams p;
  p.threads = checked_threads(threads);
  p.alpha = alpha;
  const TensorView out = matrix_view("out", out_object);
  expect_dtype(out, {ScalarType::f32});
  p.size = out.shape[0];
  expect_shape(out, {p.size, p.size});
  expect_flat(out, out.numel);
  p.out = static_cast<float*>(out.data);
  const Outputs outputs(out);
  const TensorView grad = input_matrix("grad", grad_object, outputs);
  const TensorView x = input_matrix("x", x_object, outputs);
  const int64_t columns = block_columns(columns_object, p.size, std::max(x.shape[1], grad.shape[1]));
  expect_shape(grad, {x.shape[0], grad.shape[1]});
  expect_dtype(grad, {x.dtype});
  const auto middle = [&](const TensorView& v, int64_t length) {
    CompressParams c;
    c.rows = v.shape[0];
    c.wide = v.shape[1];
    c.columns = columns;
    c.x = matrix(v);
    c.length = length;
    return c;
  };
  p.g = middle(grad, grad.shape[1]);
  p.z = middle(x, columns);
  if (!rotation_object.is_none()) {
    const TensorView turns = block_rotation(rotation_object, columns, p.size, outputs);
    p.z.rotation = static_cast<const float*>(turns.data);
    p.z.half = turns.shape[2];
  }
  py::gil_scoped_release release;
  mora_grad(p);
}

DType dtype_named(py::handle object) {
  static constexpr std::pair<const char*, DType> kDTypes[] = {
      {"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}};
  std::string name = py::str(object).cast<std::string>();
  if (name.rfind("torch.", 0) == 0) name = name.substr(6);
  for (const auto& [known, dtype] : kDTypes) {
    if (name == known) return dtype;
  }
  throw py::value_error(text("dtype: expected float32, bfloat16 or float16, got ", name));
}

void bind_renew_pages(py::handle tensor) {
  const TensorView data = view("data", tensor);
  expect_flat(data, data.numel);
  renew_pages(data.data, static_cast<size_t>(data.bytes));
}

uint64_t probe_read(py::handle tensor, int threads) {
  ProbeParams p;
  double operations;
  uint64_t checksum;
  p.threads = checked_threads(threads);
  p.result = &operations;
  p.checksum = &checksum;
  const TensorView data = view("data", tensor);
  expect_dtype(data, {ScalarType::u8});
  expect_flat(data, data.numel);
  if (reinterpret_cast<uintptr_t>(data.data) % 8 != 0)
    throw py::value_error(text("data: expected data aligned to 8 bytes, got address ", data.data));
  p.data = data.data;
  p.bytes = data.numel;
  py::gil_scoped_release release;
  probe(p);
  return checksum;
}

double probe_peak(py::handle dtype_object, int64_t iterations, int threads) {
  ProbeParams p;
  double operations;
  uint64_t checksum;
  if (iterations < 1) throw py::value_error(text("iterations: expected 1 or more, got ", iterations));
  p.dtype = dtype_named(dtype_object);
  p.iterations = iterations;
  p.threads = checked_threads(threads);
  p.result = &operations;
  p.checksum = &checksum;
  py::gil_scoped_release release;
  probe(p);
  return operations * 1e-9;
}

py::list levels(bool (*keep)(Isa)) {
  py::list names;
  for (Isa isa : kIsas) {
    if (keep(isa)) names.append(isa_name(isa));
  }
  return names;
}

// `from` says where the name was given.
void set_isa_named(const char* from, const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa) && isa_available(isa)) return set_active_isa(isa);
  }
  throw py::value_error(text(from, ": expected one of the levels available here, ",
                             py::str(levels(isa_available)).cast<std::string>(), ", got '", name, "'"));
}

const char* kernel(const std::string& primitive, py::handle dtype) {
  if (const std::optional<Isa> isa = kernel_isa(primitive, dtype_named(dtype))) return isa_name(*isa);
  std::string names;
  for (const char* name : kPrimitives) names += (names.empty() ? "" : ", ") + std::string(name);
  throw py::value_error(text("primitive: expected one of ", names, ", got ", primitive));
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PEFTKERN_COMPILER;
  info["levels"] = levels(isa_built);
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
#if defined(PEFTKERN_EMULATE_AMX)
  info["emulated_amx"] = true;
#else
  info["emulated_amx"] = false;
#endif
#if defined(PEFTKERN_SANITIZE)
  info["sanitizers"] = true;
#else
  info["sanitizers"] = false;
#endif
  return info;
}

void define(py::module_& m) {
  import_torch();
  if (const char* name = std::getenv("PEFTKERN_ISA"); name && *name) set_isa_named("PEFTKERN_ISA", name);
  if (pthread_atfork(nullptr, nullptr, [] { forked = true; }) != 0) throw std::bad_alloc();

  using py::arg;
  m.def("matmul", bind_matmul, arg("out"), arg("x"), arg("weight"), arg("transposed").noconvert(),
        arg("alpha"), arg("t"), arg("u"), arg("bias"), arg("spread"), arg("threads"),
        "out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o] + spread(m, o)");
  m.def("linear", bind_linear, arg("out"), arg("t"), arg("x"), arg("weight"), arg("A"), arg("B"),
        arg("scaling"), arg("bias"), arg("threads"),
        "t = scaling * x Aᵀ, None unless it is wanted, then out = x Wᵀ + t Bᵀ + bias");
  m.def("linear_grad", bind_linear_grad, arg("dx"), arg("dA"), arg("dB"), arg("dbias"), arg("dY"), arg("x"),
        arg("weight"), arg("A"), arg("B"), arg("t"), arg("scaling"), arg("threads"),
        "dx = dY W + G A, dA = Gᵀ x, dB = dYᵀ t, dbias = the sum of dY's rows, with G = scaling * dY B");
  m.def("dequantize", bind_dequantize, arg("out"), arg("weight"), arg("threads"),
        "out[i] = round(code[q[i]] * absmax[i // blocksize]) over the flat index");
  m.def("quantize", bind_quantize, arg("weight"), arg("packed"), arg("absmax"), arg("quant_type"),
        arg("blocksize"), arg("threads"), "Writes packed and absmax from weight.");
  m.def(
      "dropout", bind_dropout, arg("out"), arg("x"), arg("p"), arg("seed"), arg("start"), arg("threads"),
      "out = x where the seeded hash keeps it, else 0; start: the number of x's first element; out may be x");
  m.def("compress", bind_compress, arg("out"), arg("x"), arg("grouped"), arg("length"), arg("rotation"),
        arg("inverse").noconvert(), arg("threads"),
        "out[m, q] = the sum of x[m, i] over the columns i that go with q, then blocks of out turned");
  m.def("mora", bind_mora, arg("out"), arg("z"), arg("x"), arg("weight"), arg("transposed").noconvert(),
        arg("matrix"), arg("alpha"), arg("bias"), arg("inner"), arg("outer"), arg("columns"), arg("rotation"),
        arg("threads"),
        "out = x Wᵀ + bias + spread of alpha * z Mᵀ in each block of columns, z = compress(x), turned");
  m.def("mora_grad", bind_mora_grad, arg("out"), arg("grad"), arg("x"), arg("alpha"), arg("columns"),
        arg("rotation"), arg("threads"),
        "out = alpha * the sum over rows and blocks of gᵀ z, the middles of grad and of x, turned");
  m.def("renew_pages", bind_renew_pages, arg("data"),
        "Gives data, whose contents are lost, fresh pages: huge ones, where it is large enough.");
  m.def("probe_read", probe_read, arg("data"), arg("threads"), "Reads every byte once; a checksum.");
  m.def("probe_peak", probe_peak, arg("dtype"), arg("iterations"), arg("threads"),
        "Products in registers at the active level; the number of operations done, in 1e9.");
  m.def(
      "isa_levels", [] { return levels(isa_available); }, "The levels this machine can run, worst to best.");
  m.def("isa", [] { return isa_name(active_isa()); }, "The level in use.");
  m.def(
      "set_isa",
      [](const std::optional<std::string>& name) {
        if (name) {
          set_isa_named("isa", *name);
        } else {
          set_active_isa(best_isa());
        }
      },
      arg("name"), "Forces a level; None takes the best one again.");
  m.def("kernel", kernel, arg("primitive"), arg("dtype"), "The level of the kernel that would run now.");
  m.def("build_info", build_info, "How this module was built.");
}

}  // namespace
}  // namespace peftkern

// By hand instead of PYBIND11_MODULE: that would turn the ValueError of a bad PEFTKERN_ISA into an
// ImportError.
extern "C" PYBIND11_EXPORT PyObject* PyInit__cpu() {
  namespace py = pybind11;
  PYBIND11_CHECK_PYTHON_VERSION
  PYBIND11_ENSURE_INTERNALS_READY
  // Never freed, as the module itself, and a new one where the file is loaded under a second name: one that
  // both shared would be counted down twice at exit.
  auto* definition = new PyModuleDef();
  try {
    py::module_ m =
        py::module_::create_extension_module("_cpu", "The compiled CPU kernels of peftkern.", definition);
    peftkern::define(m);
    return m.release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const py::builtin_exception& e) {
    e.set_error();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_ImportError, e.what());
  }
  return nullptr;
}
