// The CUDA launcher, on the CPU, for ctypes.
#include "../../csrc/cuda/ensemble_kd.cu"

extern "C" {

void emulate(int shared_per_block, int shared_per_multiprocessor, int multiprocessors, int major, int clusters) {
  emulator::device = {shared_per_block, shared_per_multiprocessor, multiprocessors, major, clusters};
}

long launches() { return emulator::launches; }

int size_of_arguments() { return sizeof(eekd::EnsembleKD); }

const char* ensemble_kd_fwd(const eekd::EnsembleKD* a, bool wide, bool mean, void* loss, void* attention_loss, int* count) {
  const auto launch = wide ? eekd::ensemble_kd_fwd_cuda<double> : eekd::ensemble_kd_fwd_cuda<float>;
  return launch(*a, mean, loss, attention_loss, count, nullptr);
}
}
