// The kernels of the active ISA level, behind one function for each primitive.
#pragma once

#include <optional>
#include <string_view>

#include "cpu/isa.h"
#include "params.h"

namespace peftkern {

// Every primitive, with its parameters and the dtype among them that picks its kernel.
#define PEFTKERN_PRIMITIVES(PRIMITIVE)               \
  PRIMITIVE(matmul, MatmulParams, x.dtype)           \
  PRIMITIVE(dequantize, DequantizeParams, out_dtype) \
  PRIMITIVE(quantize, QuantizeParams, dtype)         \
  PRIMITIVE(dropout, DropoutParams, x.dtype)         \
  PRIMITIVE(compress, CompressParams, x.dtype)       \
  PRIMITIVE(mora, MoraParams, compress.x.dtype)      \
  PRIMITIVE(mora_grad, MoraGradParams, z.x.dtype)    \
  PRIMITIVE(probe, ProbeParams, dtype)

#define PRIMITIVE(name, Params, dtype) void name(const Params& p);
PEFTKERN_PRIMITIVES(PRIMITIVE)
#undef PRIMITIVE

#define PRIMITIVE(name, Params, dtype) #name,
inline constexpr const char* kPrimitives[] = {PEFTKERN_PRIMITIVES(PRIMITIVE)};
#undef PRIMITIVE

// Several kernels in a row (linear.cpp): each as it would be alone, bit by bit.
void linear(const LinearParams& p);
void linear_grad(const LinearGradParams& p);
void mora_linear(const MoraParams& p);

// The level in use: the best available one until another is set. `isa` must be available.
Isa active_isa();
void set_active_isa(Isa isa);
Isa best_isa();

// The level of the kernel that runs now; nothing if there is no such primitive.
std::optional<Isa> kernel_isa(std::string_view primitive, DType dtype);

}  // namespace peftkern
