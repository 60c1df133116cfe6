// Rows of few snapshots: the kernel that most calls run, with the number of snapshots and the fusion known to the
// compiler.
//
// A block, or a cluster of blocks with a slice of the columns each, takes one row after the other. The M + 1 lines of
// the next row are copied to shared memory while this row is computed. Each is read once: traffic M + 2 accesses.
//
// The first visit of a row's columns takes their exponentials and sums them; those of the snapshots stay in registers.
// The second visit makes the loss and the gradients of them. A thread owns the same columns wherever the lines lie in
// memory, and everything is added in a fixed order: the same inputs give the same bits.
//
// Exponentials are taken relative to the largest of a line's first eight logits, so sums simply add up. Where that is
// too far from the row's largest (a sum is not a moderate number, so that an exponent is rounded by too much), the
// first visit is done again relative to the largest.
//
// What is O(M) of a row is done by a warp, a few lanes for each snapshot, so that nothing waits for one thread.
#pragma once

#include "rows.cuh"

namespace eekd {

constexpr int kFewThreads = 256;  // of a multiprocessor, at 255 registers each, and so of a block at most

// Where the parts lie in shared memory, in bytes, after the barriers of copies: what is known of rows before their
// columns, the sums of both visits by warp, those of the block, and the row's largest, each line's first columns, the
// lines, and the gradient before it is written.
struct FewLayout {
  int ahead, sums, sums_next, own, own_next, largest, heads, lines, gradient, size;
};
constexpr int kHead = 48;  // bytes of a line's first columns

struct FewLaunch {
  int ranks, columns;   // blocks per row; columns of each but the last
  int threads, blocks;  // of a block; of a multiprocessor
  int stages;           // rows that are in shared memory at once
  int pitch;            // bytes from line to line
  bool aligned;         // of 16 bytes is every line, and whole vectors
  bool bulk;            // and a thread has the copy of a whole line made, as from sm_90
  bool sums;            // the losses are summed: one number for each block that takes rows, else for each row
  float alpha, beta, tau, k;
  FewLayout at;
};

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

constexpr int few_targets(int snapshots, Fusion fusion) { return fusion == Fusion::probability ? snapshots : 1; }
// Numbers that lanes hold side by side: of the snapshots, or of the sums of the first visit.
constexpr int few_slots(int snapshots, Fusion fusion) {
  const int sums = few_targets(snapshots, fusion) + 2, most = snapshots > sums ? snapshots : sums;
  return most <= 4 ? 4 : most <= 8 ? 8 : 16;
}
constexpr int few_chunks(int snapshots) { return snapshots <= 5 ? 4 : 2; }  // of kWidth columns, that a thread owns

inline FewLayout few_layout(const FewLaunch& l, int snapshots, int slots) {
  const int warps = l.threads / 32, lines = l.stages * (snapshots + 1);
  FewLayout at{};
  at.ahead = 16;
  at.sums = at.ahead + 2 * (slots + 4) * 4;
  at.sums_next = at.sums + slots * warps * 4;
  at.own = at.sums_next + (2 * slots + 1) * warps * 4;
  at.own_next = at.own + slots * 4;
  at.largest = at.own_next + (2 * slots + 1) * 4;
  at.heads = (at.largest + slots * 4 + 15) / 16 * 16;
  at.lines = at.heads + (l.ranks > 1 ? lines * kHead : 0);
  at.gradient = at.lines + lines * l.pitch;
  at.size = at.gradient + (l.aligned ? 0 : l.pitch);
  return at;
}

template <class E, int M, Fusion fusion>
struct FewKernel {
  static constexpr int width = kWidth;
  static constexpr bool probability = fusion == Fusion::probability;
  static constexpr int targets = few_targets(M, fusion), slots = few_slots(M, fusion), lanes = 32 / slots;
  static constexpr int chunks = few_chunks(M);
  static constexpr int heads = (M + 4) / 4;  // that a warp reads, of four lines each
  static constexpr int size = sizeof(E);
  static constexpr float kInf = std::numeric_limits<float>::infinity();

  enum class Attention { fixed, by_label, by_kl };  // what the gradient of the scores needs of the columns
  static constexpr Attention by_label_or_fixed = probability ? Attention::fixed : Attention::by_label;

  // Of a row, before its columns: the weights, and the label or what it is instead.
  struct Ahead {
    float w[slots];
    int y;
  };
  static constexpr int kNone = -1, kIgnored = -2, kWrong = -3;

