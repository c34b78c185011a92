// matmul for bf16 x on AMX tiles. TDPBF16PS multiplies 16 x 32 by 32 x 16 values in 16 cycles.
//
// A 4-bit weight with whole groups of 64 in a block (the usual case) has pipelines of its own. In both, W is decoded
// between the steps of the tile unit, so that the vector units work in its shadow:
//
//   C tile 16 x 16 = A tile [16][32] · B tile [16 pairs][16][2], all of them 1 KB and contiguous
//     Pipeline            A = 16 rows of W,  B = 16 rows of x, transposed once per call     C = outᵀ
//     TransposedPipeline  A = 16 rows of x,  B = 32 rows of W in pairs                      C = out
//   a step                32 of the contraction: 2 tiles of W against 1 … 3 of x, 1 against 4 or 5; transposed, 2 x 2
//   addend                the contraction goes on: x with t, W with u, in natural order
//
// Decoding 128 weights on a core with two 512-bit ports (Golden Cove): 3 shifts, 2 ternary ands, 4 VPERMW, 2 multiplies
// and a VCVTNE2PS2BF16, which is four: 15 slots, 7.5 cycles; 10.3 measured, with four stores that hit L1. A store that
// misses L1 and hits L2 costs 4 to 5 cycles, a load 1.3: decoding into L2 takes 20 to 23.
//
//   floor            rows · inner · outputs / 512 cycles of one core, or inner · outputs · 0.56 bytes of memory
//   rows <= 16       a step is 32 cycles of tiles, 82 of decoding
//   rows <= 32, 48   64 and 96 of tiles, 82 of decoding
//   rows <= 64, 80   of 16 rows of W: 64 and 80 of tiles, 41 of decoding, 64 and 80 lines from L2, 83 and 104
//   more             96 of tiles for 48 rows; of decoding, into L2, 180 shared by all of them; 80 lines from L2, 100
//
// The adapters' thin products read their long side where it lies. One row of x by a 4-bit W takes avx512's dot products in
// fp32: a VDPBF16PS keeps the ports as busy as four multiply-adds on these CPUs. Up to three rows of other weights take dot
// products in bf16. Everything else (dense weights, blocks that straddle rows) takes the common driver of matmul.inl.
#define PEFTKERN_ISA amx
#define PEFTKERN_VEC_BF16
#include "cpu/vec_avx512.h"

#include "cpu/matmul_bf16.inl"
#include "cpu/mora.inl"
#include "cpu/probe.inl"
#include "cpu/tile.h"

#if !defined(PEFTKERN_HAVE_AVX512)
#error "this level takes the products of one row from the level avx512"
#endif

namespace peftkern::avx512 {
void matmul_bf16(const MatmulParams& p);
}

namespace peftkern::PEFTKERN_ISA {
namespace {

constexpr int kTile = 16 * 32;  // bf16 values in an operand tile
constexpr int kSums = 16 * 16;  // fp32 values in a C tile
constexpr int kRow = 64;        // bytes from row to row of a contiguous tile
constexpr int kTileLanes = 16;
constexpr int kStepDepth = 32;

// gcc 12 takes __builtin_prefetch out of some loops.
inline void prefetch_l2(uintptr_t at) { __asm__ volatile("prefetcht1 (%0)" : : "r"(at)); }

// AmxKernel's: tiles 0 … 3 C, from 4 on A, then B. C and A have `rows` rows; less than 16 only while tile 4 alone is A.
// For the pipelines all tiles are whole.
inline TileConfig tile_shapes(int64_t rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 5 ? rows : 16);
    config.row_bytes[t] = kTileRowBytes;
  }
  return config;
}

// The driver's multiply: A from row-major rows, B from pairs, C loaded from and stored to memory.
struct AmxKernel : Bf16Panels {
  static constexpr int kLanes = kTileLanes;
  static constexpr int kDepth = 1024;
  static constexpr int kPanelRows = 32;
  static constexpr int kShortPanels = 1;
  static constexpr int kPanelColumns = 128;
  static constexpr int kStrip = 128;
  static constexpr bool kAcross = false;  // tiles take rows of A
  static constexpr bool kGroups = false;  // the Pipeline's
  static constexpr int kMaxRows = 256;
  static constexpr int kRowSplitW = 32;
  static constexpr int kRowSplitX = 32;
  static constexpr int kAlignW = kStepDepth;
  static constexpr int kAlignX = kStepDepth;
  static constexpr int kShortRows = 0, kShortDepth = kDepth;
  static constexpr double kSerialWork = 1 << 19;

  // C tile N of R x V: zero, loaded or stored, then the next one.
  template <int R, int V, int N = 0>
  static void begin(const float* c, int64_t stride, bool empty) {
    if constexpr (N < R * V) {
      empty ? tile_zero<N>() : tile_load<N>(c + N / V * 16 * stride + N % V * 16, 4 * stride);
      begin<R, V, N + 1>(c, stride, empty);
    }
  }
  template <int R, int V, int N = 0>
  static void end(float* c, int64_t stride) {
    if constexpr (N < R * V) {
      tile_store<N>(c + N / V * 16 * stride + N % V * 16, 4 * stride);
      end<R, V, N + 1>(c, stride);
    }
  }
  template <int R, int V, int N = 0>
  static void step(const Bf16* a, int64_t a_stride, const Bf16* b, int64_t b_stride) {
    if constexpr (N < R * V) {
      constexpr int r = N / V, v = N % V;
      if constexpr (v == 0) tile_load<4 + r>(a + r * 16 * a_stride, 2 * a_stride);
      if constexpr (r == 0) tile_load<4 + R + v>(b + 32 * v, 2 * b_stride);
      tile_dpbf16<N, 4 + r, 4 + R + v>();
      step<R, V, N + 1>(a, a_stride, b, b_stride);
    }
  }

  // R x V C tiles at c, over all pairs.
  template <int R, int V>
  static void block(int64_t pairs, const Bf16* a, int64_t a_stride, const Bf16* b, int64_t b_stride, float* c,
                    int64_t c_stride, bool empty) {
    static_assert(R * V <= 4 && R + V <= 4, "eight tiles");
    begin<R, V>(c, c_stride, empty);
    for (int64_t q = 0; q < pairs; q += 16, a += kStepDepth, b += 16 * b_stride)
      step<R, V>(a, a_stride, b, b_stride);
    end<R, V>(c, c_stride);
  }

