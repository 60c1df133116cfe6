// What the CUDA kernels share: elements, wide accesses, sums over the threads of a row, and launches.
#pragma once

#include <type_traits>

#include "../eekd.h"
#include "../row.h"
#include "ptx.cuh"

namespace eekd {

// An element type of logits that is known only at run time: student and snapshots differ, or are fp64.
struct Any {};

__device__ inline int bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class E, class T>
__device__ inline E narrow(T x) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<E, __half>)
    return __float2half_rn(static_cast<float>(x));
  else
    return static_cast<E>(x);
}

// Element i of x.
template <class T, class E>
__device__ inline T load(const void* x, DType dtype, int64_t i) {
  if constexpr (!std::is_same_v<E, Any>) {
    return static_cast<T>(widen(static_cast<const E*>(x)[i]));
  } else {
    switch (dtype) {
      case DType::f64: return static_cast<T>(static_cast<const double*>(x)[i]);
      case DType::f32: return static_cast<T>(static_cast<const float*>(x)[i]);
      case DType::bf16: return static_cast<T>(widen(static_cast<const __nv_bfloat16*>(x)[i]));
      default: return static_cast<T>(widen(static_cast<const __half*>(x)[i]));
    }
  }
}

template <class E, class T>
__device__ inline void store(void* x, DType dtype, int64_t i, T value) {
  if constexpr (!std::is_same_v<E, Any>) {
    static_cast<E*>(x)[i] = narrow<E>(value);
  } else {
    switch (dtype) {
      case DType::f64: static_cast<double*>(x)[i] = static_cast<double>(value); break;
      case DType::f32: static_cast<float*>(x)[i] = static_cast<float>(value); break;
      case DType::bf16: static_cast<__nv_bfloat16*>(x)[i] = narrow<__nv_bfloat16>(value); break;
      default: static_cast<__half*>(x)[i] = narrow<__half>(value);
    }
  }
}

// n elements, moved 16 bytes at a time.
template <class E, int n>
struct alignas(16) Vector {
  E x[n];
};

// A vector of elements, 16 bytes at a time.
template <class E>
__device__ inline void read_vector(const E* from, float (&x)[8]) {
  if constexpr (sizeof(E) == 2) {
    const auto v = *reinterpret_cast<const Vector<uint32_t, 4>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) widen_pair<E>(v.x[i], x[2 * i], x[2 * i + 1]);
  } else {
    const auto v = *reinterpret_cast<const Vector<E, 8>*>(from);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = v.x[i];
  }
}
template <class E>
__device__ inline void write_vector(E* to, const float (&x)[8]) {
  if constexpr (sizeof(E) == 2) {
    Vector<uint32_t, 4> v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.x[i] = narrow_pair<E>(x[2 * i], x[2 * i + 1]);
    *reinterpret_cast<Vector<uint32_t, 4>*>(to) = v;
  } else {
    Vector<E, 8> v;
#pragma unroll
    for (int i = 0; i < 8; ++i) v.x[i] = x[i];
    *reinterpret_cast<Vector<E, 8>*>(to) = v;
  }
}

// The threads that share a row: a warp, a block, or a cluster of blocks, each with a slice of the columns.
struct Group {
  int thread, threads;  // of those in this block
  int rank, ranks;      // of this block in its cluster
  __device__ int lane() const { return thread & 31; }
  __device__ int warp() const { return thread >> 5; }
  __device__ int warps() const { return threads >> 5; }
  __device__ void sync() const {  // in this block
    if (threads == 32)
      __syncwarp();
    else
      __syncthreads();
  }
  __device__ void sync_blocks() const {
    if (ranks > 1) cluster_sync();
  }
  template <class T>
  __device__ const T& of(int other, const T& shared) const {
    return ranks > 1 ? *of_rank(&shared, other) : shared;
  }
};

// Starts the copy of a stretch of a line from global to shared memory, past the registers, in pieces that begin at the
// multiple of 16 bytes before it, and so lie in its pages. Returns where its first byte comes to lie.
__device__ inline const char* copy_line(Group group, char* to, const char* from, int bytes) {
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
  if (bytes <= 0) return to + before;
  for (int i = 16 * group.thread; i < before + bytes; i += 16 * group.threads)
    copy_async(to + i, from - before + i, min(16, before + bytes - i));
  return to + before;
}

constexpr unsigned kAllLanes = 0xffffffffu;

// Sums over a warp, the same in every lane.
template <class T>
__device__ inline T warp_sum(T x) {
  for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(kAllLanes, x, i);
  return x;
}
// Of two at once: a's sum in lane 0, b's in lane 16.
template <class T>
__device__ inline T warp_sums(T a, T b) {
  const bool upper = threadIdx.x & 16;
  T x = upper ? b : a;
  x += __shfl_xor_sync(kAllLanes, upper ? a : b, 16);
  for (int i = 8; i; i >>= 1) x += __shfl_xor_sync(kAllLanes, x, i);
  return x;
}
template <class T>
__device__ inline SoftmaxSum<T> warp_sum(SoftmaxSum<T> x, T k) {
  for (int i = 16; i; i >>= 1) {
    SoftmaxSum<T> other{__shfl_xor_sync(kAllLanes, x.max, i), __shfl_xor_sync(kAllLanes, x.sum, i)};
    merge(x, other, k);
  }
  return x;
}

// A grid whose neighbouring blocks are in clusters of `ranks`.
struct Grid {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};
  Grid(int64_t blocks, int ranks, int threads, int shared, cudaStream_t stream = nullptr) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = ranks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = ranks > 1;
  }
  Grid(const Grid&) = delete;
};

// How many clusters the device has room for at once.
template <class... P>
int clusters_at_once(void (*kernel)(P...), int ranks, int threads, int shared) {
  const Grid grid(ranks, ranks, threads, shared);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &grid.config) == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

template <class... P, class... A>
cudaError_t launch_kernel(void (*kernel)(P...), int64_t blocks, int ranks, int threads, int shared, cudaStream_t stream,
                          const A&... args) {
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  const Grid grid(blocks, ranks, threads, shared, stream);
  return cudaLaunchKernelEx(&grid.config, kernel, args...);
}

}  // namespace eekd
