// merge_lse_ on CPU: one pass over out and block_out, in place.

#include <algorithm>
#include <cmath>
#include <limits>

#include "number.h"

namespace hdp::cpu {
namespace {

// out += weight * (block - out), over one row of one head.
template <class T, class B>
HDP_VECTORIZED void blend(T* __restrict__ out, const B* __restrict__ block, T weight, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) out[i] += weight * (load(block[i]) - out[i]);
}

// lse <- log(exp(lse) + exp(block_lse)); returns the block's weight sigmoid(block_lse - lse). If
// both lse are -infinity (a row without any keys), the result is not NaN.
template <class T>
T merge_statistics(T& lse, T block_lse) {
  const T difference = lse == block_lse ? T{0} : block_lse - lse;
  const T small = std::exp(-std::abs(difference));
  const T largest = lse > block_lse ? lse : block_lse;
  lse = difference == difference ? largest + std::log1p(small) : difference;
  return (difference >= 0 ? T{1} : small) / (T{1} + small);
}

template <class T, class B>
void merge(const MergeLse& args) {
  const int64_t packed = num_packed_rows(args.spans), heads = args.heads, dim = args.dim;
  const auto* block_lse = static_cast<const T*>(args.block_lse);
  auto* lse = static_cast<T*>(args.lse);
  parallel_for(packed, 32768 / std::max<int64_t>(1, heads * dim), [&](int64_t begin, int64_t end) {
    auto span = std::upper_bound(args.spans.begin(), args.spans.end(), begin,
                                 [](int64_t row, const Span& s) { return row < s.first; }) -
                1;
    for (int64_t packed_row = begin; packed_row < end; ++packed_row) {
      if (packed_row - span->first == span->stop - span->start) ++span;
      const int64_t row = span->start + packed_row - span->first;
      T* out = static_cast<T*>(args.out) + row * args.out_row_stride;
      const B* block =
          static_cast<const B*>(args.block_out) + packed_row * args.block_out_row_stride;
      for (int64_t head = 0; head < heads; ++head) {
        const T weight =
            merge_statistics(lse[head * args.lse_head_stride + row],
                             block_lse[head * args.block_lse_head_stride + packed_row]);
        blend(out + head * dim, block + head * dim, weight, dim);
      }
    }
  });
}

}  // namespace

void merge_lse(const MergeLse& args) {
  if (args.dtype == DType::f64) return merge<double, double>(args);
  visit(args.block_dtype, [&](auto block) {
    if constexpr (!std::is_same_v<decltype(block), double>) merge<float, decltype(block)>(args);
  });
}

}  // namespace hdp::cpu
