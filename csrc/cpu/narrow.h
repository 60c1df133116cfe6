// ensemble_kd of rows of few classes on the CPU: a row per lane, as many at a time as a vector has lanes. What a row
// costs besides its columns (softmax of the scores, logarithms, sums over lanes) is so shared by all of them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

namespace eekd::EEKD_ISA {
namespace {

// Rows become columns. In fp32 within 128 bits first, then by moving these, an instruction for each vector and step.
template <int first, int second, class V, size_t... i>
[[gnu::always_inline]] inline V zip(V a, V b, std::index_sequence<i...>) {  // two of each four lanes of a and of b
  return __builtin_shufflevector(a, b, (i / 4 * 4 + (i % 2 ? sizeof...(i) : 0) + (i % 4 < 2 ? first : second))...);
}
template <int first, class V, size_t... i>
[[gnu::always_inline]] inline V halves(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (i / 4 * 4 + (i % 4 < 2 ? 0 : sizeof...(i)) + first + i % 2)...);
}
template <int step, bool upper, class V, size_t... i>
[[gnu::always_inline]] inline V quarters(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(
      a, b, (i / 4 & step ? (upper ? i : i - 4 * step) + sizeof...(i) : (upper ? i + 4 * step : i))...);
}
template <int step, class V, int lanes>
[[gnu::always_inline]] inline void swap_quarters(V (&v)[lanes]) {
  if constexpr (4 * step < lanes) {
    constexpr auto all = std::make_index_sequence<lanes>();
    for (int i = 0; i < lanes; ++i)
      if (!(i & 4 * step)) {
        const V a = v[i], b = v[i + 4 * step];
        v[i] = quarters<step, false>(a, b, all), v[i + 4 * step] = quarters<step, true>(a, b, all);
      }
    swap_quarters<2 * step>(v);
  }
}
template <class V, int lanes>
[[gnu::always_inline]] inline void transpose(V (&v)[lanes]) {
  if constexpr (sizeof(v[0][0]) == 4) {
    constexpr auto all = std::make_index_sequence<lanes>();
    for (int i = 0; i < lanes; i += 4) {
      const V a = zip<0, 1>(v[i], v[i + 1], all), b = zip<2, 3>(v[i], v[i + 1], all);
      const V c = zip<0, 1>(v[i + 2], v[i + 3], all), d = zip<2, 3>(v[i + 2], v[i + 3], all);
      v[i] = halves<0>(a, c, all), v[i + 1] = halves<2>(a, c, all);
      v[i + 2] = halves<0>(b, d, all), v[i + 3] = halves<2>(b, d, all);
    }
    swap_quarters<1>(v);
  } else {
    for (int i = 0; i < lanes; ++i)
      for (int j = 0; j < i; ++j) {
        const auto x = v[i][j];
        v[i][j] = v[j][i], v[j][i] = x;
      }
  }
}

template <class T>
class NarrowKernel : Kernel<T> {
  using Base = Kernel<T>;
  using V = Vec<T>;
  using Mask = typename Simd<T>::IntVec;
  using Base::a, Base::snapshots, Base::has_ce, Base::beta, Base::tau, Base::k, Base::row_scale, Base::power;
  using Base::by_kl, Base::by_label, Base::soft_labels;

 public:
  static constexpr int lanes = Simd<T>::width;

  NarrowKernel(const EnsembleKD& args, bool ce) : Base(args, ce), classes(static_cast<int>(a.classes)) {
    struct alignas(64) Block {
      T x[64 / sizeof(T)];
    };
    static thread_local std::vector<Block> scratch;  // kept between calls
    length = (std::max(classes, snapshots) + lanes - 1) / lanes * lanes * lanes;
    scratch.resize(std::max(scratch.size(), (snapshots + 6) * length * sizeof(T) / sizeof(Block) + 1));
    target = scratch.data()->x;
    student = target + snapshots * length;
    soft = student + length;
    hard = soft + length;
    mixed = hard + length;
    mixed_exp = mixed + length;
    labels = mixed_exp + length;
  }

