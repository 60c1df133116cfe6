// The only file that knows torch and Python: schemas, argument checks, registration, and the module eekd._C.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef EEKD_CUDA
#include <dlfcn.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "eekd.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

eekd::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return eekd::DType::f64;
    case ScalarType::Float: return eekd::DType::f32;
    case ScalarType::BFloat16: return eekd::DType::bf16;
    case ScalarType::Half: return eekd::DType::f16;
    default: STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

// Rows of unit-stride columns; `index` picks one of the leading dimension of a 3-dimensional tensor.
eekd::Matrix matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name, int64_t index = -1) {
  const int64_t d = index < 0 ? 0 : 1;
  STD_TORCH_CHECK(t.dim() == d + 2 && t.size(d) == rows && t.size(d + 1) == columns, name, " has the wrong shape");
  STD_TORCH_CHECK(columns < 2 || t.stride(d + 1) == 1, name, " must have unit stride in its last dimension");
  eekd::Matrix out;
  out.dtype = dtype_of(t, name);
  out.stride = t.stride(d);
  const int64_t size = out.dtype == eekd::DType::f64 ? 8 : out.dtype == eekd::DType::f32 ? 4 : 2;
  out.data = static_cast<const char*>(t.const_data_ptr()) + (d ? index * t.stride(0) * size : 0);
  return out;
}

void* output(const std::optional<Tensor>& t, int64_t numel, ScalarType dtype, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->numel() == numel && t->is_contiguous() && t->scalar_type() == dtype, name,
                  " must be contiguous, of the shape and dtype of what it describes");
  return t->mutable_data_ptr();
}

constexpr const char* kEnsembleKDFwd =
    "ensemble_kd_fwd(Tensor student, Tensor[] snapshots, Tensor? labels, Tensor? scores, Tensor? query, "
    "Tensor? keys, float temperature, float alpha, bool logit_fusion, bool kl_objective, bool mean, "
    "int ignore_index, Tensor(a!) loss, Tensor(b!) attention_loss, Tensor(c!) weights, Tensor(d!)? d_student, "
    "Tensor(e!)? d_scores, Tensor(f!)? d_query, Tensor(g!)? d_keys) -> ()";

constexpr const char* kSparseEnsembleKDFwd =
    "sparse_ensemble_kd_fwd(Tensor student, Tensor[] snapshots, Tensor tail, Tensor indices, Tensor? labels, "
    "Tensor? scores, Tensor? query, Tensor? keys, float temperature, float alpha, bool logit_fusion, "
    "bool kl_objective, bool mean, int ignore_index, Tensor(a!) loss, Tensor(b!) attention_loss, Tensor(c!) weights, "
    "Tensor(d!)? d_student, Tensor(e!)? d_scores, Tensor(f!)? d_query, Tensor(g!)? d_keys) -> ()";

constexpr const char* kEnsembleKDBwd =
    "ensemble_kd_bwd(Tensor? d_loss, Tensor? d_attention_loss, Tensor? count, Tensor(a!)? d_student, "
    "Tensor(b!)? d_scores, Tensor(c!)? d_query, Tensor(d!)? d_keys) -> ()";

