// The mathematics of one row, shared by the CPU and CUDA kernels: everything that is O(1) or O(M) per row.
#pragma once

#include <cmath>
#include <limits>

#include "eekd.h"

#ifdef __CUDACC__
#define EEKD_HD __host__ __device__
#else
#define EEKD_HD
#endif

namespace eekd {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

static EEKD_HD inline bool has_labels(const EnsembleKD& a) { return a.labels || a.label_weights.data; }

// Softmax statistics of a stretch of columns: sum = Σ_c 2^(k (x_c - max)), with k = log2(e) / temperature.
template <class T>
struct SoftmaxSum {
  T max, sum;
  static EEKD_HD SoftmaxSum none() { return {-std::numeric_limits<T>::infinity(), 0}; }
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

// de_m = scale w_m (g_m - Σ_j w_j g_j): a gradient through the weights becomes one through the scores.
template <class T>
static EEKD_HD inline void softmax_grad(const T* w, const T* g, T scale, T* de, int snapshots) {
  T mean = 0;
  for (int m = 0; m < snapshots; ++m) mean += w[m] * g[m];
  for (int m = 0; m < snapshots; ++m) de[m] = scale * w[m] * (g[m] - mean);
}

// The label's share of a mixture, p_y = Σ_m w_m p_m with p_m = 2^(l_m) / sum_m: returns -log p_y and turns l into
// the posterior w_m p_m / p_y. In log space where p_y is too small for a number. p is scratch.
template <class T>
static EEKD_HD inline T mixture_nll(const T* w, const SoftmaxSum<T>* sums, T* l, T* p, int snapshots) {
  T total = 0, max = -std::numeric_limits<T>::infinity();
  for (int m = 0; m < snapshots; ++m) total += p[m] = w[m] / sums[m].sum * std::exp2(l[m]);
  if (!(total < std::numeric_limits<T>::min())) {  // or NaN
    for (int m = 0; m < snapshots; ++m) l[m] = p[m] / total;
    return -std::log(total);
  }
  for (int m = 0; m < snapshots; ++m) {
    l[m] += std::log2(w[m] / sums[m].sum);
    max = l[m] > max ? l[m] : max;
  }
  if (max == -std::numeric_limits<T>::infinity()) {  // p_y = 0 for any weights, which get no gradient
    for (int m = 0; m < snapshots; ++m) l[m] = w[m];
    return -max;
  }
  total = 0;
  for (int m = 0; m < snapshots; ++m) total += l[m] = std::exp2(l[m] - max);
  for (int m = 0; m < snapshots; ++m) l[m] /= total;
  return static_cast<T>(-kLn2) * (max + std::log2(total));
}
template <class T>
static inline T mixture_nll(const T* w, const SoftmaxSum<T>* sums, T* l, int snapshots) {
  T p[kMaxSnapshots];
  return mixture_nll(w, sums, l, p, snapshots);
}

}  // namespace eekd
