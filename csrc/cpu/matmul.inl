// MatmulParams: out[m, o] = alpha * (sum_c x[m, c] w(o, c) + sum_r t[m, r] u[o, r]) + bias[o] + spread(m, o)
//
// One blocked algorithm for every ISA, dtype and direction. A kernel type K multiplies
//     C[i, j] += sum_p A[i, p] B[p, j]        A: rows, each with its contraction contiguous
//                                             B: kPair-interleaved rows, [p / kPair][j][kPair]
// and the weight stands on one side or the other:
//     A = rows m of x,  B = w(o, c), lanes are outputs,  C = out    x is read where it lies, if it can be
//     A = rows o of W,  B = x packed once per call,      C = outᵀ   few rows of x against a dense W, and a
//                                                                   plain 4-bit W that K cannot bring across
//
// What K has beside `multiply`, which sets C (`empty`) or adds to it:
//     Elem, kPair               what is multiplied; neighbours of the contraction that share a lane of B. For
//                               pairs there are interleave and interleave_n, which make them of two rows
//     kLanes                    sums in a vector
//     kDepth                    the contraction of a chunk, at most; padded to kAlignX or kAlignW, whole steps
//     kPanelColumns, kStrip     outputs of a panel where A is x, and those that lie together
//     kPanelRows, kShortPanels  outputs of a panel where A is W, and into how many one is cut for few rows of x
//     kMaxRows                  rows of x in a block: those whose sums and copies are held at a time
//     kRowSplitX, kRowSplitW    rows of x that a task has at least: a tile of registers or a few
//     kAcross                   there is multiply_across, which takes A as pairs of columns
//     kGroups                   a 4-bit W of whole groups (in_groups) is decoded in K's own order: transposed by
//                               decode_rows, with reorder and restore for that order of columns; plain by
//                               decode_columns (pairs), or else by decode_row, and x's columns take its places
//     kShortRows, kShortDepth   kDepth where A is x and that has so few rows: of a panel that L1 holds
//     kDotRows                  rows of A at most for dot_rows, with rows of B where they lie
//     kSerialWork               products that are not worth a second thread
//
// The addend is a last chunk of the contraction (x continues with t, W with u), so it costs rank / inner and
// no pass over out. W is decoded one panel at a time into a buffer that fits the L2 cache and serves every
// row of x; nothing of it outlives the call. A panel lies in strips: one of them and a few rows of x fit L1.
// Of the last chunk, rows are written out a few at a time, while their sums are in L1 and other rows are
// multiplied. With x where it lies a call is one parallel region: no task waits for another.
//
// A contraction is never split between threads and its order is a function of the shape alone: the same bits
// whatever the number of threads. Rows of x meet only as lanes, never in a sum.
//
//   floor      2 * rows * inner * outputs flops at the peak of the multiply, or inner * outputs / 2 bytes of
//              memory
//   overhead   decode: 14 to 17 cycles per 128 weights transposed (dX), about 10 more plain (bf16, from times
//              at 32 rows), once per task's rows of x (2 * rows cycles of multiply)
#pragma once

#include <cstddef>

#include "cpu/decode.inl"
#include "cpu/epilogue.inl"
#include "cpu/scratch.h"

