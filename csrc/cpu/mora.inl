// MoraParams: out = bias + spread(v), v = alpha · z Mᵀ in each block of r̂ columns, z = compress(x)
//
// A task takes groups of rows of x all the way: their middle is made and turned, meets M, is turned back and
// spread. z and v of a group stay in the L2 cache, and a call is one parallel region, after a short one in
// which M becomes panels that all tasks read. While a group is multiplied, the next one's x and the lines of
// its own out are fetched.
//
//   floor      2 · rows · n r̂² flops at the peak of the multiply; x and out once
//   reached    type 6, 512 x 4096, r̂ = 256, bf16, cold: 0 to 5 % over the bare product of the same shapes
//
// A few rows of the middle meet the rows of M where those lie: a panel would be one more matrix to write and to
// read, from memory, since a call's scratch is cold where a layer's weights have passed.
//
// A row's bits do not depend on the rows that share its task.
//
// MoraGradParams: dM = alpha · Σ g_bᵀ z_b, a contraction over the rows of the middle. Some rows of both
// middles are made, in L2, and added to a sum of the task's part of them; the parts, a function of the shape,
// are added up last.
#pragma once

#include <numeric>
#include <type_traits>

#include "cpu/compress.inl"
#include "cpu/matmul.inl"

namespace peftkern::PEFTKERN_ISA {
namespace {

template <class T>
inline int64_t line_bytes(int64_t count) {
  return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
}

template <class K, class T>
class Mora {
  using Elem = typename K::Elem;
  using Driver = Matmul<K>;
  static constexpr int64_t kStrip = K::kStrip;
  static constexpr int64_t kPair = K::kPair;

 public:
  explicit Mora(const MoraParams& params)
      : p(params),
        compress(p.compress),
        blocks(p.compress.columns / p.size),
        padded(round_up(p.size, K::kAlignX)),
        depth(Driver::chunk_depth(padded)),
        strips(ceil_div(p.size, kStrip)),
        v_stride(round_up(p.size, K::kLanes)),
        in_place(std::is_same_v<T, Elem> && padded == p.size) {}

  void run() {
    const int64_t rows = p.compress.rows, columns = p.compress.columns;
    const double work =
        static_cast<double>(rows) * (static_cast<double>(columns) * static_cast<double>(p.size) +
                                     4.0 * static_cast<double>(p.compress.wide + p.out.outputs));
    const int threads = work < K::kSerialWork ? 1 : p.threads;
    const int64_t z_bytes = line_bytes<T>(columns);
    if (by_dots()) return run_few(threads, z_bytes);
    const int64_t a_bytes = in_place ? 0 : line_bytes<Elem>(blocks * padded);
    const int64_t v_bytes = line_bytes<float>(blocks * v_stride);
    const int64_t row_bytes = z_bytes + a_bytes + v_bytes;
    // Groups of whole tiles of the middle that fit the L2 cache, in tasks of an eighth of a thread's part.
    const int64_t unit = K::kRowSplitX / std::gcd<int64_t, int64_t>(K::kRowSplitX, blocks);
    const int64_t share = ceil_div(rows, threads == 1 ? 1 : 8 * threads);
    group_rows = min_of(max_of<int64_t>(1, kGroupBytes / row_bytes),
                        round_up(min_of(ceil_div(kGroupRows, blocks), share), unit));
    const int64_t task_rows = round_up(share, group_rows);

    const int64_t panel_bytes = line_bytes<Elem>(round_up(padded, Driver::kPackStep) * strips * kStrip);
    char* memory =
        static_cast<char*>(scratch(static_cast<size_t>(panel_bytes + row_bytes * group_rows * threads)));
    panel = reinterpret_cast<Elem*>(memory);
    const int64_t chunks = ceil_div(padded, depth);
    parallel_tasks(threads, chunks * strips,
                   [&](int, int64_t task) { pack(task / strips * depth, task % strips); });
    parallel_tasks(threads, ceil_div(rows, task_rows), [&](int thread, int64_t task) {
      char* mine = memory + panel_bytes + row_bytes * group_rows * thread;
      const int64_t end = min_of((task + 1) * task_rows, rows);
      for (int64_t m = task * task_rows; m < end; m += group_rows) {
        run_rows(m, min_of(group_rows, end - m), z_at(m, mine),
                 reinterpret_cast<Elem*>(mine + z_bytes * group_rows),
                 reinterpret_cast<float*>(mine + (z_bytes + a_bytes) * group_rows));
      }
    });
  }