  // A product waits 52 cycles for the one before it on the same C tile: 3 or 4 of them at a time.
  template <int R>
  static void blocks(int64_t vectors, int64_t pairs, const Bf16* a, int64_t a_stride, const Bf16* b,
                     int64_t b_stride, float* c, int64_t c_stride, bool empty) {
    constexpr int kMost = 4 - R;
    for (; vectors >= kMost; vectors -= kMost, b += 32 * kMost, c += 16 * kMost)
      block<R, kMost>(pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    if constexpr (kMost > 1) {
      if (vectors == kMost - 1) block<R, kMost - 1>(pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    }
    if constexpr (kMost > 2) {
      if (vectors == 1) block<R, 1>(pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    }
  }

  // The last rows % 16 rows have tiles of just that height: neither A nor C is touched beyond them.
  static void multiply(int64_t rows, int64_t vectors, int64_t pairs, const Bf16* a, int64_t a_stride,
                       const Bf16* b, int64_t b_stride, float* c, int64_t c_stride, bool empty) {
    if (rows >= 16) tile_configure(tile_shapes(16));
    for (; vectors == 1 && rows >= 48; rows -= 48, a += 48 * a_stride, c += 48 * c_stride)
      blocks<3>(vectors, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    for (; rows >= 32; rows -= 32, a += 32 * a_stride, c += 32 * c_stride)
      blocks<2>(vectors, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    for (; rows >= 16; rows -= 16, a += 16 * a_stride, c += 16 * c_stride)
      blocks<1>(vectors, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    if (rows) {
      tile_configure(tile_shapes(rows));
      blocks<1>(vectors, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    }
    tile_release();
  }
};

// The products of the adapters, which are thin on one side. The other side is read where it lies, once.
//
//   few outputs   x Aᵀ, dY B: rows of x are A tiles as they are; the weight, [outputs, inner] by any strides,
//                 becomes pairs [inner / 2][outputs][2], once per call
//   few rows      Gᵀ X, Tᵀ dY: rows of the weight become pairs in L2 on their way, 128 columns at a time
constexpr int64_t kThin = 64;
constexpr double kThinSerial = 1 << 19;

inline bool contiguous_rows(const Matrix& a) { return a.dtype == DType::bf16 && a.stride1 == 1; }
inline bool few_outputs(const MatmulParams& p) {
  return !p.weight4.packed && !p.rank && p.outputs <= kThin && p.inner >= kStepDepth && contiguous_rows(p.x);
}
inline bool few_rows(const MatmulParams& p) {
  return !p.weight4.packed && !p.rank && p.rows <= kThin && p.transposed && p.inner > 0 &&
         contiguous_rows(p.dense);
}
inline int thin_threads(const MatmulParams& p) {
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(p.outputs) * static_cast<double>(p.inner);
  return work < kThinSerial ? 1 : p.threads;
}

// c [rows, stride]: rows m0 …, outputs o0 … of out
inline void write_sums(const MatmulParams& p, int64_t m0, int64_t rows, int64_t o0, int64_t outputs,
                       const float* c, int64_t stride) {
  Epilogue epilogue(p);
  Epilogue::Columns<128> columns;
  epilogue.begin(o0, outputs, columns);
  epilogue.write_rows(m0, rows, o0, outputs, c, stride);
}

inline void run_few_outputs(const MatmulParams& p) {
  const Matrix w = p.transposed ? transposed(p.dense) : p.dense;  // [outputs, inner]
  const int64_t vectors = ceil_div(p.outputs, 16), steps = ceil_div(p.inner, kStepDepth);
  const int64_t b_stride = 32 * vectors, whole = p.inner / kStepDepth, left = p.inner % kStepDepth;
  const int threads = thin_threads(p);
  const int64_t group = vectors == 1 && p.rows >= 96 * threads ? 48 : 32;
  const int64_t step_elems = 16 * b_stride;
  Bf16* b = static_cast<Bf16*>(scratch(static_cast<size_t>(steps * step_elems) * sizeof(Bf16)));
  const uint32_t mode = FloatMode::current();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FloatMode guard(mode);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t c0 = kStepDepth * s, n = min_of<int64_t>(kStepDepth, p.inner - c0);
      Bf16* step = b + s * step_elems;
      if (w.stride1 == 1) {  // along the contraction: 16 outputs are transposed, pair by pair
        alignas(64) Bf16 rows[16][kStepDepth];
        for (int64_t v = 0; v < vectors; ++v) {
          for (int64_t r = 0; r < 16; ++r) {
            const int64_t valid = 16 * v + r < p.outputs ? n : 0;
            if (valid) read_row(w, 16 * v + r, c0, valid, rows[r]);
            std::memset(rows[r] + valid, 0, static_cast<size_t>(kStepDepth - valid) * sizeof(Bf16));
          }
          transpose(reinterpret_cast<const float*>(rows), 16, reinterpret_cast<float*>(step) + 16 * v,
                    b_stride / 2);
        }
      } else {  // along the outputs
        alignas(64) Bf16 rows[2][kThin];
        for (int64_t q = 0; q < 16; ++q) {
          for (int64_t i = 0; i < 2; ++i) {
            const int64_t valid = 2 * q + i < n ? p.outputs : 0;
            if (valid) read_row(transposed(w), c0 + 2 * q + i, 0, valid, rows[i]);
            std::memset(rows[i] + valid, 0, static_cast<size_t>(kThin - valid) * sizeof(Bf16));
          }
          Bf16Panels::interleave(rows[0], rows[1], vectors, step + q * b_stride);
        }
      }
    }
    alignas(64) float c[48 * kThin];
    alignas(64) Bf16 last[48][kStepDepth];
#pragma omp for schedule(static)
    for (int64_t g = 0; g < ceil_div(p.rows, group); ++g) {
      const int64_t m0 = group * g, rows = min_of(group, p.rows - m0);
      const Bf16* x = static_cast<const Bf16*>(p.x.data) + m0 * p.x.stride0;
      AmxKernel::multiply(rows, vectors, 16 * whole, x, p.x.stride0, b, b_stride, c, 16 * vectors, true);
      if (left) {
        for (int64_t m = 0; m < rows; ++m) {
          std::memcpy(last[m], x + m * p.x.stride0 + kStepDepth * whole,
                      static_cast<size_t>(left) * sizeof(Bf16));
          std::memset(last[m] + left, 0, static_cast<size_t>(kStepDepth - left) * sizeof(Bf16));
        }
        AmxKernel::multiply(rows, vectors, 16, last[0], kStepDepth, b + whole * step_elems, b_stride, c,
                            16 * vectors, false);
      }
      write_sums(p, m0, rows, 0, p.outputs, c, 16 * vectors);
    }
  }
}

inline void run_few_rows(const MatmulParams& p) {
  constexpr int64_t kColumns = 128, kDepth = 512;
  const int threads = thin_threads(p);
  const int64_t inner = round_up(p.inner, kStepDepth);
  const int64_t a_stride = inner + kStepDepth;  // rows on different cache sets
  const int64_t a_bytes = round_up(p.rows * a_stride * 2, 64), b_bytes = kDepth * kColumns * 2;
  const int64_t own_bytes = b_bytes + kThin * kColumns * 4;
  char* memory = static_cast<char*>(scratch(static_cast<size_t>(a_bytes + threads * own_bytes)));
  Bf16* a = reinterpret_cast<Bf16*>(memory);
  const uint32_t mode = FloatMode::current();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const FloatMode guard(mode);
    Bf16* b = reinterpret_cast<Bf16*>(memory + a_bytes + thread_index() * own_bytes);
    float* c = reinterpret_cast<float*>(b) + b_bytes / 4;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < p.rows; ++m) {
      read_row(p.x, m, 0, p.inner, a + m * a_stride);
      std::memset(a + m * a_stride + p.inner, 0, static_cast<size_t>(inner - p.inner) * sizeof(Bf16));
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < ceil_div(p.outputs, kColumns); ++task) {
      const int64_t o0 = kColumns * task, outputs = min_of(kColumns, p.outputs - o0);
      const int64_t vectors = ceil_div(outputs, 16), whole = outputs / 16;
      for (int64_t c0 = 0; c0 < inner; c0 += kDepth) {
        const int64_t depth = min_of(kDepth, inner - c0);
        for (int64_t q = 0; q < depth; q += 2) {
          const Bf16* row[2];
          alignas(64) Bf16 none[kColumns + 16], edge[2][16];
          for (int64_t i = 0; i < 2; ++i) {
            if (c0 + q + i >= p.inner) {
              std::memset(none, 0, sizeof(none));
              row[i] = none;
            } else {  // the row that lies `kAhead` below is on no page that the hardware would guess
              constexpr int64_t kAhead = 16;
              row[i] = static_cast<const Bf16*>(p.dense.data) + (c0 + q + i) * p.dense.stride0 + o0;
              for (int64_t line = 0; line < kColumns; line += 32)
                prefetch_l2(reinterpret_cast<uintptr_t>(row[i]) +
                            static_cast<uintptr_t>(2 * (kAhead * p.dense.stride0 + line)));
            }
            if (whole < vectors) {
              const int64_t n = outputs - 16 * whole;
              std::memcpy(edge[i], row[i] + 16 * whole, static_cast<size_t>(n) * sizeof(Bf16));
              std::memset(edge[i] + n, 0, static_cast<size_t>(16 - n) * sizeof(Bf16));
            }
          }
          Bf16Panels::interleave(row[0], row[1], whole, b + q * kColumns);
          if (whole < vectors) Bf16Panels::interleave(edge[0], edge[1], 1, b + q * kColumns + 32 * whole);
        }
        AmxKernel::multiply(p.rows, vectors, depth / 2, a + c0, a_stride, b, 2 * kColumns, c, kColumns,
                            c0 == 0);
      }
      write_sums(p, 0, p.rows, o0, outputs, c, kColumns);
    }
  }
}

// absmax of n <= 16 runs of 64 weights from flat index start on: where it lies, or spread out in buffer [16].
inline const float* absmax_runs(const Weight4& w, int64_t start, int64_t n, float* buffer) {
  const Absmax& a = w.absmax;
  const int64_t first = start >> w.log2_blocksize;
  if (a.values && w.log2_blocksize == 6) return a.values + first;
  const int64_t last = (start + 64 * n - 1) >> w.log2_blocksize;
  const int count = static_cast<int>(last - first + 1);
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  const int64_t block = a.values ? 0 : first >> a.log2_blocksize2;
  __m512 blocks;
  if (a.values) {
    blocks = _mm512_maskz_loadu_ps(mask, a.values + first);
  } else if (block != last >> a.log2_blocksize2) {
    for (int i = 0; i < count; ++i) buffer[i] = absmax_at(a, first + i);
    blocks = _mm512_maskz_loadu_ps(mask, buffer);
  } else {
    const __m128i codes = _mm_maskz_loadu_epi8(mask, a.codes + first);
    blocks = count > 4
                 ? _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, _mm512_cvtepu8_epi32(codes), a.code, 4)
                 : _mm512_castps128_ps512(_mm_mmask_i32gather_ps(
                       _mm_setzero_ps(), static_cast<__mmask8>(mask), _mm_cvtepu8_epi32(codes), a.code, 4));
    blocks = _mm512_add_ps(_mm512_mul_ps(blocks, _mm512_set1_ps(a.absmax2[block])), _mm512_set1_ps(a.offset));
  }
  const int shift = w.log2_blocksize - 6;
  const int64_t run = (start >> 6) & ((int64_t{1} << shift) - 1);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_srl_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(run))),
                                         _mm_cvtsi32_si128(shift));
  _mm512_storeu_ps(buffer, _mm512_permutexvar_ps(index, blocks));
  return buffer;
}

