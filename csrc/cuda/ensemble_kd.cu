// ensemble_kd on CUDA: attention, fusion, KL, CE and all gradients of a row, in one launch for all rows.
//
// A warp takes a row of few classes, a block one of many, a cluster of blocks one of more (from sm_90), where each
// block has a slice of the columns. The M + 1 lines of logits of a row are copied to shared memory once, past the
// registers, in 16-byte pieces whatever their alignment: traffic M + 2 accesses of B·C elements. Where the weights of a
// logit fusion do not learn, the mixed line and the student's are enough. Rows too long for either are read twice,
// 2 M + 3 accesses; the second read meets the L2 cache where it can.
//
// The first visit of a row's columns gives softmax statistics, the second the loss and the gradients. A thread owns the
// same columns in both, wherever they lie in memory, and everything is added in a fixed order: the same inputs give the
// same bits.

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "few.cuh"

namespace eekd {
namespace {

constexpr int kMaxRanks = 8;    // blocks in a cluster that every GPU with clusters can have
constexpr int kMostRanks = 16;  // that some can have, where they are asked for
constexpr int64_t kMaxRows = 1 << 30;
constexpr int kSplitColumns = 4096;  // that a block keeps where a row is split because rows are few

// What of a row stays on chip between the visits.
enum class Keep {
  nothing,
  lines,    // all M + 1 lines of logits
  mixture,  // logit fusion, weights that do not learn: the mixed line as T, and the student's logits
};

struct Launch {
  Keep keep;
  int ranks, columns;  // blocks per row; columns of each but the last
  int threads, rows_per_block, shared, line_bytes;
  bool soft;  // labels
};

// Where the parts of a row lie in shared memory, in bytes.
struct Layout {
  int statistics, sums, lines, pitch, mixture, size;  // pitch: from line to line
};
template <class T>
__host__ __device__ Layout layout(const Launch& l, int snapshots) {
  const auto round = [](int n) { return (n + 15) / 16 * 16; };
  const int warps = l.threads / 32;
  Layout at;
  at.statistics = round(sizeof(Row<T>));
  at.sums = at.statistics + round((snapshots + 2) * warps * sizeof(SoftmaxSum<T>));
  at.lines = at.sums + round((l.soft ? 3 * snapshots + 4 : 2 * snapshots + 1) * warps * sizeof(T));
  at.pitch = round(l.line_bytes + 15);
  at.mixture = at.lines + (l.keep == Keep::lines ? snapshots + 1 : l.keep == Keep::mixture ? 1 : 0) * at.pitch;
  at.size = at.mixture;
  if (l.keep == Keep::mixture) {  // of whole vectors for every thread
    const int stretch = l.threads * kWidth;
    at.size += (l.columns + stretch - 1) / stretch * stretch * static_cast<int>(sizeof(T));
  }
  return at;
}

// A line of logits of one row, in shared or global memory.
struct Line {
  const void* data;
  DType dtype;
};

// One row, or a block's slice of it. E is the type of all logits, or Any. Columns are counted from the slice's first.
template <class T, class E, Order order, Keep keep, bool soft>
struct Kernel : RowKernel<T> {
  using RowKernel<T>::a, RowKernel<T>::group, RowKernel<T>::b, RowKernel<T>::snapshots, RowKernel<T>::row_scale;
  using RowKernel<T>::has_ce, RowKernel<T>::by_kl, RowKernel<T>::by_label, RowKernel<T>::beta, RowKernel<T>::tau;
  using RowKernel<T>::k, RowKernel<T>::row;
  static constexpr int width = std::is_same_v<E, Any> ? 4 : kWidth;
  // Lines that a thread reads at once: loads to wait for together, as many as there are registers for.
  static constexpr int together = sizeof(T) == 8 ? 1 : order == Order::vectors ? 4 : 2;

  const int64_t begin;
  const int columns;
  const Layout at;
  char* const shared;
  SoftmaxSum<T>* const statistics;  // [line][warp]
  T* const sums;                    // [2 j][warp], then kl [warp]; of soft labels then [j][warp], three [warp]

