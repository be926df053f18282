// Softmax cross-entropy on CPU. Each row is processed in tiles that fit in the L1 cache: convert to
// fp32, then update the maximum and the sum of exponentials with a running rescale ("online"
// softmax), or compute the gradient. Logits are read once, and the backward writes them once.

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "number.h"

namespace hdp::cpu {
namespace {

constexpr int64_t kTile = 1024;

template <class T>
using Statistic = std::conditional_t<std::is_same_v<T, double>, double, float>;

HDP_INLINE double exponential(double x) { return std::exp(x); }

// exp of a float to within 2 ulp in straight-line code, which vectorizes, unlike a library call.
// From Cephes: x = k ln 2 + r, a polynomial in r, then the exponent bits of 2^k in two halves, so
// that results are right down to the smallest subnormal. NaN stays NaN.
HDP_INLINE float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves a rounded integer in low bits
  const float shifted = x * 1.44269504f + shift;
  const float k = shifted - shift;
  const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(float2bits(shifted)) - 0x4b400000;
  const int32_t half = exponent >> 1;
  return p * bits2float(static_cast<uint32_t>(half + 127) << 23) *
         bits2float(static_cast<uint32_t>(exponent - half + 127) << 23);
}

template <class T, class S>
HDP_VECTORIZED void load_tile(const T* __restrict__ x, S* __restrict__ tile, int64_t size) {
  for (int64_t i = 0; i < size; ++i) tile[i] = load(x[i]);
}

template <class T, class S>
HDP_VECTORIZED void store_tile(const S* __restrict__ tile, T* __restrict__ x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) store(tile[i], &x[i]);
}

// Reduces by halving, because a running maximum or sum does not vectorize. The sum is thereby a
// balanced tree, which is also more accurate than a running sum.
template <class S>
HDP_VECTORIZED S maximum(const S* __restrict__ tile, S* __restrict__ scratch) {
  for (int64_t i = 0; i < kTile / 2; ++i) {
    scratch[i] = tile[i] > tile[i + kTile / 2] ? tile[i] : tile[i + kTile / 2];
  }
  for (int64_t half = kTile / 4; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      scratch[i] = scratch[i] > scratch[i + half] ? scratch[i] : scratch[i + half];
    }
  }
  return scratch[0];
}

template <class S>
HDP_VECTORIZED S sum_of_exponentials(const S* __restrict__ tile, S* __restrict__ scratch, S shift) {
  for (int64_t i = 0; i < kTile; ++i) scratch[i] = exponential(tile[i] - shift);
  for (int64_t half = kTile / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) scratch[i] += scratch[i + half];
  }
  return scratch[0];
}

// tile <- -scale * exp(tile - lse)
template <class S>
HDP_VECTORIZED void scaled_softmax(S* __restrict__ tile, int64_t size, S lse, S scale) {
  for (int64_t i = 0; i < size; ++i) tile[i] = scale * exponential(tile[i] - lse);
}

// tile <- cap * tanh(tile / cap); slope, if wanted, <- its derivative.
template <class S>
void cap_tile(S* tile, S* slope, int64_t size, S cap) {
  for (int64_t i = 0; i < size; ++i) {
    const S t = std::tanh(tile[i] / cap);
    tile[i] = cap * t;
    if (slope) slope[i] = S{1} - t * t;
  }
}

// The initial maximum. It must be finite, because -infinity minus itself is NaN.
template <class S>
constexpr S kLowest = std::numeric_limits<S>::lowest();

