// What the ops on the logits of M snapshots and a student share on CUDA: what of a row is O(M) or O(D), what the rows
// share, and what goes before and after the launch of their kernel.
#pragma once

#include <map>
#include <mutex>

#include "common.cuh"

namespace eekd {

constexpr int kWarpsPerBlock = 4;        // of blocks whose warps have a row each
constexpr int kWarpColumns = 1024;       // classes up to which a warp suffices for a row
constexpr int kMaxThreads = 256;         // two such blocks find registers on a multiprocessor
constexpr int kWidth = 8;                // columns that a thread takes at once, of 32 bits as of 16: their bits agree
constexpr int64_t kCountInBlock = 2048;  // labels that every block counts for itself, which costs less than a launch
constexpr int64_t kMaxClasses = 1 << 30;
static_assert(kCounts == 32, "a warp reads them all");

// Which columns a thread owns, and how it reads them.
enum class Order {
  apart,       // threads have neighbouring columns, those of a thread lie apart: no whole vectors in a row
  neighbours,  // as many neighbouring columns as fill a vector, element by element
  vectors,     // the same columns, all at once: every line is aligned
};

// What the threads of a row share. Indices j count the snapshots of weight other than 0, which alone are read.
template <class T>
struct Row {
  T e[kMaxSnapshots];      // scores, then weights, then d loss / d score, of all snapshots
  T w[kMaxSnapshots];      // of j
  T scale[kMaxSnapshots];  // probability: w_j / Σ exp;  logit: [0] 1 / Σ exp
  T label[kMaxSnapshots];  // z_j at the label
  T mean[kMaxSnapshots];   // logit: Σ_c p z_j, less the mixture's largest, so that less cancels
  T moved[kMaxSnapshots];  // probability: Σ_c p_j r;  logit: Σ_c p r z_j, likewise
  SoftmaxSum<T> target[kMaxSnapshots];
  SoftmaxSum<T> soft, hard;   // the student at τ and at 1
  T kl;                       // Σ_c p r,  r = log p - log q
  T label_sum, log_q, log_p;  // of soft labels: Σ_c y, Σ_c y (s - its largest), Σ_c y log p, of a mixture likewise
  int id[kMaxSnapshots];
  int used;
};

template <class T>
__device__ inline T finite(T max) {
  return max == -std::numeric_limits<T>::infinity() ? T(0) : max;
}

// Takes columns into statistics.
template <class T, int width>
__device__ inline void absorb(SoftmaxSum<T>& s, const T (&x)[width], T k) {
  T max = s.max;
#pragma unroll
  for (int u = 0; u < width; ++u) max = x[u] > max ? x[u] : max;
  const T base = finite(max);
  T sum = s.sum * fast_exp2((s.max - base) * k);
#pragma unroll
  for (int u = 0; u < width; ++u) sum += fast_exp2((x[u] - base) * k);
  s = {max, sum};
}

// The sum over the block, the same in every thread; `parts` is a number per warp.
template <class T>
__device__ T block_sum(T x, T* parts) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = parts[0];
  for (unsigned i = 1; i < blockDim.x / 32; ++i) sum += parts[i];
  __syncthreads();
  return sum;
}

// The labels that count, 1 at least. Every thread of the block calls it.
__device__ inline int counted(const int64_t* labels, int64_t rows, int64_t ignore_index, char* shared) {
  int count = 0;
#pragma unroll 8
  for (int64_t b = threadIdx.x; b < rows; b += blockDim.x) count += labels[b] != ignore_index;
  count = block_sum(count, reinterpret_cast<int*>(shared));
  return count > 1 ? count : 1;
}

// A block's part of the count.
template <int = 0>  // so that every file may have it
__global__ void count_kernel(const int64_t* labels, int64_t rows, int64_t ignore_index, int* out) {
  int count = 0;
#pragma unroll 8
  for (int64_t b = blockIdx.x * blockDim.x + threadIdx.x; b < rows; b += blockDim.x * kCounts)
    count += labels[b] != ignore_index;
  count = block_sum(count, reinterpret_cast<int*>(shared_memory()));
  if (threadIdx.x == 0) out[blockIdx.x] = count;
}

// The sum of each of two rows of n numbers, by one block in a fixed order. Many loads are under way at once, here as in
// the count: with one, a thread would wait for memory n / 1024 times.
template <class T>
__global__ void sum_kernel(const T* parts, const T* others, int64_t n, T* first, T* second) {
  T sum = 0, other = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += parts[i], other += others[i];
  T* const shared = reinterpret_cast<T*>(shared_memory());
  sum = block_sum(sum, shared);
  other = block_sum(other, shared);
  if (threadIdx.x == 0) *first = sum, *second = other;
}

