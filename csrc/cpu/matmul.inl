// out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o] + spread(m, o)   (MatmulParams)
//
// One blocked algorithm for every ISA, dtype and direction. A kernel type K multiplies
//     C[i, j] += sum_p A[i, p] B[p, j]        A: rows, each with its contraction contiguous
//                                             B: kPair-interleaved rows, [p / kPair][j][kPair]
// and the weight stands on one side or the other:
//     4-bit, plain   A = rows o of W,  B = x packed once per call,  C = outᵀ      W stays row-major; so does a dense W
//                                                                                 for few rows of x
//     else           A = rows m of x,  B = W's columns c in pairs,  C = out       x is read where it lies, if it can be
// The addend is a last chunk of the contraction (x continues with t, W with u), so it costs rank / inner and
// no pass over out. W is decoded one panel at a time into a buffer that fits the L2 cache and serves every
// row of x; nothing of it outlives the call.
//
// A contraction is never split between threads and its order is a function of the shape alone: the same bits
// whatever the number of threads. Rows of x meet only as lanes, never in a sum.
//
//   floor      2 * rows * inner * outputs flops at the peak of the multiply, or inner * outputs / 2 bytes of memory
//   overhead   decode: 17 cycles per 128 weights, once per block of kMaxRows rows of x (2 * rows cycles of multiply)
#pragma once

#include <cstddef>

#include "cpu/decode.inl"
#include "cpu/epilogue.inl"
#include "cpu/scratch.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

// Where a panel's values come from: the base weight, then the addend's u.
struct Segment {
  Matrix x;      // x or t
  Matrix dense;  // [outputs, length] as w(o, c): dense W or u; unused when four_bit
  bool four_bit;
  bool reordered;  // the panel is in K's own order, see K::kGroup
  int64_t length;
  int64_t padded;
  int64_t depth;  // of a chunk: at most K::kDepth, as even as may be
  bool in_place;  // A is x itself, not a packed copy
};

template <class K>
class Matmul {
  using Elem = typename K::Elem;
  static constexpr int kPair = K::kPair;
  static constexpr int kLanes = K::kLanes;
  static constexpr int kDepth = K::kDepth;  // contraction per chunk
  static constexpr int kRowStride =
      kDepth + 64 / static_cast<int>(sizeof(Elem));  // A's rows: no two on one cache set

 public:
  explicit Matmul(const MatmulParams& params)
      : p(params), table(code_registers(code_table(p.weight4.quant_type))) {
    const bool four_bit = p.weight4.packed != nullptr;
    const bool reordered = four_bit && K::reorders(p);
    x_rows = p.transposed || (!four_bit && p.rows > kFewRows);
    const int64_t align = x_rows ? K::kAlignTransposed : (reordered ? K::kGroup : K::kAlignPlain);
    const Matrix dense = p.transposed ? transposed(p.dense) : p.dense;
    segments[0] = segment(p.x, dense, four_bit, reordered, p.inner, align);
    const int64_t align_u = x_rows ? K::kAlignTransposed : K::kAlignPlain;
    segments[1] = segment(p.t, p.u, false, false, p.rank, align_u);
    in_place = true;
    for (Segment& s : segments) {
      s.in_place = x_rows && !four_bit && readable(s);
      in_place &= s.in_place;
    }
    row_split = x_rows ? K::kRowSplitTransposed : K::kRowSplit;
    // As even as the tiles allow: 512 rows are 288 + 224, not 384 + 128.
    const int64_t blocks = ceil_div(p.rows, K::kMaxRows);
    block_rows = blocks == 1 ? p.rows : round_up(ceil_div(p.rows, blocks), K::kRowSplit);
    block_pad = x_rows ? block_rows : round_up(block_rows, kLanes);
    // An odd number of vectors from row to row: at a power of two the rows of a tile would meet on few cache sets.
    if (!x_rows && block_pad > 4 * kLanes && block_pad / kLanes % 2 == 0) block_pad += kLanes;
    // Once x outgrows the L2 cache it streams from L3, once a panel: a panel is then as tall as that cache allows.
    panel_outputs =
        x_rows ? K::kPanelColumns : (block_rows > 64 ? K::kPanelRows : K::kPanelRows / K::kShortPanels);
  }

