// Softmax statistics and exponentials of a stretch of a row, and the rows of ensemble_kd, for the CPU kernels.
#pragma once

#include "../row.h"
#include "simd.h"

namespace eekd::EEKD_ISA {

// The rows [begin, end) of ensemble_kd, without their CE (and its share of the gradient) unless `ce`.
template <class T>
void ensemble_kd_rows(const EnsembleKD&, int64_t begin, int64_t end, bool ce);

namespace {

constexpr int kTile = 1024;
constexpr int kNarrow = 128;           // columns up to which transposing rows into lanes costs less than it saves
constexpr int64_t kGrain = 1 << 14;    // logits per task below which a second thread costs more than it gives
constexpr int64_t kInCache = 1 << 18;  // logits that the cache of a core holds

enum class Find { stats, lines, both };

// The sum of f(i, left) over the vectors that begin at i, with as many elements left, in four parts: one would wait
// for itself at every addition.
template <class T, class F>
[[gnu::always_inline]] inline T total(int n, F f) {
  constexpr int w = Simd<T>::width;
  Vec<T> part[4] = {};
  int i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int u = 0; u < 4; ++u) part[u] += f(i + u * w, w);
  for (; i < n; i += w) part[0] += f(i, n - i);
  return sum<T>((part[0] + part[1]) + (part[2] + part[3]));
}

template <class T, class S>
T max_of(const S* x, int n) {
  Vec<T> most = load_from<T>(x, n);
  for (int i = Simd<T>::width; i < n; i += Simd<T>::width) most = max(most, load_from<T>(x + i, n - i));
  return largest<T>(most);
}

// SoftmaxSum holds k max here: the exponent k x - k max is rounded once, and so is the same wherever it is
// formed, as k (x - max), which takes an instruction more.

// e = 2^(scale x - max), 0 beyond n, unless e is null; returns its sum.
template <class T, class S>
[[gnu::always_inline]] inline T exp_of(const S* x, T* e, int n, T max, T scale, int64_t ahead = 0) {
  constexpr int w = Simd<T>::width, unroll = 4;
  Vec<T> total[unroll] = {};
  int i = 0;
  for (; i + unroll * w <= n; i += unroll * w) {
    if (ahead) prefetch(x, i + ahead, unroll * w);
    for (int u = 0; u < unroll; ++u) {
      const Vec<T> v = exp2(scaled(load_from<T>(x + i + u * w), scale, max));
      if (e) store(e + i + u * w, v);
      total[u] += v;
    }
  }
  for (; i < n; i += w) {
    const Vec<T> v = exp2(scaled(load_from<T>(x + i, n - i), scale, max));
    if (e) store(e + i, v);
    total[0] += v;
  }
  return sum<T>((total[0] + total[1]) + (total[2] + total[3]));
}

// Of nothing but -inf, and NaN that max_of passed over: 0, or NaN.
template <class T, class S>
T sum_of_masked(const S* x, int n) {
  T total = 0;
  for (int i = 0; i < n; ++i)
    if (const T v = static_cast<T>(x[i]); v != v) total = v;
  return total;
}

template <class T>
bool in_bounds(T sum) {
  return sum < T(1ull << 62);
}

// The first vector's maximum, in stats.max, serves as well as the row's, as long as no exponential grows out of
// bounds: this saves a pass. Otherwise, NaN included, the row's own is found.
template <class T, class S>
void exponentiate(const S* x, T* e, int n, T scale, Find find, SoftmaxSum<T>& stats, int64_t ahead = 0) {
  if (find == Find::lines) {
    exp_of(x, e, n, stats.max, scale, ahead);
    return;
  }
  if (find == Find::stats) e = nullptr;
  stats.sum = exp_of(x, e, n, stats.max, scale, ahead);
  if (in_bounds(stats.sum)) return;
  stats.max = scale * max_of<T>(x, n);
  stats.sum = exp_of(x, e, n, stats.max, scale, ahead);
  if (stats.max == -std::numeric_limits<T>::infinity()) stats.sum = sum_of_masked<T>(x, n);
}

}  // namespace
}  // namespace eekd::EEKD_ISA