// Of an ignored row: d_student of the columns from `begin`, and what the first block of a row has to write.
template <class T>
__device__ void write_zeros(const EnsembleKD& a, Group group, int64_t b, int64_t begin, int64_t columns,
                            bool losses = true) {
  const auto clear = [&](void* out, DType dtype, int64_t first, int64_t n) {
#pragma unroll 1
    for (int64_t i = group.thread; out && i < n; i += group.threads) store<Any>(out, dtype, first + i, T(0));
  };
  clear(a.d_student, a.student.dtype, b * a.classes + begin, columns);
  if (group.rank) return;
  if (losses && group.thread == 0) static_cast<T*>(a.loss)[b] = static_cast<T*>(a.attention_loss)[b] = 0;
  clear(a.weights, DType::f32, b * a.snapshots, a.snapshots);
  clear(a.d_scores, a.scores.dtype, b * a.snapshots, a.snapshots);
  clear(a.d_query, a.query.dtype, b * a.width, a.width);
#pragma unroll 1
  for (int64_t m = 0; m < a.snapshots; ++m) clear(a.d_keys, a.keys[0].dtype, (m * a.rows + b) * a.width, a.width);
}

// A row by what is O(M) or O(D) of it, before and after its columns.
template <class T>
struct RowKernel {
  const EnsembleKD& a;
  const Group group;
  const int64_t b;
  const int snapshots;
  T row_scale;
  const bool has_ce, by_kl, by_label;
  const T beta, tau, k;
  Row<T>& row;

  __device__ RowKernel(const EnsembleKD& a, Group group, int64_t b, Row<T>& row, T row_scale)
      : a(a),
        group(group),
        b(b),
        snapshots(static_cast<int>(a.snapshots)),
        row_scale(row_scale),
        has_ce(has_labels(a) && a.alpha > 0),
        by_kl((a.d_scores || a.d_query) && a.objective == Objective::kl),
        by_label((a.d_scores || a.d_query) && a.objective == Objective::label),
        beta(static_cast<T>(has_labels(a) ? 1 - a.alpha : 1)),
        tau(static_cast<T>(a.temperature)),
        k(static_cast<T>(kLog2e / a.temperature)),
        row(row) {}

  __device__ void write_zeros(int64_t begin, int64_t columns) { eekd::write_zeros<T>(a, group, b, begin, columns); }

  // softmax of the scores, which are given, or the products of query and keys, or all the same.
  __device__ void weigh() {
    if (a.query.data) {
#pragma unroll 1
      for (int m = group.warp(); m < snapshots; m += group.warps()) {
        T product = 0;
#pragma unroll 1
        for (int64_t d = group.lane(); d < a.width; d += 32)
          product += load<T, Any>(a.query.data, a.query.dtype, b * a.query.stride + d) *
                     load<T, Any>(a.keys[m].data, a.keys[m].dtype, b * a.keys[m].stride + d);
        product = warp_sum(product);
        if (group.lane() == 0) row.e[m] = product;
      }
    } else {
#pragma unroll 1
      for (int m = group.thread; m < snapshots; m += group.threads)
        row.e[m] = a.scores.data ? load<T, Any>(a.scores.data, a.scores.dtype, b * a.scores.stride + m) : T(0);
    }
    group.sync();
    if (group.thread == 0) {
      T max = row.e[0], total = 0;
#pragma unroll 1
      for (int m = 1; m < snapshots; ++m) max = row.e[m] > max ? row.e[m] : max;
#pragma unroll 1
      for (int m = 0; m < snapshots; ++m) total += row.e[m] = fast_exp2((row.e[m] - max) * T(kLog2e));
      row.used = 0;
#pragma unroll 1
      for (int m = 0; m < snapshots; ++m) {
        const T w = row.e[m] /= total;
        if (w != 0) row.id[row.used] = m, row.w[row.used++] = w;
      }
    }
    group.sync();
#pragma unroll 1
    for (int m = group.thread; m < snapshots && group.rank == 0; m += group.threads)
      a.weights[b * snapshots + m] = static_cast<float>(row.e[m]);
  }

