// CUDA's kernels as plain C++, so that their sources run where there is no GPU: put before them by `g++ -include`.
//
// A thread is a fiber. Fibers run one after the other, each until it waits, so a missing barrier shows: its thread
// reads what no other has written yet. Shared memory begins as NaN, ends at a page that may not be touched and is NaN
// again once its block has ended. An asynchronous copy takes place only when its thread waits for it. A barrier that
// some thread never reaches ends the process with a message. Blocks run in order, those of a cluster together: each
// until it waits for another, or in an order drawn by chance. With EEKD_RACES, accesses that no barrier orders are
// found (races.cpp).
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#ifdef EEKD_RACES
extern "C" {
void race_launch();
void race_cluster(unsigned index, unsigned threads);
void race_watch(const void* begin, size_t bytes, bool shared);
void race_switch(unsigned thread, bool in_kernel);
void race_barrier(const unsigned* members, unsigned n);
void race_access(const void* address, size_t bytes, bool writes);
}
#else
inline void race_launch() {}
inline void race_cluster(unsigned, unsigned) {}
inline void race_watch(const void*, size_t, bool) {}
inline void race_switch(unsigned, bool) {}
inline void race_barrier(const unsigned*, unsigned) {}
inline void race_access(const void*, size_t, bool) {}
#endif

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

template <class T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a > b ? a : b;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim;

namespace emulator {

// The device that is emulated. Another has another id, for what is known of a device may be remembered.
struct Device {
  int id, shared_per_block, shared_per_multiprocessor, multiprocessors, major, largest_cluster;
} inline device;
inline std::vector<unsigned> launches;  // the blocks per cluster of each
inline unsigned seed = 0;               // of the order of fibers; 0: in a circle
inline std::mt19937 chance;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on CPU: %s\n", what);
  std::fflush(stderr);
  std::abort();
}

// Memory that ends where a page begins that may not be touched.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : page(sysconf(_SC_PAGESIZE)), size((bytes + page - 1) / page * page) {
    base = static_cast<char*>(mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + size, page, PROT_NONE)) fail("no memory");
    data = base + size - bytes;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base, size + page); }
  char* data;

 private:
  const size_t page, size;
  char* base;
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
  std::vector<unsigned> members;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, whole;
};

struct Phases {  // of a barrier that copies arrive at
  int phase = 0, expected = 0;
  bool arrived = false;
  unsigned by = 0;
  std::vector<Copy> copies;
};

struct Block {
  Block(unsigned index, size_t shared_bytes) : index(index), bytes((shared_bytes + 15) / 16 * 16), shared(bytes) {
    poison();
  }
  void poison() { std::memset(shared.data, 0xff, bytes); }
  dim3 index;
  size_t bytes;
  Guarded shared;
  Barrier barrier;
  std::map<std::pair<unsigned, unsigned>, Barrier> of_lanes;  // by warp and mask
  std::map<const void*, Phases> phases;
  std::vector<uint64_t> exchange[2];  // per thread
  unsigned running;
};

struct Fiber {
  Block* block;
  dim3 thread;
  bool started = false, ended = false;
  unsigned parity = 0;
  std::vector<Copy> copies;
  jmp_buf at;
};

constexpr size_t kStack = 64 << 10;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<std::unique_ptr<Block>> cluster;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline Barrier cluster_barrier;
inline std::function<void()> body;
inline unsigned alive, idle, stalled;  // turns since a thread of any block, of this block went on
inline ucontext_t launcher;

void begin();

// Goes on with the next thread that has not ended: of this block in a circle, of the next where this one is stuck.
inline void choose() {
  if (seed) {
    do current = &fibers[chance() % fibers.size()];
    while (current->ended);
    return;
  }
  if (++stalled > blockDim.x || !current->block->running) {
    stalled = 0;
    do current = &fibers[(current - fibers.data() + blockDim.x) % fibers.size()];
    while (!current->block->running);
  }
  const unsigned first = (current - fibers.data()) / blockDim.x * blockDim.x;
  do current = &fibers[first + (current - &fibers[first] + 1) % blockDim.x];
  while (current->ended);
}

inline void next() {
  race_switch(0, false);
  choose();
  race_switch(current - fibers.data(), true);
  if (current->started) _longjmp(current->at, 1);
  current->started = true;
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = stacks[current - fibers.data()].get();
  fresh.uc_stack.ss_size = kStack;
  fresh.uc_link = nullptr;
  makecontext(&fresh, begin, 0);
  setcontext(&fresh);
}

inline void begin() {
  body();
  if (!current->copies.empty()) fail("a thread ended before its copies arrived");
  current->ended = true;
  idle = stalled = 0;
  race_switch(0, false);
  if (!--current->block->running) current->block->poison();
  if (!--alive) setcontext(&launcher);
  next();
}

__attribute__((noinline)) inline void yield() {
  if (++idle > (seed ? 64 : 4) * fibers.size()) fail("a barrier that some threads never reach");
  if (!_setjmp(current->at)) next();
}