// The 128 weights of 32 words, looked up: value j holds weight j of each word. `second`: 0x1010 in the words
// that belong to the table's second half.
inline void look_up(__m512i words, __m512i second, __m512i table, Bf16* out, int64_t stride) {
  __asm__("" : "+v"(words));  // loaded once: bytes that cross a line are dear
  const __m512i nibbles = _mm512_set1_epi16(0x0f0f);
  const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibbles, second, 0xea);
  const __m512i odd = _mm512_ternarylogic_epi32(words, nibbles, second, 0xea);
  _mm512_store_si512(out, _mm512_permutexvar_epi16(even, table));
  _mm512_store_si512(out + stride, _mm512_permutexvar_epi16(odd, table));
  _mm512_store_si512(out + 2 * stride, _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table));
  _mm512_store_si512(out + 3 * stride, _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table));
}

inline __m512i scaled_table(__m512 code, float first, float second) {
  return bf16_pair(_mm512_mul_ps(code, _mm512_set1_ps(second)), _mm512_mul_ps(code, _mm512_set1_ps(first)));
}

// A call of so few cycles, of decoding and of tiles, is not worth a second thread.
inline int pipeline_threads(const MatmulParams& p) {
  constexpr double kSerialCycles = 8192;
  const double cycles = static_cast<double>(p.outputs) * static_cast<double>(p.inner + p.rank) *
                        (1.0 / 16 + static_cast<double>(p.rows) / 512);
  return cycles < kSerialCycles ? 1 : p.threads;
}

// X Wᵀ. 32 rows of W at a time meet up to 48 rows of x, or 16 up to 80: C, at most six tiles, stays where it is over all of
// the contraction. Between two steps of the tile unit the vector units decode a slice of the rows of W that come next, in
// groups of 128 of the contraction. x streams from L2.
//
//   rows <= 80   W goes through 16 KB of L1, one group ahead
//   more         a panel of 32 rows of W, at most 256 KB, lies in L2 and meets one set of 48 rows after the other, while the
//                next panel is decoded
//   x            up to 256 rows; a contraction for which they, or a panel, would outgrow L2 goes in parts, C to memory
//                in between
class Pipeline {
 public:
  explicit Pipeline(const MatmulParams& params) : p(params) {
    w_groups = ceil_div(p.inner, kGroupDepth);
    u_groups = ceil_div(p.rank, kGroupDepth);
    block_rows = round_up(ceil_div(p.rows, ceil_div(p.rows, kMaxRows)), 16);
    tiles = block_rows / 16;
    unit_tiles = tiles > kSetTiles && tiles <= kLongSetTiles ? 1 : 2;
    sets = unit_tiles == 1 ? 1 : ceil_div(tiles, kSetTiles);
    parts = ceil_div(w_groups, min_of(kXBytes / (tiles * kGroupBytes), sets == 1 ? w_groups : kPanelGroups));
    ahead = sets == 1 ? 1 : ceil_div(w_groups, parts);
    unit_rows = 16 * unit_tiles;
    unit_bytes = unit_tiles * tiles * kTileBytes;
    units = ceil_div(p.outputs, unit_rows);
    ranges = parts == 1 ? 1 : ceil_div(units * unit_bytes, kPartialBytes);
    threads = pipeline_threads(p);
  }

