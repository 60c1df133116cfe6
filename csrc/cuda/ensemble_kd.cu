// ensemble_kd on CUDA: attention, fusion, KL, CE and all gradients of a row, in one launch for all rows.
//
// A warp takes a row of few classes, a block one of many. Where the M + 1 lines of logits fit into shared memory they
// are copied there once, past the registers, in 16-byte pieces whatever their alignment: traffic M + 2 accesses of
// B·C elements. Longer rows are read twice, 2 M + 3 accesses; the second read meets the L2 cache where it can.
//
// The first visit of a row's columns gives softmax statistics, the second the loss and the gradients. A thread owns the
// same columns in both, and everything is added in a fixed order, so the same inputs give the same bits.

#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace eekd {
namespace {

constexpr int kWarpsPerBlock = 4;        // of blocks whose warps have a row each
constexpr int64_t kWarpColumns = 1024;   // classes up to which a warp suffices for a row
constexpr int kMaxThreads = 512;
constexpr int64_t kCountInBlock = 2048;  // labels that every block counts for itself, which costs less than a launch

// What the threads of a row share. Indices j count the snapshots of weight other than 0, which alone are read.
template <class T>
struct Row {
  T e[kMaxSnapshots];      // scores, then weights, then d loss / d score, of all snapshots
  T w[kMaxSnapshots];      // of j
  T scale[kMaxSnapshots];  // probability: w_j / Σ exp;  logit: [0] 1 / Σ exp
  T label[kMaxSnapshots];  // z_j at the label
  T mean[kMaxSnapshots];   // logit: Σ_c p z_j
  T moved[kMaxSnapshots];  // probability: Σ_c p_j r;  logit: Σ_c p r z_j
  SoftmaxSum<T> target[kMaxSnapshots];
  SoftmaxSum<T> soft, hard;  // the student at τ and at 1
  T kl;                      // Σ_c p r,  r = log p - log q
  int id[kMaxSnapshots];
  int used;
};

// A line of logits of one row, in shared or global memory.
struct Line {
  const void* data;
  DType dtype;
};

// Where the parts of a row lie in shared memory, in bytes.
struct Layout {
  int statistics, sums, lines, pitch, size;  // pitch: from line to line
};
template <class T>
__host__ __device__ Layout layout(int snapshots, int warps, int64_t line_bytes) {
  const auto round = [](int64_t n) { return static_cast<int>((n + 15) / 16 * 16); };
  Layout at;
  at.statistics = round(sizeof(Row<T>));
  at.sums = at.statistics + round((snapshots + 2) * warps * sizeof(SoftmaxSum<T>));
  at.lines = at.sums + round((2 * snapshots + 1) * warps * sizeof(T));
  at.pitch = line_bytes ? round(line_bytes + 15) : 0;
  at.size = at.lines + (snapshots + 1) * at.pitch;
  return at;
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
__device__ int counted(const int64_t* labels, int64_t rows, int64_t ignore_index, char* shared) {
  int count = 0;
  for (int64_t b = threadIdx.x; b < rows; b += blockDim.x) count += labels[b] != ignore_index;
  count = block_sum(count, reinterpret_cast<int*>(shared));
  return count > 1 ? count : 1;
}

__global__ void count_kernel(const int64_t* labels, int64_t rows, int64_t ignore_index, int* out) {
  const int count = counted(labels, rows, ignore_index, shared_memory());
  if (threadIdx.x == 0) *out = count;
}

// The sum of each of two rows of n numbers, by one block in a fixed order.
template <class T>
__global__ void sum_kernel(const T* parts, int64_t n, T* first, T* second) {
  for (int which = 0; which < 2; ++which) {
    T sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += parts[which * n + i];
    sum = block_sum(sum, reinterpret_cast<T*>(shared_memory()));
    if (threadIdx.x == 0) *(which ? second : first) = sum;
  }
}

// One row. E is the type of all logits or Any; aligned: every line begins at 16 bytes and is whole vectors long.
template <class T, class E, bool aligned, bool on_chip>
struct Kernel {
  static constexpr int width = std::is_same_v<E, Any> ? 4 : 16 / sizeof(std::conditional_t<std::is_same_v<E, Any>, T, E>);

  const EnsembleKD& a;
  const Group group;
  const int64_t b;
  const Layout at;
  char* const shared;
  const int snapshots;
  const T row_scale;
  const bool has_ce, by_kl, by_label;
  const T beta, tau, k;
  Row<T>& row;
  SoftmaxSum<T>* const statistics;  // [line][warp]
  T* const sums;                    // [2 j][warp], then kl [warp]

  __device__ Kernel(const EnsembleKD& a, Group group, int64_t b, Layout at, char* shared, T row_scale)
      : a(a), group(group), b(b), at(at), shared(shared),
        snapshots(static_cast<int>(a.snapshots)),
        row_scale(row_scale),
        has_ce(a.labels && a.alpha > 0),
        by_kl((a.d_scores || a.d_query) && a.objective == Objective::kl),
        by_label((a.d_scores || a.d_query) && a.objective == Objective::label),
        beta(static_cast<T>(a.labels ? 1 - a.alpha : 1)),
        tau(static_cast<T>(a.temperature)),
        k(static_cast<T>(kLog2e / a.temperature)),
        row(*reinterpret_cast<Row<T>*>(shared)),
        statistics(reinterpret_cast<SoftmaxSum<T>*>(shared + at.statistics)),
        sums(reinterpret_cast<T*>(shared + at.sums)) {}

  __device__ void write_zeros() {
    if (group.thread == 0) static_cast<T*>(a.loss)[b] = static_cast<T*>(a.attention_loss)[b] = 0;
    const auto clear = [&](void* out, DType dtype, int64_t first, int64_t n) {
      for (int64_t i = group.thread; out && i < n; i += group.threads) store<Any>(out, dtype, first + i, T(0));
    };
    clear(a.weights, DType::f32, b * snapshots, snapshots);
    clear(a.d_student, a.student.dtype, b * a.classes, a.classes);
    clear(a.d_scores, a.scores.dtype, b * snapshots, snapshots);
    clear(a.d_query, a.query.dtype, b * a.width, a.width);
    for (int m = 0; m < snapshots; ++m) clear(a.d_keys, a.keys[0].dtype, (m * a.rows + b) * a.width, a.width);
  }

  // softmax of the scores, which are given, or the products of query and keys, or all the same.
  __device__ void weigh() {
    if (a.query.data) {
      for (int m = group.warp(); m < snapshots; m += group.warps()) {
        T product = 0;
        for (int64_t d = group.lane(); d < a.width; d += 32)
          product += load<T, Any>(a.query.data, a.query.dtype, b * a.query.stride + d) *
                     load<T, Any>(a.keys[m].data, a.keys[m].dtype, b * a.keys[m].stride + d);
        product = warp_sum(product);
        if (group.lane() == 0) row.e[m] = product;
      }
    } else {
      for (int m = group.thread; m < snapshots; m += group.threads)
        row.e[m] = a.scores.data ? load<T, Any>(a.scores.data, a.scores.dtype, b * a.scores.stride + m) : T(0);
    }
    group.sync();
    if (group.thread == 0) {
      T max = row.e[0], total = 0;
      for (int m = 1; m < snapshots; ++m) max = row.e[m] > max ? row.e[m] : max;
      for (int m = 0; m < snapshots; ++m) total += row.e[m] = fast_exp2((row.e[m] - max) * T(kLog2e));
      row.used = 0;
      for (int m = 0; m < snapshots; ++m) {
        const T w = row.e[m] /= total;
        if (w != 0) row.id[row.used] = m, row.w[row.used++] = w;
      }
    }
    group.sync();
    for (int m = group.thread; m < snapshots; m += group.threads)
      a.weights[b * snapshots + m] = static_cast<float>(row.e[m]);
  }

  // Line j: of a used snapshot, or of the student where j == used.
  __device__ const Matrix& matrix(int j) const { return j < row.used ? a.snapshot[row.id[j]] : a.student; }
  __device__ const char* source(int j) const {
    const Matrix& x = matrix(j);
    return static_cast<const char*>(x.data) + b * x.stride * bytes_of(x.dtype);
  }
  __device__ Line line(int j) const {
    const char* data = source(j);
    if constexpr (on_chip) data = shared + at.lines + j * at.pitch + (reinterpret_cast<uintptr_t>(data) & 15);
    return {data, matrix(j).dtype};
  }

  // The pieces begin at the multiple of 16 bytes before the line, and lie where the line's elements do: in its pages.
  __device__ void copy_lines() {
    for (int j = 0; j <= row.used; ++j) {
      const char* from = source(j);
      const int before = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
      const int bytes = before + static_cast<int>(a.classes) * bytes_of(matrix(j).dtype);
      for (int i = 16 * group.thread; i < bytes; i += 16 * group.threads)
        copy_async(shared + at.lines + j * at.pitch + i, from - before + i, min(16, bytes - i));
    }
    arrived();
    group.sync();
  }

  // The thread's columns begin at first(c) for every stretch of threads · width columns from c, and lie step apart:
  // neighbours where a vector holds them, otherwise so that neighbouring threads have neighbouring columns.
  static constexpr bool vectors = aligned && !std::is_same_v<E, Any>;
  __device__ int64_t first(int64_t c) const { return c + group.thread * (vectors ? width : 1); }
  __device__ int64_t step() const { return vectors ? 1 : group.threads; }

  __device__ void read(Line line, int64_t c, T (&x)[width]) const {
    if constexpr (vectors) {
      if (c < a.classes) {
        const auto v = *reinterpret_cast<const Vector<E>*>(static_cast<const E*>(line.data) + c);
#pragma unroll
        for (int u = 0; u < width; ++u) x[u] = widen(v.x[u]);
        return;
      }
    }
#pragma unroll
    for (int u = 0; u < width; ++u) {
      const int64_t i = c + u * step();
      x[u] = i < a.classes ? load<T, E>(line.data, line.dtype, i) : -std::numeric_limits<T>::infinity();
    }
  }

  __device__ void write(int64_t c, const T (&x)[width]) const {
    if constexpr (vectors) {
      if (c >= a.classes) return;
      Vector<E> v;
#pragma unroll
      for (int u = 0; u < width; ++u) v.x[u] = narrow<E>(x[u]);
      *reinterpret_cast<Vector<E>*>(static_cast<E*>(a.d_student) + b * a.classes + c) = v;
    } else {
#pragma unroll
      for (int u = 0; u < width; ++u)
        if (c + u * step() < a.classes) store<E>(a.d_student, a.student.dtype, b * a.classes + c + u * step(), x[u]);
    }
  }

  static __device__ T finite(T max) { return max == -std::numeric_limits<T>::infinity() ? T(0) : max; }

  // Takes columns into statistics.
  static __device__ void absorb(SoftmaxSum<T>& s, const T (&x)[width], T k) {
    T max = s.max;
#pragma unroll
    for (int u = 0; u < width; ++u) max = x[u] > max ? x[u] : max;
    const T base = finite(max);
    T sum = s.sum * fast_exp2((s.max - base) * k);
#pragma unroll
    for (int u = 0; u < width; ++u) sum += fast_exp2((x[u] - base) * k);
    s = {max, sum};
  }

  // x = Σ_j w_j z_j
  __device__ void mix(int64_t c, T (&x)[width]) const {
#pragma unroll
    for (int u = 0; u < width; ++u) x[u] = 0;
    for (int j = 0; j < row.used; ++j) {
      T z[width];
      read(line(j), c, z);
#pragma unroll
      for (int u = 0; u < width; ++u) x[u] += row.w[j] * z[u];
    }
  }

  __device__ void keep(int slot, SoftmaxSum<T> s, T k) {
    s = warp_sum(s, k);
    if (group.lane() == 0) statistics[slot * group.warps() + group.warp()] = s;
  }

  // The first visit.
  __device__ void find_statistics() {
    const int64_t stretch = group.threads * width;
    const int targets = a.fusion == Fusion::probability ? row.used : 1;
    T x[width];
    for (int j = 0; j < targets; ++j) {
      SoftmaxSum<T> s = SoftmaxSum<T>::none();
      for (int64_t c = first(0); c - first(0) < a.classes; c += stretch) {
        if (a.fusion == Fusion::probability) read(line(j), c, x);
        else mix(c, x);
        absorb(s, x, k);
      }
      keep(j, s, k);
    }
    SoftmaxSum<T> soft = SoftmaxSum<T>::none(), hard = soft;
    for (int64_t c = first(0); c - first(0) < a.classes; c += stretch) {
      read(line(row.used), c, x);
      absorb(soft, x, k);
      if (has_ce) absorb(hard, x, T(kLog2e));
    }
    keep(targets, soft, k);
    keep(targets + 1, hard, T(kLog2e));
    group.sync();
    for (int j = group.thread; j < targets + 2; j += group.threads) {
      SoftmaxSum<T> s = statistics[j * group.warps()];
      for (int i = 1; i < group.warps(); ++i)
        merge(s, statistics[j * group.warps() + i], j == targets + 1 ? T(kLog2e) : k);
      if (j < targets) {
        row.target[j] = s;
        row.scale[j] = (a.fusion == Fusion::probability ? row.w[j] : T(1)) / s.sum;
      } else {
        (j == targets ? row.soft : row.hard) = s;
      }
    }
    group.sync();
  }

  // The second visit.
  __device__ void differentiate() {
    const bool probability = a.fusion == Fusion::probability;
    const T inverse = 1 / tau, student_max = finite(row.soft.max), log_soft = log(row.soft.sum);
    const T target_max = finite(row.target[0].max), log_target = log(row.target[0].sum);  // logit
    const T soft_scale = 1 / row.soft.sum, d_kl = row_scale * beta * tau;
    const T ce = row_scale * static_cast<T>(a.alpha), hard_scale = has_ce ? ce / row.hard.sum : T(0);
    const int64_t y = has_ce ? a.labels[b] : -1;
    const bool attends = by_kl || (by_label && !probability);
    T* const mean = sums + group.warp();
    T* const moved = mean + snapshots * group.warps();
    if (group.lane() == 0)
      for (int j = 0; j < row.used; ++j) mean[j * group.warps()] = moved[j * group.warps()] = 0;
    T kl = 0;
    for (int64_t c = first(0); c - first(0) < a.classes; c += group.threads * width) {
      T s[width], p[width], x[width], r[width];
      read(line(row.used), c, s);
      if (probability) {
#pragma unroll
        for (int u = 0; u < width; ++u) p[u] = 0;
        for (int j = 0; j < row.used; ++j) {
          read(line(j), c, x);
          const T max = finite(row.target[j].max), scale = row.scale[j];
#pragma unroll
          for (int u = 0; u < width; ++u) p[u] += scale * fast_exp2((x[u] - max) * k);
        }
      } else {
        mix(c, x);
#pragma unroll
        for (int u = 0; u < width; ++u) p[u] = row.scale[0] * fast_exp2((x[u] - target_max) * k);
      }
#pragma unroll
      for (int u = 0; u < width; ++u) {
        const T log_q = (s[u] - student_max) * inverse - log_soft;
        const T log_p = probability ? T(kLn2) * fast_log2(p[u]) : (x[u] - target_max) * inverse - log_target;
        r[u] = p[u] > 0 ? log_p - log_q : T(0);
        kl += p[u] * r[u];
        T d = d_kl * (soft_scale * fast_exp2((s[u] - student_max) * k) - p[u]);
        if (has_ce) d += hard_scale * fast_exp2((s[u] - student_max) * T(kLog2e)) - (c + u * step() == y ? ce : T(0));
        s[u] = d;
      }
      if (a.d_student) write(c, s);
      for (int j = 0; attends && j < row.used; ++j) {
        read(line(j), c, x);
        const T max = finite(row.target[j].max);
        T share = 0, share_moved = 0;
#pragma unroll
        for (int u = 0; u < width; ++u) {
          if (probability) {
            share_moved += fast_exp2((x[u] - max) * k) * r[u];
          } else if (p[u] > 0) {  // a masked z meets p = 0
            share += p[u] * x[u];
            share_moved += p[u] * r[u] * x[u];
          }
        }
        share = warp_sum(share);
        share_moved = warp_sum(share_moved);
        if (group.lane() == 0) mean[j * group.warps()] += share, moved[j * group.warps()] += share_moved;
      }
    }
    kl = warp_sum(kl);
    if (group.lane() == 0) sums[2 * snapshots * group.warps() + group.warp()] = kl;
    group.sync();
    const auto total = [&](int slot) {
      T sum = 0;
      for (int i = 0; i < group.warps(); ++i) sum += sums[slot * group.warps() + i];
      return sum;
    };
    for (int j = group.thread; j < row.used; j += group.threads) {
      row.mean[j] = total(j);
      row.moved[j] = total(snapshots + j) / (probability ? row.target[j].sum : T(1));
    }
    if (group.thread == 0) row.kl = total(2 * snapshots);
    group.sync();
  }

  // Everything that is O(M) or O(D) per row; one thread does what is O(M).
  __device__ void finish() {
    const int64_t y = a.labels ? a.labels[b] : 0;
    const bool valid = y >= 0 && y < a.classes;
    for (int j = group.thread; j < row.used; j += group.threads)
      row.label[j] = valid ? load<T, E>(source(j), matrix(j).dtype, y) : T(0);
    group.sync();
    if (group.thread == 0) {
      T loss = beta == 0 ? T(0) : beta * tau * tau * row.kl;
      T attention_loss = 0;
      T *const z = row.label, *const g = row.moved, *const de = row.scale;  // of the used; scale is done with
      if (a.labels) {
        if (has_ce) {
          const T s_y = valid ? load<T, E>(source(row.used), a.student.dtype, y) : T(0);
          loss -= static_cast<T>(a.alpha) * (s_y - row.hard.max - log(row.hard.sum));
        }
        if (a.fusion == Fusion::probability) {
          for (int j = 0; j < row.used; ++j) z[j] = (z[j] - row.target[j].max) * k;
          attention_loss = mixture_nll(row.w, row.target, z, row.used);
          for (int j = 0; j < row.used; ++j) de[j] = row_scale * (row.w[j] - z[j]);
        } else {
          T mixed = 0;
          for (int j = 0; j < row.used; ++j) mixed += row.w[j] * z[j], z[j] = (row.mean[j] - z[j]) / tau;
          attention_loss = log(row.target[0].sum) - (mixed - row.target[0].max) / tau;
          for (int j = 0; mixed == -std::numeric_limits<T>::infinity() && j < row.used; ++j) z[j] = 0;  // p_y = 0
          softmax_grad(row.w, z, row_scale, de, row.used);
        }
      }
      if (by_kl) {
        for (int j = 0; j < row.used; ++j)
          g[j] = a.fusion == Fusion::probability ? tau * tau * row.moved[j] : tau * (row.moved[j] - row.kl * row.mean[j]);
        if (beta == 0)
          for (int j = 0; j < row.used; ++j) g[j] = 0;
        softmax_grad(row.w, g, row_scale * beta, de, row.used);
      }
      static_cast<T*>(a.loss)[b] = row_scale * loss;
      static_cast<T*>(a.attention_loss)[b] = row_scale * attention_loss;
      for (int m = 0; m < snapshots; ++m) row.e[m] = 0;
      for (int j = 0; j < row.used; ++j) row.e[row.id[j]] = de[j];
    }
    group.sync();
    for (int m = group.thread; a.d_scores && m < snapshots; m += group.threads)
      store<Any>(a.d_scores, a.scores.dtype, b * snapshots + m, row.e[m]);
    for (int64_t d = group.thread; a.d_query && d < a.width; d += group.threads) {
      const T query = load<T, Any>(a.query.data, a.query.dtype, b * a.query.stride + d);
      T d_query = 0;
      for (int m = 0; m < snapshots; ++m) {
        d_query += row.e[m] * load<T, Any>(a.keys[m].data, a.keys[m].dtype, b * a.keys[m].stride + d);
        store<Any>(a.d_keys, a.keys[m].dtype, (m * a.rows + b) * a.width + d, row.e[m] * query);
      }
      store<Any>(a.d_query, a.query.dtype, b * a.width + d, d_query);
    }
  }

  __device__ void run() {
    weigh();
    if constexpr (on_chip) copy_lines();
    find_statistics();
    differentiate();
    finish();
  }
};

// Threads per row and rows per block follow from the block, a warp per row or all of it; `line_bytes` is 0 off chip.
template <class T, class E, bool aligned, bool on_chip>
__global__ void __launch_bounds__(kMaxThreads, 1)
rows_kernel(const __grid_constant__ EnsembleKD a, int threads, int64_t line_bytes, bool mean, const int* count) {
  char* const shared = shared_memory();
  T row_scale = static_cast<T>(a.row_scale);
  if (mean && a.labels) row_scale = T(1) / (count ? *count : counted(a.labels, a.rows, a.ignore_index, shared));
  const int row_in_block = threadIdx.x / threads;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (blockDim.x / threads) + row_in_block;
  if (b >= a.rows) return;
  const Layout at = layout<T>(static_cast<int>(a.snapshots), threads / 32, line_bytes);
  if (a.labels) {
    const int64_t y = a.labels[b];
    if (y != a.ignore_index && (y < 0 || y >= a.classes)) row_scale = std::numeric_limits<T>::quiet_NaN();
  }
  const Group group{static_cast<int>(threadIdx.x) % threads, threads};
  Kernel<T, E, aligned, on_chip> kernel(a, group, b, at, shared + row_in_block * at.size, row_scale);
  if (a.labels && a.labels[b] == a.ignore_index) kernel.write_zeros();
  else kernel.run();
}

struct Launch {
  int threads, rows_per_block, shared;
  int64_t line_bytes;
};

// A warp or a block per row, its lines on chip where they fit.
template <class T>
Launch launch(const EnsembleKD& a, int itemsize, bool may_copy, int shared_limit) {
  Launch l;
  l.threads = a.classes <= kWarpColumns ? 32 : a.classes <= 4096 ? 128 : a.classes <= 16384 ? 256 : kMaxThreads;
  l.rows_per_block = l.threads == 32 ? kWarpsPerBlock : 1;
  const int snapshots = static_cast<int>(a.snapshots);
  if (may_copy && a.classes * itemsize * (snapshots + 1) < shared_limit)
    for (l.line_bytes = a.classes * itemsize; l.rows_per_block; l.rows_per_block /= 2) {
      l.shared = l.rows_per_block * layout<T>(snapshots, l.threads / 32, l.line_bytes).size;
      if (l.shared <= shared_limit) return l;
    }
  l.line_bytes = 0;
  l.rows_per_block = l.threads == 32 ? kWarpsPerBlock : 1;
  l.shared = l.rows_per_block * layout<T>(snapshots, l.threads / 32, 0).size;
  return l;
}

// Every line begins at 16 bytes and is whole vectors long.
bool aligned(const EnsembleKD& a, int itemsize) {
  uintptr_t bits = a.classes * itemsize | reinterpret_cast<uintptr_t>(a.d_student);
  const auto add = [&](const Matrix& x) { bits |= reinterpret_cast<uintptr_t>(x.data) | x.stride * itemsize; };
  add(a.student);
  for (int64_t m = 0; m < a.snapshots; ++m) add(a.snapshot[m]);
  return bits % 16 == 0;
}

template <class T, class E>
cudaError_t run(const EnsembleKD& a, bool mean, const int* count, cudaStream_t stream) {
  int device, shared_limit;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return error;
  constexpr bool any = std::is_same_v<E, Any>;
  const int itemsize = a.student.dtype == DType::f32 ? 4 : 2;
  const Launch l = launch<T>(a, itemsize, !any, shared_limit - 1024);  // less what is not dynamic
  auto kernel = rows_kernel<T, E, false, false>;
  if constexpr (!any) {
    if (aligned(a, itemsize)) kernel = l.line_bytes ? rows_kernel<T, E, true, true> : rows_kernel<T, E, true, false>;
    else if (l.line_bytes) kernel = rows_kernel<T, E, false, true>;
  }
  if (l.shared > 48 << 10)
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared))
      return error;
  const int64_t blocks = (a.rows + l.rows_per_block - 1) / l.rows_per_block;
  return launch_kernel(kernel, blocks, l.threads * l.rows_per_block, l.shared, stream, a, l.threads, l.line_bytes, mean,
                       count);
}

}  // namespace