  const EnsembleKD& a;
  const FewLaunch& l;
  const Group group;
  const float mean_scale;  // of all rows but those whose label is no class
  const int lane, slot;
  const bool has_ce, by_kl, by_label;
  const int begin, columns;
  char* const shared;
  int64_t label;  // of the row that is prepared next, as its score: read long before they are needed
  float score;
  float loss_sum = 0, attention_loss_sum = 0;  // of this block's rows, in the last warp

  __device__ FewKernel(const EnsembleKD& a, const FewLaunch& l, Group group, char* shared, float mean_scale)
      : a(a),
        l(l),
        group(group),
        mean_scale(mean_scale),
        lane(group.lane()),
        slot(lane / lanes),
        has_ce(a.labels && l.alpha > 0),
        by_kl((a.d_scores || a.d_query) && a.objective == Objective::kl),
        by_label((a.d_scores || a.d_query) && a.objective == Objective::label && a.labels),
        begin(group.rank * l.columns),
        columns(min(static_cast<int>(a.classes) - begin, l.columns)),
        shared(shared) {}

  __device__ Ahead& ahead(int stage) const {
    return *reinterpret_cast<Ahead*>(shared + l.at.ahead + stage * (slots + 4) * int(sizeof(float)));
  }
  __device__ uint64_t* barrier(int stage) const { return reinterpret_cast<uint64_t*>(shared) + stage; }
  // The sums of the first and the second visit, [slot][warp]; likewise of the block, [slot].
  __device__ float* sums() const { return reinterpret_cast<float*>(shared + l.at.sums); }
  __device__ float* sums_next() const { return reinterpret_cast<float*>(shared + l.at.sums_next); }
  __device__ float* own() const { return reinterpret_cast<float*>(shared + l.at.own); }
  __device__ float* own_next() const { return reinterpret_cast<float*>(shared + l.at.own_next); }

  // Sums and largest over the slots, the same in every lane; what another slot has.
  __device__ static float over_slots(float x) {
#pragma unroll
    for (int i = lanes; i < 32; i *= 2) x += __shfl_xor_sync(kAllLanes, x, i);
    return x;
  }
  __device__ static float largest_of_slots(float x) {
#pragma unroll
    for (int i = lanes; i < 32; i *= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, i));
    return x;
  }
  __device__ static float of_slot(float x, int j) { return __shfl_sync(kAllLanes, x, j * lanes); }
  __device__ static float larger(float a, float b) { return b > a ? b : a; }

  __device__ const E* source(int b, int j) const {
    const Matrix& x = j < M ? a.snapshot[j] : a.student;
    return static_cast<const E*>(x.data) + int64_t{b} * x.stride;
  }
  __device__ char* line(int stage, int j) const { return shared + l.at.lines + (stage * (M + 1) + j) * l.pitch; }
  // A line's first columns of the whole row.
  __device__ char* head(int stage, int j) const {
    return group.rank ? shared + l.at.heads + (stage * (M + 1) + j) * kHead : line(stage, j);
  }
  // Whether a line is copied with the element before it, so that its words are those of global memory.
  __device__ bool odd(int b, int j, int first) const {
    return size == 2 && reinterpret_cast<uintptr_t>(source(b, j) + first) & 2;
  }

  // Reads what the next row's copies depend on.
  __device__ void look_ahead(int b) {
    if (b >= a.rows) return;
    if (a.labels) label = a.labels[b];
    score = 0;
    if (a.query.data) {
      float x[slots] = {};
#pragma unroll 1
      for (int64_t d = lane; d < a.width; d += 32) {
        const float q = load<float, Any>(a.query.data, a.query.dtype, int64_t{b} * a.query.stride + d);
#pragma unroll
        for (int m = 0; m < M; ++m)
          if (m < a.snapshots)
            x[m] += q * load<float, Any>(a.keys[m].data, a.keys[m].dtype, int64_t{b} * a.keys[m].stride + d);
      }
      score = warp_sums(x);
    } else if (a.scores.data && slot < a.snapshots) {
      score = load<float, Any>(a.scores.data, a.scores.dtype, int64_t{b} * a.scores.stride + slot);
    }
  }

