// Vectors of the processor's width, for kernels in which how much fits into the registers is part
// of the code: for these the compiler's target_clones will not do.

#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace fedkn {

// How wide the vectors are and how many numbers of a product are kept in registers: for 32
// registers of 16 numbers, and for 16 of 8.
struct Wide {
  static constexpr int64_t lanes = 16, rows = 8;
};
struct Narrow {
  static constexpr int64_t lanes = 8, rows = 4;
};

template <int64_t lanes>
struct Vector {
  typedef float Type __attribute__((vector_size(4 * lanes)));
};

// A vector begins where it begins: not aligned.
template <class V>
INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void store(float* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define NARROW __attribute__((target("avx2,fma")))

// The numbers of a vector of this processor; 0: it has none of these.
inline int64_t processors_lanes() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Wide::lanes : Narrow::lanes;
}
#else
#define WIDE
#define NARROW

inline int64_t processors_lanes() { return 0; }
#endif

template <class F>
WIDE void run_wide(F f) {
  f(Wide());
}
template <class F>
NARROW void run_narrow(F f) {
  f(Narrow());
}

// Calls f(level), compiled for vectors of so many numbers.
template <class F>
void run(int64_t lanes, F f) {
  if (lanes == Wide::lanes) return run_wide(f);
  if (lanes == Narrow::lanes) return run_narrow(f);
  f(Narrow());  // by whatever the processor has
}

}  // namespace fedkn
