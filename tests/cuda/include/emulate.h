// Runs kernels on the CPU: every thread is a fiber, all in one OS thread; see ../README.md.
#pragma once
#include <signal.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "guarded.h"

namespace emulate {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The device that launches are held to.
struct Device {
  int capability = 90;
  size_t shared_bytes = 227 * 1024;  // most a block may take
  int multiprocessors = 4;
};
inline Device device;

// The order in which threads run between two barriers: a race shows as a result that depends on it.
inline bool backwards = false;

// What the wrappers of csrc/common/cuda moved to and from global memory since the last reset.
struct Traffic {
  uint64_t bytes_read = 0, bytes_written = 0;
};
inline Traffic traffic;

struct Launched {
  unsigned blocks, threads, cluster;
  size_t shared_bytes;
};
inline std::vector<Launched> launches;

// --- threads, blocks, clusters

struct Block;
struct Cluster;
using Complete = void (*)(const void* const* in, void* const* out, uint32_t mask);

struct AsyncCopy {
  void* to;
  unsigned char bytes[16];
  bool committed;
};

struct Thread {
  Context context;
  char* stack;
  Block* block;
  unsigned linear, lane;
  Index index;
  enum { ready, waiting, done } state = ready;
  const char* where = nullptr;  // what it waits for
  int line = 0;
  Complete complete = nullptr;  // of the warp operation it has arrived at
  uint32_t mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  uint64_t cluster_phase = 0;
  std::vector<std::vector<AsyncCopy>> groups{1};  // of cp.async, the last one still open
};

struct Block {
  Cluster* cluster;
  Index index;
  unsigned rank;
  Guarded shared;
  std::vector<Thread> threads;
  unsigned arrived = 0, finished = 0;
  int votes = 0, result = 0;

  Block(Cluster* c, Index i, unsigned r, size_t shared_bytes, size_t count)
      : cluster(c), index(i), rank(r), shared(shared_bytes), threads(count) {}
};

struct Cluster {
  std::vector<Block*> blocks;
  uint64_t phase = 0;
  size_t arrived = 0, total = 0;
};

inline Thread* current = nullptr;
inline Context scheduler;
inline std::string failure;
inline const std::function<void()>* body = nullptr;

}  // namespace emulate

inline emulate::Index threadIdx, blockIdx;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulate {

inline std::string name(const Thread& t) {
  return "block " + std::to_string(t.block->index.x) + " thread " + std::to_string(t.linear);
}

// Ends the launch with a message; called by a thread.
[[noreturn]] inline void fail(const std::string& message) {
  if (failure.empty()) failure = message + " (" + name(*current) + ")";
  switch_context(&current->context, &scheduler);
  __builtin_unreachable();
}

inline void wait(const char* where, int line) {
  current->state = Thread::waiting;
  current->where = where;
  current->line = line;
  switch_context(&current->context, &scheduler);
}

inline void enter() {
  (*body)();
  Thread& t = *current;
  t.state = Thread::done;
  for (const auto& group : t.groups)
    if (!group.empty()) fail("asynchronous copies were never waited for");
  if (++t.block->finished == t.block->threads.size()) {
    if (!t.block->shared.intact()) fail("a write outside of dynamic shared memory");
    if (t.block->cluster->blocks.size() > 1) t.block->shared.revoke();  // nobody may read it once the block is gone
  }
  switch_context(&t.context, &scheduler);
}

// How many threads of the block voted.
inline int block_barrier(bool vote, int line) {
  Block& block = *current->block;
  block.votes += vote;
  if (++block.arrived == block.threads.size()) {
    block.result = block.votes;
    block.votes = 0;
    block.arrived = 0;
    for (Thread& t : block.threads) t.state = Thread::ready;
  } else {
    wait("__syncthreads", line);
  }
  return block.result;
}

// in and out of every lane of the mask meet; the last one to arrive runs `complete` for all.
inline void warp_operation(uint32_t mask, const void* in, void* out, Complete complete, const char* where) {
  Thread& self = *current;
  if ((mask >> self.lane & 1) == 0) fail(std::string(where) + ": the mask leaves out the calling lane");
  Thread* lanes = &self - self.lane;
  const unsigned there = static_cast<unsigned>(self.block->threads.size()) - (self.linear - self.lane);
  self.complete = complete;
  self.mask = mask;
  self.in = in;
  self.out = out;
  const void* ins[32] = {};
  void* outs[32] = {};
  bool all = true;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (i >= there) fail(std::string(where) + ": the mask names lane " + std::to_string(i) + ", which the block does not have");
    const Thread& t = lanes[i];
    if (t.state == Thread::done) fail(std::string(where) + ": lane " + std::to_string(i) + " of the mask has returned");
    all = all && t.complete == complete && t.mask == mask;
    ins[i] = t.in;
    outs[i] = t.out;
  }
  if (!all) return wait(where, 0);
  complete(ins, outs, mask);
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    lanes[i].complete = nullptr;
    lanes[i].state = Thread::ready;
  }
}