  void run() {
    const int64_t x_bytes = tiles * (ceil_div(w_groups, parts) + u_groups) * kGroupBytes;
    const int64_t partial_bytes = parts > 1 ? ceil_div(units, ranges) * unit_bytes : 0;
    const int64_t own_bytes =
        static_cast<int64_t>(sizeof(Own)) + 2 * ahead * 2 * kGroupBytes + 2 * unit_bytes;
    char* memory =
        static_cast<char*>(scratch(static_cast<size_t>(x_bytes + partial_bytes + threads * own_bytes)));
    x_packed = reinterpret_cast<Bf16*>(memory);
    partial = reinterpret_cast<float*>(memory + x_bytes);
    char* own = memory + x_bytes + partial_bytes;

    const uint32_t mode = FloatMode::current();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const FloatMode guard(mode);
      tile_configure(tile_shapes(16));
      for (int64_t m0 = 0; m0 < p.rows; m0 += block_rows) {
        // All parts of one range of outputs, then the next range.
        for (int64_t job = 0; job < ranges * parts; ++job) {
          const int64_t range = job / parts, part = job % parts;
          const int64_t groups = part_begin(part + 1) - part_begin(part) + (part + 1 == parts ? u_groups : 0);
          const int64_t first = claim(range_begin(range) + thread_index() - team_size());
#pragma omp for schedule(static)
          for (int64_t i = 0; i < tiles * groups; ++i) pack(m0, part, i / groups, i % groups);
          Worker(*this, own + thread_index() * own_bytes, m0, range, part).run(first);
          const bool another = job + 1 < ranges * parts;
          if (!another && m0 + block_rows >= p.rows) continue;
#pragma omp barrier
#pragma omp single
          claimed = another ? range_begin((job + 1) / parts) : 0;
        }
      }
      tile_release();
    }
  }

 private:
  static constexpr int64_t kMaxRows = 256, kSetTiles = 3, kLongSetTiles = 5;
  static_assert(kLongSetTiles == 5, "multiply<5> takes what is more than four tiles");
  static constexpr int64_t kXBytes = 1 << 20;        // of x in tiles: half of an L2 cache
  static constexpr int64_t kPartialBytes = 8 << 20;  // of C between two parts
  static constexpr int64_t kUnit = 32;               // rows of W in a panel, at most: a line of out in bf16
  static constexpr int64_t kFewUnits = 16;           // for each thread
  static constexpr int64_t kPanelGroups = 32;        // of it in L2; twice 256 KB
  static constexpr int64_t kGroupDepth = 128, kGroupSteps = 4;
  static constexpr int64_t kGroupBytes = kGroupSteps * kTileBytes;  // of 16 rows
  static constexpr int64_t kPanelGroup = 2 * kGroupSteps * kTile;   // of a panel: [step][32 rows]
  static constexpr int64_t kSlice = 8;                              // rows that are decoded at a time

  // What a thread has for itself, besides two panels (or groups) of W and the sums of two units.
  struct Own {
    alignas(64) Bf16 u[kPanelGroup];
    alignas(64) float rows[16][kUnit];
    alignas(64) float scales[kUnit][16];
  };

  int64_t part_begin(int64_t part) const { return w_groups * part / parts; }
  int64_t range_begin(int64_t range) const { return units * range / ranges; }
  int64_t set_begin(int64_t set) const { return tiles * set / sets; }
  // [set][step][its tiles]; `groups`: those of the part, with the addend's
  Bf16* x_set(int64_t set, int64_t groups) const {
    return x_packed + set_begin(set) * kGroupSteps * groups * kTile;
  }
  // What a thread takes after `last`: whatever is free; of few units each its share, because units are claimed two ahead.
  int64_t claim(int64_t last) {
    if (units < kFewUnits * ranges * threads) return last + team_size();
    int64_t unit;  // each its first before anyone its second
#pragma omp atomic capture
    unit = claimed++;
    return unit;
  }

  // Four steps of 16 rows of x: tile[q][m][2], missing values zero. In a group of 128 k, tile j holds k = 4 i + j in the
  // order of i: what look_up makes of 4-bit words. Eight k are a 128-bit lane of pairs (k, k + 4). t comes after x, in
  // natural order.
  void pack(int64_t m0, int64_t part, int64_t tile, int64_t group) const {
    const int64_t begin = part_begin(part), groups = part_begin(part + 1) - begin;
    const bool addend = group >= groups;
    const int64_t c = kGroupDepth * (addend ? group - groups : begin + group);
    const int64_t length = min_of(kGroupDepth, (addend ? p.rank : p.inner) - c);
    alignas(64) Bf16 in[16][kGroupDepth];
    for (int64_t r = 0; r < 16; ++r) {
      const int64_t m = m0 + 16 * tile + r, n = m < p.rows ? length : 0;
      if (n) read_row(addend ? p.t : p.x, m, c, n, in[r]);
      std::memset(in[r] + n, 0, static_cast<size_t>(kGroupDepth - n) * sizeof(Bf16));
    }
    const int64_t set = ((tile + 1) * sets - 1) / tiles, set_tiles = set_begin(set + 1) - set_begin(set);
    const int64_t all = groups + (part + 1 == parts ? u_groups : 0);
    Bf16* out = x_set(set, all) + (kGroupSteps * group * set_tiles + tile - set_begin(set)) * kTile;
    const __m512i pairs =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    alignas(64) float words[16][16];
    for (int64_t v = 0; v < kGroupSteps; ++v) {
      if (addend) {
        transpose(reinterpret_cast<const float*>(in) + 16 * v, kGroupDepth / 2,
                  reinterpret_cast<float*>(out + v * set_tiles * kTile), 16);
        continue;
      }
      for (int r = 0; r < 16; ++r)
        _mm512_store_si512(words[r], _mm512_shuffle_epi8(_mm512_load_si512(in[r] + 32 * v), pairs));
      transpose(words[0], 16, words[0], 16);
      for (int d = 0; d < 16; ++d)
        _mm512_store_ps(out + d % 4 * set_tiles * kTile + 32 * (4 * v + d / 4), _mm512_load_ps(words[d]));
    }
  }

  class Worker {
   public:
    Worker(Pipeline& pipeline, char* memory, int64_t m0_, int64_t range, int64_t part)
        : l(pipeline),
          p(pipeline.p),
          own(*reinterpret_cast<Own*>(memory)),
          w(reinterpret_cast<Bf16*>(memory + sizeof(Own))),
          m0(m0_),
          begin(l.part_begin(part)),
          end(l.part_begin(part + 1)),
          unit0(l.range_begin(range)),
          unit_end(l.range_begin(range + 1)),
          first_part(part == 0),
          last_part(part + 1 == l.parts),
          in_place(p.weight4.absmax.values && p.weight4.log2_blocksize == 6),
          epilogue(p) {
      for (int i = 0; i < 2; ++i)
        sums[i] = reinterpret_cast<float*>(w + 2 * l.ahead * kPanelGroup) + i * l.unit_bytes / 4;
    }

    void run(int64_t first) {
      if (first >= unit_end) return;
      unit = first;
      after = l.claim(unit);
      later = l.claim(after);
      enter(unit, after);
      for (int64_t i = 0; i < (l.sets == 1 ? 1 : end - begin); ++i)
        four_steps(l.unit_rows / kSlice, [](int64_t) {});
      for (; unit < unit_end; unit = after, after = later, later = l.claim(after)) {
        const int64_t outputs = min_of(l.unit_rows, p.outputs - l.unit_rows * unit);
        float* c = last_part ? sums[made] : l.partial + (unit - unit0) * l.unit_bytes / 4;
        const float* from = first_part ? nullptr : l.partial + (unit - unit0) * l.unit_bytes / 4;
        if (l.sets > 1) {
          turn();
          enter(after, later);
        }
        for (int64_t set = 0; set < l.sets; ++set) {
          const int64_t at = l.unit_tiles * l.set_begin(set) * kSums;
          switch (l.set_begin(set + 1) - l.set_begin(set)) {
            case 1:
              multiply<1>(set, from ? from + at : nullptr, c + at);
              break;
            case 2:
              multiply<2>(set, from ? from + at : nullptr, c + at);
              break;
            case 3:
              multiply<3>(set, from ? from + at : nullptr, c + at);
              break;
            case 4:
              multiply<4>(set, from ? from + at : nullptr, c + at);
              break;
            default:
              multiply<5>(set, from ? from + at : nullptr, c + at);
          }
        }
        if (!last_part) continue;
        write_rest();
        rest = {0, static_cast<int>(5 * ceil_div(min_of(l.block_rows, p.rows - m0), 16)), l.unit_rows * unit,
                outputs, c};
        epilogue.begin(rest.o0, outputs, columns);
        made ^= 1;
      }
      write_rest();
    }

   private:
    // What is decoded next; without rows, nothing.
    struct Source {
      int64_t o0 = 0, rows = 0, group = 0, slice = 0;
      bool whole = false;  // all rows, absmax where it lies
      int64_t scales_run = 0;
      // What is fetched meanwhile: from here on, so far from group to group and row to row.
      uintptr_t ahead = 0;
      int64_t ahead_group = 0, ahead_row = 0;
    };
    // A unit whose sums are complete: what is left to do, in pieces.
    struct Rest {
      int piece = 0, pieces = 0;
      int64_t o0 = 0, outputs = 0;
      const float* sums = nullptr;
    };

    Bf16* w_group(int at, int64_t group) {
      return w + (at * l.ahead + (l.sets == 1 ? 0 : group - begin)) * kPanelGroup;
    }
    // What was decoded is multiplied from now on.
    void turn() { side ^= 1; }

    // A panel is decoded from now on, and the one after it fetched.
    void enter(int64_t panel, int64_t next) {
      const Weight4& w4 = p.weight4;
      source.o0 = l.unit_rows * panel;
      source.rows = panel < unit_end ? min_of(l.unit_rows, p.outputs - source.o0) : 0;
      source.group = begin;
      source.slice = 0;
      due = 0;
      source.whole = in_place && source.rows == l.unit_rows;
      if (!source.rows) return;
      const int64_t start =
          (next < unit_end ? l.unit_rows * next : source.o0) * p.inner + kGroupDepth * begin;
      source.ahead = reinterpret_cast<uintptr_t>(w4.packed) + static_cast<uintptr_t>(start >> 1);
      // Whole rows are fetched in the order in which they lie.
      source.ahead_group = l.parts == 1 ? 64 * l.unit_rows : 64;
      source.ahead_row = l.parts == 1 ? 64 : p.inner >> 1;
      const int64_t length = min_of(kGroupDepth * end, p.inner) - kGroupDepth * begin;
      const int64_t size = w4.absmax.values ? 4 : 1;
      const uintptr_t absmax = w4.absmax.values ? reinterpret_cast<uintptr_t>(w4.absmax.values)
                                                : reinterpret_cast<uintptr_t>(w4.absmax.codes);
      for (int64_t r = 0; r < l.unit_rows; ++r) {
        const int64_t flat = start + r * p.inner;
        const int64_t last = ((flat + length - 1) >> w4.log2_blocksize) * size;
        for (int64_t at = (flat >> w4.log2_blocksize) * size; at <= last; at += 64)
          prefetch_l2(absmax + static_cast<uintptr_t>(at));
      }
    }

    // Where a group of whole rows is being decoded.
    struct Rows {
      const uint8_t* bytes;
      const float* absmax;
      Bf16* out;
      uintptr_t ahead;
      const int64_t row_bytes, row_blocks, ahead_row;
      const __m512 code;

      inline __attribute__((always_inline)) void decode_slice() {
#pragma GCC unroll 8
        for (int i = 0; i < kSlice; ++i) {
          prefetch_l2(ahead);
          look_up(_mm512_loadu_si512(bytes), second_half(), scaled_table(code, absmax[0], absmax[1]), out,
                  2 * kTile);
          bytes += row_bytes;
          absmax += row_blocks;
          out += kStepDepth;
          ahead += static_cast<uintptr_t>(ahead_row);
        }
      }
    };

    // step(0) … step(3), and among them `slices` slices of what is to be decoded. They lie in one group (4 of them, 2 and 2,
    // 1, 1 and 2, one, or none), whose pointers stay in registers: fetching these for each slice took 3 to 6 % of the time up
    // to 48 rows.
    template <class Step>
    inline __attribute__((always_inline)) void four_steps(int64_t slices, const Step& step) {
      if (!source.rows) slices = 0;
      const auto due_after = [&](int64_t s) {
        return (s + 1) * slices / kGroupSteps > s * slices / kGroupSteps;
      };
      const int64_t r = kSlice * source.slice, o = source.o0 + r;
      Bf16* out = w_group(side ^ 1, source.group) + r * kStepDepth;
      uintptr_t ahead = source.ahead + static_cast<uintptr_t>((source.group - begin) * source.ahead_group +
                                                              r * source.ahead_row);
      if (source.whole && kGroupDepth * (source.group + 1) <= p.inner) {
        const Weight4& w4 = p.weight4;
        const int64_t row_bytes = p.inner >> 1, row_blocks = p.inner >> 6;
        Rows rows = {w4.packed + 64 * source.group + o * row_bytes,
                     w4.absmax.values + 2 * source.group + o * row_blocks,
                     out,
                     ahead,
                     row_bytes,
                     row_blocks,
                     source.ahead_row,
                     _mm512_loadu_ps(code_table(w4.quant_type))};
#pragma GCC unroll 4
        for (int64_t s = 0; s < kGroupSteps; ++s) {
          step(s);
          if (due_after(s)) rows.decode_slice();
        }
      } else {
        for (int64_t s = 0, row = 0; s < kGroupSteps; ++s) {
          step(s);
          if (!due_after(s)) continue;
          decode_some(r + row, ahead + static_cast<uintptr_t>(row * source.ahead_row),
                      out + row * kStepDepth);
          row += kSlice;
        }
      }
      source.slice += slices;
      if (kSlice * source.slice == l.unit_rows) {
        source.slice = 0;
        ++source.group;
      }
    }

    // The same for rows that may not be there, half a group, and absmax that has to be spread out.
    __attribute__((noinline)) void decode_some(int64_t from, uintptr_t ahead, Bf16* out) {
      const Weight4& w4 = p.weight4;
      const __m512 code = _mm512_loadu_ps(code_table(w4.quant_type));
      const int64_t c = kGroupDepth * source.group;
      const bool spread = !in_place && (source.group == begin || source.group % 8 == 0);
      if (spread) source.scales_run = c >> 6;
      for (int64_t r = from; r < min_of(from + kSlice, source.rows); ++r, out += kStepDepth) {
        const int64_t start = (source.o0 + r) * p.inner + c;
        prefetch_l2(ahead);
        ahead += static_cast<uintptr_t>(source.ahead_row);
        if (spread) absmax_runs(w4, start, min_of<int64_t>(16, (p.inner - c) >> 6), own.scales[r]);
        const float* absmax =
            in_place ? w4.absmax.values + (start >> 6) : own.scales[r] + (c >> 6) - source.scales_run;
        const uint8_t* bytes = w4.packed + (start >> 1);
        if (c + kGroupDepth <= p.inner) {
          look_up(_mm512_loadu_si512(bytes), second_half(), scaled_table(code, absmax[0], absmax[1]), out,
                  2 * kTile);
        } else {  // the other half is zero
          const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
          look_up(_mm512_zextsi256_si512(words), second_half(), scaled_table(code, absmax[0], 0.0f), out,
                  2 * kTile);
        }
      }
    }

    static __m512i second_half() {
      return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x1010), 1);
    }

    int64_t u_steps(int64_t group) const {
      return min_of(kGroupSteps, ceil_div(p.rank - kGroupDepth * group, kStepDepth));
    }

    // A group of u.
    __attribute__((noinline)) void read_addend(int64_t group) {
      const int64_t o0 = l.unit_rows * unit;
      for (int64_t r = 0; r < min_of(l.unit_rows, p.outputs - o0); ++r) {
        for (int64_t s = 0; s < u_steps(group); ++s) {
          const int64_t c = kGroupDepth * group + kStepDepth * s;
          const int64_t n = min_of<int64_t>(kStepDepth, p.rank - c);
          Bf16* row = own.u + 2 * s * kTile + r * kStepDepth;
          read_row(p.u, o0 + r, c, n, row);
          std::memset(row + n, 0, static_cast<size_t>(kStepDepth - n) * sizeof(Bf16));
        }
      }
    }

    // The panel against T tiles of x, from sums that may be there already.
    template <int T>
    void multiply(int64_t set, const float* from, float* c) {
      const int64_t u_groups = last_part ? l.u_groups : 0;
      const Bf16* x = l.x_set(set, end - begin + u_groups);
      begin_sums<T>(from);
      for (int64_t group = begin; group < end; ++group) {
        if (l.sets == 1) {
          turn();
          if (group + 1 == end) enter(after, later);
        }
        const Bf16* w_steps = w_group(side, group);
        due += l.unit_rows / kSlice;
        four_steps(due / l.sets, [&](int64_t s) __attribute__((always_inline)) {
          products<T>(w_steps + s * 2 * kTile, x);
          x += T * kTile;
        });
        due %= l.sets;
        if (rest.piece < rest.pieces) write_piece();
      }
      for (int64_t group = 0; group < u_groups; ++group) {
        if (set == 0 || u_groups > 1) read_addend(group);
        for (int64_t s = 0; s < u_steps(group); ++s, x += T * kTile) products<T>(own.u + 2 * s * kTile, x);
      }
      end_sums<T>(c);
    }

    // C tile 2 j + i: W's tile i, x's tile j; with one tile of W, j.
    template <int T>
    static constexpr int kSetSums = T > kSetTiles ? T : 2 * T;
    template <int T, int N = 0>
    static void begin_sums(const float* from) {
      if constexpr (N < kSetSums<T>) {
        from ? tile_load<N>(from + N * kSums, kRow) : tile_zero<N>();
        begin_sums<T, N + 1>(from);
      }
    }
    template <int T, int N = 0>
    static void end_sums(float* c) {
      if constexpr (N < kSetSums<T>) {
        tile_store<N>(c + N * kSums, kRow);
        end_sums<T, N + 1>(c);
      }
    }

    // W's tile, which is there, against x's.
    template <int T, int N = 0>
    static inline __attribute__((always_inline)) void row_products(const Bf16* x) {
      if constexpr (N < T) {
        constexpr int kFree = T + 1 + N % (7 - T);
        tile_stream<kFree>(x + N * kTile, kRow);
        tile_dpbf16<N, T, kFree>();
        row_products<T, N + 1>(x);
      }
    }

    // A step. What comes from L2 for once is streamed.
    template <int T>
    static inline __attribute__((always_inline)) void products(const Bf16* w, const Bf16* x) {
      if constexpr (T < 3) {
        tile_stream<6>(x, kRow);
        tile_load<4>(w, kRow);
        tile_dpbf16<0, 4, 6>();
        tile_load<5>(w + kTile, kRow);
        tile_dpbf16<1, 5, 6>();
        if constexpr (T == 2) {
          tile_stream<7>(x + kTile, kRow);
          tile_dpbf16<2, 4, 7>();
          tile_dpbf16<3, 5, 7>();
        }
      } else if constexpr (T > kSetTiles) {
        tile_load<T>(w, kRow);
        row_products<T>(x);
      } else {  // two tiles are left for five operands; W's come a second time, from L1
        tile_load<6>(w, kRow);
        tile_stream<7>(x, kRow);
        tile_dpbf16<0, 6, 7>();
        tile_load<6>(w + kTile, kRow);
        tile_dpbf16<1, 6, 7>();
        tile_stream<7>(x + kTile, kRow);
        tile_dpbf16<3, 6, 7>();
        tile_load<6>(w, kRow);
        tile_dpbf16<2, 6, 7>();
        tile_stream<7>(x + 2 * kTile, kRow);
        tile_dpbf16<4, 6, 7>();
        tile_load<6>(w + kTile, kRow);
        tile_dpbf16<5, 6, 7>();
      }
    }

    // A fifth of 16 rows of the unit: its tiles, one or two, are turned, then four rows at a time are written.
    __attribute__((noinline)) void write_piece() {
      const int64_t t = rest.piece / 5, r = 4 * (rest.piece % 5 - 1), m = m0 + 16 * t + r;
      ++rest.piece;
      if (r < 0) {
        const float* c = rest.sums + l.unit_tiles * t * kSums;
        transpose(c, 16, own.rows[0], kUnit);
        if (rest.outputs > 16) transpose(c + kSums, 16, own.rows[0] + 16, kUnit);
      } else if (m < p.rows) {
        epilogue.write_rows(m, min_of<int64_t>(4, p.rows - m), rest.o0, rest.outputs, own.rows[r], kUnit);
      }
    }
    void write_rest() {
      while (rest.piece < rest.pieces) write_piece();
    }

    Pipeline& l;
    const MatmulParams& p;
    Own& own;
    Bf16* w;  // [side][group][step][2 tiles]
    float* sums[2];
    const int64_t m0, begin, end;   // rows of x; groups
    const int64_t unit0, unit_end;  // the range's first, and its end
    const bool first_part, last_part, in_place;
    int64_t unit = 0, after = 0, later = 0;  // that this thread has claimed
    int side = 0, made = 0;
    int64_t due = 0;  // slices to decode, times sets
    Epilogue epilogue;
    Epilogue::Columns<kUnit> columns;
    Source source;
    Rest rest;
  };

  const MatmulParams& p;
  int64_t w_groups, u_groups;
  int64_t block_rows, tiles, sets;  // of x
  int64_t parts;                    // of the contraction
  int64_t ahead;                    // groups that are decoded before they are multiplied, at most
  int64_t unit_tiles, unit_rows;    // of W in a panel
  int64_t unit_bytes;               // of C
  int64_t units, ranges;            // of outputs
  int threads;
  int64_t claimed = 0;
  Bf16* x_packed = nullptr;
  float* partial = nullptr;
};