  // p = exp((z - max) / τ) 2^log2_rest of a column where p is too small for a number; z is the logit of the snapshot
  // that has most of p, max its largest. One number would round away what the shares of p are made of.
  struct Tiny {
    T z, max, log2_rest;
  };
  template <class F>
  __device__ Tiny tiny(F logit) const {  // logit(j) is that of snapshot j in the column; rare
    constexpr T none = -std::numeric_limits<T>::infinity();
    T most = none, sum = 0;
    Tiny t{none, 0, 0};
#pragma unroll 1
    for (int j = 0; j < row.used; ++j) {
      const T z = logit(j), max = finite(row.target[j].max), scale = log2(row.scale[j]), l = (z - max) * k + scale;
      if (l > most) most = l, t = {z, max, scale};
    }
#pragma unroll 1
    for (int j = 0; j < row.used && most != none; ++j) sum += share(j, logit(j), t);
    if (sum > 0) t.log2_rest += log2(sum);
    return t;
  }
  __device__ T share(int j, T z, Tiny t) const {
    const T above = (z - t.z) - (finite(row.target[j].max) - t.max);
    return fast_exp2(above * k + (log2(row.scale[j]) - t.log2_rest));
  }
  template <class F>
  __device__ T log_of_tiny(F logit) const {
    const Tiny t = tiny(logit);
    return (t.z - t.max) / tau + T(kLn2) * t.log2_rest;
  }
  // w_j p_j / p in such a column.
  template <class F>
  __device__ T share_of_tiny(int j, F logit) const {
    const Tiny t = tiny(logit);
    return t.z == -std::numeric_limits<T>::infinity() ? row.w[j] : share(j, logit(j), t);
  }

  // Of soft labels: what they add to the loss, their attention_loss, and its gradient in row.scale. By one thread.
  __device__ T soft_labels(T& loss) {
    const bool probability = a.fusion == Fusion::probability;
    if (has_ce) loss -= static_cast<T>(a.alpha) * (row.log_q - row.label_sum * log(row.hard.sum));
    const T log_p = probability ? row.log_p : row.log_p - row.label_sum * log(row.target[0].sum);
    const bool possible = log_p != -std::numeric_limits<T>::infinity();  // else the weights get no gradient
#pragma unroll 1
    for (int j = 0; by_label && j < row.used; ++j) {
      if (probability)
        row.scale[j] = possible ? row_scale * row.label[j] : T(0);
      else
        row.label[j] = possible ? (row.label_sum * row.mean[j] - row.label[j]) / tau : T(0);
    }
    if (by_label && !probability) softmax_grad(row.w, row.label, row_scale, row.scale, row.used);
    return -log_p;
  }

  // After the columns: loss, attention and its gradients; one thread does what is O(M). label_logit(j, y) is that of
  // snapshot j, or of the student where j == used. Of soft labels row.label has what they add up.
  template <bool soft = false, class F>
  __device__ void finish(F label_logit) {
    const int64_t y = a.labels ? a.labels[b] : 0;
    const bool valid = y >= 0 && y < a.classes;
#pragma unroll 1
    for (int j = group.thread; !soft && j < row.used; j += group.threads)
      row.label[j] = valid ? label_logit(j, y) : T(0);
    group.sync();
    if (group.thread == 0) {
      T loss = beta == 0 ? T(0) : beta * tau * tau * row.kl;
      T attention_loss = 0;
      T *const z = row.label, *const g = row.moved, *const de = row.scale;  // of the used; scale is done with
      if constexpr (soft) {
        attention_loss = soft_labels(loss);
      } else if (a.labels) {
        if (has_ce) {
          const T s_y = valid ? label_logit(row.used, y) : T(0);
          loss -= static_cast<T>(a.alpha) * (s_y - row.hard.max - log(row.hard.sum));
        }
        if (a.fusion == Fusion::probability) {
#pragma unroll 1
          for (int j = 0; j < row.used; ++j) z[j] = (z[j] - row.target[j].max) * k;
          attention_loss = mixture_nll(row.w, row.target, z, row.mean, row.used);
#pragma unroll 1
          for (int j = 0; j < row.used; ++j) de[j] = row_scale * (row.w[j] - z[j]);
        } else {
          T mixed = 0;  // above the largest
#pragma unroll 1
          for (int j = 0; j < row.used; ++j) {
            z[j] -= row.target[0].max;
            mixed += row.w[j] * z[j];
            z[j] = (row.mean[j] - z[j]) / tau;
          }
          attention_loss = log(row.target[0].sum) - mixed / tau;
#pragma unroll 1
          for (int j = 0; mixed == -std::numeric_limits<T>::infinity() && j < row.used; ++j) z[j] = 0;  // p_y = 0
          softmax_grad(row.w, z, row_scale, de, row.used);
        }
      }
      if (by_kl) {
#pragma unroll 1
        for (int j = 0; j < row.used; ++j)
          g[j] =
              a.fusion == Fusion::probability ? tau * tau * row.moved[j] : tau * (row.moved[j] - row.kl * row.mean[j]);
        if (beta == 0)
#pragma unroll 1
          for (int j = 0; j < row.used; ++j) g[j] = 0;
        softmax_grad(row.w, g, row_scale * beta, de, row.used);
      }
      static_cast<T*>(a.loss)[b] = row_scale * loss;
      static_cast<T*>(a.attention_loss)[b] = row_scale * attention_loss;
#pragma unroll 1
      for (int m = 0; m < snapshots; ++m) row.e[m] = 0;
#pragma unroll 1
      for (int j = 0; j < row.used; ++j) row.e[row.id[j]] = de[j];
    }
    group.sync();
#pragma unroll 1
    for (int m = group.thread; a.d_scores && m < snapshots; m += group.threads)
      store<Any>(a.d_scores, a.scores.dtype, b * snapshots + m, row.e[m]);
#pragma unroll 1
    for (int64_t d = group.thread; a.d_query && d < a.width; d += group.threads) {
      const T query = load<T, Any>(a.query.data, a.query.dtype, b * a.query.stride + d);
      T d_query = 0;
#pragma unroll 1
      for (int m = 0; m < snapshots; ++m) {
        d_query += row.e[m] * load<T, Any>(a.keys[m].data, a.keys[m].dtype, b * a.keys[m].stride + d);
        store<Any>(a.d_keys, a.keys[m].dtype, (m * a.rows + b) * a.width + d, row.e[m] * query);
      }
      store<Any>(a.d_query, a.query.dtype, b * a.width + d, d_query);
    }
  }
};

