// Large results past the cache: a line that is written whole needs no reading of what it replaces.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace prmfast {

constexpr int64_t kLine = 64;

#if defined(__SSE2__)
#if !defined(PRMFAST_NO_TARGET_CLONES)
__attribute__((target("avx512f"))) inline void stream_lines_512(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * kLine), _mm512_loadu_si512(from + i * kLine));
}
#endif

inline void stream_lines_128(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < 4 * lines; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
}

// to begins a line.
inline void stream_lines(char* to, const char* from, int64_t lines) {
#if !defined(PRMFAST_NO_TARGET_CLONES)
  static const bool wide = __builtin_cpu_supports("avx512f");
  if (wide) return stream_lines_512(to, from, lines);
#endif
  stream_lines_128(to, from, lines);
}
inline void stream_end() { _mm_sfence(); }
#else
inline void stream_lines(char* to, const char* from, int64_t lines) { std::memcpy(to, from, lines * kLine); }
inline void stream_end() {}
#endif

// Whole lines go past the cache, what is before and behind them does not. Before another thread may look: stream_end().
inline void stream_bytes(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  const int64_t head = std::min<int64_t>(bytes, (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine);
  const int64_t lines = (bytes - head) / kLine, done = head + lines * kLine;
  std::memcpy(to, from, head);
  stream_lines(to + head, from + head, lines);
  std::memcpy(to + done, from + done, bytes - done);
}

inline void stream_zeros(void* target, int64_t bytes) {
  alignas(kLine) static const char zeros[8192] = {};
  char* to = static_cast<char*>(target);
  const int64_t head = std::min<int64_t>(bytes, (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine);
  stream_bytes(to, zeros, head);  // so that the pieces that follow begin lines
  for (int64_t i = head; i < bytes; i += sizeof zeros) stream_bytes(to + i, zeros, std::min<int64_t>(sizeof zeros, bytes - i));
}

}  // namespace prmfast
