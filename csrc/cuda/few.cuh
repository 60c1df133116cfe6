// Rows of few snapshots whose lines stay on chip: the loops that most calls spend their time in, with the number of
// snapshots and the fusion known to the compiler, so that what is the same for all columns is in registers.
//
// Exponentials are taken relative to the largest of a line's first eight logits, the same for all threads, so sums
// simply add up. Where that is too far from the row's largest (a sum is not a moderate number, so that an
// exponent is rounded by too much), the statistics are found once more, carefully.
#pragma once

#include "rows.cuh"

namespace eekd {

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
  bool aligned;        // of 16 bytes is every line, and whole vectors
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
  at.lines = at.sums + round((2 * snapshots + 1) * warps * sizeof(T));
  at.pitch = round(l.line_bytes + 15);
  at.mixture = at.lines + (l.keep == Keep::lines ? snapshots + 1 : l.keep == Keep::mixture ? 1 : 0) * at.pitch;
  at.size = at.mixture;
  if (l.keep == Keep::mixture) {  // of whole vectors for every thread
    const int stretch = l.threads * kWidth;
    at.size += (l.columns + stretch - 1) / stretch * stretch * static_cast<int>(sizeof(T));
  }
  return at;
}

// The sums over a warp of n numbers, a power of 2; that of x[i] in the lanes from 32 / n * i.
template <int n, int bit = 16>
__device__ inline float warp_sums(const float (&x)[n]) {
  if constexpr (n > 1) {
    const bool upper = threadIdx.x & bit;
    float y[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i)
      y[i] = (upper ? x[i + n / 2] : x[i]) + __shfl_xor_sync(kAllLanes, upper ? x[i] : x[i + n / 2], bit);
    return warp_sums<n / 2, bit / 2>(y);
  } else {
    float y = x[0];
#pragma unroll
    for (int i = bit; i; i /= 2) y += __shfl_xor_sync(kAllLanes, y, i);
    return y;
  }
}

// One row, or a block's slice of it. Columns are counted from the slice's first. Line j is of used snapshot j, line M
// the student's; those of snapshots that are not used are 0, as are their weights.
template <class E, int M, Fusion fusion>
struct FewKernel : RowKernel<float> {
  static constexpr int width = kWidth;
  static constexpr bool probability = fusion == Fusion::probability;
  static constexpr int targets = probability ? M : 1;
  static constexpr int slots = M <= 2 ? 4 : M <= 6 || !probability ? 8 : 16;  // for targets + 2 sums
  static constexpr int some = M == 1 ? 1 : M == 2 ? 2 : M <= 4 ? 4 : 8;       // for M
  static constexpr float kInf = std::numeric_limits<float>::infinity();

  const int64_t begin;
  const int columns;
  const bool aligned;
  const Layout at;
  float* const sums;       // [slot][warp], of the first visit
  float* const sums_next;  // likewise, of the second: other blocks may be slow to read the first
  E* const lines;
  const int pitch;                      // in elements

  __device__ FewKernel(const EnsembleKD& a, Group group, int64_t b, const Launch& l, char* shared, float row_scale)
      : RowKernel<float>(a, group, b, *reinterpret_cast<Row<float>*>(shared), row_scale),
        begin(static_cast<int64_t>(group.rank) * l.columns),
        columns(static_cast<int>(min(a.classes - begin, int64_t(l.columns)))),
        aligned(l.aligned),
        at(layout<float>(l, M)),
        sums(reinterpret_cast<float*>(shared + at.statistics)),
        sums_next(reinterpret_cast<float*>(shared + at.sums)),
        lines(reinterpret_cast<E*>(shared + at.lines)),
        pitch(at.pitch / static_cast<int>(sizeof(E))) {}

  __device__ const E* source(int j) const {
    const Matrix& x = j < M ? a.snapshot[row.id[j]] : a.student;
    return static_cast<const E*>(x.data) + b * x.stride;
  }

