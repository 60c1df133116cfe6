// Scales gradients in place, in one launch for all of them; where the factor is 1 nothing but the factor is read.
#include <algorithm>

#include "common.cuh"

namespace eekd {
namespace {

constexpr int kThreads = 256, kBlocks = 1024;  // enough to fill a GPU, and few enough to return at once
constexpr int64_t kPiece = 2048;               // columns of a row that a warp takes

template <class T>
__device__ T factor_of(const Scaled& x, int64_t row, T divisor) {
  return static_cast<const T*>(x.factor)[row * x.stride] / divisor;
}

template <class T, class E>
__device__ E times(E x, T f) {
  if constexpr (std::is_same_v<E, double>)
    return static_cast<double>(x * f);
  else
    return narrow<E>(static_cast<T>(widen(x)) * f);
}

// x[i] *= f for i = first, first + step, ... below n, 16 bytes at a time where x is aligned.
template <class T, class E>
__device__ void scale(E* x, int64_t n, T f, int64_t first, int64_t step) {
  constexpr int width = 16 / sizeof(E);
  const int64_t whole = reinterpret_cast<uintptr_t>(x) % 16 ? 0 : n / width;
  for (int64_t i = first; i < whole; i += step) {
    Vector<E, width>& piece = reinterpret_cast<Vector<E, width>*>(x)[i];
    Vector<E, width> v = piece;
#pragma unroll
    for (E& e : v.x) e = times(e, f);
    piece = v;
  }
  for (int64_t i = whole * width + first; i < n; i += step) x[i] = times(x[i], f);
}

template <class T, class E>
__device__ void scale(const Scaled& x, T divisor) {
  E* const data = static_cast<E*>(x.data);
  if (x.stride == 0) {
    if (const T f = factor_of<T>(x, 0, divisor); f != 1)
      scale(data, x.numel, f, blockIdx.x * int64_t{kThreads} + threadIdx.x, int64_t{gridDim.x} * kThreads);
    return;
  }
  // A factor per row: a warp takes a piece of a row, so that no element asks for a division.
  const int64_t pieces = (x.columns + kPiece - 1) / kPiece, warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t before = 0; before < x.numel; before += x.rows * x.columns)
    for (int64_t i = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32; i < x.rows * pieces; i += warps) {
      const int64_t row = pieces == 1 ? i : i / pieces, begin = (i - row * pieces) * kPiece;
      if (const T f = factor_of<T>(x, row, divisor); f != 1)
        scale(data + before + row * x.columns + begin, min(kPiece, x.columns - begin), f, threadIdx.x % 32, 32);
    }
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
