// The functions of csrc/cluster.cuh for simt.h: barriers with transactions, asynchronous copies, messages between CTAs.
#pragma once
#include "simt.h"

namespace srpo {

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  simt::TransactionBarrier b;
  b.expected = b.left = int(arrivals);
  simt::world.barriers[barrier] = b;
}
inline void barrier_init_done() {}
inline void barrier_arrive(uint64_t* barrier) { simt::world.barriers.at(barrier).count(1, 0); }
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t num_bytes) {
  simt::world.barriers.at(barrier).count(1, num_bytes);
}
template <bool kFromCluster = false>
void barrier_wait(uint64_t* barrier, uint32_t phase) {
  const auto& b = simt::world.barriers.at(barrier);
  simt::wait(kFromCluster ? "messages of the cluster" : "barrier", [&b, phase] { return ((b.phase ^ phase) & 1) != 0; });
}
inline void sync_threads(int number, int num_threads) { simt::meet_cta(number, num_threads, false, "named barrier"); }
inline uint32_t cluster_rank() { return uint32_t(simt::me().cta->rank); }
inline uint32_t cluster_size() { return uint32_t(simt::world.ctas.size()); }
inline void sync_cluster() { simt::meet(simt::world.cluster, int(simt::world.threads.size()), false, "the whole cluster"); }

inline uint64_t read_once_policy() { return 0; }
inline void bulk_load(void* to, const void* from, uint32_t num_bytes, uint64_t* barrier, uint64_t) {
  if ((uintptr_t(to) | uintptr_t(from) | num_bytes) % 16)
    throw std::runtime_error("a bulk load that is not in units of 16 bytes");
  simt::world.asynchronous.push_back([=] {
    memcpy(to, from, num_bytes);
    simt::world.barriers.at(barrier).count(0, -int64_t(num_bytes));
  });
}
inline void bulk_store(void* to, const void* from, uint32_t num_bytes) {
  if ((uintptr_t(to) | uintptr_t(from) | num_bytes) % 16)
    throw std::runtime_error("a bulk store that is not in units of 16 bytes");
  auto& mine = simt::world.stores[&simt::me()];
  ++mine.first, ++mine.second;
  simt::world.asynchronous.push_back([=, &mine] {
    std::vector<unsigned char> data(num_bytes);
    memcpy(data.data(), from, num_bytes);
    --mine.first;
    simt::world.asynchronous.push_back([data, to, &mine] {
      memcpy(to, data.data(), data.size());
      --mine.second;
    });
  });
}
template <bool kArrived>
void bulk_stores_wait() {
  const auto& mine = simt::world.stores[&simt::me()];
  simt::wait("its bulk stores", [&mine] { return (kArrived ? mine.second : mine.first) == 0; });
}
inline void publish_to_copy_engine() {}

inline void send(uint32_t rank, void* to, uint64_t* barrier, float a, float b, float c, float d) {
  float* there = reinterpret_cast<float*>(simt::in_cta(static_cast<unsigned char*>(to), rank));
  uint64_t* counter = simt::in_cta(barrier, rank);
  simt::world.asynchronous.push_back([=] {
    const float values[4] = {a, b, c, d};
    memcpy(there, values, 16);
    simt::world.barriers.at(counter).count(0, -16);
  });
}

}  // namespace srpo
