// The instruction sets by name, for tests and bug reports.
#pragma once
#include <stdexcept>
#include <string>

#include "common/amx.h"
#include "common/simd.h"

namespace prmfast {

inline std::string chosen_name() {
  if (chosen_amx() != Amx::kOff) return chosen_amx() == Amx::kNative ? "amx" : "amx_emulated";
  return name(chosen_isa());
}

// "amx" and "amx_emulated" are kernels with tiles, and for the rest the best that there is.
inline void choose(const std::string& wanted) {
  if (wanted == "amx_emulated" || (wanted == "amx" && amx_available())) {
    chosen_isa() = best_isa();
    chosen_amx() = wanted == "amx" ? Amx::kNative : Amx::kEmulated;
    return;
  }
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
    if (wanted == name(isa) && isa <= best_isa()) {
      chosen_isa() = isa;
      chosen_amx() = Amx::kOff;
      return;
    }
  throw std::invalid_argument("isa must be one that this CPU has, at most " +
                              std::string(amx_available() ? "amx" : name(best_isa())) + ", got " + wanted);
}

}  // namespace prmfast
