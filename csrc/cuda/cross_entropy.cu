// Softmax cross-entropy on CUDA, one block per row: "online" maximum and sum in fp32 (fp64 for fp64
// logits). Forward reads the logits once; backward reads and writes them once, in place. Memory
// bound: a bf16 row needs one exponential per 2 (forward) or 4 (backward) bytes, and the special
// function units keep up with that.

#include "device.cuh"

namespace hdp::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kUnroll = 4;  // vectors per thread whose loads are in flight together

template <class T>
using Statistic = std::conditional_t<std::is_same_v<T, double>, double, float>;

// exp as one special-function instruction, to within 2 ulp: the argument is never far above 0.
// Results below 2^-126 become 0.
__device__ inline float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ inline double exponential(double x) { return exp(x); }

template <class S>
struct Lowest;  // finite: -infinity minus itself would be NaN
template <>
struct Lowest<float> {
  static constexpr float value = -3.402823466e+38f;
};
template <>
struct Lowest<double> {
  static constexpr double value = -1.7976931348623157e+308;
};

template <class S>
__device__ inline S capped(S x, S cap) {
  return cap * tanh(x / cap);
}

// ---- forward ----

template <class S>
struct Sum {
  S largest = Lowest<S>::value, total = 0;  // total = sum(exp(y - largest))

  template <int N>
  __device__ void add(const S (&y)[N]) {
    S higher = largest;
#pragma unroll
    for (int n = 0; n < N; ++n) higher = fmax(higher, y[n]);  // ignores NaN; the sum does not
    if (higher > largest) {
      total *= exponential(largest - higher);
      largest = higher;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) total += exponential(y[n] - largest);
  }

  __device__ void join(S other_largest, S other_total) {
    const S higher = fmax(largest, other_largest);
    total =
        total * exponential(largest - higher) + other_total * exponential(other_largest - higher);
    largest = higher;
  }
};

// The block's sum, on the first thread. The order is fixed, so equal inputs give equal bits.
template <class S>
__device__ Sum<S> reduce(Sum<S> sum) {
  __shared__ S largest[kWarps], total[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum.join(__shfl_down_sync(~0u, sum.largest, distance),
             __shfl_down_sync(~0u, sum.total, distance));
  }
  if (lane == 0) {
    largest[warp] = sum.largest;
    total[warp] = sum.total;
  }
  __syncthreads();
  if (warp == 0) {
    sum.largest = lane < kWarps ? largest[lane] : Lowest<S>::value;
    sum.total = lane < kWarps ? total[lane] : S{0};
#pragma unroll
    for (int distance = kWarps / 2; distance > 0; distance /= 2) {
      sum.join(__shfl_down_sync(~0u, sum.largest, distance),
               __shfl_down_sync(~0u, sum.total, distance));
    }
  }
  return sum;
}

// Two blocks per multiprocessor leave 64 registers per thread, too few for tanh of fp64.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

template <class T, bool kCap>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    forward_kernel(const T* __restrict__ all_logits, const int64_t* __restrict__ labels,
                   Statistic<T>* __restrict__ logprobs, Statistic<T>* __restrict__ all_lse,
                   int vocab, int64_t row_stride, Statistic<T> cap) {
  using S = Statistic<T>;
  constexpr int N = 16 / sizeof(T);
  const int64_t row = blockIdx.x, label = labels[row];
  if (label == kIgnoreIndex) {
    if (threadIdx.x == 0) logprobs[row] = all_lse[row] = 0;
    return;
  }
  const T* const logits = all_logits + row * row_stride;
  const auto value = [cap](T x) { return kCap ? capped<S>(up(x), cap) : S(up(x)); };

  // A row may start anywhere: read scalars before the first 16-byte boundary and after the last.
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  const int head = min(vocab, misaligned ? N - misaligned : 0);
  const int vectors = (vocab - head) / N, tail = head + vectors * N;
  Sum<S> sum;
  if (threadIdx.x < head) sum.add({value(logits[threadIdx.x])});
  if (tail + threadIdx.x < vocab) sum.add({value(logits[tail + threadIdx.x])});

  const T* const body = logits + head;
  int i = threadIdx.x;
  for (; i + (kUnroll - 1) * kThreads < vectors; i += kUnroll * kThreads) {
    Vector<T, N> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) x[u] = Vector<T, N>::load(body + (i + u * kThreads) * N);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      S y[N];
#pragma unroll
      for (int n = 0; n < N; ++n) y[n] = value(x[u].at[n]);
      sum.add(y);
    }
  }
  for (; i < vectors; i += kThreads) {
    const auto x = Vector<T, N>::load(body + i * N);
    S y[N];
#pragma unroll
    for (int n = 0; n < N; ++n) y[n] = value(x.at[n]);
    sum.add(y);
  }

  sum = reduce(sum);
  if (threadIdx.x == 0) {
    const S log_total = log(sum.total);
    all_lse[row] = sum.largest + log_total;
    // A kernel cannot raise for a label outside the vocabulary; NaN stops the step instead.
    const bool valid = label >= 0 && label < vocab;
    // picked - lse would round log_total away if logits are large
    logprobs[row] = valid ? value(logits[label]) - sum.largest - log_total : S(nanf(""));
  }
}

