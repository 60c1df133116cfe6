// sparse_ensemble_kd on CUDA: the K + 1 columns of a row and the gradient of all its C classes, in one launch for all
// rows.
//
// A warp takes a row of few classes, a block one of many. The student's row is copied to shared memory once where it
// fits there, and is read twice where not: traffic 2 or 3 accesses of B·C elements, and M accesses of B·K, which are
// repeated from a cache. One bit per class in shared memory tells which are in `indices`, so that the sum over the
// others never cancels; where the bits of a row do not fit, it is gone through in segments.
//
// The first visit of the classes gives the statistics of the student's tail and of the CE, the second writes the
// gradient of the tail. Between them the K + 1 columns, which a thread for each turns into p, log p - log q and the
// gradient of its class, a warp for each snapshot into statistics and sums. Everything is added in a fixed order.
//
// Soft labels are one more line, read in both visits.

#include <algorithm>
#include <type_traits>

#include "rows.cuh"

namespace eekd {
namespace {

struct Launch {
  Order order;
  bool keeps;   // the student's row in shared memory
  int segment;  // classes that have a bit at once, a whole number for each thread
  int threads, rows_per_block, shared;
  bool soft;  // labels
};

template <class T>
struct SparseRow : Row<T> {
  SoftmaxSum<T> tail;  // of the student at τ
  T rest;              // S_K, less the student's largest
  T d_tail;            // of the tail's classes, times exp((s_c - tail.max) / τ)
  T label_rest;        // of soft labels, Σ y outside `indices`
  int column;          // of the label
  bool bad;            // an index is no class
};

// Where the parts of a row lie in shared memory, in bytes.
struct Layout {
  int statistics, sums, tile, bits, line, size;
};
template <class T>
__host__ __device__ Layout layout(const Launch& l, int line_bytes) {
  const auto round = [](int n) { return (n + 15) / 16 * 16; };
  const int warps = l.threads / 32;
  Layout at;
  at.statistics = round(sizeof(SparseRow<T>));
  at.sums = at.statistics + round(3 * warps * sizeof(SoftmaxSum<T>));
  at.tile = at.sums + round((l.soft ? 5 : 1) * warps * sizeof(T));
  at.bits = at.tile + round((l.soft ? 3 : 2) * l.threads * sizeof(T));
  at.line = at.bits + l.segment / 8;
  at.size = at.line + (l.keeps ? round(line_bytes + 15) : 0);
  return at;
}

// One row. E is the type of the student's logits, or Any; those of snapshots are found at run time.
template <class T, class E, bool keeps, bool soft>
struct Kernel : RowKernel<T> {
  using RowKernel<T>::a, RowKernel<T>::group, RowKernel<T>::b, RowKernel<T>::row_scale, RowKernel<T>::has_ce;
  using RowKernel<T>::by_kl, RowKernel<T>::by_label, RowKernel<T>::beta, RowKernel<T>::tau, RowKernel<T>::k;
  static constexpr int width = std::is_same_v<E, Any> ? 4 : kWidth;
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  const SparseEnsembleKD& sparse;
  const Order order;
  const int classes, columns, segment;  // columns: K
  const bool probability;
  const Layout at;
  SparseRow<T>& row;
  SoftmaxSum<T>* const statistics;  // [tail, hard, mixture][warp]
  T* const sums;                    // [slot][warp]
  T *const tile_p, *const tile_r;   // of as many columns as threads
  T* const tile_y;                  // likewise of soft labels, their weights
  unsigned* const bits;
  const char* line;  // the student's row
  int marked = -1;   // the first class of the segment whose bits are set
  enum Slot { kl, label_sum, label_rest, label_log_q, label_log_p };