  __device__ Kernel(const EnsembleKD& a, Group group, int64_t b, const Launch& l, char* shared, T row_scale)
      : RowKernel<T>(a, group, b, *reinterpret_cast<Row<T>*>(shared), row_scale),
        begin(static_cast<int64_t>(group.rank) * l.columns),
        columns(static_cast<int>(max(int64_t(0), min(a.classes - begin, int64_t(l.columns))))),
        at(layout<T>(l, static_cast<int>(a.snapshots))),
        shared(shared),
        statistics(reinterpret_cast<SoftmaxSum<T>*>(shared + at.statistics)),
        sums(reinterpret_cast<T*>(shared + at.sums)) {}

  // Line j: of a used snapshot, or of the student where j == used.
  __device__ const Matrix& matrix(int j) const { return j < row.used ? a.snapshot[row.id[j]] : a.student; }
  __device__ const char* source(int j) const {
    const Matrix& x = matrix(j);
    return static_cast<const char*>(x.data) + b * x.stride * bytes_of(x.dtype);
  }
  __device__ Line line(int j) const {
    const char* const data = source(j) + begin * bytes_of(matrix(j).dtype);
    if constexpr (keep == Keep::nothing) return {data, matrix(j).dtype};
    if (keep == Keep::mixture && j < row.used) return {data, matrix(j).dtype};
    const char* const first = shared + at.lines + (keep == Keep::lines ? j * at.pitch : 0);
    return {first + (reinterpret_cast<uintptr_t>(data) & 15), matrix(j).dtype};
  }

  __device__ void copy_lines() {
    for (int j = keep == Keep::lines ? 0 : row.used; j <= row.used; ++j)
      copy_line(group, shared + at.lines + (keep == Keep::lines ? j * at.pitch : 0),
                source(j) + begin * static_cast<int>(sizeof(E)), columns * static_cast<int>(sizeof(E)));
    arrived();
    group.sync();
  }

  // A thread's columns begin at first() + i stretch().
  static constexpr bool apart = order == Order::apart;
  __device__ int first() const { return group.thread * (apart ? 1 : width); }
  __device__ int step() const { return apart ? group.threads : 1; }
  __device__ int stretch() const { return group.threads * width; }

  __device__ void read(Line line, int c, T (&x)[width]) const {
    if constexpr (order == Order::vectors) {
      if (c < columns) {
        const auto v = *reinterpret_cast<const Vector<E, width>*>(static_cast<const E*>(line.data) + c);
#pragma unroll
        for (int u = 0; u < width; ++u) x[u] = widen(v.x[u]);
      } else {
#pragma unroll
        for (int u = 0; u < width; ++u) x[u] = -std::numeric_limits<T>::infinity();
      }
    } else {
#pragma unroll
      for (int u = 0; u < width; ++u) {
        const int i = c + u * step();
        x[u] = i < columns ? load<T, E>(line.data, line.dtype, i) : -std::numeric_limits<T>::infinity();
      }
    }
  }

  __device__ void write(int c, const T (&x)[width]) const {
    const int64_t at = b * a.classes + begin + c;
    if constexpr (order == Order::vectors) {
      if (c >= columns) return;
      Vector<E, width> v;
#pragma unroll
      for (int u = 0; u < width; ++u) v.x[u] = narrow<E>(x[u]);
      *reinterpret_cast<Vector<E, width>*>(static_cast<E*>(a.d_student) + at) = v;
    } else {
#pragma unroll
      for (int u = 0; u < width; ++u)
        if (c + u * step() < columns) store<E>(a.d_student, a.student.dtype, at + u * step(), x[u]);
    }
  }

  // The soft labels y of columns, 0 beyond the last.
  __device__ void read_labels(int c, T (&y)[width]) const {
    const Matrix& labels = a.label_weights;
#pragma unroll
    for (int u = 0; u < width; ++u) {
      const int i = c + u * step();
      y[u] = i < columns ? load<T, Any>(labels.data, labels.dtype, b * labels.stride + begin + i) : T(0);
    }
  }
  // A slot's sum, of one number per warp.
  __device__ void give(int slot, T x) {
    x = warp_sum(x);
    if (group.lane() == 0) sums[slot * group.warps() + group.warp()] = x;
  }
  __device__ int slot_of_labels() const { return 3 * snapshots + 1; }  // Σ y (s - largest), Σ y log p, Σ y

