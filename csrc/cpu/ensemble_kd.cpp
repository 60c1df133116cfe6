// ensemble_kd on the CPU: attention, fusion, KL, CE and all gradients of a row while its logits are in cache.
//
// A row is cut into tiles of kTile columns. The first visit of a tile gives softmax statistics, the second the
// loss and the gradients. A row of one tile is converted and exponentiated once, and kept between the visits;
// longer rows are read again, from cache, instead of parking M rows of exponentials in memory.
//
// Compiled once per instruction set, into the namespace EEKD_ISA. Statistics and sums of tiles are combined in the
// order of the columns, whoever computed them, so the bits do not depend on the number of threads.

#include <algorithm>
#include <cstring>
#include <vector>

#include "../eekd.h"
#include "../row.h"
#include "simd.h"

namespace eekd::EEKD_ISA {
namespace {

constexpr int kTile = 1024;
constexpr int64_t kGrain = 1 << 14;  // logits per task below which a second thread costs more than it gives

template <class T>
struct Stats {
  SoftmaxSum<T> target[kMaxSnapshots];  // probability: one per snapshot; logit: [0] is the mixture's
  SoftmaxSum<T> soft, hard;             // the student at τ and at 1

  void clear(int targets) {
    std::fill_n(target, targets, SoftmaxSum<T>::none());
    soft = hard = SoftmaxSum<T>::none();
  }
  void merge(const Stats& tile, int targets, T k) {
    for (int m = 0; m < targets; ++m) eekd::merge(target[m], tile.target[m], k);
    eekd::merge(soft, tile.soft, k);
    eekd::merge(hard, tile.hard, T(kLog2e));
  }
};

template <class T>
struct Sums {
  T kl;                    // Σ_c p r,  r = log p - log q
  T mean[kMaxSnapshots];   // logit: Σ_c p z_m
  T moved[kMaxSnapshots];  // probability: Σ_c p_m r;  logit: Σ_c p r z_m

  void clear(int snapshots) {
    kl = 0;
    std::fill_n(mean, snapshots, T(0));
    std::fill_n(moved, snapshots, T(0));
  }
  void add(const Sums& tile, int snapshots) {
    kl += tile.kl;
    for (int m = 0; m < snapshots; ++m) mean[m] += tile.mean[m], moved[m] += tile.moved[m];
  }
};

// What turns a tile's lines into probabilities and gradients, known once the row's statistics are.
template <class T>
struct Scales {
  T target[kMaxSnapshots];  // probability: w_m / Σ exp;  logit: [0] 1 / Σ exp
  T soft, hard;             // 1 / Σ exp
  T log_ratio;              // log of the student's sum, less log of the mixture's (logit)
  T kd, ce;                 // coefficients of (q - p) and of softmax(s) in d_student
};

template <class T>
T max_line(const T* line, int n) {
  Vec<T> most = load(line);
  for (int i = Simd<T>::width; i < n; i += Simd<T>::width) most = max(most, load(line + i));
  return largest<T>(most);
}

// e = 2^(k (x - max)), in place where e is x; returns its sum.
template <class T>
T exp_line(const T* x, T* e_line, int n, T max, T k) {
  Vec<T> total = {};
  for (int i = 0; i < n; i += Simd<T>::width) {
    const Vec<T> e = exp2((load(x + i) - max) * k);
    store(e_line + i, e);
    total += e;
  }
  return sum<T>(total);
}

template <class T>
class Kernel {
 public:
  explicit Kernel(const EnsembleKD& args)
      : a(args),
        snapshots(static_cast<int>(a.snapshots)),
        targets(a.fusion == Fusion::probability ? snapshots : 1),
        tiles((a.classes + kTile - 1) / kTile),
        has_ce(a.labels && a.alpha > 0),
        beta(static_cast<T>(a.labels ? 1 - a.alpha : 1)),
        tau(static_cast<T>(a.temperature)),
        k(static_cast<T>(kLog2e / a.temperature)),
        row_scale(static_cast<T>(a.row_scale)) {
    const bool attends = a.d_scores || a.d_query;
    moves_by_kl = attends && a.objective == Objective::kl;
    moves_by_label = attends && a.objective == Objective::label;
    // Per thread, a few tiles: the lines below.
    struct alignas(64) Block {
      T x[64 / sizeof(T)];
    };
    static thread_local std::vector<Block> scratch;
    const size_t lines = std::max(snapshots, 2) + 3;
    scratch.resize(std::max(scratch.size(), lines * kTile * sizeof(T) / sizeof(Block)));
    target = scratch.data()->x;
    student = target + std::max(snapshots, 2) * kTile;
    soft = student + kTile;
    hard = soft + kTile;
  }

