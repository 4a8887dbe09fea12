// What both passes share: the offsets of a row, weights packed for register tiles, the activations, a tile of rows in lanes.
#pragma once
#include <algorithm>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/lanes.h"
#include "common/simd.h"
#include "picnn/picnn.h"

namespace prmfast::picnn {

// Units a register tile holds, by instruction set: each has two accumulators of 64 bytes.
constexpr int kUnitsAvx512 = 8, kUnitsAvx2 = 2, kUnitsPortable = 1;
inline int units_together(Isa isa) {
  return isa == Isa::kAvx512 ? kUnitsAvx512 : isa == Isa::kAvx2 ? kUnitsAvx2 : kUnitsPortable;
}

// Weights split into bfloat16 parts, in tiles of 16 units x 32 inputs: [units / 16][inputs / 32][16][32], zeros behind.
struct TileWeights {
  std::vector<uint16_t> high, low;
};
constexpr int64_t kTileElements = 16 * 32;

// The shape with every offset computed once per call, and the weights in the order in which kUnits units at a time read them.
template <class T>
struct Plan {
  Plan(const Shape& s, const Inputs<T>& in, int units_together, bool with_tiles = false, bool plain = false)
      : shape(s), widths(s.widths), layers(s.layers()), raw_row(s.row()), kappa(s.kappa()), first_gate(s.gate(1)),
        slope_of_leak(static_cast<T>(s.negative_slope)), floor(static_cast<T>(s.curvature_floor)), together(units_together), plain_bf16(plain) {
    for (int i = 0; i <= layers; ++i) {
      slope.push_back(s.slope(i));
      offset.push_back(s.offset(i));
      gate.push_back(i ? s.gate(i) : -1);
      units.push_back(total_units);
      if (i < layers) total_units += widths[i];
    }
    widest = *std::max_element(widths.begin(), widths.end());
    for (int i = 0; i < layers; ++i) {
      weights.push_back(total_weights);
      total_weights += widths[i] * widths[i + 1];
      for (int64_t k = 0; k < widths[i] * widths[i + 1]; ++k) convex = convex && in.wz[i][k] >= 0;
    }
    last = in.wz[layers - 1];
    room = (widest + 15) / 16 * 16;
    for (int i = 0; i + 1 < layers; ++i) {  // the last layer has one unit and is folded into the one before it
      if (with_tiles) {
        tiles.push_back(pack_tiles(in.wz[i], widths[i + 1], widths[i]));
        continue;
      }
      by_output.push_back(pack(in.wz[i], widths[i + 1], widths[i], widths[i], 1));
      by_input.push_back(pack(in.wz[i], widths[i], widths[i + 1], 1, widths[i]));
    }
  }
  int64_t tile_steps(int i) const { return (widths[i - 1] + 31) / 32; }  // of 32 inputs, hidden layer i >= 1
  int64_t lane_row() const { return (kappa + kWidth<T>) / kWidth<T> * kWidth<T>; }  // kappa + 1 entries, padded

  Shape shape;
  std::vector<int64_t> widths, slope, offset, gate, units, weights;
  int layers;
  int64_t raw_row, kappa, first_gate, total_units = 0, total_weights = 0, widest = 0, room = 0;  // room: widest in whole tiles
  T slope_of_leak, floor;
  int together;
  bool plain_bf16;
  bool convex = true;  // every weight is >= 0: the gradient increases
  const T* last;       // [k_{L-1}]
  std::vector<std::vector<T>> by_output, by_input;  // [block][other side][together], zeros behind
  std::vector<TileWeights> tiles;                   // instead of these, for the tile engines

 private:
  TileWeights pack_tiles(const T* w, int64_t out, int64_t from) const {
    const int64_t steps = (from + 31) / 32, size = (out + 15) / 16 * steps * kTileElements;
    TileWeights packed{std::vector<uint16_t>(size), std::vector<uint16_t>(size)};
    const auto rounded = [](float x) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    };
    for (int64_t j = 0; j < out; ++j)
      for (int64_t k = 0; k < from; ++k) {
        const int64_t at = (j / 16 * steps + k / 32) * kTileElements + j % 16 * 32 + k % 32;
        const float x = static_cast<float>(w[j * from + k]);
        const uint32_t high = rounded(x);
        float part;
        std::memcpy(&part, &high, 4);
        packed.high[at] = static_cast<uint16_t>(high >> 16);
        packed.low[at] = static_cast<uint16_t>(rounded(x - part) >> 16);
      }
    return packed;
  }

