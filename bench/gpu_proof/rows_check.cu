// Checks one problem of the CUDA row kernels against double precision on the host, without torch: for a first look at a GPU, for
// compute-sanitizer and for ncu.
//
//   rows_check [dtype=f32|bf16|f16] [T=64] [V=32000] [cluster=-1] [place=in|out|none] [pad=0] [kept=0] [top_k=0] [full=0]
//              [ignored=20] [repeats=1] [seed=1]
//
// cluster: CTAs per row, 0: not rows_one_read, -1: the library's choice. place: where the gradient goes. pad: elements between
// rows. kept: so many random ids are the support; top_k: the kernel finds it. full: the exact KL. ignored: per cent of the rows
// that have no label; 0 for times to compare with the bytes moved, and at least 3 repeats. Prints one line of JSON. Exits
// with 0 if everything is right, 1 if something is wrong, 2 after a CUDA error or for arguments that make no sense.
#include "rows_cuda.cu"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

using namespace srpo;

namespace {

constexpr int64_t kDrawn = 64;  // rows of random logits; row t has those of row t % kDrawn
constexpr int64_t kChecked = 48;  // rows, at most, that are compared
constexpr size_t kShown = 8;      // wrong entries that are printed
constexpr double kTemperature = 0.99, kKl = 0.04;

struct Options {
  std::string dtype = "bf16", place = "out";
  int64_t T = 64, V = 32000, cluster = -1, pad = 0, kept = 0, top_k = 0, full = 0, ignored = 20, repeats = 1, seed = 1;
};

[[noreturn]] void fail(const std::string& error) {
  printf("{\"ok\": false, \"error\": \"%s\"}\n", error.c_str());
  fflush(stdout);
  _Exit(2);  // without destructors, which would wait for a GPU that no longer answers
}

void check(cudaError_t error, const char* what) {
  if (error) fail(std::string(what) + ": " + cudaGetErrorName(error));
}
#define CHECK(call) check(call, #call)

Options parse(int argc, char** argv) {
  Options o;
  std::map<std::string, int64_t*> numbers = {{"T", &o.T},         {"V", &o.V},       {"cluster", &o.cluster},
                                             {"pad", &o.pad},     {"kept", &o.kept}, {"top_k", &o.top_k},
                                             {"full", &o.full},   {"seed", &o.seed}, {"repeats", &o.repeats},
                                             {"ignored", &o.ignored}};
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i], name = arg.substr(0, arg.find('=')), value = arg.substr(arg.find('=') + 1);
    if (name == "dtype") o.dtype = value;
    else if (name == "place") o.place = value;
    else if (numbers.count(name)) *numbers[name] = std::atoll(value.c_str());
    else fail("unknown argument " + arg);
  }
  if (o.T < 1 || o.V < 1 || o.kept > o.V || o.top_k > o.V || (o.kept && o.top_k) || o.pad < 0 || o.repeats < 1)
    fail("T, V and repeats are at least 1, pad at least 0, kept and top_k at most V, and one of the two is 0");
  return o;
}

template <class X>
X* on_device(const std::vector<X>& values) {
  X* p;
  CHECK(cudaMalloc(&p, std::max<size_t>(16, values.size() * sizeof(X))));
  CHECK(cudaMemcpy(p, values.data(), values.size() * sizeof(X), cudaMemcpyHostToDevice));
  return p;
}
template <class X>
std::vector<X> on_host(const X* p, size_t count) {
  std::vector<X> values(count);
  CHECK(cudaMemcpy(values.data(), p, count * sizeof(X), cudaMemcpyDeviceToHost));
  return values;
}
// [T, stride] from the drawn rows.
template <class E>
E* repeated(const std::vector<E>& drawn, int64_t T, int64_t stride) {
  E* p;
  CHECK(cudaMalloc(&p, size_t(T) * stride * sizeof(E)));
  for (int64_t t = 0; t < T; t += kDrawn)
    CHECK(cudaMemcpy(p + t * stride, drawn.data(), size_t(std::min(kDrawn, T - t)) * stride * sizeof(E), cudaMemcpyHostToDevice));
  return p;
}

