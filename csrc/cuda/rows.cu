// gather_rows and scatter_rows_ on CUDA: one launch for up to 64 spans, which are passed as kernel
// arguments. Rows are dense, so a span is one run of memory, and a copy can work in units of up to
// 16 bytes without knowing about rows.

#include "device.cuh"

namespace hdp::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int kMaxOuter = 65535;  // the limit of a grid's y dimension

template <class Unit>
struct CopyArguments {
  Unit* x;
  Unit* values;
  int64_t units, outer, x_outer, values_outer;
  SpanTable spans;
};

template <class Unit, bool kGather>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ CopyArguments<Unit> args) {
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  for (int64_t outer = blockIdx.y; outer < args.outer; outer += gridDim.y) {
    Unit* const x = args.x + outer * args.x_outer;
    Unit* const values = args.values + outer * args.values_outer;
    Unit held[kUnroll];
    int64_t at[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i < args.units) {
        at[u] = args.spans.find(i);
        held[u] = kGather ? x[at[u]] : values[i];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i < args.units) {
        if constexpr (kGather) {
          values[i] = held[u];
        } else {
          x[at[u]] = held[u];
        }
      }
    }
  }
}

template <class Unit>
void copy(const CopyRows& args, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(Unit);
  for_each_table(
      args.spans, args.row_bytes / kSize,
      [&](const SpanTable& table, int64_t first, int64_t units) {
        const CopyArguments<Unit> kernel_args{
            static_cast<Unit*>(args.x), static_cast<Unit*>(args.values) + first, units, args.outer,
            args.x_outer_bytes / kSize, args.values_outer_bytes / kSize,         table};
        const dim3 grid(ceil_div(units, kThreads * kUnroll),
                        static_cast<unsigned>(std::min<int64_t>(args.outer, kMaxOuter)));
        if (args.gather) {
          copy_kernel<Unit, true><<<grid, kThreads, 0, stream>>>(kernel_args);
        } else {
          copy_kernel<Unit, false><<<grid, kThreads, 0, stream>>>(kernel_args);
        }
        check_launch("gather_rows / scatter_rows_");
      });
}

template <class T, class V>
struct AddArguments {
  T* x;
  const V* values;
  int64_t units, outer, x_outer, values_outer;
  SpanTable spans;  // in vectors
};

// Without the 4, ptxas aims for 48 registers and spills on sm_100.
template <class T, class V, int N>
__global__ void __launch_bounds__(kThreads, 4)
    add_kernel(const __grid_constant__ AddArguments<T, V> args) {
  constexpr int kLoads = 2;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * kLoads + threadIdx.x;
  for (int64_t outer = blockIdx.y; outer < args.outer; outer += gridDim.y) {
    Vector<T, N> sum[kLoads];
    Vector<V, N> value[kLoads];
    T* to[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t i = base + u * kThreads;
      if (i < args.units) {
        to[u] = args.x + outer * args.x_outer + args.spans.find(i) * N;
        sum[u] = Vector<T, N>::load(to[u]);
        value[u] = Vector<V, N>::load(args.values + outer * args.values_outer + i * N);
      }
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (base + u * kThreads < args.units) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          sum[u].at[n] = down<T>(up(sum[u].at[n]) + up(value[u].at[n]));
        }
        sum[u].store(to[u]);
      }
    }
  }
}

template <class T, class V, int N>
void add(const AddRows& args, cudaStream_t stream) {
  for_each_table(
      args.spans, args.row_size / N, [&](const SpanTable& table, int64_t first, int64_t units) {
        const AddArguments<T, V> kernel_args{static_cast<T*>(args.x),
                                             static_cast<const V*>(args.values) + first * N,
                                             units,
                                             args.outer,
                                             args.x_outer_stride,
                                             args.values_outer_stride,
                                             table};
        const dim3 grid(ceil_div(units, kThreads * 2),
                        static_cast<unsigned>(std::min<int64_t>(args.outer, kMaxOuter)));
        add_kernel<T, V, N><<<grid, kThreads, 0, stream>>>(kernel_args);
        check_launch("scatter_rows_");
      });
}

template <class T, class V>
void add_rows_as(const AddRows& args, cudaStream_t stream) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(V));
  const bool vectors = args.row_size % kVector == 0 && args.x_outer_stride % kVector == 0 &&
                       args.values_outer_stride % kVector == 0 && is_aligned(args.x, 16) &&
                       is_aligned(args.values, 16);
  if (vectors) {
    add<T, V, kVector>(args, stream);
  } else {
    add<T, V, 1>(args, stream);
  }
}

}  // namespace

void copy_rows(const CopyRows& args, Queue queue) {
  const cudaStream_t stream = open(queue);
  const auto fits = [&](int64_t bytes) {
    return args.row_bytes % bytes == 0 && args.x_outer_bytes % bytes == 0 &&
           args.values_outer_bytes % bytes == 0 && is_aligned(args.x, bytes) &&
           is_aligned(args.values, bytes);
  };
  if (fits(16)) return copy<uint4>(args, stream);
  if (fits(4)) return copy<unsigned>(args, stream);
  if (fits(2)) return copy<unsigned short>(args, stream);
  copy<unsigned char>(args, stream);
}

void add_rows(const AddRows& args, Queue queue) {
  const cudaStream_t stream = open(queue);
  visit(args.dtype, [&](auto x) {
    visit(args.values_dtype, [&](auto values) {
      using T = decltype(x);
      using V = decltype(values);
      // The combinations that bind.h allows: equal dtypes, or half precision added to fp32.
      if constexpr (std::is_same_v<T, V> ||
                    (std::is_same_v<T, float> && !std::is_same_v<V, double>)) {
        add_rows_as<T, V>(args, stream);
      }
    });
  });
}

}  // namespace hdp::cuda