  std::vector<T> pack(const T* w, int64_t units_here, int64_t others, int64_t unit_stride, int64_t other_stride) const {
    const int64_t blocks = (units_here + together - 1) / together;
    std::vector<T> out(blocks * others * together, T(0));
    for (int64_t u = 0; u < units_here; ++u)
      for (int64_t k = 0; k < others; ++k)
        out[((u / together) * others + k) * together + u % together] = w[u * unit_stride + k * other_stride];
    return out;
  }
};

template <class T>
struct Response {
  Lanes<T> value, first, second;  // s(p), s'(p), s''(p)
};

template <class T>
PRMFAST_INLINE Response<T> softplus(Lanes<T> p) {
  const auto positive = p > 0;
  const Lanes<T> e = exp_of_minus(positive ? p : -p), inverse = inverse_of_one_plus(e);
  return {(positive ? p : Lanes<T>{}) + log_of_one_plus(e), positive ? inverse : e * inverse, e * inverse * inverse};
}

template <class T>
PRMFAST_INLINE Response<T> respond(Lanes<T> p, Activation activation, T leak, bool square) {
  Response<T> r;
  if (activation == Activation::kSoftplus) {
    r = softplus<T>(p);
  } else {
    r.first = p > 0 ? splat(T(1)) : splat(leak);
    r.value = p * r.first;
    r.second = Lanes<T>{};
  }
  if (square) {
    r.second = T(2) * (r.first * r.first + r.value * r.second);
    r.first = T(2) * r.value * r.first;
    r.value = r.value * r.value;
  }
  return r;
}

// gate and kappa of a raw coefficient, and how they change with it.
template <class T>
PRMFAST_INLINE Response<T> respond_gate(const Plan<T>& plan, Lanes<T> raw, bool is_kappa) {
  if (is_kappa || plan.shape.gate_activation == Gate::kSoftplus) {
    Response<T> r = softplus<T>(raw);
    if (is_kappa) r.value += plan.floor;
    return r;
  }
  const auto positive = raw > 0;
  return {positive ? raw : Lanes<T>{}, positive ? splat(T(1)) : Lanes<T>{}, Lanes<T>{}};
}

// Coefficients of a tile: a row in every lane.
template <class T>
struct RowInEveryLane {
  const Lanes<T>* data;
  PRMFAST_INLINE Lanes<T> operator[](int64_t i) const { return data[i]; }
};

// Coefficients of one row that all lanes share.
template <class T>
struct SharedRow {
  const T* data;
  PRMFAST_INLINE Lanes<T> operator[](int64_t i) const { return splat(data[i]); }
};

// The raw rows first .. first + count - 1 (the last one repeated) as lanes, gates and kappa activated; slopes, where wanted, get
// the derivatives of gates and kappa by their raw value.
template <class T>
PRMFAST_INLINE void load_tile(const Plan<T>& plan, const T* rows, int64_t first, int64_t count, Lanes<T>* out, Lanes<T>* slopes) {
  constexpr int W = kWidth<T>;
  for (int64_t p = 0; p < plan.raw_row; p += W) {
    const int64_t n = std::min<int64_t>(W, plan.raw_row - p);
    Lanes<T> block[W];
    for (int l = 0; l < W; ++l) {
      const T* source = rows + (first + std::min<int64_t>(l, count - 1)) * plan.raw_row + p;
      if (n == W) {
        block[l] = load(source);
      } else {
        block[l] = Lanes<T>{};
        std::memcpy(&block[l], source, n * sizeof(T));
      }
    }
    transpose<T>(block);
    for (int l = 0; l < W; ++l) out[p + l] = block[l];
  }
  for (int64_t p = plan.first_gate; p < plan.raw_row; ++p) {
    const Response<T> r = respond_gate<T>(plan, out[p], p == plan.kappa);
    out[p] = r.value;
    if (slopes) slopes[p - plan.first_gate] = r.first;
  }
  if (!plan.shape.curvature) out[plan.kappa] = Lanes<T>{};
}

