// What only the hardware can do: the one file of the CUDA kernels that tests/cuda_on_cpu replaces by plain C++.
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

// sum += a b, but where p is 0 or less than a normal number, for there a or b may be infinite. A NaN is added. In two
// instructions: the compiler makes a selection or a jump of it.
__device__ inline void add_where(float p, float& sum, float a, float b) {
  asm("{\n\t.reg .pred q;\n\tsetp.geu.f32 q, %1, 0f00800000;\n\t@q fma.rn.f32 %0, %2, %3, %0;\n\t}"
      : "+f"(sum) : "f"(p), "f"(a), "f"(b));
}

// Two numbers rounded in one instruction, the first in the lower half of the word.
template <class E>
__device__ inline uint32_t narrow_pair(float a, float b) {
  uint32_t word;
  if constexpr (std::is_same_v<E, __half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}

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
__device__ inline void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

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