  bool ignored(int64_t b) const { return a.labels && a.labels[b] == a.ignore_index; }
  int64_t row_tiles() const { return tiles; }

  void zero(int64_t b) {
    static_cast<T*>(a.loss)[b] = static_cast<T*>(a.attention_loss)[b] = 0;
    std::fill_n(a.weights + b * snapshots, snapshots, 0.f);
    const auto clear = [](void* p, DType dtype, int64_t offset, int64_t n) {
      const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
      if (p) std::memset(static_cast<char*>(p) + offset * size, 0, n * size);
    };
    clear(a.d_student, a.student.dtype, b * a.classes, a.classes);
    clear(a.d_scores, a.scores.dtype, b * snapshots, snapshots);
    clear(a.d_query, a.query.dtype, b * a.width, a.width);
    for (int m = 0; m < snapshots; ++m)
      clear(a.d_keys, a.keys[0].dtype, (m * a.rows + b) * a.width, a.width);
  }

  // w = softmax of the scores, which are given or are the products of query and keys.
  void weigh(int64_t b, T* w) {
    T* e = student;
    if (a.query.data) {
      std::fill_n(e, snapshots, T(0));
      for (int64_t d = 0; d < a.width; d += kTile) {
        const int n = static_cast<int>(std::min<int64_t>(kTile, a.width - d));
        read_line(a.query.data, b * a.query.stride + d, a.query.dtype, n, soft);
        for (int m = 0; m < snapshots; ++m) {
          read_line(a.keys[m].data, b * a.keys[m].stride + d, a.keys[m].dtype, n, hard);
          for (int i = 0; i < n; ++i) e[m] += soft[i] * hard[i];
        }
      }
      pad_line(e, snapshots);
    } else if (a.scores.data) {
      read_line(a.scores.data, b * a.scores.stride, a.scores.dtype, snapshots, e);
    } else {
      std::fill_n(w, snapshots, T(1) / snapshots);
      return;
    }
    const T total = exp_line(e, e, snapshots, max_line(e, snapshots), T(kLog2e));
    for (int m = 0; m < snapshots; ++m) w[m] = e[m] / total;
  }

  // Fills the lines of a tile and, unless `known`, the statistics by which they are scaled.
  void fill(int64_t b, int64_t tile, const T* w, bool known, Stats<T>& stats) {
    const int n = tile_size(tile);
    const int64_t c = tile * kTile;
    if (a.fusion == Fusion::probability) {
      for (int m = 0; m < snapshots; ++m) {
        if (w[m] == 0) continue;
        T* line = target + m * kTile;
        read_line(a.snapshot[m].data, b * a.snapshot[m].stride + c, a.snapshot[m].dtype, n, line);
        exponentiate(line, line, n, k, known, stats.target[m]);
      }
    } else {
      T* mixed = target;
      T* line = target + kTile;
      bool first = true;
      for (int m = 0; m < snapshots; ++m) {
        if (w[m] == 0) continue;
        read_line(a.snapshot[m].data, b * a.snapshot[m].stride + c, a.snapshot[m].dtype, n, line);
        for (int i = 0; i < n; i += Simd<T>::width)
          store(mixed + i, first ? load(line + i) * w[m] : load(mixed + i) + load(line + i) * w[m]);
        first = false;
      }
      exponentiate(mixed, line, n, k, known, stats.target[0]);
    }
    read_line(a.student.data, b * a.student.stride + c, a.student.dtype, n, student);
    exponentiate(student, soft, n, k, known, stats.soft);
    if (has_ce) {
      stats.hard.max = stats.soft.max;
      const T total = exp_line(student, hard, n, stats.hard.max, T(kLog2e));
      if (!known) stats.hard.sum = total;
    }
  }

