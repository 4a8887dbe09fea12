#include "ias/ias.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "common/flush_denormals.h"
#include "common/parallel_for.h"
#include "common/simd.h"
#include "common/vec.h"

namespace prmfast::ias {
namespace {

using Lanes = Vec<double>;

PRMFAST_INLINE Lanes load(const double* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

PRMFAST_INLINE void store(double* p, const Lanes& v) { std::memcpy(p, &v, sizeof v); }

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class T>
PRMFAST_INLINE void failures_of(const T* p, int64_t n, double* q) {
  for (int64_t m = 0; m < n; ++m) {
    double x = p[m];
    x = x > 0 ? x : 0;
    x = x < 1 ? x : 1;
    q[m] = 1 - x;
  }
}

// q = 1 - clip(p, 0, 1). The callers keep zeros behind the row: they fail never and add nothing.
PRMFAST_MULTIVERSION void failures(const float* p, int64_t n, double* q) { failures_of(p, n, q); }
PRMFAST_MULTIVERSION void failures(const double* p, int64_t n, double* q) { failures_of(p, n, q); }

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

// (q, q^2, ... q^8) and, in every lane of step, q^8; only products of what stands to the left, so the lanes fall as computed.
PRMFAST_INLINE Lanes first_powers(double q, Lanes* step) {
  typedef int64_t Mask __attribute__((vector_size(sizeof(Lanes))));
  const Mask exponent = {1, 2, 3, 4, 5, 6, 7, 8};
  const Lanes one = {1, 1, 1, 1, 1, 1, 1, 1}, q1 = {q, q, q, q, q, q, q, q}, q2 = q1 * q1, q4 = q2 * q2;
  *step = q4 * q4;
  const Lanes low = ((exponent & 1) != 0 ? q1 : one) * ((exponent & 2) != 0 ? q2 : one);
  return (exponent & 8) != 0 ? *step : low * ((exponent & 4) != 0 ? q4 : one);
}

// S(1..n_max): lanes are eight neighbouring N, so that nothing is summed across lanes. Four quantiles share a pass.
// Powers only fall from N to N + 1 and rounding is monotone: so the curve is monotone as computed.
PRMFAST_MULTIVERSION void accumulate(const double* q, int64_t width, int64_t blocks, double* failing) {
  constexpr int kTogether = 4;
  std::fill(failing, failing + blocks * kLanes, 0.0);
  for (int64_t m = 0; m < width; m += kTogether) {
    Lanes power[kTogether], step[kTogether];
    for (int j = 0; j < kTogether; ++j) power[j] = first_powers(q[m + j], &step[j]);
    for (int64_t b = 0; b < blocks; ++b) {
      store(failing + b * kLanes, load(failing + b * kLanes) + ((power[0] + power[1]) + (power[2] + power[3])));
      for (int j = 0; j < kTogether; ++j) power[j] *= step[j];
    }
  }
}

template <class T>
PRMFAST_INLINE void successes_of(const double* failing, double columns, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(1 - failing[i] / columns);
}

PRMFAST_MULTIVERSION void successes(const double* failing, double columns, int64_t n, float* out) {
  successes_of(failing, columns, n, out);
}
PRMFAST_MULTIVERSION void successes(const double* failing, double columns, int64_t n, double* out) {
  successes_of(failing, columns, n, out);
}

// gains[l] = sum_m p q^(n + l), l = 0..7; term is scratch for p q^n.
PRMFAST_MULTIVERSION void marginal_gains(const double* p, const double* q, int64_t width, int64_t n, double* term, double* gains) {
  for (int64_t i = 0; i < width; i += kLanes) {
    Lanes base = load(q + i), x = load(p + i);
    for (int64_t rest = n; rest > 0; rest >>= 1, base *= base)
      if (rest & 1) x *= base;
    store(term + i, x);
  }
  for (int l = 0; l < kLanes; ++l) {
    Lanes total{};
    for (int64_t i = 0; i < width; i += kLanes) {
      const Lanes x = load(term + i);
      total += x;
      store(term + i, x * load(q + i));
    }
    gains[l] = sum<double>(total);
  }
}

// A nonnegative double as an integer of the same order, rounded to its first 40 mantissa bits.
int64_t key_of(double gain) {
  int64_t bits;
  std::memcpy(&bits, &gain, sizeof bits);
  return (bits + (int64_t{1} << (kKeyShift - 1))) >> kKeyShift;
}

// What one more sample would add to a row; ties go to the lower row.
struct Gain {
  int64_t key, row;
  bool before(const Gain& other) const { return key != other.key ? key > other.key : row < other.row; }
};

template <class T>
class Gains {
 public:
  explicit Gains(const Quantiles<T>& quantiles)
      : quantiles_(quantiles), width_(padded(quantiles.columns)), p_(width_), q_(width_), term_(width_) {}

  // Appends the row's gains number `known` to `goal` - 1, as long as they are better than `worst`.
  void extend(int64_t row, int64_t n_min, int64_t goal, const Gain& worst, int64_t* known, int64_t* last, std::vector<Gain>* out) {
    load_row(row);
    while (*known < goal) {
      double gains[kLanes];
      marginal_gains(p_.data(), q_.data(), width_, n_min + *known, term_.data(), gains);
      for (int l = 0; l < kLanes && *known < goal; ++l, ++*known) {
        // Two blocks reach q^n by different products: the minimum keeps a row's gains falling across them.
        *last = std::min(*last, key_of(gains[l]));
        const Gain gain{*last, row};
        if (!gain.before(worst)) return;
        out->push_back(gain);
      }
    }
  }

 private:
  void load_row(int64_t row) {
    const T* source = quantiles_.data + row * quantiles_.stride;
    for (int64_t m = 0; m < quantiles_.columns; ++m) {
      const double x = std::min<double>(source[m], 1);
      p_[m] = x < std::numeric_limits<double>::min() ? 0 : x;
    }
    failures(source, quantiles_.columns, q_.data());
  }

  Quantiles<T> quantiles_;
  int64_t width_;
  std::vector<double> p_, q_, term_;
};

}  // namespace

template <class T>
void budget(const Quantiles<T>& quantiles, const double* target, int64_t target_stride, int64_t n_max, int32_t* out, int threads) {
  int bits = 0;
  while ((n_max - 1) >> bits) ++bits;
  const int64_t width = padded(quantiles.columns);
  parallel_rows(quantiles.rows, thread_count(quantiles.rows, 2 * width * (bits + 1), threads), [&](int, int64_t first, int64_t end) {
    const FlushDenormals flush(Flush::results_and_inputs);
    std::vector<double> scratch(width * (std::max(bits, 1) + 2));
    double* current = scratch.data() + width * std::max(bits, 1);
    for (int64_t row = first; row < end; ++row) {
      failures(quantiles.data + row * quantiles.stride, quantiles.columns, scratch.data());
      const double wanted = target[row * target_stride] - kTouch;
      const int64_t n = search(scratch.data(), current, current + width, width, bits, static_cast<double>(quantiles.columns), wanted);
      out[row] = static_cast<int32_t>(std::min(n, n_max));
    }
  });
}

template <class T>
void curve(const Quantiles<T>& quantiles, int64_t n_max, T* out, int threads) {
  const int64_t width = padded(quantiles.columns), blocks = padded(n_max) / kLanes;
  parallel_rows(quantiles.rows, thread_count(quantiles.rows, 2 * width * n_max, threads), [&](int, int64_t first, int64_t end) {
    const FlushDenormals flush(Flush::results_and_inputs);
    std::vector<double> q(width), failing(blocks * kLanes);
    for (int64_t row = first; row < end; ++row) {
      failures(quantiles.data + row * quantiles.stride, quantiles.columns, q.data());
      accumulate(q.data(), width, blocks, failing.data());
      successes(failing.data(), static_cast<double>(quantiles.columns), n_max, out + row * n_max);
    }
  });
}

template <class T>
void allocate(const Quantiles<T>& quantiles, int64_t total, int64_t n_max, int64_t n_min, int32_t* out, int threads) {
  const int64_t rows = quantiles.rows, room = n_max - n_min;
  std::fill(out, out + rows, static_cast<int32_t>(n_min));
  int64_t left = std::min(total - rows * n_min, rows * room);
  if (left <= 0) return;
  // `served` holds the best gains seen so far, `worst` the last of them once there are enough. A row's gains only fall, so a
  // row is open while its last known gain is better than `worst`; an open row doubles what is known of it in each round.
  std::vector<Gain> served;
  Gain worst{0, -1};  // better than this: every positive gain
  std::vector<int64_t> known(rows, 0), last(rows, std::numeric_limits<int64_t>::max()), open(rows);
  std::iota(open.begin(), open.end(), 0);
  while (!open.empty()) {
    const int64_t count = static_cast<int64_t>(open.size());
    const int used = thread_count(count, 4 * kLanes * padded(quantiles.columns), threads);
    std::vector<std::vector<Gain>> found(std::max(used, 1));
    parallel_rows(count, used, [&](int thread, int64_t first, int64_t end) {
      const FlushDenormals flush(Flush::results);  // a float32 denormal is an ordinary double: inputs are not flushed here
      Gains<T> gains(quantiles);
      for (int64_t i = first; i < end; ++i) {
        const int64_t row = open[i], goal = std::min(room, std::max<int64_t>(kLanes, 2 * known[row]));
        gains.extend(row, n_min, goal, worst, &known[row], &last[row], &found[thread]);
      }
    });
    for (const std::vector<Gain>& part : found) served.insert(served.end(), part.begin(), part.end());
    if (static_cast<int64_t>(served.size()) >= left) {
      const auto end = served.begin() + left;
      std::nth_element(served.begin(), end - 1, served.end(), [](const Gain& a, const Gain& b) { return a.before(b); });
      served.erase(end, served.end());
      worst = served.back();
    }
    const auto closed = [&](int64_t row) { return known[row] == room || !Gain{last[row], row}.before(worst); };
    open.erase(std::remove_if(open.begin(), open.end(), closed), open.end());
  }
  for (const Gain& gain : served) ++out[gain.row];
  left -= static_cast<int64_t>(served.size());
  for (int64_t row = 0; row < rows && left > 0; ++row) {  // what is left helps nobody: lower rows first
    const int64_t more = std::min<int64_t>(left, n_max - out[row]);
    out[row] += static_cast<int32_t>(more);
    left -= more;
  }
}

#define PRMFAST_INSTANTIATE(T)                                                                      \
  template void budget<T>(const Quantiles<T>&, const double*, int64_t, int64_t, int32_t*, int);     \
  template void curve<T>(const Quantiles<T>&, int64_t, T*, int);                                    \
  template void allocate<T>(const Quantiles<T>&, int64_t, int64_t, int64_t, int32_t*, int);
PRMFAST_INSTANTIATE(float)
PRMFAST_INSTANTIATE(double)

}  // namespace prmfast::ias
