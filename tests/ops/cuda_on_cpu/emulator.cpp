// The CUDA launchers, on the CPU, for ctypes.
#include "../../../csrc/eekd.h"

extern "C" {

void emulate(const emulator::Device* device) { emulator::device = *device; }

// The order of the threads from here on: 0 in a circle, else by chance.
void schedule(unsigned seed) { emulator::seed = seed; }

// How many launches there were since the last call, and the blocks in each one's clusters.
int launches(unsigned* ranks, int most) {
  const int n = emulator::launches.size();
  std::copy_n(emulator::launches.begin(), std::min(n, most), ranks);
  emulator::launches.clear();
  return n;
}

int size_of_arguments() { return sizeof(eekd::EnsembleKD); }
int size_of_sparse_arguments() { return sizeof(eekd::SparseEnsembleKD); }
int size_of_scale() { return sizeof(eekd::Scale); }

const char* ensemble_kd_fwd(const eekd::EnsembleKD* a, bool wide, bool mean, void* loss, void* attention_loss,
                            int* count) {
  const auto launch = wide ? eekd::ensemble_kd_fwd_cuda<double> : eekd::ensemble_kd_fwd_cuda<float>;
  return launch(*a, mean, loss, attention_loss, count, nullptr);
}

const char* sparse_ensemble_kd_fwd(const eekd::SparseEnsembleKD* a, bool wide, bool mean, void* loss,
                                   void* attention_loss, int* count) {
  const auto launch = wide ? eekd::sparse_ensemble_kd_fwd_cuda<double> : eekd::sparse_ensemble_kd_fwd_cuda<float>;
  return launch(*a, mean, loss, attention_loss, count, nullptr);
}

const char* ensemble_kd_bwd(const eekd::Scale* a) { return eekd::ensemble_kd_bwd_cuda(*a, nullptr); }
}
