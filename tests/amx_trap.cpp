// AMX for a CPU without it. Such a CPU refuses every tile instruction with SIGILL; the handler here does what
// the instruction would have done and goes on behind it. So the code under test is the code that ships, to the
// byte: its encodings, its operands, and the order in which the compiler left tile and other instructions.
//
// Results are the architecture's bit by bit (order of additions, rounding, subnormals). Where the CPU would
// fault, the process stops with a word why.
//
// Linked into the module with PEFTKERN_EMULATE_AMX, or built alone: loading it is enough. In the AMX level's
// namespace, since it is as wide.
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace peftkern::amx {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// The 64 bytes that LDTILECFG reads.
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "the layout is the architecture's");

struct State {
  bool configured;
  Config config;
  alignas(64) uint8_t data[kTiles][kRows][kRowBytes];
};
thread_local State state;

[[noreturn]] void fault(const char* instruction, const char* why) {
  std::fprintf(stderr, "emulated AMX: %s: %s\n", instruction, why);
  std::abort();
}

void configure(const Config& config) {
  const char* const name = "LDTILECFG";
  if (config.palette != 1) fault(name, "palette is not 1");
  if (config.start_row >= kRows) fault(name, "start_row out of range");
  for (uint8_t byte : config.reserved)
    if (byte) fault(name, "a reserved byte is set");
  for (int t = 0; t < 16; ++t) {
    if (t >= kTiles && (config.rows[t] || config.row_bytes[t]))
      fault(name, "a tile beyond the eighth has a shape");
    if (config.rows[t] > kRows) fault(name, "more than 16 rows");
    if (config.row_bytes[t] > kRowBytes) fault(name, "more than 64 bytes in a row");
    if (!config.rows[t] != !config.row_bytes[t]) fault(name, "rows without bytes or bytes without rows");
  }
  state.configured = true;
  state.config = config;
  std::memset(state.data, 0, sizeof(state.data));
}

void check(const char* instruction, int tile) {
  if (!state.configured) fault(instruction, "no configuration is loaded");
  if (tile >= kTiles) fault(instruction, "there are eight tiles");
  if (!state.config.rows[tile]) fault(instruction, "the tile has no shape");
  if (state.config.start_row) fault(instruction, "start_row is not 0");
}

void load(const char* instruction, int tile, const uint8_t* p, int64_t stride) {
  check(instruction, tile);
  std::memset(state.data[tile], 0, sizeof(state.data[tile]));
  for (int r = 0; r < state.config.rows[tile]; ++r)
    std::memcpy(state.data[tile][r], p + r * stride, state.config.row_bytes[tile]);
}

void store(int tile, uint8_t* p, int64_t stride) {
  check("TILESTORED", tile);
  for (int r = 0; r < state.config.rows[tile]; ++r)
    std::memcpy(p + r * stride, state.data[tile][r], state.config.row_bytes[tile]);
}

// c[m][n] += sum_k a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]. Two sums for each element, of the even and of
// the odd products, both from zero; each step is one FMA. Then even + odd, then that onto c.
void product(int c, int a, int b) {
  const char* const name = "TDPBF16PS";
  check(name, c);
  check(name, a);
  check(name, b);
  const Config& config = state.config;
  if (c == a || c == b || a == b) fault(name, "a tile is named twice");
  if (config.row_bytes[a] % 4 || config.row_bytes[b] % 4 || config.row_bytes[c] % 4)
    fault(name, "row bytes are not a multiple of 4");
  if (config.rows[c] != config.rows[a]) fault(name, "C and A differ in rows");
  if (config.row_bytes[c] != config.row_bytes[b]) fault(name, "C and B differ in columns");
  if (config.row_bytes[a] / 4 != config.rows[b]) fault(name, "the columns of A are not the rows of B");
  // Round to nearest even, subnormals are zeros, before and after, no exceptions. The caller's mode comes back
  // with the rest of its registers.
  const uint32_t mode = 0x9fc0;
  __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory");
  const __mmask16 columns = static_cast<__mmask16>((1u << (config.row_bytes[c] / 4)) - 1u);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < config.rows[c]; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < config.rows[b]; ++k) {
      int32_t pair;
      std::memcpy(&pair, state.data[a][m] + 4 * k, sizeof(pair));
      const __m512i x = _mm512_set1_epi32(pair);
      const __m512i y = _mm512_load_si512(state.data[b][k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
    }
    void* const sums = state.data[c][m];
    _mm512_mask_storeu_ps(sums, columns, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(even, odd)));
  }
}

// An instruction in three-byte VEX form, all that AMX has: C4, [R X B mmmmm], [W vvvv L pp], opcode, ModRM, SIB
// and displacement. R, X, B and vvvv are inverted.
struct Instruction {
  int map, prefix, opcode, mod, reg, rm, third;
  bool narrow;               // W = 0, L = 0
  const uint8_t *at, *next;  // memory operand, what follows; with `index` registers it is at + row * stride
  int64_t stride;
  bool has_index;
};

