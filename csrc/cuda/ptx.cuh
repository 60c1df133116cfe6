// What only the hardware can do: the one file of the CUDA kernels that tests/cuda_on_cpu replaces by plain C++.
#ifndef EEKD_PTX
#define EEKD_PTX

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

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
