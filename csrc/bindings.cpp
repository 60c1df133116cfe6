// The only file that knows torch and Python: schemas, argument checks, registration, and the module eekd._C.

#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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

constexpr const char* kEnsembleKDFwd =
    "ensemble_kd_fwd(Tensor student, Tensor[] snapshots, Tensor? labels, Tensor? scores, Tensor? query, "
    "Tensor? keys, float temperature, float alpha, bool logit_fusion, bool kl_objective, int reduction, "
    "int ignore_index, bool wants_student, bool wants_attention) -> Tensor[]";

constexpr const char* kSparseEnsembleKDFwd =
    "sparse_ensemble_kd_fwd(Tensor student, Tensor[] snapshots, Tensor tail, Tensor indices, Tensor? labels, "
    "Tensor? scores, Tensor? query, Tensor? keys, float temperature, float alpha, bool logit_fusion, "
    "bool kl_objective, int reduction, int ignore_index, bool wants_student, bool wants_attention) -> Tensor[]";

constexpr const char* kEnsembleKDBwd =
    "ensemble_kd_bwd(Tensor? d_loss, Tensor? d_attention_loss, Tensor? count, Tensor(a!)? d_student, "
    "Tensor(b!)? d_scores, Tensor(c!)? d_query, Tensor(d!)? d_keys) -> ()";

using MaybeTensor = std::optional<Tensor>;
enum Reduction : int64_t { none, mean, sum };

// A new contiguous tensor on the device of `like`.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[3], step = 1;
  for (size_t d = sizes.size(); d-- > 0;) strides[d] = step, step *= std::max<int64_t>(sizes.begin()[d], 1);
  int32_t device;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, static_cast<int32_t>(dtype),
                                                  device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The arguments of a forward op, and its outputs: first loss, attention_loss and weights, then the gradients wanted.
struct Call {
  const Tensor& student;
  const std::vector<Tensor>& snapshots;
  const MaybeTensor &labels, &scores, &query, &keys;
  double temperature, alpha;
  bool logit_fusion, kl_objective;
  int64_t reduction, ignore_index;
  bool wants_student, wants_attention;
  std::vector<Tensor> outputs = {};

  const Tensor& loss() const { return outputs[0]; }
  const Tensor& attention_loss() const { return outputs[1]; }

  // Checks the tensors, whose snapshots have so many columns, and allocates the outputs. `snapshots` is M tensors
  // (B, columns), or one (M, B, columns). A loss is summed over rows, unless the reduction is none. Sets `wide` where
  // results are fp64, as they are where a logit is.
  eekd::EnsembleKD args(int64_t columns, bool& wide) {
    eekd::EnsembleKD a;
    STD_TORCH_CHECK(student.dim() == 2, "student must be (B, C)");
    const int64_t rows = a.rows = student.size(0), classes = a.classes = student.size(1);
    a.student = matrix(student, rows, classes, "student");
    STD_TORCH_CHECK(!snapshots.empty(), "snapshots must not be empty");
    const bool stacked = snapshots[0].dim() == 3;
    const int64_t count = a.snapshots = stacked ? snapshots[0].size(0) : snapshots.size();
    STD_TORCH_CHECK(count >= 1 && count <= eekd::kMaxSnapshots && (!stacked || snapshots.size() == 1),
                    "snapshots must be one (M, B, C) or M of (B, C), M from 1 to 64");
    wide = a.student.dtype == eekd::DType::f64;
    for (int64_t m = 0; m < count; ++m) {
      a.snapshot[m] = matrix(snapshots[stacked ? 0 : m], rows, columns, "snapshots", stacked ? m : -1);
      wide |= a.snapshot[m].dtype == eekd::DType::f64;
    }
    if (labels && labels->dim() == 2) {
      a.label_weights = matrix(*labels, rows, classes, "labels");
    } else if (labels) {
      STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows && labels->is_contiguous() &&
                          labels->scalar_type() == ScalarType::Long,
                      "labels must be contiguous int64 (B), or (B, C) of unit stride in its last dimension");
      a.labels = static_cast<const int64_t*>(labels->const_data_ptr());
    }
    STD_TORCH_CHECK(labels || kl_objective || !wants_attention, "the gradient of the label objective needs labels");
    a.temperature = temperature;
    a.alpha = alpha;
    a.fusion = logit_fusion ? eekd::Fusion::logit : eekd::Fusion::probability;
    a.objective = kl_objective ? eekd::Objective::kl : eekd::Objective::label;
    a.ignore_index = ignore_index;

