// Dual numbers in registers: value and tangent side by side, a row of coefficients in every lane, or a level where rows are few.
//
// With softplus the gradient is analytic in the level. A row is then evaluated at 33 or 65 nested Chebyshev-Lobatto points of its
// levels' range and interpolated; the trailing coefficients estimate the error, and a row that no rung satisfies is
// evaluated directly. Every decision is a row's own, so that no row depends on its neighbours.
#pragma once
#include <cmath>

#include "picnn/engines.h"

namespace prmfast::picnn {

constexpr int kFinest = 64;  // intervals of the finest rung; the coarser rung takes every second of its points
constexpr int kRungs = 2;
constexpr int kRungOf[kRungs] = {32, 64};  // with 13 or 25 points, details between two of them could pass unseen
constexpr int kPoints = kFinest + 1;
constexpr int kPadded = 80;
constexpr float kNoise = 2.5e-7f;  // of a row's mean magnitude: what float32 leaves of a coefficient that is zero
constexpr int kChunk = 128;        // levels whose results wait to be transposed
constexpr double kWorth = 0.75;    // a rung is tried if it needs at most this share of the direct evaluations

// cos(pi j / 64), and for each rung n the matrix that turns values at its points into Chebyshev coefficients.
struct Chebyshev {
  Chebyshev() {
    const double pi = std::acos(-1.0);
    for (int j = 0; j < kPoints; ++j) node[j] = static_cast<float>(std::cos(pi * j / kFinest));
    for (int r = 0; r < kRungs; ++r) {
      const int n = kRungOf[r];
      for (int j = 0; j <= n; ++j)
        for (int k = 0; k <= n; ++k) {
          const double half = (j == 0 || j == n ? 0.5 : 1.0) * (k == 0 || k == n ? 0.5 : 1.0);
          matrix[r][j][k] = static_cast<float>(2.0 / n * half * std::cos(pi * ((j * k) % (2 * n)) / n));
        }
    }
  }
  float node[kPoints];
  float matrix[kRungs][kPoints][kPadded] = {};  // [point][coefficient]
};

inline const Chebyshev& chebyshev() {
  static const Chebyshev table;
  return table;
}

struct Options {
  double tolerance;
  int rungs;  // how many are worth trying; 0: direct only
};

// What one thread works in.
template <class T>
struct Workspace {
  Workspace(const Plan<T>& plan)
      : memory(4 * plan.room + plan.lane_row() + 2 * kPoints * 2 + 2 * kChunk),
        pairs(plan.tiles.empty() ? 0 : 4 * 16 * ((plan.widest + 31) / 32)), row(plan.lane_row()) {
    Lanes<T>* next = memory.get();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    tape = Tape<T>{take(2 * plan.room), take(2 * plan.room), nullptr, nullptr, nullptr, nullptr, nullptr, pairs.get()};
    tile = take(plan.lane_row());
    value_at = take(kPoints), gradient_at = take(kPoints), value_series = take(kPoints), gradient_series = take(kPoints);
    value = take(kChunk), gradient = take(kChunk);
  }
  LaneBuffer<T> memory;
  LaneBuffer<uint32_t> pairs;
  std::vector<T> row;
  Tape<T> tape;
  Lanes<T>*tile, *value_at, *gradient_at, *value_series, *gradient_series, *value, *gradient;
};

template <class T>
struct Outputs {
  T *value, *gradient;
};

// sum_k series[k] T_k(t), Clenshaw.
PRMFAST_INLINE Lanes<float> clenshaw(const Lanes<float>* series, int n, Lanes<float> t) {
  const Lanes<float> twice = t + t;
  Lanes<float> one{}, two{};
  for (int k = n; k > 0; --k) {
    const Lanes<float> next = (series[k] - two) + twice * one;
    two = one;
    one = next;
  }
  return (series[0] - two) + t * one;
}
PRMFAST_INLINE Lanes<float> clenshaw(const float* series, int n, Lanes<float> t) {
  const Lanes<float> twice = t + t;
  Lanes<float> one{}, two{};
  for (int k = n; k > 0; --k) {
    const Lanes<float> next = (splat(series[k]) - two) + twice * one;
    two = one;
    one = next;
  }
  return (splat(series[0]) - two) + t * one;
}

// The largest coefficient of the middle third of a series, and of its last two sixths.
template <class Number>
struct Tail {
  Number middle, fifth, sixth;
};

// Whether a series of n + 1 coefficients is cut late enough. If it goes on falling as from its middle third to its last, a further
// third adds up to at most n last^2 / middle, aliasing included; four times that is asked for. And it must still be falling at its
// end: a detail between the points shows as a plateau there. What has reached the noise of rounding falls no further.
template <class Number>
PRMFAST_INLINE auto cut_late_enough(const Tail<Number>& tail, Number scale, float tolerance, int n) {
  const float terms = 4.0f * static_cast<float>(n);
  const Number last = tail.fifth > tail.sixth ? tail.fifth : tail.sixth;
  const auto falls = (tail.sixth + tail.sixth <= tail.fifth) & (last + last <= tail.middle) &
                     (terms * last * last <= tolerance * scale * tail.middle);
  return falls | (last <= kNoise * scale);
}

// The range of the levels of a row in every lane.
struct Range {
  Lanes<float> middle, half;
};

template <class T>
PRMFAST_INLINE Lanes<T> levels_at(const Inputs<T>& in, int64_t first, int64_t count, int64_t m) {
  if (in.level_stride == 0) return splat(in.levels[m]);
  Lanes<T> x;
  for (int l = 0; l < kWidth<T>; ++l) x[l] = in.levels[(first + std::min<int64_t>(l, count - 1)) * in.level_stride + m];
  return x;
}

// Interpolants of a tile, a row in every lane: the series of the rows that a rung satisfied, and which these are.
// Returns the highest coefficient in use.
template <class Engine>
PRMFAST_INLINE int interpolate_tile(const Plan<float>& plan, const Options& options, const Range& range, Workspace<float>& ws,
                                    Lanes<int32_t>& done) {
  const RowInEveryLane<float> row{ws.tile};
  const Chebyshev& table = chebyshev();
  for (int k = 0; k < kPoints; ++k) ws.value_series[k] = ws.gradient_series[k] = Lanes<float>{};
  done = Lanes<int32_t>{};
  int used = 0;
  for (int r = 0; r < options.rungs; ++r) {
    const int n = kRungOf[r], stride = kFinest / n;
    for (int j = 0; j <= n; ++j) {
      if (r > 0 && j % 2 == 0) continue;  // a point of the rung before
      const int at = j * stride;
      const Lanes<float> x = range.middle + range.half * table.node[at];
      forward_point<float, Engine, false>(plan, row, x, ws.tape, ws.value_at[at], ws.gradient_at[at]);
    }
    Lanes<float> scale{};
    Tail<Lanes<float>> tail{};
    for (int j = 0; j <= n; ++j) scale += absolute<float>(ws.gradient_at[j * stride]);
    Lanes<float> gradient_coefficient[kPoints];
    for (int k = 0; k <= n; ++k) {
      Lanes<float> sum{};
      for (int j = 0; j <= n; ++j) sum += table.matrix[r][j][k] * ws.gradient_at[j * stride];
      gradient_coefficient[k] = sum;
    }
    for (int k = n / 3 + 1; k <= n; ++k) {
      Lanes<float>& part = k <= 2 * n / 3 ? tail.middle : k <= 5 * n / 6 ? tail.fifth : tail.sixth;
      part = larger<float>(part, absolute<float>(gradient_coefficient[k]));
    }
    scale *= 1.0f / (n + 1);
    const Lanes<int32_t> now = cut_late_enough(tail, scale, static_cast<float>(options.tolerance), n) & ~done;
    bool some = false, all = true;
    for (int l = 0; l < kWidth<float>; ++l) some = some || now[l], all = all && (now[l] || done[l]);
    if (some) {
      used = n;
      for (int k = 0; k <= n; ++k) {
        Lanes<float> sum{};
        for (int j = 0; j <= n; ++j) sum += table.matrix[r][j][k] * ws.value_at[j * stride];
        ws.value_series[k] = now ? sum : ws.value_series[k];
        ws.gradient_series[k] = now ? gradient_coefficient[k] : ws.gradient_series[k];
      }
      done |= now;
    }
    if (all) break;
  }
  return used;
}

template <class T>
PRMFAST_INLINE void write_tile(const Lanes<T>* from, int64_t n, int64_t count, int64_t stride, T* to) {
  constexpr int W = kWidth<T>;
  for (int64_t m = 0; m < n; m += W) {
    Lanes<T> block[W];
    for (int i = 0; i < W; ++i) block[i] = from[std::min<int64_t>(m + i, n - 1)];
    transpose<T>(block);
    const int64_t width = std::min<int64_t>(W, n - m);
    for (int64_t l = 0; l < count; ++l) std::memcpy(to + l * stride + m, &block[l], width * sizeof(T));
  }
}

template <class T, class Engine>
PRMFAST_INLINE void forward_tile(const Plan<T>& plan, const Inputs<T>& in, const Options& options, int64_t first, int64_t count,
                                 Workspace<T>& ws, const Outputs<T>& out) {
  load_tile<T>(plan, in.rows, first, count, ws.tile, nullptr);
  const RowInEveryLane<T> row{ws.tile};
  int used = 0;
  Range range{};
  Lanes<int32_t> done{};
  bool all_done = false;
  if constexpr (std::is_same_v<T, float>) {
    if (options.rungs > 0) {
      Lanes<float> low = levels_at<T>(in, first, count, 0), high = low;
      for (int64_t m = 1; m < in.m; ++m) {
        const Lanes<float> x = levels_at<T>(in, first, count, m);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      range = Range{low + 0.5f * (high - low), 0.5f * (high - low)};
      used = interpolate_tile<Engine>(plan, options, range, ws, done);
      all_done = true;
      for (int l = 0; l < kWidth<float>; ++l) {
        if (!(range.half[l] > 0)) done[l] = 0;  // one level: nothing to interpolate in
        all_done = all_done && done[l];
      }
    }
  }
  for (int64_t start = 0; start < in.m; start += kChunk) {
    const int64_t n = std::min<int64_t>(kChunk, in.m - start);
    for (int64_t m = 0; m < n; ++m) {
      const Lanes<T> x = levels_at<T>(in, first, count, start + m);
      Lanes<T> value{}, gradient{};
      if (!all_done) forward_point<T, Engine, false>(plan, row, x, ws.tape, value, gradient);
      if constexpr (std::is_same_v<T, float>) {
        if (used > 0) {
          const Lanes<float> t = (x - range.middle) / range.half;
          const Lanes<float> v = clenshaw(ws.value_series, used, t), g = clenshaw(ws.gradient_series, used, t);
          value = all_done ? v : done ? v : value;
          gradient = all_done ? g : done ? g : gradient;
        }
      }
      ws.value[m] = value;
      ws.gradient[m] = gradient;
    }
    write_tile<T>(ws.value, n, count, in.m, out.value + first * in.m + start);
    write_tile<T>(ws.gradient, n, count, in.m, out.gradient + first * in.m + start);
  }
}

// The same for one row whose levels lie in the lanes; sums run in the same order, so results are the same to the bit.
template <class Engine>
PRMFAST_INLINE int interpolate_row(const Plan<float>& plan, const Options& options, float middle, float half, Workspace<float>& ws,
                                   float* value_series, float* gradient_series) {
  constexpr int W = kWidth<float>;
  const SharedRow<float> row{ws.row.data()};
  const Chebyshev& table = chebyshev();
  float value_at[kPoints], gradient_at[kPoints];
  for (int r = 0; r < options.rungs; ++r) {
    const int n = kRungOf[r], stride = kFinest / n;
    int pending[kPoints], count = 0;
    for (int j = 0; j <= n; ++j)
      if (r == 0 || j % 2 == 1) pending[count++] = j * stride;
    for (int i = 0; i < count; i += W) {
      Lanes<float> node, value, gradient;
      for (int l = 0; l < W; ++l) node[l] = table.node[pending[std::min(i + l, count - 1)]];
      const Lanes<float> x = middle + half * node;
      forward_point<float, Engine, false>(plan, row, x, ws.tape, value, gradient);
      for (int l = 0; l < W && i + l < count; ++l) {
        value_at[pending[i + l]] = value[l];
        gradient_at[pending[i + l]] = gradient[l];
      }
    }
    const auto series = [&](const float* at, float* out) {
      for (int k = 0; k <= n; k += W) {
        Lanes<float> sum{};
        for (int j = 0; j <= n; ++j) sum += load(&table.matrix[r][j][k]) * at[j * stride];
        store(out + k, sum);
      }
    };
    series(gradient_at, gradient_series);
    float scale = 0;
    Tail<float> tail{};
    for (int j = 0; j <= n; ++j) scale += std::fabs(gradient_at[j * stride]);
    for (int k = n / 3 + 1; k <= n; ++k) {
      float& part = k <= 2 * n / 3 ? tail.middle : k <= 5 * n / 6 ? tail.fifth : tail.sixth;
      part = std::max(part, std::fabs(gradient_series[k]));
    }
    scale *= 1.0f / (n + 1);
    if (cut_late_enough(tail, scale, static_cast<float>(options.tolerance), n)) {
      series(value_at, value_series);
      return n;
    }
  }
  return 0;
}

template <class T, class Engine>
PRMFAST_INLINE void forward_row(const Plan<T>& plan, const Inputs<T>& in, const Options& options, int64_t b, Workspace<T>& ws,
                                const Outputs<T>& out) {
  constexpr int W = kWidth<T>;
  const T* levels = in.levels + b * in.level_stride;
  load_row<T>(plan, in.rows + b * plan.raw_row, ws.row.data());
  const SharedRow<T> row{ws.row.data()};
  int used = 0;
  float middle = 0, half = 0, value_series[kPadded], gradient_series[kPadded];
  if constexpr (std::is_same_v<T, float>) {
    if (options.rungs > 0) {
      const auto [low, high] = std::minmax_element(levels, levels + in.m);
      half = 0.5f * (*high - *low);
      middle = *low + half;
      if (half > 0) used = interpolate_row<Engine>(plan, options, middle, half, ws, value_series, gradient_series);
    }
  }
  for (int64_t m = 0; m < in.m; m += W) {
    const int64_t n = std::min<int64_t>(W, in.m - m);
    Lanes<T> x, value{}, gradient{};
    if (n == W)
      x = load(levels + m);
    else
      for (int l = 0; l < W; ++l) x[l] = levels[m + std::min<int64_t>(l, n - 1)];
    if constexpr (std::is_same_v<T, float>) {
      if (used > 0) {
        const Lanes<float> t = (x - middle) / half;
        value = clenshaw(value_series, used, t);
        gradient = clenshaw(gradient_series, used, t);
      } else {
        forward_point<T, Engine, false>(plan, row, x, ws.tape, value, gradient);
      }
    } else {
      forward_point<T, Engine, false>(plan, row, x, ws.tape, value, gradient);
    }
    std::memcpy(out.value + b * in.m + m, &value, n * sizeof(T));
    std::memcpy(out.gradient + b * in.m + m, &gradient, n * sizeof(T));
  }
}

// Rounding and interpolation may not make the gradient fall: the running maximum in the order of the levels.
template <class T>
void keep_order(const T* levels, int64_t m, T* gradient, std::vector<int64_t>& order) {
  if (std::is_sorted(levels, levels + m)) {
    for (int64_t i = 1; i < m; ++i) gradient[i] = gradient[i] < gradient[i - 1] ? gradient[i - 1] : gradient[i];
    return;
  }
  order.resize(m);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return levels[a] < levels[b]; });
  for (int64_t i = 1; i < m; ++i)
    if (gradient[order[i]] < gradient[order[i - 1]]) gradient[order[i]] = gradient[order[i - 1]];
}