  // Weighs the snapshots, starts the copies of their lines and the student's, and looks at the row after. Of bulk
  // copies the first warp does it all, else every warp its part.
  __device__ void prepare(int b, int stage, int next) {
    if (l.bulk && group.warp()) return;
    const int y = !a.labels                         ? kNone
                  : label == a.ignore_index         ? kIgnored
                  : label < 0 || label >= a.classes ? kWrong
                                                    : static_cast<int>(label);
    const bool is_snapshot = slot < a.snapshots;
    const float most = largest_of_slots(is_snapshot ? score : -kInf);
    float w = is_snapshot ? fast_exp2((score - most) * float(kLog2e)) : 0.0f;
    w /= over_slots(w);  // exactly, for what the sum of all lacks of 1 is times large logits later
    if (group.warp() == 0) {
      if (lane % lanes == 0) ahead(stage).w[slot] = w;
      if (lane == 0) ahead(stage).y = y;
    }
    const bool counts = y != kIgnored;
    if (l.bulk) {
      const int bytes = counts ? columns * size : 0, of_head = counts && group.rank ? width * size : 0;
      const float reads = over_slots(slot < M && w != 0 ? 1.0f : 0.0f) + 1;
      const float of_line = __shfl_sync(kAllLanes, w, lane < M ? lane * lanes : 0);
      const bool mine = lane == M || (lane < M && of_line != 0);
      if (mine && counts) {
        copy_bulk(line(stage, lane), source(b, lane) + begin, bytes, barrier(stage));
        if (of_head) copy_bulk(head(stage, lane), source(b, lane), of_head, barrier(stage));
      }
#pragma unroll 1
      for (int j = 0; j < M; ++j)
        if (counts && of_slot(w, j) == 0) clear(line(stage, j), bytes);
      __syncwarp();
      if (lane == 0) arrive(barrier(stage), static_cast<int>(reads) * (bytes + of_head));
    } else if (counts) {
#pragma unroll 1
      for (int j = 0; j <= M; ++j) {
        const bool reads = j == M || of_slot(w, j) != 0;
        copy(line(stage, j), source(b, j) + begin, columns, reads);
        if (group.rank) copy(head(stage, j), source(b, j), width, reads);
      }
    }
    look_ahead(next);
  }

  // By a warp; other copies to the same place may follow.
  __device__ void clear(char* to, int bytes) const {
    for (int i = 16 * lane; i < bytes; i += 16 * 32) *reinterpret_cast<Vector<uint32_t, 4>*>(to + i) = {};
    before_copies();
  }

