// 16 bytes of logits as one value, and a row as a sequence of them. Also the two ways to declare shared memory, which a test that
// runs the kernels on a CPU replaces.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SRPO_SHARED(type, name) __shared__ type name
#define SRPO_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace srpo {
namespace {

// 16 bytes of logits
template <class T> struct Pair;
template <> struct Pair<__nv_bfloat16> { using type = __nv_bfloat162; };
template <> struct Pair<__half> { using type = __half2; };

__device__ __forceinline__ float2 to_floats(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ __forceinline__ float2 to_floats(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ void from_floats(float x, float y, __nv_bfloat162* to) { *to = __floats2bfloat162_rn(x, y); }
__device__ __forceinline__ void from_floats(float x, float y, __half2* to) { *to = __floats2half2_rn(x, y); }

template <class T>
struct Vector {
  static constexpr int kCount = 8;
  typename Pair<T>::type pairs[4];

  __device__ void unpack(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = to_floats(pairs[i]);
      x[2 * i] = v.x, x[2 * i + 1] = v.y;
    }
  }
  __device__ void pack(const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) from_floats(x[2 * i], x[2 * i + 1], pairs + i);
  }
  __device__ void keep_larger(const Vector& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __hmax2(pairs[i], v.pairs[i]);
  }
};

template <>
struct Vector<float> {
  static constexpr int kCount = 4;
  float values[4];

  __device__ void unpack(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = values[i];
  }
  __device__ void pack(const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = x[i];
  }
  __device__ void keep_larger(const Vector& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = fmaxf(values[i], v.values[i]);
  }
};

// One 128-bit access each.
template <class T>
__device__ __forceinline__ Vector<T> read(const uint4* p) {
  const uint4 bits = *p;
  Vector<T> v;
  memcpy(&v, &bits, 16);
  return v;
}
template <class T>
__device__ __forceinline__ void write(uint4* p, const Vector<T>& v) {
  uint4 bits;
  memcpy(&bits, &v, 16);
  *p = bits;
}

// `count` elements from `row` on as whole 16-byte units, with `head` elements before the first unit and the others after the
// last. Only elements have to be aligned.
struct Units {
  int head, vectors, edges;  // `edges`: elements that are in no unit, at most 2 (kCount - 1)
};

template <class T>
__device__ __forceinline__ Units units_of(const T* row, int count) {
  constexpr int n = Vector<T>::kCount;
  const int past = int(uintptr_t(row) % 16 / sizeof(T)), wanted = (n - past) % n, head = wanted < count ? wanted : count;
  const int vectors = (count - head) / n;
  return {head, vectors, count - vectors * n};
}
// Column of the i-th element that is in no unit.
template <class T>
__device__ __forceinline__ int edge(const Units& u, int i) {
  return i < u.head ? i : i + u.vectors * Vector<T>::kCount;
}

// Whether units of one row are units of the other, too.
__device__ __forceinline__ bool same_units(const void* a, const void* b) { return uintptr_t(a) % 16 == uintptr_t(b) % 16; }

// As `read` and `write`, for addresses that need not be multiples of 16.
template <class T>
__device__ __forceinline__ Vector<T> read_at(const T* p, bool aligned) {
  if (aligned) return read<T>(reinterpret_cast<const uint4*>(p));
  T values[Vector<T>::kCount];
#pragma unroll
  for (int j = 0; j < Vector<T>::kCount; ++j) values[j] = p[j];
  Vector<T> v;
  memcpy(&v, values, 16);
  return v;
}
template <class T>
__device__ __forceinline__ void write_at(T* p, const Vector<T>& v, bool aligned) {
  if (aligned) return write(reinterpret_cast<uint4*>(p), v);
  T values[Vector<T>::kCount];
  memcpy(values, &v, 16);
#pragma unroll
  for (int j = 0; j < Vector<T>::kCount; ++j) p[j] = values[j];
}
template <class T>
__device__ __forceinline__ Vector<T> all_of(float x) {
  float xs[Vector<T>::kCount];
#pragma unroll
  for (int j = 0; j < Vector<T>::kCount; ++j) xs[j] = x;
  Vector<T> v;
  v.pack(xs);
  return v;
}

}  // namespace
}  // namespace srpo
