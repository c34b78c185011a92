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

#define PRIMITIVE(name, Params, dtype) using name##_params = Params;
PEFTKERN_PRIMITIVES(PRIMITIVE)
#undef PRIMITIVE

#define PEFTKERN_KERNEL(isa, primitive, dtype) \
  PEFTKERN_ROWS_##isa(namespace isa { void primitive##_##dtype(const primitive##_params&); })
#include "cpu/kernels.inc"
#undef PEFTKERN_KERNEL

namespace {

template <class Params>
struct Row {
  Isa isa;
  DType dtype;
  void (*run)(const Params&);
};

// A row of another primitive takes other parameters and has no place in this table: its function is left out.
template <class Params, class Other>
constexpr Row<Params> row(Isa isa, DType dtype, void (*run)(const Other&)) {
  if constexpr (std::is_same_v<Params, Other>) {
    return {isa, dtype, run};
  } else {
    return {isa, dtype, nullptr};
  }
}

template <class Params>
constexpr Row<Params> kRows[] = {
#define PEFTKERN_KERNEL(isa, primitive, dtype) \
  PEFTKERN_ROWS_##isa(row<Params>(Isa::isa, DType::dtype, &isa::primitive##_##dtype), )
#include "cpu/kernels.inc"
#undef PEFTKERN_KERNEL
};

// Best first: the first row that fits is the one. The table always holds a scalar row.
template <class Params>
const Row<Params>& choose(Isa active, DType dtype) {
  const Row<Params>* row = kRows<Params>;
  while (!row->run || row->dtype != dtype || row->isa > active) ++row;
  return *row;
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
#define PRIMITIVE(name, Params, dtype) Chosen<Params> name;
  PEFTKERN_PRIMITIVES(PRIMITIVE)
#undef PRIMITIVE

  explicit State(Isa isa) { set(isa); }
  void set(Isa isa) {
    active = isa;
#define PRIMITIVE(name, Params, dtype) name.choose_all(isa);
    PEFTKERN_PRIMITIVES(PRIMITIVE)
#undef PRIMITIVE
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

#define PRIMITIVE(name, Params, dtype) \
  void name(const Params& p) { state().name[p.dtype].run(p); }
PEFTKERN_PRIMITIVES(PRIMITIVE)
#undef PRIMITIVE

std::optional<Isa> kernel_isa(std::string_view primitive, DType dtype) {
#define PRIMITIVE(name, Params, ...) \
  if (primitive == #name) return state().name[dtype].isa;
  PEFTKERN_PRIMITIVES(PRIMITIVE)
#undef PRIMITIVE
  return {};
}

}  // namespace peftkern
