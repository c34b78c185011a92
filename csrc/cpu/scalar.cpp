#define PEFTKERN_ISA scalar
#define PEFTKERN_VEC_SCALAR
#include "cpu/vec_scalar.h"

#include "cpu/dequantize.inl"
#include "cpu/dropout.inl"
#include "cpu/matmul_f32.inl"
#include "cpu/mora_f32.inl"
#include "cpu/probe_f32.inl"
#include "cpu/quantize.inl"
