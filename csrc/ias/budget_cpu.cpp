// The smallest N that reaches the target: a float32 search over many rows at once, and the float64 search that decides what is close.
#include <cmath>
#include <vector>

#include "common/flush_denormals.h"
#include "common/parallel_for.h"
#include "ias/rows.h"
#include "ias/wave.h"

namespace prmfast::ias {
namespace {

// --- one row, float64: the contract

// out = a * b; returns its sum.
PRMFAST_INLINE double multiply(const double* a, const double* b, double* out, int64_t width) {
  Lanes even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const Lanes x = load(a + i) * load(b + i), y = load(a + i + kLanes) * load(b + i + kLanes);
    store(out + i, x);
    store(out + i + kLanes, y);
    even += x;
    odd += y;
  }
  if (i < width) {
    const Lanes x = load(a + i) * load(b + i);
    store(out + i, x);
    even += x;
  }
  return sum<double>(even + odd);
}

// The bits of N - 1 from the highest down: a bit is set where N - 1 samples still miss the target. S is monotone in N.
// powers[k] = q^(2^k), of which powers[0] is given; current and trial are scratch; all of the same width.
PRMFAST_MULTIVERSION int64_t search(double* powers, double* current, double* trial, int64_t width, int bits, double columns,
                                    double wanted) {
  for (int k = 1; k < bits; ++k) {
    const double* half = powers + (k - 1) * width;
    for (int64_t i = 0; i < width; i += kLanes) store(powers + k * width + i, load(half + i) * load(half + i));
  }
  std::fill(current, current + width, 1.0);
  int64_t missing = 0;
  for (int k = bits - 1; k >= 0; --k) {
    const double failing = multiply(current, powers + k * width, trial, width);
    if (1 - failing / columns < wanted) {
      missing += int64_t{1} << k;
      std::swap(current, trial);
    }
  }
  return missing + 1;
}

template <class T>
class ExactSearch {
 public:
  ExactSearch(const Quantiles<T>& quantiles, int bits, int64_t n_max, FirstNan* nan)
      : quantiles_(quantiles), width_(padded(quantiles.columns)), bits_(bits), n_max_(n_max), nan_(nan) {}

  int32_t row(int64_t row, double wanted) {
    if (scratch_.empty()) scratch_.assign(width_ * (std::max(bits_, 1) + 2), 0.0);
    double* q = scratch_.data();
    failures(quantiles_.data + row * quantiles_.stride, quantiles_.columns, q);
    if (has_nan(q, quantiles_.columns)) nan_->found(row);
    double* current = q + width_ * std::max(bits_, 1);
    const int64_t n = search(q, current, current + width_, width_, bits_, static_cast<double>(quantiles_.columns), wanted);
    return static_cast<int32_t>(std::min(n, n_max_));
  }

 private:
  Quantiles<T> quantiles_;
  int64_t width_;
  int bits_;
  int64_t n_max_;
  FirstNan* nan_;
  std::vector<double> scratch_;
};

// --- W rows at once, float32: a lane is a row, so nothing is summed across lanes
//
// Bound. u = 2^-24. q = 1 - p is off by at most one rounding, and a product of powers n and n' of q by the roundings of both and its
// own: q^n is within (1 + u)^(2n - 1) of the truth, however it is multiplied together. A sum of M such terms adds M - 1 roundings;
// everything is >= 0, so F(n) = sum_m q_m^n is within (1 + u)^(2n + M), relatively. e = 1.25 (2n + M) u covers that, its inverse and
// its second order as long as e <= 1/8 (kMaxN and kMaxColumns keep it below 1/60), and leaves a tenth for the float64 search's own
// (2n + M) 2^-53 and for F (1 +- e) computed in float32. What is left of the float64 comparison is absolute, the rounding of
// 1 - F/M: less than 2^-51, and so is what flushing denormals loses: M 2^-50 on the limit covers both. Hence F (1 - e) > limit + that
// means that float64 finds n samples too few, F (1 + e) < limit - that means that it finds them enough, and all else is asked there.
constexpr float kRounding = 0x1p-24f;
constexpr int64_t kMaxN = 65536, kMaxColumns = 4096;
constexpr int kMostStages = 8;

// 0 and 1, read from memory that the compiler does not see into: where it knows the constants, it turns the selections below into
// compare and blend instead of max and min.
template <int W>
struct Unit {
  Wave<W> zero, one;
};
alignas(64) const float kUnitInMemory[2][16] = {{}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}};

