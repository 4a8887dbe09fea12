// Contract of the room: value g and gradient dg/dx of the level recursion, and its backward pass.
#pragma once
#include <cstdint>
#include <vector>

namespace prmfast::picnn {

enum class Activation : int { kSoftplus = 0, kLeakyRelu = 1 };  // relu is leaky relu with slope 0

struct Shape {
  std::vector<int64_t> widths;  // k_0 .. k_{L-1}, 1
  Activation activation;
  double negative_slope;
  bool square_first;

  int layers() const { return static_cast<int>(widths.size()) - 1; }
  int64_t slope(int i) const;   // start of v_i in a coefficient row
  int64_t offset(int i) const;  // start of c_i
  int64_t gate(int i) const;    // start of gate_i, i >= 1
  int64_t row() const;          // entries of a row; the last is kappa
};

// coefficients [rows, shape.row()], levels [rows, m] with row stride level_stride (0: shared), wz[i] [k_{i+1}, k_i]; all
// contiguous but for level_stride. Writes value and gradient [rows, m].
template <class T>
struct Inputs {
  const T* coefficients;
  const T* levels;
  int64_t level_stride;
  std::vector<const T*> wz;
  int64_t rows, m;
};

template <class T>
void forward(const Shape& shape, const Inputs<T>& in, T* value, T* gradient, int threads);

// Writes d coefficients [rows, shape.row()], d levels [rows, m] and d wz[i] of sum(value * grad_value + gradient * grad_gradient).
template <class T>
void backward(const Shape& shape, const Inputs<T>& in, const T* grad_value, const T* grad_gradient, T* d_coefficients, T* d_levels,
              const std::vector<T*>& d_wz, int threads);

}  // namespace prmfast::picnn