    const ScalarType result = wide ? ScalarType::Double : ScalarType::Float;
    outputs.reserve(6);
    const auto output = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
      outputs.push_back(empty(student, sizes, dtype));
      return outputs.back().mutable_data_ptr();
    };
    for (void** of_rows : {&a.loss, &a.attention_loss})
      *of_rows = reduction == none ? output({rows}, result) : output({}, result);
    a.weights = static_cast<float*>(output({rows, count}, ScalarType::Float));
    if (wants_student) a.d_student = output({rows, classes}, student.scalar_type());
    a.width = 0;
    if (query) {
      STD_TORCH_CHECK(keys.has_value() && query->dim() == 2, "query (B, D) needs keys (M, B, D)");
      a.width = query->size(1);
      a.query = matrix(*query, rows, a.width, "query");
      for (int64_t m = 0; m < count; ++m) a.keys[m] = matrix(*keys, rows, a.width, "keys", m);
      STD_TORCH_CHECK(keys->size(0) == count, "keys has the wrong shape");
      if (wants_attention) {
        a.d_query = output({rows, a.width}, query->scalar_type());
        a.d_keys = output({count, rows, a.width}, keys->scalar_type());
      }
    } else if (scores) {
      a.scores = matrix(*scores, rows, count, "scores");
      if (wants_attention) a.d_scores = output({rows, count}, scores->scalar_type());
    }
    return a;
  }
};

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
  explicit Rows(eekd::EnsembleKD& a, bool reduces) : loss(a.loss), attention_loss(a.attention_loss) {
    if (!reduces) return;
    scratch = std::make_unique_for_overwrite<T[]>(2 * a.rows);
    a.loss = scratch.get();
    a.attention_loss = scratch.get() + a.rows;
  }
  void add_up(int64_t rows) const {
    if (!scratch) return;
    double total = 0, attention_total = 0;
    for (int64_t b = 0; b < rows; ++b) total += scratch[b], attention_total += scratch[rows + b];
    *static_cast<T*>(loss) = static_cast<T>(total);
    *static_cast<T*>(attention_loss) = static_cast<T>(attention_total);
  }
  void *loss, *attention_loss;
  std::unique_ptr<T[]> scratch;
};

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
void run_rows(eekd::EnsembleKD& a, bool reduces) {
  const Rows<T> rows(a, reduces);
  eekd::ensemble_kd_fwd_cpu<T>(a, parallel());
  rows.add_up(a.rows);
}

template <class T>
void run_rows(eekd::SparseEnsembleKD& a, bool reduces) {
  const Rows<T> rows(a.kd, reduces);
  const int64_t wrong = eekd::sparse_ensemble_kd_fwd_cpu<T>(a, parallel());
  if (wrong >= 0) {
    const int64_t b = wrong / a.k, j = wrong % a.k;
    throw std::runtime_error("indices[" + std::to_string(b) + ", " + std::to_string(j) + "] is " +
                             std::to_string(a.indices[b * a.indices_stride + j]) + ", which is not a class below " +
                             std::to_string(a.kd.classes));
  }
  rows.add_up(a.kd.rows);
}

std::vector<Tensor> ensemble_kd_fwd_cpu(Tensor student, std::vector<Tensor> snapshots, MaybeTensor labels,
                                        MaybeTensor scores, MaybeTensor query, MaybeTensor keys, double temperature,
                                        double alpha, bool logit_fusion, bool kl_objective, int64_t reduction,
                                        int64_t ignore_index, bool wants_student, bool wants_attention) {
  Call call{student, snapshots,    labels,       scores,    query,        keys,          temperature,
            alpha,   logit_fusion, kl_objective, reduction, ignore_index, wants_student, wants_attention};
  bool wide;
  eekd::EnsembleKD a = call.args(student.size(1), wide);
  set_row_scale(a, reduction == mean);
  wide ? run_rows<double>(a, reduction != none) : run_rows<float>(a, reduction != none);
  return std::move(call.outputs);
}

