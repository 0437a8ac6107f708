// Loss and gradient of Eq. 6 on a CPU: each row of logits is read from memory once and its gradient written once.
//
// First sweep of a row: in tiles of 2048, E = 2^(x c - k) with c = log2(e) / temperature and k an integer near the tile's largest
// x c, kept in a buffer that stays in the cache; sums of E. Then the row's log-sum-exp, the token's loss and its derivative are
// known. Second sweep: gradient = E * (a number per tile). One exponential per logit, for any logits from -inf to 1e6.
//
// The second sweep of a row is interleaved with the first sweep of the next, a few cache lines at a time: while exponentials are
// computed, gradients are written to memory and further logits are fetched.
//
// Compiled once per instruction set (SRPO_ISA names it); dispatch_cpu.cpp picks one. Tests compare each with fp64.
#include "row_math.h"
#include "simd.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace srpo {
namespace {

constexpr int64_t kTile = 2048;
constexpr int64_t kUnroll = 4 * kLanes;  // a tile's tail is padded to a multiple of it
constexpr int64_t kBlock = 8 * kUnroll;
constexpr int64_t kAhead = 1024;                      // logits are prefetched this many entries before they are needed
constexpr int64_t kStreamBytes = int64_t(24) << 20;  // gradients above this size bypass the caches

struct Tile {
  float k;          // exponents are relative to it
  double sum, dot;  // of E, and of E * (x c - k)
};

// c = log2(e) / temperature. kFine dtypes use c in double precision (its rounding to fp32 moves a log-probability of -20 by up to
// 6e-7) and a polynomial of higher degree. 16-bit logits are far coarser than either effect.
struct Factor {
  float high, low;
  double exact;  // high + low
};

template <bool fine>
Factor factor_of(double c) {
  const float high = float(c), low = fine ? float(c - high) : 0.0f;
  return {high, low, double(high) + low};
}

// 2^(v c - k), from shift = round(v c) - k and a fraction that is rounded once for v of any size.
// 16-bit logits: v c - k is itself rounded once, which moves no exponent above -30 by more than 2e-6.
template <bool fine>
inline Vec power(Vec v, Vec c_high, Vec c_low, Vec k, Vec* exponent) {
  if (!fine) {
    const Vec t = *exponent = fraction(v, c_high, k), whole = round(t);
    return scale(exp2_fraction<5>(t - whole), whole);
  }
  const Vec whole = round(v * c_high), shift = whole - k, f = fma(v, c_low, fraction(v, c_high, whole));
  *exponent = shift + f;
  return scale(exp2_fraction<6>(f), shift);
}

// Writes d = e * factor over a tile, kUnroll entries per unit(); `careful`, for values that may be NaN: all in the constructor.
template <class T, bool kStream>
struct Writer {
  T* d;
  const float* e;
  int64_t left;
  float factor;

  Writer(T* d, const float* e, int64_t n, float factor, bool careful = false) : d(d), e(e), left(n), factor(factor) {
    if (careful) one_by_one(n);
    if (kStream) one_by_one((-reinterpret_cast<uintptr_t>(d) % kPairBytes<T>) / sizeof(T));  // up to the vectors' alignment
  }
  void unit() {
    if (left < kUnroll) return;
    const Vec v = fill(factor);
    for (int j = 0; j < kUnroll; j += 2 * kLanes) {
      const Vec first = load(e + j) * v, second = load(e + j + kLanes) * v;
      if (kStream) stream_pair(d + j, first, second); else store_pair(d + j, first, second);
    }
    skip(kUnroll);
  }
  void rest() {
    while (left >= kUnroll) unit();
    one_by_one(left);
  }

