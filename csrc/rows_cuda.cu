// Loss and gradient of Eq. 6, and each row's largest logits, on a GPU: picks a kernel and launches it. The interface is plain C,
// without torch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "rows_filtered.cuh"
#include "rows_one_read.cuh"
#include "rows_two_reads.cuh"
#include "top_k.cuh"

namespace srpo {
namespace {

// Launch parameters of rows_one_read for rows of one length on one device.
struct Plan {
  int cluster;  // CTAs per row; 0: rows_one_read cannot take these rows
  int slice_vectors, dynamic_bytes, max_clusters;
};

// Returns from the calling function if the call fails.
#define SRPO_TRY(call) \
  if (const cudaError_t error = (call)) return error

// f(T()) for the type of the logits.
template <class F>
cudaError_t with_type(int32_t dtype, F f) {
  switch (dtype) {
    case kFloat32: return f(float());
    case kBFloat16: return f(__nv_bfloat16());
    default: return f(__half());
  }
}

cudaLaunchConfig_t launch_config(int64_t num_ctas, int num_threads, int64_t dynamic_bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(num_ctas));
  config.blockDim = dim3(unsigned(num_threads));
  config.dynamicSmemBytes = size_t(dynamic_bytes);
  config.stream = stream;
  return config;
}

// `dimension` must outlive the result, which points to it.
cudaLaunchConfig_t cluster_launch(const Plan& plan, int64_t num_clusters, cudaStream_t stream, cudaLaunchAttribute* dimension) {
  dimension->id = cudaLaunchAttributeClusterDimension;
  dimension->val.clusterDim.x = plan.cluster;
  dimension->val.clusterDim.y = dimension->val.clusterDim.z = 1;
  cudaLaunchConfig_t config = launch_config(num_clusters * plan.cluster, kThreads + 32, plan.dynamic_bytes, stream);
  config.attrs = dimension;
  config.numAttrs = 1;
  return config;
}

// Lets a kernel have as much dynamic shared memory as the device has: `most` bytes. Once per kernel and device.
cudaError_t prepare(const void* kernel, int device, int* most) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return *most = found->second, cudaSuccess;
  cudaFuncAttributes of_kernel;
  SRPO_TRY(cudaFuncGetAttributes(&of_kernel, kernel));
  SRPO_TRY(cudaDeviceGetAttribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  *most -= int(of_kernel.sharedSizeBytes);
  SRPO_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, *most));
  SRPO_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  known[{kernel, device}] = *most;
  return cudaSuccess;
}

// The smallest cluster that leaves room for kCtasPerSm CTAs on an SM, else the largest that the device can run; `wanted` > 0:
// only that size.
cudaError_t make_plan(const void* kernel, int64_t row_bytes, int device, int wanted, Plan* best) {
  *best = {};
  cudaFuncAttributes of_kernel;
  SRPO_TRY(cudaFuncGetAttributes(&of_kernel, kernel));
  int most, per_sm, reserved;
  SRPO_TRY(prepare(kernel, device, &most));
  SRPO_TRY(cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  SRPO_TRY(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device));
  SRPO_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
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
  const int64_t element_bytes = a.dtype == kFloat32 ? 4 : 2, row_bytes = a.V * element_bytes;
  const auto fits = [&](const void* p, int64_t stride) {
    return uintptr_t(p) % 16 == 0 && (stride * element_bytes % 16 == 0 || a.T == 1);
  };
  *plan = {};
  if (wanted == 0 || a.kept_ids || a.ref_logits || row_bytes % 16 || row_bytes > kMaxCluster * kMaxSliceBytes ||
      !fits(a.logits, a.logits_stride) || !fits(a.dlogits, a.dlogits_stride))
    return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, int(a.dtype), a.V, wanted);
  const auto known = plans.find(key);
  if (known != plans.end()) return *plan = known->second, cudaSuccess;
  SRPO_TRY(with_type(a.dtype, [&](auto type) {
    return make_plan((const void*)rows_one_read<decltype(type)>, row_bytes, device, wanted, plan);
  }));
  plans[key] = *plan;
  return cudaSuccess;
}

constexpr int64_t kMostCtas = 1 << 30, kMostColumns = 1 << 30;  // columns are counted in 32 bits