  // Past the registers, by all threads: 16 bytes at a time, or else words; of a line that is not read zeros.
  __device__ void copy(char* to, const E* first, int columns, bool reads) const {
    const char* const from = reinterpret_cast<const char*>(first);
    if (l.aligned) {
      for (int i = 16 * group.thread; i < columns * size; i += 16 * group.threads)
        copy_async(to + i, from + i, reads ? 16 : 0);
    } else {
      const int before = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 3), bytes = before + columns * size;
#pragma unroll 4
      for (int i = 4 * group.thread; i < bytes; i += 4 * group.threads)
        copy_async_word(to + i, from - before + i, reads ? min(4, bytes - i) : 0);
    }
  }

  // Moves lines that were copied with the element before them to where they belong, and makes the last vector of a line
  // that does not end in one whole, by columns that count for nothing. Of lines that are not aligned.
  __device__ void align(int b, int stage) const {
#pragma unroll 1
    for (int j = 0; j <= M; ++j) {
      if (odd(b, j, begin)) move(line(stage, j), columns);
      if (group.rank && odd(b, j, 0)) move(head(stage, j), width);
    }
    const int missing = (width - columns % width) % width;
    if (missing) group.sync();
    if (group.thread < missing)
#pragma unroll 1
      for (int j = 0; j <= M; ++j)
        reinterpret_cast<E*>(line(stage, j))[columns + group.thread] =
            narrow<E>(j == M || ahead(stage).w[j] != 0 ? -kInf : 0.0f);
    group.sync();
  }
  __device__ void move(char* line, int columns) const {
    uint32_t words[chunks][4];
#pragma unroll
    for (int n = 0; n < chunks; ++n)
      if (const int c = (n * group.threads + group.thread) * width; c < columns) shift(line + c * size, words[n]);
    group.sync();
#pragma unroll
    for (int n = 0; n < chunks; ++n)
      if (const int c = (n * group.threads + group.thread) * width; c < columns)
        *reinterpret_cast<Vector<uint32_t, 4>*>(line + c * size) = {words[n][0], words[n][1], words[n][2], words[n][3]};
  }
  __device__ static void shift(const char* from, uint32_t (&to)[4]) {
    const auto v = *reinterpret_cast<const Vector<uint32_t, 4>*>(from);
    const uint32_t next = reinterpret_cast<const uint32_t*>(from)[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = v.x[i] >> 16 | (i < 3 ? v.x[i + 1] : next) << 16;
  }

  __device__ static void read(const char* line, int c, float (&x)[width]) {
    read_vector(reinterpret_cast<const E*>(line) + c, x);
  }

  // The sums of the warps' numbers, [slot][warp]; here they are given, there taken, in the lanes of each slot.
  __device__ void put(float* parts, const float (&x)[slots]) const {
    const float mine = warp_sums(x);
    if (lane % lanes == 0) parts[slot * group.warps() + group.warp()] = mine;
  }
  __device__ float take(const float* parts) const {
    float sum = 0;
#pragma unroll 1
    for (int i = lane % lanes; i < group.warps(); i += lanes) sum += parts[slot * group.warps() + i];
    return over_lanes(sum);
  }
  __device__ static float over_lanes(float x) {
#pragma unroll
    for (int i = 1; i < lanes; i *= 2) x += __shfl_xor_sync(kAllLanes, x, i);
    return x;
  }
  // Of all blocks of the row, each of which has given its own. Every thread has waited for all.
  __device__ float take_of_blocks(const float* given) const {
    float sum = 0;
#pragma unroll 1
    for (int i = lane % lanes; i < group.ranks; i += lanes) sum += group.of(i, given[slot]);
    return over_lanes(sum);
  }

  // What exponentials are relative to, before it is times k (of the student: or log2 e). A mixture's is exact.
  __device__ void find_bases(int stage, const float (&w)[M], float (&base)[targets + 1]) const {
    float first[heads], x[heads];
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      const int j = 4 * h + lane / 8;
      first[h] = j > M                             ? -kInf
                 : j < M && ahead(stage).w[j] == 0 ? 0.0f
                                                   : widen(reinterpret_cast<const E*>(head(stage, j))[lane & 7]);
      x[h] = first[h];
#pragma unroll
      for (int i = 4; i; i /= 2) x[h] = larger(x[h], __shfl_xor_sync(kAllLanes, x[h], i));
    }
    const auto line = [&](int j) { return finite(__shfl_sync(kAllLanes, x[j / 4], j % 4 * 8)); };
    base[targets] = line(M);
    if constexpr (probability) {
#pragma unroll
      for (int j = 0; j < M; ++j) base[j] = line(j);
    } else {
      float mixed = 0;
#pragma unroll
      for (int j = 0; j < M; ++j)
        mixed = fma(w[j], __shfl_sync(kAllLanes, first[j / 4], j % 4 * 8 + (lane & 7)), mixed);
#pragma unroll
      for (int i = 4; i; i /= 2) mixed = larger(mixed, __shfl_xor_sync(kAllLanes, mixed, i));
      base[0] = finite(mixed);
    }
  }

  // Likewise, the largest of the row. Rare.
  __device__ void find_largest(int stage, const float (&w)[M], float (&base)[targets + 1]) const {
    group.sync();  // the sums, whose place the largest take, may still be read
    group.sync_blocks();
#pragma unroll 1
    for (int j = 0; j <= targets; ++j) {
      float most = -kInf;
#pragma unroll 1
      for (int c = group.thread * width; c < columns; c += group.threads * width) {
        float x[width], z[width];
        const int first = j < targets ? j : M, last = probability || j == targets ? first : M - 1;
#pragma unroll
        for (float& u : x) u = 0;
#pragma unroll 1
        for (int i = first; i <= last; ++i) {
          read(line(stage, i), c, z);
          float weight = 1;
          if (!probability && j < targets) {
#pragma unroll
            for (int m = 0; m < M; ++m) weight = i == m ? w[m] : weight;
          }
#pragma unroll
          for (int u = 0; u < width; ++u) x[u] = fma(weight, z[u], x[u]);
        }
#pragma unroll
        for (float u : x) most = larger(most, u);
      }
#pragma unroll
      for (int i = 16; i; i /= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, i));
      if (lane == 0) sums()[j * group.warps() + group.warp()] = most;
    }
    group.sync();
    float* const largest = reinterpret_cast<float*>(shared + l.at.largest);
    if (group.thread <= targets) {
      float most = -kInf;
#pragma unroll 1
      for (int i = 0; i < group.warps(); ++i) most = larger(most, sums()[group.thread * group.warps() + i]);
      largest[group.thread] = most;
    }
    group.sync();
    group.sync_blocks();