  // The mixed line in shared memory, so that neighbouring threads meet neighbouring banks; only its thread reads it.
  __device__ T* mixed(int c) const { return reinterpret_cast<T*>(shared + at.mixture) + (c - first()) + group.thread; }

  // x = Σ_j w_j z_j
  __device__ void mix(int c, T (&x)[width]) const {
#pragma unroll
    for (int u = 0; u < width; ++u) x[u] = 0;
#pragma unroll together
    for (int j = 0; j < row.used; ++j) {
      T z[width];
      read(line(j), c, z);
#pragma unroll
      for (int u = 0; u < width; ++u) x[u] += row.w[j] * z[u];
    }
  }

  __device__ void add_up(int slot, SoftmaxSum<T> s, T k) {
    s = warp_sum(s, k);
    if (group.lane() == 0) statistics[slot * group.warps() + group.warp()] = s;
  }

  // The first visit.
  __device__ void find_statistics() {
    const bool probability = a.fusion == Fusion::probability;
    const int targets = probability ? row.used : 1;
    SoftmaxSum<T> at_tau = SoftmaxSum<T>::none(), hard = at_tau;
    const auto absorb_student = [&](const T(&x)[width]) {
      absorb(at_tau, x, k);
      if (has_ce) absorb(hard, x, T(kLog2e));
    };
    if (probability) {
      for (int j = 0; j < row.used; j += together) {
        SoftmaxSum<T> s[together];
#pragma unroll
        for (int i = 0; i < together; ++i) s[i] = SoftmaxSum<T>::none();
        for (int c = first(); c < columns; c += stretch()) {
          T x[together][width], student[width];
          if (j == 0) read(line(row.used), c, student);
#pragma unroll
          for (int i = 0; i < together; ++i)
            if (j + i < row.used) read(line(j + i), c, x[i]);
          if (j == 0) absorb_student(student);
#pragma unroll
          for (int i = 0; i < together; ++i)
            if (j + i < row.used) absorb(s[i], x[i], k);
        }
#pragma unroll
        for (int i = 0; i < together; ++i)
          if (j + i < row.used) add_up(j + i, s[i], k);
      }
    } else {
      SoftmaxSum<T> s = SoftmaxSum<T>::none();
      for (int c = first(); c < columns; c += stretch()) {
        T x[width], student[width];
        read(line(row.used), c, student);
        mix(c, x);
        if constexpr (keep == Keep::mixture) {
#pragma unroll
          for (int u = 0; u < width; ++u) mixed(c)[u * group.threads] = x[u];
        }
        absorb_student(student);
        absorb(s, x, k);
      }
      add_up(0, s, k);
    }
    add_up(targets, at_tau, k);
    add_up(targets + 1, hard, T(kLog2e));
    if constexpr (soft) {
      T label_sum = 0;
      for (int c = first(); c < columns; c += stretch()) {
        T y[width];
        read_labels(c, y);
#pragma unroll
        for (int u = 0; u < width; ++u) label_sum += y[u];
      }
      give(slot_of_labels() + 2, label_sum);
    }
    group.sync();
    if constexpr (soft)
      if (group.thread == 0) add_warps(slot_of_labels() + 2);
    const auto scale = [&](int j) { return j == targets + 1 ? T(kLog2e) : k; };
    for (int j = group.thread; j < targets + 2; j += group.threads) {
      SoftmaxSum<T>* const s = statistics + j * group.warps();
      for (int i = 1; i < group.warps(); ++i) merge(s[0], s[i], scale(j));
    }
    group.sync_blocks();
    for (int j = group.thread; j < targets + 2; j += group.threads) {
      SoftmaxSum<T> s = group.of(0, statistics[j * group.warps()]);
      for (int i = 1; i < group.ranks; ++i) merge(s, group.of(i, statistics[j * group.warps()]), scale(j));
      if (j < targets) {
        row.target[j] = s;
        row.scale[j] = (probability ? row.w[j] : T(1)) / s.sum;
      } else {
        (j == targets ? row.soft : row.hard) = s;
      }
    }
    if constexpr (soft)
      if (group.thread == 0) row.label_sum = total(slot_of_labels() + 2);
    group.sync();
  }

