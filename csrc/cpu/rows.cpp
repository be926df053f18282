// gather_rows and scatter_rows_ on CPU. A span is one run of memory, so each is a few long copies.

#include <algorithm>
#include <type_traits>

#include "number.h"

namespace hdp::cpu {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;

// Call f(outer, row of x, packed row, number of rows) for pieces of the spans, in parallel.
template <class F>
void for_each_run(const Spans& spans, int64_t outer, int64_t row_bytes, const F& f) {
  const int64_t packed = num_packed_rows(spans);
  const int64_t grain = kGrainBytes / std::max<int64_t>(1, row_bytes);
  parallel_for(outer * packed, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t o = begin / packed, row = begin % packed;
      const Span& span = *(std::upper_bound(spans.begin(), spans.end(), row,
                                            [](int64_t r, const Span& s) { return r < s.first; }) -
                           1);
      const int64_t offset = row - span.first;
      const int64_t count = std::min(span.stop - span.start - offset, end - begin);
      f(o, span.start + offset, row, count);
      begin += count;
    }
  });
}

template <class T, class V>
HDP_VECTORIZED void add(T* __restrict__ x, const V* __restrict__ values, int64_t size) {
  // Half-precision numbers are added in fp32 and rounded once.
  for (int64_t i = 0; i < size; ++i) store(load(x[i]) + load(values[i]), &x[i]);
}

template <class T, class V>
void add_rows_as(const AddRows& args) {
  for_each_run(args.spans, args.outer, args.row_size * static_cast<int64_t>(sizeof(T)),
               [&](int64_t outer, int64_t row, int64_t packed_row, int64_t count) {
                 add(static_cast<T*>(args.x) + outer * args.x_outer_stride + row * args.row_size,
                     static_cast<const V*>(args.values) + outer * args.values_outer_stride +
                         packed_row * args.row_size,
                     count * args.row_size);
               });
}

}  // namespace

void copy_rows(const CopyRows& args) {
  for_each_run(args.spans, args.outer, args.row_bytes,
               [&](int64_t outer, int64_t row, int64_t packed_row, int64_t count) {
                 char* x =
                     static_cast<char*>(args.x) + outer * args.x_outer_bytes + row * args.row_bytes;
                 char* values = static_cast<char*>(args.values) + outer * args.values_outer_bytes +
                                packed_row * args.row_bytes;
                 std::memcpy(args.gather ? values : x, args.gather ? x : values,
                             static_cast<size_t>(count * args.row_bytes));
               });
}

void add_rows(const AddRows& args) {
  visit(args.dtype, [&](auto x) {
    visit(args.values_dtype, [&](auto values) {
      using T = decltype(x);
      using V = decltype(values);
      // The combinations that bind.h allows: equal dtypes, or half precision added to fp32.
      if constexpr (std::is_same_v<T, V> ||
                    (std::is_same_v<T, float> && !std::is_same_v<V, double>)) {
        add_rows_as<T, V>(args);
      }
    });
  });
}

}  // namespace hdp::cpu