// A part of the call: tiles of rows, or rows, begin .. end - 1.
template <class T>
struct Part {
  bool rows_in_lanes;
  int64_t begin, end;
};

template <class T, class Engine>
PRMFAST_INLINE void forward_tiles(const Plan<T>& plan, const Inputs<T>& in, const Options& options, const Outputs<T>& out,
                                  const Part<T>& part) {
  constexpr int W = kWidth<T>;
  Workspace<T> ws(plan);
  std::vector<int64_t> order;
  Engine::start();
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t first = part.rows_in_lanes ? i * W : i, count = part.rows_in_lanes ? std::min<int64_t>(W, in.count - first) : 1;
    if (part.rows_in_lanes)
      forward_tile<T, Engine>(plan, in, options, first, count, ws, out);
    else
      forward_row<T, Engine>(plan, in, options, first, ws, out);
    if (plan.convex)
      for (int64_t b = first; b < first + count; ++b)
        keep_order(in.levels + b * in.level_stride, in.m, out.gradient + b * in.m, order);
  }
  Engine::stop();
}

// With the tiles of AMX, in a file of its own.
void forward_native_tiles(const Plan<float>& plan, const Inputs<float>& in, const Options& options, const Outputs<float>& out,
                          const Part<float>& part);
void forward_emulated_tiles(const Plan<float>& plan, const Inputs<float>& in, const Options& options, const Outputs<float>& out,
                            const Part<float>& part);

}  // namespace prmfast::picnn