// What a row's results are times: of the mean, of a row whose label is neither a class nor ignored. Every thread of
// the block calls the first.
template <class T>
__device__ T scale_of_rows(const EnsembleKD& a, bool mean, const int* count, char* shared) {
  if (!mean || !a.labels) return static_cast<T>(a.row_scale);
  if (!count) return T(1) / counted(a.labels, a.rows, a.ignore_index, shared);
  const int all = warp_sum(count[threadIdx.x % 32]);
  return T(1) / (all > 1 ? all : 1);
}
__device__ inline bool ignored(const EnsembleKD& a, int64_t b) { return a.labels && a.labels[b] == a.ignore_index; }
template <class T>
__device__ T scale_of_row(const EnsembleKD& a, int64_t b, T scale) {
  const bool valid = !a.labels || ignored(a, b) || (a.labels[b] >= 0 && a.labels[b] < a.classes);
  return valid ? scale : std::numeric_limits<T>::quiet_NaN();
}

struct Device {
  int shared, shared_of_all_blocks;   // bytes that a block may take, that a multiprocessor has
  int multiprocessors, major, ranks;  // ranks: the largest cluster
};

// The device in use. Asks the driver once for each, and then calls prepare(device), of which there is one per type.
template <class F>
cudaError_t device_in_use(Device& found, F prepare) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int id;
  if (cudaError_t error = cudaGetDevice(&id)) return error;
  const std::lock_guard lock(mutex);
  if (const auto at = known.find(id); at != known.end()) {
    found = at->second;
    return cudaSuccess;
  }
  Device d{};
  d.ranks = 1;
  for (const auto& [value, attribute] : {std::pair(&d.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                                         {&d.shared_of_all_blocks, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                                         {&d.multiprocessors, cudaDevAttrMultiProcessorCount},
                                         {&d.major, cudaDevAttrComputeCapabilityMajor}})
    if (cudaError_t error = cudaDeviceGetAttribute(value, attribute, id)) return error;
  if (cudaError_t error = prepare(d)) return error;
  found = known[id] = d;
  return cudaSuccess;
}

// Half of a multiprocessor at most, so that one block computes while another's lines arrive; all of it if need be.
inline int half_of(const Device& device) { return std::min(device.shared, device.shared_of_all_blocks / 2 - 1024); }

// The launches of an op, in order: of a mean over many rows what counts the labels, launch_rows(counted or null), and
// of scalar losses what adds them up. That is a launch of its own: the last block of the rows could add up instead,
// were there a counter that is 0 when it begins. Streams and replays of graphs that overlap each need one, which a
// launch would have to clear.
template <class T, class F>
const char* launch_all(const EnsembleKD& a, bool mean, void* loss, void* attention_loss, int* count,
                       cudaStream_t stream, F launch_rows) {
  if (a.classes > kMaxClasses) return "more classes than 2^30";
  const bool counts = mean && a.labels && a.rows > kCountInBlock;
  cudaError_t error = cudaSuccess;
  if (counts)
    error = launch_kernel(count_kernel<>, kCounts, 1, 256, 32 * sizeof(int), stream, a.labels, a.rows, a.ignore_index,
                          count);
  int64_t sums = a.rows;  // how many numbers the rows' losses have become
  if (a.rows && error == cudaSuccess) error = launch_rows(counts ? count : nullptr, sums);
  if (loss && error == cudaSuccess)
    error = launch_kernel(sum_kernel<T>, 1, 1, 1024, 32 * sizeof(T), stream, static_cast<const T*>(a.loss),
                          static_cast<const T*>(a.attention_loss), sums, static_cast<T*>(loss),
                          static_cast<T*>(attention_loss));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace eekd
