// Success curves: q^1 .. q^16 times q^0, q^16, q^32, q^48 is an outer product, summed over the quantiles in float64; a lane is a row.
#include <cstring>
#include <vector>

#include "common/flush_denormals.h"
#include "common/parallel_for.h"
#include "ias/rows.h"
#include "ias/wave.h"

namespace prmfast::ias {

PRMFAST_MULTIVERSION void failures(const float* p, int64_t n, double* q) { failures_of(p, n, q); }
PRMFAST_MULTIVERSION void failures(const double* p, int64_t n, double* q) { failures_of(p, n, q); }

namespace {

constexpr int kPowers = 16, kMultiples = 4, kSpan = kPowers * kMultiples;  // N of one outer product
constexpr int kTogether = 16;  // columns that are prepared before any is added: their powers stay in L1
constexpr int kTile = 4;       // powers that meet all multiples in registers

template <int L>
struct BlockOf {
  typedef double Double __attribute__((vector_size(L * 8)));
};
template <int L>
using Block = typename BlockOf<L>::Double;

template <int L>
struct Column {
  Block<L> powers[kPowers], multiples[kMultiples];
};

template <int L>
struct Scratch {
  Column<L> columns[kTogether];
  Block<L> sums[kMultiples][kPowers];
};

// L rows; where there are fewer, the last one stands in for those that are missing.
template <int L, class T>
struct Rows {
  const T* p[L];
  T* out[L];
  int64_t columns, n_max, count, ahead;  // the next wave's rows stand that many elements behind these
  const double (*unit)[8];
};

// 0 and 1 from memory, for the same reason as in budget_cpu.cpp.
alignas(64) const double kUnitInMemory[2][8] = {{}, {1, 1, 1, 1, 1, 1, 1, 1}};

// Powers fall as computed: each is a product of what its predecessor is a product of, with one factor replaced by a smaller one, and
// rounding is monotone. So does A' q behind A q^16, with A' = A q^16 rounded: q is 1, or less than 1 by more than the rounding.
template <int L>
PRMFAST_INLINE void prepare(Block<L> q, Block<L> first, Column<L>* column) {
  Block<L> power[kPowers + 1];
  power[1] = q;
  power[2] = q * q;
  power[3] = q * power[2];
  power[4] = power[2] * power[2];
#pragma GCC unroll 4
  for (int n = 5; n <= 8; ++n) power[n] = power[n - 4] * power[4];
#pragma GCC unroll 8
  for (int n = 9; n <= 16; ++n) power[n] = power[n - 8] * power[8];
#pragma GCC unroll 16
  for (int n = 1; n <= kPowers; ++n) column->powers[n - 1] = power[n];
#pragma GCC unroll 4
  for (int a = 0; a < kMultiples; ++a) {
    column->multiples[a] = first;
    first *= power[kPowers];
  }
}

// sums[a][n] += multiples[a] * powers[n]
template <int L>
PRMFAST_INLINE void add(const Column<L>* columns, int64_t count, Block<L> (*sums)[kPowers]) {
  for (int n = 0; n < kPowers; n += kTile) {
    Block<L> sum[kMultiples][kTile];
#pragma GCC unroll 4
    for (int a = 0; a < kMultiples; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < kTile; ++b) sum[a][b] = sums[a][n + b];
    for (int64_t m = 0; m < count; ++m)
#pragma GCC unroll 4
      for (int b = 0; b < kTile; ++b)
#pragma GCC unroll 4
        for (int a = 0; a < kMultiples; ++a) sum[a][b] += columns[m].powers[n + b] * columns[m].multiples[a];
#pragma GCC unroll 4
    for (int a = 0; a < kMultiples; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < kTile; ++b) sums[a][n + b] = sum[a][b];
  }
}

// S = (M - F) / M, and not 1 - F / M: 0 where nothing ever succeeds, 1 where all do, and never outside.
template <int L>
PRMFAST_INLINE void write(const Rows<L, double>& rows, const Block<L>* sums, int64_t from) {
  const double columns = static_cast<double>(rows.columns);
  for (int64_t n = 0; n < kSpan && from + n < rows.n_max; ++n) {
    const Block<L> success = (columns - sums[n]) / columns;
    for (int64_t i = 0; i < rows.count; ++i) rows.out[i][from + n] = success[i];
  }
}

template <int L>
PRMFAST_INLINE void write(const Rows<L, float>& rows, const Block<L>* sums, int64_t from) {
  const double columns = static_cast<double>(rows.columns), share = 1 / columns;
  for (int64_t n = 0; n < kSpan && from + n < rows.n_max; n += 4) {
    Wave<L> success[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) success[j] = __builtin_convertvector((columns - sums[n + j]) * share, Wave<L>);
    transpose_fours<L>(success);
    if (rows.count == L && from + n + 4 <= rows.n_max) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
        for (int half = 0; half < L / 4; ++half) {
          Wave<4> part;
          std::memcpy(&part, reinterpret_cast<const char*>(&success[j]) + half * sizeof part, sizeof part);
          std::memcpy(rows.out[j + 4 * half] + from + n, &part, sizeof part);
        }
    } else {
      for (int64_t i = 0; i < rows.count; ++i)
        for (int64_t j = 0; j < 4 && from + n + j < rows.n_max; ++j) rows.out[i][from + n + j] = success[i % 4][i / 4 * 4 + j];
    }
  }
}

template <int L, class T>
PRMFAST_INLINE void load_column(const Rows<L, T>& rows, int64_t m, Block<L>* q) {
  typedef T Values __attribute__((vector_size(L * sizeof(T))));
  Values p;
#pragma GCC unroll 8
  for (int i = 0; i < L; ++i) p[i] = rows.p[i][m];
  *q = __builtin_convertvector(p, Block<L>);
}

template <int L>
PRMFAST_INLINE void load_four(const Rows<L, double>& rows, int64_t m, Block<L>* q) {
  for (int j = 0; j < 4; ++j) load_column<L>(rows, m + j, q + j);
}
template <int L>
PRMFAST_INLINE void load_four(const Rows<L, float>& rows, int64_t m, Block<L>* q) {
  Wave<L> column[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Wave<4> a, b;
    std::memcpy(&a, rows.p[i] + m, sizeof a);
    if constexpr (L == 4) {
      column[i] = a;
    } else {
      std::memcpy(&b, rows.p[i + 4] + m, sizeof b);
      column[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
    }
  }
  transpose_fours<L>(column);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) q[j] = __builtin_convertvector(column[j], Block<L>);
}

// starts: what the next span's powers are multiplied with, L for each column.
template <int L, class T>
PRMFAST_INLINE void curve_rows(const Rows<L, T>& rows, Scratch<L>* scratch, double* starts, bool* number) {
  Block<L> zero, one;
  std::memcpy(&zero, rows.unit[0], sizeof zero);
  std::memcpy(&one, rows.unit[1], sizeof one);
  const auto prepare_next = [&](Block<L> p, int64_t from, double* start, Column<L>* column) __attribute__((always_inline)) {
    Block<L> q = one - p, first = one;
    q = zero > q ? zero : q;  // in this order NaN stays NaN
    q = one < q ? one : q;
    if (from > 0) std::memcpy(&first, start, sizeof first);
    prepare<L>(q, first, column);
    if (from + kSpan < rows.n_max) {
      first = column->multiples[kMultiples - 1] * column->powers[kPowers - 1];
      std::memcpy(start, &first, sizeof first);
    }
  };
  for (int64_t from = 0; from < rows.n_max; from += kSpan) {
    std::memset(scratch->sums, 0, sizeof scratch->sums);
    for (int64_t m = 0; m < rows.columns; m += kTogether) {
      const int64_t count = std::min<int64_t>(kTogether, rows.columns - m);
      for (int i = 0; i < L; ++i) __builtin_prefetch(rows.p[i] + rows.ahead + m);
      int64_t c = 0;
      Block<L> p[4];
      for (; c + 4 <= count; c += 4) {
        load_four<L>(rows, m + c, p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) prepare_next(p[j], from, starts + (m + c + j) * L, &scratch->columns[c + j]);
      }
      for (; c < count; ++c) {
        load_column<L>(rows, m + c, p);
        prepare_next(p[0], from, starts + (m + c) * L, &scratch->columns[c]);
      }
      add<L>(scratch->columns, count, scratch->sums);
    }
    if (from == 0)
      for (int i = 0; i < rows.count; ++i) number[i] = scratch->sums[0][0][i] == scratch->sums[0][0][i];
    write<L>(rows, scratch->sums[0], from);
  }
}

constexpr int kWide = 8, kNarrow = 4;

PRMFAST_AVX512 void curve_avx512(const Rows<kWide, float>& rows, void* scratch, double* starts, bool* number) {
  curve_rows<kWide>(rows, static_cast<Scratch<kWide>*>(scratch), starts, number);
}
PRMFAST_AVX512 void curve_avx512(const Rows<kWide, double>& rows, void* scratch, double* starts, bool* number) {
  curve_rows<kWide>(rows, static_cast<Scratch<kWide>*>(scratch), starts, number);
}
PRMFAST_MULTIVERSION void curve_narrow(const Rows<kNarrow, float>& rows, void* scratch, double* starts, bool* number) {
  curve_rows<kNarrow>(rows, static_cast<Scratch<kNarrow>*>(scratch), starts, number);
}
PRMFAST_MULTIVERSION void curve_narrow(const Rows<kNarrow, double>& rows, void* scratch, double* starts, bool* number) {
  curve_rows<kNarrow>(rows, static_cast<Scratch<kNarrow>*>(scratch), starts, number);
}

template <int L, class T, class Run>
void curve_range(const Quantiles<T>& quantiles, int64_t n_max, int64_t begin, int64_t end, T* out, FirstNan* nan, const Run& run) {
  LaneBuffer<double> scratch(sizeof(Scratch<L>) / sizeof(Lanes));
  std::vector<double> starts(n_max > kSpan ? quantiles.columns * L : 0);
  for (int64_t row = begin; row < end; row += L) {
    Rows<L, T> rows;
    rows.columns = quantiles.columns;
    rows.n_max = n_max;
    rows.ahead = row + L < end ? L * quantiles.stride : 0;
    rows.unit = kUnitInMemory;
    rows.count = std::min<int64_t>(L, end - row);
    for (int64_t i = 0; i < L; ++i) {
      const int64_t r = row + std::min(i, rows.count - 1);
      rows.p[i] = quantiles.data + r * quantiles.stride;
      rows.out[i] = out + r * n_max;
    }
    bool number[L];
    run(rows, &scratch[0], starts.data(), number);
    for (int64_t i = 0; i < rows.count; ++i)
      if (!number[i]) nan->found(row + i);
  }
}

}  // namespace

template <class T>
int64_t curve(const Quantiles<T>& quantiles, int64_t n_max, T* out, int threads) {
  FirstNan nan;
  parallel_rows(quantiles.rows, thread_count(quantiles.rows, quantiles.columns * n_max / 8, threads), [&](int, int64_t first, int64_t end) {
    const FlushDenormals flush(Flush::results_and_inputs);
    if (chosen_isa() == Isa::kAvx512) {
      curve_range<kWide>(quantiles, n_max, first, end, out, &nan, [](auto&&... arguments) { curve_avx512(arguments...); });
    } else {
      curve_range<kNarrow>(quantiles, n_max, first, end, out, &nan, [](auto&&... arguments) { curve_narrow(arguments...); });
    }
  });
  return nan.row();
}

template int64_t curve<float>(const Quantiles<float>&, int64_t, float*, int);
template int64_t curve<double>(const Quantiles<double>&, int64_t, double*, int);

}  // namespace prmfast::ias
