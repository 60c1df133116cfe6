// sparse_ensemble_kd on the CPU: ensemble_kd of K + 1 columns, of which the last is what a row has outside `indices`.
//
// While a row is in cache: one visit of the student's logits gives its softmax at 1 and that of the classes outside,
// whose own maximum it has because the others are masked; the K + 1 columns go through the rows of ensemble_kd; a
// second visit spreads the gradient of the last column over its classes and adds the CE's. Rows of few columns go as
// many at a time as narrow.h takes, as long as the cache holds their logits.
//
// Compiled once per instruction set, into the namespace EEKD_ISA.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "../eekd.h"
#include "stretch.h"

namespace eekd::EEKD_ISA {
namespace {

template <class T>
class SparseKernel {
 public:
  explicit SparseKernel(const SparseEnsembleKD& args)
      : s(args),
        a(args.kd),
        k(static_cast<int>(s.k)),
        at_once(k < kNarrow && a.classes * Simd<T>::width <= kInCache ? Simd<T>::width : 1),
        tiles(static_cast<int>((a.classes + kTile - 1) / kTile)),
        stride((k + 1 + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width),
        soft_labels(a.label_weights.data),
        has_ce(has_labels(a) && a.alpha > 0),
        tau(static_cast<T>(a.temperature)),
        soft_scale(static_cast<T>(kLog2e / a.temperature)),
        ce(has_ce ? static_cast<T>(a.row_scale) * static_cast<T>(a.alpha) : T(0)),
        ahead(ahead_of(a.student)),
        dense(a) {
    struct alignas(64) Block {
      T x[64 / sizeof(T)];
    };
    static thread_local std::vector<Block> scratch;  // of a few rows per thread, kept between calls
    static thread_local std::vector<int64_t> whole;
    const int64_t lines = tiles == 1 ? at_once : 1, block = at_once * stride;
    const int64_t size = (2 + 2 * lines) * kTile + (a.snapshots + 3) * block;
    scratch.resize(std::max<size_t>(scratch.size(), (size * sizeof(T) + 63) / 64));
    whole.resize(std::max<size_t>(whole.size(), at_once * (2 + k + tiles)));
    line = scratch.data()->x;
    labels = line + kTile;
    soft = labels + kTile;
    hard = soft + lines * kTile;
    student = hard + lines * kTile;
    d_student = student + block;
    weight = d_student + block;
    target = weight + block;
    column = whole.data();
    order = column + at_once;
    end = order + at_once * k;

    dense.classes = k + 1;
    dense.ignore_index = -1;  // for a column may have the number that is ignored
    dense.student = {nullptr, stride, sizeof(T) == 8 ? DType::f64 : DType::f32};
    for (int m = 0; m < a.snapshots; ++m) dense.snapshot[m] = dense.student;
    if (soft_labels) dense.label_weights = dense.student;
  }

  // Rows [begin, stop); returns the place of an index that is not a class, or -1.
  int64_t run(int64_t begin, int64_t stop) {
    for (int64_t b = begin; b < stop; b += at_once) {
      const int rows = static_cast<int>(std::min<int64_t>(at_once, stop - b));
      for (int r = 0; r < rows; ++r) {
        if (ignored(b + r)) {
          column[r] = -1;
        } else if (const int64_t wrong = gather(b + r, r); wrong >= 0) {
          return wrong;
        }
      }
      dense.student.data = from(student, b, stride);
      for (int m = 0; m < a.snapshots; ++m) dense.snapshot[m].data = from(target + m * at_once * stride, b, stride);
      if (a.labels) dense.labels = from(column, b, 1);
      if (soft_labels) dense.label_weights.data = from(weight, b, stride);
      if (a.d_student) dense.d_student = from(d_student, b, k + 1);
      ensemble_kd_rows<T>(dense, b, b + rows, false);
      for (int r = 0; r < rows; ++r) spread(b + r, r);
    }
    return -1;
  }

 private:
  // The beginning of an array whose row b lies at p.
  template <class E>
  static E* from(E* p, int64_t b, int64_t stride) {
    return reinterpret_cast<E*>(reinterpret_cast<uintptr_t>(p) - b * stride * sizeof(E));
  }

  // From an element to the one in its place in the next row or tile, or 0 where all is in cache.
  int64_t ahead_of(const Matrix& x) const {
    return a.rows * a.classes < kInCache ? 0 : tiles == 1 ? x.stride : int64_t{kTile};
  }

  bool ignored(int64_t b) const { return a.labels && a.labels[b] == a.ignore_index; }
  int size(int tile) const { return static_cast<int>(std::min<int64_t>(kTile, a.classes - int64_t{tile} * kTile)); }

  // The K + 1 columns of a row, the student's from its first visit, and the column of its label.
  int64_t gather(int64_t b, int r) {
    const int64_t* index = s.indices + b * s.indices_stride;
    for (int j = 0; j < k; ++j)
      if (index[j] < 0 || index[j] >= a.classes) return b * k + j;
    T* columns = student + r * stride;
    with_elements(a.student.data, a.student.dtype, b * a.student.stride, [&](auto p) {
      for (int j = 0; j < k; ++j) columns[j] = static_cast<T>(p[index[j]]);
    });
    column[r] = a.labels ? std::find(index, index + k, a.labels[b]) - index : 0;
    sort(index, r);

    rest[r] = all[r] = SoftmaxSum<T>::none();
    label_sum[r] = log_q[r] = weight[r * stride + k] = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      SoftmaxSum<T> outside, whole;
      visit(b, r, tile, index, tiles == 1 ? Find::both : Find::stats, outside, whole);
      merge(rest[r], outside, T(1));
      const T before = all[r].max;
      if (has_ce) merge(all[r], whole, T(1));
      if (soft_labels) add_labels(b, r, tile, index, before);
    }
    columns[k] = tau * T(kLn2) * (rest[r].max + std::log2(rest[r].sum));

    const T* tail = static_cast<const T*>(s.tail) + b * s.tail_stride[1];
    for (int m = 0; m < a.snapshots; ++m) {
      T* z = target + (m * at_once + r) * stride;
      read_line(a.snapshot[m], b, 0, k, z);
      z[k] = tau * tail[m * s.tail_stride[0]];
    }
    return -1;
  }