template <class T>
void forward(const CrossEntropy& args, cudaStream_t stream) {
  using S = Statistic<T>;
  const auto kernel = args.softcap == 0 ? forward_kernel<T, false> : forward_kernel<T, true>;
  kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(
      static_cast<const T*>(args.logits), args.labels, static_cast<S*>(args.logprobs),
      static_cast<S*>(args.lse), static_cast<int>(args.vocab), args.row_stride,
      static_cast<S>(args.softcap));
  check_launch("softmax_cross_entropy");
}

// ---- backward ----

template <class T>
struct BackwardArguments {
  T* logits;
  const int64_t* labels;
  const Statistic<T>*lse, *grad_logprobs, *grad_lse;
  int vocab;
  int64_t row_stride;
  Statistic<T> cap;
};

// d/d y_j = grad * 1[j == label] + scale * softmax_j, times the slope of the cap.
template <class S, bool kCap>
struct Row {
  S lse, grad, scale, cap;
  int label;

  __device__ S gradient(S x, int j) const {
    S slope = 1;
    if constexpr (kCap) {
      const S t = tanh(x / cap);
      x = cap * t;
      slope = S{1} - t * t;
    }
    return (scale * exponential(x - lse) + (j == label ? grad : S{0})) * slope;
  }
};

// Gradients (G) overwrite the logits (T). If G is narrower, gradient j lands on logit j / 2, so all
// threads must have read a tile before any of them writes its gradients, which never reach the
// logits of later tiles.
template <class T, class G, int N, bool kCap>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_kernel(const __grid_constant__ BackwardArguments<T> args) {
  using S = Statistic<T>;
  constexpr bool kNarrow = sizeof(G) < sizeof(T);
  const int64_t row = blockIdx.x;
  T* const logits = args.logits + row * args.row_stride;
  G* const grads = reinterpret_cast<G*>(logits);
  const int64_t label = args.labels[row];
  if (label == kIgnoreIndex) {
    for (int j = threadIdx.x; j < args.vocab; j += kThreads) grads[j] = down<G>(S{0});
    return;
  }
  Row<S, kCap> it;
  it.lse = label >= 0 && label < args.vocab ? args.lse[row] : S(nanf(""));
  it.grad = args.grad_logprobs[row];
  it.scale = (args.grad_lse ? args.grad_lse[row] : S{0}) - it.grad;
  it.cap = args.cap;
  it.label = static_cast<int>(label);

  // As in forward. The narrow kernel with N > 1 is only launched on aligned rows.
  int head = 0;
  if constexpr (!kNarrow && N > 1) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    head = min(args.vocab, misaligned ? N - misaligned : 0);
    if (threadIdx.x < head) {
      grads[threadIdx.x] = down<G>(it.gradient(up(logits[threadIdx.x]), threadIdx.x));
    }
  }
  const int vectors = (args.vocab - head) / N;
  for (int base = 0; base < vectors; base += kThreads * kUnroll) {
    Vector<T, N> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads + threadIdx.x;
      if (i < vectors) x[u] = Vector<T, N>::load(logits + head + i * N);
    }
    if constexpr (kNarrow) __syncthreads();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads + threadIdx.x;
      if (i < vectors) {
        Vector<G, N> y;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          y.at[n] = down<G>(it.gradient(up(x[u].at[n]), head + i * N + n));
        }
        y.store(grads + head + i * N);
      }
    }
  }
  if constexpr (N > 1) {
    const int j = head + vectors * N + threadIdx.x;  // fewer than N are left
    const S x = j < args.vocab ? up(logits[j]) : S{0};
    if constexpr (kNarrow) __syncthreads();
    if (j < args.vocab) grads[j] = down<G>(it.gradient(x, j));
  }
}

template <class T, class G, int N>
void launch_backward(const CrossEntropyBackward& args, cudaStream_t stream) {
  using S = Statistic<T>;
  const BackwardArguments<T> kernel_args{static_cast<T*>(args.logits),
                                         args.labels,
                                         static_cast<const S*>(args.lse),
                                         static_cast<const S*>(args.grad_logprobs),
                                         static_cast<const S*>(args.grad_lse),
                                         static_cast<int>(args.vocab),
                                         args.row_stride,
                                         static_cast<S>(args.softcap)};
  const auto kernel =
      args.softcap == 0 ? backward_kernel<T, G, N, false> : backward_kernel<T, G, N, true>;
  kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(kernel_args);
  check_launch("softmax_cross_entropy_backward_");
}

template <class G>
void launch_narrow(const CrossEntropyBackward& args, cudaStream_t stream) {
  // 8 numbers: 32 bytes in, 16 out
  if (is_aligned(args.logits, 16) && args.row_stride % 4 == 0) {
    launch_backward<float, G, 8>(args, stream);
  } else {
    launch_backward<float, G, 1>(args, stream);
  }
}

}  // namespace

void cross_entropy(const CrossEntropy& args, Queue queue) {
  const cudaStream_t stream = open(queue);
  visit(args.dtype, [&](auto logit) { forward<decltype(logit)>(args, stream); });
}

void cross_entropy_backward(const CrossEntropyBackward& args, Queue queue) {
  const cudaStream_t stream = open(queue);
  if (args.grad_dtype == args.dtype) {
    visit(args.dtype, [&](auto logit) {
      using T = decltype(logit);
      launch_backward<T, T, 16 / static_cast<int>(sizeof(T))>(args, stream);
    });
  } else if (args.grad_dtype == DType::bf16) {
    launch_narrow<bf16>(args, stream);
  } else {
    launch_narrow<f16>(args, stream);
  }
}

}  // namespace hdp::cuda
