// Wrappers for the PTX instructions of Hopper that the CUDA kernels use. Tests that run the kernels on a CPU bring their own.
//
// With SRPO_WATCHDOG a thread that waits for a second on a barrier says where, and goes on, and with it all others: the kernel
// ends, with wrong results, instead of occupying the GPU for ever.
#pragma once
#include <cstdint>
#ifndef __CUDACC__
#include <simt_cluster.h>
#else
#ifdef SRPO_WATCHDOG
#include <cstdio>
#endif

namespace srpo {

#ifdef SRPO_WATCHDOG
static __device__ volatile int gave_up;  // whether a thread has waited for too long
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Barriers in shared memory: a phase ends when `arrivals` threads have arrived and all announced bytes have been written. Bytes
// may arrive before they are announced.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, uint32_t num_bytes) {
  const uint32_t address = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(num_bytes) : "memory");
}
// Waits for the end of phase number `phase` (from 0), which must be the present or the last one. Afterwards everything written
// before the arrivals is visible; kFromCluster: also messages of other CTAs.
template <bool kFromCluster = false>
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
  const uint32_t address = shared_address(barrier), parity = phase & 1;
#ifdef SRPO_WATCHDOG
  constexpr long long kLimit = 2'000'000'000;  // clock cycles
  const long long begin = clock64();
  for (uint32_t done = 0; !done;) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}" : "=r"(done) : "r"(address), "r"(parity) : "memory");
    if (!done && gave_up) return;
    if (!done && clock64() - begin > kLimit) {
      gave_up = 1;
      if (threadIdx.x % 32 == 0)
        printf("stuck: block %d warp %d barrier at %u, phase %u, state %016llx\n", int(blockIdx.x), int(threadIdx.x / 32),
               address, phase, *reinterpret_cast<volatile unsigned long long*>(barrier));
      return;
    }
  }
  return;
#endif
  if (kFromCluster)
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(address), "r"(parity) : "memory");
  else
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(address), "r"(parity) : "memory");
}

// Named barrier of a subset of the CTA's warps. Number 0 is __syncthreads.
__device__ __forceinline__ void sync_threads(int number, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Barrier of all threads of all CTAs of the cluster; call it by whole warps.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Copies between global and shared memory by the copy engine, in aligned 16-byte units. A load signals a barrier; stores are
// tracked in groups.
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t num_bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(num_bytes), "r"(shared_address(barrier)), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, const void* from, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(num_bytes)
               : "memory");
}
// Waits until the thread's bulk stores have read shared memory; kArrived: until they are in global memory.
template <bool kArrived>
__device__ __forceinline__ void bulk_stores_wait() {
  if (kArrived)
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  else
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Makes the thread's ordinary writes to shared memory visible to the copy engine.
__device__ __forceinline__ void publish_to_copy_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Writes 16 bytes into another CTA's copy of `to`, and counts these bytes on that CTA's copy of `barrier`.
__device__ __forceinline__ void send(uint32_t rank, void* to, uint64_t* barrier, float a, float b, float c, float d) {
  asm volatile(
      "{\n"
      ".reg .u32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [counter];\n"
      "}" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "r"(rank), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
}

}  // namespace srpo
#endif
