// ensemble_kd on the CPU: attention, fusion, KL, CE and all gradients of a row while its logits are in cache.
//
// A row is cut into tiles of kTile columns. The first visit of a tile gives softmax statistics, the second the loss
// and the gradients. The exponentials of a row of one tile are kept between the visits. Of a longer row, logit fusion
// keeps the mixture, so that snapshots are read once; probability fusion reads it again, from cache, instead of parking
// M rows of exponentials in memory.
//
// Compiled once per instruction set, into the namespace EEKD_ISA. Statistics and sums of tiles are combined in the
// order of the columns, whoever computed them, so the bits do not depend on the number of threads.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../eekd.h"
#include "../row.h"
#include "stretch.h"

namespace eekd::EEKD_ISA {
namespace {

// The weights of a row, and the snapshots whose weight is not 0: the others are not read.
template <class T>
struct Weights {
  T all[kMaxSnapshots];
  int used;
  int id[kMaxSnapshots];
  T w[kMaxSnapshots];  // of id[0, used)
};

template <class T>
struct Stats {
  SoftmaxSum<T> target[kMaxSnapshots];  // probability: one per used snapshot; logit: [0] is the mixture's
  T mean[kMaxSnapshots];                // logit: Σ_c 2^(k (mixture - its max)) z_m
  SoftmaxSum<T> soft, hard;             // the student at τ and at 1
  T label_sum;                          // of soft labels Σ_c y
  T label_logits[kMaxSnapshots];        // of several tiles, logit: Σ_c y z_m
};

template <class T>
struct Sums {
  T kl;                    // Σ_c p r,  r = log2 p - log2 q
  T moved[kMaxSnapshots];  // probability: Σ_c p_m r;  logit: Σ_c p r z_m
  // Of soft labels: Σ_c y log2 of the student at 1 and of p, less the logarithms of their sums (p: of a mixture's).
  T log_q, log_p;
  // What they move the attention by: Σ_c y w_m (1 - p_m / p);  logit, of one tile: Σ_c (Σ y p - y) z_m
  T by_labels[kMaxSnapshots];
};

// What turns a tile's lines into probabilities and gradients, known once the row's statistics are.
template <class T>
struct Scales {
  T target[kMaxSnapshots];  // probability: w_m / Σ exp;  logit: [0] 1 / Σ exp
  T soft, hard;             // 1 / Σ exp;  the CE's coefficient / Σ exp
  T log_ratio;              // log2 of the student's sum, less log2 of the mixture's (logit)
};

// to = x^power of a line, power from 1 to 8; returns its sum.
template <int power, class T>
T to_the(const T* x, T* to, int n) {
  return total<T>(n, [=](int i, int) {
    const Vec<T> one = load(x + i), two = one * one, four = two * two;
    Vec<T> y = power == 8 ? four * four : power & 4 ? four : power & 2 ? two : one;
    if constexpr (power == 6 || power == 7) y *= two;
    if constexpr (power > 1 && power & 1) y *= one;
    store(to + i, y);
    return y;
  });
}
template <class T>
T to_the(int power, const T* x, T* to, int n) {
  switch (power) {
    case 1: return to_the<1>(x, to, n);
    case 2: return to_the<2>(x, to, n);
    case 3: return to_the<3>(x, to, n);
    case 4: return to_the<4>(x, to, n);
    case 5: return to_the<5>(x, to, n);
    case 6: return to_the<6>(x, to, n);
    case 7: return to_the<7>(x, to, n);
    default: return to_the<8>(x, to, n);
  }
}

// f(std::true_type()) or f(std::false_type())
template <class F>
void choose(bool x, F f) {
  x ? f(std::true_type()) : f(std::false_type());
}

// The work on one row at a time. A line is kTile numbers, of which each function uses those of the tile.
template <class T>
class Kernel {
 public:
  Kernel(const EnsembleKD& args, bool ce)
      : a(args),
        snapshots(static_cast<int>(a.snapshots)),
        soft_labels(a.label_weights.data),
        has_ce(ce && has_labels(a) && a.alpha > 0),
        beta(static_cast<T>(has_labels(a) ? 1 - a.alpha : 1)),
        tau(static_cast<T>(a.temperature)),
        k(static_cast<T>(kLog2e / a.temperature)),
        row_scale(static_cast<T>(a.row_scale)),
        power(a.temperature <= 8 && a.temperature == std::floor(a.temperature) ? static_cast<int>(a.temperature) : 0),
        by_kl((a.d_scores || a.d_query) && a.objective == Objective::kl),
        by_label((a.d_scores || a.d_query) && a.objective == Objective::label) {
    struct alignas(64) Block {
      T x[64 / sizeof(T)];
    };
    static thread_local std::vector<Block> scratch;  // a few tiles per thread, kept between calls
    const bool parks = a.fusion == Fusion::logit && a.classes > kTile;
    const size_t targets = std::max(snapshots, 2), row = parks ? (a.classes + kTile - 1) / kTile * kTile : 0;
    scratch.resize(std::max(scratch.size(), ((targets + 4) * kTile + row) * sizeof(T) / sizeof(Block)));
    target = scratch.data()->x;
    student = target + targets * kTile;
    soft = student + kTile;
    hard = soft + kTile;
    labels = hard + kTile;
    mixed = parks ? labels + kTile : target;
  }