// As JSON, which has no NaN and no infinity: these are strings.
std::string number(double x) {
  char text[32];
  snprintf(text, sizeof text, std::isfinite(x) ? "%.3g" : "\"%.3g\"", x);
  return text;
}

// An entry that differs.
struct Wrong {
  int64_t row, column;
  double got, wanted, logit;
};

struct Report {
  double logprob_error = 0, squared_error = 0, squared_rounding = 0, squared_size = 0;
  int64_t num_wrong = 0;
  std::vector<Wrong> first;

  void differ(const Wrong& wrong) {
    if (first.size() < kShown) first.push_back(wrong);
    ++num_wrong;
  }
  // Relative error in the L2 norm.
  double gradient_error() const { return squared_size > 0 ? std::sqrt(squared_error / squared_size) : 0; }
  // As large as it is if only the result is rounded.
  double rounding_error() const { return squared_size > 0 ? std::sqrt(squared_rounding / squared_size) : 0; }
};

// Largest relative error of rounding to a dtype.
double half_unit(int32_t dtype) { return dtype == kFloat32 ? 0x1p-24 : dtype == kBFloat16 ? 0x1p-8 : 0x1p-11; }

double log_sum_exp(const std::vector<double>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double v : x) sum += std::exp(v - top);
  return top + std::log(sum);
}

// One labelled row in double. `support`: its candidates, the label first; x, ref: logits by column; d: the gradient or null.
template <class E>
void check_row(const RowArgs& host, int64_t t, const std::vector<int64_t>& support, const E* x, const E* ref, const E* d,
               float logprob, Report* report) {
  const auto scaled = [&](const E* values) {
    std::vector<double> z;
    for (const int64_t v : support) z.push_back(double(float(values[v])) / kTemperature);
    return z;
  };
  const std::vector<double> z = scaled(x), q = ref ? scaled(ref) : std::vector<double>();
  const double lse = log_sum_exp(z), ref_lse = ref ? log_sum_exp(q) : 0, lp = z[0] - lse;
  report->logprob_error = std::max(report->logprob_error, std::fabs(lp - logprob));
  if (!(std::fabs(lp - logprob) < 1e-5)) report->differ({t, -1, logprob, lp, z[0]});
  if (!d) return;
  double kl = 0;
  for (size_t i = 0; ref && i < z.size(); ++i) kl += std::exp(z[i] - lse) * (z[i] - lse - q[i] + ref_lse);
  int64_t sequence, step;
  step_of_row(host, t, &sequence, &step);
  const double old = snap(host.old_logprobs[t], lp), ref_lp = ref ? lp : snap(host.ref_logprobs[t], lp);
  const Token<double> token = token_loss<double>(host, lp, host.step_advantages[sequence * host.J + step], old, ref_lp);
  const double weight = host.weights[t], g = weight * token.dloss / kTemperature;
  std::vector<double> wanted(host.V, 0.0);
  for (size_t i = 0; i < z.size(); ++i) {
    const double p = std::exp(z[i] - lse);
    wanted[support[i]] = g * ((i == 0) - p);
    if (ref) wanted[support[i]] += weight * kKl / kTemperature * p * (z[i] - lse - q[i] + ref_lse - kl);
  }
  for (int64_t v = 0; v < host.V; ++v) {
    const double got = float(d[v]), error = got - wanted[v];
    const double rounding = float(E(float(wanted[v]))) - wanted[v];
    report->squared_error += error * error, report->squared_size += wanted[v] * wanted[v];
    report->squared_rounding += rounding * rounding;
    const double allowed = (1.05 * half_unit(host.dtype) + 1e-5) * std::fabs(wanted[v]) + 2e-6;
    if (!(std::fabs(error) <= allowed)) report->differ({t, v, got, wanted[v], double(float(x[v]))});
  }
}

