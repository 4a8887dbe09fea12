// Denormals cost a hundred cycles each; -ffast-math would flush them for the whole process, this does it for one scope.
#pragma once
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace prmfast {

enum class Flush { results, results_and_inputs };  // FTZ alone, or FTZ and DAZ

class FlushDenormals {
 public:
#if defined(__SSE2__)
  explicit FlushDenormals(Flush what) : saved_(_mm_getcsr()) {
    _mm_setcsr(saved_ | (what == Flush::results ? 0x8000u : 0x8040u));
  }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  explicit FlushDenormals(Flush) {}
  ~FlushDenormals() {}

 public:
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace prmfast
