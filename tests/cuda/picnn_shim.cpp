// What csrc/picnn/bind_cuda.cpp offers to Python, for ctypes.
#include "picnn/head_cuda.h"
#include "picnn/levels_cuda.h"
#include "shim.h"

namespace cuda = prmfast::picnn::cuda;

struct NetworkOf {
  int64_t widths, softplus, square_first, relu_gate, curvature;
  double negative_slope, curvature_floor;
};

static cuda::Network made(const int64_t* widths, const NetworkOf* of, const uint64_t* wz) {
  cuda::Network network =
      cuda::make_network({widths, widths + of->widths}, of->softplus != 0, static_cast<float>(of->negative_slope), of->square_first != 0,
                         of->relu_gate != 0, of->curvature != 0, static_cast<float>(of->curvature_floor));
  for (int i = 0; wz != nullptr && i < network.layers; ++i) network.wz[i] = reinterpret_cast<const float*>(wz[i]);
  return network;
}

extern "C" {
const char* picnn_network(const int64_t* widths, const NetworkOf* of, int64_t* row, int64_t* bytes) {
  return emulate::guarded_call([&] {
    const cuda::Network network = made(widths, of, nullptr);
    *row = network.row;
    bytes[0] = cuda::fragment_bytes(network, false);
    bytes[1] = cuda::fragment_bytes(network, true);
  });
}
const char* picnn_forward(const int64_t* widths, const NetworkOf* of, const uint64_t* wz, const cuda::LevelsCall* call, int split) {
  return emulate::guarded_call([&] { cuda::forward(made(widths, of, wz), *call, split != 0, nullptr); });
}
const char* picnn_prepare(const int64_t* widths, const NetworkOf* of, const uint64_t* wz, int split, void* fragments) {
  return emulate::guarded_call([&] { cuda::prepare(made(widths, of, wz), split != 0, fragments, nullptr); });
}
const char* picnn_serve(const int64_t* widths, const NetworkOf* of, const uint64_t* wz, const cuda::HeadCall* call, int split) {
  return emulate::guarded_call([&] { cuda::serve(made(widths, of, wz), *call, split != 0, nullptr); });
}
}