// A shuffle waits like a barrier, but orders no accesses.
__attribute__((noinline)) inline void wait(Barrier& barrier, unsigned threads, bool orders = true) {
  const unsigned generation = barrier.generation;
  barrier.members.push_back(current - fibers.data());
  if (++barrier.arrived == threads) {
    if (orders) race_barrier(barrier.members.data(), threads);
    barrier.members.clear();
    barrier.arrived = 0;
    ++barrier.generation;
    idle = stalled = 0;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline Barrier& barrier_of(unsigned mask) { return current->block->of_lanes[{current->thread.x / 32, mask}]; }

// What another lane of this warp gave; two buffers, so that a fast lane does not overwrite what a slow one has to read.
template <class T>
T exchange(unsigned mask, T x, unsigned from) {
  static_assert(sizeof(T) <= 8);
  auto& slots = current->block->exchange[current->parity ^= 1];
  std::memcpy(&slots[current->thread.x], &x, sizeof(T));
  wait(barrier_of(mask), std::popcount(mask), false);
  if (from >= blockDim.x || !(mask >> from % 32 & 1)) fail("a shuffle with a lane that does not take part");
  std::memcpy(&x, &slots[from], sizeof(T));
  return x;
}

inline void run(unsigned blocks, unsigned threads, size_t shared, unsigned ranks, std::function<void()> f) {
  if (blocks % ranks) fail("a grid of no whole number of clusters");
  launches.push_back(ranks);
  body = std::move(f);
  chance.seed(seed);
  race_launch();
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  while (stacks.size() < threads * ranks) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
  for (unsigned first = 0; first < blocks; first += ranks) {
    cluster.clear();
    cluster_barrier = {};
    fibers.assign(threads * ranks, {});
    for (unsigned rank = 0; rank < ranks; ++rank) {
      Block& block = *cluster.emplace_back(std::make_unique<Block>(first + rank, shared));
      block.running = threads;
      for (auto& slots : block.exchange) slots.resize(threads);
      for (unsigned i = 0; i < threads; ++i) {
        fibers[rank * threads + i].block = &block;
        fibers[rank * threads + i].thread = dim3(i, 0, 0);
      }
    }
    race_cluster(first, fibers.size());
    for (const auto& block : cluster) race_watch(block->shared.data, block->bytes, true);
    alive = fibers.size();
    idle = 0;
    stalled = 0;
    current = &fibers.back();  // the last block goes first, so that it is ahead of the others
    volatile bool done = false;
    getcontext(&launcher);
    if (!done) {
      done = true;
      next();
    }
    race_switch(0, false);
  }
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block->index)

inline void __syncthreads() { emulator::wait(emulator::current->block->barrier, blockDim.x); }
inline void __syncwarp(unsigned mask = 0xffffffff) { emulator::wait(emulator::barrier_of(mask), std::popcount(mask)); }
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask) {
  return emulator::exchange(mask, x, threadIdx.x ^ lane_mask);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return emulator::exchange(mask, x, threadIdx.x / 32 * 32 + lane);
}
__attribute__((noinline, no_sanitize("thread"))) inline unsigned atomicOr(unsigned* x, unsigned bits) {
  const unsigned before = *x;
  *x |= bits;
  return before;
}

// Elements of 16 bits, rounded to nearest even.

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

struct __half {
  _Float16 x;
};
inline float __half2float(__half x) { return x.x; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

// The runtime: everything happens at once.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated device"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device.id;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Device& d = emulator::device;
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin       ? d.shared_per_block
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? d.shared_per_multiprocessor
           : attribute == cudaDevAttrMultiProcessorCount              ? d.multiprocessors
                                                                      : d.major;
  return cudaSuccess;
}

namespace emulator {
inline std::map<std::pair<int, const void*>, int> shared_limits;  // by device and kernel
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > emulator::device.shared_per_block) return cudaErrorInvalidValue;
  emulator::shared_limits[{emulator::device.id, reinterpret_cast<const void*>(kernel)}] = value;
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...), const cudaLaunchConfig_t* config) {
  *clusters = config->attrs->val.clusterDim.x <= static_cast<unsigned>(emulator::device.largest_cluster);
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... args) {
  const auto found = emulator::shared_limits.find({emulator::device.id, reinterpret_cast<const void*>(kernel)});
  const size_t limit = found == emulator::shared_limits.end() ? 48 << 10 : found->second;
  const unsigned ranks = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  if (config->dynamicSmemBytes > limit || config->blockDim.x > 1024 || !config->gridDim.x) return cudaErrorInvalidValue;
  if (ranks > static_cast<unsigned>(emulator::device.largest_cluster)) return cudaErrorInvalidValue;
  emulator::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, ranks, [&] { kernel(args...); });
  return cudaSuccess;
}

// In place of csrc/cuda/ptx.cuh.
#define EEKD_PTX

