// matmul for bf16 x on AMX tiles. TDPBF16PS multiplies 16 x 32 by 32 x 16 values in 16 cycles.
//
// A 4-bit weight with whole groups of 64 in a block (the usual case) has a pipeline of its own:
//
//   C tile 16 x 16 = A tile [16][32] · B tile [16 pairs][16][2], all of them 1 KB and contiguous
//     plain        A = 16 rows of W,  B = 16 rows of x, transposed once per call     C = outᵀ
//     transposed   A = 16 rows of x,  B = 32 rows of W in pairs                      C = out
//   a step         32 of the contraction for 2 x 2 C tiles: 4 tile loads, 4 TDPBF16PS
//   a chunk        up to 20 steps. W's tiles of the next chunk are decoded while this chunk's are multiplied:
//                  between two steps stand a slice of decoding, of adding C tiles and of writing out finished
//                  ones, so that the vector units work in the shadow of the tile unit.
//   a panel        32 … 256 outputs; one thread takes a panel through all of its chunks
//   C              goes out after a chunk to a 4 KB buffer and is added with vector instructions during the
//                  next block: loading it back into tiles would stall them. With at most 32 rows of x and a
//                  panel of 32 outputs it stays in tiles over all of the contraction.
//   addend         the contraction goes on: x with t, W with u, in natural order
//
// Decoding 128 weights: 3 shifts, 2 ternary ands, 4 VPERMW, 2 multiplies and a convert for the table, 4
// stores: 14 vector micro-operations on two ports, 7 cycles; 512 weights (an A tile) 28.
//
//   floor            rows · inner · outputs / 512 cycles of one core, or inner · outputs · 0.56 bytes of
//                    memory
//   rows <= 16       a step is 32 cycles of tiles, 56 of decoding
//   rows <= 32       64 of tiles, 56 of decoding: both units are full
//   rows = 64, 256   64 of tiles, 28 and 7 of decoding, 3 … 8 of adding C
//   loads            x from L1 and W from L2 (W from L1 and x from L2 up to 32 rows): 2 KB of each in a step
//
// The adapters' thin products read their long side where it lies. At most 3 rows: dot products. Everything
// else (dense weights, blocks that straddle rows) takes the common driver of matmul.inl.
#define PEFTKERN_ISA amx
#define PEFTKERN_VEC_BF16
#include "cpu/vec_avx512.h"

#include "cpu/matmul_bf16.inl"
#include "cpu/mora.inl"
#include "cpu/probe.inl"
#include "cpu/tile.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

constexpr int kTile = 16 * 32;  // bf16 values in an operand tile
constexpr int kSums = 16 * 16;  // fp32 values in a C tile
constexpr int kRow = 64;        // bytes from row to row of a contiguous tile
constexpr int kTileLanes = 16;
constexpr int kStepDepth = 32;