#pragma unroll
    for (int j = 0; j <= targets; ++j) {
      float most = -kInf;
#pragma unroll 1
      for (int i = 0; i < group.ranks; ++i) most = larger(most, group.of(i, largest[j]));
      base[j] = finite(most);
    }
    group.sync();
    group.sync_blocks();
  }

  // What the columns of the second visit have in common. Logarithms are to base 2; those of sums are added at the end.
  struct Constants {
    float soft_base, hard_base, target_base;  // the last of a mixture
    float soft_scale, hard_scale, kl_scale;   // of the terms of the student's gradient
    __device__ float gradient(float exp_soft, float exp_hard, float p) const {
      return fma(soft_scale, exp_soft, fma(-kl_scale, p, hard_scale * exp_hard));
    }
  };
  struct Sums {
    float kl, mean[slots], moved[slots];
  };

  // The second visit. `share`: what p_j are times, or the weights. `kept`: exponentials, or those of the mixture. Half
  // of a vector at a time, for the registers.
  template <Attention attention>
  __device__ void differentiate(int stage, const Constants& x, const float (&share)[M],
                                const float (&kept)[chunks][probability ? M : 1][width], E* out, Sums& sums) const {
    constexpr bool by_kl = attention == Attention::by_kl;
    constexpr int half = width / 2;
#pragma unroll
    for (int n = 0; n < chunks; ++n) {
      const int c = (n * group.threads + group.thread) * width;
      if (c >= columns) break;
      float s[width], d[width], z[probability ? 1 : M][width];
      if constexpr (!probability) {
#pragma unroll
        for (int j = 0; j < M; ++j) read(line(stage, j), c, z[j]);
      }
      read(line(stage, M), c, s);
#pragma unroll
      for (int first = 0; first < width; first += half) {
        float p[half], r[half];
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const int u = first + i;
          if constexpr (probability) {
            p[i] = share[0] * kept[n][0][u];
#pragma unroll
            for (int j = 1; j < M; ++j) p[i] = fma(share[j], kept[n][j][u], p[i]);
            r[i] = fast_log2(p[i]);
          } else {
            r[i] = fma(share[0], z[0][u], -x.target_base);
#pragma unroll
            for (int j = 1; j < M; ++j) r[i] = fma(share[j], z[j][u], r[i]);
            r[i] *= l.k;
            p[i] = kept[n][0][u];
          }
          const float log_q = fma(s[u], l.k, -x.soft_base);
          d[u] = x.gradient(fast_exp2(log_q), has_ce ? fast_exp2(fma(s[u], float(kLog2e), -x.hard_base)) : 0.0f, p[i]);
          r[i] -= log_q;
          add_where(p[i], sums.kl, p[i], r[i]);  // r is infinite, or NaN, where both are masked
          if constexpr (attention != Attention::fixed) {
            const float weight = probability ? r[i] : p[i] * r[i];
#pragma unroll
            for (int j = 0; j < M; ++j) {
              const float moving =
                  probability ? kept[n][probability ? j : 0][u] : z[probability ? 0 : j][u] - x.target_base;
              if constexpr (!probability) add_where(p[i], sums.mean[j], p[i], moving);
              if constexpr (by_kl) add_where(p[i], sums.moved[j], weight, moving);
            }
          }
        }
      }
      if (out) write_vector(out + c, d);
    }
  }

  // The gradient, whose columns begin anywhere, from shared memory: by words.
  __device__ void write_out(E* gradient, const E* out) const {
    if constexpr (size == 2) {
      const int odd = reinterpret_cast<uintptr_t>(gradient) & 2 ? 1 : 0, pairs = (columns - odd) / 2;
      const auto* const words = reinterpret_cast<const uint32_t*>(out);
      auto* const to = reinterpret_cast<uint32_t*>(gradient + odd);
#pragma unroll 4
      for (int i = group.thread; i < pairs; i += group.threads)
        to[i] = odd ? words[i] >> 16 | words[i + 1] << 16 : words[i];
      if (group.thread == 0 && odd) gradient[0] = out[0];
      if (group.thread == 1 && (columns - odd) % 2) gradient[columns - 1] = out[columns - 1];
    } else {
#pragma unroll 4
      for (int c = group.thread; c < columns; c += group.threads) gradient[c] = out[c];
    }
  }

  __device__ void compute(int b, int stage) {
    const int label = ahead(stage).y;
    const float row_scale = label == kWrong ? std::numeric_limits<float>::quiet_NaN() : mean_scale;
    const float weight = ahead(stage).w[slot];
    const bool used = slot < M && weight != 0;
    // The logits at the label, long before they are needed.
    E z_at_y{}, s_at_y{};
    if (label >= 0) {
      if (used) z_at_y = source(b, slot)[label];
      s_at_y = source(b, M)[label];
    }
    float w[M], base[targets + 1], kept[chunks][probability ? M : 1][width];
#pragma unroll
    for (int j = 0; j < M; ++j) w[j] = probability ? 0.0f : ahead(stage).w[j];
    find_bases(stage, w, base);

    // The first visit: sums of powers of 2 whose exponents are x k - base k, the latter rounded; of a mixture (x -
    // base) k.
    Constants x;
    float sum, base_here;  // of this lane's slot
    for (bool carefully = false;; carefully = true) {
      float part[slots] = {}, from[targets];
#pragma unroll
      for (int j = 0; j < targets; ++j) from[j] = probability ? base[j] * l.k : base[j];
      x.soft_base = base[targets] * l.k;
      x.hard_base = base[targets] * float(kLog2e);
#pragma unroll
      for (int n = 0; n < chunks; ++n) {
        const int c = (n * group.threads + group.thread) * width;
        if (c >= columns) break;
        if constexpr (probability) {
#pragma unroll
          for (int j = 0; j < M; ++j) {
            float z[width];
            read(line(stage, j), c, z);
#pragma unroll
            for (int u = 0; u < width; ++u) {
              kept[n][j][u] = fast_exp2(fma(z[u], l.k, -from[j]));
              part[j] += kept[n][j][u];
            }
          }
        } else {
          float mixed[width];
#pragma unroll
          for (int j = 0; j < M; ++j) {
            float z[width];
            read(line(stage, j), c, z);
#pragma unroll
            for (int u = 0; u < width; ++u) mixed[u] = j ? fma(w[j], z[u], mixed[u]) : fma(w[0], z[u], -from[0]);
          }
#pragma unroll
          for (int u = 0; u < width; ++u) {
            kept[n][0][u] = fast_exp2(mixed[u] * l.k);
            part[0] += kept[n][0][u];
          }
        }
        float s[width];
        read(line(stage, M), c, s);
#pragma unroll
        for (int u = 0; u < width; ++u) part[targets] += fast_exp2(fma(s[u], l.k, -x.soft_base));
        if (has_ce) {
#pragma unroll
          for (int u = 0; u < width; ++u) part[targets + 1] += fast_exp2(fma(s[u], float(kLog2e), -x.hard_base));
        }
      }
      put(sums(), part);
      group.sync();
      sum = take(sums());
      if (group.ranks > 1) {
        if (group.warp() == 0 && lane % lanes == 0) own()[slot] = sum;
        group.sync_blocks();
        sum = take_of_blocks(own());
      }
      base_here = from[0];
#pragma unroll
      for (int j = 1; j < targets; ++j) base_here = slot == j ? from[j] : base_here;
      x.target_base = from[0];
      const bool asked = slot < targets ? !probability || used : slot == targets || (slot == targets + 1 && has_ce);
      if (carefully || !any_lane(asked && !(sum > 0x1p-32f && sum < 0x1p32f))) break;
      find_largest(stage, w, base);
    }

    const float soft_sum = of_slot(sum, targets), hard_sum = has_ce ? of_slot(sum, targets + 1) : 1.0f;
    const float target_sum = probability ? 1.0f : of_slot(sum, 0), ce = row_scale * l.alpha;
    x.soft_scale = fast_divide(row_scale * l.beta * l.tau, soft_sum);
    x.hard_scale = has_ce ? fast_divide(ce, hard_sum) : 0.0f;
    x.kl_scale = fast_divide(row_scale * l.beta * l.tau, target_sum);
    const float share_here = probability ? (used ? fast_divide(weight, sum) : 0.0f) : weight;
    float share[M];
#pragma unroll
    for (int j = 0; j < M; ++j) share[j] = probability ? of_slot(share_here, j) : w[j];

    const float z_y = widen(z_at_y), s_y = widen(s_at_y);
    // The second visit. The gradient is written where it belongs, or else to shared memory first.
    E* const gradient = a.d_student ? static_cast<E*>(a.d_student) + int64_t{b} * a.classes + begin : nullptr;
    E* const out = l.aligned || !gradient ? gradient : reinterpret_cast<E*>(shared + l.at.gradient);
    Sums total = {};
    if (by_kl)
      differentiate<Attention::by_kl>(stage, x, share, kept, out, total);
    else if (by_label && !probability)
      differentiate<by_label_or_fixed>(stage, x, share, kept, out, total);
    else
      differentiate<Attention::fixed>(stage, x, share, kept, out, total);
    if (out && has_ce && label >= begin) write_label(out, label - begin, ce, x, share_here, base_here, z_y, s_y);

    const float kl_of_warp = warp_sum(total.kl);
    const bool needs_mean = !probability && (by_kl || by_label);
    if (lane == 0) sums_next()[2 * slots * group.warps() + group.warp()] = kl_of_warp;
    if (needs_mean) put(sums_next(), total.mean);
    if (by_kl) put(sums_next() + slots * group.warps(), total.moved);
    group.sync();
    if (!l.aligned && gradient) write_out(gradient, out);
    // Another warp than prepares rows, where there is one.
    const bool last = group.warp() == group.warps() - 1;
    if (group.ranks == 1 && !last) return;
    float kl = warp_sum(lane < group.warps() ? sums_next()[2 * slots * group.warps() + lane] : 0.0f);
    float mean = needs_mean ? take(sums_next()) : 0.0f,
          moved = by_kl ? take(sums_next() + slots * group.warps()) : 0.0f;
    if (group.ranks > 1) {
      if (last && lane % lanes == 0) {
        own_next()[slot] = mean;
        own_next()[slots + slot] = moved;
        if (lane == 0) own_next()[2 * slots] = kl;
      }
      group.sync_blocks();
      if (group.rank || !last) return;
      mean = take_of_blocks(own_next());
      moved = take_of_blocks(own_next() + slots);
      kl = warp_sum(lane < group.ranks ? group.of(lane, own_next()[2 * slots]) : 0.0f);
    }
    // As of p: mean = Σ p_c z_jc of a mixture, less its base; moved = Σ p_j r, or Σ p r z_j; kl = Σ p r.
    const float log_soft = log2(soft_sum), log_sums = probability ? log_soft : log_soft - log2(target_sum);
    mean /= target_sum;
    moved = float(kLn2) * (probability ? moved / sum + log_sums : moved / target_sum + log_sums * mean);
    kl = float(kLn2) * (kl / target_sum + log_sums);
    finish(b, weight, row_scale, kl, mean, moved, sum, target_sum, base_here, z_y,
           has_ce ? float(kLn2) * (fma(s_y, float(kLog2e), -x.hard_base) - log2(hard_sum)) : 0.0f);
  }

  // The gradient of the label's column, which the loop takes for any other: by the thread that has it.
  __device__ void write_label(E* out, int y, float ce, const Constants& x, float share, float base, float z,
                              float s) const {
    bool mine = false;
#pragma unroll
    for (int n = 0; n < chunks; ++n) {
      const int c = (n * group.threads + group.thread) * width;
      mine = mine || (y >= c && y < c + width && y < columns);
    }
    if (!any_lane(mine)) return;
    float p = over_slots(slot < M && share != 0 ? share * (probability ? fast_exp2(fma(z, l.k, -base)) : z) : 0.0f);
    if (!probability) p = fast_exp2((p - x.target_base) * l.k);
    if (!mine) return;
    const float exp_soft = fast_exp2(fma(s, l.k, -x.soft_base)),
                exp_hard = fast_exp2(fma(s, float(kLog2e), -x.hard_base));
    out[y] = narrow<E>(x.gradient(exp_soft, exp_hard, p) - ce);
  }

  // Loss, attention and its gradients, by a warp.
  __device__ void finish(int b, float weight, float row_scale, float kl, float mean, float moved, float sum,
                         float target_sum, float base, float z_y, float log_q_y) {
    const bool used = slot < M && weight != 0;
    const float w = used ? weight : 0.0f;
    float loss = l.beta == 0 ? 0.0f : l.beta * l.tau * l.tau * kl, attention_loss = 0, de = 0;
    if (has_ce) loss -= l.alpha * log_q_y;
    const auto through_softmax = [&](float g, float scale) {
      const float average = over_slots(used ? w * g : 0.0f);
      return used ? scale * w * (g - average) : 0.0f;
    };
    if (a.labels && probability) {
      float exponent = used ? fma(z_y, l.k, -base) : -kInf, posterior = used ? w / sum * exp2f(exponent) : 0.0f;
      const float p_y = over_slots(posterior);
      if (!(p_y < std::numeric_limits<float>::min())) {  // or NaN
        posterior /= p_y;
        attention_loss = -logf(p_y);
      } else {
        if (used) exponent += log2(w / sum);
        const float most = largest_of_slots(exponent);
        if (most == -kInf) {  // p_y = 0 for any weights, which get no gradient
          posterior = w;
          attention_loss = kInf;
        } else {
          posterior = used ? exp2f(exponent - most) : 0.0f;
          const float all = over_slots(posterior);
          posterior /= all;
          attention_loss = float(-kLn2) * (most + log2(all));
        }
      }
      de = row_scale * (w - posterior);
    } else if (a.labels) {
      const float z = used ? z_y - base : 0.0f, mixed = over_slots(used ? w * z : 0.0f);
      attention_loss = logf(target_sum) - mixed / l.tau;
      de = through_softmax(mixed == -kInf ? 0.0f : (mean - z) / l.tau, row_scale);  // -inf: p_y = 0
    }
    if (by_kl) {
      const float g = probability ? l.tau * l.tau * moved : l.tau * (moved - kl * mean);
      de = through_softmax(l.beta == 0 ? 0.0f : g, row_scale * l.beta);
    }
    if (l.sums) {
      loss_sum += row_scale * loss;
      attention_loss_sum += row_scale * attention_loss;
    } else if (lane == 0) {
      static_cast<float*>(a.loss)[b] = row_scale * loss;
      static_cast<float*>(a.attention_loss)[b] = row_scale * attention_loss;
    }
    const bool writes = lane % lanes == 0 && slot < a.snapshots;
    if (writes) a.weights[int64_t{b} * a.snapshots + slot] = weight;
    if (writes && a.d_scores) store<Any>(a.d_scores, a.scores.dtype, int64_t{b} * a.snapshots + slot, de);
    if (!a.d_query) return;
    float d_score[M];
#pragma unroll
    for (int m = 0; m < M; ++m) d_score[m] = of_slot(de, m);
#pragma unroll 1
    for (int64_t d = lane; d < a.width; d += 32) {
      const float query = load<float, Any>(a.query.data, a.query.dtype, int64_t{b} * a.query.stride + d);
      float d_query = 0;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (m >= a.snapshots) break;
        d_query += d_score[m] * load<float, Any>(a.keys[m].data, a.keys[m].dtype, int64_t{b} * a.keys[m].stride + d);
        store<Any>(a.d_keys, a.keys[m].dtype, (m * a.rows + b) * a.width + d, d_score[m] * query);
      }
      store<Any>(a.d_query, a.query.dtype, int64_t{b} * a.width + d, d_query);
    }
  }

  // The rows from `next` on, `step` apart: each is prepared before the one before is computed, or after it if there is
  // room for one in shared memory only.
  __device__ void run(int first, int step) {
    int next = first;
    if (l.bulk && group.thread < 2) make_barrier(barrier(group.thread));
    group.sync();
    look_ahead(next);
    bool ready = false;  // row b
    for (int b = 0, stage = 0, phases = 0;;) {
      if (ready) {
        if (l.bulk) {
          wait(barrier(stage), phases >> stage & 1);
          phases ^= 1 << stage;
        } else {
          arrived();
          group.sync();
        }
      }
      const bool counts = ready && ahead(stage).y != kIgnored;
      if (counts && !l.aligned) align(b, stage);
      const bool more = next < a.rows, prepares = more && (!ready || l.stages > 1);
      if (prepares) prepare(next, ready ? 1 - stage : stage, next + step);
      if (counts)
        compute(b, stage);
      else if (ready)
        write_zeros<float>(a, group, b, begin, columns, !l.sums);
      if (!more) break;
      if (prepares) {
        if (ready) stage = 1 - stage;
        b = next;
        next += step;
        ready = true;
      } else {
        group.sync();
        ready = false;
      }
    }
    if (l.sums && group.rank == 0 && group.thread == group.threads - 32) {
      static_cast<float*>(a.loss)[first] = loss_sum;
      static_cast<float*>(a.attention_loss)[first] = attention_loss_sum;
    }
    group.sync_blocks();  // the shared memory of a block that has ended is gone
  }
};

template <class E, int M, Fusion fusion>
__global__ void __launch_bounds__(kFewThreads, 1)
    few_rows_kernel(const __grid_constant__ EnsembleKD a, const __grid_constant__ FewLaunch l, bool mean,
                    const int* count) {
  static_assert(sizeof(EnsembleKD) + sizeof(FewLaunch) <= 4096 - 64, "what a kernel's parameters may take");
  char* const shared = shared_memory();
  const float scale = scale_of_rows<float>(a, mean, count, shared);
  const Group group{static_cast<int>(threadIdx.x), l.threads, static_cast<int>(blockIdx.x % l.ranks), l.ranks};
  FewKernel<E, M, fusion>(a, l, group, shared, scale).run(blockIdx.x / l.ranks, gridDim.x / l.ranks);
}

}  // namespace eekd
