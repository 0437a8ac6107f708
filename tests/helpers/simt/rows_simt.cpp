// csrc/rows_cuda.cu, kernels included, built for a CPU: the library that srpo_kernels/cuda.py loads, with a seed for the order in
// which threads run.
#include "simt.h"

// A GPU's exponential is off by up to 2^-22; so is this one, by an amount that looks random.
inline float exp2_of_a_gpu(float x) {
  const double noise = std::fmod(std::fabs(double(x)) * 7919.0, 2.0) - 1.0;
  return float(std::exp2(double(x)) * (1 + noise * 0x1p-22 * 0.7071));
}
#define exp2f exp2_of_a_gpu
#include "rows_cuda.cu"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_seed(unsigned seed) { simt::world.random.seed(seed); }

// The plan for rows of V logits if the kernel has `static_bytes` of shared memory: [cluster, slice_vectors, dynamic_bytes].
SIMT_EXPORT int simt_plan(int dtype, int64_t V, int64_t static_bytes, int* plan) {
  srpo::Plan best = {};
  simt_static_shared_bytes = size_t(static_bytes);
  const cudaError_t error = srpo::make_plan(nullptr, V * (dtype == srpo::kFloat32 ? 4 : 2), 0, -1, &best);
  plan[0] = best.cluster, plan[1] = best.slice_vectors, plan[2] = best.dynamic_bytes;
  return error;
}

// A kernel in which one thread does not come to the barrier of the others.
SIMT_EXPORT int simt_stuck() {
  cudaLaunchConfig_t config = srpo::launch_config(1, 64, 0, nullptr);
  void (*kernel)(int) = [](int absent) {
    if (threadIdx.x != unsigned(absent)) __syncthreads();
  };
  return cudaLaunchKernelEx(&config, kernel, 7);
}