std::vector<Tensor> sparse_ensemble_kd_fwd_cpu(Tensor student, std::vector<Tensor> snapshots, Tensor tail,
                                               Tensor indices, MaybeTensor labels, MaybeTensor scores,
                                               MaybeTensor query, MaybeTensor keys, double temperature, double alpha,
                                               bool logit_fusion, bool kl_objective, int64_t reduction,
                                               int64_t ignore_index, bool wants_student, bool wants_attention) {
  Call call{student, snapshots,    labels,       scores,    query,        keys,          temperature,
            alpha,   logit_fusion, kl_objective, reduction, ignore_index, wants_student, wants_attention};
  STD_TORCH_CHECK(indices.dim() == 2, "indices must be (B, K)");
  bool wide;
  eekd::EnsembleKD kd = call.args(indices.size(1), wide);
  set_row_scale(kd, reduction == mean);
  eekd::SparseEnsembleKD a = sparse_ensemble_kd_args(kd, tail, indices, wide);
  wide ? run_rows<double>(a, reduction != none) : run_rows<float>(a, reduction != none);
  return std::move(call.outputs);
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
void launch_rows(eekd::EnsembleKD& a, const Call& call, F launch) {
  const Tensor& loss = call.loss();
  const bool reduces = call.reduction != none, divides = call.reduction == mean;
  a.row_scale = divides ? 1.0 / std::max<int64_t>(a.rows, 1) : 1.0;
  const int32_t device = call.student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = stream_of(device);
  const Tensor count = empty(loss, {eekd::kCounts}, ScalarType::Int);
  MaybeTensor per_row;
  void *total = reduces ? a.loss : nullptr, *attention_total = a.attention_loss;
  if (reduces) {
    per_row = empty(loss, {2, std::max<int64_t>(a.rows, 1)}, loss.scalar_type());
    a.loss = per_row->mutable_data_ptr();
    a.attention_loss = static_cast<char*>(a.loss) + a.rows * (loss.scalar_type() == ScalarType::Double ? 8 : 4);
  }
  const char* error = launch(divides, total, attention_total, static_cast<int*>(count.mutable_data_ptr()), stream);
  STD_TORCH_CHECK(!error, "eekd on CUDA: ", error);
}

std::vector<Tensor> ensemble_kd_fwd_cuda(Tensor student, std::vector<Tensor> snapshots, MaybeTensor labels,
                                         MaybeTensor scores, MaybeTensor query, MaybeTensor keys, double temperature,
                                         double alpha, bool logit_fusion, bool kl_objective, int64_t reduction,
                                         int64_t ignore_index, bool wants_student, bool wants_attention) {
  Call call{student, snapshots,    labels,       scores,    query,        keys,          temperature,
            alpha,   logit_fusion, kl_objective, reduction, ignore_index, wants_student, wants_attention};
  bool wide;
  eekd::EnsembleKD a = call.args(student.size(1), wide);
  const auto launcher = wide ? eekd::ensemble_kd_fwd_cuda<double> : eekd::ensemble_kd_fwd_cuda<float>;
  launch_rows(a, call, [&](auto... rest) { return launcher(a, rest...); });
  return std::move(call.outputs);
}

std::vector<Tensor> sparse_ensemble_kd_fwd_cuda(Tensor student, std::vector<Tensor> snapshots, Tensor tail,
                                                Tensor indices, MaybeTensor labels, MaybeTensor scores,
                                                MaybeTensor query, MaybeTensor keys, double temperature, double alpha,
                                                bool logit_fusion, bool kl_objective, int64_t reduction,
                                                int64_t ignore_index, bool wants_student, bool wants_attention) {
  Call call{student, snapshots,    labels,       scores,    query,        keys,          temperature,
            alpha,   logit_fusion, kl_objective, reduction, ignore_index, wants_student, wants_attention};
  STD_TORCH_CHECK(indices.dim() == 2, "indices must be (B, K)");
  bool wide;
  const eekd::EnsembleKD kd = call.args(indices.size(1), wide);
  const auto launcher = wide ? eekd::sparse_ensemble_kd_fwd_cuda<double> : eekd::sparse_ensemble_kd_fwd_cuda<float>;
  eekd::SparseEnsembleKD a = sparse_ensemble_kd_args(kd, tail, indices, wide);
  launch_rows(a.kd, call, [&](auto... rest) { return launcher(a, rest...); });
  return std::move(call.outputs);
}

void ensemble_kd_bwd_cuda(MaybeTensor d_loss, MaybeTensor d_attention_loss, MaybeTensor count, MaybeTensor d_student,
                          MaybeTensor d_scores, MaybeTensor d_query, MaybeTensor d_keys) {
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
  m.attr("ops_version") = 4;  // of the ops' arguments, which eekd/ops/backend.py compares with its own
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
        "EEKD_CPU_CAPABILITY must be baseline, avx2 or avx512, and be in this build and "
        "processor, got " +
        std::string(name));
  m.def("set_cpu_capability", choose,
        "Chooses another: baseline, avx2 or avx512. False where build or processor lacks it.");
}