// dY W: 16 rows of dY are A, 32 rows of W in pairs B. A chunk is up to 8 steps of 2 x 2 C tiles, and up to 512 columns; the
// next chunk of W is decoded into L2 while this one is multiplied. C goes out after a chunk to a 4 KB buffer and is added to
// the sums with vector instructions during the next block.
class TransposedPipeline {
 public:
  explicit TransposedPipeline(const MatmulParams& params) : p(params) {
    w_steps = ceil_div(p.inner, kStepDepth);
    steps = w_steps + ceil_div(p.rank, kStepDepth);
    block_rows = round_up(ceil_div(p.rows, ceil_div(p.rows, kMaxRows)), 32);
    x_tiles = ceil_div(min_of(block_rows, p.rows), 16);
    const int64_t groups = ceil_div(steps, 4);
    chunks = ceil_div(groups, kChunkGroups);
    w_stride = 4 * ceil_div(groups, chunks) * kTile + 32;

    threads = pipeline_threads(p);
    // Panels: wide, so that x is seldom fetched, but W's tiles stay in L2 and all threads end together.
    width = kMaxWidth;
    for (int64_t narrower = width - 64; narrower > 0; narrower -= 64)
      if (20 * busiest(narrower) < 19 * busiest(width)) width = narrower;
    w_tiles = width / 16;
    panels = ceil_div(p.outputs, width);
  }

