// The best allocation of samples to rows: the largest marginal gains first.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "common/flush_denormals.h"
#include "common/parallel_for.h"
#include "ias/rows.h"

namespace prmfast::ias {
namespace {

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
  Gains(const Quantiles<T>& quantiles, FirstNan* nan)
      : quantiles_(quantiles), width_(padded(quantiles.columns)), p_(width_), q_(width_), term_(width_), nan_(nan) {}

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
    if (has_nan(q_.data(), quantiles_.columns)) nan_->found(row);
  }

  Quantiles<T> quantiles_;
  int64_t width_;
  std::vector<double> p_, q_, term_;
  FirstNan* nan_;
};

template <class T>
void find_nan(const Quantiles<T>& quantiles, FirstNan* nan) {
  for (int64_t row = 0; row < quantiles.rows; ++row)
    for (int64_t m = 0; m < quantiles.columns; ++m) {
      const T x = quantiles.data[row * quantiles.stride + m];
      if (x != x) return nan->found(row);
    }
}

}  // namespace

template <class T>
int64_t allocate(const Quantiles<T>& quantiles, int64_t total, int64_t n_max, int64_t n_min, int32_t* out, int threads) {
  const int64_t rows = quantiles.rows, room = n_max - n_min;
  std::fill(out, out + rows, static_cast<int32_t>(n_min));
  int64_t left = std::min(total - rows * n_min, rows * room);
  FirstNan nan;
  if (left <= 0) {
    find_nan(quantiles, &nan);
    return nan.row();
  }
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
      Gains<T> gains(quantiles, &nan);
      for (int64_t i = first; i < end; ++i) {
        const int64_t row = open[i], goal = std::min(room, std::max<int64_t>(kLanes, 2 * known[row]));
        gains.extend(row, n_min, goal, worst, &known[row], &last[row], &found[thread]);
      }
    });
    if (nan.row() >= 0) return nan.row();
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
  return -1;
}

template int64_t allocate<float>(const Quantiles<float>&, int64_t, int64_t, int64_t, int32_t*, int);
template int64_t allocate<double>(const Quantiles<double>&, int64_t, int64_t, int64_t, int32_t*, int);

}  // namespace prmfast::ias