  bool ignored(int64_t b) const { return a.labels && a.labels[b] == a.ignore_index; }

  void write_zeros(int64_t b) {
    static_cast<T*>(a.loss)[b] = static_cast<T*>(a.attention_loss)[b] = 0;
    std::fill_n(a.weights + b * snapshots, snapshots, 0.f);
    const auto clear = [](void* p, DType dtype, int64_t index, int64_t n) {
      const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
      if (p) std::memset(static_cast<char*>(p) + index * size, 0, n * size);
    };
    clear(a.d_student, a.student.dtype, b * a.classes, a.classes);
    clear(a.d_scores, a.scores.dtype, b * snapshots, snapshots);
    clear(a.d_query, a.query.dtype, b * a.width, a.width);
    for (int m = 0; m < snapshots; ++m) clear(a.d_keys, a.keys[0].dtype, (m * a.rows + b) * a.width, a.width);
  }

  // The scores, which are given, or the products of query and keys, or all the same; e is a line, but not soft or hard.
  void scores(int64_t b, T* e) {
    if (a.query.data)
      products(b, e);
    else if (a.scores.data)
      read_line(a.scores, b, 0, snapshots, e);
    else
      std::fill_n(e, snapshots, T(0));
  }

  // softmax of the scores
  void weigh(int64_t b, Weights<T>& w) {
    if (a.query.data || a.scores.data) {
      T* e = student;
      scores(b, e);
      const T max = T(kLog2e) * max_of<T>(e, snapshots);
      const T scale = 1 / exp_of(e, e, snapshots, max, T(kLog2e));
      for (int m = 0; m < snapshots; ++m) w.all[m] = e[m] * scale;
    } else {
      std::fill_n(w.all, snapshots, T(1) / snapshots);
    }
    w.used = 0;
    for (int m = 0; m < snapshots; ++m)
      if (w.all[m] != 0) w.id[w.used] = m, w.w[w.used++] = w.all[m];
  }

  // Reads a tile and finds its statistics, or its lines by the maxima in `stats`, or both. The lines: exponentials of
  // the targets (logit: of the mixture, in the second line), the student's logits, its exponentials.
  void fill(int64_t b, int64_t tile, const Weights<T>& w, Find find, Stats<T>& stats) {
    const int n = size(tile);
    if (soft_labels && find != Find::lines) {
      read_labels(b, tile);
      stats.label_sum = total<T>(n, [&](int i, int) { return load(labels + i); });
    }
    if (a.fusion == Fusion::probability) {
      for (int j = 0; j < w.used; ++j)
        with_elements_of(a.snapshot[w.id[j]], b, tile, [&](auto z) {
          if (find != Find::lines) stats.target[j].max = k * largest<T>(load_from<T>(z, n));
          exponentiate(z, target + j * kTile, n, k, find, stats.target[j], ahead(a.snapshot[w.id[j]]));
        });
    } else {
      const T* mixture = mixed + tile * kTile;
      if (find != Find::lines) {
        mix(b, tile, w);
        stats.target[0].max = k * largest<T>(load(mixture));
        exponentiate(mixture, target + kTile, n, k, Find::both, stats.target[0]);
        if (by_kl || (by_label && !(soft_labels && a.classes <= kTile))) weigh_logits(b, tile, w, stats);
      } else {
        exponentiate(mixture, target + kTile, n, k, find, stats.target[0]);
      }
    }
    read_line(a.student, b, tile * kTile, n, student, ahead(a.student));
    if (find != Find::lines) stats.soft.max = k * largest<T>(load(student));
    if (!has_ce || !power) {
      exponentiate(student, soft, n, k, find, stats.soft);
      if (!has_ce) return;
    } else {
      exponentiate(student, soft, n, k, find == Find::stats ? Find::both : find, stats.soft);
      if (find != Find::lines) {
        stats.hard = {power * stats.soft.max, to_the(power, soft, hard, n)};
        if (in_bounds(stats.hard.sum)) return;
      } else if (stats.hard.max == power * stats.soft.max) {
        to_the(power, soft, hard, n);
        return;
      }
    }
    if (find != Find::lines) stats.hard.max = T(kLog2e) * largest<T>(load(student));
    exponentiate(student, hard, n, T(kLog2e), find, stats.hard);
  }

