// The kernel for a GPU with clusters: each row of logits is read once and its gradient written once.
//
// A cluster of CTAs works on a row, each CTA on a slice in its shared memory: the copy engine loads the slice, the CTA sums
// 2^(x c - k), the CTAs exchange their sums, each computes the token's loss and its derivative, and overwrites its slice with the
// gradient, which the copy engine stores. Each CTA has two slices, so that the next row is loaded at the same time. Every sum has
// a fixed order, independent of the grid: every run gives the same bits.
//
// It takes rows that the copy engine can move (16-byte units) and that fit into shared memory, without a filter or reference
// logits.
#pragma once
#include "cluster.cuh"
#include "row_math.h"
#include "vectors.cuh"

namespace srpo {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // for computing; one more warp moves data
constexpr int kStages = 2, kMaxCluster = 16, kCtasPerSm = 3;
constexpr int64_t kMaxSliceBytes = 1 << 17;  // kStages slices of this size exceed shared memory

// A warp's share of a slice: vectors `first`, first + kThreads, ... below num_vectors. All lanes get the warp's sums.
template <class T>
__device__ __forceinline__ Partial sum_slice(const uint4* slice, int first, int num_vectors, Scale c) {
  constexpr int n = Vector<T>::kCount;
  float x[n];
#pragma unroll
  for (int j = 0; j < n; ++j) x[j] = -INFINITY;
  Vector<T> largest;
  largest.pack(x);
#pragma unroll 4
  for (int i = first; i < num_vectors; i += kThreads) largest.keep_larger(read<T>(slice + i));
  largest.unpack(x);
  float most = x[0];
#pragma unroll
  for (int j = 1; j < n; ++j) most = fmaxf(most, x[j]);
#pragma unroll
  for (int lane = 16; lane; lane /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lane));
  const float k = exponent_near(most, c, 0.0f);

  Partial p = {k, 0, 0, 0};
  float lost = 0;
#pragma unroll 2
  for (int i = first; i < num_vectors; i += kThreads) {
    read<T>(slice + i).unpack(x);
    add_logits<kFine<T>, false>(p, lost, x, x, c);
  }
#pragma unroll
  for (int lane = 16; lane; lane /= 2) {
    p.sum += __shfl_xor_sync(0xffffffffu, p.sum, lane);
    p.dot += __shfl_xor_sync(0xffffffffu, p.dot, lane);
  }
  return p;
}

// Message from one CTA to the others about its slice.
struct alignas(16) Message {
  float k, sum, dot;  // as in Partial
  float x_label;      // from the CTA whose slice has the label
};

// A row that occupies a stage.
struct Job {
  int64_t row;  // -1: no more rows
  int64_t label;
  RowInputs inputs;
};

struct Shared {
  uint64_t loaded[kStages];     // the slice and the job are in shared memory
  uint64_t finished[kStages];   // all warps have finished the slice: its gradient may be stored
  uint64_t exchanged[kStages];  // all messages have arrived
  Job jobs[kStages];
  Partial parts[kWarps];
  float factors[kWarps];  // the gradient of a logit in a warp's share is E times this
  float label_gradient;
};

// One CTA of a cluster. The slices of a row are `slice_vectors` of 16 bytes long; the last ones may be shorter or empty.
template <class T>
class ClusterWorker {
 public:
  static constexpr int kCount = Vector<T>::kCount;

  __device__ ClusterWorker(const RowArgs& args, int vectors, unsigned char* memory, Shared& shared)
      : a(args), slice_vectors(vectors), s(shared), ring(reinterpret_cast<uint4*>(memory)), num_ctas(cluster_size()),
        rank(cluster_rank()), first(int64_t(rank) * vectors * kCount) {
    slots = reinterpret_cast<Message*>(ring + kStages * slice_vectors);
    const int64_t left = a.V / kCount - int64_t(rank) * slice_vectors;
    num_vectors = left < 0 ? 0 : left < slice_vectors ? int(left) : slice_vectors;
  }

  // For one warp: loads the rows one after the other and stores their gradients. It handles ignored rows by itself.
  __device__ void move() {
    const int lane = threadIdx.x % 32;
    const uint64_t policy = read_once_policy();
    const int64_t num_clusters = gridDim.x / num_ctas;
    uint32_t n = 0;
    for (int64_t row = blockIdx.x / num_ctas; row < a.T; row += num_clusters) {
      const int64_t label = a.labels[row];
      if (label == kIgnore) {
        if (a.dlogits) {
          uint4* to = reinterpret_cast<uint4*>(gradient(row));
          for (int i = lane; i < num_vectors; i += 32) to[i] = uint4{0, 0, 0, 0};
        }
        if (rank == 0 && lane == 0) ignore_row(a, row);
        continue;
      }
      if (lane == 0) bring(n, row, label, policy);
      ++n;
    }
    if (lane == 0) {
      bring(n, -1, 0, policy);
      if (n > 0) take_away(n - 1);
      bulk_stores_wait<true>();
    }
  }