  Scales<T> scales(const T* w, const Stats<T>& stats) const {
    Scales<T> s;
    if (a.fusion == Fusion::probability)
      for (int m = 0; m < snapshots; ++m) s.target[m] = w[m] == 0 ? T(0) : w[m] / stats.target[m].sum;
    else
      s.target[0] = 1 / stats.target[0].sum;
    s.soft = 1 / stats.soft.sum;
    s.log_ratio = std::log(stats.soft.sum);
    if (a.fusion == Fusion::logit) s.log_ratio -= std::log(stats.target[0].sum);
    s.hard = has_ce ? 1 / stats.hard.sum : T(0);
    s.kd = row_scale * beta * tau;
    s.ce = has_ce ? row_scale * static_cast<T>(a.alpha) : T(0);
    return s;
  }

  // The second visit of a tile, whose lines are filled: its share of the sums, and its columns of d_student.
  void visit(int64_t b, int64_t tile, const T* w, const Stats<T>& stats, const Scales<T>& s, Sums<T>& out) {
    const int n = tile_size(tile);
    out.clear(snapshots);
    if (a.fusion == Fusion::probability)
      has_ce ? combine<Fusion::probability, true>(n, w, stats, s, out)
             : combine<Fusion::probability, false>(n, w, stats, s, out);
    else
      has_ce ? combine<Fusion::logit, true>(n, w, stats, s, out) : combine<Fusion::logit, false>(n, w, stats, s, out);
    if (a.d_student) {
      const int64_t c = tile * kTile;
      if (has_ce && a.labels[b] >= c && a.labels[b] < c + n) hard[a.labels[b] - c] -= s.ce;
      write_line(a.d_student, b * a.classes + c, a.student.dtype, n, hard);
    }
    if (a.fusion == Fusion::probability && moves_by_kl)
      for (int m = 0; m < snapshots; ++m)
        if (w[m] != 0) out.moved[m] = dot(target + m * kTile, soft, n) / stats.target[m].sum;
    if (a.fusion == Fusion::logit && (moves_by_kl || moves_by_label)) reread(b, tile, w, out);
  }

  // Everything that is O(M) or O(D) per row.
  void finish(int64_t b, const T* w, const Stats<T>& stats, const Sums<T>& sums) {
    const int64_t y = a.labels ? a.labels[b] : 0;
    T loss = beta == 0 ? T(0) : beta * tau * tau * sums.kl;
    T attention_loss = 0, g[kMaxSnapshots], de[kMaxSnapshots];
    if (has_ce)
      loss += static_cast<T>(a.alpha) *
              (std::log(stats.hard.sum) - (read<T>(a.student, b, y) - stats.hard.max));
    if (a.labels && a.fusion == Fusion::probability) {
      T posterior[kMaxSnapshots];
      for (int m = 0; m < snapshots; ++m) posterior[m] = w[m] == 0 ? T(0) : (read<T>(a.snapshot[m], b, y) - stats.target[m].max) * k;
      attention_loss = mixture_nll(w, stats.target, posterior, snapshots);
      for (int m = 0; m < snapshots; ++m) de[m] = row_scale * (w[m] - posterior[m]);
    } else if (a.labels) {
      T mixed = 0;
      for (int m = 0; m < snapshots; ++m) {
        if (w[m] == 0) continue;
        const T z = read<T>(a.snapshot[m], b, y);
        mixed += w[m] * z;
        g[m] = (sums.mean[m] - z) / tau;
      }
      attention_loss = std::log(stats.target[0].sum) - (mixed - stats.target[0].max) / tau;
      softmax_grad(w, g, row_scale, de, snapshots);
    }
    if (moves_by_kl) {
      for (int m = 0; m < snapshots; ++m)
        g[m] = a.fusion == Fusion::probability ? tau * tau * sums.moved[m]
                                               : tau * (sums.moved[m] - sums.kl * sums.mean[m]);
      softmax_grad(w, g, beta == 0 ? T(0) : row_scale * beta, de, snapshots);
    }
    static_cast<T*>(a.loss)[b] = row_scale * loss;
    static_cast<T*>(a.attention_loss)[b] = row_scale * attention_loss;
    for (int m = 0; m < snapshots; ++m) a.weights[b * snapshots + m] = static_cast<float>(w[m]);
    if (a.d_scores) write_line(a.d_scores, b * snapshots, a.scores.dtype, snapshots, de);
    if (a.d_query) write_embeddings(b, de);
  }