  void run() {
    const int64_t panels = ceil_div(p.outputs, panel_outputs);
    const double work =
        static_cast<double>(p.rows) * static_cast<double>(p.outputs) * static_cast<double>(p.inner + p.rank);
    const int threads = work < K::kSerialWork ? 1 : p.threads;
    // Few outputs: the rows of x are what there is to share out, but each share reads all of W.
    const int64_t row_groups = ceil_div(block_rows, row_split);
    const int64_t most = four_bit() ? row_groups : max_of<int64_t>(1, block_rows / kRowsToReadW);
    const int64_t row_splits = panels >= 4 * threads ? 1 : min_of<int64_t>(min_of(row_groups, most), threads);

    const int64_t x_elems = in_place ? 0
                            : x_rows ? chunks() * block_rows * kRowStride
                                     : (segments[0].padded + segments[1].padded) * block_pad;
    const size_t x_bytes = align64(static_cast<size_t>(x_elems) * sizeof(Elem));
    const size_t panel_bytes = align64(
        static_cast<size_t>(x_rows ? kDepth * K::kPanelColumns : panel_outputs * kRowStride) * sizeof(Elem));
    const int64_t c_floats = x_rows ? block_rows * K::kPanelColumns : panel_outputs * block_pad;
    const size_t c_bytes = align64(static_cast<size_t>(c_floats) * sizeof(float));
    const int64_t scale_floats = scales_per_row() * (x_rows ? 0 : panel_outputs);
    const size_t scale_bytes = align64(static_cast<size_t>(scale_floats) * sizeof(float));
    const size_t per_thread = panel_bytes + c_bytes + scale_bytes;
    char* memory = static_cast<char*>(scratch(x_bytes + per_thread * static_cast<size_t>(threads)));
    x_packed = reinterpret_cast<Elem*>(memory);
    char* first = memory + x_bytes;

    // Rows m0 … of a block: one task of its panels and row splits.
    const auto run_task = [&](int thread, int64_t m0, int64_t task) {
      const int64_t rows = min_of(block_rows, p.rows - m0);
      char* mine = first + per_thread * static_cast<size_t>(thread);
      Workspace w = {reinterpret_cast<Elem*>(mine), reinterpret_cast<float*>(mine + panel_bytes),
                     reinterpret_cast<float*>(mine + panel_bytes + c_bytes)};
      const int64_t split = task % row_splits;
      const int64_t groups = ceil_div(rows, row_split);
      const int64_t begin = groups * split / row_splits * row_split;
      const int64_t end = min_of(groups * (split + 1) / row_splits * row_split, rows);
      const int64_t o0 = task / row_splits * panel_outputs;
      const int64_t outputs = min_of(panel_outputs, p.outputs - o0);
      if (begin < end)
        x_rows ? panel_of_x(w, m0, begin, end, o0, outputs) : panel_of_w(w, m0, begin, end, o0, outputs);
    };
    const int64_t tasks = panels * row_splits;
    if (in_place) {
      parallel_tasks(threads, ceil_div(p.rows, block_rows) * tasks, [&](int thread, int64_t task) {
        run_task(thread, task / tasks * block_rows, task % tasks);
      });
      return;
    }
    for (int64_t m0 = 0; m0 < p.rows; m0 += block_rows) {
      const int64_t rows = min_of(block_rows, p.rows - m0);
      const int64_t pack_unit = x_rows && !x_transposed() ? 8 : kLanes;
      parallel_tasks(threads, ceil_div(rows, pack_unit), [&](int, int64_t g) {
        x_rows ? pack_rows(m0, g * pack_unit, min_of((g + 1) * pack_unit, rows))
               : pack_columns(m0, rows, g * pack_unit);
      });
      parallel_tasks(threads, tasks, [&](int thread, int64_t task) { run_task(thread, m0, task); });
    }
  }

 private:
  struct Workspace {
    Elem* panel;
    float* c;
    float* scales;
  };

