// MoRA, and its compress alone, at a level whose products are fp32, whatever x's dtype.
#pragma once

#include "cpu/matmul_f32.inl"
#include "cpu/mora.inl"

namespace peftkern::PEFTKERN_ISA {

void compress_f32(const CompressParams& p) { Compress<float>(p).run(); }
void compress_bf16(const CompressParams& p) { Compress<Bf16>(p).run(); }
void compress_f16(const CompressParams& p) { Compress<F16>(p).run(); }

void mora_f32(const MoraParams& p) { Mora<F32Kernel, float>(p).run(); }
void mora_bf16(const MoraParams& p) { Mora<F32Kernel, Bf16>(p).run(); }
void mora_f16(const MoraParams& p) { Mora<F32Kernel, F16>(p).run(); }

void mora_grad_f32(const MoraGradParams& p) { MoraGrad<F32Kernel, float>(p).run(); }
void mora_grad_bf16(const MoraGradParams& p) { MoraGrad<F32Kernel, Bf16>(p).run(); }
void mora_grad_f16(const MoraGradParams& p) { MoraGrad<F32Kernel, F16>(p).run(); }

}  // namespace peftkern::PEFTKERN_ISA