template <class T>
cudaError_t launch_rows(const RowArgs& a, const Plan& plan, int device, cudaStream_t stream) {
  if (plan.cluster > 0) {
    cudaLaunchAttribute dimension;
    const cudaLaunchConfig_t config = cluster_launch(plan, std::min<int64_t>(plan.max_clusters, a.T), stream, &dimension);
    return cudaLaunchKernelEx(&config, rows_one_read<T>, a, plan.slice_vectors);
  }
  const int64_t num_ctas = std::min(a.T, kMostCtas);
  if (a.kept_ids) {
    const int64_t bytes = a.dlogits ? 4 * ((a.V + Vector<T>::kCount + 31) / 32) : 0;  // CandidateBits::num_words
    int most;
    SRPO_TRY(prepare((const void*)rows_filtered<T>, device, &most));
    if (bytes > most) return cudaErrorInvalidValue;
    const cudaLaunchConfig_t config = launch_config(num_ctas, kRowThreads, bytes, stream);
    return cudaLaunchKernelEx(&config, rows_filtered<T>, a);
  }
  const cudaLaunchConfig_t config = launch_config(num_ctas, kRowThreads, 0, stream);
  if (a.ref_logits) return cudaLaunchKernelEx(&config, rows_two_reads<T, true>, a);
  return cudaLaunchKernelEx(&config, rows_two_reads<T, false>, a);
}

cudaError_t launch(const RowArgs& a, int device, int wanted, cudaStream_t stream) {
  if (a.T == 0) return cudaSuccess;
  if (a.V > kMostColumns || a.K > kMostColumns) return cudaErrorInvalidValue;
  Plan plan;
  SRPO_TRY(find_plan(a, device, wanted, &plan));
  if (wanted > 0 && plan.cluster == 0) return cudaErrorInvalidConfiguration;
  return with_type(a.dtype, [&](auto type) { return launch_rows<decltype(type)>(a, plan, device, stream); });
}

cudaError_t launch_top_k(const TopKArgs& a, int32_t dtype, int device, cudaStream_t stream) {
  if (a.T == 0) return cudaSuccess;
  if (a.V > kMostColumns || a.K < 1 || a.K > kMaxTopK || a.K > a.V) return cudaErrorInvalidValue;
  const cudaLaunchConfig_t config = launch_config(std::min(a.T, kMostCtas), kTopKThreads, 0, stream);
  return with_type(dtype, [&](auto type) {
    int most;
    SRPO_TRY(prepare((const void*)top_k_ids<decltype(type)>, device, &most));
    return cudaLaunchKernelEx(&config, top_k_ids<decltype(type)>, a);
  });
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

// Queues `args`, whose pointers belong to `device`, on a stream of that device. `cluster`: CTAs per row, 1 to 16; 0: not
// rows_one_read; negative: the best choice. Returns a CUDA error code; cudaErrorInvalidConfiguration if that cluster size is
// impossible.
SRPO_EXPORT int srpo_cuda_rows(const srpo::RowArgs* args, int device, int cluster, void* stream) {
  return srpo::on_device(device, [&] { return srpo::launch(*args, device, cluster, static_cast<cudaStream_t>(stream)); });
}

// The cluster size that `args` would get, 0 for another kernel than rows_one_read; or minus a CUDA error code.
SRPO_EXPORT int srpo_cuda_cluster(const srpo::RowArgs* args, int device) {
  srpo::Plan plan = {};
  const cudaError_t error = srpo::on_device(device, [&] { return srpo::find_plan(*args, device, -1, &plan); });
  return error ? -int(error) : plan.cluster;
}

// Writes the ids of the K largest logits of each row into `ids` [T, K], largest first; K is at most srpo_cuda_max_top_k().
SRPO_EXPORT int srpo_cuda_top_k(const void* logits, int64_t stride, int64_t T, int64_t V, int64_t K, int dtype, int64_t* ids,
                                int device, void* stream) {
  const srpo::TopKArgs args = {logits, ids, stride, T, V, K};
  return srpo::on_device(device, [&] { return srpo::launch_top_k(args, dtype, device, static_cast<cudaStream_t>(stream)); });
}

SRPO_EXPORT int64_t srpo_cuda_max_top_k() { return srpo::kMaxTopK; }
SRPO_EXPORT const char* srpo_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }
SRPO_EXPORT int64_t srpo_cuda_args_bytes() { return sizeof(srpo::RowArgs); }