namespace eekd {

// As far from exact as the PTX manual allows, up or down as the bits of x have it; 0 for what is subnormal.
inline float error_of(float x) { return std::bit_cast<uint32_t>(x) * 0x9e3779b1u >> 31 ? 0x1p-22f : -0x1p-22f; }
inline float normal(float x) { return std::fabs(x) < 0x1p-126f ? 0 : x; }
inline float fast_exp2(float x) { return x ? normal(std::exp2(x) * (1 + error_of(x))) : 1; }
inline double fast_exp2(double x) { return std::exp2(x); }
inline float fast_log2(float x) {
  const float y = std::log2(normal(x));
  return x == 1 ? 0 : x > 0.5f && x < 2 ? y + error_of(x) : y * (1 + error_of(x));
}
inline double fast_log2(double x) { return std::log2(x); }

inline void add_where(float p, float& sum, float a, float b) {
  if (!(p < 0x1p-126f)) sum = std::fma(a, b, sum);
}

template <class E>
uint32_t narrow_pair(float a, float b) {
  const auto bits = [](float x) -> uint32_t {
    if constexpr (std::is_same_v<E, __half>)
      return std::bit_cast<uint16_t>(__float2half_rn(x));
    else
      return __float2bfloat16_rn(x).bits;
  };
  return bits(a) | bits(b) << 16;
}

template <class E>
void widen_pair(uint32_t word, float& a, float& b) {
  if constexpr (std::is_same_v<E, __half>) {
    a = std::bit_cast<_Float16>(static_cast<uint16_t>(word));
    b = std::bit_cast<_Float16>(static_cast<uint16_t>(word >> 16));
  } else {
    a = std::bit_cast<float>(word << 16);
    b = std::bit_cast<float>(word & 0xffff0000u);
  }
}

inline bool any_lane(bool x) {
  int any = x;
  for (int i = 16; i; i /= 2) any |= __shfl_xor_sync(0xffffffff, any, i);
  return any;
}

inline char* shared_memory() { return emulator::current->block->shared.data; }

inline void copy_async(void* shared, const void* global, int bytes) {
  const auto misaligned = (reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) & 15;
  if (misaligned || bytes < 0 || bytes > 16) emulator::fail("an asynchronous copy that is not of 16 aligned bytes");
  emulator::current->copies.push_back({shared, global, bytes, 16});
}
inline void copy_async_word(void* shared, const void* global, int bytes) {
  const auto misaligned = (reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) & 3;
  if (misaligned || bytes < 0 || bytes > 4) emulator::fail("an asynchronous copy that is not of an aligned word");
  emulator::current->copies.push_back({shared, global, bytes, 4});
}
inline void arrived() {
  for (const auto& copy : emulator::current->copies) {
    race_access(copy.from, copy.bytes, false);
    race_access(copy.to, copy.whole, true);
    std::memset(copy.to, 0, copy.whole);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  emulator::current->copies.clear();
}

// Bulk copies take place when a thread waits for their barrier; until then their place is NaN.
inline emulator::Phases& phases_of(uint64_t* barrier) { return emulator::current->block->phases[barrier]; }
inline void make_barrier(uint64_t* barrier) { phases_of(barrier) = {}; }
inline void arrive(uint64_t* barrier, int bytes) {
  auto& phases = phases_of(barrier);
  if (phases.arrived) emulator::fail("two arrivals in a phase");
  phases.arrived = true;
  phases.expected = bytes;
  phases.by = emulator::current - emulator::fibers.data();
}
inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  const auto bits =
      reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | static_cast<unsigned>(bytes);
  if (bits & 15 || bytes <= 0) emulator::fail("a bulk copy that is not of 16 aligned bytes");
  race_access(global, bytes, false);
  race_access(shared, bytes, true);
  std::memset(shared, 0xff, bytes);
  phases_of(barrier).copies.push_back({shared, global, bytes, bytes});
}
inline void wait(uint64_t* barrier, int phase) {
  auto& phases = phases_of(barrier);
  while (phases.phase == phase) {
    if (!phases.arrived) {
      emulator::yield();
      continue;
    }
    for (const auto& copy : phases.copies) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      phases.expected -= copy.bytes;
    }
    if (phases.expected) emulator::fail("a barrier that expects other bytes than are copied");
    phases.copies.clear();
    phases.arrived = false;
    phases.phase = !phases.phase;
    emulator::idle = emulator::stalled = 0;
  }
  const unsigned both[] = {phases.by, static_cast<unsigned>(emulator::current - emulator::fibers.data())};
  race_barrier(both, both[0] == both[1] ? 1 : 2);
}
inline void before_copies() {}
inline float fast_divide(float a, float b) { return a / b * (1 + error_of(a)); }

inline void cluster_sync() { emulator::wait(emulator::cluster_barrier, emulator::fibers.size()); }
template <class T>
const T* of_rank(const T* shared, int rank) {
  const char* at = reinterpret_cast<const char*>(shared);
  return reinterpret_cast<const T*>(emulator::cluster.at(rank)->shared.data + (at - shared_memory()));
}

}  // namespace eekd