// The columns of a row's largest logits; of equal ones the smaller column first.
template <class E>
std::vector<int64_t> largest(const E* row, int64_t V, int64_t count) {
  std::vector<int64_t> order(V);
  for (int64_t v = 0; v < V; ++v) order[v] = v;
  const auto before = [row](int64_t u, int64_t v) {
    const float p = float(row[u]), q = float(row[v]);
    return p != q ? p > q : u < v;
  };
  if (count < V) std::partial_sort(order.begin(), order.begin() + count, order.end(), before);
  order.resize(count);
  return order;
}

template <class E>
int run(const Options& o, int32_t dtype) {
  std::mt19937 random(unsigned(o.seed));
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  const int64_t N = 3, J = 4, stride = o.V + o.pad, drawn_rows = std::min(kDrawn, o.T);
  std::vector<E> x(drawn_rows * stride), ref(o.full ? x.size() : 0);
  for (auto& value : x) value = E(3 * normal(random));
  for (size_t i = 0; i < ref.size(); ++i) ref[i] = E(float(x[i]) + normal(random));
  std::vector<int64_t> labels(o.T), kept(o.T * o.kept);
  std::vector<float> advantages(N * J), weights(o.T), old(o.T), ref_logprobs(o.T);
  const std::vector<int32_t> cu_seqlens = {0, int32_t(o.T / 3), int32_t(o.T / 2), int32_t(o.T)};
  std::vector<int32_t> step_ends;
  for (int64_t i = 0; i < N * J; ++i) step_ends.push_back(int32_t((o.T / 3 + 1) * (i % J + 1) / J));
  for (auto& a : advantages) a = normal(random);
  std::vector<char> ignored(drawn_rows);
  for (int64_t t = 0; t < drawn_rows; ++t) {  // NaN in a row that must not be read
    ignored[t] = o.T > 1 && uniform(random) < 0.01f * float(o.ignored);
    for (int64_t v = 0; ignored[t] && v < o.V; ++v) x[t * stride + v] = E(NAN);
  }
  // The support of a drawn row, and the log-sum-exp over it; all columns without a filter.
  std::vector<std::vector<int64_t>> support(drawn_rows);
  std::vector<double> lse(drawn_rows);
  for (int64_t t = 0; t < drawn_rows; ++t) {
    const int64_t size = o.kept ? o.kept : o.top_k ? o.top_k : o.V, part = o.V / size;
    for (int64_t k = 0; k < o.kept; ++k) support[t].push_back(k * part + int64_t(random() % uint64_t(part)));
    if (!o.kept) support[t] = largest(x.data() + t * stride, o.V, size);
    std::vector<double> z;
    for (const int64_t v : support[t]) z.push_back(double(float(x[t * stride + v])) / kTemperature);
    if (!ignored[t]) lse[t] = log_sum_exp(z);
  }
  for (int64_t t = 0; t < o.T; ++t) {
    const int64_t own = t % kDrawn;
    std::copy(support[own].begin(), support[own].begin() + o.kept, kept.begin() + t * o.kept);
    weights[t] = uniform(random);
    if (ignored[own]) {
      labels[t] = kIgnore;
      continue;
    }
    // Half of the labels from the support; old and reference near the present log-probability, as in training.
    labels[t] = random() % 2 ? support[own][random() % support[own].size()] : int64_t(random() % uint64_t(o.V));
    const double z = double(float(x[own * stride + labels[t]])) / kTemperature;
    const bool inside = !(o.kept || o.top_k) || std::count(support[own].begin(), support[own].end(), labels[t]) > 0;
    const double logprob = z - (inside ? lse[own] : std::max(z, lse[own]) + std::log1p(std::exp(-std::fabs(z - lse[own]))));
    old[t] = float(logprob) + 0.3f * normal(random), ref_logprobs[t] = float(logprob) + 0.5f * normal(random);
  }

  RowArgs a = {};
  a.logits_stride = a.dlogits_stride = a.ref_stride = stride;
  a.T = o.T, a.V = o.V, a.N = N, a.J = J, a.K = o.kept + o.top_k;
  a.temperature = kTemperature, a.clip_eps_low = a.clip_eps_high = 0.2, a.dual_clip = INFINITY, a.kl_coef = kKl;
  a.dtype = dtype, a.mode = kPolicyLoss, a.kl_estimator = o.full ? kFullKl : kK3, a.num_threads = 1;
  RowArgs host = a;  // the same tables, for the host
  host.cu_seqlens = cu_seqlens.data(), host.step_ends = step_ends.data(), host.step_advantages = advantages.data();
  host.weights = weights.data(), host.old_logprobs = old.data(), host.ref_logprobs = ref_logprobs.data();

  E* logits = repeated(x, o.T, stride);
  const size_t bytes = size_t(o.T) * stride * sizeof(E);
  E* gradient = nullptr;
  const E* pristine = o.place == "in" ? repeated(x, o.T, stride) : nullptr;
  if (o.place == "in") gradient = logits;
  if (o.place == "out") CHECK(cudaMalloc(&gradient, bytes));
  std::vector<float> rows(kNumFields * o.T);
  a.logits = logits, a.dlogits = gradient, a.labels = on_device(labels), a.rows = on_device(rows);
  a.ref_logits = o.full ? repeated(ref, o.T, stride) : nullptr;
  int64_t* ids = a.K ? on_device(std::vector<int64_t>(o.T * a.K, -1)) : nullptr;
  if (o.kept) CHECK(cudaMemcpy(ids, kept.data(), kept.size() * 8, cudaMemcpyHostToDevice));
  a.kept_ids = ids;
  a.step_advantages = on_device(advantages), a.step_ends = on_device(step_ends), a.cu_seqlens = on_device(cu_seqlens);
  a.weights = on_device(weights), a.old_logprobs = on_device(old), a.ref_logprobs = o.full ? nullptr : on_device(ref_logprobs);

  Plan plan = {};
  CHECK(find_plan(a, 0, int(o.cluster), &plan));
  cudaFuncAttributes kernel = {};
  const void* launched = plan.cluster > 0 ? (const void*)rows_one_read<E>
                         : a.K            ? (const void*)rows_filtered<E>
                         : o.full         ? (const void*)rows_two_reads<E, true>
                                          : (const void*)rows_two_reads<E, false>;
  CHECK(cudaFuncGetAttributes(&kernel, launched));
  cudaEvent_t begin, middle, end;
  CHECK(cudaEventCreate(&begin)), CHECK(cudaEventCreate(&middle)), CHECK(cudaEventCreate(&end));
  std::vector<float> times, top_k_times;
  std::vector<int64_t> checked;
  const int64_t num_checked = std::min(kChecked, o.T);  // from the first row to the last
  for (int64_t i = 0; i < num_checked; ++i) checked.push_back(i * (o.T - 1) / std::max<int64_t>(1, num_checked - 1));
  std::vector<std::vector<E>> got(checked.size()), again(checked.size());
  bool repeats_differ = false;
  for (int64_t repeat = 0; repeat < o.repeats; ++repeat) {
    if (pristine) CHECK(cudaMemcpy(logits, pristine, bytes, cudaMemcpyDeviceToDevice));
    if (o.place == "out") CHECK(cudaMemset(gradient, 0xff, bytes));  // NaN, which must not stay
    CHECK(cudaMemset(a.rows, 0xff, rows.size() * 4));
    CHECK(cudaEventRecord(begin));
    if (o.top_k) CHECK(cudaError_t(srpo_cuda_top_k(logits, stride, o.T, o.V, o.top_k, dtype, ids, 0, nullptr)));
    CHECK(cudaEventRecord(middle));
    CHECK(cudaError_t(srpo_cuda_rows(&a, 0, int(o.cluster), nullptr)));
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end)), times.push_back(ms);
    CHECK(cudaEventElapsedTime(&ms, begin, middle)), top_k_times.push_back(ms);
    CHECK(cudaDeviceSynchronize());
    const std::vector<float> before = rows;
    rows = on_host(a.rows, rows.size());
    for (size_t i = 0; gradient && i < checked.size(); ++i) {
      again[i] = on_host(gradient + checked[i] * stride, o.V);
      if (repeat == 0) got[i] = again[i];
      repeats_differ |= memcmp(got[i].data(), again[i].data(), o.V * sizeof(E)) != 0;
    }
    if (repeat) repeats_differ |= memcmp(before.data(), rows.data(), rows.size() * 4) != 0;
  }

  Report report;
  if (o.top_k) kept = on_host(ids, size_t(o.T) * a.K);
  for (size_t i = 0; i < checked.size(); ++i) {
    const int64_t t = checked[i], source = t % kDrawn;
    const E* own = x.data() + source * stride;
    const E* d = gradient ? got[i].data() : nullptr;
    if (labels[t] == kIgnore) {
      for (int64_t v = 0; d && v < o.V; ++v)
        if (float(d[v]) != 0) report.differ({t, v, double(float(d[v])), 0, NAN});
      continue;
    }
    for (int64_t k = 0; k < o.top_k; ++k) {
      const int64_t found = kept[t * a.K + k], wanted = support[source][k];
      if (found != wanted) report.differ({t, k, double(found), double(wanted), NAN});
    }
    std::vector<int64_t> candidates = {labels[t]};
    for (const int64_t v : support[source])
      if (v != labels[t]) candidates.push_back(v);
    check_row(host, t, candidates, own, o.full ? ref.data() + source * stride : nullptr, d, rows[kLogprob * o.T + t], &report);
  }
  std::sort(times.begin(), times.end()), std::sort(top_k_times.begin(), top_k_times.end());
  const bool accurate = report.gradient_error() <= 1.5 * report.rounding_error() + 2e-6;
  const bool ok = report.num_wrong == 0 && accurate && !repeats_differ;
  std::string first;
  for (const Wrong& w : report.first) {
    char text[160];
    snprintf(text, sizeof text, "%s[%lld, %lld, \"%.9g\", \"%.9g\", \"%.9g\"]", first.empty() ? "" : ", ", (long long)w.row,
             (long long)w.column, w.got, w.wanted, w.logit);
    first += text;
  }
  printf("{\"ok\": %s, \"ms\": %.4f, \"min_ms\": %.4f, \"top_k_ms\": %.4f, ", ok ? "true" : "false", times[times.size() / 2],
         times[0], top_k_times[times.size() / 2]);
  printf("\"plan\": {\"cluster\": %d, \"slice_vectors\": %d, \"dynamic_bytes\": %d, \"static_bytes\": %d, \"max_clusters\": %d, "
         "\"registers\": %d, \"local_bytes\": %d}, ",
         plan.cluster, plan.slice_vectors, plan.dynamic_bytes, int(kernel.sharedSizeBytes), plan.max_clusters, kernel.numRegs,
         int(kernel.localSizeBytes));
  printf("\"logprob_error\": %s, \"gradient_error\": %s, \"bad\": %lld, \"repeats_differ\": %s, \"first_wrong\": [%s]}\n",
         number(report.logprob_error).c_str(), number(report.gradient_error()).c_str(), (long long)report.num_wrong,
         repeats_differ ? "true" : "false", first.c_str());
  return ok ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  if (o.dtype == "f32") return run<float>(o, kFloat32);
  if (o.dtype == "bf16") return run<__nv_bfloat16>(o, kBFloat16);
  if (o.dtype == "f16") return run<__half>(o, kFloat16);
  fail("dtype is " + o.dtype + ": f32, bf16 or f16");
}