inline void cluster_arrive() {
  Cluster& cluster = *current->block->cluster;
  current->cluster_phase = cluster.phase + 1;
  if (++cluster.arrived < cluster.total) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Block* block : cluster.blocks)
    for (Thread& t : block->threads)
      if (t.state == Thread::waiting && t.line == -1) t.state = Thread::ready;
}

inline void cluster_wait() {
  const Cluster& cluster = *current->block->cluster;
  if (current->cluster_phase == 0) fail("cluster_wait without cluster_arrive");
  if (cluster.phase < current->cluster_phase) wait("cluster_wait", -1);
  current->cluster_phase = 0;
}

template <class T>
T* map_shared(T* own, unsigned rank) {
  const Block& block = *current->block;
  if (rank >= block.cluster->blocks.size()) fail("map_shared: no such block in the cluster");
  const auto offset = reinterpret_cast<const char*>(own) - block.shared.data();
  if (offset < 0 || static_cast<size_t>(offset) > block.shared.bytes()) fail("map_shared: no address of this block's shared memory");
  return reinterpret_cast<T*>(block.cluster->blocks[rank]->shared.data() + offset);
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned access of " + std::to_string(bytes) + " bytes");
}

// Reads now and writes when it is waited for: who forgets to wait finds what stood there before.
inline void copy_async(void* to, const void* from) {
  check_aligned(to, 16);
  check_aligned(from, 16);
  AsyncCopy copy{to, {}, false};
  std::memcpy(copy.bytes, from, 16);
  current->groups.back().push_back(copy);
}
inline void copy_async_commit() { current->groups.emplace_back(); }
inline void copy_async_wait(unsigned pending) {
  auto& groups = current->groups;
  while (groups.size() - 1 > pending) {
    for (const AsyncCopy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.erase(groups.begin());
  }
}

// --- launches

inline void on_fault(int signal, siginfo_t* info, void*) {
  if (current == nullptr) {
    struct sigaction usual = {};
    usual.sa_handler = SIG_DFL;
    sigaction(signal, &usual, nullptr);
    return;
  }
  for (const Block* block : current->block->cluster->blocks)
    if (block->shared.holds(info->si_addr)) {
      const auto offset = static_cast<const char*>(info->si_addr) - block->shared.data();
      fail("an access outside of dynamic shared memory: offset " + std::to_string(offset) + " of " +
           std::to_string(block->shared.bytes()) + " bytes, or in a block of the cluster that has returned");
    }
  fail("an invalid access of global memory");
}

class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &ours, &before_[0]);
    sigaction(SIGBUS, &ours, &before_[1]);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &before_[0], nullptr);
    sigaction(SIGBUS, &before_[1], nullptr);
  }

 private:
  struct sigaction before_[2];
};

inline std::string stuck(const Cluster& cluster) {
  std::string told = "deadlock:";
  int named = 0;
  size_t returned = 0;
  for (const Block* block : cluster.blocks)
    for (const Thread& t : block->threads) {
      returned += t.state == Thread::done;
      if (t.state == Thread::waiting && named++ < 4)
        told += " " + name(t) + " waits in " + t.where + (t.line > 0 ? " of line " + std::to_string(t.line) : "") + ";";
    }
  return told + " " + std::to_string(returned) + " of " + std::to_string(cluster.total) + " threads have returned";
}

