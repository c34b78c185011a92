// The only place that picks an ISA.
#include "cpu/dispatch.h"

#include <type_traits>

namespace peftkern {

// Rows of the levels that this build has.
#define PEFTKERN_ROWS_scalar(...) __VA_ARGS__
#if defined(PEFTKERN_HAVE_AVX2)
#define PEFTKERN_ROWS_avx2(...) __VA_ARGS__
#else
#define PEFTKERN_ROWS_avx2(...)
#endif
#if defined(PEFTKERN_HAVE_AVX512)
#define PEFTKERN_ROWS_avx512(...) __VA_ARGS__
#else
#define PEFTKERN_ROWS_avx512(...)
#endif
#if defined(PEFTKERN_HAVE_AVX512_BF16)
#define PEFTKERN_ROWS_avx512_bf16(...) __VA_ARGS__
#else
#define PEFTKERN_ROWS_avx512_bf16(...)
#endif
#if defined(PEFTKERN_HAVE_AMX)
#define PEFTKERN_ROWS_amx(...) __VA_ARGS__
#else
#define PEFTKERN_ROWS_amx(...)
#endif

#define PEFTKERN_PARAMS_matmul MatmulParams
#define PEFTKERN_PARAMS_dequantize DequantizeParams
#define PEFTKERN_PARAMS_quantize QuantizeParams
#define PEFTKERN_PARAMS_dropout DropoutParams
#define PEFTKERN_PARAMS_compress CompressParams
#define PEFTKERN_PARAMS_mora MoraParams
#define PEFTKERN_PARAMS_mora_grad MoraGradParams
#define PEFTKERN_PARAMS_probe ProbeParams

#define PEFTKERN_KERNEL(isa, primitive, dtype) \
  PEFTKERN_ROWS_##isa(namespace isa { void primitive##_##dtype(const PEFTKERN_PARAMS_##primitive&); })
#include "cpu/kernels.inc"
#undef PEFTKERN_KERNEL

namespace {

template <class Params>
struct Row {
  Isa isa;
  Primitive primitive;
  DType dtype;
  void (*run)(const Params&);
};

// A row of another primitive takes other parameters and has no place in this table: its function is left out.
template <class Params, class Other>
constexpr Row<Params> row(Isa isa, Primitive primitive, DType dtype, void (*run)(const Other&)) {
  if constexpr (std::is_same_v<Params, Other>) {
    return {isa, primitive, dtype, run};
  } else {
    return {isa, primitive, dtype, nullptr};
  }
}

template <class Params>
constexpr Row<Params> kRows[] = {
#define PEFTKERN_KERNEL(isa, primitive, dtype) \
  PEFTKERN_ROWS_##isa(row<Params>(Isa::isa, Primitive::primitive, DType::dtype, &isa::primitive##_##dtype), )
#include "cpu/kernels.inc"
#undef PEFTKERN_KERNEL
};

// Best first: the first row that fits is the one. The table always holds a scalar row.
template <class Params>
const Row<Params>& choose(Isa active, DType dtype) {
  const Row<Params>* chosen = nullptr;
  for (const Row<Params>& r : kRows<Params>) {
    if (r.run && r.dtype == dtype && r.isa <= active) {
      chosen = &r;
      break;
    }
  }
  return *chosen;
}

constexpr int kDTypes = 3;

// The rows chosen for the active level, by dtype.
template <class Params>
struct Chosen {
  const Row<Params>* rows[kDTypes];
  void choose_all(Isa active) {
    for (int d = 0; d < kDTypes; ++d) rows[d] = &choose<Params>(active, static_cast<DType>(d));
  }
  const Row<Params>& operator[](DType dtype) const { return *rows[static_cast<int>(dtype)]; }
};

struct State {
  Isa active;
  Chosen<MatmulParams> matmul;
  Chosen<DequantizeParams> dequantize;
  Chosen<QuantizeParams> quantize;
  Chosen<DropoutParams> dropout;
  Chosen<CompressParams> compress;
  Chosen<MoraParams> mora;
  Chosen<MoraGradParams> mora_grad;
  Chosen<ProbeParams> probe;

  explicit State(Isa isa) { set(isa); }
  void set(Isa isa) {
    active = isa;
    matmul.choose_all(isa);
    dequantize.choose_all(isa);
    quantize.choose_all(isa);
    dropout.choose_all(isa);
    compress.choose_all(isa);
    mora.choose_all(isa);
    mora_grad.choose_all(isa);
    probe.choose_all(isa);
  }
};

State& state() {
  static State instance(best_isa());
  return instance;
}

}  // namespace

Isa best_isa() {
  Isa best = Isa::scalar;
  for (Isa isa : kIsas) {
    if (isa_available(isa)) best = isa;
  }
  return best;
}

Isa active_isa() { return state().active; }
void set_active_isa(Isa isa) { state().set(isa); }

void matmul(const MatmulParams& p) { state().matmul[p.x.dtype].run(p); }
void dequantize(const DequantizeParams& p) { state().dequantize[p.out_dtype].run(p); }
void quantize(const QuantizeParams& p) { state().quantize[p.dtype].run(p); }
void dropout(const DropoutParams& p) { state().dropout[p.x.dtype].run(p); }
void compress(const CompressParams& p) { state().compress[p.x.dtype].run(p); }
void mora(const MoraParams& p) { state().mora[p.compress.x.dtype].run(p); }
void mora_grad(const MoraGradParams& p) { state().mora_grad[p.z.x.dtype].run(p); }
void probe(const ProbeParams& p, DType dtype) { state().probe[dtype].run(p); }

Isa kernel_isa(Primitive primitive, DType dtype) {
  switch (primitive) {
    case Primitive::matmul:
      return state().matmul[dtype].isa;
    case Primitive::dequantize:
      return state().dequantize[dtype].isa;
    case Primitive::quantize:
      return state().quantize[dtype].isa;
    case Primitive::dropout:
      return state().dropout[dtype].isa;
    case Primitive::compress:
      return state().compress[dtype].isa;
    case Primitive::mora:
      return state().mora[dtype].isa;
    case Primitive::mora_grad:
      return state().mora_grad[dtype].isa;
    case Primitive::probe:
      return state().probe[dtype].isa;
  }
  return Isa::scalar;
}

}  // namespace peftkern