 private:
  int tile_size(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kTile, a.classes - tile * kTile)); }

  void exponentiate(const T* x, T* e, int n, T scale, bool known, SoftmaxSum<T>& stats) {
    if (!known) stats.max = max_line(x, n);
    const T total = exp_line(x, e, n, stats.max, scale);
    if (!known) stats.sum = stats.max == -std::numeric_limits<T>::infinity() ? T(0) : total;
  }

  static T dot(const T* x, const T* y, int n) {
    Vec<T> total = {};
    for (int i = 0; i < n; i += Simd<T>::width) total += load(x + i) * load(y + i);
    return sum<T>(total);
  }

  // hard = d_student; soft = r (probability) or p r (logit), and target[0] = p (logit), for the attention.
  template <Fusion fusion, bool ce>
  void combine(int n, const T* w, const Stats<T>& stats, const Scales<T>& s, Sums<T>& out) {
    const T inverse = 1 / tau;
    Vec<T> kl = {};
    for (int i = 0; i < n; i += Simd<T>::width) {
      const Vec<T> x = (load(student + i) - stats.soft.max) * inverse;  // log q + log of the student's sum
      Vec<T> p = {}, log_p;
      if constexpr (fusion == Fusion::probability) {
        for (int m = 0; m < snapshots; ++m)
          if (w[m] != 0) p += load(target + m * kTile + i) * s.target[m];
        log_p = log(max(p, splat(std::numeric_limits<T>::min())));
      } else {
        p = load(target + kTile + i) * s.target[0];
        log_p = (load(target + i) - stats.target[0].max) * inverse;
      }
      const Vec<T> q = load(soft + i) * s.soft;
      const Vec<T> r = p > 0 ? log_p - x + s.log_ratio : Vec<T>{};
      const Vec<T> pr = p * r;
      kl += pr;
      Vec<T> d = (q - p) * s.kd;
      if constexpr (ce) d += load(hard + i) * (s.ce * s.hard);
      store(hard + i, d);
      if constexpr (fusion == Fusion::probability) {
        store(soft + i, r);
      } else {
        store(target + i, p);
        store(soft + i, pr);
      }
    }
    out.kl = sum<T>(kl);
  }

  // logit: Σ p z_m and Σ p r z_m, from the logits once more.
  void reread(int64_t b, int64_t tile, const T* w, Sums<T>& out) {
    const int n = tile_size(tile);
    T* line = target + kTile;
    for (int m = 0; m < snapshots; ++m) {
      if (w[m] == 0) continue;
      read_line(a.snapshot[m].data, b * a.snapshot[m].stride + tile * kTile, a.snapshot[m].dtype, n, line);
      Vec<T> mean = {}, moved = {};
      for (int i = 0; i < n; i += Simd<T>::width) {
        const Vec<T> p = load(target + i);
        const Vec<T> z = p > 0 ? load(line + i) : Vec<T>{};
        mean += p * z;
        moved += load(soft + i) * z;
      }
      out.mean[m] = sum<T>(mean);
      out.moved[m] = sum<T>(moved);
    }
  }

  // d_query = Σ_m de_m key_m,  d_key_m = de_m query.
  void write_embeddings(int64_t b, const T* de) {
    for (int64_t d = 0; d < a.width; d += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, a.width - d));
      T *query = soft, *key = hard, *d_query = student;
      read_line(a.query.data, b * a.query.stride + d, a.query.dtype, n, query);
      std::fill_n(d_query, n, T(0));
      for (int m = 0; m < snapshots; ++m) {
        read_line(a.keys[m].data, b * a.keys[m].stride + d, a.keys[m].dtype, n, key);
        for (int i = 0; i < n; ++i) d_query[i] += de[m] * key[i], key[i] = de[m] * query[i];
        write_line(a.d_keys, (m * a.rows + b) * a.width + d, a.keys[m].dtype, n, key);
      }
      write_line(a.d_query, b * a.width + d, a.query.dtype, n, d_query);
    }
  }

  const EnsembleKD& a;
  const int snapshots, targets;
  const int64_t tiles;
  const bool has_ce;
  const T beta, tau, k, row_scale;
  bool moves_by_kl, moves_by_label;
  T *target, *student, *soft, *hard;  // lines of kTile

 public:
  void clear(Stats<T>& row) const { row.clear(targets); }
  void merge(Stats<T>& row, const Stats<T>& tile) const { row.merge(tile, targets, k); }
};