template <class T>
const char* ensemble_kd_fwd_cuda(const EnsembleKD& args, bool mean, void* loss, void* attention_loss, int* count,
                                 void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  cudaError_t error = cudaSuccess;
  if (args.rows) {
    const bool counts = mean && args.labels && args.rows > kCountInBlock;
    if (counts) {
      error = launch_kernel(count_kernel, 1, 1024, 32 * sizeof(int), stream, args.labels, args.rows, args.ignore_index,
                            count);
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    bool same = true;
    for (int64_t m = 0; m < args.snapshots; ++m) same &= args.snapshot[m].dtype == args.student.dtype;
    const int* counted = counts ? count : nullptr;
    if constexpr (std::is_same_v<T, double>) {
      error = run<T, Any>(args, mean, counted, stream);
    } else if (same) {
      switch (args.student.dtype) {
        case DType::f32: error = run<T, float>(args, mean, counted, stream); break;
        case DType::bf16: error = run<T, __nv_bfloat16>(args, mean, counted, stream); break;
        default: error = run<T, __half>(args, mean, counted, stream);
      }
    } else {
      error = run<T, Any>(args, mean, counted, stream);
    }
  }
  if (loss && error == cudaSuccess)
    error = launch_kernel(sum_kernel<T>, 1, 1024, 32 * sizeof(T), stream, static_cast<const T*>(args.loss), args.rows,
                          static_cast<T*>(loss), static_cast<T*>(attention_loss));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* ensemble_kd_fwd_cuda<float>(const EnsembleKD&, bool, void*, void*, int*, void*);
template const char* ensemble_kd_fwd_cuda<double>(const EnsembleKD&, bool, void*, void*, int*, void*);

}  // namespace eekd