  void clear(Stats<T>& stats) const {
    std::fill_n(stats.target, snapshots, SoftmaxSum<T>::none());
    std::fill_n(stats.mean, snapshots, T(0));
    stats.soft = stats.hard = SoftmaxSum<T>::none();
    stats.label_sum = 0;
    std::fill_n(stats.label_logits, snapshots, T(0));
  }
  void add(Stats<T>& row, const Stats<T>& tile, const Weights<T>& w) const {
    if (a.fusion == Fusion::probability) {
      for (int j = 0; j < w.used; ++j) merge(row.target[j], tile.target[j], T(1));
    } else {
      const T before = row.target[0].max, added = tile.target[0].max;
      merge(row.target[0], tile.target[0], T(1));
      if (added != -std::numeric_limits<T>::infinity()) {
        const T most = row.target[0].max, old = std::exp2(before - most), fresh = std::exp2(added - most);
        for (int j = 0; j < w.used; ++j) row.mean[j] = row.mean[j] * old + tile.mean[j] * fresh;
      }
    }
    merge(row.soft, tile.soft, T(1));
    if (has_ce) merge(row.hard, tile.hard, T(1));
    if (!soft_labels) return;
    row.label_sum += tile.label_sum;
    for (int j = 0; by_label && j < w.used; ++j) row.label_logits[j] += tile.label_logits[j];
  }

  Scales<T> scales(const Weights<T>& w, const Stats<T>& stats) const {
    Scales<T> s;
    s.soft = 1 / stats.soft.sum;
    s.hard = has_ce ? row_scale * static_cast<T>(a.alpha) / stats.hard.sum : T(0);
    if (soft_labels) s.hard *= stats.label_sum;
    s.log_ratio = std::log2(stats.soft.sum);
    if (a.fusion == Fusion::probability) {
      for (int j = 0; j < w.used; ++j) s.target[j] = w.w[j] / stats.target[j].sum;
    } else {
      s.target[0] = 1 / stats.target[0].sum;
      s.log_ratio -= std::log2(stats.target[0].sum);
    }
    return s;
  }

  // The second visit of a tile, whose lines are filled: its share of the sums, and its columns of d_student.
  void visit(int64_t b, int64_t tile, const Weights<T>& w, const Stats<T>& stats, const Scales<T>& s, Sums<T>& out) {
    const int n = size(tile), whole = n / Simd<T>::width * Simd<T>::width;
    const int64_t first = tile * kTile;
    const bool direct = a.d_student && a.student.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
    T* d = direct ? static_cast<T*>(a.d_student) + b * a.classes + first : hard;
    if (soft_labels && a.classes > kTile) read_labels(b, tile);  // else fill() has
    choose(a.fusion == Fusion::probability, [&](auto probability) {
      choose(has_ce, [&](auto ce) {
        choose(soft_labels,
               [&](auto follows) { combine<probability, ce, follows>(b, tile, whole, w, stats, s, d, out); });
      });
    });
    if (a.d_student) {
      if (direct) std::memcpy(d + whole, hard + whole, (n - whole) * sizeof(T));
      if (has_ce && a.labels && a.labels[b] >= first && a.labels[b] < first + n)
        d[a.labels[b] - first] -= row_scale * static_cast<T>(a.alpha);
      if (!direct) write_line(a.d_student, b * a.classes + first, a.student.dtype, n, hard);
      if (ahead(a.student)) prefetch_to_write(a.d_student, b * a.classes + first + n, a.student.dtype, n);
    }
    for (int j = 0; by_kl && j < w.used; ++j)
      if (a.fusion == Fusion::probability)
        out.moved[j] = total<T>(n, [&](int i, int) { return load(target + j * kTile + i) * load(soft + i); }) /
                       stats.target[j].sum;
      else
        with_elements_of(a.snapshot[w.id[j]], b, tile, [&](auto z) { out.moved[j] = weighted(z, n, soft); });
  }

