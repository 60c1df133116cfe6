// ensemble_kd of rows of few classes on the CPU: a row per lane, as many at a time as a vector has lanes. What a row
// costs besides its columns (softmax of the scores, logarithms, sums over lanes) is so shared by all of them.
#pragma once

namespace eekd::EEKD_ISA {
namespace {

template <class T>
class NarrowKernel : Kernel<T> {
  using Base = Kernel<T>;
  using V = Vec<T>;
  using Base::a, Base::snapshots, Base::has_ce, Base::beta, Base::tau, Base::k, Base::row_scale;
  using Base::by_kl, Base::by_label, Base::target, Base::student, Base::soft, Base::hard;

 public:
  static constexpr int lanes = Simd<T>::width;

  NarrowKernel(const EnsembleKD& args, bool ce) : Base(args, ce) {}

  // Rows [b, b + rows), at most one per lane. A line holds C vectors; lanes without a row hold zeros.
  void run(int64_t b, int rows) {
    for (int r = 0; r < lanes; ++r) {
      alive[r] = r < rows && !Base::ignored(b + r);
      label[r] = alive[r] && a.labels ? static_cast<int>(a.labels[b + r]) : 0;
    }
    weigh(b);
    const bool probability = a.fusion == Fusion::probability;
    const V s_max = read(a.student, b, alive, student);
    const V soft_sum = exponentials(student, soft, s_max, k);
    const V hard_sum = has_ce ? exponentials(student, hard, s_max, T(kLog2e)) : splat(T(1));
    V log_ratio = log_of(soft_sum);
    V z_max[kMaxSnapshots], z_sum[kMaxSnapshots], scale[kMaxSnapshots];  // logit: [0] of the mixture
    for (int m = 0; m < snapshots; ++m) {
      for (int r = 0; r < lanes; ++r) used[m][r] = alive[r] && w[m][r] != 0;
      z_max[m] = read(a.snapshot[m], b, used[m], target + m * kTile);
      if (!probability) continue;
      z_sum[m] = exponentials(target + m * kTile, target + m * kTile, z_max[m], k);
      scale[m] = w[m] / z_sum[m];
    }
    if (!probability) {
      z_max[0] = mix();
      z_sum[0] = exponentials(mixed, nullptr, z_max[0], k);
      log_ratio -= log_of(z_sum[0]);
    }

    // The columns: KL, what moves the attention, and d_student in the line `hard`.
    const T inverse = 1 / tau;
    const V soft_scale = 1 / soft_sum, kd = splat(row_scale * beta * tau), ce = splat(row_scale * T(a.alpha));
    const V hard_scale = ce / hard_sum;
    V kl = {}, mean[kMaxSnapshots], moved[kMaxSnapshots];
    for (int m = 0; m < snapshots; ++m) mean[m] = moved[m] = V{};
    for (int i = 0; i < size(); i += lanes) {
      const V log_q = (load(student + i) - s_max) * inverse;  // less the log of its sum
      V p = {}, log_p;
      if (probability) {
        for (int m = 0; m < snapshots; ++m) p += load(target + m * kTile + i) * scale[m];
        log_p = log2(max(p, splat(std::numeric_limits<T>::min()))) * T(kLn2);
      } else {
        const V t = load(mixed + i) - z_max[0];
        p = exp2(t * k) / z_sum[0];
        log_p = t * inverse;
      }
      const V r = p > 0 ? log_p - log_q + log_ratio : V{};
      kl += p * r;
      V d = (load(soft + i) * soft_scale - p) * kd;
      if (has_ce) d += load(hard + i) * hard_scale;
      store(hard + i, d);
      if (!by_kl && (probability || !by_label)) continue;
      for (int m = 0; m < snapshots; ++m) {
        const V z = load(target + m * kTile + i);
        if (probability) {
          moved[m] += z * r;
        } else {
          const V share = p * (p > 0 ? z : V{});  // a masked z meets p = 0
          mean[m] += share;
          moved[m] += share * r;
        }
      }
    }

    // Everything that is O(M) per row.
    V loss = beta == 0 ? V{} : beta * tau * tau * kl, attention_loss = {};
    V g[kMaxSnapshots], de[kMaxSnapshots];
    if (a.labels) {
      if (has_ce) loss -= T(a.alpha) * (at_label(a.student, b, alive) - s_max - log_of(hard_sum));
      for (int m = 0; m < snapshots; ++m) g[m] = at_label(a.snapshot[m], b, used[m]);  // z_m at the label
      if (probability) {
        V most = splat(-kInfinity), total = {};
        for (int m = 0; m < snapshots; ++m) {  // log2 of the snapshot's share of p_y
          const V share = (g[m] - z_max[m]) * k + log2_w[m] - log_of(z_sum[m]) * T(kLog2e);
          g[m] = w[m] != 0 ? share : splat(-kInfinity);
          most = max(most, g[m]);
        }
        const V base = most == -kInfinity ? V{} : most;
        for (int m = 0; m < snapshots; ++m) total += g[m] = exp2(g[m] - base);
        attention_loss = total == 0 ? splat(kInfinity) : -(T(kLn2) * base + log_of(total));
        for (int m = 0; m < snapshots; ++m) de[m] = total == 0 ? V{} : row_scale * (w[m] - g[m] / total);
      } else {
        V mixed_label = {};
        for (int m = 0; m < snapshots; ++m) mixed_label += w[m] * g[m], g[m] = (mean[m] - g[m]) * inverse;
        attention_loss = log_of(z_sum[0]) - (mixed_label - z_max[0]) * inverse;
        for (int m = 0; m < snapshots; ++m) g[m] = mixed_label == -kInfinity ? V{} : g[m];  // p_y = 0 for any weights
        softmax_grad(g, row_scale, de);
      }
    }
    if (by_kl) {
      for (int m = 0; m < snapshots; ++m) {
        g[m] = probability ? tau * tau * moved[m] / z_sum[m] : tau * (moved[m] - kl * mean[m]);
        if (beta == 0) g[m] = V{};
      }
      softmax_grad(g, row_scale * beta, de);
    }
    loss *= row_scale;
    attention_loss *= row_scale;
    for (int r = 0; r < rows; ++r) {
      if (!alive[r]) {
        Base::write_zeros(b + r);
        continue;
      }
      static_cast<T*>(a.loss)[b + r] = loss[r];
      static_cast<T*>(a.attention_loss)[b + r] = attention_loss[r];
      for (int m = 0; m < snapshots; ++m) a.weights[(b + r) * snapshots + m] = static_cast<float>(w[m][r]);
      if (!a.d_student) continue;
      if (has_ce) hard[label[r] * lanes + r] -= row_scale * T(a.alpha);
      for (int c = 0; c < a.classes; ++c) soft[c] = hard[c * lanes + r];
      write_line(a.d_student, (b + r) * a.classes, a.student.dtype, static_cast<int>(a.classes), soft);
    }
    for (int r = 0; (by_kl || by_label) && r < rows; ++r) {  // last, for it needs the lines
      T each[kMaxSnapshots];
      for (int m = 0; m < snapshots; ++m) each[m] = w[m][r] != 0 ? de[m][r] : T(0);
      if (alive[r]) Base::write_attention(b + r, each);
    }
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  int size() const { return static_cast<int>(a.classes) * lanes; }

  // The natural logarithm of sums, which are at least 1, or NaN.
  static V log_of(V x) { return log2(x) * T(kLn2) + (x - x); }

  // w = softmax of the scores over the snapshots, and its log2.
  void weigh(int64_t b) {
    for (int r = 0; r < lanes; ++r) {
      if (alive[r]) Base::scores(b + r, student);
      for (int m = 0; m < snapshots; ++m) w[m][r] = alive[r] ? student[m] : T(0);
    }
    V most = w[0], total = {};
    for (int m = 1; m < snapshots; ++m) most = max(most, w[m]);
    for (int m = 0; m < snapshots; ++m) {
      log2_w[m] = (w[m] - most) * T(kLog2e);
      total += w[m] = exp2(log2_w[m]);
    }
    const V log2_total = log_of(total) * T(kLog2e);
    for (int m = 0; m < snapshots; ++m) log2_w[m] -= log2_total, w[m] /= total;
  }

  // line = the rows that are taken, transposed; returns their maxima.
  V read(const Matrix& x, int64_t b, const bool (&take)[lanes], T* line) const {
    with_elements(x.data, x.dtype, 0, [&](auto p) {
      for (int r = 0; r < lanes; ++r)
        for (int c = 0; c < a.classes; ++c)
          line[c * lanes + r] = take[r] ? static_cast<T>(p[(b + r) * x.stride + c]) : T(0);
    });
    return largest_of(line);
  }

  V largest_of(const T* line) const {
    V most = load(line);
    for (int i = lanes; i < size(); i += lanes) most = max(most, load(line + i));
    return most;
  }

  // e = 2^(scale (x - most)), unless e is null; returns its sum.
  V exponentials(const T* x, T* e, V most, T scale) const {
    V total = {};
    for (int i = 0; i < size(); i += lanes) {
      const V v = exp2((load(x + i) - most) * scale);
      if (e) store(e + i, v);
      total += v;
    }
    return total;
  }

  // mixed = Σ_m w_m z_m; returns its maxima.
  V mix() {
    for (int i = 0; i < size(); i += lanes) {
      V sum = {};
      for (int m = 0; m < snapshots; ++m) sum += w[m] * load(target + m * kTile + i);
      store(mixed + i, sum);
    }
    return largest_of(mixed);
  }

  V at_label(const Matrix& x, int64_t b, const bool (&take)[lanes]) const {
    V z = {};
    with_elements(x.data, x.dtype, 0, [&](auto p) {
      for (int r = 0; r < lanes; ++r)
        if (take[r]) z[r] = static_cast<T>(p[(b + r) * x.stride + label[r]]);
    });
    return z;
  }

  void softmax_grad(const V* g, T scale, V* de) const {
    V mean = {};
    for (int m = 0; m < snapshots; ++m) mean += w[m] * g[m];
    for (int m = 0; m < snapshots; ++m) de[m] = scale * w[m] * (g[m] - mean);
  }

  bool alive[lanes];                // has a row that is not ignored
  bool used[kMaxSnapshots][lanes];  // of which this snapshot is read
  int label[lanes];
  V w[kMaxSnapshots], log2_w[kMaxSnapshots];
  alignas(kVectorBytes) T mixed[kNarrow * lanes];
};

}  // namespace
}  // namespace eekd::EEKD_ISA