// `snapshots` is M tensors (B, columns), or one (M, B, columns). A scalar `loss` is summed over rows, a (B) one is not.
eekd::EnsembleKD ensemble_kd_args(const Tensor& student, const std::vector<Tensor>& snapshots, int64_t columns,
                                  const std::optional<Tensor>& labels, const std::optional<Tensor>& scores,
                                  const std::optional<Tensor>& query, const std::optional<Tensor>& keys,
                                  double temperature, double alpha, bool logit_fusion, bool kl_objective,
                                  int64_t ignore_index, const Tensor& weights, const std::optional<Tensor>& d_student,
                                  const std::optional<Tensor>& d_scores, const std::optional<Tensor>& d_query,
                                  const std::optional<Tensor>& d_keys) {
  eekd::EnsembleKD a;
  STD_TORCH_CHECK(student.dim() == 2, "student must be (B, C)");
  const int64_t rows = a.rows = student.size(0), classes = a.classes = student.size(1);
  a.student = matrix(student, rows, classes, "student");
  STD_TORCH_CHECK(!snapshots.empty(), "snapshots must not be empty");
  const bool stacked = snapshots[0].dim() == 3;
  const int64_t count = a.snapshots = stacked ? snapshots[0].size(0) : snapshots.size();
  STD_TORCH_CHECK(count >= 1 && count <= eekd::kMaxSnapshots && (!stacked || snapshots.size() == 1),
                  "snapshots must be one (M, B, C) or M of (B, C), M from 1 to 64");
  for (int64_t m = 0; m < count; ++m)
    a.snapshot[m] = matrix(snapshots[stacked ? 0 : m], rows, columns, "snapshots", stacked ? m : -1);
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows && labels->is_contiguous() &&
                        labels->scalar_type() == ScalarType::Long,
                    "labels must be contiguous int64 (B)");
    a.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  a.width = 0;
  if (query) {
    STD_TORCH_CHECK(keys.has_value() && query->dim() == 2, "query (B, D) needs keys (M, B, D)");
    a.width = query->size(1);
    a.query = matrix(*query, rows, a.width, "query");
    for (int64_t m = 0; m < count; ++m) a.keys[m] = matrix(*keys, rows, a.width, "keys", m);
    STD_TORCH_CHECK(keys->size(0) == count, "keys has the wrong shape");
    a.d_query = output(d_query, rows * a.width, query->scalar_type(), "d_query");
    a.d_keys = output(d_keys, count * rows * a.width, keys->scalar_type(), "d_keys");
    STD_TORCH_CHECK(!a.d_query == !a.d_keys, "d_query and d_keys go together");
  } else if (scores) {
    a.scores = matrix(*scores, rows, count, "scores");
    a.d_scores = output(d_scores, rows * count, scores->scalar_type(), "d_scores");
  }
  a.temperature = temperature;
  a.alpha = alpha;
  a.fusion = logit_fusion ? eekd::Fusion::logit : eekd::Fusion::probability;
  a.objective = kl_objective ? eekd::Objective::kl : eekd::Objective::label;
  STD_TORCH_CHECK(labels || kl_objective || !(a.d_scores || a.d_query),
                  "the gradient of the label objective needs labels");
  a.ignore_index = ignore_index;
  a.weights = static_cast<float*>(output(weights, rows * count, ScalarType::Float, "weights"));
  a.d_student = output(d_student, rows * classes, student.scalar_type(), "d_student");
  return a;
}

eekd::SparseEnsembleKD sparse_ensemble_kd_args(const eekd::EnsembleKD& kd, const Tensor& tail, const Tensor& indices,
                                               bool wide) {
  eekd::SparseEnsembleKD a;
  a.kd = kd;
  a.k = indices.size(1);
  STD_TORCH_CHECK(indices.size(0) == kd.rows && a.k >= 1 && a.k <= kd.classes && (a.k < 2 || indices.stride(1) == 1) &&
                      indices.scalar_type() == ScalarType::Long,
                  "indices must be int64 (B, K), K from 1 to C, of unit stride in its last dimension");
  STD_TORCH_CHECK(tail.dim() == 2 && tail.size(0) == kd.snapshots && tail.size(1) == kd.rows &&
                      tail.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "tail must be (M, B), float64 for float64 logits, else float32");
  a.tail = tail.const_data_ptr();
  a.tail_stride[0] = tail.stride(0), a.tail_stride[1] = tail.stride(1);
  a.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  a.indices_stride = indices.stride(0);
  return a;
}

void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

// Where a kernel puts the losses of its rows, until `add_up` makes one number of them, in order.
template <class T>
struct Rows {
  Rows(eekd::EnsembleKD& a, const Tensor& loss, const Tensor& attention_loss)
      : loss(loss), attention_loss(attention_loss) {
    if (loss.dim() == 0) scratch = std::make_unique_for_overwrite<T[]>(2 * a.rows);
    a.loss = scratch ? scratch.get() : loss.mutable_data_ptr();
    a.attention_loss = scratch ? scratch.get() + a.rows : attention_loss.mutable_data_ptr();
  }
  void add_up(int64_t rows) const {
    if (!scratch) return;
    double total = 0, attention_total = 0;
    for (int64_t b = 0; b < rows; ++b) total += scratch[b], attention_total += scratch[rows + b];
    *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(total);
    *static_cast<T*>(attention_loss.mutable_data_ptr()) = static_cast<T>(attention_total);
  }
  const Tensor &loss, &attention_loss;
  std::unique_ptr<T[]> scratch;
};

