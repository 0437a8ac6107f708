// The ids of each row's K largest logits, largest first; of equal ones the smaller id. Each row is read once.
//
// One CTA per row goes through it and collects, in shared memory, the logits that are larger than a bound. When its buffer is
// full, a radix select over it finds a higher bound that at least K of the collected logits reach, and the others are dropped, so
// that few of random logits are ever collected. Logits are compared as 64-bit keys, each of which exists once: the result does not
// depend on the order in which threads collect.
#pragma once
#include "row_math.h"
#include "vectors.cuh"

namespace srpo {
namespace {

constexpr int kTopKThreads = 256, kTopKBuffer = 2048, kTopKAhead = 4, kMaxTopK = kTopKBuffer / 2, kDigits = 256;
constexpr int kEnough = kTopKBuffer / 2;  // and half of K more: keys that may stay when a bound is raised

struct TopKArgs {
  const void* logits;  // [T, V], rows `stride` elements apart
  int64_t* ids;        // [T, K]
  int64_t stride, T, V, K;
};

struct TopKShared {
  uint64_t keys[kTopKBuffer];
  uint32_t histogram[kDigits];
  uint32_t count;  // of keys that were to be collected; beyond the buffer they stay pending
  uint32_t digit, above, here;
};

// Larger for a larger logit and, among equal ones, for a smaller id. NaN is the largest, as in torch.topk; -0 equals 0.
__device__ __forceinline__ uint64_t key_of(float x, int id) {
  uint32_t bits;
  x += 0.0f;  // -0 becomes 0
  memcpy(&bits, &x, 4);
  const uint32_t ordered = x != x ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(ordered) << 32 | uint32_t(~id);
}
__device__ __forceinline__ float logit_of(uint64_t key) {
  const uint32_t ordered = uint32_t(key >> 32), bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
__device__ __forceinline__ int64_t id_of(uint64_t key) { return int64_t(~uint32_t(key)); }

// The largest bound that at least k of the first n keys reach, with zeros in its low bits as soon as at most `enough` reach it.
// For all threads; n >= k.
__device__ __forceinline__ uint64_t find_bound(TopKShared& s, int n, int k, int enough) {
  uint64_t prefix = 0;
  uint32_t above = 0;  // keys that are larger than all with this prefix
  for (int shift = 56;; shift -= 8) {
    for (int i = threadIdx.x; i < kDigits; i += kTopKThreads) s.histogram[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kTopKThreads)
      if (s.keys[i] >> shift >> 8 == prefix >> shift >> 8) atomicAdd(s.histogram + (s.keys[i] >> shift & 255), 1u);
    __syncthreads();
    if (threadIdx.x < 32) {  // a lane has eight digits, the first lane the largest
      const int lane = threadIdx.x, highest = kDigits - 1 - 8 * lane;
      uint32_t own = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) own += s.histogram[highest - j];
      uint32_t before = 0;  // in lanes with larger digits
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, before + own, step);
        if (lane >= step) before += other;
      }
      uint32_t larger = above + before;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t here = s.histogram[highest - j];
        if (larger < uint32_t(k) && larger + here >= uint32_t(k)) s.digit = highest - j, s.above = larger, s.here = here;
        larger += here;
      }
    }
    __syncthreads();
    prefix |= uint64_t(s.digit) << shift;
    above = s.above;
    if (shift == 0 || above + s.here <= uint32_t(enough)) return prefix;
  }
}

