// The kernels of the active ISA level, behind one function for each primitive.
#pragma once

#include "cpu/isa.h"
#include "params.h"

namespace peftkern {

enum class Primitive { matmul, dequantize, quantize, dropout, compress, mora, mora_grad, probe };

void matmul(const MatmulParams& p);          // by p.x.dtype
void dequantize(const DequantizeParams& p);  // by p.out_dtype
void quantize(const QuantizeParams& p);      // by p.dtype
void dropout(const DropoutParams& p);        // by p.x.dtype
void compress(const CompressParams& p);      // by p.x.dtype
void mora(const MoraParams& p);              // by p.compress.x.dtype
void mora_grad(const MoraGradParams& p);     // by p.z.x.dtype
void probe(const ProbeParams& p, DType dtype);

// Several products by matmul() in a row (linear.cpp): each as it would be alone, bit by bit.
void linear(const LinearParams& p);
void linear_grad(const LinearGradParams& p);

// The level in use: the best available one until another is set. `isa` must be available.
Isa active_isa();
void set_active_isa(Isa isa);
Isa best_isa();

// The level of the row that runs now.
Isa kernel_isa(Primitive primitive, DType dtype);

}  // namespace peftkern