  __device__ Kernel(const SparseEnsembleKD& sparse, Group group, int64_t b, const Launch& l, char* shared, T row_scale)
      : RowKernel<T>(sparse.kd, group, b, *reinterpret_cast<SparseRow<T>*>(shared), row_scale),
        sparse(sparse),
        order(l.order),
        classes(static_cast<int>(a.classes)),
        columns(static_cast<int>(sparse.k)),
        segment(l.segment),
        probability(a.fusion == Fusion::probability),
        at(layout<T>(l, 0)),
        row(*reinterpret_cast<SparseRow<T>*>(shared)),
        statistics(reinterpret_cast<SoftmaxSum<T>*>(shared + at.statistics)),
        sums(reinterpret_cast<T*>(shared + at.sums)),
        tile_p(reinterpret_cast<T*>(shared + at.tile)),
        tile_r(tile_p + l.threads),
        tile_y(tile_r + l.threads),
        bits(reinterpret_cast<unsigned*>(shared + at.bits)),
        line(static_cast<const char*>(a.student.data) + b * a.student.stride * bytes_of(a.student.dtype)) {}

  // Class of column j; an index that is no class, whose row is NaN, is taken for 0.
  __device__ int64_t given_index(int j) const { return sparse.indices[b * sparse.indices_stride + j]; }
  __device__ int index(int j) const {
    const int64_t c = given_index(j);
    return c >= 0 && c < classes ? static_cast<int>(c) : 0;
  }
  __device__ T student(int c) const { return load<T, E>(line, a.student.dtype, c); }

  __device__ T label(int c) const {
    return load<T, Any>(a.label_weights.data, a.label_weights.dtype, b * a.label_weights.stride + c);
  }

  // Column c of used snapshot j, of all and of their mixture.
  __device__ T z(int j, int c) const {
    const int m = row.id[j];
    if (c == columns)
      return tau * static_cast<const T*>(sparse.tail)[m * sparse.tail_stride[0] + b * sparse.tail_stride[1]];
    return load<T, Any>(a.snapshot[m].data, a.snapshot[m].dtype, b * a.snapshot[m].stride + c);
  }
  __device__ T mixed(int c) const {
    T x = 0;
    for (int j = 0; j < row.used; ++j) x += row.w[j] * z(j, c);
    return x;
  }

  // Sets the bits of the classes in `indices`, of a segment.
  __device__ void mark(int begin) {
    group.sync();  // others may still need those of the last one
    for (int i = group.thread; i < segment / 32; i += group.threads) bits[i] = 0;
    if (group.thread == 0) row.column = columns, row.bad = false;
    group.sync();
    const int64_t y = a.labels ? a.labels[b] : -1;
    for (int j = group.thread; j < columns; j += group.threads) {
      const int64_t c = given_index(j);
      if (c < 0 || c >= classes) row.bad = true;
      if (c == y) row.column = j;
      const int i = index(j) - begin;
      if (i >= 0 && i < segment) atomicOr(bits + i / 32, 1u << i % 32);  // in any order the same
    }
    group.sync();
    marked = begin;
  }

  // A thread's classes begin at first() + i stretch(), in every segment.
  __device__ bool apart() const { return order == Order::apart; }
  __device__ int first() const { return group.thread * (apart() ? 1 : width); }
  __device__ int step() const { return apart() ? group.threads : 1; }
  __device__ int stretch() const { return group.threads * width; }

  __device__ void read(int c, T (&x)[width]) const {
    if constexpr (!std::is_same_v<E, Any>) {
      if (order == Order::vectors) {
        const auto v = *reinterpret_cast<const Vector<E, width>*>(reinterpret_cast<const E*>(line) + c);
#pragma unroll
        for (int u = 0; u < width; ++u) x[u] = widen(v.x[u]);
        return;
      }
    }
#pragma unroll
    for (int u = 0; u < width; ++u) {
      const int i = c + u * step();
      x[u] = i < classes ? student(i) : -kInf;
    }
  }

  // The soft labels y of classes, 0 beyond the last.
  __device__ void read_labels(int c, T (&y)[width]) const {
#pragma unroll
    for (int u = 0; u < width; ++u) y[u] = c + u * step() < classes ? label(c + u * step()) : T(0);
  }

  // Bit u: whether class c + u step() is in `indices`; c counts from the segment's first.
  __device__ unsigned taken(int c) const {
    if (!apart()) return bits[c / 32] >> c % 32 & ((1u << width) - 1);
    unsigned found = 0;
#pragma unroll
    for (int u = 0; u < width; ++u) {
      const int i = c + u * step();
      found |= (bits[i / 32] >> i % 32 & 1) << u;
    }
    return found;
  }

