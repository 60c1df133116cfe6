// Chooses the build of the CPU kernels that this processor runs best.

#include "../eekd.h"

namespace eekd {
namespace {

bool runs(Isa wanted) {
#if defined(EEKD_X86)
  if (wanted == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs(Isa::avx2);
  if (wanted == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return wanted == Isa::baseline;
}

Isa& current() {
  static Isa isa = runs(Isa::avx512) ? Isa::avx512 : runs(Isa::avx2) ? Isa::avx2 : Isa::baseline;
  return isa;
}

}  // namespace

Isa isa() { return current(); }

bool set_isa(Isa wanted) {
  if (!runs(wanted)) return false;
  current() = wanted;
  return true;
}

template <class T>
void ensemble_kd_fwd_cpu(const EnsembleKD& args, const Parallel& parallel) {
#if defined(EEKD_X86)
  if (isa() == Isa::avx512) return avx512::ensemble_kd_fwd<T>(args, parallel);
  if (isa() == Isa::avx2) return avx2::ensemble_kd_fwd<T>(args, parallel);
#endif
  baseline::ensemble_kd_fwd<T>(args, parallel);
}

template <class T>
int64_t sparse_ensemble_kd_fwd_cpu(const SparseEnsembleKD& args, const Parallel& parallel) {
#if defined(EEKD_X86)
  if (isa() == Isa::avx512) return avx512::sparse_ensemble_kd_fwd<T>(args, parallel);
  if (isa() == Isa::avx2) return avx2::sparse_ensemble_kd_fwd<T>(args, parallel);
#endif
  return baseline::sparse_ensemble_kd_fwd<T>(args, parallel);
}

template void ensemble_kd_fwd_cpu<float>(const EnsembleKD&, const Parallel&);
template void ensemble_kd_fwd_cpu<double>(const EnsembleKD&, const Parallel&);
template int64_t sparse_ensemble_kd_fwd_cpu<float>(const SparseEnsembleKD&, const Parallel&);
template int64_t sparse_ensemble_kd_fwd_cpu<double>(const SparseEnsembleKD&, const Parallel&);

}  // namespace eekd