namespace peftkern::PEFTKERN_ISA {
namespace {

// How A comes of x or t.
enum class Source {
  packed,    // beforehand, for all tasks
  in_place,  // A is x itself
  across,    // each task makes A for itself of x's columns, which are contiguous
  copied,    // each task copies x's rows
};

// Where a panel's values come from: the base weight, then the addend's u.
struct Segment {
  Matrix x;      // x or t
  Matrix dense;  // [outputs, length] as w(o, c): dense W or u; unused when four_bit
  bool four_bit;
  bool reordered;  // the panel is in K's own order of groups
  int64_t length;
  int64_t padded;
  int64_t depth;  // of a chunk: at most K::kDepth, as even as may be
  Source source;
};

// Rows of u meet the sums last, a few bytes each: on their own they would wait for memory one after another.
inline void prefetch_u(const MatmulParams& p, int64_t o0, int64_t rows) {
  const int64_t size = p.u.dtype == DType::f32 ? 4 : 2;
  for (int64_t r = 0; p.u.stride1 == 1 && r < rows; ++r)
    prefetch_bytes(p.u.data, (o0 + r) * p.u.stride0 * size, p.rank * size);
}

template <class K>
class Matmul {
  using Elem = typename K::Elem;
  static constexpr int kPair = K::kPair;
  static constexpr int kLanes = K::kLanes;
  static constexpr int kDepth = K::kDepth;  // contraction per chunk
  // Columns of a panel that lie together: a strip stays in L1 while rows of x pass.
  static constexpr int64_t kStrip = K::kStrip;
  static_assert(K::kPanelRows % K::kShortPanels == 0 && K::kPanelRows / K::kShortPanels % Vec::kWidth == 0,
                "panel_of_w transposes whole vectors of C");
  static_assert(K::kPanelColumns % kStrip == 0 && (kPair > 1 || kStrip == K::kPanelColumns), "whole strips");
  static_assert(kStrip % kLanes == 0 && (!K::kGroups || kStrip % kGroup == 0), "of whole vectors and groups");
  static_assert(kDepth % kGroup == 0 && K::kShortDepth % kGroup == 0, "chunks of whole groups");

 public:
  // A's rows, of a chunk: no two on one cache set.
  static constexpr int64_t row_stride(int64_t depth) {
    return depth + 64 / static_cast<int64_t>(sizeof(Elem));
  }
  static constexpr int64_t kRowStride = row_stride(kDepth);
  static constexpr int64_t kPiece = 4 * K::kRowSplitX;  // rows of x that meet a panel at a time

  explicit Matmul(const MatmulParams& params)
      : p(params), table(code_registers(code_table(p.weight4.quant_type))) {
    const bool four_bit = p.weight4.packed != nullptr;
    const bool groups = K::kGroups && in_groups(p);
    x_rows = p.transposed || (four_bit ? groups && kPair > 1 : p.rows > kFewRows);
    const bool reordered = groups && (p.transposed || kPair == 1);
    const Matrix dense = p.transposed ? transposed(p.dense) : p.dense;
    segments[0] = segment(p.x, dense, four_bit, reordered, p.inner);
    segments[1] = segment(p.t, p.u, false, false, p.rank);
    for (Segment& s : segments) s.source = source(s);
    one_region = segments[0].source != Source::packed && segments[1].source != Source::packed;
    row_split = x_rows ? K::kRowSplitX : K::kRowSplitW;
    // As even as the tiles allow: 512 rows are 288 + 224, not 384 + 128.
    const int64_t blocks = ceil_div(p.rows, K::kMaxRows);
    block_rows = blocks == 1 ? p.rows : round_up(ceil_div(p.rows, blocks), row_split);
    block_pad = x_rows ? block_rows : round_up(block_rows, kLanes);
    // An odd number of vectors from row to row: at a power of two the rows of a tile would meet on few cache
    // sets.
    if (!x_rows && block_pad > 4 * kLanes && block_pad / kLanes % 2 == 0) block_pad += kLanes;
    // Once x outgrows the L2 cache it streams from L3, once a panel: a panel is then as tall as that cache
    // allows.
    panel_outputs =
        x_rows ? K::kPanelColumns : (block_rows > 64 ? K::kPanelRows : K::kPanelRows / K::kShortPanels);
    // Narrower, when there would be few of them to share out; but each packs x anew if that is left to it.
    if (x_rows && !by_piece(segments[0]) && ceil_div(p.outputs, panel_outputs) * blocks < kTasks * p.threads)
      panel_outputs = kStrip;
    // So are those of one strip, or of rows of W, where threads are many.
    const int64_t least = x_rows ? kGroup : K::kRowSplitW;
    while (kPair == 1 && panel_outputs >= 2 * least &&
           ceil_div(p.outputs, panel_outputs) * (x_rows ? blocks : 1) < 4 * p.threads)
      panel_outputs = x_rows ? least : panel_outputs / 2;
  }