  static Segment segment(const Matrix& x, const Matrix& dense, bool four_bit, bool reordered, int64_t length,
                         int64_t align) {
    const int64_t padded = round_up(length, align);
    const int64_t count = max_of<int64_t>(1, ceil_div(padded, kDepth));
    return {x,
            dense,
            four_bit,
            reordered,
            length,
            padded,
            min_of<int64_t>(kDepth, round_up(ceil_div(padded, count), 64)),
            false};
  }
  bool four_bit() const { return p.weight4.packed != nullptr; }
  // Whole steps of the multiply, and rows of x that do not all meet on a few cache sets: a narrow panel has tiles of
  // many rows.
  bool readable(const Segment& s) const {
    const bool own = own_dtype(s.x) && s.x.stride1 == 1;
    const bool apart = s.x.stride0 * static_cast<int64_t>(sizeof(Elem)) % 2048 != 0 || p.outputs > 2 * kLanes;
    return s.length == 0 || (own && apart && s.padded == s.length);
  }
  static bool own_dtype(const Matrix& x) { return x.dtype == (kPair == 2 ? DType::bf16 : DType::f32); }
  bool x_transposed() const { return p.x.stride0 == 1 && p.x.stride1 != 1; }

  static size_t align64(size_t bytes) { return (bytes + 63) & ~static_cast<size_t>(63); }
  static int64_t chunks(const Segment& s) { return s.padded ? ceil_div(s.padded, s.depth) : 0; }
  int64_t chunks() const { return chunks(segments[0]) + chunks(segments[1]); }
  // Blocks that a row of W touches, when absmax must be decoded first.
  int64_t scales_per_row() const {
    return p.weight4.packed && p.weight4.absmax.codes ? (p.inner >> p.weight4.log2_blocksize) + 2 : 0;
  }

  // B operand: rows m of x become lanes. x_packed[q][m][kPair], q over both segments; missing rows are zero.
  void pack_columns(int64_t m0, int64_t rows, int64_t group) {
    constexpr int kBlock = 64;
    constexpr int kWords = kBlock / kPair;
    alignas(64) Elem rows_in[kLanes][kBlock];
    alignas(64) float words_out[kWords][kLanes];
    static_assert(sizeof(Elem) * kPair == 4, "a lane is one 32-bit word");
    const int64_t stride = block_pad * kPair;
    Elem* dst = x_packed + group * kPair;
    for (const Segment& s : segments) {
      for (int64_t c = 0; c < s.padded; c += kBlock) {
        const int64_t n = max_of<int64_t>(0, min_of<int64_t>(kBlock, s.length - c));
        for (int r = 0; r < kLanes; ++r) {
          const int64_t valid = group + r < rows ? n : 0;
          if (valid) read_row(s.x, m0 + group + r, c, valid, rows_in[r]);
          std::memset(rows_in[r] + valid, 0, static_cast<size_t>(kBlock - valid) * sizeof(Elem));
          if (s.reordered) K::reorder(rows_in[r]);
        }
        for (int word = 0; word < kWords; word += Vec::kWidth)
          for (int r = 0; r < kLanes; r += Vec::kWidth)
            transpose(reinterpret_cast<const float*>(rows_in[r]) + word, kWords, &words_out[word][r], kLanes);
        const int64_t words = min_of<int64_t>(kBlock, s.padded - c) / kPair;
        for (int64_t word = 0; word < words; ++word, dst += stride)
          std::memcpy(dst, words_out[word], sizeof(words_out[word]));
      }
    }
  }

  // A operand: x_packed[chunk][m][kRowStride], the tail of each chunk zero.
  void pack_rows(int64_t m0, int64_t begin, int64_t end) {
    Elem* chunk = x_packed;
    for (const Segment& s : segments) {
      if (s.in_place) continue;
      for (int64_t c = 0; c < s.padded; c += s.depth, chunk += block_rows * kRowStride) {
        const int64_t depth = min_of(s.depth, s.padded - c);
        const int64_t n = max_of<int64_t>(0, min_of(depth, s.length - c));
        if (s.x.stride0 == 1 && s.x.stride1 != 1 && end - begin <= kLanes) {
          pack_rows_across(s.x, m0 + begin, end - begin, c, n, depth, chunk + begin * kRowStride);
          continue;
        }
        for (int64_t m = begin; m < end; ++m) {
          Elem* row = chunk + m * kRowStride;
          read_row(s.x, m0 + m, c, n, row);
          std::memset(row + n, 0, static_cast<size_t>(depth - n) * sizeof(Elem));
        }
      }
    }
  }