  // The sums of a slot: over the warps, to the first of them; over the blocks.
  __device__ void add_warps(int slot) {
    T* const parts = sums + slot * group.warps();
    for (int i = 1; i < group.warps(); ++i) parts[0] += parts[i];
  }
  __device__ T total(int slot) const {
    T sum = 0;
    for (int i = 0; i < group.ranks; ++i) sum += group.of(i, sums[slot * group.warps()]);
    return sum;
  }

  // The second visit.
  __device__ void differentiate() {
    const bool probability = a.fusion == Fusion::probability;
    const T inverse = 1 / tau, student_max = finite(row.soft.max), log_soft = log(row.soft.sum);
    const T target_max = finite(row.target[0].max), log_target = log(row.target[0].sum);  // logit
    const T soft_scale = 1 / row.soft.sum, d_kl = row_scale * beta * tau;
    const T ce = row_scale * static_cast<T>(a.alpha);
    T hard_scale = has_ce ? ce / row.hard.sum : T(0);
    if constexpr (soft) hard_scale *= row.label_sum;
    const int y = has_ce && !soft ? static_cast<int>(a.labels[b] - begin) : -1;  // the row is NaN if it is no class
    const bool attends = keep != Keep::mixture && (by_kl || (by_label && (soft || !probability)));
    T* const mean = sums + group.warp();
    T* const moved = mean + snapshots * group.warps();
    for (int j = group.lane() & 15; j < row.used; j += 16) (group.lane() < 16 ? mean : moved)[j * group.warps()] = 0;
    __syncwarp();
    if constexpr (soft) {
      T* const shares = sums + (2 * snapshots + 1) * group.warps() + group.warp();
      for (int j = group.lane(); j < row.used; j += 32) shares[j * group.warps()] = 0;
      __syncwarp();
    }
    T kl = 0, label_log_q = 0, label_log_p = 0;
    for (int done = 0; done < columns; done += stretch()) {  // the same for all threads of a warp
      const int c = first() + done;
      T s[width], p[width], x[width], r[width];
      [[maybe_unused]] T label[width];
      const auto logit = [&](int u) {
        return [this, i = c + u * step()](int j) { return load<T, E>(line(j).data, line(j).dtype, i); };
      };
      if constexpr (soft) read_labels(c, label);
      read(line(row.used), c, s);
      if (probability) {
#pragma unroll
        for (int u = 0; u < width; ++u) p[u] = 0;
#pragma unroll together
        for (int j = 0; j < row.used; ++j) {
          read(line(j), c, x);
          const T max = finite(row.target[j].max), scale = row.scale[j];
#pragma unroll
          for (int u = 0; u < width; ++u) p[u] += scale * fast_exp2((x[u] - max) * k);
        }
      } else {
        if constexpr (keep == Keep::mixture) {
#pragma unroll
          for (int u = 0; u < width; ++u)
            x[u] = c < columns ? mixed(c)[u * group.threads] : -std::numeric_limits<T>::infinity();
        } else {
          mix(c, x);
        }
#pragma unroll
        for (int u = 0; u < width; ++u) p[u] = row.scale[0] * fast_exp2((x[u] - target_max) * k);
      }
      if constexpr (soft) {
#pragma unroll
        for (int u = 0; u < width; ++u) {
          if (label[u] == 0) continue;  // 0 times -inf is 0
          label_log_q += label[u] * (s[u] - student_max);
          if (!probability) {
            label_log_p += label[u] * (x[u] - target_max) * inverse;
          } else if (!(p[u] < std::numeric_limits<T>::min())) {  // or NaN
            label_log_p += label[u] * log(p[u]);
          } else {
            label_log_p += label[u] * this->log_of_tiny(logit(u));
          }
        }
      }
#pragma unroll
      for (int u = 0; u < width; ++u) {
        const T log_q = (s[u] - student_max) * inverse - log_soft;
        const T log_p = probability ? T(kLn2) * fast_log2(max(p[u], std::numeric_limits<T>::min()))
                                    : (x[u] - target_max) * inverse - log_target;
        r[u] = p[u] > 0 ? log_p - log_q : T(0);
        kl += p[u] * r[u];
        T d = d_kl * (soft_scale * fast_exp2((s[u] - student_max) * k) - p[u]);
        const T of_label = soft ? label[u] * ce : c + u * step() == y ? ce : T(0);
        if (has_ce) d += hard_scale * fast_exp2((s[u] - student_max) * T(kLog2e)) - of_label;
        s[u] = d;
      }
      if (a.d_student) write(c, s);
      for (int j = 0; attends && j < row.used; ++j) {
        read(line(j), c, x);
        const T max = finite(row.target[j].max);
        T share = 0, share_moved = 0;
        [[maybe_unused]] T share_label = 0;
#pragma unroll
        for (int u = 0; u < width; ++u) {
          if (probability) {
            share_moved += fast_exp2((x[u] - max) * k) * r[u];
          } else if (p[u] > 0) {  // a masked z meets p = 0
            share += p[u] * (x[u] - target_max);
            share_moved += p[u] * r[u] * (x[u] - target_max);
          }
          if constexpr (soft) {
            if (label[u] == 0) continue;
            if (!probability)
              share_label += label[u] * (x[u] - target_max);
            else if (!(p[u] < std::numeric_limits<T>::min()))
              share_label += label[u] * (row.w[j] - row.scale[j] * fast_exp2((x[u] - max) * k) / p[u]);
            else
              share_label += label[u] * (row.w[j] - this->share_of_tiny(j, logit(u)));
          }
        }
        if constexpr (soft) {
          share_label = warp_sum(share_label);
          if (group.lane() == 0) sums[(2 * snapshots + 1 + j) * group.warps() + group.warp()] += share_label;
        }
        const T sum = warp_sums(share, share_moved);
        if (group.lane() == 0) mean[j * group.warps()] += sum;
        if (group.lane() == 16) moved[j * group.warps()] += sum;
      }
    }
    give(2 * snapshots, kl);
    if constexpr (soft) {
      give(slot_of_labels(), label_log_q);
      give(slot_of_labels() + 1, label_log_p);
    }
    group.sync();
    const int slots = soft ? slot_of_labels() + 2 : 2 * snapshots + 1;
    for (int slot = group.thread; slot < slots; slot += group.threads) add_warps(slot);
    group.sync();
    group.sync_blocks();
    if (group.rank == 0) {
      for (int j = group.thread; j < row.used; j += group.threads) {
        row.mean[j] = total(j);
        row.moved[j] = total(snapshots + j) / (probability ? row.target[j].sum : T(1));
      }
      if (group.thread == 0) row.kl = total(2 * snapshots);
      if constexpr (soft) {
        for (int j = group.thread; j < row.used; j += group.threads) row.label[j] = total(2 * snapshots + 1 + j);
        if (group.thread == 0) {
          row.log_q = total(slot_of_labels());
          row.log_p = total(slot_of_labels() + 1);
        }
      }
    }
    group.sync();
    group.sync_blocks();  // the shared memory of a block that has ended is gone
  }

