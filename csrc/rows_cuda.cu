// Loss and gradient of Eq. 6 on a GPU: picks a kernel and launches it. The interface is plain C, without torch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "rows_one_read.cuh"
#include "rows_two_reads.cuh"

namespace srpo {
namespace {

// Launch parameters of rows_one_read for rows of one length on one device.
struct Plan {
  int cluster;  // CTAs per row; 0: rows_one_read cannot take these rows
  int slice_vectors, dynamic_bytes, max_clusters;
};

struct Kernels {
  const void *one_read, *two_reads;
  int element_bytes;
};

Kernels kernels_for(int32_t dtype) {
  switch (dtype) {
    case kFloat32: return {(const void*)rows_one_read<float>, (const void*)rows_two_reads<float>, 4};
    case kBFloat16: return {(const void*)rows_one_read<__nv_bfloat16>, (const void*)rows_two_reads<__nv_bfloat16>, 2};
    default: return {(const void*)rows_one_read<__half>, (const void*)rows_two_reads<__half>, 2};
  }
}

// Returns from the calling function if the call fails.
#define SRPO_TRY(call) \
  if (const cudaError_t error = (call)) return error

// `dimension` must outlive the result, which points to it.
cudaLaunchConfig_t cluster_launch(const Plan& plan, int64_t num_clusters, cudaStream_t stream, cudaLaunchAttribute* dimension) {
  dimension->id = cudaLaunchAttributeClusterDimension;
  dimension->val.clusterDim.x = plan.cluster;
  dimension->val.clusterDim.y = dimension->val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(num_clusters * plan.cluster));
  config.blockDim = dim3(kThreads + 32);
  config.dynamicSmemBytes = plan.dynamic_bytes;
  config.stream = stream;
  config.attrs = dimension;
  config.numAttrs = 1;
  return config;
}

// The smallest cluster that leaves room for kCtasPerSm CTAs on an SM, else the largest that the device can run; `wanted` > 0:
// only that size.
cudaError_t make_plan(const void* kernel, int64_t row_bytes, int device, int wanted, Plan* best) {
  *best = {};
  cudaFuncAttributes of_kernel;
  SRPO_TRY(cudaFuncGetAttributes(&of_kernel, kernel));
  int most, per_sm, reserved;
  SRPO_TRY(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  SRPO_TRY(cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  SRPO_TRY(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device));
  most -= int(of_kernel.sharedSizeBytes);
  SRPO_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  SRPO_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  SRPO_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const int64_t vectors = (row_bytes / 16 + cluster - 1) / cluster, slice = (vectors + 1) / 2 * 2;  // whole 32-byte sectors
    const int64_t bytes = kStages * (slice * 16 + cluster * int64_t(sizeof(Message)));
    if (bytes > most || (wanted > 0 && cluster != wanted)) continue;
    Plan plan = {cluster, int(slice), int(bytes), 0};
    cudaLaunchAttribute dimension;
    const cudaLaunchConfig_t config = cluster_launch(plan, 1, nullptr, &dimension);
    if (cudaOccupancyMaxActiveClusters(&plan.max_clusters, kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // clears the error: the cluster is larger than this device allows
      continue;
    }
    if (plan.max_clusters < 1) continue;
    *best = plan;
    if (bytes <= per_sm / kCtasPerSm - reserved - int(of_kernel.sharedSizeBytes)) break;
  }
  return cudaSuccess;
}

// Plans are cached, since making one takes a dozen calls of the driver.
cudaError_t find_plan(const RowArgs& a, int device, int wanted, Plan* plan) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int64_t, int>, Plan> plans;
  const Kernels kernels = kernels_for(a.dtype);
  const auto fits = [&](const void* p, int64_t stride) {
    return uintptr_t(p) % 16 == 0 && (stride * kernels.element_bytes % 16 == 0 || a.T == 1);
  };
  const int64_t row_bytes = a.V * kernels.element_bytes;
  *plan = {};
  if (wanted == 0 || a.kept_ids || a.ref_logits || row_bytes % 16 || row_bytes > kMaxCluster * kMaxSliceBytes ||
      !fits(a.logits, a.logits_stride) || !fits(a.dlogits, a.dlogits_stride))
    return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, int(a.dtype), a.V, wanted);
  const auto known = plans.find(key);
  if (known != plans.end()) return *plan = known->second, cudaSuccess;
  SRPO_TRY(make_plan(kernels.one_read, row_bytes, device, wanted, plan));
  plans[key] = *plan;
  return cudaSuccess;
}

cudaError_t launch(RowArgs a, int device, int wanted, cudaStream_t stream) {
  if (a.T == 0) return cudaSuccess;
  if (a.V > 1 << 30 || a.K > 1 << 30) return cudaErrorInvalidValue;  // columns are counted in 32 bits
  const Kernels kernels = kernels_for(a.dtype);
  Plan plan;
  SRPO_TRY(find_plan(a, device, wanted, &plan));
  if (wanted > 0 && plan.cluster == 0) return cudaErrorInvalidConfiguration;
  if (plan.cluster > 0) {
    cudaLaunchAttribute dimension;
    const cudaLaunchConfig_t config = cluster_launch(plan, std::min<int64_t>(plan.max_clusters, a.T), stream, &dimension);
    void* args[] = {&a, &plan.slice_vectors};
    return cudaLaunchKernelExC(&config, kernels.one_read, args);
  }
  const int64_t filter_bytes = a.kept_ids && a.dlogits ? (a.V + 31) / 32 * 4 : 0;
  if (filter_bytes > 32 * 1024)
    SRPO_TRY(cudaFuncSetAttribute(kernels.two_reads, cudaFuncAttributeMaxDynamicSharedMemorySize, int(filter_bytes)));
  void* args[] = {&a};
  const unsigned num_ctas = unsigned(std::min<int64_t>(a.T, 1 << 30));
  return cudaLaunchKernel(kernels.two_reads, dim3(num_ctas), dim3(kPlainThreads), args, size_t(filter_bytes), stream);
}

// Runs f with `device` as the thread's current device.
template <class F>
cudaError_t on_device(int device, F f) {
  int before;
  SRPO_TRY(cudaGetDevice(&before));
  if (before != device) SRPO_TRY(cudaSetDevice(device));
  const cudaError_t result = f();
  if (before != device) SRPO_TRY(cudaSetDevice(before));
  return result;
}

}  // namespace
}  // namespace srpo

#define SRPO_EXPORT extern "C" __attribute__((visibility("default")))

// Queues `args`, whose pointers belong to `device`, on a stream of that device. `cluster`: CTAs per row, 1 to 16; 0:
// rows_two_reads; negative: the best choice. Returns a CUDA error code; cudaErrorInvalidConfiguration if that cluster size is
// impossible.
SRPO_EXPORT int srpo_cuda_rows(const srpo::RowArgs* args, int device, int cluster, void* stream) {
  return srpo::on_device(device, [&] { return srpo::launch(*args, device, cluster, static_cast<cudaStream_t>(stream)); });
}

// The cluster size that `args` would get, 0 for the kernel with two reads; or minus a CUDA error code.
SRPO_EXPORT int srpo_cuda_cluster(const srpo::RowArgs* args, int device) {
  srpo::Plan plan = {};
  const cudaError_t error = srpo::on_device(device, [&] { return srpo::find_plan(*args, device, -1, &plan); });
  return error ? -int(error) : plan.cluster;
}

SRPO_EXPORT const char* srpo_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }
SRPO_EXPORT int64_t srpo_cuda_args_bytes() { return sizeof(srpo::RowArgs); }
