// A GPU's arithmetic for one row: sums of exponentials that can be split anywhere, and the row's values and gradient from them.
// It is also host code, so that a test without a GPU runs the same lines.
#pragma once
#include <cfloat>
#include <cstring>

#include "rows.h"

namespace srpo {

constexpr double kLn2 = 0.693147180559945309417232121458, kLog2e = 1.44269504088896340735992468100;

// c = log2(e) / temperature, with which x / temperature is an exponent of 2. In two parts: its rounding to fp32 alone would move
// a log-probability of -20 by 6e-7. The low part is positive, so that -inf stays -inf.
struct Scale {
  float high, low;
};

SRPO_HD Scale scale_of(const RowArgs& a) {
  const double c = kLog2e / a.temperature;
  const float high = float(c * (1 - 0x1p-23));
  return {high, float(c - high)};
}

// 2^n for an integer n <= 127, exactly; 0 below 2^-126.
SRPO_HD float power_of_two(float n) {
  const uint32_t bits = n < -126.0f ? 0u : uint32_t(int(n) + 127) << 23;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Whether logits of this type need exponentials that are exact to rounding.
template <class T> constexpr bool kFine = sizeof(T) == 4;

// 2^x by the GPU's instruction, with a relative error of 2^-22; 0 below 2^-126.
SRPO_HD float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// E = 2^(x c - k) and its exponent, for an integer k near the largest x c, so that large x lose no accuracy.
// -inf gives 0, NaN stays NaN. `fine` (fp32 logits): exact to rounding, by a polynomial (as simd.h), and the same for every k up
// to the scale; else by exp2_fast, whose error is far below the rounding of 16-bit logits.
template <bool fine>
SRPO_HD float power(float x, Scale c, float k, float* exponent) {
  const float t = *exponent = fmaf(x, c.low, fmaf(x, c.high, -k));
  if (!fine) return exp2_fast(t);
  const float magic = 12582912.0f;  // 1.5 * 2^23: floats near it are spaced by 1, so that the lowest bits hold the integer
  const float shifted = fmaxf(t, -127.0f) + magic, whole = shifted - magic;
  const float f = fmaf(x, c.low, fmaf(x, c.high, -(k + whole)));
  float p = fmaf(1.5370705e-4f, f, 1.3399848e-3f);
  p = fmaf(p, f, 9.6183733e-3f);
  p = fmaf(p, f, 5.5503290e-2f);
  p = fmaf(p, f, 2.4022648e-1f);
  p = fmaf(p, f, 6.9314721e-1f);
  p = fmaf(p, f, 1.0f);
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits + 127u) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return t < -126.0f ? 0.0f : p * scale;
}

// Sums of E = 2^(x c - k) over part of a row's logits x. k is an integer near the largest x c, so sums with different k are
// merged without a rounding error.
struct alignas(16) Partial {
  float k;
  float sum;  // of E; 0: all logits are -inf, and k is meaningless
  float dot;  // of E (x c - k)
  float gap;  // of E (x - x_ref), with reference logits
};

SRPO_HD Partial nothing() { return {-FLT_MAX, 0, 0, 0}; }

// k for logits whose largest is `most`; `otherwise` if all are -inf.
SRPO_HD float exponent_near(float most, Scale c, float otherwise) {
  return most > -INFINITY ? rintf(most * c.high) : otherwise;
}

// Rescales the sums to another k, not below the present one.
SRPO_HD void raise(Partial& p, float k) {
  const float factor = power_of_two(p.k - k);
  p.dot = factor * (p.dot + (p.k - k) * p.sum);
  p.sum *= factor;
  p.gap *= factor;
  p.k = k;
}

SRPO_HD Partial merge(Partial a, Partial b) {
  if (b.sum == 0) return a;
  if (a.sum == 0) return b;
  if (a.k < b.k) raise(a, b.k); else raise(b, a.k);
  return {a.k, a.sum + b.sum, a.dot + b.dot, a.gap + b.gap};
}

// A sum with one more term (Kahan); `lost` is the accumulated rounding error of the sum. A thread adds hundreds of terms to one
// that may be larger than all of them, so rounding errors need not average out. For 16-bit logits a plain sum is exact enough.
template <bool fine>
SRPO_HD float add_term(float sum, float term, float& lost) {
  if (!fine) return sum + term;
  const float owed = term - lost, next = sum + owed;
  lost = (next - sum) - owed;
  return next;
}

// Adds n logits. They are summed among themselves first, so that p takes few roundings. kGap: also the gap to x_ref. `lost`: the
// rounding error of p.sum, 0 at the start.
template <bool fine, bool kGap, int n>
SRPO_HD void add_logits(Partial& p, float& lost, const float (&x)[n], const float (&x_ref)[n], Scale c) {
  float sum[2] = {0, 0}, dot[2] = {0, 0}, gap = 0;
  for (int j = 0; j < n; ++j) {
    float t;
    const float e = power<fine>(x[j], c, p.k, &t);
    sum[j % 2] += e;
    dot[j % 2] = fmaf(e, fmaxf(t, -150.0f), dot[j % 2]);  // 0 * -150, not 0 * -inf
    if (kGap && e != 0) gap = fmaf(e, x[j] - x_ref[j], gap);
  }
  p.sum = add_term<fine>(p.sum, sum[0] + sum[1], lost);
  p.dot += dot[0] + dot[1];
  p.gap += gap;
}

// As add_logits while the largest logit is still unknown: raises k if a logit needs it.
template <bool fine, bool kGap, int n>
SRPO_HD void add_more_logits(Partial& p, float& lost, const float (&x)[n], const float (&x_ref)[n], Scale c) {
  float most = x[0];
  for (int j = 1; j < n; ++j) most = fmaxf(most, x[j]);
  const float k = exponent_near(most, c, p.k);
  if (k > p.k) {
    lost *= power_of_two(p.k - k);
    raise(p, k);
  }
  add_logits<fine, kGap>(p, lost, x, x_ref, c);
}

// The columns of a filtered softmax: the label, then the other kept ids.
struct Candidates {
  const int64_t* kept;  // negative: padding
  int label;            // -1: not a column
  int count, num_ids;

