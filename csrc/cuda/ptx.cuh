// What only the hardware can do: the one file of the CUDA kernels that tests/ops/cuda_on_cpu replaces by plain C++.
#ifndef EEKD_PTX
#define EEKD_PTX

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace eekd {

// 2^x and log2(x) by the special function unit, to 2 ulp of a float; exact to double for doubles.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline double fast_exp2(double x) { return exp2(x); }
__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline double fast_log2(double x) { return log2(x); }

// a / b to 2 ulp, for b from 2^-126 to 2^126.
__device__ inline float fast_divide(float a, float b) { return __fdividef(a, b); }

// sum += a b, but where p is 0 or less than a normal number, for there a or b may be infinite. A NaN is added. In two
// instructions: the compiler makes a selection or a jump of it.
__device__ inline void add_where(float p, float& sum, float a, float b) {
  asm("{\n\t.reg .pred q;\n\tsetp.geu.f32 q, %1, 0f00800000;\n\t@q fma.rn.f32 %0, %2, %3, %0;\n\t}"
      : "+f"(sum)
      : "f"(p), "f"(a), "f"(b));
}

// Two numbers rounded in one instruction, the first in the lower half of the word.
template <class E>
__device__ inline uint32_t narrow_pair(float a, float b) {
  uint32_t word;
  if constexpr (std::is_same_v<E, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}

// The halves of a word; a bfloat16 is an instruction away.
template <class E>
__device__ inline void widen_pair(uint32_t word, float& a, float& b) {
  if constexpr (std::is_same_v<E, __half>) {
    asm("{\n\t.reg .f16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
        : "=f"(a), "=f"(b)
        : "r"(word));
  } else {
    a = __uint_as_float(word << 16);
    b = __uint_as_float(word & 0xffff0000u);
  }
}

// Whether it is true of any lane of the warp.
__device__ inline bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

// 16 bytes, of which the first `bytes` are read and the others 0, from global to shared memory, past the registers.
// The thread sees what it copied after arrived(), others after a barrier besides.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// Likewise of a word.
__device__ inline void copy_async_word(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A barrier in shared memory: its phase ends when one thread has arrived, and all bytes that this expected are there.
// From sm_90, as copies of whole lines are; no code below asks for them.
__device__ inline void make_barrier(uint64_t* barrier) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;\n\tfence.proxy.async;" ::"r"(at)
      : "memory");
#endif
}
__device__ inline void arrive(uint64_t* barrier, int bytes) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}
// Until a phase has ended, the first of which is 0, the next 1, then 0 again.
__device__ inline void wait(uint64_t* barrier, int phase) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred done;\nagain:\n\tmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t@done bra over;\n\t"
      "bra again;\nover:\n\t}" ::"r"(at),
      "r"(phase)
      : "memory");
#endif
}
// Of 16 aligned bytes or a multiple, from global to shared memory; `barrier` learns of their arrival.
__device__ inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(global), "r"(bytes), "r"(at)
               : "memory");
#endif
}
// What this thread wrote to shared memory comes before copies to the same place that are started after a barrier.
__device__ inline void before_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Waits for all threads of the cluster and for what they wrote. Clusters exist from sm_90; no code below asks for them.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ inline const T* of_rank(const T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  const T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
#else
  return shared;
#endif
}

}  // namespace eekd

#endif
