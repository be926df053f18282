// What the kernels share: number types, 16-byte vectors, span tables, error checks. CUDA runtime
// only, so that this compiles with no torch and no GPU at hand.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../ops.h"

namespace hdp::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("hdp: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// The stream, with its device current. Torch has made it current already, but in its own copy of
// the CUDA runtime: this library carries one, so that it fits every torch.
inline cudaStream_t open(Queue queue) {
  check(cudaSetDevice(queue.device), "cudaSetDevice");
  return static_cast<cudaStream_t>(queue.stream);
}

// ---- numbers ----

using bf16 = __nv_bfloat16;
using f16 = __half;

// f(T{}) with the type that `dtype` names.
template <class F>
void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

__device__ inline double up(double x) { return x; }
__device__ inline float up(float x) { return x; }
__device__ inline float up(bf16 x) { return __bfloat162float(x); }
__device__ inline float up(f16 x) { return __half2float(x); }

template <class T, class S>
__device__ inline T down(S x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, f16>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// ---- vectors ----

// N numbers that are loaded and stored together, 16 bytes at a time where they have as many.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T at[N];

  __device__ static Vector load(const T* from) { return *reinterpret_cast<const Vector*>(from); }
  __device__ void store(T* to) const { *reinterpret_cast<Vector*>(to) = *this; }
};

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// ---- spans ----

// Travels to the kernel by value: no copy to the device, nothing to wait for. `unit` is what the
// kernel counts in (rows, or vectors of a row).
constexpr int kMaxSpans = 64;

struct SpanTable {
  int count;
  int64_t start[kMaxSpans];      // where a span lies in the tensor that has more
  int64_t first[kMaxSpans + 1];  // and in the packed one; [count]: the end

  // Where packed unit `i` lies in the tensor that has more.
  __device__ int64_t find(int64_t i) const {
    int low = 0, high = count;  // first[low] <= i < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= i) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return start[low] + (i - first[low]);
  }
};

// launch(table, first packed unit, number of units) for every kMaxSpans spans.
template <class F>
void for_each_table(const Spans& spans, int64_t units_per_row, const F& launch) {
  for (size_t begin = 0; begin < spans.size(); begin += kMaxSpans) {
    SpanTable table;
    table.count = static_cast<int>(std::min<size_t>(kMaxSpans, spans.size() - begin));
    const int64_t first = spans[begin].first;
    for (int i = 0; i < table.count; ++i) {
      const Span& span = spans[begin + i];
      table.start[i] = span.start * units_per_row;
      table.first[i] = (span.first - first) * units_per_row;
    }
    const Span& last = spans[begin + table.count - 1];
    table.first[table.count] = (last.first + last.stop - last.start - first) * units_per_row;
    launch(table, first * units_per_row, table.first[table.count]);
  }
}

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace hdp::cuda
