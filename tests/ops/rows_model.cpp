// The arithmetic of csrc/rows_one_read.cuh and rows_two_reads.cuh on a CPU: the functions of row_math.h in the order of the
// kernels, CTA by CTA, warp by warp and lane by lane. fp32 logits. Built by test_cuda_model.py.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

// The GPU's exponential is off by up to 2^-22.5; so is this one, by an amount that looks random.
static float exp2_of_a_gpu(float x) {
  const double noise = std::fmod(std::fabs(double(x)) * 7919.0, 2.0) - 1.0;
  return float(std::exp2(double(x)) * (1 + noise * 0x1p-22 * 0.7071));
}
#define exp2f exp2_of_a_gpu
#include "row_math.h"

using namespace srpo;

namespace {

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps, kCount = 4, kChunk = 8;

// The result of shuffles with lane ^ 16, 8, 4, 2, 1 in every lane.
template <class X, class Add>
X over_lanes(X (&lanes)[kLanes], Add add) {
  for (int step = kLanes / 2; step; step /= 2) {
    X next[kLanes];
    for (int i = 0; i < kLanes; ++i) next[i] = add(lanes[i], lanes[i ^ step]);
    for (int i = 0; i < kLanes; ++i) lanes[i] = next[i];
  }
  const float* all = reinterpret_cast<const float*>(lanes);
  constexpr size_t n = sizeof(X) / sizeof(float);
  for (size_t i = n; i < kLanes * n; ++i)
    if (all[i] != all[i % n]) std::abort();  // every lane must have the same result
  return lanes[0];
}

struct Message {
  float k, sum, dot, x_label;
};

// The vectors of a warp's share of a slice: f(lane, first column).
template <class F>
void share(int64_t first, int num_vectors, int warp, F f) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = warp * kLanes + lane; i < num_vectors; i += kThreads) f(lane, first + int64_t(i) * kCount);
}

template <bool fine>
void one_read(const RowArgs& a, int64_t row, int num_ctas) {
  const float* x = static_cast<const float*>(a.logits) + row * a.logits_stride;
  const int64_t label = a.labels[row], vectors = a.V / kCount, slice = ((vectors + num_ctas - 1) / num_ctas + 1) / 2 * 2;
  const Scale c = scale_of(a);
  std::vector<Message> mail(num_ctas);
  std::vector<float> ks(num_ctas * kWarps);
  const auto width = [&](int cta) { return int(std::min(slice, std::max<int64_t>(0, vectors - cta * slice))); };
  for (int cta = 0; cta < num_ctas; ++cta) {
    const int64_t first = cta * slice * kCount;
    Partial own = nothing();
    for (int warp = 0; warp < kWarps; ++warp) {
      float most = -INFINITY, sums[kLanes], dots[kLanes];
      share(first, width(cta), warp, [&](int, int64_t at) { most = std::max(most, *std::max_element(x + at, x + at + kCount)); });
      const float k = ks[cta * kWarps + warp] = exponent_near(most, c, 0);
      Partial lanes[kLanes];
      std::fill(lanes, lanes + kLanes, Partial{k, 0, 0, 0});
      float lost[kLanes] = {};
      share(first, width(cta), warp, [&](int lane, int64_t at) {
        float v[kCount];
        std::copy(x + at, x + at + kCount, v);
        add_logits<fine, false>(lanes[lane], lost[lane], v, v, c);
      });
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane].sum, dots[lane] = lanes[lane].dot;
      const auto plus = [](float u, float v) { return u + v; };
      const Partial part = {k, over_lanes(sums, plus), over_lanes(dots, plus), 0};
      own = warp == 0 ? part : merge(own, part);
    }
    const bool mine = label >= first && label < first + int64_t(width(cta)) * kCount;
    mail[cta] = {own.k, own.sum, own.dot, mine ? x[label] : 0.0f};
  }
  const Message of_label = mail[label / (slice * kCount)];
  const RowValues values = row_values<fine>(add_up(mail.data(), num_ctas), of_label.x_label, c, of_label.k);
  const Coefs coefs = finish_row(a, row, look_up(a, row), values, false, true);
  if (!a.dlogits) return;
  float* d = static_cast<float*>(a.dlogits) + row * a.dlogits_stride;
  for (int cta = 0; cta < num_ctas; ++cta)
    for (int warp = 0; warp < kWarps; ++warp) {
      const float k = ks[cta * kWarps + warp], factor = gradient_factor(a, coefs, values, k);
      share(cta * slice * kCount, width(cta), warp, [&](int, int64_t at) {
        float t;
        for (int64_t i = at; i < at + kCount; ++i) d[i] = factor * power<fine>(x[i], c, k, &t);
      });
    }
  d[label] = label_gradient(a, coefs, values);
}