  __device__ void run() {
    this->weigh();
    if constexpr (keep != Keep::nothing) copy_lines();
    find_statistics();
    differentiate();
    if (group.rank) return;
    this->template finish<soft>([&](int j, int64_t y) { return load<T, E>(source(j), matrix(j).dtype, y); });
  }
};

template <class T, class E, Order order, Keep keep, bool soft>
__global__ void __launch_bounds__(kMaxThreads, 2)
    rows_kernel(const __grid_constant__ EnsembleKD a, Launch l, bool mean, const int* count) {
  static_assert(sizeof(EnsembleKD) + sizeof(Launch) <= 4096 - 64, "what a kernel's parameters may take");
  char* const shared = shared_memory();
  const T scale = scale_of_rows<T>(a, mean, count, shared);
  const int row_in_block = static_cast<int>(threadIdx.x) / l.threads;
  const int64_t b = static_cast<int64_t>(blockIdx.x / l.ranks) * l.rows_per_block + row_in_block;
  if (b >= a.rows) return;
  const int rank = static_cast<int>(blockIdx.x % l.ranks);
  const Group group{static_cast<int>(threadIdx.x) % l.threads, l.threads, rank, l.ranks};
  char* const own = shared + row_in_block * (l.shared / l.rows_per_block);
  Kernel<T, E, order, keep, soft> kernel(a, group, b, l, own, scale_of_row(a, b, scale));
  if (ignored(a, b))
    kernel.write_zeros(kernel.begin, kernel.columns);
  else
    kernel.run();
}

// A warp, a block or a cluster per row. Neither this nor the order of columns depends on where the tensors lie, so
// neither do the bits.
template <class T>
Launch launch(const EnsembleKD& a, int snapshots, int itemsize, const Device& device) {
  const int classes = static_cast<int>(a.classes);
  const auto with = [&](Keep keep, int ranks, int budget) {
    Launch l{};
    l.soft = a.label_weights.data;
    l.keep = keep;
    l.ranks = ranks;
    // Whole vectors, and some for the last: C is beyond 1024 here.
    l.columns = ranks == 1 ? classes : ((classes + ranks - 1) / ranks + kWidth - 1) / kWidth * kWidth;
    l.threads = ranks == 1 && classes <= kWarpColumns ? 32 : l.columns <= 4096 ? 128 : kMaxThreads;
    l.line_bytes = keep == Keep::nothing ? 0 : l.columns * itemsize;
    for (l.rows_per_block = l.threads == 32 ? kWarpsPerBlock : 1;; l.rows_per_block /= 2) {
      l.shared = l.rows_per_block * layout<T>(l, snapshots).size;
      if (l.shared <= budget || l.rows_per_block == 1) return l;
    }
  };
  const int half = half_of(device);
  const bool may_mix = !a.label_weights.data && a.fusion == Fusion::logit && !a.d_scores && !a.d_query;
  const auto choose = [&] {
    if (itemsize && a.classes * itemsize < device.shared * int64_t(device.ranks))
      for (int budget : {half, device.shared})
        for (Keep keep : {Keep::lines, Keep::mixture})
          for (int ranks = budget == half ? 1 : device.ranks; ranks <= device.ranks; ranks *= 2)
            if (keep == Keep::lines || may_mix)
              if (const Launch l = with(keep, ranks, budget); l.shared <= budget) return l;
    return with(Keep::nothing, 1, device.shared);
  };
  Launch l = choose();
  while (2 * l.ranks <= device.ranks && l.columns >= 2 * kSplitColumns &&
         a.rows * 2 * l.ranks <= device.multiprocessors)
    l = with(l.keep, 2 * l.ranks, device.shared);
  return l;
}

Order order(const EnsembleKD& a, int itemsize) {
  if (a.classes % kWidth) return Order::apart;
  uintptr_t bits = reinterpret_cast<uintptr_t>(a.d_student);
  const auto add = [&](const Matrix& x) { bits |= reinterpret_cast<uintptr_t>(x.data) | x.stride * itemsize; };
  add(a.student);
  for (int64_t m = 0; m < a.snapshots; ++m) add(a.snapshot[m]);
  return bits % 16 ? Order::neighbours : Order::vectors;
}

// The kernels of few snapshots, of which some numbers have one of their own; the others take the next, and lines of 0.
constexpr int kFewOf[] = {1, 2, 3, 4, 5, 8};
int padded(int64_t snapshots) {
  for (int few : kFewOf)
    if (snapshots <= few) return few;
  return static_cast<int>(snapshots);
}

// A row of more columns than half of a multiprocessor's registers hold is split where there are clusters, so that two
// rows are under way. No ranks: it does not fit.
FewLaunch few_launch(const EnsembleKD& a, int few, int itemsize, bool aligned, const Device& device) {
  FewLaunch l{};
  l.alpha = static_cast<float>(a.alpha);
  l.beta = static_cast<float>(a.labels ? 1 - a.alpha : 1);
  l.tau = static_cast<float>(a.temperature);
  l.k = static_cast<float>(kLog2e / a.temperature);
  const auto round = [](int64_t n, int to) { return (n + to - 1) / to * to; };
  struct Limits {
    int ranks, threads;
  };
  for (const Limits most : {Limits{device.ranks, kFewThreads / 2},
                            {device.ranks, kFewThreads},
                            {device.ranks == kMaxRanks ? kMostRanks : device.ranks, kFewThreads}})
    for (int ranks = 1; ranks <= most.ranks; ranks *= 2) {
      const int64_t columns = ranks == 1 ? a.classes : round((a.classes + ranks - 1) / ranks, kWidth);
      const int64_t threads = round((columns + few_chunks(few) * kWidth - 1) / (few_chunks(few) * kWidth), 32);
      if (threads > most.threads || (ranks - 1) * columns >= a.classes) continue;
      l.columns = static_cast<int>(columns);
      l.threads = static_cast<int>(threads);
      l.pitch = static_cast<int>(round(round(columns, kWidth) * itemsize + 4, 16));
      for (l.blocks = kFewThreads / l.threads; l.blocks; l.blocks /= 2)
        for (l.stages = 2; l.stages; --l.stages) {
          l.ranks = ranks;
          l.aligned = false;  // what fits does not depend on it
          l.at = few_layout(l, few, few_slots(few, a.fusion));
          if (l.at.size > std::min(device.shared, device.shared_of_all_blocks / l.blocks - 1024)) continue;
          l.aligned = aligned;
          l.bulk = aligned && device.major >= 9;
          l.at = few_layout(l, few, few_slots(few, a.fusion));
          return l;
        }
    }
  l.ranks = 0;
  return l;
}

template <class T, class E>
struct Kernels {
  using Pointer = void (*)(EnsembleKD, Launch, bool, const int*);
  using FewPointer = void (*)(EnsembleKD, FewLaunch, bool, const int*);
  static constexpr bool any = std::is_same_v<E, Any>, has_few = std::is_same_v<T, float> && !any;