  // The same for x whose columns are contiguous: kLanes rows at most, kPair columns make a word, words are transposed.
  void pack_rows_across(const Matrix& x, int64_t m, int64_t rows, int64_t c, int64_t n, int64_t depth,
                        Elem* out) const {
    constexpr int kStep = Vec::kWidth * kPair;
    alignas(64) Elem pair[2][kLanes] = {};
    alignas(64) float words[Vec::kWidth][kLanes], turned[kLanes][Vec::kWidth];
    const bool direct = own_dtype(x) && rows == kLanes;
    for (int64_t i = 0; i < depth; i += kStep) {
      for (int word = 0; word < Vec::kWidth; ++word) {
        Elem* to = reinterpret_cast<Elem*>(words[word]);
        const int64_t at = i + word * kPair;
        const Elem* columns[2];
        for (int k = 0; k < kPair; ++k) {
          columns[k] = pair[k];
          if (at + k >= n) {
            std::memset(pair[k], 0, sizeof(pair[k]));
          } else if (direct) {
            columns[k] = static_cast<const Elem*>(x.data) + m * x.stride0 + (c + at + k) * x.stride1;
          } else {
            read_row(transposed(x), at + k + c, m, rows, pair[k]);
          }
        }
        if constexpr (kPair > 1) {
          K::interleave(columns[0], columns[1], 1, to);
        } else {
          std::memcpy(to, columns[0], sizeof(words[word]));
        }
      }
      for (int r = 0; r < kLanes; r += Vec::kWidth) transpose(&words[0][r], kLanes, turned[r], Vec::kWidth);
      const int64_t count = min_of<int64_t>(kStep, depth - i);
      for (int64_t r = 0; r < rows; ++r) {
        Elem* to = out + r * kRowStride + i;
        if (count == kStep) {
          std::memcpy(to, turned[r], sizeof(turned[r]));
        } else {
          std::memcpy(to, turned[r], static_cast<size_t>(count) * sizeof(Elem));
        }
      }
    }
  }

  void panel_of_w(Workspace& w, int64_t m0, int64_t begin, int64_t end, int64_t o0, int64_t outputs) {
    const int64_t vectors = ceil_div(end - begin, kLanes);
    const float* scales[K::kPanelRows];
    if (p.weight4.packed) {
      prefetch_absmax(p.weight4, (o0 + panel_outputs) * p.inner, panel_outputs * p.inner);
      const int64_t per_row = scales_per_row();
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t flat = (o0 + o) * p.inner;
        const int64_t block = flat >> p.weight4.log2_blocksize;
        const int64_t last = (flat + p.inner - 1) >> p.weight4.log2_blocksize;
        scales[o] = absmax_range(p.weight4.absmax, block, last - block + 1, w.scales + o * per_row);
      }
    }
    bool empty = true;
    const Elem* b = x_packed + begin * kPair;
    for (const Segment& s : segments) {
      for (int64_t c = 0; c < s.padded; c += s.depth) {
        const int64_t depth = min_of(s.depth, s.padded - c);
        const int64_t n = max_of<int64_t>(0, min_of(depth, s.length - c));
        for (int64_t o = 0; o < outputs; ++o) {
          Elem* row = w.panel + o * kRowStride;
          if (K::kGroup > 1 && s.reordered) {
            const int64_t start = (o0 + o) * p.inner + c;
            // the same row's next chunk, or the next panel's first: rows are too far apart for the hardware
            // to guess
            K::prefetch(p.weight4,
                        c + depth < s.padded ? start + depth : start - c + panel_outputs * p.inner);
            K::decode_reordered(p.weight4, start, scales[o], start - c, n, row);
          } else if (s.four_bit) {
            decode_range(p.weight4, table, (o0 + o) * p.inner + c, n, row);
          } else {
            read_row(s.dense, o0 + o, c, n, row);
          }
          if (n < depth) std::memset(row + n, 0, static_cast<size_t>(depth - n) * sizeof(Elem));
        }
        K::multiply(outputs, vectors, depth / kPair, w.panel, kRowStride, b, block_pad * kPair, w.c,
                    block_pad, empty);
        b += depth * block_pad;
        empty = false;
      }
    }