 private:
  void one_by_one(int64_t n) {
    n = std::min(n, left);
    for (int64_t i = 0; i < n; ++i) from_float(e[i] * factor, d + i);
    skip(n);
  }
  void skip(int64_t n) { d += n, e += n, left -= n; }
};

struct NoWriter {
  void unit() {}
  void rest() {}
};

// E and its sums for one tile and a given k; n is a multiple of kUnroll. kKeep: store E.
template <bool kKeep, class T, class Out>
Tile exp_tile_at(float k, const T* x, int64_t n, const Factor& c, float* e, Out& out) {
  const Vec high = fill(c.high), low = fill(c.low), vk = fill(k), lowest = fill((k - 160.0f) / c.high);
  double sum = 0, dot = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {  // a block is short enough for sums in fp32
    Vec sums[4] = {fill(0), fill(0), fill(0), fill(0)}, dots[4] = {fill(0), fill(0), fill(0), fill(0)};
    for (int64_t i = begin; i < std::min(begin + kBlock, n); i += kUnroll) {
      for (int64_t j = 0; j < kUnroll; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i + kAhead + j);
      for (int j = 0; j < 4; ++j) {
        const Vec v = larger(lowest, load(x + i + j * kLanes));  // keeps NaN; -inf becomes 2^-160, which is 0
        Vec exponent;
        const Vec part = power<kFine<T>>(v, high, low, vk, &exponent);
        if (kKeep) store(e + i + j * kLanes, part);
        sums[j] = sums[j] + part;
        dots[j] = fma(part, exponent, dots[j]);
      }
      out.unit();
    }
    sum += add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    dot += add_lanes((dots[0] + dots[1]) + (dots[2] + dots[3]));
  }
  return {k, sum, dot};
}

// An integer near the largest x c of n logits; 0 if all are -inf or NaN.
template <class T>
float exponent_of(const T* x, int64_t n, const Factor& c) {
  Vec most[4] = {load(x), load(x + kLanes), load(x + 2 * kLanes), load(x + 3 * kLanes)};
  for (int64_t i = kUnroll; i < n; i += kUnroll)
    for (int j = 0; j < 4; ++j) most[j] = larger(most[j], load(x + i + j * kLanes));
  const float top = largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3]))) * c.high;
  return top > -std::numeric_limits<float>::max() ? std::nearbyint(top) : 0.0f;
}

// E and its sums for one tile. k is estimated from the first few logits; if the sum shows that it was wrong, the tile is redone.
template <bool kKeep, class T, class Out>
Tile exp_tile(const T* x, int64_t n, const Factor& c, float* e, Out out) {
  const Tile tile = exp_tile_at<kKeep>(exponent_of(x, kUnroll, c), x, n, c, e, out);
  out.rest();
  if (tile.sum > 0x1p-20 && tile.sum < 0x1p100) return tile;
  NoWriter none;
  return exp_tile_at<kKeep>(exponent_of(x, n, c), x, n, c, e, none);
}

// Floats aligned to 64 bytes, so that no vector crosses a cache line.
class Buffer {
 public:
  float* data() const { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(floats_.data()) + 63) / 64 * 64); }
  void hold(int64_t n) { if (int64_t(floats_.size()) < n + 16) floats_.resize(n + 16); }  // the content is lost

 private:
  std::vector<float> floats_;
};

// A row's logits as powers E, and the sums of its tiles.
struct Powers {
  std::vector<Tile> tiles;
  Buffer e;
};

struct Scratch {  // one per thread, kept between calls
  Powers rows[2], ref;
  std::vector<float> candidates, ref_candidates, gradient;
};

struct RowSum {
  double lse2;     // log2 of the sum of 2^(x c)
  double mean_xc;  // expectation of x c under the softmax
};

// The first sweep over a row; writer(i, n, tile) returns the writer that runs at the same time. Sums in double.
template <bool kKeep, class T, class MakeWriter>
RowSum exp_row(const T* x, int64_t n, const Factor& c, Powers& to, const MakeWriter& writer) {
  to.tiles.clear();
  if (kKeep) to.e.hold(n + kTile);
  float* e = to.e.data();
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i), padded = (count + kUnroll - 1) / kUnroll * kUnroll;
    if (padded == count) {
      to.tiles.push_back(exp_tile<kKeep>(x + i, count, c, e + i, writer(i, count, i / kTile)));
    } else {
      T tail[kTile];
      std::copy(x + i, x + i + count, tail);
      std::fill(tail + count, tail + padded, negative_infinity<T>());
      to.tiles.push_back(exp_tile<kKeep>(tail, padded, c, e + i, writer(i, count, i / kTile)));
    }
  }
  float top = -std::numeric_limits<float>::max();
  for (const Tile& t : to.tiles)
    if (t.sum > 0) top = std::max(top, t.k);
  double sum = 0, dot = 0;
  for (const Tile& t : to.tiles) {
    if (t.sum == 0) continue;  // all -inf; false for NaN, which must propagate
    const double factor = std::ldexp(1.0, int(t.k - top));
    sum += factor * t.sum;
    dot += factor * (t.dot + double(t.k) * t.sum);
  }
  return {sum == 0 ? -std::numeric_limits<double>::infinity() : top + std::log2(sum), dot / sum};
}