  // Of as many snapshots, or null.
  template <int i = 0>
  static FewPointer get_few(Fusion fusion, int snapshots) {
    if constexpr (has_few && i < std::size(kFewOf)) {
      constexpr int M = kFewOf[i];
      if (snapshots == M)
        return fusion == Fusion::logit ? few_rows_kernel<E, M, Fusion::logit>
                                       : few_rows_kernel<E, M, Fusion::probability>;
      return get_few<i + 1>(fusion, snapshots);
    }
    return nullptr;
  }

  static Pointer get(Order order, Keep keep, bool soft) {
    return soft ? get<true>(order, keep) : get<false>(order, keep);
  }
  template <bool soft>
  static Pointer get(Order order, Keep keep) {
    if constexpr (!any) {
      if (keep == Keep::lines)
        return order == Order::apart ? rows_kernel<T, E, Order::apart, Keep::lines, soft>
                                     : rows_kernel<T, E, Order::vectors, Keep::lines, soft>;
      if constexpr (!soft)
        if (keep == Keep::mixture)
          return order == Order::apart ? rows_kernel<T, E, Order::apart, Keep::mixture, soft>
                                       : rows_kernel<T, E, Order::vectors, Keep::mixture, soft>;
      if (order == Order::vectors) return rows_kernel<T, E, Order::vectors, Keep::nothing, soft>;
      if (order == Order::neighbours) return rows_kernel<T, E, Order::neighbours, Keep::nothing, soft>;
    }
    return rows_kernel<T, E, Order::apart, Keep::nothing, soft>;
  }

