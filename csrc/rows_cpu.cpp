// Loss and gradient of Eq. 6 on a CPU: each row of logits is read from memory once and its gradient written once.
//
// First sweep: in tiles of 2048, E = 2^(x c - k) with c = log2(e) / temperature and k an integer near the tile's largest x c,
// kept in a buffer that stays in the cache; sums of E. Then the row's log-sum-exp, the token's loss and its derivative are known.
// Second sweep: gradient = E * (a number per tile). One exponential per logit, no running maximum, any logits from -inf to 1e6.
//
// Compiled once per instruction set (SRPO_ISA names it); dispatch_cpu.cpp picks. Tests hold each against fp64.
#include "rows.h"
#include "simd.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace srpo {
namespace {

constexpr int64_t kTile = 2048;
constexpr int64_t kUnroll = 4 * kLanes;  // a tile's tail is padded to a multiple of it
constexpr int64_t kBlock = 8 * kUnroll;
constexpr int64_t kStreamBytes = int64_t(24) << 20;  // gradients above this size go past the caches
constexpr double kLn2 = 0.693147180559945309417232121458, kLog2e = 1.44269504088896340735992468100;

struct Tile {
  float k;          // exponents are relative to it
  double sum, dot;  // of E, and of E * (x c - k)
};

struct Scratch {  // one per thread, kept
  std::vector<Tile> tiles, ref_tiles;
  std::vector<float> e, candidates, ref_candidates, gradient;
};

// How exact the exponentials of a dtype are: the polynomial's degree, and whether c = log2(e) / temperature counts to double
// precision (its rounding to fp32 moves a log-probability of -20 by up to 6e-7). 16-bit logits are far coarser than either.
template <class T> constexpr bool kFine = sizeof(T) == 4;

struct Factor {
  float high, low;
  double exact;  // high + low
};

template <bool fine>
Factor factor_of(double c) {
  const float high = float(c), low = fine ? float(c - high) : 0.0f;
  return {high, low, double(high) + low};
}

// 2^(v c - k), as shift = round(v c) - k and a fraction that is rounded once, whatever the size of v.
template <bool fine>
inline Vec power(Vec v, Vec c_high, Vec c_low, Vec k, Vec* exponent) {
  const Vec whole = round(v * c_high), shift = whole - k;
  Vec f = fraction(v, c_high, whole);
  if (fine) f = fma(v, c_low, f);
  *exponent = shift + f;
  return scale(exp2_fraction<fine ? 6 : 5>(f), shift);
}

// E and sums of one tile; n is a multiple of kUnroll. Without kKeep, E is not stored.
template <bool kKeep, class T>
Tile exp_tile(const T* x, int64_t n, const Factor& c, float* e) {
  Vec most[4] = {load(x), load(x + kLanes), load(x + 2 * kLanes), load(x + 3 * kLanes)};
  for (int64_t i = kUnroll; i < n; i += kUnroll)
    for (int j = 0; j < 4; ++j) most[j] = larger(most[j], load(x + i + j * kLanes));
  const float top = largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3]))) * c.high;
  const float k = top > -std::numeric_limits<float>::max() ? std::nearbyint(top) : 0.0f;  // all -inf, or NaN: 0

  const Vec high = fill(c.high), low = fill(c.low), vk = fill(k), lowest = fill((k - 160.0f) / c.high);
  double sum = 0, dot = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {  // a block's sums are short enough for fp32
    Vec sums[4] = {fill(0), fill(0), fill(0), fill(0)}, dots[4] = {fill(0), fill(0), fill(0), fill(0)};
    for (int64_t i = begin; i < std::min(begin + kBlock, n); i += kUnroll)
      for (int j = 0; j < 4; ++j) {
        const Vec v = larger(lowest, load(x + i + j * kLanes));  // keeps NaN; -inf becomes 2^-160, which is 0
        Vec exponent;
        const Vec part = power<kFine<T>>(v, high, low, vk, &exponent);
        if (kKeep) store(e + i + j * kLanes, part);
        sums[j] = sums[j] + part;
        dots[j] = fma(part, exponent, dots[j]);
      }
    sum += add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    dot += add_lanes((dots[0] + dots[1]) + (dots[2] + dots[3]));
  }
  return {k, sum, dot};
}

// The same for a whole row, and its sums in double.
struct RowSum {
  double lse2;     // log2 of the sum of 2^(x c)
  double mean_xc;  // expectation of x c under the softmax
};

