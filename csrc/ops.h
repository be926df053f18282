// The arguments of kernels. bind.h has checked every field. Kernels see pointers, sizes and strides
// (in elements unless a name says bytes) but no torch types, so each compiles in a second, and the
// CPU and CUDA kernels of an op take the same arguments.
#pragma once

#include <cstdint>
#include <vector>

namespace hdp {

enum class DType { f64, f32, bf16, f16 };

constexpr int64_t kIgnoreIndex = -100;

// Rows [start, stop) of a tensor; in the packed tensor, which holds only the rows of spans, they
// are rows first, first + 1, ... Spans are sorted and disjoint, so no two threads write the same
// row.
struct Span {
  int64_t start, stop, first;
};
using Spans = std::vector<Span>;

inline int64_t num_packed_rows(const Spans& spans) {
  return spans.empty() ? 0 : spans.back().first + spans.back().stop - spans.back().start;
}

// out, lse <- the softmax-weighted mean of (out, lse) and (block_out, block_lse), row by row, for
// the rows in `spans` of out (rows, heads, dim) and lse (heads, rows). block_* have packed rows.
struct MergeLse {
  void* out;
  void* lse;
  const void* block_out;
  const void* block_lse;
  DType dtype;        // of out, lse and block_lse: f32 or f64
  DType block_dtype;  // of block_out
  int64_t heads, dim;
  int64_t out_row_stride, block_out_row_stride;
  int64_t lse_head_stride, block_lse_head_stride;
  Spans spans;
};

// x (outer, rows, row_bytes) and values (outer, packed rows, row_bytes); rows are dense.
struct CopyRows {
  void* x;
  void* values;
  int64_t outer, row_bytes, x_outer_bytes, values_outer_bytes;
  Spans spans;
  bool gather;  // values <- x; else x <- values
};

// x[rows of spans] += values, in the dtype of x.
struct AddRows {
  void* x;
  const void* values;
  DType dtype, values_dtype;
  int64_t outer, row_size, x_outer_stride, values_outer_stride;
  Spans spans;
};

// Per row: lse = log(sum(exp(y))), logprob = y[label] - lse, where y is the logits or, with a cap,
// softcap * tanh(logits / softcap). Both are 0 where the label is kIgnoreIndex.
struct CrossEntropy {
  const void* logits;
  const int64_t* labels;
  void* logprobs;  // f64 for f64 logits, else f32; so is lse
  void* lse;
  DType dtype;
  int64_t rows, vocab, row_stride;
  double softcap;  // 0: none
};

// logits <- d(sum(grad_logprobs * logprobs + grad_lse * lse)) / d logits, in place. With a narrower
// grad_dtype, each row of gradients is written to the start of its row of logits.
struct CrossEntropyBackward {
  void* logits;
  const int64_t* labels;
  const void* lse;
  const void* grad_logprobs;
  const void* grad_lse;  // or null
  DType dtype, grad_dtype;
  int64_t rows, vocab, row_stride;
  double softcap;
};

namespace cpu {
void merge_lse(const MergeLse&);
void copy_rows(const CopyRows&);
void add_rows(const AddRows&);
void cross_entropy(const CrossEntropy&);
void cross_entropy_backward(const CrossEntropyBackward&);
}  // namespace cpu

namespace cuda {
// A device and one of its streams (a cudaStream_t). Kernels are enqueued; nothing waits.
struct Queue {
  int device;
  void* stream;
};
void merge_lse(const MergeLse&, Queue);
void copy_rows(const CopyRows&, Queue);
void add_rows(const AddRows&, Queue);
void cross_entropy(const CrossEntropy&, Queue);
void cross_entropy_backward(const CrossEntropyBackward&, Queue);
}  // namespace cuda

}  // namespace hdp