  static cudaError_t prepare(Device& d) {
    for (Order order : {Order::apart, Order::neighbours, Order::vectors})
      for (Keep keep : {Keep::nothing, Keep::lines, Keep::mixture})
        for (bool soft : {false, true}) {
          const auto set = [&](cudaFuncAttribute attribute, int value) {
            return cudaFuncSetAttribute(get(order, keep, soft), attribute, value);
          };
          if (cudaError_t error = set(cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared)) return error;
          if (keep == Keep::nothing || any) continue;  // these want a cache instead
          if (cudaError_t error = set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))
            return error;
        }
    for (Fusion fusion : {Fusion::probability, Fusion::logit})
      for (int few : kFewOf) {
        const FewPointer kernel = get_few(fusion, few);
        if (!kernel) continue;
        const auto set = [&](cudaFuncAttribute attribute, int value) {
          return cudaFuncSetAttribute(kernel, attribute, value);
        };
        if (cudaError_t error = set(cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared)) return error;
        if (cudaError_t error = set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))
          return error;
        if (d.major < 9) continue;
        if (cudaError_t error = set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return error;
      }
    // A GPU that is shared out in parts may have room for smaller clusters only, or for none.
    for (int ranks = kMaxRanks; d.major >= 9 && ranks > 1 && d.ranks == 1; ranks /= 2)
      if (clusters_at_once(get(Order::apart, Keep::lines, false), ranks, kMaxThreads, d.shared)) d.ranks = ranks;
    return cudaSuccess;
  }