template <bool kKeep, class T>
RowSum exp_row(const T* x, int64_t n, const Factor& c, std::vector<Tile>& tiles, float* e) {
  tiles.clear();
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i), padded = (count + kUnroll - 1) / kUnroll * kUnroll;
    if (padded == count) {
      tiles.push_back(exp_tile<kKeep>(x + i, count, c, e + i));
    } else {
      T tail[kTile];
      std::copy(x + i, x + i + count, tail);
      std::fill(tail + count, tail + padded, negative_infinity<T>());
      tiles.push_back(exp_tile<kKeep>(tail, padded, c, e + i));
    }
  }
  float top = -std::numeric_limits<float>::max();
  for (const Tile& t : tiles)
    if (t.sum > 0) top = std::max(top, t.k);
  double sum = 0, dot = 0;
  for (const Tile& t : tiles) {
    if (t.sum == 0) continue;  // nothing but -inf; a NaN goes on
    const double factor = std::exp2(double(t.k) - top);
    sum += factor * t.sum;
    dot += factor * (t.dot + double(t.k) * t.sum);
  }
  return {sum == 0 ? -std::numeric_limits<double>::infinity() : top + std::log2(sum), dot / sum};
}

// d = e * factor
template <bool kStream, class T>
void write_tile(T* d, const float* e, int64_t n, float factor) {
  int64_t i = 0;
  if (kStream) {
    const uintptr_t misfit = reinterpret_cast<uintptr_t>(d) % (kLanes * sizeof(T));
    const int64_t head = misfit ? (kLanes * sizeof(T) - misfit) / sizeof(T) : 0;
    for (; i < std::min(head, n); ++i) from_float(e[i] * factor, d + i);
  }
  const Vec v = fill(factor);
  for (; i + kLanes <= n; i += kLanes) {
    if (kStream) stream(d + i, load(e + i) * v); else store(d + i, load(e + i) * v);
  }
  for (; i < n; ++i) from_float(e[i] * factor, d + i);
}

// What the gradient of a row is made of: (label_coef * onehot - softmax_coef * p + kl_coef * p * (log(p / q) - kl)) / temperature
struct Coefs {
  double label, softmax, full_kl;
};

struct Row {
  double logprob, lse2, entropy, full_kl, ref_lse2;
};

template <class T>
class Worker {
 public:
  Worker(const RowArgs& args, Scratch& scratch)
      : a_(args), s_(scratch), stream_(args.T * args.V * int64_t(sizeof(T)) > kStreamBytes) {}

  // Does row r; false where its label or a kept id is no column.
  bool run(int64_t r) {
    T* d = a_.dlogits ? static_cast<T*>(a_.dlogits) + r * a_.dlogits_stride : nullptr;
    const int64_t label = a_.labels[r];
    if (label == kIgnore) {
      for (int f = 0; f < kNumFields; ++f) a_.rows[f * a_.T + r] = f == kStep ? -1.0f : 0.0f;
      if (d) zero(d);
      return true;
    }
    if (!is_column(label)) return false;
    const T* x = static_cast<const T*>(a_.logits) + r * a_.logits_stride;
    const T* ref = a_.ref_logits ? static_cast<const T*>(a_.ref_logits) + r * a_.ref_stride : nullptr;
    if (!a_.kept_ids) {
      const T* next = r + 1 < a_.T && a_.labels[r + 1] != kIgnore ? x + a_.logits_stride : nullptr;
      work(r, x, ref, a_.V, label, d, next);
      a_.rows[kOutside * a_.T + r] = 0;
      return true;
    }
    // A filtered row: the label first, then the rest of the support, gathered; and the gradient is scattered.
    const int64_t* kept = a_.kept_ids + r * a_.K;
    std::vector<float>&v = s_.candidates, &q = s_.ref_candidates;
    v.assign(1, to_float(x[label]));
    if (ref) q.assign(1, to_float(ref[label]));
    bool outside = true;
    for (int64_t i = 0; i < a_.K; ++i) {
      if (kept[i] == label) outside = false;
      if (kept[i] == label || kept[i] < 0) continue;
      if (!is_column(kept[i])) return false;
      v.push_back(to_float(x[kept[i]]));
      if (ref) q.push_back(to_float(ref[kept[i]]));
    }
    s_.gradient.resize(v.size());
    work<float>(r, v.data(), ref ? q.data() : nullptr, v.size(), 0, d ? s_.gradient.data() : nullptr, nullptr);
    a_.rows[kOutside * a_.T + r] = outside;
    if (!d) return true;
    zero(d);
    from_float(s_.gradient[0], d + label);
    for (int64_t i = 0, j = 1; i < a_.K; ++i)
      if (kept[i] != label && kept[i] >= 0) from_float(s_.gradient[j++], d + kept[i]);
    return true;
  }