  void clear(Sums<T>& sums) const {
    sums.kl = 0;
    sums.log_q = sums.log_p = 0;
    std::fill_n(sums.moved, snapshots, T(0));
    std::fill_n(sums.by_labels, snapshots, T(0));
  }
  void add(Sums<T>& row, const Sums<T>& tile, const Weights<T>& w) const {
    row.kl += tile.kl;
    for (int j = 0; by_kl && j < w.used; ++j) row.moved[j] += tile.moved[j];
    if (!soft_labels) return;
    row.log_q += tile.log_q, row.log_p += tile.log_p;
    for (int j = 0; by_label && j < w.used; ++j) row.by_labels[j] += tile.by_labels[j];
  }

  // Everything that is O(M) or O(D) per row.
  void finish(int64_t b, const Weights<T>& w, const Stats<T>& stats, const Sums<T>& sums) {
    T loss = beta == 0 ? T(0) : beta * tau * tau * T(kLn2) * sums.kl;
    T attention_loss = 0, g[kMaxSnapshots], de[kMaxSnapshots];
    if (a.labels) {
      const int64_t y = a.labels[b];
      if (has_ce) {
        const T log_q = std::fma(read<T>(a.student, b, y), T(kLog2e), -stats.hard.max) - std::log2(stats.hard.sum);
        loss -= static_cast<T>(a.alpha * kLn2) * log_q;
      }
      T z[kMaxSnapshots];
      for (int j = 0; j < w.used; ++j) z[j] = read<T>(a.snapshot[w.id[j]], b, y);
      if (a.fusion == Fusion::probability) {
        for (int j = 0; j < w.used; ++j) z[j] = std::fma(z[j], k, -stats.target[j].max);
        attention_loss = mixture_nll(w.w, stats.target, z, w.used);
        for (int j = 0; j < w.used; ++j) de[j] = row_scale * (w.w[j] - z[j]);
      } else {
        const T inverse_sum = 1 / stats.target[0].sum;
        T mixed = 0;
        for (int j = 0; j < w.used; ++j) mixed += w.w[j] * z[j], g[j] = (stats.mean[j] * inverse_sum - z[j]) / tau;
        attention_loss = T(kLn2) * (std::log2(stats.target[0].sum) - std::fma(mixed, k, -stats.target[0].max));
        if (mixed == -std::numeric_limits<T>::infinity()) std::fill_n(g, w.used, T(0));  // p_y = 0 for any weights
        softmax_grad(w.w, g, row_scale, de, w.used);
      }
    } else if (soft_labels) {
      const T label_sum = stats.label_sum;
      const bool probability = a.fusion == Fusion::probability;
      if (has_ce) loss -= static_cast<T>(a.alpha * kLn2) * (sums.log_q - label_sum * std::log2(stats.hard.sum));
      const T log_p = sums.log_p - (probability ? T(0) : label_sum * std::log2(stats.target[0].sum));
      attention_loss = T(-kLn2) * log_p;
      const bool possible = log_p != -std::numeric_limits<T>::infinity();  // else weights get no gradient
      for (int j = 0; by_label && j < w.used; ++j) {
        T moved = sums.by_labels[j];
        if (!probability && a.classes > kTile)
          moved = label_sum * (stats.mean[j] / stats.target[0].sum) - stats.label_logits[j];
        de[j] = possible ? row_scale * moved : T(0);
        g[j] = possible ? moved / tau : T(0);
      }
      if (by_label && !probability) softmax_grad(w.w, g, row_scale, de, w.used);
    }
    if (by_kl) {
      for (int j = 0; j < w.used; ++j)
        g[j] = tau * T(kLn2) *
               (a.fusion == Fusion::probability ? tau * sums.moved[j]
                                                : sums.moved[j] - sums.kl * (stats.mean[j] / stats.target[0].sum));
      if (beta == 0) std::fill_n(g, w.used, T(0));
      softmax_grad(w.w, g, row_scale * beta, de, w.used);
    }
    static_cast<T*>(a.loss)[b] = row_scale * loss;
    static_cast<T*>(a.attention_loss)[b] = row_scale * attention_loss;
    for (int m = 0; m < snapshots; ++m) a.weights[b * snapshots + m] = static_cast<float>(w.all[m]);
    if (by_kl || by_label) {
      T spread[kMaxSnapshots] = {};
      for (int j = 0; j < w.used; ++j) spread[w.id[j]] = de[j];
      write_attention(b, spread);
    }
  }

