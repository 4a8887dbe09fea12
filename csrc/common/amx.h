// AMX tiles: eight registers of 16 rows x 64 bytes, and the product of bfloat16 tiles into a float32 one.
//
// Tiles are used through one of two classes with the same functions: the instructions, and a plain loop that computes the same, so
// that a kernel written for tiles is tested on every machine.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/simd.h"

namespace prmfast {

enum class Amx : int { kOff = 0, kEmulated = 1, kNative = 2 };

// Asks the CPU, and then the kernel, which grants the tiles' state to a process on request.
inline bool amx_available() {
#if PRMFAST_HAS_ISAS && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (best_isa() != Isa::kAvx512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// What kernels with a tile version run on: the tiles where the CPU has them, or what a test asks for.
inline Amx& chosen_amx() {
  static Amx chosen = amx_available() ? Amx::kNative : Amx::kOff;
  return chosen;
}

#if PRMFAST_HAS_ISAS
struct NativeTiles {
  // Every tile 16 x 64 bytes; of the calling thread, until stop().
  static void start() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Configuration all;
    asm volatile("ldtilecfg %0" ::"m"(all));
  }
  static void stop() { asm volatile("tilerelease"); }
  template <int kTile>
  static PRMFAST_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static PRMFAST_INLINE void load(const void* p) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t{64}), "i"(kTile) : "memory");
  }
  template <int kTile>
  static PRMFAST_INLINE void store(void* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(kTile) : "memory");
  }
  // C[m][n] += sum_k A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1]
  template <int kC, int kA, int kB>
  static PRMFAST_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
};
#endif

struct EmulatedTiles {
  static void start() {}
  static void stop() {}
  template <int kTile>
  static void zero() {
    std::memset(tile(kTile), 0, 1024);
  }
  template <int kTile>
  static void load(const void* p) {
    std::memcpy(tile(kTile), p, 1024);
  }
  template <int kTile>
  static void store(void* p) {
    std::memcpy(p, tile(kTile), 1024);
  }
  template <int kC, int kA, int kB>
  static void multiply() {
    float c[16][16];
    uint16_t a[16][32], b[16][32];
    std::memcpy(c, tile(kC), 1024);
    std::memcpy(a, tile(kA), 1024);
    std::memcpy(b, tile(kB), 1024);
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 16; ++n) c[m][n] += widen(a[m][2 * k]) * widen(b[k][2 * n]) + widen(a[m][2 * k + 1]) * widen(b[k][2 * n + 1]);
    std::memcpy(tile(kC), c, 1024);
  }

 private:
  static float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  static unsigned char* tile(int i) {
    static thread_local unsigned char tiles[8][1024];
    return tiles[i];
  }
};

}  // namespace prmfast
