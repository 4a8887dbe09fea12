// Contract of the room: value g and gradient dg/dx of the level recursion, and its backward pass.
#pragma once
#include <cstdint>
#include <vector>

namespace prmfast::picnn {

enum class Activation : int { kSoftplus = 0, kLeakyRelu = 1 };  // relu is leaky relu with slope 0
enum class Gate : int { kSoftplus = 0, kRelu = 1 };

// A row of raw coefficients, as the affine heads make it: [v_0 c_0 .. v_L c_L | gate_1 .. gate_L | kappa, if curvature].
// gate goes through its activation, kappa through softplus, and curvature_floor is added.
struct Shape {
  std::vector<int64_t> widths;  // k_0 .. k_{L-1}, 1
  Activation activation;
  double negative_slope;
  bool square_first;
  Gate gate_activation;
  bool curvature;
  double curvature_floor;

  int layers() const { return static_cast<int>(widths.size()) - 1; }
  int64_t slope(int i) const;   // start of v_i in a row
  int64_t offset(int i) const;  // start of c_i
  int64_t gate(int i) const;    // start of gate_i, i >= 1
  int64_t kappa() const;        // where kappa stands, or would
  int64_t row() const;          // entries of a raw row
};

// rows [count, shape.row()], levels [count, m] with row stride level_stride (0: shared), wz[i] [k_{i+1}, k_i]; all contiguous
// but for level_stride.
template <class T>
struct Inputs {
  const T* rows;
  const T* levels;
  int64_t level_stride;
  std::vector<const T*> wz;
  int64_t count, m;
};

// How exact a result has to be. tolerance > 0 (float, softplus): a row may be evaluated at Chebyshev nodes and interpolated where
// the estimated error of its gradient is below tolerance times its mean magnitude. plain_bf16 (float): a CPU with AMX may round
// weights and activations of the hidden layers to bfloat16.
struct Accuracy {
  double tolerance;
  bool plain_bf16;
};

// Writes value and gradient [count, m]. A gradient never falls from a level to a higher one of its row where every wz is >= 0.
// A row's result does not depend on the other rows.
template <class T>
void forward(const Shape& shape, const Inputs<T>& in, const Accuracy& accuracy, T* value, T* gradient, int threads);

// Writes d rows, d levels [count, m] and d wz[i] of sum(value * grad_value + gradient * grad_gradient).
template <class T>
void backward(const Shape& shape, const Inputs<T>& in, const T* grad_value, const T* grad_gradient, T* d_rows, T* d_levels,
              const std::vector<T*>& d_wz, int threads);

}  // namespace prmfast::picnn