// F at three neighbouring multiples of the step.
template <int W>
struct Sums {
  Wave<W> at[3];
};

// Where the search of a wave stands: N - 1 so far, the last digit, how many comparisons were too close, and the limits of clear ones.
// Flags are floats, and made by arithmetic: GCC 12 takes a comparison apart, lane by lane, where its result is used twice.
template <int W>
struct State {
  Wave<W> missing, digit, open, above, below;
};

// NaN passes through the first selection, whose operands stand so that an unordered comparison takes x.
template <int W>
PRMFAST_INLINE Wave<W> clip(Wave<W> x, const Unit<W>& unit) {
  x = unit.zero > x ? unit.zero : x;
  return unit.one < x ? unit.one : x;
}

// 1 where x > 0, 0 elsewhere, NaN for NaN; x is 0 or beyond 1e-20.
template <int W>
PRMFAST_INLINE Wave<W> is_positive(Wave<W> x, const Unit<W>& unit) {
  return clip<W>(x * 1e30f, unit);
}

// The next base-4 digit of N - 1: how many of the three sums are too large.
template <int W>
PRMFAST_INLINE void decide(const Sums<W>& sums, float step, float columns, const Unit<W>& unit, State<W>* state) {
  const Wave<W> slack = (2 * (state->missing + 3 * step) + columns) * (1.25f * kRounding);
  state->digit = Wave<W>{};
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Wave<W> error = sums.at[j] * slack;
    const Wave<W> misses = is_positive<W>(sums.at[j] - error - state->above, unit);
    const Wave<W> meets = is_positive<W>(state->below - (sums.at[j] + error), unit);
    state->digit += misses;
    state->open += unit.one - misses - meets;
  }
  state->missing += state->digit * step;
}

// One column: q, q^4, q^16, ... but for the last, which the next stage makes of the last but one.
template <int W, int kStages>
PRMFAST_INLINE void start_column(Wave<W> z, bool ready, const Unit<W>& unit, Wave<W>* powers, Sums<W>* sums) {
  if (!ready) z = clip<W>(unit.one - z, unit);
#pragma GCC unroll 8
  for (int k = 0; k < kStages - 1; ++k) {
    powers[k] = z;
    z *= z;
    z *= z;
  }
  const Wave<W> square = z * z;
  sums->at[0] += z;
  sums->at[1] += square;
  sums->at[2] += square * z;
}

// powers: kStages - 1 vectors of W rows per column.
template <int W, int kStages>
PRMFAST_INLINE void first_stage(const float* p, int64_t stride, bool ready, int64_t columns, const Unit<W>& unit, Wave<W>* powers,
                                Sums<W>* sums) {
  // Long rows are as many streams as there are rows, more than the hardware follows: the next wave's lines are asked for here.
  const float* next = !ready && columns >= 32 ? p + W * stride : nullptr;
  Wave<W> column[4];
  int64_t m = 0;
  for (; m + 4 <= columns; m += 4, powers += 4 * (kStages - 1)) {
    if (next != nullptr) {
      const float* line = next + m + m / 4 % 4 * stride - m % 16;
      for (int i = 0; i < W / 4; ++i, line += 4 * stride) __builtin_prefetch(line);
    }
    transpose<W>(p + m, stride, column);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) start_column<W, kStages>(column[j], ready, unit, powers + j * (kStages - 1), sums);
  }
  if (m == columns) return;
  transpose<W>(p + m, stride, column);
  for (int j = 0; m + j < columns; ++j) start_column<W, kStages>(column[j], ready, unit, powers + j * (kStages - 1), sums);
}

// Vector `stage` of a column's powers is read and then holds the product of what has been chosen so far.
template <int W, int kStages>
PRMFAST_INLINE void next_stage(int64_t columns, int stage, const State<W>& state, const Unit<W>& unit, Wave<W>* powers, Sums<W>* sums) {
  const Wave<W> none{}, high = clip<W>(state.digit - unit.one, unit), low = state.digit - (high + high);
  const bool first = stage == kStages - 2;
  for (int64_t m = 0; m < columns; ++m, powers += kStages - 1) {
    const Wave<W> z = powers[stage], square = z * z, above = square * square;
    Wave<W> chosen = first ? unit.one : powers[stage + 1];
    const Wave<W> once = chosen * above;
    chosen = low > none ? once : chosen;
    const Wave<W> twice = chosen * (above * above);
    chosen = high > none ? twice : chosen;
    if (stage > 0) powers[stage] = chosen;
    const Wave<W> next = chosen * z;
    sums->at[0] += next;
    sums->at[1] += chosen * square;
    sums->at[2] += next * square;
  }
}

