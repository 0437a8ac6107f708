// The kernel for rows without a filter that rows_one_read.cuh does not take. One CTA per row reads it twice, in 16-byte units
// where addresses allow: any length, stride and alignment. kRef: with reference logits, for the exact KL.
#pragma once
#include <type_traits>

#include "row_math.h"
#include "vectors.cuh"

namespace srpo {
namespace {

constexpr int kRowWarps = 8, kRowThreads = 32 * kRowWarps;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kTwoReadsCtas = 2;  // per SM: the compiler spills registers with three
#else
constexpr int kTwoReadsCtas = 3;
#endif

__device__ __forceinline__ Partial merge_lanes(Partial p) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2)
    p = merge(p, {__shfl_xor_sync(0xffffffffu, p.k, lane), __shfl_xor_sync(0xffffffffu, p.sum, lane),
                  __shfl_xor_sync(0xffffffffu, p.dot, lane), __shfl_xor_sync(0xffffffffu, p.gap, lane)});
  return p;
}

// Shared by the threads of a CTA that works on a row.
struct RowShared {
  Partial parts[kRowWarps], ref_parts[kRowWarps];
  ElementGradient gradient;
  float k;  // exponents are relative to it
};

// For one thread, when all parts are written: the row's values, and what the other threads need for its gradient.
template <class T>
__device__ __forceinline__ void finish_parts(const RowArgs& a, int64_t row, RowShared& s, float x_label, bool with_ref,
                                             float ref_label, bool outside, Scale c) {
  Partial p = s.parts[0];
#pragma unroll 1
  for (int i = 1; i < kRowWarps; ++i) p = merge(p, s.parts[i]);
  RowValues v = row_values<kFine<T>>(add_up(s.parts, kRowWarps), x_label, c, p.k);
  const double ref_lse2 = with_ref ? add_up(s.ref_parts, kRowWarps).lse2 : v.lse2, shift = (v.lse2 - ref_lse2) * kLn2;
  if (with_ref) v.kl = double(p.gap) / p.sum / a.temperature - shift;
  const Coefs coefs = finish_row(a, row, look_up(a, row), v, outside, true);
  s.gradient = element_gradient(a, coefs, v, p.k, shift, double(x_label) - ref_label);
  s.k = p.k;
}

// The gradient of an entry that is not the label's.
template <bool fine>
__device__ __forceinline__ float element(const ElementGradient& g, float x, float x_ref, float k, Scale c) {
  float t;
  const float e = power<fine>(x, c, k, &t);
  return fmaf(e, g.softmax, g.gap != 0 && e != 0 ? e * g.gap * (x - x_ref) : 0.0f);
}

template <class T>
__device__ __forceinline__ void fill_zero(T* row, int count) {
  const Units u = units_of(row, count);
  const Vector<T> zero = all_of<T>(0.0f);
  for (int i = threadIdx.x; i < u.vectors; i += kRowThreads) write_at(row + u.head + i * Vector<T>::kCount, zero, true);
  for (int i = threadIdx.x; i < u.edges; i += kRowThreads) row[edge<T>(u, i)] = T(0.0f);
}

template <class T, bool kRef>
__global__ void __launch_bounds__(kRowThreads, kTwoReadsCtas) rows_two_reads(const __grid_constant__ RowArgs a) {
  constexpr int n = Vector<T>::kCount, kAhead = kRef ? 2 : 4;  // units that a thread has in flight
  SRPO_SHARED(RowShared, s);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, num_ids = int(a.V);
  const Scale c = scale_of(a);
  for (int64_t row = blockIdx.x; row < a.T; row += gridDim.x) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
    const T* ref = kRef ? static_cast<const T*>(a.ref_logits) + row * a.ref_stride : logits;
    T* d = a.dlogits ? static_cast<T*>(a.dlogits) + row * a.dlogits_stride : nullptr;
    const int64_t label = a.labels[row];
    if (label == kIgnore) {
      if (d) fill_zero(d, num_ids);
      if (thread == 0) ignore_row(a, row);
      continue;
    }
    const Units u = units_of(logits, num_ids);
    const int span = kAhead * kRowThreads, num_spans = (u.vectors + span - 1) / span;
    const bool ref_fits = same_units(ref, logits), d_fits = d && same_units(d, logits);

    Partial p = nothing(), q = nothing();
    float lost = 0, ref_lost = 0;
    for (int i = thread; i < num_spans * span; i += span) {
      Vector<T> units[kAhead], ref_units[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int unit = i + j * kRowThreads;
        const bool there = unit < u.vectors;
        units[j] = there ? read_at(logits + u.head + unit * n, true) : all_of<T>(-INFINITY);
        if (kRef) ref_units[j] = there ? read_at(ref + u.head + unit * n, ref_fits) : all_of<T>(-INFINITY);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        float x[n], y[n];
        units[j].unpack(x);
        if (kRef) {
          ref_units[j].unpack(y);
          add_more_logits<kFine<T>, false>(q, ref_lost, y, y, c);
        }
        add_more_logits<kFine<T>, kRef>(p, lost, x, kRef ? y : x, c);
      }
    }
    for (int i = thread; i < u.edges; i += kRowThreads) {
      const float x[1] = {float(logits[edge<T>(u, i)])}, y[1] = {float(ref[edge<T>(u, i)])};
      if (kRef) add_more_logits<kFine<T>, false>(q, ref_lost, y, y, c);
      add_more_logits<kFine<T>, kRef>(p, lost, x, y, c);
    }
    p = merge_lanes(p);
    if (kRef) q = merge_lanes(q);
    if (lane == 0) s.parts[warp] = p, s.ref_parts[warp] = q;
    __syncthreads();
    if (thread == 0) {
      const bool valid = label >= 0 && label < a.V;
      finish_parts<T>(a, row, s, valid ? float(logits[label]) : NAN, kRef, valid && kRef ? float(ref[label]) : 0.0f, false, c);
    }
    __syncthreads();
    if (!d) continue;
    const ElementGradient g = s.gradient;
    const float k = s.k;
    const int at = label >= 0 && label < a.V ? int(label) : -1;
    const auto write = [&](auto ref_in_units) {  // the second sweep, backwards: what was read last is still in a cache
      for (int i = thread + (num_spans - 1) * span; i >= 0; i -= span) {
        Vector<T> units[kAhead], ref_units[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {  // all loads come first, so that they are in flight together: none depends on a branch
          const int wanted = i + j * kRowThreads, unit = wanted < u.vectors ? wanted : u.vectors - 1;
          units[j] = read_at(logits + u.head + unit * n, true);
          if (kRef) ref_units[j] = read_at(ref + u.head + unit * n, ref_in_units.value);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int unit = i + j * kRowThreads, first = u.head + unit * n;
          if (unit >= u.vectors) continue;
          float x[n], y[n];
          units[j].unpack(x);
          if (kRef) ref_units[j].unpack(y);
#pragma unroll
          for (int m = 0; m < n; ++m) x[m] = element<kFine<T>>(g, x[m], kRef ? y[m] : 0.0f, k, c);
          units[j].pack(x);
          write_at(d + first, units[j], d_fits);
          if (unsigned(at - first) < unsigned(n)) d[at] = T(g.label);
        }
      }
    };
    if (ref_fits) write(std::true_type()); else write(std::false_type());
    for (int i = thread; i < u.edges; i += kRowThreads) {
      const int id = edge<T>(u, i);
      d[id] = T(id == at ? g.label : element<kFine<T>>(g, float(logits[id]), float(ref[id]), k, c));
    }
  }
}

}  // namespace
}  // namespace srpo
