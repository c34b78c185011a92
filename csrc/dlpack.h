// The part of DLPack's C exchange API (github.com/dmlc/dlpack, 1.2 and later, major version 1) that reads a
// tensor. A tensor type that implements it carries a capsule "dlpack_exchange_api" as its attribute
// __dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace peftkern::dlpack {

enum DeviceType : int32_t { kCpu = 1 };
enum TypeCode : uint8_t { kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  struct {
    int32_t type;
    int32_t id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48);

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;  // an older version, or null
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Fills `out` with a view that lives as long as the object. 0, or -1 with a Python exception set. May be
  // null.
  int (*tensor_from_py_object)(void* object, Tensor* out);
  void* current_work_stream;
};

inline constexpr uint32_t kMajor = 1;
inline constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace peftkern::dlpack
