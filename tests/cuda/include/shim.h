// What libraries of emulated kernels that Python calls through ctypes have in common: functions give null or what went wrong.
#pragma once
#include <exception>
#include <string>
#include <utility>

#include "emulate.h"

namespace emulate {

inline std::string told;

template <class F>
const char* guarded_call(F&& call) {
  try {
    std::forward<F>(call)();
    return nullptr;
  } catch (const std::exception& error) {
    told = error.what();
    return told.c_str();
  }
}

}  // namespace emulate

// Included once per library.
extern "C" {
void emulate_device(int capability, long shared_bytes, int multiprocessors, int backwards) {
  emulate::device = {capability, static_cast<size_t>(shared_bytes), multiprocessors};
  emulate::backwards = backwards != 0;
}
void emulate_reset() {
  emulate::traffic = {};
  emulate::launches.clear();
}
long emulate_bytes_read() { return static_cast<long>(emulate::traffic.bytes_read); }
long emulate_bytes_written() { return static_cast<long>(emulate::traffic.bytes_written); }
long emulate_launches() { return static_cast<long>(emulate::launches.size()); }
// blocks, threads, cluster and bytes of shared memory of a launch.
void emulate_launch(long which, long* out) {
  const auto& launched = emulate::launches[static_cast<size_t>(which)];
  out[0] = launched.blocks;
  out[1] = launched.threads;
  out[2] = launched.cluster;
  out[3] = static_cast<long>(launched.shared_bytes);
}
// Memory of NaN that faults right behind its end, for as long as the process lives.
void* emulate_memory(long bytes, long alignment) {
  return (new emulate::Guarded(static_cast<size_t>(bytes), static_cast<size_t>(alignment)))->data();
}
}