// W rows: quantiles to be clipped, or `ready` failure probabilities; four columns at a time are read, so up to three floats behind a
// row. The limits are float32 bounds of the sums that float64 surely finds too large, and small enough.
struct Rows {
  const float* p;
  int64_t stride;
  bool ready;
  const float *above, *below;
  const float (*unit)[16];
};

struct Task {
  int64_t columns, n_max;
  int stages;
};

// Writes W budgets; returns which of them are open, a bit a row.
template <int W, int kStages>
PRMFAST_INLINE unsigned search_wave(const Task& task, const Rows& rows, void* scratch, int32_t* out) {
  Wave<W>* powers = static_cast<Wave<W>*>(scratch);
  const float columns = static_cast<float>(task.columns);
  State<W> state{};
  Unit<W> unit;
  std::memcpy(&unit.zero, rows.unit[0], sizeof unit.zero);
  std::memcpy(&unit.one, rows.unit[1], sizeof unit.one);
  std::memcpy(&state.above, rows.above, sizeof state.above);
  std::memcpy(&state.below, rows.below, sizeof state.below);
  float step = static_cast<float>(1 << (2 * (kStages - 1)));
  Sums<W> first{};
  if (rows.ready) {
    first_stage<W, kStages>(rows.p, rows.stride, true, task.columns, unit, powers, &first);
  } else {
    first_stage<W, kStages>(rows.p, rows.stride, false, task.columns, unit, powers, &first);
  }
  decide<W>(first, step, columns, unit, &state);
#pragma GCC unroll 8
  for (int stage = kStages - 2; stage >= 0; --stage) {
    Sums<W> sums{};
    step *= 0.25f;
    next_stage<W, kStages>(task.columns, stage, state, unit, powers, &sums);
    decide<W>(sums, step, columns, unit, &state);
  }
  const typename WaveOf<W>::Int budgets = __builtin_convertvector(state.missing + unit.one, typename WaveOf<W>::Int);
  int32_t found[W];
  float flags[W];
  std::memcpy(found, &budgets, sizeof found);
  std::memcpy(flags, &state.open, sizeof flags);
  unsigned open = 0;
  for (int i = 0; i < W; ++i) out[i] = std::min(found[i], static_cast<int32_t>(task.n_max));
  for (int i = 0; i < W; ++i) open |= (flags[i] == 0 ? 0u : 1u) << i;
  return open;
}

template <int W>
PRMFAST_INLINE unsigned search_any(const Task& task, const Rows& rows, void* scratch, int32_t* out) {
  if (task.stages == 3) return search_wave<W, 3>(task, rows, scratch, out);
  return task.stages < 3 ? search_wave<W, 2>(task, rows, scratch, out) : search_wave<W, kMostStages>(task, rows, scratch, out);
}

PRMFAST_AVX512 unsigned search_avx512(const Task& task, const Rows& rows, void* scratch, int32_t* out) {
  return search_any<16>(task, rows, scratch, out);
}
PRMFAST_AVX2 unsigned search_avx2(const Task& task, const Rows& rows, void* scratch, int32_t* out) {
  return search_any<8>(task, rows, scratch, out);
}
unsigned search_portable(const Task& task, const Rows& rows, void* scratch, int32_t* out) {
  return search_any<4>(task, rows, scratch, out);
}

constexpr int kWidest = 16, kFew = 3;  // so few rows are decided sooner one by one

template <class T>
class WaveSearch {
 public:
  WaveSearch(const Quantiles<T>& quantiles, const Targets& targets, int bits, int64_t n_max, FirstNan* nan)
      : quantiles_(quantiles),
        targets_(targets),
        task_{quantiles.columns, n_max, bits <= 4 ? 2 : bits <= 6 ? 3 : kMostStages},
        width_(chosen_isa() == Isa::kAvx512 ? 16 : chosen_isa() == Isa::kAvx2 ? 8 : 4),
        search_(chosen_isa() == Isa::kAvx512 ? search_avx512 : chosen_isa() == Isa::kAvx2 ? search_avx2 : search_portable),
        stride_((quantiles.columns + 3) / 4 * 4),
        scratch_(quantiles.rows <= kFew ? 1 : quantiles.columns * (task_.stages - 1) * width_ / (2 * kLanes) + 1),
        exact_(quantiles, bits, n_max, nan) {
    for (int i = 0; i < width_; ++i) set_limit(i, 0);
  }