template <bool fine>
void two_reads(const RowArgs& a, int64_t row) {
  const float* x = static_cast<const float*>(a.logits) + row * a.logits_stride;
  const float* ref = a.ref_logits ? static_cast<const float*>(a.ref_logits) + row * a.ref_stride : nullptr;
  const int64_t label = a.labels[row];
  const Candidates all = {a.kept_ids ? a.kept_ids + row * a.K : nullptr, int(label), int(a.kept_ids ? a.K + 1 : a.V)};
  const Scale c = scale_of(a);
  Partial parts[kWarps], ref_parts[kWarps];
  for (int warp = 0; warp < kWarps; ++warp) {
    Partial p[kLanes], q[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      p[lane] = q[lane] = nothing();
      float lost = 0, ref_lost = 0;
      for (int start = warp * kLanes + lane; start < all.count; start += kChunk * kThreads) {
        float u[kChunk], v[kChunk];
        for (int j = 0; j < kChunk; ++j) {
          const int id = all.id(start + j * kThreads);
          u[j] = id < 0 ? -INFINITY : x[id];
          v[j] = id < 0 || !ref ? -INFINITY : ref[id];
        }
        if (ref) add_more_logits<fine, true>(p[lane], lost, u, v, c), add_more_logits<fine, false>(q[lane], ref_lost, v, v, c);
        else add_more_logits<fine, false>(p[lane], lost, u, u, c);
      }
    }
    parts[warp] = over_lanes(p, merge), ref_parts[warp] = over_lanes(q, merge);
  }
  bool found = !a.kept_ids;
  for (int64_t i = 0; a.kept_ids && i < a.K; ++i) found |= all.kept[i] == label;
  Partial p = parts[0];
  for (int i = 1; i < kWarps; ++i) p = merge(p, parts[i]);
  RowValues v = row_values<fine>(add_up(parts, kWarps), x[label], c, p.k);
  const double shift = ref ? (v.lse2 - add_up(ref_parts, kWarps).lse2) * kLn2 : 0;
  if (ref) v.kl = double(p.gap) / p.sum / a.temperature - shift;
  const Coefs coefs = finish_row(a, row, look_up(a, row), v, !found, true);
  if (!a.dlogits) return;
  const ElementGradient g = element_gradient(a, coefs, v, p.k, shift, ref ? double(x[label]) - ref[label] : 0);
  float* d = static_cast<float*>(a.dlogits) + row * a.dlogits_stride;
  std::vector<char> is_kept(a.V);
  for (int i = 0; i < all.count; ++i) {
    const int id = all.id(i);
    if (id < 0) continue;
    is_kept[id] = 1;
    float t;
    const float e = power<fine>(x[id], c, p.k, &t), kl = g.gap != 0 && e != 0 ? e * g.gap * (x[id] - ref[id]) : 0.0f;
    d[id] = id == label ? g.label : fmaf(e, g.softmax, kl);
  }
  for (int64_t i = 0; i < a.V; ++i)
    if (!is_kept[i]) d[i] = 0;
}

}  // namespace

// `num_ctas`: CTAs per row, or 0 for the kernel that reads twice; `fine`: as for fp32 logits, else as for 16-bit ones.
extern "C" void rows_model(const RowArgs* a, int num_ctas, int fine) {
  for (int64_t row = 0; row < a->T; ++row) {
    if (a->labels[row] == kIgnore) {
      ignore_row(*a, row);
      float* d = static_cast<float*>(a->dlogits) + row * a->dlogits_stride;
      for (int64_t i = 0; a->dlogits && i < a->V; ++i) d[i] = 0;
    } else if (num_ctas > 0 && !a->kept_ids && !a->ref_logits && a->V % kCount == 0) {
      fine ? one_read<true>(*a, row, num_ctas) : one_read<false>(*a, row, num_ctas);
    } else {
      fine ? two_reads<true>(*a, row) : two_reads<false>(*a, row);
    }
  }
}