  // `sums`: null where each row's losses are wanted, else how many numbers they become.
  static cudaError_t run(const EnsembleKD& a, bool mean, const int* count, int64_t* sums, cudaStream_t stream) {
    Device device;
    if (cudaError_t error = device_in_use(device, [](Device& d) { return prepare(d); })) return error;
    const int itemsize = any ? 0 : sizeof(E);
    const Order o = any ? Order::apart : order(a, itemsize);
    const bool soft = a.label_weights.data;
    const FewPointer few = soft ? nullptr : get_few(a.fusion, padded(a.snapshots));
    if (few) {
      FewLaunch l = few_launch(a, padded(a.snapshots), itemsize, o == Order::vectors, device);
      const int64_t clusters = l.ranks == 0   ? 0
                               : l.ranks == 1 ? l.blocks * device.multiprocessors
                                              : clusters_at_once(few, l.ranks, l.threads, l.at.size);
      if (clusters) {
        if (a.rows > kMaxRows) return cudaErrorInvalidConfiguration;
        const int64_t at_once = std::min(a.rows, clusters);
        l.sums = sums;
        if (sums) *sums = at_once;
        return launch_kernel(few, at_once * l.ranks, l.ranks, l.threads, l.at.size, stream, a, l, mean, count);
      }
    }
    Launch l = launch<T>(a, static_cast<int>(a.snapshots), itemsize, device);
    if (o == Order::neighbours) l.keep = Keep::nothing, l.line_bytes = 0;
    const int64_t blocks = (a.rows + l.rows_per_block - 1) / l.rows_per_block * l.ranks;
    return launch_kernel(get(o, l.keep, soft), blocks, l.ranks, l.threads * l.rows_per_block, l.shared, stream, a, l,
                         mean, count);
  }
};

}  // namespace

template <class T>
const char* ensemble_kd_fwd_cuda(const EnsembleKD& args, bool mean, void* loss, void* attention_loss, int* count,
                                 void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  bool same = true;
  for (int64_t m = 0; m < args.snapshots; ++m) same &= args.snapshot[m].dtype == args.student.dtype;
  return launch_all<T>(args, mean, loss, attention_loss, count, stream,
                       [&](const int* counted, int64_t& sums) -> cudaError_t {
    const bool summed = loss;
    if constexpr (std::is_same_v<T, double>) {
      return Kernels<T, Any>::run(args, mean, counted, summed ? &sums : nullptr, stream);
    } else {
      if (!same) return Kernels<T, Any>::run(args, mean, counted, summed ? &sums : nullptr, stream);
      switch (args.student.dtype) {
        case DType::f32: return Kernels<T, float>::run(args, mean, counted, summed ? &sums : nullptr, stream);
        case DType::bf16: return Kernels<T, __nv_bfloat16>::run(args, mean, counted, summed ? &sums : nullptr, stream);
        default: return Kernels<T, __half>::run(args, mean, counted, summed ? &sums : nullptr, stream);
      }
    }
  });
}

template const char* ensemble_kd_fwd_cuda<float>(const EnsembleKD&, bool, void*, void*, int*, void*);
template const char* ensemble_kd_fwd_cuda<double>(const EnsembleKD&, bool, void*, void*, int*, void*);

}  // namespace eekd