// Whether results are fp64, as they are where a logit is; checks that `loss` and `attention_loss` can hold them.
bool is_wide(const eekd::EnsembleKD& a, const Tensor& loss, const Tensor& attention_loss) {
  bool wide = a.student.dtype == eekd::DType::f64;
  for (int64_t m = 0; m < a.snapshots; ++m) wide |= a.snapshot[m].dtype == eekd::DType::f64;
  const ScalarType result = wide ? ScalarType::Double : ScalarType::Float;
  for (const Tensor& t : {loss, attention_loss})
    STD_TORCH_CHECK(t.scalar_type() == result && (t.dim() == 0 || (t.dim() == 1 && t.size(0) == a.rows)) &&
                        t.dim() == loss.dim() && t.is_contiguous(),
                    "loss and attention_loss must be () or (B), float64 for float64 logits, else float32");
  return wide;
}

// Counts the labels of a mean; a label that is no class is an error, here where it can be one.
void set_row_scale(eekd::EnsembleKD& a, bool mean) {
  int64_t counted = a.rows;
  for (int64_t b = 0; a.labels && b < a.rows; ++b) {
    const int64_t y = a.labels[b];
    counted -= y == a.ignore_index;
    if (y != a.ignore_index && (y < 0 || y >= a.classes))  // a user's mistake: no place in this file is told
      throw std::runtime_error("labels[" + std::to_string(b) + "] is " + std::to_string(y) +
                               ", which is neither a class below " + std::to_string(a.classes) + " nor ignore_index (" +
                               std::to_string(a.ignore_index) + ")");
  }
  a.row_scale = mean ? 1.0 / std::max<int64_t>(counted, 1) : 1.0;
}

eekd::Parallel parallel() { return {static_cast<int>(torch::stable::get_num_threads()), run_parallel}; }

template <class T>
void run_rows(eekd::EnsembleKD& a, const Tensor& loss, const Tensor& attention_loss) {
  const Rows<T> rows(a, loss, attention_loss);
  eekd::ensemble_kd_fwd_cpu<T>(a, parallel());
  rows.add_up(a.rows);
}

template <class T>
void run_rows(eekd::SparseEnsembleKD& a, const Tensor& loss, const Tensor& attention_loss) {
  const Rows<T> rows(a.kd, loss, attention_loss);
  const int64_t wrong = eekd::sparse_ensemble_kd_fwd_cpu<T>(a, parallel());
  if (wrong >= 0) {
    const int64_t b = wrong / a.k, j = wrong % a.k;
    throw std::runtime_error("indices[" + std::to_string(b) + ", " + std::to_string(j) + "] is " +
                             std::to_string(a.indices[b * a.indices_stride + j]) + ", which is not a class below " +
                             std::to_string(a.kd.classes));
  }
  rows.add_up(a.kd.rows);
}

void ensemble_kd_fwd_cpu(Tensor student, std::vector<Tensor> snapshots, std::optional<Tensor> labels,
                         std::optional<Tensor> scores, std::optional<Tensor> query, std::optional<Tensor> keys,
                         double temperature, double alpha, bool logit_fusion, bool kl_objective, bool mean,
                         int64_t ignore_index, Tensor loss, Tensor attention_loss, Tensor weights,
                         std::optional<Tensor> d_student, std::optional<Tensor> d_scores, std::optional<Tensor> d_query,
                         std::optional<Tensor> d_keys) {
  eekd::EnsembleKD a =
      ensemble_kd_args(student, snapshots, student.size(1), labels, scores, query, keys, temperature, alpha,
                       logit_fusion, kl_objective, ignore_index, weights, d_student, d_scores, d_query, d_keys);
  set_row_scale(a, mean);
  is_wide(a, loss, attention_loss) ? run_rows<double>(a, loss, attention_loss)
                                   : run_rows<float>(a, loss, attention_loss);
}

void sparse_ensemble_kd_fwd_cpu(Tensor student, std::vector<Tensor> snapshots, Tensor tail, Tensor indices,
                                std::optional<Tensor> labels, std::optional<Tensor> scores, std::optional<Tensor> query,
                                std::optional<Tensor> keys, double temperature, double alpha, bool logit_fusion,
                                bool kl_objective, bool mean, int64_t ignore_index, Tensor loss, Tensor attention_loss,
                                Tensor weights, std::optional<Tensor> d_student, std::optional<Tensor> d_scores,
                                std::optional<Tensor> d_query, std::optional<Tensor> d_keys) {
  STD_TORCH_CHECK(indices.dim() == 2, "indices must be (B, K)");
  eekd::EnsembleKD kd =
      ensemble_kd_args(student, snapshots, indices.size(1), labels, scores, query, keys, temperature, alpha,
                       logit_fusion, kl_objective, ignore_index, weights, d_student, d_scores, d_query, d_keys);
  set_row_scale(kd, mean);
  const bool wide = is_wide(kd, loss, attention_loss);
  eekd::SparseEnsembleKD a = sparse_ensemble_kd_args(kd, tail, indices, wide);
  wide ? run_rows<double>(a, loss, attention_loss) : run_rows<float>(a, loss, attention_loss);
}