 private:
  static constexpr int64_t kDotOutputs = 32;  // of a task
  static constexpr int64_t kGroupBytes = 384 << 10;
  static constexpr int64_t kGroupRows = 48;

  // Where row m of the middle is wanted, or else `room`.
  T* z_at(int64_t m, char* room) const {
    return p.compress.out.data ? static_cast<T*>(p.compress.out.data) + m * p.compress.columns
                               : reinterpret_cast<T*>(room);
  }

  bool by_dots() const {
    const int64_t middle = p.compress.rows * blocks;
    const bool own = p.matrix.dtype == p.compress.x.dtype || p.matrix.dtype == DType::f32;
    return middle && middle <= K::kDotRows && p.matrix.stride1 == 1 && own;
  }

  void run_few(int threads, int64_t z_bytes) const {
    const int64_t rows = p.compress.rows, columns = p.compress.columns;
    char* memory =
        static_cast<char*>(scratch(static_cast<size_t>((z_bytes + line_bytes<float>(columns)) * rows)));
    T* z = z_at(0, memory);
    float* v = reinterpret_cast<float*>(memory + z_bytes * rows);
    for (int64_t m = 0; m < rows; ++m) compress.row(m, z + m * columns);
    parallel_tasks(threads, ceil_div(p.size, kDotOutputs), [&](int, int64_t task) {
      const int64_t o0 = task * kDotOutputs, o1 = min_of(o0 + kDotOutputs, p.size);
      K::dot_rows(p.matrix, o0, o1, rows * blocks, z, p.size, v, p.size);
    });
    finish(0, rows, v);
  }

  int64_t strip_columns(int64_t strip) const { return min_of(kStrip, p.size - strip * kStrip); }
  // Strips of a chunk lie one after the other, each with room for what packing leaves beyond its depth.
  Elem* strip_at(int64_t c, int64_t strip) const {
    return panel + (c * strips + strip * round_up(min_of(depth, padded - c), Driver::kPackStep)) * kStrip;
  }

  void pack(int64_t c, int64_t strip) const {
    const int64_t n = max_of<int64_t>(0, min_of(depth, p.size - c));
    Driver::pack_dense(p.matrix, strip * kStrip, strip_columns(strip), c, n, min_of(depth, padded - c),
                       strip_at(c, strip));
  }

  // Rows m0 … m0 + count of x; z [count · n][r̂], room for A where z is not it, v [count · n][v_stride].
  void run_rows(int64_t m0, int64_t count, T* z, Elem* room, float* v) const {
    const int64_t columns = p.compress.columns, middle = count * blocks;
    for (int64_t m = 0; m < count; ++m) compress.row(m0 + m, z + m * columns);
    const Elem* a = room;
    if constexpr (std::is_same_v<T, Elem>) {
      if (in_place) a = z;
    }
    for (int64_t k = 0; !in_place && k < middle; ++k) {
      convert_row(z + k * p.size, 1, p.size, room + k * padded);
      std::memset(room + k * padded + p.size, 0, static_cast<size_t>(padded - p.size) * sizeof(Elem));
    }
    const MatmulParams out = rows_of_out(m0, count);
    const Epilogue lines(out);
    const int64_t steps = ceil_div(middle, K::kRowSplitX) * strips * ceil_div(padded, depth);
    int64_t step = 0;
    for (int64_t c = 0; c < padded; c += depth) {
      const int64_t pairs = min_of(depth, padded - c) / kPair;
      for (int64_t k = 0; k < middle; k += Driver::kPiece) {
        const int64_t end = min_of(k + Driver::kPiece, middle);
        for (int64_t j = 0; j < strips; ++j)
          for (int64_t i = k; i < end; i += K::kRowSplitX, ++step) {
            fetch(lines, m0, count, step, steps);
            K::multiply(min_of<int64_t>(K::kRowSplitX, end - i), ceil_div(strip_columns(j), K::kLanes), pairs,
                        a + i * padded + c, padded, strip_at(c, j), kStrip * kPair,
                        v + i * v_stride + j * kStrip, v_stride, c == 0);
          }
      }
    }
    for (int64_t k = 1; v_stride != p.size && k < middle; ++k)
      std::memmove(v + k * p.size, v + k * v_stride, static_cast<size_t>(p.size) * sizeof(float));
    finish(m0, count, v);
  }

  MatmulParams rows_of_out(int64_t m0, int64_t count) const {
    MatmulParams out = p.out;
    out.rows = count;
    out.out.data =
        static_cast<char*>(out.out.data) + m0 * out.out.stride0 * (out.out.dtype == DType::f32 ? 4 : 2);
    return out;
  }