// Drops the keys that are smaller than `bound`. For all threads; returns the number of those that stay.
__device__ __forceinline__ int drop_below(TopKShared& s, int n, uint64_t bound) {
  constexpr int kEach = kTopKBuffer / kTopKThreads;
  uint64_t own[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = threadIdx.x + j * kTopKThreads;
    own[j] = i < n ? s.keys[i] : 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (own[j] != 0 && own[j] >= bound) s.keys[atomicAdd(&s.count, 1u)] = own[j];
  __syncthreads();
  return int(s.count);
}

// Sorts the first n keys, largest first. For all threads.
__device__ __forceinline__ void sort_keys(TopKShared& s, int n) {
  int size = 1;
  while (size < n) size *= 2;
  for (int i = n + threadIdx.x; i < size; i += kTopKThreads) s.keys[i] = 0;
  for (int width = 2; width <= size; width *= 2)
    for (int step = width / 2; step; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += kTopKThreads) {
        const int low = i / step * 2 * step + i % step, high = low + step;
        const bool falling = !(low & width);
        const uint64_t a = s.keys[low], b = s.keys[high];
        if ((a < b) == falling) s.keys[low] = b, s.keys[high] = a;
      }
    }
  __syncthreads();
}

// Collects those of a thread's logits x of columns `first`, first + 1, ... that are in `pending` and larger than `bound`; returns
// the bits of those for which the buffer has no place.
template <int n>
__device__ __forceinline__ uint32_t collect(TopKShared& s, const float (&x)[n], int first, uint32_t pending, uint64_t bound) {
  const float least = logit_of(bound);
  uint32_t left = 0;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (!(pending >> j & 1) || x[j] < least) continue;
    const uint64_t key = key_of(x[j], first + j);
    if (key <= bound) continue;
    const uint32_t place = atomicAdd(&s.count, 1u);
    if (place < kTopKBuffer) s.keys[place] = key; else left |= 1u << j;
  }
  return left;
}

template <class T>
__global__ void __launch_bounds__(kTopKThreads, sizeof(T) == 4 ? 2 : 4) top_k_ids(const __grid_constant__ TopKArgs a) {
  constexpr int n = Vector<T>::kCount;
  SRPO_SHARED(TopKShared, s);
  const int k = int(a.K), thread = threadIdx.x;
  for (int64_t row = blockIdx.x; row < a.T; row += gridDim.x) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const Units u = units_of(logits, int(a.V));
    uint64_t bound = key_of(-INFINITY, -1) - 1;  // below every key
    if (thread == 0) s.count = 0;
    __syncthreads();
    const auto raise_bound = [&] {  // for all threads, when the buffer is full
      bound = find_bound(s, kTopKBuffer, k, kEnough + k / 2);
      drop_below(s, kTopKBuffer, bound);
      bound -= 1;  // keys that equal the bound are among those that stay
    };
    const int span = kTopKAhead * kTopKThreads;
    for (int base = 0; base < u.vectors; base += span) {
      Vector<T> units[kTopKAhead];
      uint32_t pending[kTopKAhead];
#pragma unroll
      for (int j = 0; j < kTopKAhead; ++j) {
        const int unit = base + thread + j * kTopKThreads;
        pending[j] = unit < u.vectors ? (1u << n) - 1 : 0;
        if (pending[j]) units[j] = read_at(logits + u.head + unit * n, true);
      }
      for (;;) {
        const float least = logit_of(bound);
        uint32_t left = 0;
#pragma unroll
        for (int j = 0; j < kTopKAhead; ++j) {
          if (!pending[j]) continue;
          float x[n];
          units[j].unpack(x);
          bool any = false;
#pragma unroll
          for (int m = 0; m < n; ++m) any |= !(x[m] < least);  // NaN counts
          if (!any) {
            pending[j] = 0;
            continue;
          }
          left |= pending[j] = collect(s, x, u.head + (base + thread + j * kTopKThreads) * n, pending[j], bound);
        }
        if (!__syncthreads_or(left != 0)) break;
        raise_bound();
      }
    }
    uint32_t pending = thread < u.edges;
    const float x[1] = {pending ? float(logits[edge<T>(u, thread)]) : 0.0f};
    while (__syncthreads_or((pending = collect(s, x, edge<T>(u, thread), pending, bound)) != 0)) raise_bound();

    int count = int(s.count);
    if (count > k) count = drop_below(s, count, find_bound(s, count, k, k));
    sort_keys(s, count);
    for (int i = thread; i < k; i += kTopKThreads) a.ids[row * k + i] = id_of(s.keys[i]);
    __syncthreads();
  }
}

}  // namespace
}  // namespace srpo
