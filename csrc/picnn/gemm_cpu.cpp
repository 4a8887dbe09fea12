// A block of 512 of the depth at a time: the whole of b is packed into tiles that stay in L2, then 32 rows of a after the other are
// packed and multiplied with all of it, 2 x 2 tiles of the result in registers.
#include "picnn/gemm.h"

#include "common/parallel_for.h"
#include "picnn/engines.h"

namespace prmfast::picnn {
namespace {

constexpr int64_t kSide = 16, kStep = 32, kDepthBlock = 512, kTile = kSide * kSide;  // a tile is 16 x 16 pairs, 1 KB
typedef Lanes<uint32_t> Pairs;

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

PRMFAST_INLINE void transpose_pairs(Pairs* block) {
  Lanes<float> lanes[kSide];
  std::memcpy(lanes, block, sizeof lanes);
  transpose<float>(lanes);
  std::memcpy(block, lanes, sizeof lanes);
}

// Sixteen numbers, zeros behind the first n.
PRMFAST_INLINE Lanes<float> load_some(const float* p, int64_t n) {
  if (n >= kSide) return load(p);
  Lanes<float> v{};
  if (n > 0) std::memcpy(&v, p, n * sizeof(float));
  return v;
}

// 16 rows x 32 of the depth as two tiles of pairs, high and low parts: [pair][row], or [row][pair].
PRMFAST_INLINE void pack_tile(const Matrix& from, int64_t row, int64_t rows, int64_t depth, int64_t depth_end, bool pairs_first,
                              uint32_t* high, uint32_t* low) {
  Pairs h[kSide], l[kSide];
  const int64_t some_rows = std::min(kSide, rows - row);
  if (from.row_stride == 1) {  // [pair][row] as it lies
    for (int64_t k = 0; k < kSide; ++k) {
      const int64_t at = depth + 2 * k;
      const float* p = from.data + row + at * from.depth_stride;
      split_pair(load_some(p, at < depth_end ? some_rows : 0), load_some(p + from.depth_stride, at + 1 < depth_end ? some_rows : 0), &h[k],
                 &l[k]);
    }
    if (!pairs_first) transpose_pairs(h), transpose_pairs(l);
  } else {  // [row][pair]: even and odd numbers of 32 neighbours
    for (int64_t r = 0; r < kSide; ++r) {
      const float* p = from.data + (row + r) * from.row_stride + depth;
      const int64_t left = r < some_rows ? depth_end - depth : 0;
      const Lanes<float> a = load_some(p, left), b = load_some(p + kSide, left - kSide);
      const Lanes<float> even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const Lanes<float> odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      split_pair(even, odd, &h[r], &l[r]);
    }
    if (pairs_first) transpose_pairs(h), transpose_pairs(l);
  }
  std::memcpy(high, h, sizeof h);
  std::memcpy(low, l, sizeof l);
}

struct Task {
  Matrix a, b;
  const float* bias;
  int64_t m, n, depth;
  float* out;
  const uint32_t* packed;  // b of this block of the depth: [n / 16][step][high, low] tiles
  int64_t first, steps;    // of the depth, in steps of 32
};

// 32 x 32 of the result, C += A B over the steps; each of a's and b's two tile rows is [step][high, low].
template <class Tiles>
PRMFAST_INLINE void multiply_block(const uint32_t* a, const uint32_t* b, int64_t steps, float (*c)[kTile]) {
  Tiles::template load<0>(c[0]);
  Tiles::template load<1>(c[1]);
  Tiles::template load<2>(c[2]);
  Tiles::template load<3>(c[3]);
  const int64_t next = steps * 2 * kTile;
  for (int64_t s = 0; s < steps; ++s, a += 2 * kTile, b += 2 * kTile) {
    Tiles::template load<4>(a);
    Tiles::template load<5>(a + next);
    Tiles::template load<6>(b);
    Tiles::template load<7>(b + next);
    Tiles::template multiply<0, 4, 6>();
    Tiles::template multiply<1, 4, 7>();
    Tiles::template multiply<2, 5, 6>();
    Tiles::template multiply<3, 5, 7>();
    Tiles::template load<4>(a + kTile);  // low parts of a
    Tiles::template load<5>(a + next + kTile);
    Tiles::template multiply<0, 4, 6>();
    Tiles::template multiply<1, 4, 7>();
    Tiles::template multiply<2, 5, 6>();
    Tiles::template multiply<3, 5, 7>();
    Tiles::template load<4>(a);
    Tiles::template load<5>(a + next);
    Tiles::template load<6>(b + kTile);  // low parts of b
    Tiles::template load<7>(b + next + kTile);
    Tiles::template multiply<0, 4, 6>();
    Tiles::template multiply<1, 4, 7>();
    Tiles::template multiply<2, 5, 6>();
    Tiles::template multiply<3, 5, 7>();
  }
  Tiles::template store<0>(c[0]);
  Tiles::template store<1>(c[1]);
  Tiles::template store<2>(c[2]);
  Tiles::template store<3>(c[3]);
}

PRMFAST_INLINE void pack_b(const Task& t, int64_t begin, int64_t end, uint32_t* packed) {
  for (int64_t j = begin; j < end; ++j)
    for (int64_t s = 0; s < t.steps; ++s) {
      uint32_t* to = packed + (j * t.steps + s) * 2 * kTile;
      pack_tile(t.b, j * kSide, t.n, t.first + s * kStep, t.depth, true, to, to + kTile);
    }
}

template <class Tiles>
PRMFAST_INLINE void multiply_rows(const Task& t, int64_t begin, int64_t end) {
  LaneBuffer<uint32_t> memory(2 * t.steps * 2 * kTile / kSide);
  uint32_t* a = reinterpret_cast<uint32_t*>(memory.get());
  alignas(64) float c[4][kTile];
  Tiles::start();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i * 2 * kSide;
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t s = 0; s < t.steps; ++s) {
        uint32_t* to = a + (half * t.steps + s) * 2 * kTile;
        pack_tile(t.a, row + half * kSide, t.m, t.first + s * kStep, t.depth, false, to, to + kTile);
      }
    for (int64_t column = 0; column < t.n; column += 2 * kSide) {
      for (int64_t tile = 0; tile < 4; ++tile)
        for (int64_t r = 0; r < kSide; ++r) {
          const int64_t at = row + tile / 2 * kSide + r, from = column + tile % 2 * kSide, n = at < t.m ? t.n - from : 0;
          const float* before = t.first ? t.out + at * t.n + from : t.bias ? t.bias + from : nullptr;
          store(&c[tile][r * kSide], before ? load_some(before, n) : Lanes<float>{});
        }
      multiply_block<Tiles>(a, t.packed + column / kSide * t.steps * 2 * kTile, t.steps, c);
      for (int64_t tile = 0; tile < 4; ++tile)
        for (int64_t r = 0; r < kSide; ++r) {
          const int64_t at = row + tile / 2 * kSide + r, from = column + tile % 2 * kSide;
          const int64_t n = at < t.m ? std::min(kSide, t.n - from) : 0;
          if (n > 0) std::memcpy(t.out + at * t.n + from, &c[tile][r * kSide], n * sizeof(float));
        }
    }
  }
  Tiles::stop();
}