  SRPO_HD int id(int i) const {  // -1: not a candidate
    if (i == 0) return label;
    const int64_t other = kept[i - 1];
    return other == label || other < 0 || other >= num_ids ? -1 : int(other);
  }
};

// Results from the sums of a whole row.
struct RowTotal {
  double lse2;      // log2 of the sum of 2^(x c)
  double entropy2;  // of the softmax, in bits
};

// Adds the parts of a row (any type with k, sum and dot) in their order and in double, so that every CTA gets the same result.
template <class Part>
SRPO_HD RowTotal add_up(const Part* parts, int num_parts) {
  float top = -FLT_MAX;
  for (int i = 0; i < num_parts; ++i)
    if (parts[i].sum > 0 && parts[i].k > top) top = parts[i].k;
  double sum = 0, dot = 0;
  for (int i = 0; i < num_parts; ++i) {
    const Part p = parts[i];
    if (p.sum == 0) continue;  // false for NaN, which must propagate
    const double factor = power_of_two(p.k - top);
    sum += factor * p.sum;
    dot += factor * (double(p.dot) + (double(p.k) - top) * p.sum);
  }
  const double log_sum = log2(sum);
  return {sum == 0 ? -double(INFINITY) : top + log_sum, log_sum - dot / sum};
}

// A row's entries of the tables.
struct RowInputs {
  float advantage, weight, old_logprob, ref_logprob;  // kLogprobsBackward: gradient by logprob, by lse, 0, 0
  int32_t step;
};

SRPO_HD RowInputs look_up(const RowArgs& a, int64_t row) {
  if (a.mode == kLogprobs) return {};
  if (a.mode == kLogprobsBackward) return {a.grad_logprobs[row], a.grad_lse[row], 0, 0, 0};
  int64_t sequence, step;
  step_of_row(a, row, &sequence, &step);
  return {a.step_advantages[sequence * a.J + step], a.weights[row], a.old_logprobs ? a.old_logprobs[row] : 0.0f,
          a.ref_logprobs ? a.ref_logprobs[row] : 0.0f, int32_t(step)};
}

// The gradient of a row: (label onehot - softmax p + full_kl p (log(p / q) - kl)) / temperature
struct Coefs {
  double label, softmax, full_kl;
};

struct RowValues {
  double lse2, logprob, entropy;
  double kl;  // exact KL, with reference logits; else 0
};

// `k`: the k of the sum that contains the label. For a likely label the rounded power is used, as it is in the sum, so that a
// certain label gets exactly 0.
template <bool fine>
SRPO_HD RowValues row_values(const RowTotal& total, float x_label, Scale c, float k) {
  double log2_p = double(x_label) * (double(c.high) + c.low) - total.lse2;
  if (log2_p > -1) {
    float t;
    log2_p = log2(double(power<fine>(x_label, c, k, &t))) + k - total.lse2;
    if (log2_p > 0) log2_p = 0;
  }
  return {total.lse2, log2_p * kLn2, total.entropy2 * kLn2, 0};
}

// Returns the coefficients of the gradient; with `write` also stores the row's entries of a.rows.
SRPO_HD Coefs finish_row(const RowArgs& a, int64_t row, const RowInputs& in, const RowValues& v, bool outside, bool write) {
  float* plane = a.rows + row;
  if (write) {
    plane[kLogprob * a.T] = float(v.logprob);
    plane[kLse * a.T] = float(v.lse2 * kLn2);
    plane[kOutside * a.T] = outside;
  }
  if (a.mode == kLogprobs) return {0, 0, 0};
  if (a.mode == kLogprobsBackward) {
    const double label = in.advantage;
    return {label, label - double(in.weight), 0};
  }
  const double old = a.old_logprobs ? snap(in.old_logprob, v.logprob) : v.logprob;
  const double ref = a.ref_logprobs ? snap(in.ref_logprob, v.logprob) : v.logprob;
  Token<double> token = token_loss<double>(a, v.logprob, in.advantage, old, ref);
  const double weight = in.weight;  // 1/G sum 1/|o_i| of Eq. 6, decided by the caller
  double full_kl = 0;
  if (a.kl_estimator == kFullKl) {
    token.kl = v.kl;
    if (a.kl_coef != 0) token.loss += a.kl_coef * v.kl;
    full_kl = a.kl_coef * weight;
  }
  if (write) {
    plane[kLoss * a.T] = float(weight * token.loss);
    plane[kRatio * a.T] = float(token.ratio);
    plane[kKl * a.T] = float(token.kl);
    plane[kEntropy * a.T] = float(v.entropy);
    plane[kClipped * a.T] = token.clipped;
    plane[kStep * a.T] = float(in.step);
  }
  return {weight * token.dloss, weight * token.dloss, full_kl};
}

SRPO_HD void ignore_row(const RowArgs& a, int64_t row) {
  for (int f = 0; f < kNumFields; ++f) a.rows[f * a.T + row] = f == kStep ? -1.0f : 0.0f;
}

// The gradient of every entry except the label's is E times this factor.
SRPO_HD float gradient_factor(const RowArgs& a, const Coefs& g, const RowValues& v, float k) {
  return g.softmax == 0 ? 0.0f : float(-g.softmax / a.temperature * exp2(double(k) - v.lse2));
}

// Gradient of the label's entry; p - 1 comes from expm1, not from a rounded p.
SRPO_HD float label_gradient(const RowArgs& a, const Coefs& g, const RowValues& v) {
  return float(((g.label - g.softmax) - g.softmax * expm1(v.logprob)) / a.temperature);
}

// Gradient of a row with the exact KL, to which every entry contributes: E (softmax + gap (x - x_ref)), and `label` at the label.
struct ElementGradient {
  float softmax, gap, label;
};

// `shift`: log-sum-exp of the logits minus log-sum-exp of the reference; `label_gap`: x - x_ref at the label.
SRPO_HD ElementGradient element_gradient(const RowArgs& a, const Coefs& g, const RowValues& v, float k, double shift,
                                         double label_gap) {
  if (g.full_kl == 0) return {gradient_factor(a, g, v, k), 0, label_gradient(a, g, v)};
  const double p = exp(v.logprob), unit = exp2(double(k) - v.lse2) / a.temperature;
  const double of_kl = p > 0 ? g.full_kl * p * (label_gap / a.temperature - shift - v.kl) / a.temperature : 0;
  return {float(unit * (g.full_kl * (-shift - v.kl) - g.softmax)), float(unit * g.full_kl / a.temperature),
          float(label_gradient(a, g, v) + of_kl)};
}

}  // namespace srpo