  void run() {
    const int64_t x_bytes = x_tiles * steps * kTileBytes;
    const int64_t own_bytes = 2 * w_tiles * w_stride * 2 + (w_tiles * x_tiles + 4 + 4) * kTileBytes;
    char* memory = static_cast<char*>(scratch(static_cast<size_t>(x_bytes + own_bytes * threads)));
    x_packed = reinterpret_cast<Bf16*>(memory);
    char* own = memory + x_bytes;

    const uint32_t mode = FloatMode::current();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const FloatMode guard(mode);
      Worker k(*this, own + own_bytes * thread_index());
      tile_configure(tile_shapes(16));
      for (int64_t m0 = 0; m0 < p.rows; m0 += block_rows) {
        const int64_t rows = min_of(block_rows, p.rows - m0);
        const int64_t groups = ceil_div(steps, 4);
        const int64_t first = claim();  // each its first before anyone its second
#pragma omp for schedule(static)
        for (int64_t i = 0; i < ceil_div(rows, 16) * groups; ++i) pack(m0, rows, i / groups, i % groups);
        k.run(m0, rows, first);
        if (m0 + block_rows < p.rows) {
#pragma omp barrier
#pragma omp single
          claimed = 0;
        }
      }
      tile_release();
    }
  }

 private:
  static constexpr int64_t kMaxRows = 256;
  static constexpr int kMaxWidth = 512;
  static constexpr int64_t kChunkGroups = 2;  // of four steps
  static constexpr int64_t kPrefetchBytes = 512 << 10;

  // Outputs of the thread that has most.
  int64_t busiest(int64_t w) const { return ceil_div(ceil_div(p.outputs, w), threads) * w; }
  int64_t chunk_begin(int64_t chunk) const { return 4 * (ceil_div(steps, 4) * chunk / chunks); }
  int64_t chunk_end(int64_t chunk) const { return min_of(steps, chunk_begin(chunk + 1)); }
  Bf16* x_tile(int64_t tile, int64_t step) const { return x_packed + (tile * steps + step) * kTile; }

  int64_t claim() {
    int64_t panel;
#pragma omp atomic capture
    panel = claimed++;
    return panel;
  }

  // A step of row m of x (t beyond w_steps), the rest and missing rows zero.
  void read_x(int64_t step, int64_t m, bool valid, Bf16* out) const {
    const bool addend = step >= w_steps;
    const int64_t c = kStepDepth * (addend ? step - w_steps : step);
    const int64_t n = valid ? min_of<int64_t>(kStepDepth, (addend ? p.rank : p.inner) - c) : 0;
    if (n) read_row(addend ? p.t : p.x, m, c, n, out);
    std::memset(out + n, 0, static_cast<size_t>(kStepDepth - n) * sizeof(Bf16));
  }

  // Four steps of 16 rows of x: tile[m][c].
  void pack(int64_t m0, int64_t rows, int64_t tile, int64_t group) const {
    for (int64_t s = 4 * group; s < min_of(steps, 4 * group + 4); ++s)
      for (int64_t r = 0; r < 16; ++r)
        read_x(s, m0 + 16 * tile + r, 16 * tile + r < rows, x_tile(tile, s) + kStepDepth * r);
  }

  // A chunk of a panel on its way into tiles, and what is fetched into L2 meanwhile.
  struct Job {
    int64_t o0 = 0, outputs = 0;
    int64_t begin = 0, end = 0;  // steps
    int64_t next = 0;            // the first output of the panel after this one
    int64_t unit = 0, units = 0;
    Bf16* tiles = nullptr;
  };

  // A block of C tiles after its last step: what is left to do, in pieces. First the sums in `part` are added
  // to C, then, if the contraction is complete, its rows are written out.
  struct Rest {
    int piece = 0, pieces = 0, rate = 0;
    int adds = 0;
    int64_t nx = 0, w0 = 0, x0 = 0;
    int64_t o0 = 0;
    float* c = nullptr;
  };

  class Worker {
   public:
    Worker(TransposedPipeline& pipeline, char* memory) : l(pipeline), p(pipeline.p), epilogue(pipeline.p) {
      const int64_t w_bytes = l.w_tiles * l.w_stride * 2;
      w_packed[0] = reinterpret_cast<Bf16*>(memory);
      w_packed[1] = reinterpret_cast<Bf16*>(memory + w_bytes);
      sums = reinterpret_cast<float*>(memory + 2 * w_bytes);
      part = sums + l.w_tiles * l.x_tiles * kSums;
      rows_out = part + 4 * kSums;
    }

    void run(int64_t m0_, int64_t rows_, int64_t panel) {
      m0 = m0_;
      rows = rows_;
      int64_t chunk = 0;
      if (panel >= l.panels) return;
      int64_t after = l.claim();
      int buffer = 0;
      begin_job(panel, chunk, after, buffer);
      finish_job();
      for (;;) {
        int64_t next_panel = panel, next_chunk = chunk + 1;
        if (next_chunk == l.chunks) {
          next_panel = after;
          next_chunk = 0;
          if (after < l.panels) after = l.claim();
        }
        const bool more = next_panel < l.panels;
        if (more) {
          begin_job(next_panel, next_chunk, after, buffer ^ 1);
        } else {
          job.unit = job.units = 0;
        }
        multiply(panel, chunk, w_packed[buffer], l.chunk_begin(next_chunk));
        finish_job();
        if (!more) break;
        panel = next_panel;
        chunk = next_chunk;
        buffer ^= 1;
      }
      finish_rest();
    }

   private:
    int64_t panel_outputs(int64_t panel) const { return min_of(l.width, p.outputs - panel * l.width); }

    void begin_job(int64_t panel, int64_t chunk, int64_t after, int buffer) {
      job.o0 = panel * l.width;
      job.outputs = panel_outputs(panel);
      job.begin = l.chunk_begin(chunk);
      job.end = l.chunk_end(chunk);
      job.next = after < l.panels ? after * l.width : job.o0;
      job.unit = 0;
      job.units = 16 * (job.end - job.begin);
      job.tiles = w_packed[buffer];
    }
    void finish_job() { decode(job.units - job.unit); }
    void finish_rest() {
      while (rest.piece < rest.pieces) finish_piece();
    }

    void decode(int64_t units) {
      if (!units) return;
      decode_pairs(job.unit, job.unit + units);
      job.unit += units;
    }

    void prefetch_absmax(int64_t flat) const {
      const Absmax& a = p.weight4.absmax;
      const uintptr_t block = static_cast<uintptr_t>(flat >> p.weight4.log2_blocksize);
      prefetch_l2(a.values ? reinterpret_cast<uintptr_t>(a.values) + 4 * block
                           : reinterpret_cast<uintptr_t>(a.codes) + block);
    }

    // Pairs of rows of W (and uᵀ), counted from the chunk's first, all columns of the panel. The words of
    // both rows alternate before the look-up, so that pairs come out: tile j of a group of 64 columns holds
    // the columns 4 i + j in the order of i.
    __attribute__((noinline)) void decode_pairs(int64_t first, int64_t last) {
      const Weight4& w = p.weight4;
      const int64_t next_tile = l.w_stride;
      const __m512 code = _mm512_loadu_ps(code_table(w.quant_type));
      const __m512i second = _mm512_set1_epi32(0x10100000);
      alignas(64) static constexpr uint16_t kAlternate[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                              21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512i alternate = _mm512_load_si512(kAlternate);
      const uintptr_t packed = reinterpret_cast<uintptr_t>(w.packed);
      alignas(64) float buffer[2][16];
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t step = job.begin + unit / 16;
        Bf16* out = job.tiles + unit / 16 * kTile + unit % 16 * 32;
        if (step >= l.w_steps) {
          read_pair(kStepDepth * (step - l.w_steps) + 2 * (unit % 16), out);
          continue;
        }
        const int64_t c = kStepDepth * step + 2 * (unit % 16);
        if (c >= p.inner) {
          for (int64_t t = 0; t < job.outputs / 16; ++t)
            _mm512_store_si512(out + t * next_tile, _mm512_setzero_si512());
          continue;
        }
        const bool odd = c + 1 == p.inner;  // the second row of the pair is not there: absmax 0
        const int64_t start0 = c * p.outputs + job.o0;
        const int64_t start1 = odd ? start0 : start0 + p.outputs;
        const float* absmax0 = absmax_runs(w, start0, job.outputs >> 6, buffer[0]);
        const float* absmax1 = absmax_runs(w, start1, job.outputs >> 6, buffer[1]);
        const uint8_t* bytes0 = w.packed + (start0 >> 1);
        const uint8_t* bytes1 = w.packed + (start1 >> 1);
        const bool here = c + kRowsAhead < p.inner;
        const int64_t ahead =
            (c + kRowsAhead - (here ? 0 : p.inner)) * p.outputs + (here ? job.o0 : job.next);
        for (int64_t i = 0; i < job.outputs; i += 128) {
          prefetch_l2(packed + static_cast<uintptr_t>((ahead + i) >> 1));
          prefetch_l2(packed + static_cast<uintptr_t>((ahead + p.outputs + i) >> 1));
        }
        prefetch_absmax(ahead);
        prefetch_absmax(ahead + p.outputs);
        for (int64_t run = 0; run < job.outputs >> 6; ++run, out += 4 * next_tile) {
          const float a0 = absmax0[run], a1 = odd ? 0.0f : absmax1[run];
          const __m256i row0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes0 + 32 * run));
          const __m256i row1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes1 + 32 * run));
          const __m512i words =
              _mm512_permutexvar_epi16(alternate, _mm512_inserti64x4(_mm512_castsi256_si512(row0), row1, 1));
          look_up(words, second, scaled_table(code, a0, a1), out, next_tile);
        }
      }
    }

    // Rows r, r + 1 of uᵀ, in the order of decode_pairs.
    void read_pair(int64_t r, Bf16* out) const {
      alignas(64) Bf16 values[2][kMaxWidth];
      const Matrix u = peftkern::PEFTKERN_ISA::transposed(p.u);
      for (int i = 0; i < 2; ++i) {
        if (r + i < p.rank) {
          read_row(u, r + i, job.o0, job.outputs, values[i]);
        } else {
          std::memset(values[i], 0, static_cast<size_t>(job.outputs) * sizeof(Bf16));
        }
      }
      for (int64_t o = 0; o < job.outputs; o += 64) {
        for (int i = 0; i < 2; ++i) Bf16Panels::reorder(values[i] + o);
        for (int64_t t = o / 16; t < o / 16 + 4; ++t)
          Bf16Panels::interleave(values[0] + 16 * t, values[1] + 16 * t, 1, out + t * l.w_stride);
      }
    }

    // One chunk of a panel against every row of x. x stays in L1 while the panel's tiles pass, two by two.
    void multiply(int64_t panel, int64_t chunk, const Bf16* tiles, int64_t next_step) {
      const int64_t outputs = panel_outputs(panel);
      const int64_t begin = l.chunk_begin(chunk), n = l.chunk_end(chunk) - begin;
      const bool first = chunk == 0, last = chunk + 1 == l.chunks;
      const int64_t nw_all = outputs / 16, nx_all = ceil_div(rows, 16);  // outputs are whole groups of 64
      const int64_t w_blocks = nw_all / 2;
      all_steps = n * w_blocks * ceil_div(nx_all, 2);
      due = 0;
      const bool fetch = l.x_tiles * l.steps * kTileBytes > kPrefetchBytes;
      for (int64_t x0 = 0; x0 < nx_all; x0 += 2) {
        const Bf16* next_x = x0 + 2 < nx_all ? l.x_tile(x0 + 2, begin) : l.x_tile(0, next_step);
        for (int64_t w0 = 0; w0 < nw_all; w0 += 2) {
          // the next two rows of x tiles: each block fetches its share of every step's 32 lines
          const int64_t line = 16 * w0 / w_blocks;
          x_ahead = reinterpret_cast<uintptr_t>(next_x) +
                    static_cast<uintptr_t>(line / 16 * l.steps * kTileBytes + line % 16 * 64);
          x_ahead_lines = fetch ? 16 * (w0 + 2) / w_blocks - line : 0;
          const int64_t nx = min_of<int64_t>(2, nx_all - x0);
          const Bf16* w = tiles + w0 * l.w_stride;
          const Bf16* x = l.x_tile(x0, begin);
          nx == 2 ? block<2>(w, x, n) : block<1>(w, x, n);
          finish_rest();
          rest.nx = nx;
          rest.w0 = w0;
          rest.x0 = x0;
          if (last && x0 == 0 && w0 == 0) epilogue.begin(panel * l.width, outputs, columns);
          rest.o0 = panel * l.width;
          rest.c = sums + (w0 * l.x_tiles + x0) * kSums;
          if (first) {
            store_sums(rest.c, l.x_tiles * kSums);
            rest.adds = 0;
          } else {
            store_sums(part, 2 * kSums);
            rest.adds = static_cast<int>(2 * nx);
          }
          rest.piece = 0;
          rest.pieces = rest.adds + (last ? out_pieces() : 0);
          rest.rate = static_cast<int>(ceil_div(rest.pieces, n));
        }
      }
    }

    void store_sums(float* c, int64_t next_w) const {
      tile_store<0>(c, kRow);
      if (rest.nx == 2) tile_store<1>(c + kSums, kRow);
      tile_store<2>(c + next_w, kRow);
      if (rest.nx == 2) tile_store<3>(c + next_w + kSums, kRow);
    }

    // C tile 2 i + j: W's tile i, x's tile j. W, which comes from L2, is streamed.
    template <int X>
    void block(const Bf16* w, const Bf16* x, int64_t n) {
      const int64_t next_w = l.w_stride, next_x = l.steps * kTile;
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
      for (int64_t s = 0; s < n; ++s, w += kTile, x += kTile) {
        tile_load<4>(x, kRow);
        tile_stream<6>(w, kRow);
        tile_dpbf16<0, 4, 6>();
        tile_stream<7>(w + next_w, kRow);
        tile_dpbf16<2, 4, 7>();
        if constexpr (X == 2) {
          tile_load<5>(x + next_x, kRow);
          tile_dpbf16<1, 5, 6>();
          tile_dpbf16<3, 5, 7>();
        }
        weave(s);
      }
    }

    // Between two steps: this step's share of everything that is not a tile product.
    void weave(int64_t s) {
      for (int64_t i = 0; i < x_ahead_lines; ++i)
        prefetch_l2(x_ahead + static_cast<uintptr_t>(s * kTileBytes + i * 64));
      int64_t units = 0;
      for (due += job.units; due >= all_steps; due -= all_steps) ++units;
      decode(units);
      for (int i = 0; i < rest.rate && rest.piece < rest.pieces; ++i) finish_piece();
    }

    int out_pieces() const {
      return rest.w0 % 4 ? 4 * static_cast<int>(rest.nx) : 0;  // both halves of the group
    }

    __attribute__((noinline)) void finish_piece() {
      int64_t i = rest.piece++;
      if (i < rest.adds) {
        float* c = rest.c + (i / rest.nx * l.x_tiles + i % rest.nx) * kSums;
        const float* more = part + (2 * (i / rest.nx) + i % rest.nx) * kSums;
        for (int v = 0; v < kSums; v += 16)
          _mm512_store_ps(c + v, _mm512_add_ps(_mm512_load_ps(c + v), _mm512_load_ps(more + v)));
        return;
      }
      i -= rest.adds;
      for (int64_t r = 4 * (i % 4); r < 4 * (i % 4) + 4; ++r) {
        for (int t = 0; t < 4; ++t) {
          const float* c = rest.c + ((t - 2) * l.x_tiles + i / 4) * kSums + 16 * r;
          _mm512_store_ps(rows_out + 64 + 16 * t, _mm512_load_ps(c));
        }
        Bf16Panels::restore(rows_out + 64, rows_out);
        const int64_t m = 16 * (rest.x0 + i / 4) + r;
        if (m < rows) epilogue.write(m0 + m, rest.o0 + 16 * (rest.w0 - 2), 64, rows_out);
      }
    }

    TransposedPipeline& l;
    const MatmulParams& p;
    int64_t m0 = 0, rows = 0;
    Bf16* w_packed[2];
    float *sums, *part, *rows_out;
    Epilogue epilogue;
    Epilogue::Columns<kMaxWidth> columns;  // of the panel that is being written out
    Job job;
    Rest rest;
    int64_t due = 0, all_steps = 1;
    uintptr_t x_ahead = 0;
    int64_t x_ahead_lines = 0;
  };

  const MatmulParams& p;
  int64_t w_steps, steps;  // of W alone, with the addend
  int64_t block_rows, x_tiles;
  int64_t chunks;
  int64_t w_stride;  // from a row of W's tiles to the next; a line more than they need, for other cache sets
  int threads;
  int64_t width, w_tiles, panels;
  int64_t claimed = 0;
  Bf16* x_packed = nullptr;
};