template <class T>
void forward(const CrossEntropy& args) {
  using S = Statistic<T>;
  const S cap = static_cast<S>(args.softcap);
  parallel_for(args.rows, 32768 / args.vocab, [&](int64_t begin, int64_t end) {
    alignas(64) S tile[kTile], scratch[kTile];
    for (int64_t row = begin; row < end; ++row) {
      auto& logprob = static_cast<S*>(args.logprobs)[row];
      auto& lse = static_cast<S*>(args.lse)[row];
      const int64_t label = args.labels[row];
      if (label == kIgnoreIndex) {
        logprob = lse = 0;
        continue;
      }
      const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
      S largest = kLowest<S>;
      double total = 0;  // of all tiles so far; within a tile the sum is a tree
      for (int64_t at = 0; at < args.vocab; at += kTile) {
        const int64_t size = std::min(kTile, args.vocab - at);
        const S* y = tile;
        if (std::is_same_v<T, S> && cap == 0 && size == kTile) {
          y = reinterpret_cast<const S*>(logits + at);  // no conversion, no copy
        } else {
          load_tile(logits + at, tile, size);
          if (cap != 0) cap_tile<S>(tile, nullptr, size, cap);
          std::fill(tile + size, tile + kTile, -std::numeric_limits<S>::infinity());
        }
        const S higher = std::max(largest, maximum(y, scratch));
        total *= std::exp(static_cast<double>(largest) - static_cast<double>(higher));
        largest = higher;
        total += static_cast<double>(sum_of_exponentials(y, scratch, largest));
      }
      S picked = load(logits[label]);
      if (cap != 0) cap_tile<S>(&picked, nullptr, 1, cap);
      const S log_total = static_cast<S>(std::log(total));
      lse = largest + log_total;
      logprob = (picked - largest) - log_total;  // picked - lse would round log_total away
    }
  });
}

// d/d y_j = grad_logprob * (1[j == label] - softmax_j) + grad_lse * softmax_j, times the cap's
// slope. If G is narrower than T, gradients only overwrite logits that have already been read.
template <class T, class G>
void backward(const CrossEntropyBackward& args) {
  using S = Statistic<T>;
  const S cap = static_cast<S>(args.softcap);
  parallel_for(args.rows, 32768 / args.vocab, [&](int64_t begin, int64_t end) {
    alignas(64) S tile[kTile], slope[kTile];
    for (int64_t row = begin; row < end; ++row) {
      const T* logits = static_cast<T*>(args.logits) + row * args.row_stride;
      G* grads = reinterpret_cast<G*>(static_cast<T*>(args.logits) + row * args.row_stride);
      const int64_t label = args.labels[row];
      if (label == kIgnoreIndex) {
        std::memset(static_cast<void*>(grads), 0, static_cast<size_t>(args.vocab) * sizeof(G));
        continue;
      }
      const S grad = static_cast<const S*>(args.grad_logprobs)[row];
      const S scale = (args.grad_lse ? static_cast<const S*>(args.grad_lse)[row] : S{0}) - grad;
      const S lse = static_cast<const S*>(args.lse)[row];
      for (int64_t at = 0; at < args.vocab; at += kTile) {
        const int64_t size = std::min(kTile, args.vocab - at);
        load_tile(logits + at, tile, size);
        if (cap != 0) cap_tile(tile, slope, size, cap);
        scaled_softmax(tile, size, lse, scale);
        if (at <= label && label < at + size) tile[label - at] += grad;
        if (cap != 0) {
          for (int64_t i = 0; i < size; ++i) tile[i] *= slope[i];
        }
        store_tile(tile, grads + at, size);
      }
    }
  });
}

// Cheap on a CPU. On a GPU such a row gets NaN instead.
void check_labels(const int64_t* labels, int64_t rows, int64_t vocab) {
  for (int64_t row = 0; row < rows; ++row) {
    if (labels[row] != kIgnoreIndex && (labels[row] < 0 || labels[row] >= vocab)) {
      throw std::runtime_error("softmax_cross_entropy: label " + std::to_string(labels[row]) +
                               " of row " + std::to_string(row) +
                               " is outside of the vocabulary of " + std::to_string(vocab));
    }
  }
}

}  // namespace

void cross_entropy(const CrossEntropy& args) {
  check_labels(args.labels, args.rows, args.vocab);
  visit(args.dtype, [&](auto logit) { forward<decltype(logit)>(args); });
}

void cross_entropy_backward(const CrossEntropyBackward& args) {
  check_labels(args.labels, args.rows, args.vocab);
  if (args.grad_dtype == args.dtype) {
    visit(args.dtype, [&](auto logit) { backward<decltype(logit), decltype(logit)>(args); });
  } else if (args.grad_dtype == DType::bf16) {
    backward<float, bf16>(args);
  } else {
    backward<float, f16>(args);
  }
}

}  // namespace hdp::cpu