  // order[..end[tile]) of a row: the places in `index` of the classes of each tile.
  void sort(const int64_t* index, int r) {
    int64_t *to = order + r * k, *last = end + r * (tiles + 1);
    std::fill_n(last, tiles + 1, 0);
    for (int j = 0; j < k; ++j) ++last[index[j] / kTile + 1];
    for (int tile = 1; tile < tiles; ++tile) last[tile + 1] += last[tile];
    for (int j = 0; j < k; ++j) to[last[index[j] / kTile]++] = j;
  }

  // Calls f(j, place in the tile) for each of the indices in a tile.
  template <class F>
  void each(const int64_t* index, int r, int tile, F f) const {
    const int64_t *at = order + r * k, *last = end + r * (tiles + 1);
    for (int64_t i = tile ? last[tile - 1] : 0; i < last[tile]; ++i) f(at[i], index[at[i]] - int64_t{tile} * kTile);
  }

  T* soft_of(int r) const { return tiles == 1 ? soft + r * kTile : soft; }
  T* hard_of(int r) const { return tiles == 1 ? hard + r * kTile : hard; }

  // A tile of the student: exponentials at 1 of all its classes, and at τ of those outside `indices`, 0 for the others.
  void visit(int64_t b, int r, int tile, const int64_t* index, Find find, SoftmaxSum<T>& outside,
             SoftmaxSum<T>& whole) {
    const int n = size(tile);
    read_line(a.student, b, int64_t{tile} * kTile, n, line, ahead);
    if (has_ce) {
      if (find != Find::lines) whole.max = T(kLog2e) * largest<T>(load(line));
      exponentiate(line, hard_of(r), n, T(kLog2e), find, whole);
    }
    each(index, r, tile, [&](int64_t, int64_t c) { line[c] = -std::numeric_limits<T>::infinity(); });
    if (find != Find::lines) outside.max = soft_scale * largest<T>(load(line));
    exponentiate(line, soft_of(r), n, soft_scale, find, outside);
    if (find == Find::both && outside.sum == 0) std::fill_n(soft_of(r), n, T(0));
  }

  // A tile of soft labels y: their share of Σ y and of Σ y log2 of the student at 1, less the logarithm of its sum; and
  // the weights of the K + 1 columns. `before` is the student's maximum without this tile.
  [[gnu::noinline]] void add_labels(int64_t b, int r, int tile, const int64_t* index, T before) {
    const int n = size(tile);
    T* columns = weight + r * stride;
    read_line(a.label_weights, b, int64_t{tile} * kTile, n, labels, ahead_of(a.label_weights));
    for (int i = n; i % Simd<T>::width; ++i) labels[i] = 0;
    if (has_ce) {
      constexpr T none = -std::numeric_limits<T>::infinity();
      const T max = all[r].max == none ? T(0) : all[r].max;
      if (before != none) log_q[r] -= label_sum[r] * (max - before);
      with_elements(a.student.data, a.student.dtype, b * a.student.stride + int64_t{tile} * kTile, [&](auto s) {
        log_q[r] += total<T>(n, [&](int i, int left) {
          const Vec<T> y = load(labels + i), product = y * scaled(load_from<T>(s + i, left), T(kLog2e), max);
          return y != 0 ? product : Vec<T>{};
        });
      });
    }
    const auto sum_of_labels = [&] { return total<T>(n, [&](int i, int) { return load(labels + i); }); };
    label_sum[r] += sum_of_labels();
    each(index, r, tile, [&](int64_t j, int64_t c) { columns[j] = std::exchange(labels[c], T(0)); });
    columns[k] += sum_of_labels();
  }