  void run() {
    const int64_t panels = ceil_div(p.outputs, panel_outputs);
    const double work =
        static_cast<double>(p.rows) * static_cast<double>(p.outputs) * static_cast<double>(p.inner + p.rank);
    const int threads = work < K::kSerialWork ? 1 : p.threads;
    // Few outputs: the rows of x are what there is to share out, but each share reads all of W.
    const int64_t row_groups = ceil_div(block_rows, row_split);
    const int64_t most = four_bit() ? row_groups : max_of<int64_t>(1, block_rows / kRowsToReadW);
    const int64_t blocks =
        one_region ? ceil_div(p.rows, block_rows) : 1;  // that are in hand at the same time
    const int64_t row_splits =
        blocks * panels >= 4 * threads ? 1 : min_of<int64_t>(min_of(row_groups, most), threads);

    const int64_t x_elems =
        x_rows ? packed_columns() * block_rows : (segments[0].padded + segments[1].padded) * block_pad;
    const size_t x_bytes = align64(static_cast<size_t>(x_elems) * sizeof(Elem));
    const size_t panel_bytes = align64(
        static_cast<size_t>(x_rows ? kDepth * K::kPanelColumns : panel_outputs * kRowStride) * sizeof(Elem));
    const int64_t c_floats = x_rows ? block_rows * K::kPanelColumns : panel_outputs * block_pad;
    const size_t c_bytes = align64(static_cast<size_t>(c_floats) * sizeof(float));
    const bool pieces = by_piece(segments[0]) || by_piece(segments[1]);
    const size_t piece_bytes = align64(pieces ? static_cast<size_t>(kPiece * kRowStride) * sizeof(Elem) : 0);
    const size_t per_thread = panel_bytes + c_bytes + piece_bytes;
    char* memory = static_cast<char*>(scratch(x_bytes + per_thread * static_cast<size_t>(threads)));
    x_packed = reinterpret_cast<Elem*>(memory);
    char* first = memory + x_bytes;

    // Rows m0 … of a block: one task of its panels and row splits.
    const auto run_task = [&](int thread, int64_t m0, int64_t task) {
      const int64_t rows = min_of(block_rows, p.rows - m0);
      char* mine = first + per_thread * static_cast<size_t>(thread);
      Workspace w = {reinterpret_cast<Elem*>(mine), reinterpret_cast<float*>(mine + panel_bytes),
                     reinterpret_cast<Elem*>(mine + panel_bytes + c_bytes)};
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
    if (one_region) {
      parallel_tasks(threads, blocks * tasks, [&](int thread, int64_t task) {
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

  // The panel of w(o, c) = dense[o, c], outputs <= kPanelColumns of them, in strips as fill_panel has them.
  static void pack_dense(const Matrix& dense, int64_t o0, int64_t outputs, int64_t c, int64_t n,
                         int64_t depth, Elem* panel) {
    if (dense.stride1 == 1) return pack_pairs(dense, o0, outputs, c, n, depth, panel);
    if constexpr (kPair > 1) {
      if (own_dtype(dense) && dense.stride0 == 1)
        return pack_rows_of_pairs(dense, o0, outputs, c, n, depth, panel);
    }
    pack_rows_read(outputs, n, depth, panel,
                   [&](int64_t q, Elem* row) { read_row(transposed(dense), c + q, o0, outputs, row); });
  }

  // A from x whose columns are contiguous: kLanes rows at most, kPair columns make a word, words are
  // transposed: out[r][stride], zero from n on.
  static void pack_rows_across(const Matrix& x, int64_t m, int64_t rows, int64_t c, int64_t n, int64_t depth,
                               Elem* out, int64_t stride) {
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
        Elem* to = out + r * stride + i;
        if (count == kStep) {
          std::memcpy(to, turned[r], sizeof(turned[r]));
        } else {
          std::memcpy(to, turned[r], static_cast<size_t>(count) * sizeof(Elem));
        }
      }
    }
  }

  // The same as pairs of columns: out[q][r][kPair] = x[m + r, c + kPair q …], r < kPiece, zero from n on.
  static void pack_piece(const Matrix& x, int64_t m, int64_t rows, int64_t c, int64_t n, int64_t depth,
                         Elem* out) {
    if constexpr (K::kAcross) {
      static constexpr Elem kZeros[kPiece] = {};
      for (int64_t q = 0; q < depth; q += kPair, out += kPiece * kPair) {
        const Elem* columns[kPair];
        for (int i = 0; i < kPair; ++i) {
          columns[i] = q + i < n ? static_cast<const Elem*>(x.data) + m + (c + q + i) * x.stride1 : kZeros;
          if (q + i < n) prefetch_elems(columns[i], depth * x.stride1, rows);  // the next chunk's
        }
        K::interleave_n(columns[0], columns[1], rows, out);
      }
    }
  }

  // What packing may leave beyond a strip's depth is less than a step to the next multiple of this.
  static constexpr int64_t kPackStep = 64;
  static_assert(kPackStep % (Vec::kWidth * kPair) == 0, "pack_pairs takes whole steps of the depth");

  // Chunks of a contraction of `padded`: as even as may be, kDepth at most.
  static int64_t chunk_depth(int64_t padded, int64_t most = kDepth) {
    const int64_t count = max_of<int64_t>(1, ceil_div(padded, most));
    return min_of(most, round_up(ceil_div(padded, count), 64));
  }

 private:
  struct Workspace {
    Elem* panel;
    float* c;
    Elem* piece;
  };

  Segment segment(const Matrix& x, const Matrix& dense, bool four_bit, bool reordered, int64_t length) const {
    const int64_t padded = round_up(length, x_rows ? K::kAlignX : K::kAlignW);
    const int64_t depth = chunk_depth(padded, x_rows && p.rows <= K::kShortRows ? K::kShortDepth : kDepth);
    return {x, dense, four_bit, reordered, length, padded, depth, Source::packed};
  }
  Source source(const Segment& s) const {
    if (!x_rows) return Source::packed;
    if (readable(s)) return Source::in_place;
    if (!own_dtype(s.x)) return Source::packed;
    if (K::kAcross && p.rows > kFewRows && s.x.stride0 == 1) return Source::across;
    return s.x.stride1 == 1 && p.outputs <= K::kPanelColumns ? Source::copied : Source::packed;
  }
  static bool by_piece(const Segment& s) { return s.source == Source::across || s.source == Source::copied; }
  bool four_bit() const { return p.weight4.packed != nullptr; }
  // Whole steps of the multiply, and rows of x that do not all meet on a few cache sets: a narrow panel has
  // tiles of many rows.
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
  // Of x_packed's chunks, with their rows' distance.
  int64_t packed_columns() const {
    int64_t count = 0;
    for (const Segment& s : segments)
      count += s.source == Source::packed ? chunks(s) * row_stride(s.depth) : 0;
    return count;
  }

  // B operand: rows m of x become lanes. x_packed[q][m][kPair], q over both segments; missing rows are zero.
  void pack_columns(int64_t m0, int64_t rows, int64_t group) {
    constexpr int64_t kBlock = kGroup;
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
        }
        for (int word = 0; word < kWords; word += Vec::kWidth)
          for (int r = 0; r < kLanes; r += Vec::kWidth)
            transpose(reinterpret_cast<const float*>(rows_in[r]) + word, kWords, &words_out[word][r], kLanes);
        const int64_t words = min_of<int64_t>(kBlock, s.padded - c) / kPair;
        for (int64_t word = 0; word < words; ++word)
          std::memcpy(dst + (s.reordered ? group_place(word) : word) * stride, words_out[word],
                      sizeof(words_out[word]));
        dst += words * stride;
      }
    }
  }