Instruction decode(const ucontext_t& context) {
  const greg_t* const registers = context.uc_mcontext.gregs;
  constexpr int kNumber[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const auto value = [&](int number) { return static_cast<int64_t>(registers[kNumber[number]]); };
  const uint8_t* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  Instruction i = {};
  if (code[0] != 0xc4) return i;
  const int index_high = code[1] & 0x40 ? 0 : 8, base_high = code[1] & 0x20 ? 0 : 8;
  i.map = code[1] & 31;
  i.narrow = (code[2] & 0x84) == 0;
  i.third = ~code[2] >> 3 & 15;
  i.prefix = code[2] & 3;
  i.opcode = code[3];
  i.mod = code[4] >> 6;
  i.reg = (code[4] >> 3 & 7) | (code[1] & 0x80 ? 0 : 8);
  i.rm = code[4] & 7;
  code += 5;
  if (i.mod == 3) {
    i.rm |= base_high;
    i.next = code;
    return i;
  }
  int64_t at = 0;
  int displacement = i.mod == 1 ? 1 : i.mod == 2 ? 4 : 0;
  bool from_next = false;
  if (i.rm == 4) {
    const int scale = *code >> 6, index = (*code >> 3 & 7) | index_high, base = *code & 7;
    ++code;
    i.has_index = index != 4;
    if (i.has_index) i.stride = value(index) * (int64_t{1} << scale);
    if (base == 5 && i.mod == 0) {
      displacement = 4;
    } else {
      at = value(base | base_high);
    }
  } else if (i.rm == 5 && i.mod == 0) {
    from_next = true;
    displacement = 4;
  } else {
    at = value(i.rm | base_high);
  }
  if (displacement == 1) at += static_cast<int8_t>(*code);
  if (displacement == 4) {
    int32_t offset;
    std::memcpy(&offset, code, sizeof(offset));
    at += offset;
  }
  code += displacement;
  if (from_next) at += reinterpret_cast<int64_t>(code);
  i.at = reinterpret_cast<const uint8_t*>(at);
  i.next = code;
  return i;
}

// Prefixes: none 0, 66 1, F3 2, F2 3.
bool execute(const Instruction& i) {
  if (i.map != 2 || !i.narrow || (i.third && i.opcode != 0x5c)) return false;
  const bool memory = i.mod != 3, sibmem = memory && i.rm == 4;
  uint8_t* const at = const_cast<uint8_t*>(i.at);
  switch (i.opcode << 4 | i.prefix) {
    case 0x490:
      if (memory) {
        if (i.reg) return false;
        Config config;
        std::memcpy(&config, at + (i.has_index ? i.stride : 0), sizeof(config));
        return configure(config), true;
      }
      if (i.reg || i.rm) return false;
      return state.configured = false, true;
    case 0x493:
      if (memory || i.rm) return false;
      check("TILEZERO", i.reg);
      std::memset(state.data[i.reg], 0, sizeof(state.data[i.reg]));
      return true;
    case 0x4b1:
      return sibmem && (load("TILELOADDT1", i.reg, at, i.stride), true);
    case 0x4b3:
      return sibmem && (load("TILELOADD", i.reg, at, i.stride), true);
    case 0x4b2:
      return sibmem && (store(i.reg, at, i.stride), true);
    case 0x5c2:
      return !memory && (product(i.reg, i.rm, i.third), true);
    default:
      return false;
  }
}

struct sigaction before;

void on_sigill(int, siginfo_t*, void* argument) {
  ucontext_t& context = *static_cast<ucontext_t*>(argument);
  Instruction i = decode(context);
  if (!execute(i)) {  // not ours: it happens again, for whoever was there before
    sigaction(SIGILL, &before, nullptr);
    return;
  }
  do {  // what follows is often another one
    context.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(i.next);
    i = decode(context);
  } while (execute(i));
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &before);
}

}  // namespace
}  // namespace peftkern::amx

namespace peftkern {
namespace {

sigjmp_buf refused;

}  // namespace

// The AMX level needs AVX512_BF16, which is not emulated. A virtual machine may hide it and execute it all the same.
bool executes_bf16() {
  struct sigaction action = {}, previous;
  action.sa_handler = [](int) { siglongjmp(refused, 1); };
  sigaction(SIGILL, &action, &previous);
  volatile bool executes = false;
  if (sigsetjmp(refused, 1) == 0) {
    __asm__ volatile("vdpbf16ps %%zmm0, %%zmm0, %%zmm0" : : : "xmm0");
    executes = true;
  }
  sigaction(SIGILL, &previous, nullptr);
  return executes;
}

}  // namespace peftkern
