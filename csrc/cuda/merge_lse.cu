// merge_lse_ on CUDA. Memory bound: out is read and written once, block_out is read once.
//
// Each block handles 8 rows x 8 heads. Eight rows because lse is (heads, rows), and eight
// consecutive fp32 numbers of a head fill a 32-byte sector. First, 64 threads merge one lse each;
// they write it back immediately (no other thread reads it) and put the weight in shared memory.
// Then all threads stream the rows.

#include "device.cuh"

namespace hdp::cuda {
namespace {

constexpr int kThreads = 256, kRows = 8, kHeads = 8;
constexpr int kUnroll = 2;  // vectors per thread whose loads are in flight together

template <class T, class B>
struct Arguments {
  T* out;
  T* lse;
  const B* block_out;
  const T* block_lse;
  int heads, dim;
  int64_t num_rows, out_row_stride, block_out_row_stride, lse_head_stride, block_lse_head_stride;
  SpanTable spans;
};

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float log_one_plus(float x) { return log1pf(x); }
__device__ inline double log_one_plus(double x) { return log1p(x); }

template <class T, class B, int N>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ Arguments<T, B> args) {
  __shared__ T weights[kHeads][kRows];
  __shared__ int64_t row_of[kRows];
  const int64_t packed_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int head = blockIdx.y * kHeads;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), args.num_rows - packed_row));
  const int heads = min(kHeads, args.heads - head);

  if (threadIdx.x < kRows * kHeads) {
    const int r = threadIdx.x % kRows, h = threadIdx.x / kRows;
    if (r < rows && h < heads) {
      const int64_t row = args.spans.find(packed_row + r);
      if (h == 0) row_of[r] = row;
      T& lse = args.lse[(head + h) * args.lse_head_stride + row];
      const T a = lse, b = args.block_lse[(head + h) * args.block_lse_head_stride + packed_row + r];
      // not NaN if both are -infinity, as for rows without any keys
      const T difference = a == b ? T{0} : b - a;
      const T small = exponential(-abs(difference));
      lse = difference == difference ? (a > b ? a : b) + log_one_plus(small) : difference;
      weights[h][r] = (difference >= 0 ? T{1} : small) / (T{1} + small);
    }
  }
  __syncthreads();

  const int per_head = args.dim / N, per_row = heads * per_head, total = rows * per_row;
  T* const out = args.out + static_cast<int64_t>(head) * args.dim;
  const B* const block = args.block_out + packed_row * args.block_out_row_stride +
                         static_cast<int64_t>(head) * args.dim;
  for (int base = threadIdx.x; base < total; base += kThreads * kUnroll) {
    Vector<T, N> ours[kUnroll];
    Vector<B, N> theirs[kUnroll];
    T* to[kUnroll];
    T weight[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads;
      if (i < total) {
        const int r = i / per_row, in_row = i - r * per_row;
        to[u] = out + row_of[r] * args.out_row_stride + in_row * N;
        ours[u] = Vector<T, N>::load(to[u]);
        theirs[u] = Vector<B, N>::load(block + r * args.block_out_row_stride + in_row * N);
        weight[u] = weights[in_row / per_head][r];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * kThreads < total) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          ours[u].at[n] += weight[u] * (up(theirs[u].at[n]) - ours[u].at[n]);
        }
        ours[u].store(to[u]);
      }
    }
  }
}

template <class T, class B>
void merge(const MergeLse& args, cudaStream_t stream) {
  // 16 bytes of the narrower type
  constexpr int kVector = 16 / static_cast<int>(sizeof(B));
  const bool vectors = args.dim % kVector == 0 && args.out_row_stride % kVector == 0 &&
                       args.block_out_row_stride % kVector == 0 && is_aligned(args.out, 16) &&
                       is_aligned(args.block_out, 16);
  for_each_table(args.spans, 1, [&](const SpanTable& table, int64_t first, int64_t num_rows) {
    const Arguments<T, B> kernel_args{
        static_cast<T*>(args.out),
        static_cast<T*>(args.lse),
        static_cast<const B*>(args.block_out) + first * args.block_out_row_stride,
        static_cast<const T*>(args.block_lse) + first,
        static_cast<int>(args.heads),
        static_cast<int>(args.dim),
        num_rows,
        args.out_row_stride,
        args.block_out_row_stride,
        args.lse_head_stride,
        args.block_lse_head_stride,
        table};
    const dim3 grid(ceil_div(num_rows, kRows), ceil_div(args.heads, kHeads));
    if (vectors) {
      merge_kernel<T, B, kVector><<<grid, kThreads, 0, stream>>>(kernel_args);
    } else {
      merge_kernel<T, B, 1><<<grid, kThreads, 0, stream>>>(kernel_args);
    }
    check_launch("merge_lse_");
  });
}

}  // namespace

void merge_lse(const MergeLse& args, Queue queue) {
  const cudaStream_t stream = open(queue);
  if (args.dtype == DType::f64) return merge<double, double>(args, stream);
  visit(args.block_dtype, [&](auto block) {
    using B = decltype(block);
    if constexpr (!std::is_same_v<B, double>) merge<float, B>(args, stream);
  });
}

}  // namespace hdp::cuda