inline NoWriter no_writer(int64_t, int64_t, int64_t) { return {}; }

template <class T, bool kStream>
class Worker {
 public:
  Worker(const RowArgs& args, Scratch& scratch) : a_(args), s_(scratch) {}

  // Computes row r; false if its label or a kept id is not a column. Its gradient may be pending until the next row or `flush`.
  bool run(int64_t r) {
    T* d = a_.dlogits ? static_cast<T*>(a_.dlogits) + r * a_.dlogits_stride : nullptr;
    const int64_t label = a_.labels[r];
    if (label == kIgnore) {
      ignore_row(a_, r);
      if (d) zero(d);
      return true;
    }
    if (!is_column(label)) return false;
    const T* x = static_cast<const T*>(a_.logits) + r * a_.logits_stride;
    const T* ref = a_.ref_logits ? static_cast<const T*>(a_.ref_logits) + r * a_.ref_stride : nullptr;
    if (a_.kept_ids) return run_filtered(r, x, ref, label, d);
    if (ref) with_reference(r, x, ref, a_.V, label, false, d); else plain(r, x, label, d);
    return true;
  }

  // Writes the pending gradient.
  void flush() {
    if (!d_) return;
    for (int64_t i = 0, t = 0; i < a_.V; i += kTile, ++t) waiting(i, std::min(kTile, a_.V - i), t).rest();
    finish_waiting();
  }

 private:
  bool is_column(int64_t id) const { return id >= 0 && id < a_.V; }
  Powers& current() { return s_.rows[turn_]; }

  void zero(T* d) {
    static const std::vector<float> zeros(kTile, 0.0f);
    for (int64_t i = 0; i < a_.V; i += kTile) Writer<T, kStream>(d + i, zeros.data(), std::min(kTile, a_.V - i), 0.0f).rest();
    if (kStream) stream_fence();
  }

  // A writer for tile t of the pending row: entries i .. i + n.
  Writer<T, kStream> waiting(int64_t i, int64_t n, int64_t t) const {
    const Powers& row = s_.rows[1 - turn_];
    return {d_ + i, row.e.data() + i, n, float(std::ldexp(unit_, int(double(row.tiles[t].k) - shift_))), careful_};
  }

  void finish_waiting() {
    if (kStream) stream_fence();
    from_float(at_label_, d_ + label_);
    d_ = nullptr;
  }

  // A row over the whole vocabulary without reference logits.
  void plain(int64_t r, const T* x, int64_t label, T* d) {
    const Factor c = factor_of<kFine<T>>(kLog2e / a_.temperature);
    RowSum sums;
    if (d_) {
      sums = exp_row<true>(x, a_.V, c, current(), [&](int64_t i, int64_t n, int64_t t) { return waiting(i, n, t); });
      finish_waiting();
    } else {
      sums = d ? exp_row<true>(x, a_.V, c, current(), no_writer) : exp_row<false>(x, a_.V, c, current(), no_writer);
    }
    const RowValues values = values_of<kFine<T>>(sums, to_float(x[label]), label, c);
    const Coefs g = finish_row(a_, r, look_up(a_, r), values, false, true);
    if (!d) return;
    if (g.label == 0 && g.softmax == 0) return zero(d);
    d_ = d;
    label_ = label;
    at_label_ = label_gradient(a_, g, values);
    careful_ = !std::isfinite(values.lse2);
    shift_ = careful_ ? 0 : std::floor(values.lse2);
    unit_ = g.softmax == 0 ? 0 : -g.softmax / a_.temperature * std::exp2(shift_ - values.lse2);
    turn_ = 1 - turn_;
  }

  // For a likely label the rounded power is used, as it is in the sum, so that a certain label gets exactly 0.
  template <bool fine>
  RowValues values_of(const RowSum& sums, float x_label, int64_t label, const Factor& c) {
    double log2_p = double(x_label) * c.exact - sums.lse2;
    if (log2_p > -1) {
      const float k = current().tiles[label / kTile].k;
      Vec exponent;
      float lanes[kLanes];
      store(lanes, power<fine>(fill(x_label), fill(c.high), fill(c.low), fill(k), &exponent));
      log2_p = std::min(0.0, std::log2(double(lanes[0])) + k - sums.lse2);
    }
    return {sums.lse2, log2_p * kLn2, (sums.lse2 - sums.mean_xc) * kLn2, 0};
  }