  // From v, the sums of rows m0 … m0 + count, to out.
  void finish(int64_t m0, int64_t count, float* v) const {
    if (p.alpha != 1.0f) scale(v, count * p.compress.columns);
    if (p.turn_back) turn_back(v, count);
    MatmulParams out = rows_of_out(m0, count);
    out.spread.values = {v, DType::f32, p.compress.columns, 1};
    run_alone(out, 0, count, 0, ceil_div(out.outputs, kAloneColumns));
  }

  // One of `steps` shares of the lines that this group will write and the next one will read.
  void fetch(const Epilogue& out, int64_t m0, int64_t count, int64_t step, int64_t steps) const {
    const CompressParams& x = p.compress;
    constexpr int64_t kSize = sizeof(T);
    const int64_t rows = min_of(count, x.rows - m0 - count);
    for_share(rows * x.wide, x.wide, step, steps, [&](int64_t m, int64_t from, int64_t n) {
      if (x.x.stride1 == 1)
        prefetch_bytes(x.x.data, ((m0 + count + m) * x.x.stride0 + from) * kSize, n * kSize);
    });
    for_share(count * p.out.outputs, p.out.outputs, step, steps,
              [&](int64_t m, int64_t from, int64_t n) { out.prefetch(m, 1, from, n); });
  }

  // body(row, from, n) for the pieces of rows of `wide` that share `step` of `total` numbers has.
  template <class Body>
  static void for_share(int64_t total, int64_t wide, int64_t step, int64_t steps, const Body& body) {
    const int64_t end = total * (step + 1) / steps;
    for (int64_t at = total * step / steps; at < end;) {
      const int64_t from = at % wide, n = min_of(wide - from, end - at);
      body(at / wide, from, n);
      at += n;
    }
  }

  void scale(float* v, int64_t n) const {
    const Vec alpha = set1(p.alpha);
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(v + i, mul(load(v + i), alpha));
    for (; i < n; ++i) v[i] *= p.alpha;
  }

  void turn_back(float* v, int64_t count) const {
    const int64_t half = p.size / 2;
    for (int64_t k = 0; k < count * blocks; ++k, v += p.size) {
      const float* cosine = p.turn_back + k % blocks * p.size;
      turn(v, v + half, cosine, cosine + half, set1(-1.0f), half, v, v + half);
    }
  }

  const MoraParams& p;
  const Compress<T> compress;
  const int64_t blocks, padded, depth, strips, v_stride;
  const bool in_place;     // z is A
  int64_t group_rows = 0;  // of x
  Elem* panel = nullptr;
};

template <class K, class T>
class MoraGrad {
  using Elem = typename K::Elem;
  using Driver = Matmul<K>;
  static constexpr int64_t kStrip = K::kStrip;
  static constexpr int64_t kPair = K::kPair;

 public:
  explicit MoraGrad(const MoraGradParams& params)
      : p(params),
        g_middle(p.g),
        z_middle(p.z),
        columns(p.z.columns),
        blocks(columns / p.size),
        strips(ceil_div(p.size, kStrip)),
        c_stride(round_up(p.size, K::kLanes)),
        part_rows(rows_of_a_part(p.z.rows, blocks, line_bytes<float>(p.size * c_stride))),
        parts(ceil_div(p.z.rows, part_rows)),
        group_rows(min_of(part_rows, max_of<int64_t>(1, K::kDepth / blocks))),
        depth(Driver::chunk_depth(round_up(group_rows * blocks, K::kAlignX))) {}

