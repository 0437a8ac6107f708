// Runs CUDA kernels on a CPU, so that tests execute the kernels as they are written. Every CUDA thread is a fiber; the CTAs of a
// cluster run together, one fiber at a time, in an order drawn from a seed that changes with every round. Copies and messages
// that a GPU performs asynchronously happen at random later moments. A kernel in which no thread can go on throws `Stuck`.
//
// Not modelled: memory that threads see late without a fence, and anything about speed.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };

namespace simt {

struct Stuck : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr size_t kStackBytes = 64 * 1024, kStaticBytes = 32 * 1024;
constexpr int kWarp = 32;

// Counts arrivals; a generation ends when all have arrived.
struct Meeting {
  int arrived = 0, generation = 0, any = 0, last_any = 0;
};

struct Cta {
  int rank = 0;         // in its cluster
  unsigned block = 0;   // blockIdx.x
  int num_threads = 0;
  std::vector<uint4> memory;  // static, then dynamic shared memory
  size_t static_used = 0;
  std::map<std::string, size_t> statics;  // type of a static variable -> its offset
  std::map<int, Meeting> meetings;        // named barriers of the CTA, by number; of warps: -1 - warp
  std::vector<uint64_t> slots;            // values that the threads of a warp exchange, twice
  unsigned char* base() { return reinterpret_cast<unsigned char*>(memory.data()); }
};

struct Thread {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  int index = 0, exchanges = 0;
  Cta* cta = nullptr;
  const std::function<bool()>* ready = nullptr;  // null: can go on
  const char* what = "";
};

// An mbarrier. The eight bytes in shared memory only stand for it.
struct TransactionBarrier {
  int expected = 0, left = 0;
  int64_t pending = 0;  // announced bytes minus those that have come; may be negative
  uint32_t phase = 0;   // number of phases that have ended