  // visitor(c, logits, taken) of all classes of this thread.
  template <class F>
  __device__ void visit(F visitor) {
    for (int begin = 0; begin < classes; begin += segment) {
      if (begin != marked) mark(begin);
      const int end = min(classes, begin + segment);
      for (int c = begin + first(); c < end; c += stretch()) {
        T x[width];
        read(c, x);
        visitor(c, x, taken(c - begin));
      }
    }
  }

  __device__ void add_up(int slot, SoftmaxSum<T> s, T k) {
    s = warp_sum(s, k);
    if (group.lane() == 0) statistics[slot * group.warps() + group.warp()] = s;
  }

  // The sum of a slot: each warp gives a number, and after a barrier a thread adds them up.
  __device__ void give(Slot slot, T x) {
    x = warp_sum(x);
    if (group.lane() == 0) sums[slot * group.warps() + group.warp()] = x;
  }
  __device__ T total(Slot slot) const {
    T sum = 0;
    for (int i = 0; i < group.warps(); ++i) sum += sums[slot * group.warps() + i];
    return sum;
  }

  // Softmax statistics of the classes, and of the columns.
  __device__ void find_statistics() {
    SoftmaxSum<T> tail = SoftmaxSum<T>::none(), hard = tail, mixture = tail;
    [[maybe_unused]] T all_labels = 0, rest = 0;
    visit([&](int c, T(&x)[width], unsigned taken) {
      if (has_ce) absorb(hard, x, T(kLog2e));
      if constexpr (soft) {
        T y[width];
        read_labels(c, y);
#pragma unroll
        for (int u = 0; u < width; ++u) all_labels += y[u], rest += taken >> u & 1 ? T(0) : y[u];
      }
#pragma unroll
      for (int u = 0; u < width; ++u) x[u] = taken >> u & 1 ? -kInf : x[u];
      absorb(tail, x, k);
    });
    add_up(0, tail, k);
    add_up(1, hard, T(kLog2e));
    if constexpr (soft) {
      give(label_sum, all_labels);
      give(label_rest, rest);
    }
    if (!probability) {
      for (int c = group.thread; c <= columns; c += group.threads) absorb(mixture, {mixed(c)}, k);
      add_up(2, mixture, k);
    }
    const int targets = probability ? row.used : 0;
    for (int j = group.warp(); j <= targets; j += group.warps()) {  // the last is the student's, without its tail
      constexpr int together = 4;
      const int n = columns + (j < targets);
      SoftmaxSum<T> s = SoftmaxSum<T>::none();
      for (int c = group.lane(); c < n; c += 32 * together) {
        T x[together];
#pragma unroll
        for (int u = 0; u < together; ++u) {
          const int i = c + 32 * u;
          x[u] = i >= n ? -kInf : j < targets ? z(j, i) : student(index(i));
        }
        absorb(s, x, k);
      }
      s = warp_sum(s, k);
      if (group.lane() == 0) (j < targets ? row.target[j] : row.soft) = s;
    }
    group.sync();
    if (group.thread < 3) {
      SoftmaxSum<T>* const s = statistics + group.thread * group.warps();
      for (int i = 1; i < group.warps() && (group.thread < 2 || !probability); ++i)
        merge(s[0], s[i], group.thread == 1 ? T(kLog2e) : k);
    }
    group.sync();
    if (group.thread == 0) {
      row.tail = statistics[0];
      row.hard = statistics[group.warps()];
      if (!probability) row.target[0] = statistics[2 * group.warps()];
      if constexpr (soft) row.label_sum = total(label_sum), row.label_rest = total(label_rest);
      merge(row.soft, row.tail, k);
      row.rest = row.tail.max - finite(row.soft.max) + tau * log(row.tail.sum);
      for (int j = 0; j < (probability ? row.used : 1); ++j)
        row.scale[j] = (probability ? row.w[j] : T(1)) / row.target[j].sum;
    }
    group.sync();
  }