    Epilogue epilogue(p);
    Epilogue::Columns<K::kPanelRows> columns;
    alignas(64) float out[Vec::kWidth][K::kPanelRows];
    epilogue.begin(o0, outputs, columns);
    for (int64_t m = 0; m < end - begin; m += Vec::kWidth) {
      for (int64_t o = 0; o < outputs; o += Vec::kWidth)
        transpose(w.c + o * block_pad + m, block_pad, &out[0][o], K::kPanelRows);
      for (int64_t r = 0; r < min_of<int64_t>(Vec::kWidth, end - begin - m); ++r)
        epilogue.write(m0 + begin + m + r, o0, outputs, out[r]);
    }
  }

  void panel_of_x(Workspace& w, int64_t m0, int64_t begin, int64_t end, int64_t o0, int64_t outputs) {
    constexpr int64_t kColumns = K::kPanelColumns;
    const int64_t vectors = ceil_div(outputs, kLanes);
    constexpr int64_t kPiece = 4 * K::kRowSplitTransposed;
    Epilogue epilogue(p);
    Epilogue::Columns<kColumns> columns;
    epilogue.begin(o0, outputs, columns);
    int64_t left = chunks();
    bool empty = true;
    const Elem* packed = x_packed + begin * kRowStride;
    for (const Segment& s : segments) {
      for (int64_t c = 0; c < s.padded; c += s.depth) {
        const int64_t depth = min_of(s.depth, s.padded - c);
        const int64_t n = max_of<int64_t>(0, min_of(depth, s.length - c));
        if (s.reordered) {
          K::decode_pairs(p.weight4, c, n, depth, p.outputs, o0, outputs, w.panel);
        } else if (!s.four_bit && s.dense.stride1 == 1 && !segments[0].reordered) {
          pack_pairs(s.dense, o0, outputs, c, n, depth, w.panel);
        } else {
          for (int64_t q = 0; q < depth; q += kPair) {
            alignas(64) Elem rows_in[kPair][kColumns];
            Elem* rows[kPair];
            for (int i = 0; i < kPair; ++i) {
              rows[i] = kPair == 1 ? w.panel + q * kColumns : rows_in[i];
              const int64_t filled = q + i < n ? outputs : 0;
              if (!filled) {
              } else if (s.four_bit) {
                decode_range(p.weight4, table, (c + q + i) * p.outputs + o0, outputs, rows[i]);
              } else {
                read_row(transposed(s.dense), c + q + i, o0, outputs, rows[i]);
              }
              std::memset(rows[i] + filled, 0, static_cast<size_t>(vectors * kLanes - filled) * sizeof(Elem));
              // C's columns are in W's order: the addend's follow it
              if (segments[0].reordered)
                for (int64_t o = 0; o < outputs; o += K::kGroup) K::reorder(rows[i] + o);
            }
            if constexpr (kPair > 1) K::interleave(rows[0], rows[1], vectors, w.panel + q * kColumns);
          }
        }
        const Elem* a = packed;
        int64_t a_stride = kRowStride;
        if (s.in_place) {
          a = static_cast<const Elem*>(s.x.data) + (m0 + begin) * s.x.stride0 + c;
          a_stride = s.x.stride0;
        } else {
          packed += block_rows * kRowStride;
        }
        float* to = w.c + begin * kColumns;
        if (--left) {
          K::multiply(end - begin, vectors, depth / kPair, a, a_stride, w.panel, kColumns * kPair, to,
                      kColumns, empty);
        } else {  // rows are written out while their sums are in L1
          for (int64_t m = begin; m < end; m += kPiece) {
            const int64_t rows = min_of(kPiece, end - m);
            epilogue.prefetch(m0 + m, rows, o0, outputs);
            for (int64_t r = rows; s.in_place && r < rows + min_of(kPiece, end - m - rows); ++r)
              prefetch_bytes(a, r * a_stride * static_cast<int64_t>(sizeof(Elem)),
                             depth * static_cast<int64_t>(sizeof(Elem)));
            K::multiply(rows, vectors, depth / kPair, a, a_stride, w.panel, kColumns * kPair, to, kColumns,
                        empty);
            write_rows(epilogue, m0 + m, rows, o0, outputs, to);
            a += rows * a_stride;
            to += rows * kColumns;
          }
        }
        empty = false;
      }
    }
  }

  void write_rows(const Epilogue& epilogue, int64_t m, int64_t rows, int64_t o0, int64_t outputs,
                  const float* c) const {
    alignas(64) float out[K::kPanelColumns];
    for (int64_t r = 0; r < rows; ++r, c += K::kPanelColumns) {
      if (segments[0].reordered) {
        for (int64_t o = 0; o < outputs; o += K::kGroup) K::restore(c + o, out + o);
        epilogue.write(m + r, o0, outputs, out);
      } else {
        epilogue.write(m + r, o0, outputs, c);
      }
    }
  }

  // B from a matrix whose contraction is contiguous: panel[q][j][kPair] = dense[o0 + j, c + kPair q …], transposed word
  // by word; zero beyond n and beyond `outputs`.
  void pack_pairs(const Matrix& dense, int64_t o0, int64_t outputs, int64_t c, int64_t n, int64_t depth,
                  Elem* panel) const {
    constexpr int kStep = Vec::kWidth * kPair;
    alignas(64) Elem rows_in[Vec::kWidth][kStep];
    for (int64_t j = 0; j < round_up(outputs, kLanes); j += Vec::kWidth) {
      for (int64_t i = 0; i < depth; i += kStep) {
        for (int r = 0; r < Vec::kWidth; ++r) {
          const int64_t valid = j + r < outputs ? max_of<int64_t>(0, min_of<int64_t>(kStep, n - i)) : 0;
          if (valid) read_row(dense, o0 + j + r, c + i, valid, rows_in[r]);
          std::memset(rows_in[r] + valid, 0, static_cast<size_t>(kStep - valid) * sizeof(Elem));
        }
        transpose(reinterpret_cast<const float*>(rows_in), Vec::kWidth,
                  reinterpret_cast<float*>(panel) + i / kPair * K::kPanelColumns + j, K::kPanelColumns);
      }
    }
  }

  static constexpr int64_t kFewRows =
      32;  // for these it is dearer to bring a plain W into pairs than to pack x
  static constexpr int64_t kRowsToReadW = 64;  // of x: fewer cost less than bringing W into pairs once more

  const MatmulParams& p;
  const CodeTable table;
  Segment segments[2];
  bool x_rows;        // A is rows of x, not of W
  bool in_place;      // nothing of x is packed
  int64_t row_split;  // rows of x that one task has at least
  int64_t block_rows, block_pad;
  int64_t panel_outputs;
  Elem* x_packed = nullptr;
};

