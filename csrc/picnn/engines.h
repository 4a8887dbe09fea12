// Two ways to multiply a hidden layer's weights with value and tangent: register tiles of fused multiply-adds, and AMX tiles.
#pragma once
#include "common/amx.h"
#include "picnn/plan.h"

namespace prmfast::picnn {

// p = x v + c + W a and dp = v + W da for every unit of hidden layer i >= 1, kUnits units at a time.
template <class T, int kUnits>
struct DenseEngine {
  static void start() {}
  static void stop() {}

  template <class Coefficients>
  static PRMFAST_INLINE void layer(const Plan<T>& plan, int i, const Coefficients& row, Lanes<T> x, const Tape<T>& tape,
                                   const Lanes<T>* a, const Lanes<T>* da, Lanes<T>* p, Lanes<T>* dp) {
    (void)tape;
    const int64_t out = plan.widths[i], from = plan.widths[i - 1];
    const T* weight = plan.by_output[i - 1].data();
    for (int64_t j = 0; j < out; j += kUnits, weight += from * kUnits)
      dense_tile<T, kUnits>(row, plan.slope[i] + j, plan.offset[i] + j, std::min<int64_t>(kUnits, out - j), weight, from, a, da, x, p + j,
                            dp + j);
  }
};

// The bfloat16 nearest to each lane, as the upper half of a float's bits; ties to even.
PRMFAST_INLINE Lanes<uint32_t> rounded_to_bf16(Lanes<float> v) {
  Lanes<uint32_t> bits;
  std::memcpy(&bits, &v, sizeof bits);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

// Two neighbouring inputs in the layout of an AMX operand, a pair in every lane: their bfloat16 parts, and those of what is left.
PRMFAST_INLINE void split_pair(Lanes<float> even, Lanes<float> odd, Lanes<uint32_t>* high, Lanes<uint32_t>* low) {
  const Lanes<uint32_t> even_high = rounded_to_bf16(even), odd_high = rounded_to_bf16(odd);
  Lanes<float> even_part, odd_part;
  std::memcpy(&even_part, &even_high, sizeof even_part);
  std::memcpy(&odd_part, &odd_high, sizeof odd_part);
  *high = (even_high >> 16) | odd_high;
  *low = (rounded_to_bf16(even - even_part) >> 16) | rounded_to_bf16(odd - odd_part);
}

// The same with tiles. A tile of weights holds 16 units x 32 inputs, one of activations 16 pairs of inputs x 16 lanes, so that
// the product is 16 units in the layout of every other path. Numbers are split into two bfloat16 parts; three of the four
// products make up float32 (the fourth is below its rounding), one alone is plain bfloat16.
template <class Tiles>
struct TileEngine {
  static void start() { Tiles::start(); }
  static void stop() { Tiles::stop(); }

  template <class Coefficients>
  static PRMFAST_INLINE void layer(const Plan<float>& plan, int i, const Coefficients& row, Lanes<float> x, const Tape<float>& tape,
                                   const Lanes<float>* a, const Lanes<float>* da, Lanes<float>* p, Lanes<float>* dp) {
    const int64_t out = plan.widths[i], from = plan.widths[i - 1], steps = plan.tile_steps(i), pairs = 16 * steps;
    Lanes<uint32_t>*high = tape.pairs, *low = high + pairs, *d_high = low + pairs, *d_low = d_high + pairs;
    for (int64_t k = 0; k < pairs; ++k) {
      const bool both = 2 * k + 1 < from, one = 2 * k < from;
      split_pair(one ? a[2 * k] : Lanes<float>{}, both ? a[2 * k + 1] : Lanes<float>{}, high + k, low + k);
      split_pair(one ? da[2 * k] : Lanes<float>{}, both ? da[2 * k + 1] : Lanes<float>{}, d_high + k, d_low + k);
    }
    const TileWeights& weights = plan.tiles[i - 1];
    for (int64_t j = 0; j < out; j += 32) {
      const bool two = j + 16 < out;
      Tiles::template zero<0>();
      Tiles::template zero<1>();
      Tiles::template zero<2>();
      Tiles::template zero<3>();
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t first = (j / 16 * steps + s) * kTileElements, second = first + steps * kTileElements;
        Tiles::template load<4>(&weights.high[first]);
        Tiles::template load<6>(high + 16 * s);
        Tiles::template load<7>(d_high + 16 * s);
        Tiles::template multiply<0, 4, 6>();
        Tiles::template multiply<1, 4, 7>();
        if (two) {
          Tiles::template load<5>(&weights.high[second]);
          Tiles::template multiply<2, 5, 6>();
          Tiles::template multiply<3, 5, 7>();
        }
        if (plan.plain_bf16) continue;
        Tiles::template load<6>(low + 16 * s);
        Tiles::template load<7>(d_low + 16 * s);
        Tiles::template multiply<0, 4, 6>();
        Tiles::template multiply<1, 4, 7>();
        if (two) {
          Tiles::template multiply<2, 5, 6>();
          Tiles::template multiply<3, 5, 7>();
        }
        Tiles::template load<4>(&weights.low[first]);
        Tiles::template load<6>(high + 16 * s);
        Tiles::template load<7>(d_high + 16 * s);
        Tiles::template multiply<0, 4, 6>();
        Tiles::template multiply<1, 4, 7>();
        if (two) {
          Tiles::template load<5>(&weights.low[second]);
          Tiles::template multiply<2, 5, 6>();
          Tiles::template multiply<3, 5, 7>();
        }
      }
      Tiles::template store<0>(p + j);
      Tiles::template store<1>(dp + j);
      if (two) {
        Tiles::template store<2>(p + j + 16);
        Tiles::template store<3>(dp + j + 16);
      }
    }
    for (int64_t j = 0; j < out; ++j) {
      const Lanes<float> v = row[plan.slope[i] + j];
      p[j] += x * v + row[plan.offset[i] + j];
      dp[j] += v;
    }
  }
};

}  // namespace prmfast::picnn