  void write_attention(int64_t b, const T* de) {
    if (a.d_scores)
      write_line(a.d_scores, b * snapshots, a.scores.dtype, snapshots, de);
    else
      write_embeddings(b, de);
  }

 private:
  // From an element to the one in its place in the next row or tile, to be prefetched; 0 where all is in cache. The
  // stretches of a row or tile are too short for the processor to fetch ahead by itself.
  int64_t ahead(const Matrix& x) const {
    if (a.rows * a.classes * (snapshots + 1) < kInCache) return 0;
    return a.classes <= kTile ? x.stride : kTile;
  }

  int size(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kTile, a.classes - tile * kTile)); }

  template <class F>
  static void with_elements_of(const Matrix& x, int64_t b, int64_t tile, F f) {
    with_elements(x.data, x.dtype, b * x.stride + tile * kTile, f);
  }

  void products(int64_t b, T* e) {
    std::fill_n(e, snapshots, T(0));
    for (int64_t d = 0; d < a.width; d += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, a.width - d));
      read_line(a.query, b, d, n, soft);
      for (int m = 0; m < snapshots; ++m) {
        read_line(a.keys[m], b, d, n, hard);
        for (int i = 0; i < n; ++i) e[m] += soft[i] * hard[i];
      }
    }
  }

  // The soft labels of a tile, 0 beyond its end.
  [[gnu::noinline]] void read_labels(int64_t b, int64_t tile) {
    const int n = size(tile);
    read_line(a.label_weights, b, tile * kTile, n, labels, ahead(a.label_weights));
    for (int i = n; i % Simd<T>::width; ++i) labels[i] = 0;
  }

  // Of the columns of a tile whose p is too small for a number: Σ y log2 p, and what they move the attention by.
  [[gnu::noinline]] T follow_all_tiny(int64_t b, int64_t tile, const Weights<T>& w, const Stats<T>& stats,
                                      const Scales<T>& s, T* moves) {
    T log_p = 0;
    for (int i = 0; i < size(tile); ++i) {
      T p = 0;
      for (int j = 0; j < w.used; ++j) p += target[j * kTile + i] * s.target[j];
      if (labels[i] != 0 && p < kLeast) log_p += follow_tiny(b, tile * kTile + i, labels[i], w, stats, moves);
    }
    return log_p;
  }
  // y log2 p of a column, which moves the attention by what it adds.
  T follow_tiny(int64_t b, int64_t c, T y, const Weights<T>& w, const Stats<T>& stats, T* moves) {
    T l[kMaxSnapshots];
    for (int j = 0; j < w.used; ++j) l[j] = std::fma(read<T>(a.snapshot[w.id[j]], b, c), k, -stats.target[j].max);
    const T nll = mixture_nll(w.w, stats.target, l, w.used);
    for (int j = 0; j < w.used; ++j) moves[j] += y * (w.w[j] - l[j]);
    return -y * T(kLog2e) * nll;
  }

  // The mixture Σ_m w_m z_m of a tile.
  void mix(int64_t b, int64_t tile, const Weights<T>& w) {
    const int n = size(tile);
    T* line = mixed + tile * kTile;
    with_elements_of(a.snapshot[0], b, tile, [&](auto first) {
      constexpr int v = Simd<T>::width, block = 4 * v;
      decltype(first) z[kMaxSnapshots];
      for (int j = 0; j < w.used; ++j)
        with_elements_of(a.snapshot[w.id[j]], b, tile, [&](auto p) { z[j] = reinterpret_cast<decltype(first)>(p); });
      int i = 0;
      for (; i + block <= n; i += block) {
        Vec<T> sum[4] = {};
        for (int j = 0; j < w.used; ++j) {
          if (const int64_t next = ahead(a.snapshot[w.id[j]])) prefetch(z[j], i + next, block);
          for (int u = 0; u < 4; ++u) sum[u] += load_from<T>(z[j] + i + u * v) * w.w[j];
        }
        for (int u = 0; u < 4; ++u) store(line + i + u * v, sum[u]);
      }
      for (; i < n; i += v) {
        Vec<T> sum = {};
        for (int j = 0; j < w.used; ++j) sum += load_from<T>(z[j] + i, n - i) * w.w[j];
        store(line + i, sum);
      }
    });
  }

  // The sums of a tile, but `moved`, and d = d_student, but what is beyond `whole` in `hard`. For the attention by KL,
  // soft is r (probability) or p r (logit). Soft labels of logit fusion leave Σ y p - y in the line of the student.
  template <bool probability, bool ce, bool follows>
  void combine(int64_t b, int64_t tile, int whole, const Weights<T>& w, const Stats<T>& stats, const Scales<T>& s, T* d,
               Sums<T>& out) {
    const int n = size(tile), used = w.used;
    const T kd = row_scale * beta * tau, student_max = stats.soft.max, soft_scale = kd * s.soft;
    const T log_sum = s.log_ratio, mixture_max = stats.target[0].max, k = this->k;
    const T hard_max = stats.hard.max, label_scale = row_scale * static_cast<T>(a.alpha);
    const T* mixture = mixed + tile * kTile;
    Vec<T> kl = {}, label_log_q = {}, label_log_p = {};
    typename Simd<T>::IntVec tiny = {};
    Vec<T> given_labels[4], ratio[4];  // of a block: y, 0 where p is too small for a number, and y / p
    alignas(kVectorBytes) Vec<T> moves[follows && probability ? kMaxSnapshots : 1];  // Σ (y - y p_m / p)
    for (int j = 0; follows && probability && j < used; ++j) moves[j] = Vec<T>{};
    const auto column = [&](int i, Vec<T> p, [[maybe_unused]] int u) __attribute__((always_inline)) {
      const Vec<T> student_logits = load(student + i);
      Vec<T> log_p;
      if constexpr (probability)
        log_p = log2(max(p, splat(kLeast)));
      else
        log_p = scaled(load(mixture + i), k, mixture_max);
      Vec<T> r = log_p - scaled(student_logits, k, student_max) + log_sum;
      r = p > 0 ? r : Vec<T>{};
      const Vec<T> pr = p * r;
      kl += pr;
      Vec<T> x = load(soft + i) * soft_scale - p * kd;
      if constexpr (ce) x += load(hard + i) * s.hard;
      if constexpr (follows) {
        const Vec<T> y = load(labels + i);
        auto given = y != 0;
        if constexpr (ce) {
          const Vec<T> log_q = y * scaled(student_logits, T(kLog2e), hard_max);
          label_log_q += given ? log_q : Vec<T>{};
          x -= y * label_scale;
        }
        if constexpr (probability) {
          tiny |= given & (p < kLeast);
          given &= ~(p < kLeast);  // NaN is given
          log_p += p - p;          // and stays NaN
          if (by_label) {
            given_labels[u] = given ? y : Vec<T>{};
            ratio[u] = given ? y * inverse(p) : Vec<T>{};
          }
        }
        if (!probability && by_label) store(student + i, stats.label_sum * p - y);
        const Vec<T> weighted = y * log_p;
        label_log_p += given ? weighted : Vec<T>{};
      }
      i < whole ? store_to(d + i, x) : store(hard + i, x);
      if (by_kl) store(soft + i, probability ? r : pr);
    };
    constexpr int v = Simd<T>::width;
    // The columns of `count` vectors from i on.
    const auto block = [&](int i, auto count) __attribute__((always_inline)) {
      Vec<T> p[count()] = {};
      for (int j = 0; j < used; ++j)
        for (int u = 0; u < count(); ++u) p[u] += load(target + j * kTile + i + u * v) * s.target[j];
      for (int u = 0; u < count(); ++u) column(i + u * v, p[u], u);
      if constexpr (follows) {
        if (!by_label) return;
        auto given = given_labels[0] != 0;
        for (int u = 1; u < count(); ++u) given |= given_labels[u] != 0;
        if (!any(given)) return;
        Vec<T> all = given_labels[0];
        for (int u = 1; u < count(); ++u) all += given_labels[u];
        for (int j = 0; j < used; ++j) {  // differences of few numbers, for exactness
          Vec<T> share = {};
          for (int u = 0; u < count(); ++u) share += ratio[u] * load(target + j * kTile + i + u * v);
          moves[j] += all - share * (s.target[j] / w.w[j]);
        }
      }
    };
    int i = 0;
    if constexpr (probability) {
      for (; i + 4 * v <= n; i += 4 * v) block(i, std::integral_constant<int, 4>());
      for (; i < n; i += v) block(i, std::integral_constant<int, 1>());
    } else {
      for (; i < n; i += v) column(i, load(target + kTile + i) * s.target[0], 0);
    }
    out.kl = sum<T>(kl);
    if constexpr (!follows) return;
    out.log_q = sum<T>(label_log_q);
    out.log_p = sum<T>(label_log_p);
    if constexpr (!probability) {
      for (int j = 0; by_label && a.classes <= kTile && j < used; ++j)
        with_elements_of(a.snapshot[w.id[j]], b, tile, [&](auto z) {
          out.by_labels[j] = total<T>(n, [&](int i, int left) {
            const Vec<T> excess = load(student + i), product = excess * load_from<T>(z + i, left);
            return excess != 0 ? product : Vec<T>{};
          });
        });
      return;
    }
    for (int j = 0; by_label && j < used; ++j) out.by_labels[j] = w.w[j] * sum<T>(moves[j]);
    if (any(tiny)) {
      if (!by_label) std::fill_n(out.by_labels, used, T(0));
      out.log_p += follow_all_tiny(b, tile, w, stats, s, out.by_labels);
    }
  }

  // Σ_c f z, of a line f and logits z. A masked z meets f = 0.
  template <class S>
  static T weighted(const S* z, int n, const T* line) {
    return total<T>(n, [&](int i, int left) {
      return load(line + i) * max(load_from<T>(z + i, left), splat(std::numeric_limits<T>::lowest()));
    });
  }
  void weigh_logits(int64_t b, int64_t tile, const Weights<T>& w, Stats<T>& stats) const {
    const int n = size(tile);
    for (int j = 0; j < w.used; ++j)
      with_elements_of(a.snapshot[w.id[j]], b, tile, [&](auto z) {
        choose(soft_labels && by_label, [&](auto follows) {
          Vec<T> label_logits = {};
          stats.mean[j] = total<T>(n, [&](int i, int left) {
            const Vec<T> x = load_from<T>(z + i, left);
            if constexpr (follows) {
              const Vec<T> y = load(labels + i), product = y * x;
              label_logits += y != 0 ? product : Vec<T>{};
            }
            return load(target + kTile + i) * max(x, splat(std::numeric_limits<T>::lowest()));  // a masked x meets 0
          });
          if (follows) stats.label_logits[j] = sum<T>(label_logits);
        });
      });
  }

  // d_query = Σ_m de_m key_m,  d_key_m = de_m query.
  void write_embeddings(int64_t b, const T* de) {
    for (int64_t d = 0; d < a.width; d += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, a.width - d));
      T *query = soft, *key = hard, *d_query = student;
      read_line(a.query, b, d, n, query);
      std::fill_n(d_query, n, T(0));
      for (int m = 0; m < snapshots; ++m) {
        read_line(a.keys[m], b, d, n, key);
        for (int i = 0; i < n; ++i) d_query[i] += de[m] * key[i], key[i] = de[m] * query[i];
        write_line(a.d_keys, (m * a.rows + b) * a.width + d, a.keys[m].dtype, n, key);
      }
      write_line(a.d_query, b * a.width + d, a.query.dtype, n, d_query);
    }
  }

 protected:
  static constexpr T kLeast = std::numeric_limits<T>::min();
  const EnsembleKD& a;
  const int snapshots;
  const bool soft_labels, has_ce;
  const T beta, tau, k, row_scale;
  const int power;             // τ, where exponentials at 1 are small powers of those at τ; else 0
  const bool by_kl, by_label;  // what, if anything, moves the attention
  // Lines; target has one per snapshot, two at least, and labels are soft ones.
  T *target, *student, *soft, *hard, *labels;

 public:
  T* mixed;  // logit: the mixture of the whole row; threads that share a row share it
};

}  // namespace
}  // namespace eekd::EEKD_ISA