  // Lines begin at a multiple of 16 bytes here, wherever they lie in memory, and end in whole vectors.
  __device__ void copy_lines() {
    const int whole = (columns + width - 1) / width * width;
#pragma unroll 1
    for (int j = 0; j <= M; ++j) {
      E* const to = lines + j * pitch;
      if (j >= row.used && j < M) {
#pragma unroll 1
        for (int c = group.thread; c < whole; c += group.threads) to[c] = narrow<E>(0.0f);
      } else if (aligned) {
        copy_line(group, reinterpret_cast<char*>(to), reinterpret_cast<const char*>(source(j) + begin),
                  columns * static_cast<int>(sizeof(E)));
      } else {
        const E* const from = source(j) + begin;
#pragma unroll 8
        for (int c = group.thread; c < columns; c += group.threads) to[c] = from[c];
        if (group.thread < whole - columns) to[columns + group.thread] = narrow<E>(-kInf);
      }
    }
  }

  // What exponentials are relative to: the largest of a line's first eight, of the row's first block.
  __device__ void find_bases() {
    if (group.warp() == 0) {
      const int lane = group.lane(), c = lane & 7;
      const auto at_least = [&](float x) {
#pragma unroll
        for (int i = 4; i; i >>= 1) {
          const float other = __shfl_xor_sync(kAllLanes, x, i);
          x = other > x ? other : x;
        }
        return finite(x);
      };
      float mixed = 0;
#pragma unroll
      for (int first = 0; first <= M; first += 4) {
        const int j = first + lane / 8;
        const bool is_target = j < row.used;
        const float x = (is_target || j == M) && c < a.classes ? widen(source(j)[c]) : -kInf;
        if (!probability && is_target) mixed += row.w[j] * x;
        const float largest = at_least(x);
        if (c == 0 && (probability ? is_target : false)) row.target[j].max = largest;
        if (c == 0 && j == M) row.soft.max = row.hard.max = largest;
      }
      if (!probability) {
        mixed += __shfl_xor_sync(kAllLanes, mixed, 8);
        mixed += __shfl_xor_sync(kAllLanes, mixed, 16);
        mixed = at_least(mixed);
        if (lane == 0) row.target[0].max = mixed;
      }
    }
    if (probability)
      for (int j = row.used + group.thread; j < M; j += group.threads) row.target[j].max = 0;
  }

  __device__ void read(int j, int c, float (&x)[width]) const {
    read_vector(lines + j * pitch + c, x);
  }

  // z = the lines of the targets, and their mixture less its base, from which it starts: so it is rounded when it is small.
  __device__ void mix(int c, const float (&w)[M], float base, float (&z)[M][width], float (&x)[width]) const {
#pragma unroll
    for (int j = 0; j < M; ++j) read(j, c, z[j]);
#pragma unroll
    for (int u = 0; u < width; ++u) {
      x[u] = fma(w[0], z[0][u], -base);
#pragma unroll
      for (int j = 1; j < M; ++j) x[u] = fma(w[j], z[j][u], x[u]);
    }
  }

  __device__ static void add(float& sum, const float (&x)[width], float k, float base) {
#pragma unroll
    for (int u = 0; u < width; ++u) sum += fast_exp2(fma(x[u], k, -base));
  }