  // KL of the columns, its gradients by the scores, and by the student's logits in `indices`.
  __device__ void differentiate_columns() {
    const T inverse = 1 / tau, student_max = finite(row.soft.max), log_soft = log(row.soft.sum);
    const T target_max = finite(row.target[0].max), log_target = log(row.target[0].sum);  // logit
    const T soft_scale = 1 / row.soft.sum, d_kl = row_scale * beta * tau;
    const T ce = row_scale * static_cast<T>(a.alpha), hard_scale = hard_scale_of(ce);
    const int64_t y = has_ce && !soft ? a.labels[b] : -1;
    const bool attends = by_kl || (by_label && (soft || !probability));
    for (int j = group.warp(); j < row.used; j += group.warps()) {  // each warp has its own
      if (group.lane() == 0) row.mean[j] = 0;
      if (group.lane() == 16) row.moved[j] = 0;
      if (soft && group.lane() == 0) row.label[j] = 0;
    }
    T sum = 0;
    [[maybe_unused]] T sum_of_log_p = 0;
    for (int done = 0; done <= columns; done += group.threads) {
      const int c = done + group.thread;
      if (c <= columns) {
        const int i = c < columns ? index(c) : -1;
        const T s = c < columns ? student(i) - student_max : row.rest;
        T p = 0, x = 0;
        if (probability) {
          for (int j = 0; j < row.used; ++j) p += row.scale[j] * fast_exp2((z(j, c) - finite(row.target[j].max)) * k);
        } else {
          x = mixed(c) - target_max;
          p = row.scale[0] * fast_exp2(x * k);
        }
        const T log_p =
            probability ? T(kLn2) * fast_log2(max(p, std::numeric_limits<T>::min())) : x * inverse - log_target;
        const T r = p > 0 ? log_p - (s * inverse - log_soft) : T(0);
        sum += p * r;
        tile_p[group.thread] = p;
        tile_r[group.thread] = r;
        T d = d_kl * (soft_scale * fast_exp2(s * k) - p);
        T of_label = i == y ? ce : T(0);
        if constexpr (soft) {
          const T weight = c < columns ? label(i) : row.label_rest;
          of_label = weight * ce;
          tile_y[group.thread] = weight;
          if (weight != 0) {  // 0 times -inf is 0
            const bool tiny = probability && p < std::numeric_limits<T>::min();
            const auto logit = [&](int j) { return z(j, c); };
            sum_of_log_p += weight * (tiny ? this->log_of_tiny(logit) : probability ? log(p) : x * inverse);
          }
        }
        if (c == columns) {
          row.d_tail = row.tail.sum == 0 ? T(0) : d / row.tail.sum;
        } else if (a.d_student) {
          if (has_ce) d += hard_scale * fast_exp2(s * T(kLog2e)) - of_label;
          store<E>(a.d_student, a.student.dtype, b * a.classes + i, d);
        }
      }
      if (!attends) continue;
      group.sync();
      for (int j = group.warp(); j < row.used; j += group.warps()) {
        const T max = finite(row.target[probability ? j : 0].max);
        T share = 0, share_moved = 0;
        [[maybe_unused]] T share_label = 0;
        for (int i = group.lane(); i < min(group.threads, columns + 1 - done); i += 32) {
          const T p = tile_p[i], r = tile_r[i], x = z(j, done + i) - max;
          if (probability) {
            share_moved += fast_exp2(x * k) * r;
          } else if (p > 0) {  // a masked z meets p = 0
            share += p * x;
            share_moved += p * r * x;
          }
          if constexpr (soft) {
            const T weight = tile_y[i];
            if (weight == 0) continue;
            if (!probability)
              share_label += weight * x;
            else if (!(p < std::numeric_limits<T>::min()))  // or NaN
              share_label += weight * (row.w[j] - row.scale[j] * fast_exp2(x * k) / p);
            else
              share_label += weight * (row.w[j] - this->share_of_tiny(j, [&](int m) { return z(m, done + i); }));
          }
        }
        if constexpr (soft) {
          share_label = warp_sum(share_label);
          if (group.lane() == 0) row.label[j] += share_label;
        }
        const T both = warp_sums(share, share_moved);
        if (group.lane() == 0) row.mean[j] += both;
        if (group.lane() == 16) row.moved[j] += both;
      }
      group.sync();
    }
    give(kl, sum);
    if constexpr (soft) give(label_log_p, sum_of_log_p);
    group.sync();
    if (group.thread == 0) {
      row.kl = total(kl);
      if constexpr (soft) row.log_p = total(label_log_p);
      for (int j = 0; probability && j < row.used; ++j) row.moved[j] /= row.target[j].sum;
    }
    group.sync();
  }

