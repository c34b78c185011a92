#define PEFTKERN_ISA avx2
#include "cpu/vec_avx2.h"

#include "cpu/dequantize.inl"
#include "cpu/quantize.inl"
#include "cpu/matmul_f32.inl"
