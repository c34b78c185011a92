// A view of a Python tensor's memory, and the checks that stand between Python and the kernels. Nothing of
// libtorch: the view comes through DLPack's C exchange API. Every refusal names the argument, what was
// expected and what came.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "dlpack.h"
#include "params.h"

namespace peftkern {

namespace py = pybind11;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// What this module knows of torch, filled in once at import.
struct Torch {
  PyTypeObject* tensor_type = nullptr;
  int (*read)(void*, dlpack::Tensor*) = nullptr;
  PyObject* is_neg = nullptr;  // the method's name
};

inline Torch& torch() {
  static Torch instance;
  return instance;
}

// Raises ImportError if torch is too old or speaks another major version of the exchange API.
inline void import_torch() {
  const py::object type = py::module_::import("torch").attr("Tensor");
  const auto refuse = [](const std::string& got) {
    throw py::import_error(
        text("torch: expected torch >= 2.11 (Tensor.__dlpack_c_exchange_api__, DLPack major version ",
             dlpack::kMajor, "), got torch ",
             py::str(py::module_::import("torch").attr("__version__")).cast<std::string>(), " with ", got));
  };
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) refuse("no such attribute");
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) refuse("an attribute that is not that capsule");
  auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  const dlpack::ExchangeApi* newest = api;
  while (api && api->major > dlpack::kMajor) api = api->previous;
  if (!api || api->major != dlpack::kMajor) refuse(text("DLPack ", newest->major, ".", newest->minor));
  if (!api->tensor_from_py_object) refuse("an exchange API that cannot view a tensor");
  torch().tensor_type = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());
  torch().read = api->tensor_from_py_object;
  torch().is_neg = PyUnicode_InternFromString("is_neg");
}

enum class ScalarType : uint8_t { f32, bf16, f16, u8 };

inline const char* name_of(ScalarType type) {
  static constexpr const char* kNames[] = {"torch.float32", "torch.bfloat16", "torch.float16", "torch.uint8"};
  return kNames[static_cast<int>(type)];
}

inline int size_of(ScalarType type) {
  static constexpr int kSizes[] = {4, 2, 2, 1};
  return kSizes[static_cast<int>(type)];
}

// Valid while the Python object lives and is not resized.
struct TensorView {
  const char* name;
  void* data;  // never null: a tensor without elements points to a dummy
  ScalarType dtype;
  int ndim;
  const int64_t* shape;
  const int64_t* strides;
  int64_t numel;
  int64_t bytes;  // from the first element to the last, both included

  std::string shape_text() const {
    std::ostringstream stream;
    stream << '[';
    for (int d = 0; d < ndim; ++d) stream << (d ? ", " : "") << shape[d];
    stream << ']';
    return stream.str();
  }

  bool contiguous() const {
    if (numel == 0) return true;
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }

  const char* begin() const { return static_cast<const char*>(data); }
  const char* end() const { return begin() + bytes; }
};

// Expanded tensors need no memory for their elements, but working memory is counted by these: of so many, a
// few bytes each for every thread fit 63 bits.
constexpr int64_t kMostElements = int64_t{1} << 48;
constexpr int kMostThreads = 1024;

// Accepts a CPU tensor of fp32, bf16, fp16 or uint8 with memory of its own, gradient or not; TypeError for
// anything that is not a tensor, ValueError for every other kind of tensor.
inline TensorView view(const char* name, py::handle object) {
  const auto describe = [&] {
    // Attributes that every tensor has; a subclass may raise from them.
    std::string result = Py_TYPE(object.ptr())->tp_name;
    try {
      result = text(result, " with dtype ", py::str(object.attr("dtype")).cast<std::string>(), ", device ",
                    py::str(object.attr("device")).cast<std::string>(), ", layout ",
                    py::str(object.attr("layout")).cast<std::string>());
    } catch (py::error_already_set&) {
    }
    return result;
  };
  if (!PyObject_TypeCheck(object.ptr(), torch().tensor_type))
    throw py::type_error(text(name, ": expected a torch.Tensor, got ", Py_TYPE(object.ptr())->tp_name));
  dlpack::Tensor raw;
  if (torch().read(object.ptr(), &raw) != 0) {
    py::error_already_set reason;
    if (!reason.matches(PyExc_Exception)) throw reason;
    const std::string message = py::str(reason.value()).cast<std::string>();
    throw py::value_error(text(name, ": expected a dense CPU tensor with memory of its own, got a ",
                               describe(), " (", message.substr(0, message.find('\n')), ")"));
  }
  if (raw.device.type != dlpack::kCpu)
    throw py::value_error(text(name, ": expected a CPU tensor, got a ", describe()));

  TensorView v{name,
               static_cast<char*>(raw.data) + raw.byte_offset,
               ScalarType::f32,
               raw.ndim,
               raw.shape,
               raw.strides,
               1,
               0};
  const auto is = [&](dlpack::TypeCode code, int bits) {
    return raw.dtype.code == code && raw.dtype.bits == bits && raw.dtype.lanes == 1;
  };
  if (is(dlpack::kFloat, 32)) {
    v.dtype = ScalarType::f32;
  } else if (is(dlpack::kBfloat, 16)) {
    v.dtype = ScalarType::bf16;
  } else if (is(dlpack::kFloat, 16)) {
    v.dtype = ScalarType::f16;
  } else if (is(dlpack::kUInt, 8)) {
    v.dtype = ScalarType::u8;
  } else {
    throw py::value_error(
        text(name, ": expected dtype float32, bfloat16, float16 or uint8, got a ", describe()));
  }
  for (int d = 0; d < v.ndim; ++d) {
    if (v.shape[d] < 0 || v.strides[d] < 0 || __builtin_mul_overflow(v.numel, v.shape[d], &v.numel))
      throw py::value_error(
          text(name, ": expected sizes and strides that address memory, got shape ", v.shape_text()));
  }
  if (v.numel > kMostElements)
    throw py::value_error(text(name, ": expected at most 2^48 elements, got shape ", v.shape_text()));
  if (v.numel == 0) {
    alignas(64) static char nothing[64];
    v.data = nothing;
    return v;
  }
  if (!raw.data)
    throw py::value_error(text(name, ": expected a tensor with memory, got null data in a ", describe()));
  if (reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(size_of(v.dtype)) != 0)
    throw py::value_error(text(name, ": expected data aligned to its ", size_of(v.dtype),
                               "-byte elements, got address ", v.data, "; clone() it"));
  // The bit of a lazily negated view (x.conj().imag): its memory holds the opposite values.
  const py::object negated =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), torch().is_neg));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() != Py_False)
    throw py::value_error(
        text(name,
             ": expected a tensor whose memory holds its values, got one with the negative bit "
             "set; call resolve_neg()"));
  int64_t last = 0;
  for (int d = 0; d < v.ndim; ++d) last += (v.shape[d] - 1) * v.strides[d];
  v.bytes = (last + 1) * size_of(v.dtype);
  return v;
}