  // [slot][warp] becomes [slot][0], in every block.
  __device__ void add_warps(float* sums, int n) {
    if (group.warps() == 1) return group.sync();
    group.sync();
#pragma unroll 1
    for (int slot = group.thread; slot < n; slot += group.threads) {
      float* const parts = sums + slot * group.warps();
#pragma unroll 1
      for (int i = 1; i < group.warps(); ++i) parts[0] += parts[i];
    }
    group.sync();
  }
  __device__ float total(const float* sums, int slot) const {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < group.ranks; ++i) sum += group.of(i, sums[slot * group.warps()]);
    return sum;
  }

  __device__ SoftmaxSum<float>& statistics(int slot) const {
    return slot < targets ? row.target[slot] : slot == targets ? row.soft : row.hard;
  }
  __device__ float scale(int slot) const { return slot == targets + 1 ? float(kLog2e) : k; }

  // The first visit: sums of powers of 2 whose exponents are x k, less what max k is rounded to; of a mixture (x - max) k.
  __device__ void find_statistics() {
    float w[M];
    if constexpr (!probability) {
#pragma unroll
      for (int j = 0; j < M; ++j) w[j] = row.w[j];
    }
    for (bool carefully = false;; carefully = true) {
      float sum[slots] = {}, base[targets];
#pragma unroll
      for (int j = 0; j < targets; ++j) base[j] = finite(row.target[j].max) * (probability ? k : 1.0f);
      const float soft_base = finite(row.soft.max) * k, hard_base = finite(row.hard.max) * float(kLog2e);
      for (int c = group.thread * width; c < columns; c += group.threads * width) {
        if constexpr (probability) {
#pragma unroll
          for (int j = 0; j < M; ++j) {
            float x[width];
            read(j, c, x);
            add(sum[j], x, k, base[j]);
          }
        } else {
          float x[width], z[M][width];
          mix(c, w, base[0], z, x);
#pragma unroll
          for (int u = 0; u < width; ++u) sum[0] += fast_exp2(x[u] * k);
        }
        float s[width];
        read(M, c, s);
        add(sum[targets], s, k, soft_base);
        if (has_ce) add(sum[targets + 1], s, float(kLog2e), hard_base);
      }
      const float mine = warp_sums(sum);
      constexpr int lanes = 32 / slots;
      if (group.lane() % lanes == 0 && group.lane() / lanes < targets + 2)
        sums[group.lane() / lanes * group.warps() + group.warp()] = mine;
      add_warps(sums, targets + 2);
      group.sync_blocks();
      bool moderate = true;
#pragma unroll 1
      for (int j = group.thread; j < targets + 2; j += group.threads) {
        const float s = total(sums, j);
        const bool asked = probability && j < targets ? j < row.used : j <= targets || has_ce;
        if (asked && !(s > 0x1p-32f && s < 0x1p32f)) moderate = false;
        statistics(j).sum = s;
      }
      if (carefully || agreed(moderate)) break;
      find_largest();
    }
#pragma unroll 1
    for (int j = group.thread; probability && j < M; j += group.threads)
      row.scale[j] = j < row.used ? row.w[j] / row.target[j].sum : 0.0f;
    group.sync();
  }

  // Whether it is true of all threads of the row's first warp, which all blocks of a row find alike.
  __device__ bool agreed(bool x) {
    if (group.warp() == 0) {
      const float no = warp_sum(x ? 0.0f : 1.0f);
      if (group.lane() == 0) row.kl = no;
    }
    group.sync();
    return row.kl == 0;
  }

  // As bases, those of the whole row.
  __device__ void find_largest() {
    group.sync_blocks();  // which may still read the sums, whose place the largest take
    const auto larger = [](float a, float b) { return b > a ? b : a; };
#pragma unroll 1
    for (int j = 0; j < targets + 2; ++j) {
      float largest = -kInf;
#pragma unroll 1
      for (int c = group.thread * width; c < columns; c += group.threads * width) {
        float x[width];
        read(j < targets ? j : M, c, x);
        if (!probability && j == 0) {
#pragma unroll
          for (float& u : x) u *= row.w[0];
#pragma unroll 1
          for (int i = 1; i < M; ++i) {
            float z[width];
            read(i, c, z);
#pragma unroll
            for (int u = 0; u < width; ++u) x[u] = fma(row.w[i], z[u], x[u]);
          }
        }
#pragma unroll
        for (float u : x) largest = larger(largest, u);
      }
#pragma unroll
      for (int i = 16; i; i >>= 1) largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, i));
      if (group.lane() == 0) sums[j * group.warps() + group.warp()] = largest;
    }
    group.sync();
#pragma unroll 1
    for (int j = group.thread; j < targets + 2; j += group.threads)
#pragma unroll 1
      for (int i = 1; i < group.warps(); ++i)
        sums[j * group.warps()] = larger(sums[j * group.warps()], sums[j * group.warps() + i]);
    group.sync();
    group.sync_blocks();