 private:
  bool is_column(int64_t id) const { return id >= 0 && id < a_.V; }

  void zero(T* d) {
    s_.e.resize(std::max<int64_t>(s_.e.size(), kTile));
    std::fill(s_.e.begin(), s_.e.begin() + kTile, 0.0f);
    for (int64_t i = 0; i < a_.V; i += kTile) write(d + i, s_.e.data(), std::min(kTile, a_.V - i), 0.0f);
    if (stream_) stream_fence();
  }

  template <class X>
  void write(X* d, const float* e, int64_t n, float factor) {
    if (stream_) write_tile<true>(d, e, n, factor); else write_tile<false>(d, e, n, factor);
  }

  // Everything about one row of n candidates.
  template <class X>
  void work(int64_t r, const X* x, const X* ref, int64_t n, int64_t label, X* d, const X* next) {
    s_.e.resize(std::max<int64_t>(s_.e.size(), n + kTile));
    float* e = s_.e.data();
    const Factor c = factor_of<kFine<X>>(kLog2e / a_.temperature);
    Row row{};
    if (ref) row.ref_lse2 = exp_row<false>(ref, n, c, s_.ref_tiles, e).lse2;
    const bool keep = d || ref;
    const RowSum sums = keep ? exp_row<true>(x, n, c, s_.tiles, e) : exp_row<false>(x, n, c, s_.tiles, e);
    row.lse2 = sums.lse2;
    row.logprob = label_logprob<kFine<X>>(to_float(x[label]), s_.tiles[label / kTile].k, sums.lse2);
    row.entropy = (sums.lse2 - sums.mean_xc) * kLn2;
    if (ref) row.full_kl = exact_kl(x, ref, n, row);
    const double x_label = to_float(x[label]), ref_label = ref ? to_float(ref[label]) : 0.0;
    const Coefs coefs = finish(r, row);
    if (!d) return;
    if (coefs.label == 0 && coefs.softmax == 0 && coefs.full_kl == 0) return zero_row(d, n);

    const double inverse_t = 1 / a_.temperature, p = std::exp(row.logprob);
    double at_label = (coefs.label - coefs.softmax) - coefs.softmax * std::expm1(row.logprob);
    if (ref && coefs.full_kl != 0) {
      write_with_kl(d, x, ref, e, n, row, coefs);
      if (p > 0) at_label += coefs.full_kl * p * (log_ratio(x_label - ref_label, row) - row.full_kl);
    } else {
      for (int64_t i = 0, t = 0; i < n; i += kTile, ++t) {
        const int64_t count = std::min(kTile, n - i);
        if (next)  // the next row comes in while this one goes out
          for (int64_t j = 0; j < count; j += 64 / int64_t(sizeof(X))) __builtin_prefetch(next + i + j, 0, 2);
        write(d + i, e + i, count, float(-coefs.softmax * inverse_t * std::exp2(double(s_.tiles[t].k) - row.lse2)));
      }
      if (stream_) stream_fence();
    }
    from_float(float(at_label * inverse_t), d + label);
  }

  // A likely label's own power is taken with the rounding that it has in the sum, so that a certain one gets exactly 0.
  template <bool fine>
  double label_logprob(float x, float k, double lse2) {
    const Factor c = factor_of<fine>(kLog2e / a_.temperature);
    const double log2_p = double(x) * c.exact - lse2;
    if (!(log2_p > -1)) return log2_p * kLn2;
    Vec exponent;
    float lanes[kLanes];
    store(lanes, power<fine>(fill(x), fill(c.high), fill(c.low), fill(k), &exponent));
    return std::min(0.0, (std::log2(double(lanes[0])) + k - lse2) * kLn2);
  }

  template <class X>
  void zero_row(X* d, int64_t n) {
    if (sizeof(X) == sizeof(T) && n == a_.V) return zero(reinterpret_cast<T*>(d));
    for (int64_t i = 0; i < n; ++i) from_float(0.0f, d + i);  // candidates
  }