  // Gathers the label and then the rest of the support, and scatters the gradient.
  bool run_filtered(int64_t r, const T* x, const T* ref, int64_t label, T* d) {
    const int64_t* kept = a_.kept_ids + r * a_.K;
    std::vector<float>&v = s_.candidates, &q = s_.ref_candidates, &g = s_.gradient;
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
    g.resize(v.size());
    with_reference<float>(r, v.data(), ref ? q.data() : nullptr, v.size(), 0, outside, d ? g.data() : nullptr);
    if (!d) return true;
    zero(d);
    from_float(g[0], d + label);
    for (int64_t i = 0, j = 1; i < a_.K; ++i)
      if (kept[i] != label && kept[i] >= 0) from_float(g[j++], d + kept[i]);
    return true;
  }

  // Values and gradient of one row of n candidates, with the exact KL if `ref` is given. d may be x.
  template <class X>
  void with_reference(int64_t r, const X* x, const X* ref, int64_t n, int64_t label, bool outside, X* d) {
    const Factor c = factor_of<kFine<X>>(kLog2e / a_.temperature);
    const double ref_lse2 = ref ? exp_row<false>(ref, n, c, s_.ref, no_writer).lse2 : 0;
    const RowSum sums = exp_row<true>(x, n, c, current(), no_writer);
    RowValues values = values_of<kFine<X>>(sums, to_float(x[label]), label, c);
    const double shift = (sums.lse2 - ref_lse2) * kLn2, label_gap = ref ? double(to_float(x[label])) - to_float(ref[label]) : 0;
    if (ref) values.kl = mean_gap(x, ref, n, sums.lse2) / a_.temperature - shift;
    const Coefs g = finish_row(a_, r, look_up(a_, r), values, outside, true);
    if (!d) return;
    float at_label = 0;
    const float* e = current().e.data();
    for (int64_t i = 0, t = 0; i < n; i += kTile, ++t) {
      const ElementGradient of = element_gradient(a_, g, values, current().tiles[t].k, shift, label_gap);
      const int64_t end = std::min(i + kTile, n);
#pragma omp simd
      for (int64_t j = i; j < end; ++j) {  // each entry is read before it is written
        const float gap = ref ? to_float(x[j]) - to_float(ref[j]) : 0.0f;
        from_float(e[j] != 0 && of.gap != 0 ? e[j] * (of.softmax + of.gap * gap) : e[j] * of.softmax, d + j);
      }
      at_label = of.label;
    }
    from_float(at_label, d + label);
  }

  // Expectation of x - x_ref under the softmax; entries of probability 0 contribute nothing.
  template <class X>
  double mean_gap(const X* x, const X* ref, int64_t n, double lse2) {
    double gap = 0;
    for (int64_t i = 0, t = 0; i < n; i += kTile, ++t) {
      const int64_t count = std::min(kTile, n - i);
      const float* e = current().e.data() + i;
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < count; ++j) part += e[j] != 0 ? e[j] * (to_float(x[i + j]) - to_float(ref[i + j])) : 0.0f;
      if (current().tiles[t].sum != 0) gap += std::exp2(double(current().tiles[t].k) - lse2) * part;
    }
    return gap;
  }

  const RowArgs& a_;
  Scratch& s_;
  int turn_ = 0;  // index of the scratch row that is being filled; the other one may be pending
  // The pending row: its gradient is E * unit * 2^(k - shift), and at_label at the label.
  T* d_ = nullptr;
  int64_t label_ = 0;
  double unit_ = 0, shift_ = 0;
  float at_label_ = 0;
  bool careful_ = false;  // the pending row may hold NaN or infinity
};

template <class T, bool kStream>
bool run_rows(const RowArgs& args) {
  bool good = true;
#pragma omp parallel num_threads(args.num_threads) reduction(&& : good)
  {
    static thread_local Scratch scratch;
    Worker<T, kStream> worker(args, scratch);
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t r = 0; r < args.T; ++r) good = worker.run(r) && good;
    worker.flush();
  }
  return good;
}

template <class T>
bool run_all(const RowArgs& args) {
  return args.T * args.V * int64_t(sizeof(T)) > kStreamBytes ? run_rows<T, true>(args) : run_rows<T, false>(args);
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