// The register tiles of a kernel type with vector arithmetic: K::tile<R, V> holds R * V <= K::kAccumulators
// vectors.
template <class K, int V, int R>
inline void tile_rows(int64_t rows, int64_t pairs, const typename K::Elem* a, int64_t a_stride,
                      const typename K::Elem* b, int64_t b_stride, float* c, int64_t c_stride, bool empty) {
  while (rows >= R) {
    K::template tile<R, V>(pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    a += R * a_stride;
    c += R * c_stride;
    rows -= R;
  }
  if constexpr (R > 1) {
    if (rows) tile_rows<K, V, R == 3 ? 2 : R / 2>(rows, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
  }
}

// Vectors are dealt out evenly: 5 of at most 4 are 3 + 2, not 4 + 1.
template <class K>
inline void multiply_tiles(int64_t rows, int64_t vectors, int64_t pairs, const typename K::Elem* a,
                           int64_t a_stride, const typename K::Elem* b, int64_t b_stride, float* c,
                           int64_t c_stride, bool empty) {
  constexpr int kMost = K::kAccumulators;  // 24 or 12: 24 = 24x1 = 12x2 = 8x3 = 6x4
  for (int64_t groups = ceil_div(vectors, K::kMaxVectors); groups; --groups) {
    const int64_t n = ceil_div(vectors, groups);
    if (n == 1) tile_rows<K, 1, kMost>(rows, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    if (n == 2) tile_rows<K, 2, kMost / 2>(rows, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    if (n == 3) tile_rows<K, 3, kMost / 3>(rows, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    if constexpr (K::kMaxVectors >= 4)
      if (n == 4) tile_rows<K, 4, kMost / 4>(rows, pairs, a, a_stride, b, b_stride, c, c_stride, empty);
    b += n * K::kLanes * K::kPair;
    c += n * K::kLanes;
    vectors -= n;
  }
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
