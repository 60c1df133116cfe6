// Every native launcher with its shapes: the table of contents of csrc/.
// Letters: B rows, M snapshots, C classes, D embedding width. Nothing here knows torch or Python.
#pragma once

#include <cstdint>

namespace eekd {

enum class DType : int { f64, f32, bf16, f16 };

// (rows, n) elements with unit stride inside a row.
struct Matrix {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from one row to the next; 0 repeats one row
  DType dtype = DType::f32;
};

enum class Fusion : int { probability, logit };
enum class Objective : int { label, kl };

constexpr int kMaxSnapshots = 64;
constexpr int kCounts = 32;  // parts in which CUDA counts labels

// Arguments of ensemble_kd_fwd; eekd/ops/ensemble_kd.py documents what it computes.
// T is double when a logit is double, float otherwise; scalars and per-row results are T, gradients have the
// dtype of what they are the gradient of. A null output is not asked for and not computed.
struct EnsembleKD {
  int64_t rows, snapshots, classes, width;
  Matrix student;                   // (B, C)
  Matrix snapshot[kMaxSnapshots];   // M of (B, C)
  const int64_t* labels = nullptr;  // (B), or null
  Matrix label_weights;             // (B, C), soft labels, or null; neither: pure distillation
  Matrix scores;                    // (B, M), or null
  Matrix query;                     // (B, D), or null; then
  Matrix keys[kMaxSnapshots];       // M of (B, D)
  double temperature, alpha;
  Fusion fusion;
  Objective objective;
  int64_t ignore_index;
  double row_scale;  // 1 / rows counted for a mean, 1 otherwise

  void* loss = nullptr;            // (B) T, already times row_scale
  void* attention_loss = nullptr;  // (B) T, likewise
  float* weights = nullptr;        // (B, M)
  void* d_student = nullptr;       // (B, C)
  void* d_scores = nullptr;        // (B, M)
  void* d_query = nullptr;         // (B, D), with d_keys
  void* d_keys = nullptr;          // (M, B, D)
};

// Arguments of sparse_ensemble_kd_fwd: kd, whose snapshots are (B, K), their logits at the classes `indices`, and the
// rest of their classes. T as above.
struct SparseEnsembleKD {
  EnsembleKD kd;
  int64_t k;
  const void* tail;        // (M, B) T: log Σ exp(z_mc / τ) over the classes c that are not in indices
  int64_t tail_stride[2];  // elements from one snapshot, and from one row, to the next
  const int64_t* indices;  // (B, K), unit stride inside a row, distinct
  int64_t indices_stride;
};

// Runs body(context, begin, end) over disjoint ranges that cover [0, n), each at least `grain` long but the last.
struct Parallel {
  int threads;
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

// CPU: one build of the kernels per instruction set, one of them chosen at run time.
enum class Isa : int { baseline, avx2, avx512 };
Isa isa();                 // the one in use: at first the best that this processor runs
bool set_isa(Isa wanted);  // false where the build or the processor lacks it

#define EEKD_CPU_KERNELS                                    \
  template <class T>                                        \
  void ensemble_kd_fwd(const EnsembleKD&, const Parallel&); \
  template <class T>                                        \
  int64_t sparse_ensemble_kd_fwd(const SparseEnsembleKD&, const Parallel&);
namespace baseline {
EEKD_CPU_KERNELS
}
namespace avx2 {
EEKD_CPU_KERNELS
}
namespace avx512 {
EEKD_CPU_KERNELS
}
#undef EEKD_CPU_KERNELS

template <class T>
void ensemble_kd_fwd_cpu(const EnsembleKD&, const Parallel&);

// Returns the place in (B, K) of an index that is not a class, by which the outputs are undefined, or -1.
template <class T>
int64_t sparse_ensemble_kd_fwd_cpu(const SparseEnsembleKD&, const Parallel&);

// CUDA: all pointers are of the current device, all work is put on the stream, nothing waits. `mean` divides by the
// labels that count, by way of `count`, kCounts numbers, where there are many. Rows go to args.loss and
// args.attention_loss; unless `loss` is null only their sums are wanted, in `loss` and `attention_loss`. A label that
// is neither a class nor ignored makes its row NaN. Returns what went wrong, or null.
template <class T>
const char* ensemble_kd_fwd_cuda(const EnsembleKD& args, bool mean, void* loss, void* attention_loss, int* count,
                                 void* stream);
// Likewise; an index that is not a class makes its row NaN too.
template <class T>
const char* sparse_ensemble_kd_fwd_cuda(const SparseEnsembleKD& args, bool mean, void* loss, void* attention_loss,
                                        int* count, void* stream);

// The gradients of ensemble_kd_fwd, contiguous (..., B, n), times their upstream gradients over `divisor`, in place.
struct Scaled {
  void* data;
  DType dtype;
  int64_t rows, columns, numel;  // B, n
  const void* factor;            // () or (B), double if `wide`, else float
  int64_t stride;                // of the factor; 0 is one for all rows
};
struct Scale {
  Scaled grad[4];
  int count = 0;
  bool wide = false;
  const int64_t* divisor = nullptr;  // on the device, or null: 1
};
const char* ensemble_kd_bwd_cuda(const Scale& args, void* stream);

}  // namespace eekd
