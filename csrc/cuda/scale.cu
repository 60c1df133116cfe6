// Scales gradients in place, in one launch for all of them; where the factor is 1 nothing but the factor is read.
#include <algorithm>

#include "common.cuh"

namespace eekd {
namespace {

constexpr int kThreads = 256, kBlocks = 1024;  // enough to fill a GPU, and few enough to return at once

template <class T>
__device__ T factor_of(const Scaled& x, int64_t row, T divisor) {
  return static_cast<const T*>(x.factor)[row * x.stride] / divisor;
}

template <class T, class E>
__device__ E times(E x, T f) {
  if constexpr (std::is_same_v<E, double>) return static_cast<double>(x * f);
  else return narrow<E>(static_cast<T>(widen(x)) * f);
}

template <class T, class E>
__device__ void scale(const Scaled& x, T divisor) {
  constexpr int n = 16 / sizeof(E);
  E* data = static_cast<E*>(x.data);
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x, step = int64_t{gridDim.x} * kThreads;
  if (x.stride != 0) {
    for (int64_t i = first; i < x.numel; i += step)
      if (const T f = factor_of<T>(x, i / x.columns % x.rows, divisor); f != 1) data[i] = times(data[i], f);
    return;
  }
  const T f = factor_of<T>(x, 0, divisor);
  if (f == 1) return;
  const int64_t whole = reinterpret_cast<uintptr_t>(data) % 16 ? 0 : x.numel / n;
  for (int64_t i = first; i < whole; i += step) {
    Vector<E, n>& piece = reinterpret_cast<Vector<E, n>*>(data)[i];
    Vector<E, n> v = piece;
#pragma unroll
    for (E& e : v.x) e = times(e, f);
    piece = v;
  }
  for (int64_t i = whole * n + first; i < x.numel; i += step) data[i] = times(data[i], f);
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(__grid_constant__ const Scale args) {
  const T divisor = args.divisor ? static_cast<T>(*args.divisor) : T{1};
  for (int i = 0; i < args.count; ++i) {
    const Scaled& x = args.grad[i];
    switch (x.dtype) {
      case DType::f64: scale<T, double>(x, divisor); break;
      case DType::f32: scale<T, float>(x, divisor); break;
      case DType::bf16: scale<T, __nv_bfloat16>(x, divisor); break;
      default: scale<T, __half>(x, divisor);
    }
  }
}

}  // namespace

const char* ensemble_kd_bwd_cuda(const Scale& args, void* stream) {
  int64_t most = 0;
  for (int i = 0; i < args.count; ++i) most = std::max(most, args.grad[i].numel);
  const int blocks = static_cast<int>(std::clamp<int64_t>(most / (8 * kThreads), 1, kBlocks));
  const auto kernel = args.wide ? scale_kernel<double> : scale_kernel<float>;
  const cudaError_t error = launch_kernel(kernel, blocks, 1, kThreads, 0, static_cast<cudaStream_t>(stream), args);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace eekd
