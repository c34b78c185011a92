// The probe of a level whose products are fp32, whatever x's dtype.
#pragma once

#include "cpu/probe.inl"

namespace peftkern::PEFTKERN_ISA {

void probe_f32(const ProbeParams& p) { probe<F32Products>(p); }
void probe_bf16(const ProbeParams& p) { probe<F32Products>(p); }
void probe_f16(const ProbeParams& p) { probe<F32Products>(p); }

}  // namespace peftkern::PEFTKERN_ISA