#pragma unroll 1
    for (int j = group.thread; j < targets + 2; j += group.threads) {
      float largest = -kInf;
#pragma unroll 1
      for (int i = 0; i < group.ranks; ++i) largest = larger(largest, group.of(i, sums[j * group.warps()]));
      statistics(j).max = largest;
    }
    group.sync();
    group.sync_blocks();
  }

  enum class Attention { fixed, by_label, by_kl };  // what the gradient of the scores needs of the columns

  // What the columns of the second visit have in common. Logarithms are to base 2; those of sums are added at the end.
  struct Constants {
    float soft_base, hard_base, soft_scale, hard_scale, kl_scale;  // of the terms of the student's gradient
    float target[M], base[targets];  // what p_j are times and their exponents' bases; or weights, the mixture's base
    __device__ float gradient(float exp_soft, float exp_hard, float p) const {
      return fma(soft_scale, exp_soft, fma(-kl_scale, p, hard_scale * exp_hard));
    }
  };

  // The gradient of the label's column, which the loop takes for any other: by the thread that has it.
  __device__ void write_label(E* out, int y, float ce, const Constants& x) const {
    if (y < 0 || y >= columns || y / width % group.threads != group.thread) return;
    float p = probability ? 0.0f : -x.base[0], s = widen(source(M)[begin + y]);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      const float z = widen(lines[j * pitch + y]);
      p = fma(x.target[j], probability ? fast_exp2(fma(z, k, -x.base[probability ? j : 0])) : z, p);
    }
    if (!probability) p = fast_exp2(p * k);
    const float exp_soft = fast_exp2(fma(s, k, -x.soft_base));
    const float exp_hard = fast_exp2(fma(s, float(kLog2e), -x.hard_base));
    out[y] = narrow<E>(x.gradient(exp_soft, exp_hard, p) - ce);
  }

  // The second visit.
  template <Attention attention>
  __device__ void differentiate() {
    constexpr bool by_kl = attention == Attention::by_kl;
    const float target_max = finite(row.target[0].max), ce = row_scale * static_cast<float>(a.alpha);
    Constants x;
    x.soft_base = finite(row.soft.max) * k;
    x.hard_base = has_ce ? finite(row.hard.max) * float(kLog2e) : 0.0f;
    x.kl_scale = row_scale * beta * tau / (probability ? 1.0f : row.target[0].sum);
    x.soft_scale = row_scale * beta * tau / row.soft.sum;
    x.hard_scale = has_ce ? ce / row.hard.sum : 0.0f;
#pragma unroll
    for (int j = 0; j < M; ++j) x.target[j] = probability ? row.scale[j] : row.w[j];
#pragma unroll
    for (int j = 0; j < targets; ++j) x.base[j] = finite(row.target[j].max) * (probability ? k : 1.0f);
    // The gradient; where that is not aligned in place of the student's line at first.
    E* const gradient = static_cast<E*>(a.d_student) + b * a.classes + begin;
    E* const out = !a.d_student ? nullptr : aligned ? gradient : lines + M * pitch;
    float kl = 0, mean[some] = {}, moved[some] = {};
    for (int c = group.thread * width; c < columns; c += group.threads * width) {
      // z: logits, or of probability exponentials; p: of probability, or of logit their exponentials
      float s[width], p[width], log_p[width], z[M][width];
      if constexpr (probability) {
#pragma unroll
        for (int j = 0; j < M; ++j) {
          read(j, c, z[j]);
#pragma unroll
          for (int u = 0; u < width; ++u) {
            z[j][u] = fast_exp2(fma(z[j][u], k, -x.base[j]));
            p[u] = j ? fma(x.target[j], z[j][u], p[u]) : x.target[j] * z[j][u];
          }
        }
#pragma unroll
        for (int u = 0; u < width; ++u) log_p[u] = fast_log2(p[u]);
      } else {
        mix(c, x.target, x.base[0], z, p);
#pragma unroll
        for (int u = 0; u < width; ++u) {
          log_p[u] = p[u] * k;
          p[u] = fast_exp2(log_p[u]);
        }
      }
      read(M, c, s);
      float d[width];
      if (has_ce) {
#pragma unroll
        for (int u = 0; u < width; ++u) d[u] = fast_exp2(fma(s[u], float(kLog2e), -x.hard_base));
      } else {
#pragma unroll
        for (float& u : d) u = 0;
      }
#pragma unroll
      for (int u = 0; u < width; ++u) {
        const float log_q = fma(s[u], k, -x.soft_base);
        d[u] = x.gradient(fast_exp2(log_q), d[u], p[u]);
        s[u] = log_p[u] - log_q;
        add_where(p[u], kl, p[u], s[u]);  // s is infinite, or NaN, where both are masked
      }
      if constexpr (attention != Attention::fixed) {
#pragma unroll
        for (int u = 0; u < width; ++u) {
          const float weight = probability ? s[u] : p[u] * s[u];
#pragma unroll
          for (int j = 0; j < M; ++j) {
            const float moving = z[j][u] - (probability ? 0.0f : target_max);
            if constexpr (!probability) add_where(p[u], mean[j], p[u], moving);
            if constexpr (by_kl) add_where(p[u], moved[j], weight, moving);
          }
        }
      }
      if (out) write_vector(out + c, d);
    }
    if (out && has_ce) write_label(out, static_cast<int>(a.labels[b] - begin), ce, x);  // the row is NaN if it is no class
    if (out && !aligned) {
      group.sync();
#pragma unroll 8
      for (int c = group.thread; c < columns; c += group.threads) gradient[c] = out[c];
    }
    const auto keep = [&](float (&x)[some], int first) {
      constexpr int lanes = 32 / some;
      const float mine = warp_sums(x);
      if (group.lane() % lanes == 0 && group.lane() / lanes < M)
        sums_next[(first + group.lane() / lanes) * group.warps() + group.warp()] = mine;
    };
    keep(mean, 0);
    keep(moved, M);
    kl = warp_sum(kl);
    if (group.lane() == 0) sums_next[2 * M * group.warps() + group.warp()] = kl;
    add_warps(sums_next, 2 * M + 1);
    group.sync_blocks();
    if (group.rank == 0) {
      const float log_soft = log2(row.soft.sum), sum = row.target[0].sum;
      const float log_sums = probability ? log_soft : log_soft - log2(sum);
#pragma unroll 1
      for (int j = group.thread; j < row.used; j += group.threads) {
        const float mean = total(sums_next, j) / sum, moved = total(sums_next, M + j);
        row.mean[j] = mean;
        row.moved[j] = float(kLn2) * (probability ? moved / row.target[j].sum + log_sums : moved / sum + log_sums * mean);
      }
      if (group.thread == 0) {
        const float kl = total(sums_next, 2 * M);
        row.kl = float(kLn2) * ((probability ? kl : kl / sum) + log_sums);
      }
    }
    group.sync();
    group.sync_blocks();  // the shared memory of a block that has ended is gone
  }

  __device__ void run() {
    this->weigh();
    for (int j = row.used + group.thread; j < M; j += group.threads) row.w[j] = 0, row.id[j] = 0;
    copy_lines();
    find_bases();
    arrived();
    group.sync();
    find_statistics();
    if (by_kl) differentiate<Attention::by_kl>();
    else if (by_label && !probability) differentiate<Attention::by_label>();
    else differentiate<Attention::fixed>();
    // Sums relative to the largest itself from here on, no longer to what it times k is rounded to; as that of a mixture is.
#pragma unroll 1
    for (int j = group.thread + !probability; j < targets + 2; j += group.threads) {
      const float max = finite(statistics(j).max), base = max * scale(j);
      statistics(j).sum *= fast_exp2(-fma(max, scale(j), -base));
    }
    if (group.rank == 0) this->finish([&](int j, int64_t y) { return widen(source(j < row.used ? j : M)[y]); });
  }
};

template <class E, int M, Fusion fusion>
__global__ void __launch_bounds__(kMaxThreads, M <= 5 ? 2 : 1)  // more snapshots need more than 128 registers
few_rows_kernel(const __grid_constant__ EnsembleKD a, Launch l, bool mean, const int* count) {
  char* const shared = shared_memory();
  const float scale = scale_of_rows<float>(a, mean, count, shared);
  const int row_in_block = static_cast<int>(threadIdx.x) / l.threads;
  const int64_t b = static_cast<int64_t>(blockIdx.x / l.ranks) * l.rows_per_block + row_in_block;
  if (b >= a.rows) return;
  const int rank = static_cast<int>(blockIdx.x % l.ranks);
  const Group group{static_cast<int>(threadIdx.x) % l.threads, l.threads, rank, l.ranks};
  char* const own = shared + row_in_block * (l.shared / l.rows_per_block);
  FewKernel<E, M, fusion> kernel(a, group, b, l, own, scale_of_row(a, b, scale));
  if (ignored(a, b)) kernel.write_zeros(kernel.begin, kernel.columns);
  else kernel.run();
}

}  // namespace eekd
