#include "picnn/forward.h"

#include "common/parallel_for.h"

namespace prmfast::picnn {

int64_t Shape::slope(int i) const { return 2 * std::accumulate(widths.begin(), widths.begin() + i, int64_t{0}); }
int64_t Shape::offset(int i) const { return slope(i) + widths[i]; }
int64_t Shape::gate(int i) const {
  return slope(layers() + 1) + std::accumulate(widths.begin(), widths.begin() + (i - 1), int64_t{0});
}
int64_t Shape::kappa() const { return gate(layers() + 1); }
int64_t Shape::row() const { return kappa() + (curvature ? 1 : 0); }

namespace {

#define PRMFAST_FORWARD(NAME, TARGET, T, UNITS)                                                                                \
  TARGET void NAME(const Plan<T>& plan, const Inputs<T>& in, const Options& options, const Outputs<T>& out, const Part<T>& part) { \
    forward_tiles<T, DenseEngine<T, UNITS>>(plan, in, options, out, part);                                                     \
  }
PRMFAST_FORWARD(run_portable, , float, kUnitsPortable)
PRMFAST_FORWARD(run_portable, , double, kUnitsPortable)
#if PRMFAST_HAS_ISAS
PRMFAST_FORWARD(run_avx2, PRMFAST_AVX2, float, kUnitsAvx2)
PRMFAST_FORWARD(run_avx2, PRMFAST_AVX2, double, kUnitsAvx2)
PRMFAST_FORWARD(run_avx512, PRMFAST_AVX512, float, kUnitsAvx512)
PRMFAST_FORWARD(run_avx512, PRMFAST_AVX512, double, kUnitsAvx512)
#endif

template <class T>
void run(Isa isa, const Plan<T>& plan, const Inputs<T>& in, const Options& options, const Outputs<T>& out, const Part<T>& part) {
  if constexpr (std::is_same_v<T, float>) {
    if (!plan.tiles.empty())
      return chosen_amx() == Amx::kNative ? forward_native_tiles(plan, in, options, out, part)
                                          : forward_emulated_tiles(plan, in, options, out, part);
  }
#if PRMFAST_HAS_ISAS
  if (isa == Isa::kAvx512) return run_avx512(plan, in, options, out, part);
  if (isa == Isa::kAvx2) return run_avx2(plan, in, options, out, part);
#endif
  (void)isa;
  run_portable(plan, in, options, out, part);
}

template <class T>
double share_of_lanes(int64_t n) {
  return static_cast<double>(n) / ((n + kWidth<T> - 1) / kWidth<T> * kWidth<T>);
}

}  // namespace

template <class T>
void forward(const Shape& shape, const Inputs<T>& in, const Accuracy& accuracy, T* value, T* gradient, int threads) {
  if (in.count == 0 || in.m == 0) return;
  const Isa isa = chosen_isa();
  const bool tiles = std::is_same_v<T, float> && chosen_amx() != Amx::kOff && shape.layers() > 1;
  const Plan<T> plan(shape, in, units_together(isa), tiles, accuracy.plain_bf16);
  Options options{accuracy.tolerance, 0};
  if (std::is_same_v<T, float> && accuracy.tolerance > 0 && shape.activation == Activation::kSoftplus)
    while (options.rungs < kRungs && kRungOf[options.rungs] + 1 <= kWorth * in.m) ++options.rungs;
  const bool rows_in_lanes = share_of_lanes<T>(in.count) >= share_of_lanes<T>(in.m);
  const int64_t pieces = rows_in_lanes ? (in.count + kWidth<T> - 1) / kWidth<T> : in.count;
  const int64_t work = in.m * 4 * (plan.total_weights + plan.total_units) * (rows_in_lanes ? kWidth<T> : 1);
  const Outputs<T> out{value, gradient};
  parallel_rows(pieces, thread_count(pieces, work, threads), [&](int, int64_t begin, int64_t end) {
    run<T>(isa, plan, in, options, out, Part<T>{rows_in_lanes, begin, end});
  });
}

template void forward<float>(const Shape&, const Inputs<float>&, const Accuracy&, float*, float*, int);
template void forward<double>(const Shape&, const Inputs<double>&, const Accuracy&, double*, double*, int);

}  // namespace prmfast::picnn