PRMFAST_MULTIVERSION void run_pack(const Task& t, int64_t begin, int64_t end, uint32_t* packed) { pack_b(t, begin, end, packed); }

#if PRMFAST_HAS_ISAS
PRMFAST_AVX512 void run_native(const Task& t, int64_t begin, int64_t end) { multiply_rows<NativeTiles>(t, begin, end); }
#endif

void run(const Task& t, int64_t begin, int64_t end) {
#if PRMFAST_HAS_ISAS
  if (chosen_amx() == Amx::kNative) return run_native(t, begin, end);
#endif
  multiply_rows<EmulatedTiles>(t, begin, end);
}

}  // namespace

void gemm(const Matrix& a, const Matrix& b, const float* bias, int64_t m, int64_t n, int64_t depth, float* out, int threads) {
  if (m == 0 || n == 0) return;
  const int64_t columns = (blocks(n, 2 * kSide)) * 2;  // tiles, an even number
  LaneBuffer<uint32_t> memory(columns * (kDepthBlock / kStep) * 2 * kTile / kSide);
  uint32_t* packed = reinterpret_cast<uint32_t*>(memory.get());
  int64_t first = 0;
  do {
    Task task{a, b, bias, m, n, depth, out, packed, first, blocks(std::min(kDepthBlock, depth - first), kStep)};
    const auto used = [&](int64_t pieces, int64_t work) { return thread_count(pieces, work, threads); };
    parallel_rows(columns, used(columns, task.steps * kTile * 8), [&](int, int64_t begin, int64_t end) { run_pack(task, begin, end, packed); });
    const int64_t pieces = blocks(m, 2 * kSide);
    parallel_rows(pieces, used(pieces, 2 * kSide * n * task.steps * kStep), [&](int, int64_t begin, int64_t end) { run(task, begin, end); });
    first += kDepthBlock;
  } while (first < depth);
}

}  // namespace prmfast::picnn
