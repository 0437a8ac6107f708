// The kernel for rows with a filter: the softmax is over the label and the kept ids, and every other entry of the gradient is 0.
// One CTA per row reads the candidates alone, so that a row costs little more than writing it once.
#pragma once
#include "rows_two_reads.cuh"

namespace srpo {
namespace {

// A bit per column, set for candidates. The bits of the i-th 16-byte unit of a gradient's row are aligned to their number, so
// that one test decides about a unit.
template <class T>
class CandidateBits {
 public:
  static constexpr int n = Vector<T>::kCount;
  static constexpr uint32_t kUnit = (1u << n) - 1;

  __device__ CandidateBits(uint32_t* memory, const Units& u) : words(memory), shift(n - u.head) {}
  __device__ static int num_words(int num_ids) { return (num_ids + n + 31) / 32; }
  __device__ void clear_word(int i) { words[i] = 0; }
  __device__ void set(int id) { atomicOr(words + (id + shift) / 32, 1u << (id + shift) % 32); }
  __device__ bool has(int id) const { return words[(id + shift) / 32] >> (id + shift) % 32 & 1; }
  __device__ uint32_t of_unit(int i) const { return words[(i + 1) * n / 32] >> (i + 1) * n % 32 & kUnit; }

 private:
  uint32_t* words;
  int shift;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, 3) rows_filtered(const __grid_constant__ RowArgs a) {
  SRPO_DYNAMIC_SHARED(memory);  // with a gradient: the bits of the candidates
  SRPO_SHARED(RowShared, s);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, num_ids = int(a.V);
  const Scale c = scale_of(a);
  for (int64_t row = blockIdx.x; row < a.T; row += gridDim.x) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
    const T* ref = a.ref_logits ? static_cast<const T*>(a.ref_logits) + row * a.ref_stride : nullptr;
    T* d = a.dlogits ? static_cast<T*>(a.dlogits) + row * a.dlogits_stride : nullptr;
    const int64_t label = a.labels[row];
    if (label == kIgnore) {
      if (d) fill_zero(d, num_ids);
      if (thread == 0) ignore_row(a, row);
      continue;
    }
    const bool valid = label >= 0 && label < a.V;
    const Candidates candidates = {a.kept_ids + row * a.K, valid ? int(label) : -1, int(a.K) + 1, num_ids};
    const Units u = d ? units_of(d, num_ids) : Units{};
    CandidateBits<T> bits(reinterpret_cast<uint32_t*>(memory), u);
    if (d) {
      for (int i = thread; i < CandidateBits<T>::num_words(num_ids); i += kRowThreads) bits.clear_word(i);
      __syncthreads();
    }
    Partial p = nothing(), q = nothing();
    float lost = 0, ref_lost = 0;
    bool found = false, wrong = !valid;
    for (int i = thread; i < candidates.count; i += kRowThreads) {
      if (i > 0) found |= candidates.kept[i - 1] == label, wrong |= candidates.kept[i - 1] >= num_ids;
      const int id = candidates.id(i);
      if (id < 0) continue;
      if (d) bits.set(id);
      const float x[1] = {float(logits[id])}, y[1] = {ref ? float(ref[id]) : 0.0f};
      if (ref) add_more_logits<kFine<T>, false>(q, ref_lost, y, y, c);
      if (ref) add_more_logits<kFine<T>, true>(p, lost, x, y, c);
      else add_more_logits<kFine<T>, false>(p, lost, x, x, c);
    }
    __syncwarp();
    p = merge_lanes(p);
    q = merge_lanes(q);
    if (lane == 0) s.parts[warp] = p, s.ref_parts[warp] = q;
    const bool outside = !__syncthreads_or(found);
    const bool broken = __syncthreads_or(wrong);  // an id that is no column makes the row NaN: a kernel cannot raise
    if (thread == 0) {
      const float ref_label = valid && ref ? float(ref[label]) : 0.0f;
      finish_parts<T>(a, row, s, broken ? NAN : float(logits[label]), ref != nullptr, ref_label, outside, c);
    }
    if (d) {  // meanwhile the other threads fill what is no candidate
      const Vector<T> zero = all_of<T>(0.0f);
      for (int i = thread; i < u.vectors; i += kRowThreads) {
        const int first = u.head + i * Vector<T>::kCount;
        const uint32_t kept = bits.of_unit(i);
        if (!kept) {
          write_at(d + first, zero, true);
        } else {
          for (int j = 0; j < Vector<T>::kCount; ++j)
            if (!(kept >> j & 1)) d[first + j] = T(0.0f);
        }
      }
      for (int i = thread; i < u.edges; i += kRowThreads)
        if (!bits.has(edge<T>(u, i))) d[edge<T>(u, i)] = T(0.0f);
    }
    __syncthreads();
    if (!d) continue;
    const ElementGradient g = s.gradient;
    for (int i = thread; i < candidates.count; i += kRowThreads) {
      const int id = candidates.id(i);
      if (id < 0) continue;
      d[id] = T(id == label ? g.label : element<kFine<T>>(g, float(logits[id]), ref ? float(ref[id]) : 0.0f, s.k, c));
    }
    __syncthreads();  // the bits are no longer needed
  }
}

}  // namespace
}  // namespace srpo
