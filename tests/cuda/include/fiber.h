// Stacks that threads switch between, in one OS thread.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulate {

#ifdef __x86_64__
struct Context {
  void* stack_pointer = nullptr;
};
__attribute__((naked, noinline)) inline void switch_context(Context*, Context*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void prepare(Context* context, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, the entry, and what keeps the ABI's alignment
  std::memset(frame, 0, 8 * sizeof *frame);
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  context->stack_pointer = frame;
}
#else
struct Context {
  ucontext_t state;
};
inline void switch_context(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
inline void prepare(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = stack;
  context->state.uc_stack.ss_size = bytes;
  makecontext(&context->state, entry, 0);
}
#endif

constexpr size_t kStackBytes = 128 * 1024;
constexpr uint64_t kStackEnd = 0x5afe5afe5afe5afeull;

inline char* stacks(size_t count) {  // mapped once, grows only
  static char* memory = nullptr;
  static size_t held = 0;
  if (count > held) {
    if (memory != nullptr) munmap(memory, held * kStackBytes);
    void* got = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::runtime_error("emulate: no memory for stacks");
    memory = static_cast<char*>(got);
    held = count;
  }
  return memory;
}

}  // namespace emulate
