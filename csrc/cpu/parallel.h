// Parallel loops on torch's own threads, and functions compiled for several instruction sets.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <stdexcept>

// One build runs on any x86-64: the loader picks the best variant that the machine supports. The
// variants are feature levels rather than one vendor's models (like "arch=haswell"). With
// -ffp-contract=off, all variants give the same results.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define HDP_VECTORIZED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define HDP_VECTORIZED __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#else
#define HDP_VECTORIZED
#endif
#define HDP_INLINE __attribute__((always_inline)) inline

namespace hdp::cpu {

// Call f(begin, end) on parts of [0, size) with at least `grain` items each. f must not throw.
template <class F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&f));
  if (torch_parallel_for(0, size, grain < 1 ? 1 : grain, call, context) != 0) {
    throw std::runtime_error("hdp: torch_parallel_for failed");
  }
}

}  // namespace hdp::cpu