  // Of the gradient of the CE: what Σ exp is divided by and the coefficient times.
  __device__ T hard_scale_of(T ce) const { return !has_ce ? T(0) : (soft ? ce * row.label_sum : ce) / row.hard.sum; }

  // The gradient of the classes outside `indices`, and Σ y (s - its largest) of soft labels.
  __device__ void differentiate_tail() {
    const T tail_max = finite(row.tail.max), d_tail = row.d_tail, student_max = finite(row.soft.max);
    const T ce = row_scale * static_cast<T>(a.alpha), hard_scale = hard_scale_of(ce);
    const int64_t y = has_ce && !soft ? a.labels[b] : -1;
    [[maybe_unused]] T log_q = 0;
    visit([&](int c, T(&x)[width], unsigned taken) {
      [[maybe_unused]] T weight[width];
      if constexpr (soft) {
        read_labels(c, weight);
#pragma unroll
        for (int u = 0; u < width; ++u) log_q += weight[u] != 0 ? weight[u] * (x[u] - student_max) : T(0);
        if (!a.d_student) return;
      }
#pragma unroll
      for (int u = 0; u < width; ++u) {
        T d = d_tail * fast_exp2((x[u] - tail_max) * k);
        const T of_label = soft ? weight[u] * ce : c + u * step() == y ? ce : T(0);
        if (has_ce) d += hard_scale * fast_exp2((x[u] - student_max) * T(kLog2e)) - of_label;
        x[u] = d;
      }
      const int64_t at = b * a.classes + c;
      if constexpr (!std::is_same_v<E, Any>) {
        if (order == Order::vectors && !taken) {
          Vector<E, width> v;
#pragma unroll
          for (int u = 0; u < width; ++u) v.x[u] = narrow<E>(x[u]);
          *reinterpret_cast<Vector<E, width>*>(static_cast<E*>(a.d_student) + at) = v;
          return;
        }
      }
#pragma unroll
      for (int u = 0; u < width; ++u)
        if (!(taken >> u & 1) && c + u * step() < classes)
          store<E>(a.d_student, a.student.dtype, at + u * step(), x[u]);
    });
    if constexpr (soft) {
      give(label_log_q, log_q);
      group.sync();
      if (group.thread == 0) row.log_q = total(label_log_q);
    }
  }