#ifdef EEKD_CUDA

// Asks libtorch_cuda, which a torch without CUDA lacks. Not by a weak symbol: the loader looks for one only in the
// libraries that this one needs, and those are what the linker of the build made of the torch there.
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);
CurrentStream current_stream() {
  static const auto found = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  return found;
}

void* stream_of(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream() && !current_stream()(device, &stream), "this torch has no CUDA streams");
  return stream;
}

// Gives the rows a place for their losses, and calls launch(mean, loss, attention_loss, count, stream) on the device.
template <class F>
void launch_rows(eekd::EnsembleKD& a, const Tensor& student, bool mean, const Tensor& loss,
                 const Tensor& attention_loss, F launch) {
  a.row_scale = mean ? 1.0 / std::max<int64_t>(a.rows, 1) : 1.0;
  const bool reduces = loss.dim() == 0;
  const int32_t device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = stream_of(device);
  std::optional<Tensor> per_row;
  if (reduces) per_row = torch::stable::new_empty(loss, {2, std::max<int64_t>(a.rows, 1)});
  const Tensor count = torch::stable::new_empty(loss, {eekd::kCounts}, ScalarType::Int);
  char* rows = static_cast<char*>(reduces ? per_row->mutable_data_ptr() : loss.mutable_data_ptr());
  a.loss = rows;
  a.attention_loss =
      reduces ? rows + a.rows * (loss.scalar_type() == ScalarType::Double ? 8 : 4) : attention_loss.mutable_data_ptr();
  const char* error = launch(mean, reduces ? loss.mutable_data_ptr() : nullptr, attention_loss.mutable_data_ptr(),
                             static_cast<int*>(count.mutable_data_ptr()), stream);
  STD_TORCH_CHECK(!error, "eekd on CUDA: ", error);
}

void ensemble_kd_fwd_cuda(Tensor student, std::vector<Tensor> snapshots, std::optional<Tensor> labels,
                          std::optional<Tensor> scores, std::optional<Tensor> query, std::optional<Tensor> keys,
                          double temperature, double alpha, bool logit_fusion, bool kl_objective, bool mean,
                          int64_t ignore_index, Tensor loss, Tensor attention_loss, Tensor weights,
                          std::optional<Tensor> d_student, std::optional<Tensor> d_scores,
                          std::optional<Tensor> d_query, std::optional<Tensor> d_keys) {
  eekd::EnsembleKD a =
      ensemble_kd_args(student, snapshots, student.size(1), labels, scores, query, keys, temperature, alpha,
                       logit_fusion, kl_objective, ignore_index, weights, d_student, d_scores, d_query, d_keys);
  const auto launcher =
      is_wide(a, loss, attention_loss) ? eekd::ensemble_kd_fwd_cuda<double> : eekd::ensemble_kd_fwd_cuda<float>;
  launch_rows(a, student, mean, loss, attention_loss, [&](auto... rest) { return launcher(a, rest...); });
}

void sparse_ensemble_kd_fwd_cuda(Tensor student, std::vector<Tensor> snapshots, Tensor tail, Tensor indices,
                                 std::optional<Tensor> labels, std::optional<Tensor> scores,
                                 std::optional<Tensor> query, std::optional<Tensor> keys, double temperature,
                                 double alpha, bool logit_fusion, bool kl_objective, bool mean, int64_t ignore_index,
                                 Tensor loss, Tensor attention_loss, Tensor weights, std::optional<Tensor> d_student,
                                 std::optional<Tensor> d_scores, std::optional<Tensor> d_query,
                                 std::optional<Tensor> d_keys) {
  STD_TORCH_CHECK(indices.dim() == 2, "indices must be (B, K)");
  const eekd::EnsembleKD kd =
      ensemble_kd_args(student, snapshots, indices.size(1), labels, scores, query, keys, temperature, alpha,
                       logit_fusion, kl_objective, ignore_index, weights, d_student, d_scores, d_query, d_keys);
  const bool wide = is_wide(kd, loss, attention_loss);
  eekd::SparseEnsembleKD a = sparse_ensemble_kd_args(kd, tail, indices, wide);
  const auto launcher = wide ? eekd::sparse_ensemble_kd_fwd_cuda<double> : eekd::sparse_ensemble_kd_fwd_cuda<float>;
  launch_rows(a.kd, student, mean, loss, attention_loss, [&](auto... rest) { return launcher(a, rest...); });
}

