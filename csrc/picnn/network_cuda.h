// A network as the CUDA kernels of the room take it, by value, and what they need to know of its shape.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace prmfast::picnn::cuda {

constexpr int kMostLayers = 6;  // hidden ones; with weights and a context of more, 99 KB of shared memory (sm_86, sm_89) do not do
constexpr int kMostWidth = 64;  // value, tangent and both their bfloat16 parts of wider layers do not fit into the registers

// Raw rows as in picnn.h: [v_0 c_0 .. v_L c_L | gate_1 .. gate_L | kappa, if curvature].
struct Network {
  int layers;                       // hidden ones, L
  int padded;                       // the widest of them in whole tiles: 16, 32 or 64; every layer is padded to this
  int width[kMostLayers + 1];       // k_0 .. k_{L-1}, 1
  int slope[kMostLayers + 1];       // where v_i stands in a raw row; c_i follows it
  int gate[kMostLayers];            // where the gate of z_i stands
  int row;                          // entries of a raw row
  bool softplus;                    // or leaky relu, of which relu is the one with slope 0
  bool square_first, relu_gate, curvature;
  float negative_slope, curvature_floor;
  const float* wz[kMostLayers];     // [k_{i+1}, k_i], contiguous, in device memory

  // Floats of a context in shared memory: v_i, c_i and the gate of z_i for each hidden layer, then v_L, c_L and kappa. Eight floats
  // beyond a multiple of the 32 banks: four contexts, side by side, are read without conflicts.
  int context_stride;
  int fragment_words[2];            // 32-bit words of all B fragments, of one bfloat16 part of each weight and of two
};

// widths: k_0 .. k_{L-1}, 1. Throws std::invalid_argument for a network that the kernels do not take; wz stays unset.
inline Network make_network(const std::vector<int64_t>& widths, bool softplus, float negative_slope, bool square_first, bool relu_gate,
                            bool curvature, float curvature_floor) {
  Network n{};
  const int64_t layers = static_cast<int64_t>(widths.size()) - 1;
  if (layers < 1 || layers > kMostLayers)
    throw std::invalid_argument("a network must have 1 to " + std::to_string(kMostLayers) + " hidden layers, got " + std::to_string(layers));
  const int64_t widest = *std::max_element(widths.begin(), widths.end());
  if (widest > kMostWidth)
    throw std::invalid_argument("widths must be at most " + std::to_string(kMostWidth) + ", got " + std::to_string(widest));
  n.layers = static_cast<int>(layers);
  n.padded = widest <= 16 ? 16 : widest <= 32 ? 32 : 64;
  int next = 0;
  for (int i = 0; i <= n.layers; ++i) {
    n.width[i] = static_cast<int>(widths[i]);
    n.slope[i] = next;
    next += 2 * n.width[i];
  }
  for (int i = 0; i < n.layers; ++i) {
    n.gate[i] = next;
    next += n.width[i];
  }
  n.row = next + (curvature ? 1 : 0);
  n.softplus = softplus;
  n.negative_slope = negative_slope;
  n.square_first = square_first;
  n.relu_gate = relu_gate;
  n.curvature = curvature;
  n.curvature_floor = curvature_floor;
  n.context_stride = (3 * n.padded * n.layers + 3 + 31) / 32 * 32 + 8;
  n.fragment_words[1] = (n.layers - 1) * n.padded * n.padded;
  n.fragment_words[0] = n.fragment_words[1] / 2;
  return n;
}

}  // namespace prmfast::picnn::cuda