  // Rows [b, b + count), at most one per lane, with soft labels or not. A line holds C vectors; lanes without a row
  // hold zeros.
  template <bool follows>
  void run(int64_t b, int count) {
    rows = count;
    const bool probability = a.fusion == Fusion::probability;
    for (int r = 0; r < lanes; ++r) {
      alive[r] = r < rows && !Base::ignored(b + r) ? -1 : 0;
      label[r] = alive[r] && a.labels ? static_cast<int>(a.labels[b + r]) : 0;
    }
    weigh(b);

    const auto read_student = [&] { read(a.student, b, classes, alive, student); };
    read_student();
    V soft_top, hard_top, soft_sum, hard_sum = splat(T(1));
    exponentials(student, soft, k, soft_top, soft_sum, read_student);
    if (has_ce) {
      bool done = false;
      if (power) {
        hard_top = soft_top * T(power), hard_sum = powers(soft, hard);
        done = every(hard_sum < T(1ull << 62));
      }
      if (!done) exponentials(student, hard, T(kLog2e), hard_top, hard_sum, read_student);
    }
    V log_ratio = log2_of(soft_sum);
    V top[kMaxSnapshots], total[kMaxSnapshots], scale[kMaxSnapshots];  // logit: [0] of the mixture
    for (int j = 0; j < used; ++j) {
      T* line = target + j * length;
      const auto read_target = [&] { read(a.snapshot[id[j]], b, classes, weighed[j], line); };
      read_target();
      if (!probability) continue;
      exponentials(line, line, k, top[j], total[j], read_target);
      scale[j] = w[id[j]] / total[j];
    }
    if (!probability) {
      mix();
      exponentials(mixed, mixed_exp, k, top[0], total[0], [] {});
      log_ratio -= log2_of(total[0]);
      scale[0] = 1 / total[0];
    }

    // The columns: KL, what moves the attention, and d_student in the line `hard`. Logarithms to base 2.
    const V kd = splat(row_scale * beta * tau), soft_scale = kd / soft_sum;
    V hard_scale = splat(row_scale * T(a.alpha)) / hard_sum;
    if constexpr (follows) {
      read(a.label_weights, b, classes, alive, labels);
      V sum[4] = {};  // each of few numbers, for exactness
      for (int c = 0; c < classes; ++c) sum[c % 4] += load(labels + c * lanes);
      label_sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      hard_scale *= label_sum;
      label_log_q = label_log_p = V{};
      std::fill_n(by_labels, used, V{});
    }
    const V label_scale = splat(row_scale * T(a.alpha));
    Mask tiny = {};
    V kl = {}, mean[kMaxSnapshots], moved[kMaxSnapshots];
    for (int j = 0; j < used; ++j) mean[j] = moved[j] = V{};
    const auto column = [&](int i, V p) __attribute__((always_inline)) {
      const V log_q = scaled_by<T>(load(student + i), k, soft_top);  // less the log of its sum
      const V log_p =
          probability ? log2(max(p, splat(std::numeric_limits<T>::min()))) : scaled_by<T>(load(mixed + i), k, top[0]);
      const V r = p > 0 ? log_p - log_q + log_ratio : V{};
      kl += p * r;
      V d = load(soft + i) * soft_scale - p * kd;
      if (has_ce) d += load(hard + i) * hard_scale;
      if constexpr (follows) {
        const V y = load(labels + i);
        Mask given = y != 0;
        if (has_ce) {
          const V weighted = y * scaled_by<T>(load(student + i), T(kLog2e), hard_top);
          label_log_q += given ? weighted : V{};
          d -= y * label_scale;
        }
        if (probability) {
          tiny |= given & (p < std::numeric_limits<T>::min());
          given &= ~(p < std::numeric_limits<T>::min());  // NaN is given
        }
        const V weighted = y * (probability ? log_p + (p - p) : log_p);  // NaN stays NaN
        label_log_p += given ? weighted : V{};
        if (by_label && probability) {
          const V ratio = given ? y / p : V{}, counted = given ? y : V{};
          for (int j = 0; j < used; ++j)
            by_labels[j] += counted * w[id[j]] - ratio * (load(target + j * length + i) * scale[j]);
        }
        for (int j = 0; by_label && !probability && j < used; ++j) {
          const V excess = label_sum * p - y, weighted = excess * load(target + j * length + i);
          by_labels[j] += excess != 0 ? weighted : V{};
        }
      }
      store(hard + i, d);
      if (!by_kl && (follows || probability || !by_label)) return;
      for (int j = 0; j < used; ++j) {
        const V z = load(target + j * length + i);
        if (probability) {
          moved[j] += z * r;
        } else {
          const V share = p * (p > 0 ? z : V{});  // a masked z meets p = 0
          mean[j] += share;
          moved[j] += share * r;
        }
      }
    };
    int i = 0;
    if (probability) {
      for (; i + 4 * lanes <= size(); i += 4 * lanes) {
        V p[4] = {};
        for (int j = 0; j < used; ++j)
          for (int u = 0; u < 4; ++u) p[u] += load(target + j * length + i + u * lanes) * scale[j];
        for (int u = 0; u < 4; ++u) column(i + u * lanes, p[u]);
      }
      for (; i < size(); i += lanes) {
        V p = {};
        for (int j = 0; j < used; ++j) p += load(target + j * length + i) * scale[j];
        column(i, p);
      }
    } else {
      for (; i < size(); i += lanes) column(i, load(mixed_exp + i) * scale[0]);
    }
    if (follows && any(tiny)) follow_all_tiny(b, scale, top, total);
    finish(b, kl * T(kLn2), hard_top, hard_sum, top, total, mean, moved);
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  // Everything that is O(M) per row, and the outputs. kl and losses are in natural logarithms.
  void finish(int64_t b, V kl, V hard_top, V hard_sum, const V* top, const V* total, const V* mean, const V* moved) {
    const bool probability = a.fusion == Fusion::probability;
    V loss = beta == 0 ? V{} : beta * tau * tau * kl, attention_loss = {};
    V g[kMaxSnapshots], de[kMaxSnapshots];
    if (a.labels) {
      if (has_ce) {
        alignas(kVectorBytes) T s[lanes];
        for (int r = 0; r < lanes; ++r) s[r] = student[label[r] * lanes + r];
        loss -= T(a.alpha * kLn2) * (scaled_by<T>(load(s), T(kLog2e), hard_top) - log2_of(hard_sum));
      }
      for (int j = 0; j < used; ++j) g[j] = at_label(a.snapshot[id[j]], b, weighed[j]);  // z at the label
      if (probability) {
        V most = splat(-kInfinity), sum = {};
        for (int j = 0; j < used; ++j) {  // log2 of the snapshot's share of p_y
          const V share = scaled_by<T>(g[j], k, top[j]) + log2_w[id[j]] - log2_of(total[j]);
          g[j] = weighed[j] ? share : splat(-kInfinity);
          most = max(most, g[j]);
        }
        const V base = most == -kInfinity ? V{} : most;
        for (int j = 0; j < used; ++j) sum += g[j] = exp2(g[j] - base);
        attention_loss = sum == 0 ? splat(kInfinity) : T(-kLn2) * (base + log2_of(sum));
        for (int j = 0; j < used; ++j) de[j] = sum == 0 ? V{} : row_scale * (w[id[j]] - g[j] / sum);
      } else {
        V mixed_label = {};
        for (int j = 0; j < used; ++j) mixed_label += w[id[j]] * g[j], g[j] = (mean[j] - g[j]) / tau;
        attention_loss = T(kLn2) * (log2_of(total[0]) - scaled_by<T>(mixed_label, k, top[0]));
        for (int j = 0; j < used; ++j) g[j] = mixed_label == -kInfinity ? V{} : g[j];  // p_y = 0 for any weights
        softmax_grad(g, row_scale, de);
      }
    } else if (soft_labels) {
      if (has_ce) loss -= T(a.alpha * kLn2) * (label_log_q - label_sum * log2_of(hard_sum));
      const V log_p = probability ? label_log_p : label_log_p - label_sum * log2_of(total[0]);
      attention_loss = T(-kLn2) * log_p;
      for (int j = 0; by_label && j < used; ++j) {  // where p is 0 at a label, the weights get no gradient
        const V d = probability ? row_scale * by_labels[j] : by_labels[j] / tau;
        g[j] = de[j] = log_p == -kInfinity ? V{} : d;
      }
      if (by_label && !probability) softmax_grad(g, row_scale, de);
    }
    if (by_kl) {
      for (int j = 0; j < used; ++j) {
        const V moves = T(kLn2) * moved[j];
        g[j] = probability ? tau * tau * moves / total[j] : tau * (moves - kl * mean[j]);
        if (beta == 0) g[j] = V{};
      }
      softmax_grad(g, row_scale * beta, de);
    }
    write(a.loss, b, loss * row_scale);
    write(a.attention_loss, b, attention_loss * row_scale);
    write_rows(a.weights, DType::f32, b, snapshots, reinterpret_cast<const T*>(w));
    if (a.d_student) {
      if (has_ce && a.labels)
        for (int r = 0; r < lanes; ++r) hard[label[r] * lanes + r] -= row_scale * T(a.alpha);
      write_rows(a.d_student, a.student.dtype, b, classes, hard);
    }
    if (by_kl || by_label) {
      V all[kMaxSnapshots];
      std::fill_n(all, snapshots, V{});
      for (int j = 0; j < used; ++j) all[id[j]] = weighed[j] ? de[j] : V{};
      if (a.d_scores) {
        write_rows(a.d_scores, a.scores.dtype, b, snapshots, reinterpret_cast<const T*>(all));
      } else {
        for (int r = 0; r < rows; ++r) {
          T each[kMaxSnapshots];
          for (int m = 0; m < snapshots; ++m) each[m] = all[m][r];
          Base::write_attention(b + r, each);
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      if (!alive[r]) Base::write_zeros(b + r);
  }

  // Of the columns where p is too small for a number: what their soft labels add to label_log_p and by_labels.
  [[gnu::noinline]] void follow_all_tiny(int64_t b, const V* scale, const V* top, const V* total) {
    for (int i = 0; i < size(); i += lanes) {
      const V y = load(labels + i);
      V p = {};
      for (int j = 0; j < used; ++j) p += load(target + j * length + i) * scale[j];
      const Mask tiny = (y != 0) & (p < std::numeric_limits<T>::min());
      if (any(tiny)) follow_tiny(b, i / lanes, tiny, y, top, total);
    }
  }
  // Of the column c in the lanes where p is too small for a number.
  void follow_tiny(int64_t b, int64_t c, Mask tiny, V y, const V* top, const V* total) {
    for (int r = 0; r < rows; ++r) {
      if (!tiny[r]) continue;
      T weight[kMaxSnapshots], l[kMaxSnapshots];
      SoftmaxSum<T> sums[kMaxSnapshots];
      int of[kMaxSnapshots], n = 0;
      for (int j = 0; j < used; ++j)
        if (weighed[j][r]) {
          weight[n] = w[id[j]][r], sums[n] = {top[j][r], total[j][r]};
          l[n] = std::fma(eekd::EEKD_ISA::read<T>(a.snapshot[id[j]], b + r, c), k, -sums[n].max);
          of[n++] = j;
        }
      label_log_p[r] -= y[r] * T(kLog2e) * mixture_nll(weight, sums, l, n);
      for (int i = 0; i < n; ++i) by_labels[of[i]][r] += y[r] * (weight[i] - l[i]);
    }
  }

  int size() const { return classes * lanes; }

  // Of sums, which are at least 1, or NaN or infinite.
  static V log2_of(V x) { return log2(x) + (x - x); }

  // w = softmax of the scores over the snapshots, and its log2; which snapshots have weight, and in which lanes.
  void weigh(int64_t b) {
    T* scores = reinterpret_cast<T*>(w);
    if (a.query.data) {
      for (int r = 0; r < lanes; ++r) {
        if (alive[r]) Base::scores(b + r, Base::student);
        for (int m = 0; m < snapshots; ++m) scores[m * lanes + r] = alive[r] ? Base::student[m] : T(0);
      }
    } else if (a.scores.data) {
      read(a.scores, b, snapshots, alive, hard);
      std::copy_n(hard, snapshots * lanes, scores);
    } else {
      std::fill_n(w, snapshots, V{});
    }
    V most = w[0], sum = {};
    for (int m = 1; m < snapshots; ++m) most = max(most, w[m]);
    for (int m = 0; m < snapshots; ++m) {
      log2_w[m] = (w[m] - most) * T(kLog2e);
      sum += w[m] = exp2(log2_w[m]);
    }
    const V log2_sum = log2_of(sum);
    used = 0;
    for (int m = 0; m < snapshots; ++m) {
      log2_w[m] -= log2_sum, w[m] /= sum;
      weighed[used] = alive & (w[m] != 0);
      if (any(weighed[used])) id[used++] = m;
    }
  }

  // line = n columns of the rows, transposed, 0 in the lanes that are not taken. All is written in whole blocks.
  void read(const Matrix& x, int64_t b, int n, Mask take, T* line) const {
    const bool all = every(take);
    with_elements(x.data, x.dtype, 0, [&](auto p) {
      decltype(p) row[lanes];
      for (int r = 0; r < lanes; ++r) row[r] = p + (b + std::min(r, rows - 1)) * x.stride;
      for (int c = 0; c < n; c += lanes) {
        const int at = std::max(0, std::min(c, n - lanes));  // the last block begins early
        V v[lanes];
        if (n >= lanes)
          for (int r = 0; r < lanes; ++r) v[r] = load_from<T>(row[r] + at);
        else
          for (int r = 0; r < lanes; ++r) v[r] = load_from<T>(row[r], n);
        transpose(v);
        for (int j = 0; j < lanes; ++j) store(line + (at + j) * lanes, all ? v[j] : take ? v[j] : V{});
      }
    });
  }

  // The n columns of a line become rows [b, b + rows) of contiguous memory.
  void write_rows(void* data, DType dtype, int64_t b, int n, const T* line) {
    const bool direct = dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32) && rows == lanes && n >= lanes;
    T* to = direct ? static_cast<T*>(data) + b * n : soft;  // whose exponentials have been used
    for (int c = 0; c < n; c += lanes) {
      const int at = std::max(0, std::min(c, n - lanes));
      V v[lanes];
      for (int j = 0; j < lanes; ++j) v[j] = n >= lanes || j < n ? load(line + (at + j) * lanes) : V{};
      transpose(v);
      for (int r = 0; r < lanes; ++r) store_to(to + r * n + at, v[r]);  // in order: a short row ends in the next
    }
    if (!direct) write_line(data, b * n, dtype, rows * n, soft);
  }
  void write(void* data, int64_t b, V x) {
    alignas(kVectorBytes) T each[lanes];
    store(each, x);
    std::copy_n(each, rows, static_cast<T*>(data) + b);
  }

  // e = 2^(scale x - top); returns its sum. They may be one line.
  V exponentials_by(const T* x, T* e, T scale, V top) const {
    V sum[4] = {};
    int i = 0;
    for (; i + 4 * lanes <= size(); i += 4 * lanes)
      for (int u = 0; u < 4; ++u) {
        const V v = exp2(scaled_by<T>(load(x + i + u * lanes), scale, top));
        store(e + i + u * lanes, v);
        sum[u] += v;
      }
    for (; i < size(); i += lanes) {
      const V v = exp2(scaled_by<T>(load(x + i), scale, top));
      store(e + i, v);
      sum[0] += v;
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // By the largest of the first columns, as a rule, or by the largest of all, once reread() has restored x.
  template <class F>
  void exponentials(const T* x, T* e, T scale, V& top, V& sum, F reread) const {
    top = scale * largest_of(x, std::min(classes, 8));
    sum = exponentials_by(x, e, scale, top);
    if (every(sum < T(1ull << 62))) return;
    reread();
    top = scale * largest_of(x, classes);
    sum = exponentials_by(x, e, scale, top);
  }

  V largest_of(const T* line, int n) const {
    V most = load(line);
    for (int c = 1; c < n; ++c) most = max(most, load(line + c * lanes));
    return most;
  }

  // to = x^power; returns its sum.
  V powers(const T* x, T* to) const {
    V sum[2] = {};
    const auto raise = [&](int i, V& sum) __attribute__((always_inline)) {
      const V one = load(x + i), two = one * one, four = two * two;
      V y = power == 8 ? four * four : power & 4 ? four : power & 2 ? two : one;
      if (power == 6 || power == 7) y *= two;
      if (power > 1 && power & 1) y *= one;
      store(to + i, y);
      sum += y;
    };
    int i = 0;
    for (; i + 2 * lanes <= size(); i += 2 * lanes) raise(i, sum[0]), raise(i + lanes, sum[1]);
    if (i < size()) raise(i, sum[0]);
    return sum[0] + sum[1];
  }

  void mix() {
    for (int i = 0; i < size(); i += lanes) {
      V sum = {};
      for (int j = 0; j < used; ++j) sum += w[id[j]] * load(target + j * length + i);
      store(mixed + i, sum);
    }
  }

  V at_label(const Matrix& x, int64_t b, Mask take) const {
    alignas(kVectorBytes) T z[lanes];
    with_elements(x.data, x.dtype, 0, [&](auto p) {
      for (int r = 0; r < lanes; ++r) z[r] = take[r] ? static_cast<T>(p[(b + r) * x.stride + label[r]]) : T(0);
    });
    return load(z);
  }

  void softmax_grad(const V* g, T scale, V* de) const {
    V mean = {};
    for (int j = 0; j < used; ++j) mean += w[id[j]] * g[j];
    for (int j = 0; j < used; ++j) de[j] = scale * w[id[j]] * (g[j] - mean);
  }

  const int classes;
  int length;                                                      // of a line
  T *target, *student, *soft, *hard, *mixed, *mixed_exp, *labels;  // lines; target has one per snapshot of weight
  int rows, used;
  int id[kMaxSnapshots];  // of the snapshots that have weight in any lane
  int label[lanes];
  Mask alive;                   // the lanes with a row that is not ignored
  Mask weighed[kMaxSnapshots];  // of id[0, used): those in which it has weight
  V w[kMaxSnapshots], log2_w[kMaxSnapshots];
  // Of soft labels y: their sum, Σ_c y log2 of the student at 1 and of p, less the logarithms of their sums (p: of a
  // mixture's), and what they move the attention by, Σ_c y w_m (1 - p_m / p), or for logit fusion Σ_c (Σ y p - y) z_m.
  V label_sum, label_log_q, label_log_p, by_labels[kMaxSnapshots];
};

}  // namespace
}  // namespace eekd::EEKD_ISA