  void run(int64_t first, int64_t end, int32_t* out) {
    for (int64_t row = first; row < end; row += width_) {
      const int count = static_cast<int>(std::min<int64_t>(width_, end - row));
      if (count <= kFew) {
        for (int i = 0; i < count; ++i) out[row + i] = exact_.row(row + i, targets_.wanted(row + i));
        return;
      }
      if (targets_.stride != 0)
        for (int i = 0; i < count; ++i) set_limit(i, row + i);
      int32_t found[kWidest];
      unsigned open = search_(task_, rows(row, count), &scratch_[0], found);
      std::memcpy(out + row, found, count * sizeof *found);
      open &= (1u << count) - 1;
      for (int i = 0; open >> i; ++i)
        if (open >> i & 1) out[row + i] = exact_.row(row + i, targets_.wanted(row + i));
    }
  }

 private:
  void set_limit(int lane, int64_t row) {
    constexpr double kAbsolute = 0x1p-50;
    const double failing = 1 - targets_.wanted(row), columns = static_cast<double>(quantiles_.columns);
    above_[lane] = std::nextafter(static_cast<float>((failing + kAbsolute) * columns), std::numeric_limits<float>::infinity());
    below_[lane] = std::nextafter(static_cast<float>((failing - kAbsolute) * columns), 0.0f);
  }

  // The rows where they are, if they are float32, full in number, and reading on behind the last of them stays inside the tensor.
  Rows rows(int64_t row, int count) {
    const int64_t read = (row + width_ - 1) * quantiles_.stride + stride_;
    const int64_t readable = (quantiles_.rows - 1) * quantiles_.stride + quantiles_.columns;
    if constexpr (sizeof(T) == sizeof(float))
      if (count == width_ && read <= readable) return {quantiles_.data + row * quantiles_.stride, quantiles_.stride, false, above_, below_, kUnitInMemory};
    if (staged_.empty()) staged_.assign(width_ * stride_, 0.0f);
    for (int i = 0; i < count; ++i) {
      const T* source = quantiles_.data + (row + i) * quantiles_.stride;
      float* target = staged_.data() + i * stride_;
      for (int64_t m = 0; m < quantiles_.columns; ++m) target[m] = static_cast<float>(failure(source[m]));
    }
    return {staged_.data(), stride_, true, above_, below_, kUnitInMemory};
  }

  Quantiles<T> quantiles_;
  Targets targets_;
  Task task_;
  int width_;
  unsigned (*search_)(const Task&, const Rows&, void*, int32_t*);
  int64_t stride_;
  LaneBuffer<double> scratch_;  // for its alignment: vectors of floats
  std::vector<float> staged_;
  ExactSearch<T> exact_;
  float above_[kWidest], below_[kWidest];
};

}  // namespace

template <class T>
int64_t budget(const Quantiles<T>& quantiles, const Targets& targets, int64_t n_max, int32_t* out, int threads) {
  int bits = 0;
  while ((n_max - 1) >> bits) ++bits;
  const bool waves = bits > 0 && n_max <= kMaxN && quantiles.columns <= kMaxColumns;
  const int64_t work = quantiles.columns * (bits + 1) / (waves ? 4 : 1);
  FirstNan nan;
  parallel_rows(quantiles.rows, thread_count(quantiles.rows, work, threads), [&](int, int64_t first, int64_t end) {
    const FlushDenormals flush(Flush::results_and_inputs);
    if (waves) {
      WaveSearch<T>(quantiles, targets, bits, n_max, &nan).run(first, end, out);
    } else {
      ExactSearch<T> exact(quantiles, bits, n_max, &nan);
      for (int64_t row = first; row < end; ++row) out[row] = exact.row(row, targets.wanted(row));
    }
  });
  return nan.row();
}

template int64_t budget<float>(const Quantiles<float>&, const Targets&, int64_t, int32_t*, int);
template int64_t budget<double>(const Quantiles<double>&, const Targets&, int64_t, int32_t*, int);

}  // namespace prmfast::ias