  // For the other warps: sums, results and gradient of each row.
  __device__ void compute() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Scale c = scale_of(a);
    for (uint32_t n = 0;; ++n) {
      const int stage = n % kStages;
      uint4* slice = ring + stage * slice_vectors;
      barrier_wait(&s.loaded[stage], n / kStages);
      if (s.jobs[stage].row < 0) return;
      const Partial own = sum_slice<T>(slice, threadIdx.x, num_vectors, c);
      if (lane == 0) s.parts[warp] = own;
      sync_threads(1, kThreads);  // all parts are written
      if (warp == 0) finish(n, slice, c);
      sync_threads(1, kThreads);  // the factors are written, the parts are read
      if (a.dlogits) {
        write_gradient(slice, s.jobs[stage].label - first, c, own.k);
        publish_to_copy_engine();
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&s.finished[stage]);
    }
  }

 private:
  __device__ T* gradient(int64_t row) const { return static_cast<T*>(a.dlogits) + row * a.dlogits_stride + first; }

  // Loads the n-th job's slice into the memory of job n - kStages.
  __device__ void bring(uint32_t n, int64_t row, int64_t label, uint64_t policy) {
    const int stage = n % kStages;
    if (n >= kStages) {
      take_away(n - kStages);
      bulk_stores_wait<false>();
    }
    const uint32_t num_bytes = row < 0 ? 0 : num_vectors * 16;
    if (num_bytes) {
      const T* from = static_cast<const T*>(a.logits) + row * a.logits_stride + first;
      bulk_load(ring + stage * slice_vectors, from, num_bytes, &s.loaded[stage], policy);
    }
    s.jobs[stage] = {row, label, row < 0 ? RowInputs{} : look_up(a, row)};
    barrier_arrive_expecting(&s.loaded[stage], num_bytes);
  }

  // Stores the n-th job's gradient once it is complete.
  __device__ void take_away(uint32_t n) {
    const int stage = n % kStages;
    barrier_wait(&s.finished[stage], n / kStages);
    if (a.dlogits && num_vectors) bulk_store(gradient(s.jobs[stage].row), ring + stage * slice_vectors, num_vectors * 16);
  }

  // For warp 0: computes the row's results from the parts of all warps. Other CTAs may write to this CTA's `slots` for job n:
  // they have received its message n - 1, which it sent after reading the messages n - kStages.
  __device__ void finish(uint32_t n, const uint4* slice, Scale c) {
    const int stage = n % kStages;
    const uint32_t lane = threadIdx.x;
    const Job job = s.jobs[stage];
    Message* mail = slots + stage * num_ctas;
    if (lane == 0) barrier_arrive_expecting(&s.exchanged[stage], num_ctas * sizeof(Message));
    Partial own = s.parts[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) own = merge(own, s.parts[i]);
    const int64_t at = job.label - first;
    const float x = at >= 0 && at < num_vectors * kCount ? float(reinterpret_cast<const T*>(slice)[at]) : 0.0f;
    if (lane < num_ctas) send(lane, mail + rank, &s.exchanged[stage], own.k, own.sum, own.dot, x);
    barrier_wait<true>(&s.exchanged[stage], n / kStages);

    const bool valid = job.label >= 0 && job.label < a.V;
    const Message of_label = mail[valid ? job.label / (int64_t(slice_vectors) * kCount) : 0];
    const RowValues values = row_values<kFine<T>>(add_up(mail, num_ctas), valid ? of_label.x_label : NAN, c, of_label.k);
    const Coefs coefs = finish_row(a, job.row, job.inputs, values, false, rank == 0 && lane == 0);
    if (lane < kWarps) s.factors[lane] = gradient_factor(a, coefs, values, s.parts[lane].k);
    if (lane == 0) s.label_gradient = label_gradient(a, coefs, values);
  }

  __device__ void write_gradient(uint4* slice, int64_t label, Scale c, float k) {
    const float factor = s.factors[threadIdx.x / 32];
#pragma unroll 2
    for (int i = threadIdx.x; i < num_vectors; i += kThreads) {
      float x[kCount];
      Vector<T> v = read<T>(slice + i);
      v.unpack(x);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        float t;
        x[j] = factor * power<kFine<T>>(x[j], c, k, &t);
      }
      v.pack(x);
      write(slice + i, v);
    }
    if (label >= 0 && label < num_vectors * kCount && label / kCount % kThreads == threadIdx.x)  // after its own write there
      reinterpret_cast<T*>(slice)[label] = T(s.label_gradient);
  }

  const RowArgs& a;
  const int slice_vectors;
  Shared& s;
  uint4* const ring;  // [kStages, slice_vectors]
  Message* slots;     // [kStages, num_ctas]
  const uint32_t num_ctas, rank;
  const int64_t first;  // column of the slice
  int num_vectors;
};

template <class T>
__global__ void __launch_bounds__(kThreads + 32, kCtasPerSm) rows_one_read(const __grid_constant__ RowArgs a, int slice_vectors) {
  SRPO_DYNAMIC_SHARED(memory);
  SRPO_SHARED(Shared, s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&s.loaded[i], 1);
      barrier_init(&s.finished[i], kWarps);
      barrier_init(&s.exchanged[i], 1);
    }
    barrier_init_done();
  }
  sync_cluster();  // no CTA sends before all barriers are initialized
  ClusterWorker<T> worker(a, slice_vectors, memory, s);
  if (threadIdx.x >= kThreads) worker.move(); else worker.compute();
  __syncwarp();
  sync_cluster();  // no CTA exits while others may still send to it
}

}  // namespace
}  // namespace srpo