#include "narrow.h"

namespace eekd::EEKD_ISA {
namespace {

template <class T>
void narrow_rows(const EnsembleKD& a, int64_t begin, int64_t end, bool ce) {
  constexpr int64_t lanes = NarrowKernel<T>::lanes;
  NarrowKernel<T> kernel(a, ce);
  choose(a.label_weights.data, [&](auto soft) {
    for (int64_t b = begin; b < end; b += lanes)
      kernel.template run<soft>(b, static_cast<int>(std::min(lanes, end - b)));
  });
}

template <class T>
void whole_rows(const EnsembleKD& a, int64_t begin, int64_t end, bool ce) {
  Kernel<T> kernel(a, ce);
  const int64_t tiles = (a.classes + kTile - 1) / kTile;
  for (int64_t b = begin; b < end; ++b) {
    if (kernel.ignored(b)) {
      kernel.write_zeros(b);
      continue;
    }
    Weights<T> w;
    Stats<T> row, stats;
    Sums<T> sums, share;
    kernel.weigh(b, w);
    if (tiles == 1) {
      kernel.fill(b, 0, w, Find::both, row);
      kernel.visit(b, 0, w, row, kernel.scales(w, row), sums);
    } else {
      kernel.clear(row);
      kernel.clear(sums);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        kernel.fill(b, tile, w, Find::stats, stats);
        kernel.add(row, stats, w);
      }
      const Scales<T> scales = kernel.scales(w, row);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        kernel.fill(b, tile, w, Find::lines, row);
        kernel.visit(b, tile, w, row, scales, share);
        kernel.add(sums, share, w);
      }
    }
    kernel.finish(b, w, row, sums);
  }
}

