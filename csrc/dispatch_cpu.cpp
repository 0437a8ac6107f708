// The entry point of the CPU library: picks the widest instruction set of this machine.
#include "rows.h"

namespace srpo {
bool rows_portable(const RowArgs&);
#ifdef SRPO_X86
bool rows_avx2(const RowArgs&);
bool rows_avx512(const RowArgs&);
#endif
#ifdef SRPO_AVX512BF16  // the compiler knows it
bool rows_avx512bf16(const RowArgs&);
#endif
}  // namespace srpo

// 3 AVX-512 with BF16, 2 AVX-512, 1 AVX2, 0 none of them.
extern "C" int srpo_cpu_level() {
#ifdef SRPO_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
#ifdef SRPO_AVX512BF16
    if (__builtin_cpu_supports("avx512bf16")) return 3;
#endif
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

// Runs `args` with instruction set `level`; negative: the best one. Returns 0 for success, 1 if the level is unavailable, 2 if a
// label or a kept id is not a column of the logits; such rows are left out.
extern "C" int srpo_cpu_rows(const srpo::RowArgs* args, int level) {
  const int best = srpo_cpu_level();
  if (level > best) return 1;
  bool good;
  switch (level < 0 ? best : level) {
#ifdef SRPO_AVX512BF16
    case 3: good = srpo::rows_avx512bf16(*args); break;
#endif
#ifdef SRPO_X86
    case 2: good = srpo::rows_avx512(*args); break;
    case 1: good = srpo::rows_avx2(*args); break;
#endif
    default: good = srpo::rows_portable(*args);
  }
  return good ? 0 : 2;
}

extern "C" int64_t srpo_cpu_args_bytes() { return sizeof(srpo::RowArgs); }