void ensemble_kd_bwd_cuda(std::optional<Tensor> d_loss, std::optional<Tensor> d_attention_loss,
                          std::optional<Tensor> count, std::optional<Tensor> d_student, std::optional<Tensor> d_scores,
                          std::optional<Tensor> d_query, std::optional<Tensor> d_keys) {
  eekd::Scale args;
  for (const auto& [grad, upstream] : {std::pair(&d_student, &d_loss), std::pair(&d_scores, &d_attention_loss),
                                       std::pair(&d_query, &d_attention_loss), std::pair(&d_keys, &d_attention_loss)}) {
    if (!*grad || (*grad)->numel() == 0) continue;
    STD_TORCH_CHECK(*upstream && (*grad)->is_contiguous(), "a gradient must be contiguous, and have its upstream one");
    const Tensor& x = **grad;
    const Tensor& factor = **upstream;
    args.grad[args.count++] = {x.mutable_data_ptr(),
                               dtype_of(x, "gradient"),
                               x.size(x.dim() - 2),
                               x.size(x.dim() - 1),
                               x.numel(),
                               factor.const_data_ptr(),
                               factor.dim() ? factor.stride(0) : 0};
    args.wide = factor.scalar_type() == ScalarType::Double;
  }
  if (!args.count) return;
  if (count) args.divisor = static_cast<const int64_t*>(count->const_data_ptr());
  const int32_t device = (d_loss ? d_loss : d_attention_loss)->get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* error = eekd::ensemble_kd_bwd_cuda(args, stream_of(device));
  STD_TORCH_CHECK(!error, "eekd on CUDA: ", error);
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY(eekd, m) {
  m.def(kEnsembleKDFwd);
  m.def(kSparseEnsembleKDFwd);
  m.def(kEnsembleKDBwd);  // CUDA only: on CPU torch scales
}

STABLE_TORCH_LIBRARY_IMPL(eekd, CPU, m) {
  m.impl("ensemble_kd_fwd", TORCH_BOX(&ensemble_kd_fwd_cpu));
  m.impl("sparse_ensemble_kd_fwd", TORCH_BOX(&sparse_ensemble_kd_fwd_cpu));
}

#ifdef EEKD_CUDA
STABLE_TORCH_LIBRARY_IMPL(eekd, CUDA, m) {
  m.impl("ensemble_kd_fwd", TORCH_BOX(&ensemble_kd_fwd_cuda));
  m.impl("sparse_ensemble_kd_fwd", TORCH_BOX(&sparse_ensemble_kd_fwd_cuda));
  m.impl("ensemble_kd_bwd", TORCH_BOX(&ensemble_kd_bwd_cuda));
}
#endif

PYBIND11_MODULE(_C, m) {
  static constexpr const char* kIsas[] = {"baseline", "avx2", "avx512"};
  m.doc() = "Build facts; the ops themselves are torch.ops.eekd.";
  m.attr("torch_version") = EEKD_TORCH_VERSION;  // of the headers; any torch from 2.10 loads the library
  m.attr("cuda_version") = EEKD_CUDA_VERSION;    // empty where no CUDA kernels were built
  m.attr("cuda_architectures") = EEKD_CUDA_ARCHITECTURES;
#ifdef EEKD_CUDA
  m.def("finds_cuda_streams", [] { return current_stream() != nullptr; },
        "Whether the torch in this process has the CUDA streams that the kernels run on.");
#endif
  m.def("cpu_capability", [] { return kIsas[static_cast<int>(eekd::isa())]; },
        "The instruction set that the CPU kernels use.");
  const auto choose = [](const std::string& name) {
    const auto* found = std::find(std::begin(kIsas), std::end(kIsas), name);
    return found != std::end(kIsas) && eekd::set_isa(static_cast<eekd::Isa>(found - std::begin(kIsas)));
  };
  if (const char* name = std::getenv("EEKD_CPU_CAPABILITY"); name && !choose(name))
    throw pybind11::value_error(
        "EEKD_CPU_CAPABILITY must be baseline, avx2 or avx512, and be in this build and processor, got " +
        std::string(name));
  m.def("set_cpu_capability", choose,
        "Chooses another: baseline, avx2 or avx512. False where build or processor lacks it.");
}