// For fewer rows than threads: the tiles of a row are shared out, twice, and combined in order in between.
template <class T>
struct SharedRow {
  const EnsembleKD& a;
  int64_t b;
  Weights<T> w;
  Stats<T> row;
  Scales<T> scales;
  std::vector<Stats<T>> stats;
  std::vector<Sums<T>> sums;
  T* mixed = nullptr;  // of all threads

  static void first_visit(int64_t begin, int64_t end, void* context) {
    SharedRow& r = *static_cast<SharedRow*>(context);
    Kernel<T> kernel(r.a, true);
    kernel.mixed = r.mixed;
    for (int64_t tile = begin; tile < end; ++tile) kernel.fill(r.b, tile, r.w, Find::stats, r.stats[tile]);
  }
  static void second_visit(int64_t begin, int64_t end, void* context) {
    SharedRow& r = *static_cast<SharedRow*>(context);
    Kernel<T> kernel(r.a, true);
    kernel.mixed = r.mixed;
    Stats<T> row = r.row;
    for (int64_t tile = begin; tile < end; ++tile) {
      kernel.fill(r.b, tile, r.w, Find::lines, row);
      kernel.visit(r.b, tile, r.w, row, r.scales, r.sums[tile]);
    }
  }

  void run(const Parallel& parallel, int64_t grain) {
    Kernel<T> kernel(a, true);
    mixed = kernel.mixed;
    if (kernel.ignored(b)) return kernel.write_zeros(b);
    const int64_t tiles = stats.size();
    Sums<T> total;
    kernel.weigh(b, w);
    parallel.run(tiles, grain, first_visit, this);
    kernel.clear(row);
    for (const Stats<T>& tile : stats) kernel.add(row, tile, w);
    scales = kernel.scales(w, row);
    parallel.run(tiles, grain, second_visit, this);
    kernel.clear(total);
    for (const Sums<T>& tile : sums) kernel.add(total, tile, w);
    kernel.finish(b, w, row, total);
  }
};

}  // namespace

