#define PEFTKERN_ISA avx2
#include "cpu/vec_avx2.h"

#include "cpu/dequantize.inl"
#include "cpu/dropout.inl"
#include "cpu/matmul_f32.inl"
#include "cpu/mora_f32.inl"
#include "cpu/probe_f32.inl"
#include "cpu/quantize.inl"
