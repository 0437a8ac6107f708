// As much of CUDA's runtime as csrc/rows_cuda.cu and bench/gpu_proof/rows_check.cu use, for simt.h. One device, whose limits are
// those of an H200, except that it runs two clusters at a time, so that each gets several rows.
#pragma once
#include <chrono>

#include "simt.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchTimeout = 702 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaLaunchAttributeClusterDimension, cudaSharedmemCarveoutMaxShared };
struct cudaFuncAttributes {
  size_t sharedSizeBytes, localSizeBytes;
  int numRegs;
};
using cudaStream_t = void*;
using cudaEvent_t = std::chrono::steady_clock::time_point*;
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    default: return "cudaErrorLaunchTimeout";  // no thread of a kernel could go on
  }
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = 232448, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *value = 233472, cudaSuccess;
    default: return *value = 1024, cudaSuccess;
  }
}
inline size_t simt_static_shared_bytes = 304;
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return *attributes = {simt_static_shared_bytes, 0, 60}, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveClusters(int* number, const void*, const cudaLaunchConfig_t*) {
  return *number = 2, cudaSuccess;
}

inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  return *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256), cudaSuccess;
}
template <class X>
cudaError_t cudaMalloc(X** p, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemset(void* p, int byte, size_t bytes) { return memset(p, byte, bytes), cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t* e) { return *e = new std::chrono::steady_clock::time_point, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = nullptr) {
  return *e = std::chrono::steady_clock::now(), cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  return *ms = std::chrono::duration<float, std::milli>(*b - *a).count(), cudaSuccess;
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... args) {
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  try {
    simt::launch(config->gridDim.x, cluster, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(args...); });
  } catch (const std::exception& error) {
    std::fprintf(stderr, "simt: %s\n", error.what());
    return cudaErrorLaunchTimeout;
  }
  return cudaSuccess;
}
