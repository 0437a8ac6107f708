// Shared by the C++ and the CUDA kernels: the argument block, and Eq. 6 for one token.
//
// A token's gradient is one scalar times (onehot - softmax), and that scalar depends on the logits only through the
// log-probability of the label. A kernel that has reduced a row therefore knows the row's gradient, and the backward pass has
// nothing to compute.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SRPO_HD __host__ __device__ __forceinline__
#else
#define SRPO_HD inline
#endif

namespace srpo {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Mode : int32_t { kPolicyLoss = 0, kLogprobs = 1, kLogprobsBackward = 2 };
enum KlEstimator : int32_t { kNoKl = 0, kK1 = 1, kK2 = 2, kK3 = 3, kFullKl = 4 };
enum ClipForm : int32_t { kPpo = 0, kCispo = 1 };
// Values per row, each a plane [T] of `rows`; as srpo_kernels.native.ROW_FIELDS. kLogprobs fills only kLogprob and kLse.
enum Field : int32_t { kLoss, kLogprob, kLse, kRatio, kKl, kEntropy, kClipped, kOutside, kStep, kNumFields };

constexpr int64_t kIgnore = -100;
constexpr double kMaxLogRatio = 20.0;  // as reference.MAX_LOG_RATIO

// Pointers may be null where the comment says "or null". T rows, V vocabulary, N sequences, J reasoning steps, K kept ids.
// Mirrored field by field in srpo_kernels/native.py.
struct RowArgs {
  const void* logits;         // [T, V], rows `logits_stride` elements apart
  const void* ref_logits;     // [T, V] or null: for the exact KL
  void* dlogits;              // [T, V] or null: no gradient. May be `logits`
  const int64_t* labels;      // [T], kIgnore where the row must not be read
  const int64_t* kept_ids;    // [T, K] or null: support of a filtered softmax besides the label; negative: padding
  const float* step_advantages;  // [N, J]
  const int32_t* step_ends;      // [N, J]
  const int32_t* cu_seqlens;     // [N + 1]
  const float* weights;          // [T]
  const float* old_logprobs;     // [T] or null: on-policy
  const float* ref_logprobs;     // [T] or null
  const float* grad_logprobs;    // [T], kLogprobsBackward
  const float* grad_lse;         // [T], kLogprobsBackward
  float* rows;                   // [kNumFields, T]
  int64_t logits_stride, ref_stride, dlogits_stride;
  int64_t T, V, N, J, K;
  int64_t first_row;  // packed index of row 0: tables per row may be a slice of a batch, tables per sequence cover all of it
  double temperature, clip_eps_low, clip_eps_high, dual_clip /* infinite: off */, kl_coef;
  int32_t dtype, mode, kl_estimator, clip_form, num_threads;
};

// (sequence, reasoning step) of a row. Algorithm 1, line 11: the step that a token belongs to. An empty sequence owns no row.
SRPO_HD void step_of_row(const RowArgs& a, int64_t row, int64_t* sequence, int64_t* step) {
  row += a.first_row;
  int64_t low = 0, high = a.N;  // the last sequence that starts at or before the row
  while (high - low > 1) {
    const int64_t mid = (low + high) / 2;
    if (a.cu_seqlens[mid] <= row) low = mid; else high = mid;
  }
  const int64_t position = row - a.cu_seqlens[low];
  int64_t j = 0;
  while (j < a.J - 1 && position >= a.step_ends[low * a.J + j]) ++j;
  *sequence = low;
  *step = j;
}

// A stored log-probability; the computed one if the two differ only by the rounding to fp32, so that an unchanged token has
// ratio 1 and KL 0 exactly.
SRPO_HD double snap(float stored, double computed) { return stored == float(computed) ? computed : double(stored); }

// One token's term of Eq. 6 and its derivative by the log-probability, both without `weights`.
template <class F>
struct Token {
  F loss, dloss, ratio, kl;
  bool clipped;
};

// Rules as in srpo_kernels/reference.py: exactly on an edge is not clipped; a log ratio above kMaxLogRatio has no gradient under kPpo.
template <class F>
SRPO_HD Token<F> token_loss(const RowArgs& a, F logprob, F advantage, F old_logprob, F ref_logprob) {
  Token<F> out;
  const F bound = F(kMaxLogRatio), log_ratio = logprob - old_logprob;
  out.ratio = exp(log_ratio > bound ? bound : log_ratio);  // Eq. 6: rho_{i,t} = pi_theta / pi_theta_old
  F bounded = out.ratio;
  const F low = F(1) - F(a.clip_eps_low), high = F(1) + F(a.clip_eps_high), dual = F(a.dual_clip);
  const bool cispo = a.clip_form == kCispo;
  if (cispo || advantage > 0) {
    if (bounded > high) bounded = high;
  }
  if (cispo || !(advantage > 0)) {
    if (bounded < low) bounded = low;
    if (!cispo && bounded > dual) bounded = dual;
  }
  const bool cut = bounded != out.ratio;
  out.clipped = cut && advantage != 0;
  if (cispo) {  // -stop_gradient(bounded) A log pi
    out.loss = advantage == 0 ? F(0) : -bounded * advantage * logprob;
    out.dloss = -bounded * advantage;
  } else {
    out.loss = -bounded * advantage;  // Eq. 6: -min(r A, clip(r, 1-eps, 1+eps) A)
    out.dloss = cut || log_ratio > bound ? F(0) : -out.ratio * advantage;
  }

  out.kl = 0;
  F dkl = 0;
  const F d = logprob - ref_logprob;
  if (a.kl_estimator == kK1) {
    out.kl = d;
    dkl = 1;
  } else if (a.kl_estimator == kK2) {
    out.kl = d * d / 2;
    dkl = d;
  } else if (a.kl_estimator == kK3) {
    const F inverse = -d > bound ? bound : -d;
    const F e = expm1(inverse);
    out.kl = e - inverse;
    dkl = -d > bound ? F(0) : -e;
  }
  if (a.kl_coef != 0) {  // else an infinite KL that is only measured would make the loss NaN (0 * inf)
    out.loss += F(a.kl_coef) * out.kl;  // Eq. 6: beta * D_KL[pi_theta || pi_ref]
    out.dloss += F(a.kl_coef) * dkl;
  }
  return out;
}

}  // namespace srpo