  // A operand: x_packed[chunk][m][row_stride], the tail of each chunk zero.
  void pack_rows(int64_t m0, int64_t begin, int64_t end) {
    Elem* chunk = x_packed;
    for (const Segment& s : segments) {
      if (s.source != Source::packed) continue;
      const int64_t stride = row_stride(s.depth);
      for (int64_t c = 0; c < s.padded; c += s.depth, chunk += block_rows * stride) {
        const int64_t depth = min_of(s.depth, s.padded - c);
        const int64_t n = max_of<int64_t>(0, min_of(depth, s.length - c));
        if (s.x.stride0 == 1 && s.x.stride1 != 1 && end - begin <= kLanes) {
          pack_rows_across(s.x, m0 + begin, end - begin, c, n, depth, chunk + begin * stride, stride);
          continue;
        }
        for (int64_t m = begin; m < end; ++m) {
          Elem* row = chunk + m * stride;
          read_row(s.x, m0 + m, c, n, row);
          std::memset(row + n, 0, static_cast<size_t>(depth - n) * sizeof(Elem));
        }
      }
    }
  }

  void panel_of_w(Workspace& w, int64_t m0, int64_t begin, int64_t end, int64_t o0, int64_t outputs) {
    const int64_t vectors = ceil_div(end - begin, kLanes);
    if (p.weight4.packed) prefetch_absmax(p.weight4, (o0 + panel_outputs) * p.inner, panel_outputs * p.inner);
    bool empty = true;
    const Elem* b = x_packed + begin * kPair;
    for (const Segment& s : segments) {
      for (int64_t c = 0; c < s.padded; c += s.depth) {
        const int64_t depth = min_of(s.depth, s.padded - c);
        const int64_t n = max_of<int64_t>(0, min_of(depth, s.length - c));
        for (int64_t o = 0; o < outputs; ++o) {
          Elem* row = w.panel + o * kRowStride;
          if (s.four_bit) {
            const int64_t next = (o0 + o + (c + depth < s.padded ? 0 : panel_outputs)) * p.inner;
            prefetch_bytes(p.weight4.packed, (next + (c + depth) % s.padded) >> 1, n >> 1);
          }
          if (s.reordered) {
            if constexpr (K::kGroups && kPair == 1)
              K::decode_row(p.weight4, table, (o0 + o) * p.inner + c, n, row);
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
    Epilogue epilogue(p);
    Epilogue::Columns<kColumns> columns;
    epilogue.begin(o0, outputs, columns);
    int64_t left = chunks();
    bool empty = true;
    const Elem* packed = x_packed;
    for (const Segment& s : segments) {
      const int64_t packed_stride = row_stride(s.depth);
      const bool across = s.source == Source::across, copied = s.source == Source::copied;
      const bool whole = copied || s.source == Source::in_place;  // rows of x
      for (int64_t c = 0; c < s.padded; c += s.depth) {
        const int64_t depth = min_of(s.depth, s.padded - c);
        const int64_t n = max_of<int64_t>(0, min_of(depth, s.length - c));
        fill_panel(s, o0, outputs, c, n, depth, w.panel);
        const int64_t a_stride = whole ? s.x.stride0 : packed_stride;
        const Elem* a = whole ? static_cast<const Elem*>(s.x.data) + (m0 + begin) * a_stride + c
                              : packed + begin * a_stride;
        if (s.source == Source::packed) packed += block_rows * packed_stride;
        const bool last = !--left;
        for (int64_t m = begin; m < end; m += kPiece, a += kPiece * a_stride) {
          const int64_t rows = min_of(kPiece, end - m);
          for (int64_t r = rows; whole && r < rows + min_of(kPiece, end - m - rows); ++r)
            prefetch_elems(a, r * a_stride, depth);
          if (across) pack_piece(s.x, m0 + m, rows, c, n, depth, w.piece);
          if (copied) copy_rows(a, a_stride, rows, n, depth, w.piece);
          const Elem* from = copied ? w.piece : a;
          const int64_t stride = copied ? kRowStride : a_stride;
          if (last) epilogue.prefetch(m0 + m, rows, o0, outputs);
          // With one chunk what is written out is all that becomes of C: it stays in L1.
          float* sums = w.c + (last && empty ? 0 : m * kColumns);
          for (int64_t j = 0; j < outputs; j += kStrip) {
            const int64_t vectors = ceil_div(min_of(kStrip, outputs - j), kLanes);
            const Elem* b = w.panel + j * depth;
            if constexpr (K::kAcross) {
              if (across) {
                K::multiply_across(rows, vectors, depth / kPair, w.piece, kPiece * kPair, b, kStrip * kPair,
                                   sums + j, kColumns, empty);
                continue;
              }
            }
            K::multiply(rows, vectors, depth / kPair, from, stride, b, kStrip * kPair, sums + j, kColumns,
                        empty);
          }
          if (last) write_rows(epilogue, m0 + m, rows, o0, outputs, sums);
        }
        empty = false;
      }
    }
  }

  // A from rows of x: out[r][kRowStride], zero from n on.
  static void copy_rows(const Elem* x, int64_t stride, int64_t rows, int64_t n, int64_t depth, Elem* out) {
    for (int64_t r = 0; r < rows; ++r, x += stride, out += kRowStride) {
      std::memcpy(out, x, static_cast<size_t>(n) * sizeof(Elem));
      std::memset(out + n, 0, static_cast<size_t>(depth - n) * sizeof(Elem));
    }
  }

  static void prefetch_elems(const Elem* from, int64_t at, int64_t n) {
    constexpr int64_t kSize = sizeof(Elem);
    prefetch_bytes(from, at * kSize, n * kSize);
  }

  // The panel of a chunk in strips: [j / kStrip][q][j % kStrip][kPair], zero from n on.
  void fill_panel(const Segment& s, int64_t o0, int64_t outputs, int64_t c, int64_t n, int64_t depth,
                  Elem* panel) const {
    if constexpr (K::kGroups) {
      if (s.reordered)
        return K::template decode_rows<kStrip>(p.weight4, c, n, depth, p.outputs, o0, outputs, panel);
      if constexpr (kPair > 1) {
        if (s.four_bit && !p.transposed)
          return K::template decode_columns<kStrip>(p.weight4, o0, outputs, p.inner, c, depth, panel);
      }
    }
    const bool in_order = !segments[0].reordered;
    if (!s.four_bit && in_order) return pack_dense(s.dense, o0, outputs, c, n, depth, panel);
    pack_rows_read(outputs, n, depth, panel, [&](int64_t q, Elem* row) {
      if (s.four_bit) {
        prefetch_bytes(p.weight4.packed, ((c + q + kRowsAhead) * p.outputs + o0) >> 1, outputs / 2);
        prefetch_absmax(p.weight4, (c + q + kRowsAhead) * p.outputs + o0, outputs);
        decode_range(p.weight4, table, (c + q) * p.outputs + o0, outputs, row);
      } else {
        read_row(transposed(s.dense), c + q, o0, outputs, row);
      }
      if constexpr (K::kGroups) {  // C's columns are in W's order: the addend's follow it
        for (int64_t o = 0; !in_order && o < outputs; o += kGroup) K::reorder(row + o);
      }
    });
  }

  // B from rows that read(q, row) fills, q < n; zero beyond n and beyond `outputs`.
  template <class Read>
  static void pack_rows_read(int64_t outputs, int64_t n, int64_t depth, Elem* panel, const Read& read) {
    const int64_t padded = round_up(outputs, kLanes);
    alignas(64) Elem rows_in[kPair][K::kPanelColumns];
    for (int64_t q = 0; q < depth; q += kPair) {
      for (int i = 0; i < kPair; ++i) {
        Elem* row = kPair == 1 ? panel + q * kStrip : rows_in[i];
        const int64_t filled = q + i < n ? outputs : 0;
        if (filled) read(q + i, row);
        std::memset(row + filled, 0, static_cast<size_t>(padded - filled) * sizeof(Elem));
      }
      if constexpr (kPair > 1) {
        for (int64_t j = 0; j < padded; j += kStrip)
          K::interleave(rows_in[0] + j, rows_in[1] + j, min_of(kStrip, padded - j) / kLanes,
                        panel + j * depth + q * kStrip);
      }
    }
  }

  // B from a matrix whose outputs are contiguous; zero beyond n and beyond `outputs`.
  static void pack_rows_of_pairs(const Matrix& dense, int64_t o0, int64_t outputs, int64_t c, int64_t n,
                                 int64_t depth, Elem* panel) {
    static constexpr Elem kZeros[K::kPanelColumns] = {};
    for (int64_t q = 0; q < depth; q += kPair, panel += kStrip * kPair) {
      const Elem* rows[kPair];
      for (int i = 0; i < kPair; ++i) {
        rows[i] =
            q + i < n ? static_cast<const Elem*>(dense.data) + o0 + (c + q + i) * dense.stride1 : kZeros;
        if (q + i < n) prefetch_elems(rows[i], depth * dense.stride1, outputs);  // the next chunk's
      }
      for (int64_t j = 0; j < outputs; j += kStrip)
        K::interleave_n(rows[0] + j, rows[1] + j, min_of(kStrip, outputs - j), panel + j * depth);
    }
  }

  void write_rows(const Epilogue& epilogue, int64_t m, int64_t rows, int64_t o, int64_t outputs,
                  const float* c) const {
    if constexpr (K::kGroups) {
      if (segments[0].reordered) {
        alignas(64) float out[K::kPanelColumns];
        for (int64_t r = 0; r < rows; ++r, c += K::kPanelColumns) {
          for (int64_t i = 0; i < outputs; i += kGroup) K::restore(c + i, out + i);
          epilogue.write_rows(m + r, 1, o, outputs, out, 0);
        }
        return;
      }
    }
    epilogue.write_rows(m, rows, o, outputs, c, K::kPanelColumns);
  }

  // B from a matrix whose contraction is contiguous, transposed word by word:
  // panel[j / kStrip][q][j % kStrip][kPair] = dense[o0 + j, c + kPair q …], zero beyond n and `outputs`.
  // What a short chunk leaves beyond its strip, the next strip overwrites.
  static void pack_pairs(const Matrix& dense, int64_t o0, int64_t outputs, int64_t c, int64_t n,
                         int64_t depth, Elem* panel) {
    constexpr int kStep = Vec::kWidth * kPair;
    alignas(64) Elem rows_in[Vec::kWidth][kStep];
    const Elem* first = static_cast<const Elem*>(dense.data) + o0 * dense.stride0 + c;
    const bool words =
        own_dtype(dense) && dense.stride0 % kPair == 0 && reinterpret_cast<uintptr_t>(first) % 4 == 0;
    for (int64_t j = 0; j < round_up(outputs, kLanes); j += Vec::kWidth) {
      float* out = reinterpret_cast<float*>(panel + j / kStrip * kStrip * depth) + j % kStrip;
      for (int64_t i = 0; i < depth; i += kStep, out += Vec::kWidth * kStrip) {
        if (words && j + Vec::kWidth <= outputs && i + kStep <= n) {
          for (int64_t r = Vec::kWidth; r < min_of<int64_t>(2 * Vec::kWidth, outputs - j);
               ++r)  // the next ones
            prefetch_elems(first, (j + r) * dense.stride0 + i, kStep);
          transpose(reinterpret_cast<const float*>(first + j * dense.stride0 + i), dense.stride0 / kPair, out,
                    kStrip);
          continue;
        }
        for (int r = 0; r < Vec::kWidth; ++r) {
          const int64_t valid = j + r < outputs ? max_of<int64_t>(0, min_of<int64_t>(kStep, n - i)) : 0;
          if (valid) read_row(dense, o0 + j + r, c + i, valid, rows_in[r]);
          std::memset(rows_in[r] + valid, 0, static_cast<size_t>(kStep - valid) * sizeof(Elem));
        }
        transpose(reinterpret_cast<const float*>(rows_in), Vec::kWidth, out, kStrip);
      }
    }
  }

  static constexpr int64_t kTasks = 12;  // for each thread
  static constexpr int64_t kFewRows =
      32;  // for these it is dearer to bring a plain W into pairs than to pack x
  static constexpr int64_t kRowsToReadW = 64;  // of x: fewer cost less than bringing W into pairs once more

  const MatmulParams& p;
  const CodeTable table;
  Segment segments[2];
  bool x_rows;        // A is rows of x, not of W
  bool one_region;    // no Source::packed: no tasks have to be through before the others start
  int64_t row_split;  // rows of x that one task has at least
  int64_t block_rows, block_pad;
  int64_t panel_outputs;
  Elem* x_packed = nullptr;
};

// The register tiles of a kernel type with vector arithmetic: K::tile<R, V> holds R * V <= K::kAccumulators
// vectors. A's rows are a_stride apart, its steps of the contraction a_step.
template <class K, int V, int R>
inline void tile_of(int64_t rows, int64_t pairs, const typename K::Elem* a, int64_t a_stride, int64_t a_step,
                    const typename K::Elem* b, int64_t b_stride, float* c, int64_t c_stride, bool empty) {
  if constexpr (R > 1) {
    if (rows < R)
      return tile_of<K, V, R - 1>(rows, pairs, a, a_stride, a_step, b, b_stride, c, c_stride, empty);
  }
  K::template tile<R, V>(pairs, a, a_stride, a_step, b, b_stride, c, c_stride, empty);
}

// Tiles of at most R rows, as even as may be: in a tile of few sums each product waits for the one before.
template <class K, int V, int R>
inline void tile_rows(int64_t rows, int64_t pairs, const typename K::Elem* a, int64_t a_stride,
                      int64_t a_step, const typename K::Elem* b, int64_t b_stride, float* c, int64_t c_stride,
                      bool empty) {
  for (int64_t tiles = ceil_div(rows, R); tiles; --tiles) {
    const int64_t n = ceil_div(rows, tiles);
    tile_of<K, V, R>(n, pairs, a, a_stride, a_step, b, b_stride, c, c_stride, empty);
    a += n * a_stride;
    c += n * c_stride;
    rows -= n;
  }
}

// Vectors are dealt out evenly: 5 of at most 4 are 3 + 2, not 4 + 1.
template <class K>
inline void multiply_tiles(int64_t rows, int64_t vectors, int64_t pairs, const typename K::Elem* a,
                           int64_t a_stride, int64_t a_step, const typename K::Elem* b, int64_t b_stride,
                           float* c, int64_t c_stride, bool empty) {
  constexpr int kMost = K::kAccumulators;  // 24 or 12: 24 = 24x1 = 12x2 = 8x3 = 6x4
  for (int64_t groups = ceil_div(vectors, K::kMaxVectors); groups; --groups) {
    const int64_t n = ceil_div(vectors, groups);
    if (n == 1) tile_rows<K, 1, kMost>(rows, pairs, a, a_stride, a_step, b, b_stride, c, c_stride, empty);
    if (n == 2) tile_rows<K, 2, kMost / 2>(rows, pairs, a, a_stride, a_step, b, b_stride, c, c_stride, empty);
    if (n == 3) tile_rows<K, 3, kMost / 3>(rows, pairs, a, a_stride, a_step, b, b_stride, c, c_stride, empty);
    if constexpr (K::kMaxVectors >= 4)
      if (n == 4)
        tile_rows<K, 4, kMost / 4>(rows, pairs, a, a_stride, a_step, b, b_stride, c, c_stride, empty);
    b += n * K::kLanes * K::kPair;
    c += n * K::kLanes;
    vectors -= n;
  }
}

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