  // What the K + 1 columns left out: the CE, and the gradient of all classes.
  void spread(int64_t b, int r) {
    if (column[r] < 0) {
      const int64_t element = a.student.dtype == DType::f64 ? 8 : a.student.dtype == DType::f32 ? 4 : 2;
      if (a.d_student) std::memset(static_cast<char*>(a.d_student) + b * a.classes * element, 0, a.classes * element);
      return;
    }
    const T sum_of_labels = soft_labels ? label_sum[r] : T(1);
    if (has_ce) {
      const T log_of_labels =
          soft_labels ? log_q[r] : std::fma(read<T>(a.student, b, a.labels[b]), T(kLog2e), -all[r].max);
      static_cast<T*>(a.loss)[b] += ce * T(kLn2) * (sum_of_labels * std::log2(all[r].sum) - log_of_labels);
    }
    if (!a.d_student) return;
    const int64_t* index = s.indices + b * s.indices_stride;
    const T* d_columns = d_student + r * (k + 1);
    const bool empty = rest[r].sum == 0;
    const T of_rest = empty ? T(0) : d_columns[k] / rest[r].sum,
            of_all = has_ce ? ce * sum_of_labels / all[r].sum : T(0);
    SoftmaxSum<T> outside = rest[r], whole = all[r];
    if (empty) outside.max = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const int n = size(tile);
      const int64_t first = int64_t{tile} * kTile;
      if (tiles > 1) visit(b, r, tile, index, Find::lines, outside, whole);
      T *d = hard_of(r), *e = soft_of(r);
      for (int i = 0; i < n; i += Simd<T>::width) {
        const Vec<T> x = load(e + i) * of_rest;
        store(d + i, has_ce ? x + load(d + i) * of_all : x);
      }
      each(index, r, tile, [&](int64_t j, int64_t c) { d[c] += d_columns[j]; });
      if (has_ce && soft_labels) {
        with_elements(a.label_weights.data, a.label_weights.dtype, b * a.label_weights.stride + first, [&](auto y) {
          for (int i = 0; i < n; i += Simd<T>::width) store(d + i, load(d + i) - load_from<T>(y + i, n - i) * ce);
        });
      }
      if (has_ce && a.labels && a.labels[b] >= first && a.labels[b] < first + n) d[a.labels[b] - first] -= ce;
      write_line(a.d_student, b * a.classes + first, a.student.dtype, n, d);
      if (ahead) prefetch_to_write(a.d_student, b * a.classes + first + n, a.student.dtype, n);
    }
  }

  const SparseEnsembleKD& s;
  const EnsembleKD& a;
  const int k, at_once, tiles;
  const int64_t stride;  // of the rows of columns, in whole vectors
  const bool soft_labels, has_ce;
  const T tau, soft_scale, ce;
  const int64_t ahead;                                      // of the student's logits
  EnsembleKD dense;                                         // of the K + 1 columns
  T *line, *labels;                                         // lines
  T *soft, *hard;                                           // lines; rows of one tile keep theirs between the visits
  T *student, *d_student;                                   // columns of at_once rows
  T *weight, *target;                                       // columns: soft labels; the snapshots, M times as many
  int64_t *column, *order, *end;                            // per row: of the label; the indices by tile
  SoftmaxSum<T> rest[Simd<T>::width], all[Simd<T>::width];  // the student outside `indices` at τ, and altogether at 1
  T label_sum[Simd<T>::width], log_q[Simd<T>::width];       // of soft labels, as add_labels has them
};

template <class T>
struct Call {
  const SparseEnsembleKD& args;
  std::atomic<int64_t> wrong = -1;
};

}  // namespace

template <class T>
int64_t sparse_ensemble_kd_fwd(const SparseEnsembleKD& s, const Parallel& parallel) {
  Call<T> call{s};
  const auto rows = [](int64_t begin, int64_t end, void* context) {
    Call<T>& call = *static_cast<Call<T>*>(context);
    const int64_t wrong = SparseKernel<T>(call.args).run(begin, end);
    int64_t first = call.wrong;  // of those that other threads found
    while (wrong >= 0 && (first < 0 || wrong < first) && !call.wrong.compare_exchange_weak(first, wrong)) {}
  };
  const int64_t logits = 2 * s.kd.classes + (s.k + 1) * (s.kd.snapshots + 2);
  parallel.run(s.kd.rows, std::max<int64_t>(1, kGrain / logits), rows, &call);
  return call.wrong;
}

template int64_t sparse_ensemble_kd_fwd<float>(const SparseEnsembleKD&, const Parallel&);
template int64_t sparse_ensemble_kd_fwd<double>(const SparseEnsembleKD&, const Parallel&);

}  // namespace eekd::EEKD_ISA