template <class T>
void ensemble_kd_rows(const EnsembleKD& a, int64_t begin, int64_t end, bool ce) {
  a.classes <= kNarrow ? narrow_rows<T>(a, begin, end, ce) : whole_rows<T>(a, begin, end, ce);
}

template <class T>
void ensemble_kd_fwd(const EnsembleKD& a, const Parallel& parallel) {
  const int64_t tiles = (a.classes + kTile - 1) / kTile;
  const auto grain = [&](int64_t columns) { return std::max<int64_t>(1, kGrain / (columns * (a.snapshots + 2))); };
  if (a.rows >= parallel.threads || tiles == 1) {
    // Threads share whole vectors of narrow rows.
    struct Share {
      const EnsembleKD& a;
      const int64_t unit;
    } share = {a, a.classes <= kNarrow ? NarrowKernel<T>::lanes : 1};
    const auto rows = [](int64_t begin, int64_t end, void* context) {
      const auto& [a, unit] = *static_cast<const Share*>(context);
      ensemble_kd_rows<T>(a, begin * unit, std::min(end * unit, a.rows), true);
    };
    parallel.run((a.rows + share.unit - 1) / share.unit, grain(a.classes * share.unit), rows, &share);
  } else {
    for (int64_t b = 0; b < a.rows; ++b)
      SharedRow<T>{a, b, {}, {}, {}, std::vector<Stats<T>>(tiles), std::vector<Sums<T>>(tiles)}.run(parallel,
                                                                                                    grain(kTile));
  }
}

template void ensemble_kd_rows<float>(const EnsembleKD&, int64_t, int64_t, bool);
template void ensemble_kd_rows<double>(const EnsembleKD&, int64_t, int64_t, bool);
template void ensemble_kd_fwd<float>(const EnsembleKD&, const Parallel&);
template void ensemble_kd_fwd<double>(const EnsembleKD&, const Parallel&);

}  // namespace eekd::EEKD_ISA
