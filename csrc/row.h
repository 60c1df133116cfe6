// The mathematics of one row, shared by the CPU and CUDA kernels: everything that is O(1) or O(M) per row.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define EEKD_HD __host__ __device__
#else
#define EEKD_HD
#endif

namespace eekd {

constexpr double kLog2e = 1.4426950408889634;

// Softmax statistics of a stretch of columns: sum = Σ_c 2^(k (x_c - max)), with k = log2(e) / temperature.
template <class T>
struct SoftmaxSum {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;
};

// Takes another stretch of the same row in. Stretches of nothing but -inf count for nothing.
template <class T>
static EEKD_HD inline void merge(SoftmaxSum<T>& a, SoftmaxSum<T> b, T k) {
  if (b.max == -std::numeric_limits<T>::infinity()) {
    a.sum += b.sum;  // 0, or NaN that must not be lost
    return;
  }
  const T max = b.max > a.max ? b.max : a.max;
  a.sum = a.sum * std::exp2(k * (a.max - max)) + b.sum * std::exp2(k * (b.max - max));
  a.max = max;
}

// w = softmax(e) over the M snapshots of a row; w may be e.
template <class T>
static EEKD_HD inline void softmax(const T* e, T* w, int snapshots) {
  T max = e[0], sum = 0;
  for (int m = 1; m < snapshots; ++m) max = e[m] > max ? e[m] : max;
  for (int m = 0; m < snapshots; ++m) sum += w[m] = std::exp(e[m] - max);
  for (int m = 0; m < snapshots; ++m) w[m] /= sum;
}

// de_m = scale w_m (g_m - Σ_j w_j g_j): a gradient through the weights becomes one through the scores.
// A snapshot of weight 0 was not read: its g is meaningless and its de is 0.
template <class T>
static EEKD_HD inline void softmax_grad(const T* w, const T* g, T scale, T* de, int snapshots) {
  T mean = 0;
  for (int m = 0; m < snapshots; ++m) mean += w[m] == 0 ? T(0) : w[m] * g[m];
  for (int m = 0; m < snapshots; ++m) de[m] = w[m] == 0 ? T(0) : scale * w[m] * (g[m] - mean);
}

// Returns log Σ_m exp(l_m) and turns l into the posterior exp(l_m) / Σ_j exp(l_j).
template <class T>
static EEKD_HD inline T log_posterior(T* l, int snapshots) {
  T max = l[0], sum = 0;
  for (int m = 1; m < snapshots; ++m) max = l[m] > max ? l[m] : max;
  for (int m = 0; m < snapshots; ++m) sum += l[m] = std::exp(l[m] - max);
  for (int m = 0; m < snapshots; ++m) l[m] /= sum;
  return max + std::log(sum);
}

}  // namespace eekd
