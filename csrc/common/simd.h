// Run-time choice of the instruction set, per function: one build serves every x86-64 CPU.
#pragma once

#define PRMFAST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(PRMFAST_NO_TARGET_CLONES)
#define PRMFAST_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define PRMFAST_HAS_ISAS 1
#define PRMFAST_AVX512 __attribute__((target("arch=x86-64-v4")))
#define PRMFAST_AVX2 __attribute__((target("arch=x86-64-v3")))
#else
#define PRMFAST_MULTIVERSION
#define PRMFAST_HAS_ISAS 0
#define PRMFAST_AVX512
#define PRMFAST_AVX2
#endif

namespace prmfast {

// For kernels whose register tiles differ by instruction set: they name one function for each and choose by isa().
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

inline Isa best_isa() {
#if PRMFAST_HAS_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

inline const char* name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable"; }

// What such kernels run on: the best of this CPU, or less where a test asks for it.
inline Isa& chosen_isa() {
  static Isa chosen = best_isa();
  return chosen;
}

}  // namespace prmfast