inline void run_thread(Thread& t) {
  current = &t;
  threadIdx = t.index;
  blockIdx = t.block->index;
  switch_context(&scheduler, &t.context);
  current = nullptr;
  uint64_t end;
  std::memcpy(&end, t.stack, sizeof end);
  if (failure.empty() && end != kStackEnd) failure = "the stack of a thread overflowed (" + name(t) + ")";
  if (!failure.empty()) throw std::runtime_error("emulate: " + std::exchange(failure, {}));
}

// Threads from begin to end, round and round until all of them wait or have returned; whether any of them ran.
inline bool run_while_ready(Thread* begin, Thread* end) {
  bool moved = false;
  for (bool again = true; again; moved |= again) {
    again = false;
    for (Thread* t = backwards ? end : begin; t != (backwards ? begin : end);) {
      Thread& next = backwards ? *--t : *t++;
      if (next.state != Thread::ready) continue;
      run_thread(next);
      again = true;
    }
  }
  return moved;
}

// A warp runs as far as it can before the next one does, and so does a block of a cluster: what a barrier should have kept from
// happening happens.
inline bool run_warps(Block& block) {
  const size_t count = block.threads.size(), warps = (count + 31) / 32;
  Thread* threads = block.threads.data();
  bool moved = false;
  for (bool again = true; again; moved |= again) {
    again = false;
    for (size_t i = 0; i < warps; ++i) {
      const size_t first = 32 * (backwards ? warps - 1 - i : i);
      again |= run_while_ready(threads + first, threads + std::min(first + 32, count));
    }
  }
  return moved;
}

inline void run_cluster(const std::vector<Index>& indices, size_t shared_bytes) {
  Cluster cluster;
  std::vector<std::unique_ptr<Block>> blocks;
  const size_t count = size_t{blockDim.x} * blockDim.y * blockDim.z;
  char* memory = stacks(count * indices.size());
  for (unsigned rank = 0; rank < indices.size(); ++rank) {
    blocks.push_back(std::make_unique<Block>(&cluster, indices[rank], rank, shared_bytes, count));
    cluster.blocks.push_back(blocks.back().get());
    for (unsigned i = 0; i < count; ++i, memory += kStackBytes) {
      Thread& t = blocks.back()->threads[i];
      t.block = blocks.back().get();
      t.linear = i;
      t.lane = i % 32;
      t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      t.stack = memory;
      std::memcpy(memory, &kStackEnd, sizeof kStackEnd);
      prepare(&t.context, memory, kStackBytes, enter);
    }
  }
  cluster.total = count * indices.size();
  std::vector<Block*> order = cluster.blocks;
  if (backwards) order = {order.rbegin(), order.rend()};
  bool moved = true;
  while (moved) {
    moved = false;
    for (Block* block : order) moved |= run_warps(*block);
  }
  for (const Block* block : cluster.blocks)
    if (block->finished != count) throw std::runtime_error("emulate: " + stuck(cluster));
}

// The shape of a launch is checked as the device would; a failure throws std::runtime_error.
inline void run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  const auto refuse = [](const std::string& why) { throw std::runtime_error("emulate: launch refused: " + why); };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) refuse("grid");
  if (threads == 0 || threads > 1024) refuse(std::to_string(threads) + " threads a block");
  if (shared_bytes > device.shared_bytes) refuse(std::to_string(shared_bytes) + " bytes of shared memory a block");
  if (cluster > 8 || cluster == 0 || grid.x % cluster != 0) refuse("cluster of " + std::to_string(cluster));
  if (cluster > 1 && device.capability < 90) refuse("clusters need sm_90");
  launches.push_back({grid.x * grid.y * grid.z, static_cast<unsigned>(threads), cluster, shared_bytes});
  const FaultHandler handler;
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        std::vector<Index> indices;
        for (unsigned i = 0; i < cluster; ++i) indices.push_back({x + i, y, z});
        run_cluster(indices, shared_bytes);
      }
}

}  // namespace emulate
