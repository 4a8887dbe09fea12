// Memory of NaN that faults right behind its end.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

namespace emulate {

class Guarded {
 public:
  explicit Guarded(size_t bytes, size_t alignment = 16) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    inner_ = (rounded + page) / page * page;  // at least one byte to spare in front
    mapped_ = inner_ + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::runtime_error("emulate: no memory");
    mprotect(base_ + page, inner_, PROT_READ | PROT_WRITE);
    std::memset(base_ + page, 0xff, inner_);  // NaN in every floating type
    data_ = base_ + page + inner_ - rounded;
    first_ = base_ + page;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void revoke() { mprotect(first_, inner_, PROT_NONE); }
  bool holds(const void* p) const { return p >= base_ && p < base_ + mapped_; }
  bool intact() const {  // in front of the data, and between its end and the next aligned address
    for (const char* p = first_; p < data_; ++p)
      if (*p != static_cast<char>(0xff)) return false;
    for (const char* p = data_ + bytes_; p < first_ + inner_; ++p)
      if (*p != static_cast<char>(0xff)) return false;
    return true;
  }

 private:
  size_t bytes_, inner_ = 0, mapped_ = 0;
  char *base_ = nullptr, *first_ = nullptr, *data_ = nullptr;
};

}  // namespace emulate