  void run() {
    const int64_t rows = p.z.rows;
    const double work =
        static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(p.size);
    const int threads = work < K::kSerialWork ? 1 : p.threads;
    const int64_t c_bytes = line_bytes<float>(p.size * c_stride);
    const int64_t middle_bytes = line_bytes<T>(group_rows * columns);
    const int64_t panel_bytes = line_bytes<Elem>(round_up(depth, Driver::kPackStep) * strips * kStrip);
    const int64_t per_thread =
        2 * middle_bytes + panel_bytes + line_bytes<Elem>(Driver::kPiece * Driver::kRowStride);
    char* memory = static_cast<char*>(scratch(static_cast<size_t>(parts * c_bytes + per_thread * threads)));
    float* sums = reinterpret_cast<float*>(memory);
    parallel_tasks(threads, parts, [&](int thread, int64_t part) {
      char* mine = memory + parts * c_bytes + per_thread * thread;
      const Room room = {reinterpret_cast<T*>(mine), reinterpret_cast<T*>(mine + middle_bytes),
                         reinterpret_cast<Elem*>(mine + 2 * middle_bytes),
                         reinterpret_cast<Elem*>(mine + 2 * middle_bytes + panel_bytes)};
      const int64_t end = min_of((part + 1) * part_rows, rows);
      bool empty = true;
      for (int64_t m = part * part_rows; m < end; m += group_rows, empty = false)
        add_rows(room, m, min_of(group_rows, end - m), sums + part * (c_bytes / 4), empty);
    });
    parallel_tasks(threads, p.size, [&](int, int64_t i) {
      float* out = p.out + i * p.size;
      for (int64_t j = 0; j < p.size; j += Vec::kWidth) {
        const int n = static_cast<int>(min_of<int64_t>(Vec::kWidth, p.size - j));
        Vec sum = zero();
        for (int64_t part = 0; part < parts; ++part)
          sum = add(sum, load(sums + part * (c_bytes / 4) + i * c_stride + j));
        store_n(out + j, mul(sum, set1(p.alpha)), n);
      }
    });
  }

 private:
  static constexpr int64_t kParts = 16;           // at most, each with a matrix of sums,
  static constexpr int64_t kPartBytes = 8 << 20;  // all of them in so much, if there are several
  static constexpr int64_t kPartRows = 256;       // of the middle at least: enough to outweigh adding a part

  static int64_t rows_of_a_part(int64_t rows, int64_t blocks, int64_t c_bytes) {
    const int64_t most = min_of(min_of(kParts, kPartBytes / c_bytes), rows * blocks / kPartRows);
    return max_of<int64_t>(1, ceil_div(rows, max_of<int64_t>(1, most)));
  }

  struct Room {
    T *g, *z;
    Elem *panel, *piece;
  };

  // Rows m0 … m0 + count of x and dY, to c [r̂, c_stride].
  void add_rows(const Room& room, int64_t m0, int64_t count, float* c, bool empty) const {
    for (int64_t m = 0; m < count; ++m) {
      g_middle.row(m0 + m, room.g + m * columns);
      z_middle.row(m0 + m, room.z + m * columns);
    }
    // [r̂, count · n], the contraction last
    const Matrix g = {room.g, p.g.x.dtype, 1, p.size}, z = {room.z, p.z.x.dtype, 1, p.size};
    const int64_t middle = count * blocks, padded = round_up(middle, K::kAlignX);
    for (int64_t k = 0; k < padded; k += depth, empty = false) {
      const int64_t some = min_of(depth, padded - k), n = min_of(some, middle - k), pairs = some / kPair;
      const int64_t strip_elems = round_up(some, Driver::kPackStep) * kStrip;
      for (int64_t j = 0; j < strips; ++j)
        Driver::pack_dense(z, j * kStrip, min_of(kStrip, p.size - j * kStrip), k, n, some,
                           room.panel + j * strip_elems);
      for (int64_t i = 0; i < p.size; i += Driver::kPiece) {
        const int64_t rows = min_of(Driver::kPiece, p.size - i);
        if constexpr (K::kAcross) {
          Driver::pack_piece(g, i, rows, k, n, some, room.piece);
        } else {
          for (int64_t r = 0; r < rows; r += K::kLanes)
            Driver::pack_rows_across(g, i + r, min_of<int64_t>(K::kLanes, rows - r), k, n, some,
                                     room.piece + r * Driver::kRowStride, Driver::kRowStride);
        }
        for (int64_t j = 0; j < strips; ++j) {
          const int64_t vectors = ceil_div(min_of(kStrip, p.size - j * kStrip), K::kLanes);
          const Elem* b = room.panel + j * strip_elems;
          float* to = c + i * c_stride + j * kStrip;
          if constexpr (K::kAcross) {
            K::multiply_across(rows, vectors, pairs, room.piece, Driver::kPiece * kPair, b, kStrip * kPair,
                               to, c_stride, empty);
          } else {
            K::multiply(rows, vectors, pairs, room.piece, Driver::kRowStride, b, kStrip * kPair, to, c_stride,
                        empty);
          }
        }
      }
    }
  }

  const MoraGradParams& p;
  const Compress<T> g_middle, z_middle;
  const int64_t columns, blocks, strips, c_stride;
  const int64_t part_rows, parts;
  const int64_t group_rows;  // of x, whose middle is at most one chunk of the contraction, or one row
  const int64_t depth;
};

}  // namespace
}  // namespace peftkern::PEFTKERN_ISA