// Tiles from L1: 2 x 2 products of 4 loads, over 16 KB of noise.
struct AmxProducts {
  static constexpr int kRows = 2, kColumns = 2;
  static constexpr int kFlops = 2 * 16 * 16 * kStepDepth;
};

template <>
inline float probe_products<AmxProducts>(int64_t iterations, uint32_t seed) {
  constexpr int kSteps = 4;
  alignas(64) Bf16 tiles[kSteps][4][kTile];
  alignas(64) float c[kSums];
  for (auto& step : tiles)
    for (auto& tile : step)
      for (Bf16& value : tile) from_float(&value, noise(seed));
  tile_configure(tile_shapes(16));
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t i = 0; i < iterations; ++i) {
    const Bf16* step = tiles[i % kSteps][0];
    tile_load<6>(step, kRow);
    tile_load<4>(step + kTile, kRow);
    tile_dpbf16<0, 4, 6>();
    tile_load<5>(step + 2 * kTile, kRow);
    tile_dpbf16<2, 5, 6>();
    tile_load<7>(step + 3 * kTile, kRow);
    tile_dpbf16<1, 4, 7>();
    tile_dpbf16<3, 5, 7>();
  }
  tile_store<0>(c, kRow);
  tile_release();
  return c[0];
}

}  // namespace

void probe_bf16(const ProbeParams& p) { probe<AmxProducts>(p); }

void matmul_bf16(const MatmulParams& p) {
  if (p.rows == 0 || p.outputs == 0) return;
  if (epilogue_alone(p)) return run_epilogue(p);
  if (p.rows == 1 && p.weight4.packed && p.inner % 32 == 0 && !p.transposed) return avx512::matmul_bf16(p);
  if (p.inner > 0 && in_groups(p)) {
    if (p.transposed) return TransposedPipeline(p).run();
    return Pipeline(p).run();
  }
  if (dot_applies(p, 3)) return run_dot_bf16(p);
  if (few_outputs(p)) return run_few_outputs(p);
  if (few_rows(p)) return run_few_rows(p);
  Matmul<AmxKernel>(p).run();
}

void mora_bf16(const MoraParams& p) { Mora<AmxKernel, Bf16>(p).run(); }
void mora_grad_bf16(const MoraGradParams& p) { MoraGrad<AmxKernel, Bf16>(p).run(); }

}  // namespace peftkern::PEFTKERN_ISA