inline void prefetch_l2(uintptr_t at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

// Tiles 0 … 3: C, from 4 on: A, then B. C and A have `rows` rows; less than 16 only while tile 4 alone is A.
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

// kStays: C stays in tiles over all of the contraction.
template <bool kTransposed, bool kStays>
class Pipeline {
 public:
  explicit Pipeline(const MatmulParams& params) : p(params) {
    w_steps = kTransposed ? ceil_div(p.inner, kStepDepth) : 4 * ceil_div(p.inner, 4 * kStepDepth);
    steps = w_steps + ceil_div(p.rank, kStepDepth);
    block_rows = round_up(ceil_div(p.rows, ceil_div(p.rows, kMaxRows)), 32);
    x_tiles = ceil_div(min_of(block_rows, p.rows), 16);
    const int64_t groups = ceil_div(steps, 4);
    chunks = ceil_div(groups, kStays ? 2 : 5);
    w_stride = 4 * ceil_div(groups, chunks) * kTile + 32;

    const double cycles = static_cast<double>(p.outputs) * static_cast<double>(p.inner + p.rank) *
                          (1.0 / 16 + static_cast<double>(p.rows) / 512);
    threads = cycles < kSerialCycles ? 1 : p.threads;
    // Panels: wide, so that x is seldom fetched, but W's tiles stay in L2 and all threads end together.
    const int64_t unit = kTransposed ? 64 : 32;
    width = kStays ? 32 : (p.rows > 128 ? 256 : 128);
    for (int64_t narrower = width - unit; narrower > 0; narrower -= unit)
      if (20 * busiest(narrower) < 19 * busiest(width)) width = narrower;
    w_tiles = width / 16;
    panels = ceil_div(p.outputs, width);
  }

  void run() {
    const int64_t x_bytes = x_tiles * steps * kTileBytes;
    const int64_t own_bytes =
        2 * w_tiles * w_stride * 2 + (w_tiles * x_tiles + 4 + 4) * kTileBytes + width * kRow;
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
  static constexpr int kMaxWidth = 256;
  static constexpr int64_t kPrefetchBytes = 512 << 10;
  static constexpr double kSerialCycles = 8192;

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

  // n <= length values of row m of x (t beyond w_steps), the rest and missing rows zero.
  void read_x(int64_t step, int64_t m, bool valid, int64_t length, Bf16* out) const {
    const bool addend = step >= w_steps;
    const int64_t c = kStepDepth * (addend ? step - w_steps : step);
    const int64_t n = valid ? max_of<int64_t>(0, min_of(length, (addend ? p.rank : p.inner) - c)) : 0;
    if (n) read_row(addend ? p.t : p.x, m, c, n, out);
    std::memset(out + n, 0, static_cast<size_t>(length - n) * sizeof(Bf16));
  }

  // Four steps of 16 rows of x.
  //   transposed  tile[m][c]
  //   plain       tile[q][m][2], natural order for t; for x, in a group of 128 k, tile j holds k = 4 i + j in
  //   the order
  //               of i: what look_up makes of 4-bit words. Eight k are a 128-bit lane of pairs (k, k + 4).
  void pack(int64_t m0, int64_t rows, int64_t tile, int64_t group) const {
    const int64_t begin = 4 * group, end = min_of(steps, begin + 4);
    if constexpr (kTransposed) {
      for (int64_t s = begin; s < end; ++s)
        for (int64_t r = 0; r < 16; ++r)
          read_x(s, m0 + 16 * tile + r, 16 * tile + r < rows, kStepDepth, x_tile(tile, s) + kStepDepth * r);
      return;
    }
    alignas(64) Bf16 in[16][128];
    const bool grouped = begin < w_steps;
    for (int64_t r = 0; r < 16; ++r) {
      const bool valid = 16 * tile + r < rows;
      const int64_t m = m0 + 16 * tile + r;
      if (grouped) {
        read_x(begin, m, valid, 128, in[r]);
      } else {
        for (int64_t s = begin; s < end; ++s)
          read_x(s, m, valid, kStepDepth, in[r] + kStepDepth * (s - begin));
      }
    }
    const __m512i pairs =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    alignas(64) float words[16][16];
    for (int64_t v = 0; v < end - begin; ++v) {
      if (!grouped) {
        transpose(reinterpret_cast<const float*>(in) + 16 * v, 64,
                  reinterpret_cast<float*>(x_tile(tile, begin + v)), 16);
        continue;
      }
      for (int r = 0; r < 16; ++r)
        _mm512_store_si512(words[r], _mm512_shuffle_epi8(_mm512_load_si512(in[r] + 32 * v), pairs));
      transpose(words[0], 16, words[0], 16);
      for (int d = 0; d < 16; ++d)
        _mm512_store_ps(x_tile(tile, begin + d % 4) + 32 * (4 * v + d / 4), _mm512_load_ps(words[d]));
    }
  }

  // A chunk of a panel on its way into tiles, and what is fetched into L2 meanwhile.
  struct Job {
    int64_t o0 = 0, outputs = 0;
    int64_t begin = 0, end = 0;        // steps
    int64_t ahead = 0, ahead_row = 0;  // flat index that goes with unit 0: of the bytes, of absmax
    bool scales_new = true;  // plain: absmax of 16 runs is spread out at once and lasts for several chunks
    int64_t scales_run = 0, scales_at = 0;
    int64_t unit = 0, units = 0;
    Bf16* tiles = nullptr;
  };

  // A block of C tiles after its last step: what is left to do, in pieces. First the sums in `part` are added
  // to C, then, if the contraction is complete, its rows are written out.
  struct Rest {
    int piece = 0, pieces = 0, rate = 0;
    int adds = 0;
    int64_t nw = 0, nx = 0, w0 = 0, x0 = 0;
    int64_t o0 = 0, outputs = 0;
    float* c = nullptr;
  };

  class Worker {
   public:
    Worker(Pipeline& pipeline, char* memory) : l(pipeline), p(pipeline.p), epilogue(pipeline.p) {
      const int64_t w_bytes = l.w_tiles * l.w_stride * 2;
      w_packed[0] = reinterpret_cast<Bf16*>(memory);
      w_packed[1] = reinterpret_cast<Bf16*>(memory + w_bytes);
      sums = reinterpret_cast<float*>(memory + 2 * w_bytes);
      part = sums + l.w_tiles * l.x_tiles * kSums;
      rows_out = part + 4 * kSums;
      scales = rows_out + 4 * kSums;
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
      const int64_t next = after < l.panels ? after * l.width : job.o0;
      if (kStays) {  // the next panel, in the order in which it lies in memory
        job.ahead = next * p.inner + kStepDepth * job.begin * job.outputs;
        job.ahead_row = next * p.inner + kStepDepth * job.begin;
      } else {  // the next chunk: a whole panel would not fit
        const bool last = chunk + 1 == l.chunks;
        const int64_t c = last ? 0 : kStepDepth * job.end, o = last ? next : job.o0;
        job.ahead = job.ahead_row = kTransposed ? c * p.outputs + o : o * p.inner + c;
      }
      job.unit = 0;
      job.units = kTransposed ? 16 * (job.end - job.begin) : job.outputs;
      job.tiles = w_packed[buffer];
      const bool in_place = p.weight4.absmax.values && p.weight4.log2_blocksize == 6;
      job.scales_new = in_place || chunk == 0 || job.end / 2 > job.scales_run + 16;
      if (job.scales_new) job.scales_run = job.begin / 2;
      job.scales_at = job.begin / 2 - job.scales_run;
    }
    void finish_job() { decode(job.units - job.unit); }
    void finish_rest() {
      while (rest.piece < rest.pieces) finish_piece();
    }

    void decode(int64_t units) {
      if (!units) return;
      if constexpr (kTransposed) {
        decode_pairs(job.unit, job.unit + units);
      } else {
        decode_rows(job.unit, job.unit + units);
      }
      job.unit += units;
    }

    // Rows o0 + first … o0 + last of W (and u), all steps of the chunk.
    __attribute__((noinline)) void decode_rows(int64_t first, int64_t last) {
      const Weight4& w = p.weight4;
      const int64_t begin = kStepDepth * job.begin;
      const int64_t end = min_of(kStepDepth * min_of(job.end, l.w_steps), p.inner);
      const __m512 code = _mm512_loadu_ps(code_table(w.quant_type));
      const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x1010), 1);
      const int64_t ahead_stride = kStays ? end - begin : p.inner;
      uintptr_t ahead = reinterpret_cast<uintptr_t>(w.packed) +
                        static_cast<uintptr_t>((job.ahead + first * ahead_stride) >> 1);
      int64_t start = (job.o0 + first) * p.inner + begin;
      int64_t start_ahead = job.ahead_row + first * p.inner;
      const bool addend = job.end > l.w_steps;
      for (int64_t unit = first; unit < last; ++unit, start += p.inner, start_ahead += p.inner,
                   ahead += static_cast<uintptr_t>(ahead_stride >> 1)) {
        Bf16* out = job.tiles + (unit >> 4) * l.w_stride + (unit & 15) * kStepDepth;
        if (begin < end) {
          const uint8_t* bytes = w.packed + (start >> 1);
          const float* absmax = scales + 16 * unit;
          if (job.scales_new)
            absmax = absmax_runs(w, start, min_of<int64_t>(16, (p.inner - begin) >> 6), scales + 16 * unit);
          absmax += job.scales_at;
          prefetch_absmax(start_ahead);
          Bf16* group = out;
          int64_t left = end - begin;
          uintptr_t line = ahead;
          for (; left >= 128; left -= 128, bytes += 64, absmax += 2, group += 4 * kTile, line += 64) {
            prefetch_l2(line);
            look_up(_mm512_loadu_si512(bytes), second, scaled_table(code, absmax[0], absmax[1]), group,
                    kTile);
          }
          if (left) {  // 64 weights: the other half is zero
            const __m512i words =
                _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
            look_up(words, second, scaled_table(code, absmax[0], 0.0f), group, kTile);
          }
        }
        if (addend) read_addend(job.o0 + unit, out);
      }
    }

    // Row o of u, the chunk's steps beyond w_steps.
    __attribute__((noinline)) void read_addend(int64_t o, Bf16* out) const {
      for (int64_t s = max_of(job.begin, l.w_steps); s < job.end; ++s) {
        const int64_t r = kStepDepth * (s - l.w_steps);
        const int64_t n = min_of<int64_t>(kStepDepth, p.rank - r);
        Bf16* values = out + (s - job.begin) * kTile;
        read_row(p.u, o, r, n, values);
        std::memset(values + n, 0, static_cast<size_t>(kStepDepth - n) * sizeof(Bf16));
      }
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
        const int64_t ahead = job.ahead + 2 * unit * p.outputs;
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
      const int64_t nw_all = ceil_div(outputs, 16), nx_all = ceil_div(rows, 16);
      const int64_t w_blocks = ceil_div(nw_all, 2);
      all_steps = n * w_blocks * ceil_div(nx_all, 2);
      due = 0;
      const bool fetch = l.x_tiles * l.steps * kTileBytes > kPrefetchBytes && !kStays;
      for (int64_t x0 = 0; x0 < nx_all; x0 += 2) {
        const Bf16* next_x = x0 + 2 < nx_all ? l.x_tile(x0 + 2, begin) : l.x_tile(0, next_step);
        for (int64_t w0 = 0; w0 < nw_all; w0 += 2) {
          // the next two rows of x tiles: each block fetches its share of every step's 32 lines
          const int64_t line = 16 * w0 / w_blocks;
          x_ahead = reinterpret_cast<uintptr_t>(next_x) +
                    static_cast<uintptr_t>(line / 16 * l.steps * kTileBytes + line % 16 * 64);
          x_ahead_lines = fetch ? 16 * (w0 + 2) / w_blocks - line : 0;
          const int64_t nw = min_of<int64_t>(2, nw_all - w0), nx = min_of<int64_t>(2, nx_all - x0);
          const Bf16* w = tiles + w0 * l.w_stride;
          const Bf16* x = l.x_tile(x0, begin);
          if (nw == 2) {
            nx == 2 ? block<2, 2>(w, x, n, first || !kStays) : block<2, 1>(w, x, n, first || !kStays);
          } else {
            nx == 2 ? block<1, 2>(w, x, n, first || !kStays) : block<1, 1>(w, x, n, first || !kStays);
          }
          if (kStays && !last) continue;
          finish_rest();
          rest.nw = nw;
          rest.nx = nx;
          rest.w0 = w0;
          rest.x0 = x0;
          if (last && x0 == 0 && w0 == 0) epilogue.begin(panel * l.width, outputs, columns);
          rest.o0 = panel * l.width;
          rest.outputs = outputs;
          rest.c = sums + (w0 * l.x_tiles + x0) * kSums;
          if (first || kStays) {
            store_sums(rest.c, l.x_tiles * kSums);
            rest.adds = 0;
          } else {
            store_sums(part, 2 * kSums);
            rest.adds = static_cast<int>(nw * nx);
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
      if (rest.nw == 2) tile_store<2>(c + next_w, kRow);
      if (rest.nw == 2 && rest.nx == 2) tile_store<3>(c + next_w + kSums, kRow);
    }

    // The operand that comes from L2 is streamed.
    template <int T>
    static void load_w(const Bf16* tile) {
      kStays ? tile_load<T>(tile, kRow) : tile_stream<T>(tile, kRow);
    }
    template <int T>
    static void load_x(const Bf16* tile) {
      kStays ? tile_stream<T>(tile, kRow) : tile_load<T>(tile, kRow);
    }
    template <int I, int J>
    static void multiply_tiles() {
      if constexpr (kTransposed) {
        tile_dpbf16<2 * I + J, 4 + J, 6 + I>();
      } else {
        tile_dpbf16<2 * I + J, 4 + I, 6 + J>();
      }
    }

    // C tile 2 i + j: W's tile i, x's tile j.
    template <int W, int X>
    void block(const Bf16* w, const Bf16* x, int64_t n, bool zero) {
      constexpr int kW = kTransposed ? 6 : 4, kX = kTransposed ? 4 : 6;
      const int64_t next_w = l.w_stride, next_x = l.steps * kTile;
      if (zero) {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
      }
      for (int64_t s = 0; s < n; ++s, w += kTile, x += kTile) {
        load_x<kX>(x);
        load_w<kW>(w);
        multiply_tiles<0, 0>();
        if constexpr (W == 2) {
          load_w<kW + 1>(w + next_w);
          multiply_tiles<1, 0>();
        }
        if constexpr (X == 2) {
          load_x<kX + 1>(x + next_x);
          multiply_tiles<0, 1>();
          if constexpr (W == 2) multiply_tiles<1, 1>();
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
      if constexpr (kTransposed)
        return rest.w0 % 4 ? 4 * static_cast<int>(rest.nx) : 0;  // both halves of the group
      return static_cast<int>(rest.nx * (rest.nw + 4));
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
      if constexpr (kTransposed) {
        for (int64_t r = 4 * (i % 4); r < 4 * (i % 4) + 4; ++r) {
          for (int t = 0; t < 4; ++t) {
            const float* c = rest.c + ((t - 2) * l.x_tiles + i / 4) * kSums + 16 * r;
            _mm512_store_ps(rows_out + 64 + 16 * t, _mm512_load_ps(c));
          }
          Bf16Panels::restore(rows_out + 64, rows_out);
          write_out(16 * (rest.x0 + i / 4) + r, 16 * (rest.w0 - 2), 64, rows_out);
        }
      } else {
        const int64_t j = i / (rest.nw + 4), k = i % (rest.nw + 4);
        if (k < rest.nw) {
          transpose(rest.c + (k * l.x_tiles + j) * kSums, 16, rows_out + 16 * k, 32);
          return;
        }
        const int64_t n = min_of(16 * rest.nw, rest.outputs - 16 * rest.w0);
        for (int64_t r = 4 * (k - rest.nw); r < 4 * (k - rest.nw) + 4; ++r)
          write_out(16 * (rest.x0 + j) + r, 16 * rest.w0, n, rows_out + 32 * r);
      }
    }

    // n outputs from `from` on in the panel, of row m of the block
    void write_out(int64_t m, int64_t from, int64_t n, const float* row) const {
      if (m < rows) epilogue.write(m0 + m, rest.o0 + from, n, row);
    }

    Pipeline& l;
    const MatmulParams& p;
    int64_t m0 = 0, rows = 0;
    Bf16* w_packed[2];
    float *sums, *part, *rows_out, *scales;
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

// Tiles from L1, as the pipeline has them: 2 x 2 products of 4 loads, over 16 KB of noise.
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
  if (dot_applies(p, 3)) return run_dot_bf16(p);
  if (p.weight4.packed && p.inner > 0 && Bf16Panels::in_groups(p)) {
    if (p.transposed) return Pipeline<true, false>(p).run();
    if (p.rows > 32) return Pipeline<false, false>(p).run();
    return Pipeline<false, true>(p).run();
  }
  if (few_outputs(p)) return run_few_outputs(p);
  if (few_rows(p)) return run_few_rows(p);
  Matmul<AmxKernel>(p).run();
}

void mora_bf16(const MoraParams& p) { Mora<AmxKernel, Bf16>(p).run(); }
void mora_grad_bf16(const MoraGradParams& p) { MoraGrad<AmxKernel, Bf16>(p).run(); }

}  // namespace peftkern::PEFTKERN_ISA