  double log_ratio(double gap, const Row& row) const { return gap / a_.temperature - (row.lse2 - row.ref_lse2) * kLn2; }

  // KL(p || q) = sum p (x - x_ref) / temperature - lse + lse_ref; entries that p excludes count nothing.
  template <class X>
  double exact_kl(const X* x, const X* ref, int64_t n, const Row& row) {
    double gap = 0;
    for (int64_t i = 0, t = 0; i < n; i += kTile, ++t) {
      const int64_t count = std::min(kTile, n - i);
      const float* e = s_.e.data() + i;
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < count; ++j) part += e[j] != 0 ? e[j] * (to_float(x[i + j]) - to_float(ref[i + j])) : 0.0f;
      if (s_.tiles[t].sum != 0) gap += std::exp2(double(s_.tiles[t].k) - row.lse2) * part;
    }
    return log_ratio(gap, row);
  }

  template <class X>
  void write_with_kl(X* d, const X* x, const X* ref, const float* e, int64_t n, const Row& row, const Coefs& coefs) {
    const double inverse_t = 1 / a_.temperature;
    for (int64_t i = 0, t = 0; i < n; i += kTile, ++t) {
      const double factor = inverse_t * std::exp2(double(s_.tiles[t].k) - row.lse2);
      const float per_gap = float(factor * coefs.full_kl * inverse_t);
      const float rest = float(factor * (coefs.full_kl * (log_ratio(0, row) - row.full_kl) - coefs.softmax));
      const int64_t end = std::min(i + kTile, n);
#pragma omp simd
      for (int64_t j = i; j < end; ++j) {  // d may be x: each entry is read before it is written
        const float gap = to_float(x[j]) - to_float(ref[j]);
        from_float(e[j] != 0 ? e[j] * (rest + per_gap * gap) : 0.0f, d + j);
      }
    }
  }

  // Writes the values of the row and returns what its gradient is made of.
  Coefs finish(int64_t r, const Row& row) {
    auto plane = [&](int field) -> float& { return a_.rows[field * a_.T + r]; };
    plane(kLogprob) = float(row.logprob);
    plane(kLse) = float(row.lse2 * kLn2);
    if (a_.mode == kLogprobs) return {};
    if (a_.mode == kLogprobsBackward) {
      const double label = a_.grad_logprobs[r];
      return {label, label - double(a_.grad_lse[r]), 0};
    }
    int64_t sequence, step;
    step_of_row(a_, r, &sequence, &step);
    const double old = a_.old_logprobs ? snap(a_.old_logprobs[r], row.logprob) : row.logprob;
    const double ref = a_.ref_logprobs ? snap(a_.ref_logprobs[r], row.logprob) : row.logprob;
    Token<double> token = token_loss<double>(a_, row.logprob, a_.step_advantages[sequence * a_.J + step], old, ref);
    double full_kl_coef = 0;
    if (a_.kl_estimator == kFullKl) {
      token.kl = row.full_kl;
      if (a_.kl_coef != 0) token.loss += a_.kl_coef * row.full_kl;
      full_kl_coef = a_.kl_coef * a_.weights[r];
    }
    const double weight = a_.weights[r];
    plane(kLoss) = float(weight * token.loss);
    plane(kRatio) = float(token.ratio);
    plane(kKl) = float(token.kl);
    plane(kEntropy) = float(row.entropy);
    plane(kClipped) = token.clipped;
    plane(kStep) = float(step);
    return {weight * token.dloss, weight * token.dloss, full_kl_coef};
  }

  const RowArgs& a_;
  Scratch& s_;
  const bool stream_;
};

template <class T>
bool run_all(const RowArgs& args) {
  bool good = true;
#pragma omp parallel num_threads(args.num_threads) reduction(&& : good)
  {
    static thread_local Scratch scratch;
    Worker<T> worker(args, scratch);
#pragma omp for schedule(dynamic, 8)
    for (int64_t r = 0; r < args.T; ++r) good = worker.run(r) && good;
  }
  return good;
}

}  // namespace

#define SRPO_JOIN_(a, b) a##b
#define SRPO_JOIN(a, b) SRPO_JOIN_(a, b)
bool SRPO_JOIN(rows_, SRPO_ISA)(const RowArgs& args) {
  switch (args.dtype) {
    case kFloat32: return run_all<float>(args);
    case kBFloat16: return run_all<BFloat16>(args);
    default: return run_all<Float16>(args);
  }
}

}  // namespace srpo
