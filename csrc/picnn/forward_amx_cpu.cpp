// The forward pass with AMX tiles, and with their emulation.
#include "picnn/forward.h"

namespace prmfast::picnn {

#if PRMFAST_HAS_ISAS
PRMFAST_AVX512 void forward_native_tiles(const Plan<float>& plan, const Inputs<float>& in, const Options& options,
                                         const Outputs<float>& out, const Part<float>& part) {
  forward_tiles<float, TileEngine<NativeTiles>>(plan, in, options, out, part);
}
#else
void forward_native_tiles(const Plan<float>& plan, const Inputs<float>& in, const Options& options, const Outputs<float>& out,
                          const Part<float>& part) {
  forward_emulated_tiles(plan, in, options, out, part);
}
#endif

void forward_emulated_tiles(const Plan<float>& plan, const Inputs<float>& in, const Options& options, const Outputs<float>& out,
                            const Part<float>& part) {
  forward_tiles<float, TileEngine<EmulatedTiles>>(plan, in, options, out, part);
}

}  // namespace prmfast::picnn
