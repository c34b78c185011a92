#define PEFTKERN_ISA avx512
#include "cpu/vec_avx512.h"

#include "cpu/dequantize.inl"
#include "cpu/quantize.inl"
#include "cpu/matmul_f32.inl"
