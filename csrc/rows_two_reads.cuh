// The kernel for all rows that rows_one_read.cuh does not take. One CTA per row reads it twice, element by element. With a filter
// the row consists of the label's logit and the kept ones.
#pragma once
#include "row_math.h"

namespace srpo {
namespace {

constexpr int kPlainWarps = 8, kPlainThreads = 32 * kPlainWarps, kChunk = 8;

__device__ __forceinline__ Partial merge_lanes(Partial p) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2)
    p = merge(p, {__shfl_xor_sync(0xffffffffu, p.k, lane), __shfl_xor_sync(0xffffffffu, p.sum, lane),
                  __shfl_xor_sync(0xffffffffu, p.dot, lane), __shfl_xor_sync(0xffffffffu, p.gap, lane)});
  return p;
}

template <class T>
__global__ void __launch_bounds__(kPlainThreads, 2) rows_two_reads(const __grid_constant__ RowArgs a) {
  extern __shared__ uint32_t is_kept[];  // a bit per id, with a filter
  __shared__ Partial parts[kPlainWarps], ref_parts[kPlainWarps];
  __shared__ ElementGradient gradient;
  __shared__ float row_k;  // exponents are relative to it
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, num_ids = int(a.V);
  const Scale c = scale_of(a);
  for (int64_t row = blockIdx.x; row < a.T; row += gridDim.x) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
    const T* ref = a.ref_logits ? static_cast<const T*>(a.ref_logits) + row * a.ref_stride : nullptr;
    T* d = a.dlogits ? static_cast<T*>(a.dlogits) + row * a.dlogits_stride : nullptr;
    const int64_t label = a.labels[row];
    if (label == kIgnore) {
      if (d)
        for (int i = thread; i < num_ids; i += kPlainThreads) d[i] = T(0.0f);
      if (thread == 0) ignore_row(a, row);
      continue;
    }
    const bool valid = label >= 0 && label < a.V, filtered = a.kept_ids && valid;
    const Candidates candidates = {filtered ? a.kept_ids + row * a.K : nullptr, int(label), filtered ? int(a.K) + 1 : num_ids};
    if (filtered && d)
      for (int i = thread; i < (num_ids + 31) / 32; i += kPlainThreads) is_kept[i] = 0;

    Partial p = nothing(), q = nothing();
    float lost = 0, ref_lost = 0;
    bool found = !filtered;
    for (int start = thread; start < candidates.count; start += kChunk * kPlainThreads) {
      float x[kChunk], y[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const int id = candidates.id(start + j * kPlainThreads);
        x[j] = id < 0 ? -INFINITY : float(logits[id]);
        if (ref) y[j] = id < 0 ? -INFINITY : float(ref[id]);
      }
      if (ref) {
        add_more_logits<kFine<T>, true>(p, lost, x, y, c);
        add_more_logits<kFine<T>, false>(q, ref_lost, y, y, c);
      } else {
        add_more_logits<kFine<T>, false>(p, lost, x, x, c);
      }
    }
    if (filtered)
      for (int i = thread; i < a.K; i += kPlainThreads) found |= candidates.kept[i] == label;
    p = merge_lanes(p);
    q = merge_lanes(q);
    if (lane == 0) parts[warp] = p, ref_parts[warp] = q;
    const bool outside = !__syncthreads_or(found);

    if (thread == 0) {
      const float x_label = valid ? float(logits[label]) : NAN, ref_label = valid && ref ? float(ref[label]) : 0.0f;
      p = parts[0];
#pragma unroll 1
      for (int i = 1; i < kPlainWarps; ++i) p = merge(p, parts[i]);
      row_k = p.k;
      RowValues v = row_values<kFine<T>>(add_up(parts, kPlainWarps), x_label, c, p.k);
      const double ref_lse2 = ref ? add_up(ref_parts, kPlainWarps).lse2 : v.lse2, shift = (v.lse2 - ref_lse2) * kLn2;
      if (ref) v.kl = double(p.gap) / p.sum / a.temperature - shift;
      const Coefs coefs = finish_row(a, row, look_up(a, row), v, outside, true);
      gradient = element_gradient(a, coefs, v, p.k, shift, double(x_label) - ref_label);
    }
    __syncthreads();
    if (!d) continue;
    const ElementGradient g = gradient;
    const float k = row_k;
    for (int i = thread; i < candidates.count; i += kPlainThreads) {
      const int id = candidates.id(i);
      if (id < 0) continue;
      if (filtered) atomicOr(is_kept + id / 32, 1u << id % 32);
      float t;
      const float x = float(logits[id]), e = power<kFine<T>>(x, c, k, &t);
      const float kl = g.gap != 0 && e != 0 ? e * g.gap * (x - float(ref[id])) : 0.0f;
      d[id] = T(id == label ? g.label : fmaf(e, g.softmax, kl));
    }
    if (!filtered) continue;
    __syncthreads();
    for (int i = thread; i < num_ids; i += kPlainThreads)
      if (!(is_kept[i / 32] >> i % 32 & 1)) d[i] = T(0.0f);
    __syncthreads();
  }
}

}  // namespace
}  // namespace srpo