  __device__ void run() {
    if constexpr (keeps)
      line = copy_line(group, reinterpret_cast<char*>(&row) + at.line, line, classes * static_cast<int>(sizeof(E)));
    this->weigh();
    mark(0);
    if (row.bad) row_scale = std::numeric_limits<T>::quiet_NaN();
    if constexpr (keeps) {
      arrived();
      group.sync();
    }
    find_statistics();
    differentiate_columns();
    if (a.d_student || (soft && has_ce)) differentiate_tail();
    this->template finish<soft>(
        [&](int j, int64_t y) { return j < row.used ? z(j, row.column) : student(static_cast<int>(y)); });
  }
};

template <class T, class E, bool keeps, bool soft>
__global__ void __launch_bounds__(kMaxThreads, std::is_same_v<T, double> ? 2 : 3)
    sparse_rows_kernel(const __grid_constant__ SparseEnsembleKD a, Launch l, bool mean, const int* count) {
  static_assert(sizeof(SparseEnsembleKD) + sizeof(Launch) <= 4096 - 64, "what a kernel's parameters may take");
  char* const shared = shared_memory();
  const T scale = scale_of_rows<T>(a.kd, mean, count, shared);
  const int row_in_block = static_cast<int>(threadIdx.x) / l.threads;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * l.rows_per_block + row_in_block;
  if (b >= a.kd.rows) return;
  const Group group{static_cast<int>(threadIdx.x) % l.threads, l.threads, 0, 1};
  char* const own = shared + row_in_block * (l.shared / l.rows_per_block);
  Kernel<T, E, keeps, soft> kernel(a, group, b, l, own, scale_of_row(a.kd, b, scale));
  if (ignored(a.kd, b))
    kernel.write_zeros(0, a.kd.classes);
  else
    kernel.run();
}

// A warp or a block per row. Neither this nor the order of classes depends on where the tensors lie, so neither do the
// bits.
template <class T>
Launch launch(const EnsembleKD& a, int itemsize, const Device& device) {
  Launch l{};
  l.soft = a.label_weights.data;
  l.threads = a.classes <= kWarpColumns ? 32 : a.classes <= 4096 ? 128 : kMaxThreads;
  const int64_t stretch = l.threads * kWidth, whole = (a.classes + stretch - 1) / stretch * stretch;
  l.keeps = itemsize && a.classes * itemsize < device.shared;
  const int line_bytes = l.keeps ? static_cast<int>(a.classes) * itemsize : 0;
  if (l.keeps) {
    l.segment = static_cast<int>(whole);
    l.keeps = layout<T>(l, line_bytes).size <= device.shared;
  }
  if (!l.keeps) {
    l.segment = 0;
    const int64_t room = half_of(device) - layout<T>(l, 0).size;
    l.segment = static_cast<int>(std::min(whole, room * 8 / stretch * stretch));
  }
  const int size = layout<T>(l, line_bytes).size;
  l.rows_per_block = l.threads == 32 ? kWarpsPerBlock : 1;
  while (l.rows_per_block > 1 && l.rows_per_block * size > half_of(device)) l.rows_per_block /= 2;
  l.shared = l.rows_per_block * size;
  l.order = !itemsize || a.classes % kWidth ? Order::apart : Order::vectors;
  const auto bits = reinterpret_cast<uintptr_t>(a.student.data) | reinterpret_cast<uintptr_t>(a.d_student) |
                    static_cast<uintptr_t>(a.student.stride * itemsize);
  if (l.order == Order::vectors && bits % 16) l.order = Order::neighbours;
  return l;
}

template <class T, class E>
cudaError_t launch_rows(const SparseEnsembleKD& a, bool mean, const int* count, cudaStream_t stream) {
  constexpr bool any = std::is_same_v<E, Any>;
  static constexpr decltype(&sparse_rows_kernel<T, E, false, false>) kernels[2][2] = {
      // [keeps][soft]
      {sparse_rows_kernel<T, E, false, false>, sparse_rows_kernel<T, E, false, true>},
      {sparse_rows_kernel<T, E, !any, false>, sparse_rows_kernel<T, E, !any, true>}};
  const auto prepare = [](Device& d) {
    for (const auto& those : kernels)
      for (auto kernel : those)
        if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared))
          return error;
    for (auto kernel : kernels[1])
      if (cudaError_t error = any ? cudaSuccess
                                  : cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                         cudaSharedmemCarveoutMaxShared))
        return error;
    return cudaSuccess;
  };
  Device device;
  if (cudaError_t error = device_in_use(device, prepare)) return error;
  const Launch l = launch<T>(a.kd, any ? 0 : sizeof(E), device);
  const int64_t blocks = (a.kd.rows + l.rows_per_block - 1) / l.rows_per_block;
  return launch_kernel(kernels[l.keeps][l.soft], blocks, 1, l.threads * l.rows_per_block, l.shared, stream, a, l, mean,
                       count);
}

}  // namespace

template <class T>
const char* sparse_ensemble_kd_fwd_cuda(const SparseEnsembleKD& args, bool mean, void* loss, void* attention_loss,
                                        int* count, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  return launch_all<T>(args.kd, mean, loss, attention_loss, count, stream,
                       [&](const int* counted, int64_t&) -> cudaError_t {
    if constexpr (std::is_same_v<T, double>) {
      return launch_rows<T, Any>(args, mean, counted, stream);
    } else {
      switch (args.kd.student.dtype) {
        case DType::f32: return launch_rows<T, float>(args, mean, counted, stream);
        case DType::bf16: return launch_rows<T, __nv_bfloat16>(args, mean, counted, stream);
        default: return launch_rows<T, __half>(args, mean, counted, stream);
      }
    }
  });
}

template const char* sparse_ensemble_kd_fwd_cuda<float>(const SparseEnsembleKD&, bool, void*, void*, int*, void*);
template const char* sparse_ensemble_kd_fwd_cuda<double>(const SparseEnsembleKD&, bool, void*, void*, int*, void*);

}  // namespace eekd
