// Shared by the kernels: number types, 16-byte vectors, span tables, error checks. Needs only the
// CUDA runtime, so it compiles without torch and without a GPU.
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

// Return the stream, with its device made current. torch has already done so, but only in its own
// copy of the CUDA runtime; this library carries another, so that it works with every torch.
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

// N numbers that are loaded and stored together, up to 16 bytes at a time.
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

// Passed to kernels by value, which needs no copy to the device and no wait. Kernels count in units
// of their choice: rows, or vectors of a row.
constexpr int kMaxSpans = 64;

struct SpanTable {
  int count;
  int64_t start[kMaxSpans];      // each span's first unit in the full tensor
  int64_t first[kMaxSpans + 1];  // each span's first unit in the packed tensor; [count]: the end

  // The position in the full tensor of packed unit `i`.
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

// Call launch(table, first packed unit, number of units) once per kMaxSpans spans.
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