inline void expect_dtype(const TensorView& v, std::initializer_list<ScalarType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), v.dtype) != allowed.end()) return;
  std::string names;
  for (ScalarType type : allowed) names += (names.empty() ? "" : " or ") + std::string(name_of(type));
  throw py::value_error(text(v.name, ": expected dtype ", names, ", got ", name_of(v.dtype)));
}

inline void expect_shape(const TensorView& v, std::initializer_list<int64_t> shape) {
  if (v.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), v.shape)) return;
  std::ostringstream expected;
  const char* comma = "";
  for (int64_t size : shape) {
    expected << comma << size;
    comma = ", ";
  }
  throw py::value_error(text(v.name, ": expected shape [", expected.str(), "], got ", v.shape_text()));
}

// Contiguous, `count` elements, in whatever shape.
inline void expect_flat(const TensorView& v, int64_t count) {
  if (v.numel != count)
    throw py::value_error(
        text(v.name, ": expected ", count, " elements, got ", v.numel, " in shape ", v.shape_text()));
  if (!v.contiguous())
    throw py::value_error(text(v.name, ": expected a contiguous tensor, got strided memory"));
}

inline DType float_dtype(const TensorView& v) {
  expect_dtype(v, {ScalarType::f32, ScalarType::bf16, ScalarType::f16});
  return static_cast<DType>(v.dtype);
}

inline TensorView matrix_view(const char* name, py::handle object) {
  const TensorView v = view(name, object);
  float_dtype(v);
  if (v.ndim != 2) throw py::value_error(text(name, ": expected a 2-D tensor, got shape ", v.shape_text()));
  return v;
}

inline Matrix matrix(const TensorView& v) {
  if (v.ndim == 1) return {v.data, float_dtype(v), 0, v.strides[0]};
  return {v.data, float_dtype(v), v.strides[0], v.strides[1]};
}

// No two elements of a written tensor may share memory.
inline void expect_no_self_overlap(const TensorView& v) {
  if (v.numel == 0) return;
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int used = 0;
  for (int d = 0; d < v.ndim && used < 2; ++d) {
    if (v.shape[d] == 1) continue;
    size[used] = v.shape[d];
    stride[used++] = v.strides[d];
  }
  if (used == 2 && stride[0] < stride[1]) {
    std::swap(size[0], size[1]);
    std::swap(stride[0], stride[1]);
  }
  const int inner = used - 1;  // the dimension of the smaller stride
  const bool ok = used == 0 || (stride[inner] >= 1 && (used == 1 || stride[0] > (size[1] - 1) * stride[1]));
  if (!ok)
    throw py::value_error(text(v.name, ": expected elements that do not share memory, got shape ",
                               v.shape_text(), " with strides [", v.strides[0], ", ",
                               v.ndim > 1 ? v.strides[1] : 0, "]"));
}

inline void expect_disjoint(const TensorView& out, const TensorView& in) {
  if (out.numel == 0 || in.numel == 0) return;
  if (out.begin() < in.end() && in.begin() < out.end())
    throw py::value_error(text(
        out.name, ": expected memory apart from the other arguments', got memory shared with ", in.name));
}

}  // namespace peftkern