template <class T>
void whole_rows(const EnsembleKD& a, int64_t begin, int64_t end) {
  Kernel<T> kernel(a);
  for (int64_t b = begin; b < end; ++b) {
    if (kernel.ignored(b)) {
      kernel.zero(b);
      continue;
    }
    T w[kMaxSnapshots];
    kernel.weigh(b, w);
    const int64_t tiles = kernel.row_tiles();
    Stats<T> row;
    if (tiles == 1) {
      kernel.fill(b, 0, w, false, row);
    } else {
      kernel.clear(row);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        Stats<T> stats;
        kernel.clear(stats);
        kernel.fill(b, tile, w, false, stats);
        kernel.merge(row, stats);
      }
    }
    const Scales<T> scales = kernel.scales(w, row);
    Sums<T> sums;
    if (tiles == 1) {
      kernel.visit(b, 0, w, row, scales, sums);
    } else {
      sums.clear(static_cast<int>(a.snapshots));
      for (int64_t tile = 0; tile < tiles; ++tile) {
        Sums<T> share;
        kernel.fill(b, tile, w, true, row);
        kernel.visit(b, tile, w, row, scales, share);
        sums.add(share, static_cast<int>(a.snapshots));
      }
    }
    kernel.finish(b, w, row, sums);
  }
}

}  // namespace

template <class T>
void ensemble_kd_fwd(const EnsembleKD& a, const Parallel& parallel) {
  const int64_t row_work = a.classes * (a.snapshots + 2);
  const int64_t tiles = (a.classes + kTile - 1) / kTile;
  if (a.rows >= parallel.threads || tiles == 1) {
    const auto body = [](int64_t begin, int64_t end, void* context) {
      whole_rows<T>(*static_cast<const EnsembleKD*>(context), begin, end);
    };
    parallel.run(a.rows, std::max<int64_t>(1, kGrain / row_work), body, const_cast<EnsembleKD*>(&a));
    return;
  }
  // Fewer rows than threads: the tiles of one row are shared out, twice, and combined in order in between.
  for (int64_t b = 0; b < a.rows; ++b) {
    Kernel<T> kernel(a);
    if (kernel.ignored(b)) {
      kernel.zero(b);
      continue;
    }
    struct Context {
      const EnsembleKD& a;
      int64_t b;
      T w[kMaxSnapshots];
      std::vector<Stats<T>> stats;
      std::vector<Sums<T>> sums;
      Stats<T> row;
      Scales<T> scales;
    } context{a, b, {}, std::vector<Stats<T>>(tiles), std::vector<Sums<T>>(tiles), {}, {}};
    kernel.weigh(b, context.w);
    const int64_t grain = std::max<int64_t>(1, kGrain / (kTile * (a.snapshots + 2)));
    parallel.run(tiles, grain, [](int64_t begin, int64_t end, void* p) {
      Context& c = *static_cast<Context*>(p);
      Kernel<T> kernel(c.a);
      for (int64_t tile = begin; tile < end; ++tile) kernel.fill(c.b, tile, c.w, false, c.stats[tile]);
    }, &context);
    kernel.clear(context.row);
    for (const Stats<T>& stats : context.stats) kernel.merge(context.row, stats);
    context.scales = kernel.scales(context.w, context.row);
    parallel.run(tiles, grain, [](int64_t begin, int64_t end, void* p) {
      Context& c = *static_cast<Context*>(p);
      Kernel<T> kernel(c.a);
      for (int64_t tile = begin; tile < end; ++tile) {
        Stats<T> row = c.row;
        kernel.fill(c.b, tile, c.w, true, row);
        kernel.visit(c.b, tile, c.w, c.row, c.scales, c.sums[tile]);
      }
    }, &context);
    Sums<T> sums;
    sums.clear(static_cast<int>(a.snapshots));
    for (const Sums<T>& share : context.sums) sums.add(share, static_cast<int>(a.snapshots));
    kernel.finish(b, context.w, context.row, sums);
  }
}

template void ensemble_kd_fwd<float>(const EnsembleKD&, const Parallel&);
template void ensemble_kd_fwd<double>(const EnsembleKD&, const Parallel&);

}  // namespace eekd::EEKD_ISA