// One raw row, gates and kappa activated; out has plan.lane_row() entries.
template <class T>
PRMFAST_INLINE void load_row(const Plan<T>& plan, const T* row, T* out) {
  constexpr int W = kWidth<T>;
  std::copy(row, row + plan.raw_row, out);
  for (int64_t p = plan.first_gate; p < plan.kappa; p += W) {
    const int64_t n = std::min<int64_t>(W, plan.kappa - p);
    Lanes<T> some{};
    std::memcpy(&some, row + p, n * sizeof(T));
    some = respond_gate<T>(plan, some, false).value;
    std::memcpy(out + p, &some, n * sizeof(T));
  }
  out[plan.kappa] = plan.shape.curvature ? respond_gate<T>(plan, splat(row[plan.kappa]), true).value[0] : T(0);
}

// What one point per lane leaves behind for its backward pass; a and da are what the next layer reads.
template <class T>
struct Tape {
  Lanes<T>*a, *da, *z, *dz, *first, *second, *dp;
  Lanes<uint32_t>* pairs;  // of the tile engines
};

// kUnits units of a layer, all accumulators in registers: p = x v + c + W a, dp = v + W da.
template <class T, int kUnits, class Coefficients>
PRMFAST_INLINE void dense_tile(const Coefficients& row, int64_t slope, int64_t offset, int64_t valid, const T* weight, int64_t from,
                               const Lanes<T>* a, const Lanes<T>* da, Lanes<T> x, Lanes<T>* out_p, Lanes<T>* out_dp) {
  Lanes<T> p[kUnits], dp[kUnits];
#pragma GCC unroll 8
  for (int j = 0; j < kUnits; ++j) {
    const int64_t u = std::min<int64_t>(j, valid - 1);
    dp[j] = row[slope + u];
    p[j] = x * dp[j] + row[offset + u];
  }
  for (int64_t k = 0; k < from; ++k) {
    const Lanes<T> ak = a[k], dak = da[k];
#pragma GCC unroll 8
    for (int j = 0; j < kUnits; ++j) {
      const T w = weight[k * kUnits + j];
      p[j] += w * ak;
      dp[j] += w * dak;
    }
  }
  if (valid == kUnits) {
#pragma GCC unroll 8
    for (int j = 0; j < kUnits; ++j) {
      out_p[j] = p[j];
      out_dp[j] = dp[j];
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < kUnits; ++j)
      if (j < valid) {
        out_p[j] = p[j];
        out_dp[j] = dp[j];
      }
  }
}

// Value and tangent at one level per lane. Without a tape, a and da have room for 2 * plan.room vectors, and layers take turns.
template <class T, class Engine, bool kTape, class Coefficients>
PRMFAST_INLINE void forward_point(const Plan<T>& plan, const Coefficients& row, Lanes<T> x, const Tape<T>& tape, Lanes<T>& value,
                                  Lanes<T>& gradient) {
  const auto base = [&](int i) { return kTape ? plan.units[i] : (i & 1) * plan.room; };
  gradient = row[plan.slope[plan.layers]];
  value = x * gradient + row[plan.offset[plan.layers]];
  for (int i = 0; i < plan.layers; ++i) {
    const int64_t out = plan.widths[i], next_gate = plan.gate[i + 1];
    Lanes<T>*p = tape.a + base(i), *dp = tape.da + base(i);
    if (i == 0) {
      for (int64_t j = 0; j < out; ++j) {
        dp[j] = row[plan.slope[0] + j];
        p[j] = x * dp[j] + row[plan.offset[0] + j];
      }
    } else {
      Engine::layer(plan, i, row, x, tape, tape.a + base(i - 1), tape.da + base(i - 1), p, dp);
    }
    const bool square = i == 0 && plan.shape.square_first, last = i + 1 == plan.layers;
    for (int64_t j = 0; j < out; ++j) {
      const Response<T> r = respond<T>(p[j], plan.shape.activation, plan.slope_of_leak, square);
      const Lanes<T> gate = row[next_gate + j], dz = r.first * dp[j];
      if (kTape) {
        const int64_t unit = plan.units[i] + j;
        tape.z[unit] = r.value;
        tape.dz[unit] = dz;
        tape.first[unit] = r.first;
        tape.second[unit] = r.second;
        tape.dp[unit] = dp[j];
      }
      p[j] = gate * r.value;
      dp[j] = gate * dz;
      if (last) {
        value += plan.last[j] * p[j];
        gradient += plan.last[j] * dp[j];
      }
    }
  }
  const Lanes<T> kappa = row[plan.kappa];
  value += T(0.5) * kappa * x * x;
  gradient += kappa * x;
}

}  // namespace prmfast::picnn