  void count(int arrivals, int64_t bytes) {
    left -= arrivals, pending += bytes;
    if (left < 0) throw std::runtime_error("more arrivals at a barrier than it expects");
    if (left == 0 && pending == 0) ++phase, left = expected;
  }
};

struct World {
  std::vector<Cta> ctas;  // of one cluster
  std::vector<Thread> threads;
  std::vector<std::function<void()>> asynchronous;  // copies and messages on their way
  std::function<void()> kernel;
  unsigned grid = 1;
  Meeting cluster;
  std::map<const void*, TransactionBarrier> barriers;      // by address
  std::map<const Thread*, std::pair<int, int>> stores;  // bulk stores that have not read shared memory, that have not arrived
  Thread* current = nullptr;
  std::exception_ptr error;  // from a thread
  jmp_buf scheduler;
  std::mt19937 random{1};
  unsigned char* stacks = nullptr;
  size_t num_stacks = 0;
};
inline World world;

inline Thread& me() { return *world.current; }

inline void wait(const char* what, const std::function<bool()>& ready) {
  if (ready()) return;
  Thread& self = me();
  self.ready = &ready, self.what = what;
  if (!_setjmp(self.resume)) _longjmp(world.scheduler, 1);
  self.ready = nullptr;
}

// Waits until `expected` threads have come; returns whether any of them gave `flag`.
inline bool meet(Meeting& m, int expected, bool flag, const char* what) {
  const int generation = m.generation;
  m.any |= flag;
  if (++m.arrived == expected) {
    m.last_any = m.any, m.arrived = m.any = 0;
    ++m.generation;
  }
  wait(what, [&m, generation] { return m.generation != generation; });
  return m.last_any;
}
inline bool meet_cta(int number, int num_threads, bool flag, const char* what) {
  return meet(me().cta->meetings[number], num_threads, flag, what);
}
inline void meet_warp() { meet_cta(-1 - me().index / kWarp, kWarp, false, "warp"); }

// The value of another lane. `from`: its number.
template <class X>
X exchange(X own, int from) {
  Thread& self = me();
  const int lane = self.index % kWarp, first = self.index - lane, half = self.exchanges++ % 2 * self.cta->num_threads;
  static_assert(sizeof(X) <= 8);
  memcpy(&self.cta->slots[half + self.index], &own, sizeof(X));
  meet_warp();
  X other;
  memcpy(&other, &self.cta->slots[half + first + from], sizeof(X));
  return other;
}

// Static shared memory: one variable of each type per CTA.
template <class X>
X& shared() {
  Cta& cta = *me().cta;
  const auto known = cta.statics.find(typeid(X).name());
  if (known != cta.statics.end()) return *reinterpret_cast<X*>(cta.base() + known->second);
  const size_t offset = (cta.static_used + 15) / 16 * 16;
  cta.static_used = offset + sizeof(X);
  if (cta.static_used > kStaticBytes) throw std::runtime_error("more static shared memory than simt.h has");
  cta.statics[typeid(X).name()] = offset;
  return *reinterpret_cast<X*>(cta.base() + offset);
}
inline unsigned char* dynamic_shared() { return me().cta->base() + kStaticBytes; }

// The same variable in another CTA of the cluster.
template <class X>
X* in_cta(X* mine, unsigned rank) {
  Cta& own = *me().cta;
  return reinterpret_cast<X*>(world.ctas[rank].base() + (reinterpret_cast<unsigned char*>(mine) - own.base()));
}

inline void fiber() {
  try {
    world.kernel();
  } catch (...) {
    world.error = std::current_exception();
  }
  me().done = true;
  _longjmp(world.scheduler, 1);
}

inline void resume(Thread& thread) {
  world.current = &thread;
  if (_setjmp(world.scheduler)) return;  // the fiber waits or is done
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void run_cluster(unsigned first_block, unsigned cluster, unsigned num_threads, size_t dynamic_bytes) {
  const size_t total = size_t(cluster) * num_threads;
  if (world.num_stacks < total) {
    if (world.stacks) munmap(world.stacks, world.num_stacks * kStackBytes);
    void* memory = mmap(nullptr, total * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    world.stacks = static_cast<unsigned char*>(memory), world.num_stacks = total;
  }
  world.ctas.assign(cluster, Cta());
  world.threads.assign(total, Thread());
  world.asynchronous.clear();
  world.cluster = Meeting();
  world.barriers.clear();
  world.stores.clear();
  for (unsigned rank = 0; rank < cluster; ++rank) {
    Cta& cta = world.ctas[rank];
    cta.rank = int(rank), cta.block = first_block + rank, cta.num_threads = int(num_threads);
    cta.memory.assign((kStaticBytes + dynamic_bytes + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u});  // NaN until written
    cta.slots.assign(2 * num_threads, 0);
    for (unsigned i = 0; i < num_threads; ++i) {
      Thread& thread = world.threads[rank * num_threads + i];
      thread.index = int(i), thread.cta = &cta;
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = world.stacks + (rank * num_threads + i) * kStackBytes;
      thread.start.uc_stack.ss_size = kStackBytes;
      makecontext(&thread.start, fiber, 0);
    }
  }
  std::vector<size_t> order(total);
  for (size_t i = 0; i < total; ++i) order[i] = i;
  for (size_t left = total; left;) {
    bool moved = false;
    const size_t turn = world.random() % total;
    const bool backwards = world.random() % 2;
    for (size_t i = 0; i < total; ++i) {
      Thread& thread = world.threads[order[(turn + (backwards ? total - 1 - i : i)) % total]];
      if (thread.done || (thread.ready && !(*thread.ready)())) continue;
      resume(thread);
      if (world.error) std::rethrow_exception(std::exchange(world.error, nullptr));
      moved = true;
      left -= thread.done;
    }
    for (size_t i = 0; i < world.asynchronous.size();) {
      if (moved && world.random() % 4) { ++i; continue; }  // later
      const auto action = world.asynchronous[i];
      world.asynchronous.erase(world.asynchronous.begin() + long(i));
      action();
      moved = true;
    }
    if (!moved) {
      std::string text = "no thread can go on:";
      std::set<std::pair<unsigned, unsigned>> warps;  // of each the first thread that waits
      for (const Thread& thread : world.threads)
        if (!thread.done && warps.size() < 32 && warps.insert({thread.cta->block, unsigned(thread.index) / kWarp}).second)
          text += " [block " + std::to_string(thread.cta->block) + " thread " + std::to_string(thread.index) + "] " + thread.what;
      throw Stuck(text);
    }
    if (world.random() % 8 == 0) std::swap(order[world.random() % total], order[world.random() % total]);
  }
  while (!world.asynchronous.empty()) {  // what nobody has waited for
    const auto action = world.asynchronous.back();
    world.asynchronous.pop_back();
    action();
  }
}

inline void launch(unsigned grid, unsigned cluster, unsigned num_threads, size_t dynamic_bytes, std::function<void()> kernel) {
  world.kernel = std::move(kernel), world.grid = grid;
  for (unsigned block = 0; block < grid; block += cluster) run_cluster(block, cluster, num_threads, dynamic_bytes);
}

}  // namespace simt

// CUDA's variables of one dimension: x is looked up where it is read.
template <class Look>
struct Index {
  struct { operator unsigned() const { return Look()(); } } x;
};
struct ThreadIndex { unsigned operator()() const { return unsigned(simt::me().index); } };
struct BlockIndex { unsigned operator()() const { return simt::me().cta->block; } };
struct GridSize { unsigned operator()() const { return simt::world.grid; } };
inline const Index<ThreadIndex> threadIdx = {};
inline const Index<BlockIndex> blockIdx = {};
inline const Index<GridSize> gridDim = {};
#define SRPO_SHARED(type, name) type& name = simt::shared<type>()
#define SRPO_DYNAMIC_SHARED(name) unsigned char* name = simt::dynamic_shared()

inline void __syncthreads() { simt::meet_cta(0, simt::me().cta->num_threads, false, "__syncthreads"); }
inline int __syncthreads_or(int flag) { return simt::meet_cta(0, simt::me().cta->num_threads, flag != 0, "__syncthreads_or"); }
inline void __syncwarp() { simt::meet_warp(); }
template <class X> X __shfl_xor_sync(uint32_t, X x, int mask) { return simt::exchange(x, simt::me().index % simt::kWarp ^ mask); }
template <class X> X __shfl_up_sync(uint32_t, X x, int by) {
  const int lane = simt::me().index % simt::kWarp;
  return simt::exchange(x, lane < by ? lane : lane - by);
}
inline uint32_t atomicAdd(uint32_t* p, uint32_t x) { const uint32_t old = *p; *p += x; return old; }
inline uint32_t atomicOr(uint32_t* p, uint32_t x) { const uint32_t old = *p; *p |= x; return old; }
