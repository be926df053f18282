// From tensors to kernel arguments. All checks are here, shared by CPU and CUDA. Errors name the
// argument, its value and what was expected.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

#ifdef HDP_CUDA
// Weak, so that the library also loads in a torch without CUDA, which lacks this function.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace hdp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks ----

constexpr int64_t kMaxInt = int64_t{1} << 30;  // kernels count columns and blocks in 32 bits

inline std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(values[i]);
  }
  return text + ")";
}

inline std::string describe(const char* name, const Tensor& x) {
  return std::string(name) + " " + torch::headeronly::toString(x.scalar_type()) + list(x.sizes()) +
         " with strides " + list(x.strides());
}

inline DType dtype_of(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, op, ": ", describe(name, x), ": expected fp64, fp32, bf16 or fp16");
}

inline void check_same_device(const char* op, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(), op,
                  ": the tensors are on different devices");
}

inline void check_shape(const char* op, const char* name, const Tensor& x,
                        const std::vector<int64_t>& shape) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == shape[i];
  STD_TORCH_CHECK(same, op, ": ", describe(name, x), ": expected shape ", list(shape));
}

// Check that dimensions after `dim` are contiguous, so that a row is one run of memory; with
// `rows_too`, that there are no gaps between rows either.
inline void check_dense(const char* op, const char* name, const Tensor& x, int64_t dim,
                        bool rows_too) {
  int64_t size = 1;
  for (int64_t i = x.dim() - 1; i >= dim + !rows_too; --i) {
    STD_TORCH_CHECK(x.stride(i) == size || x.size(i) == 1 || x.numel() == 0, op, ": ",
                    describe(name, x), ": dimensions from ", dim + !rows_too,
                    " on must be dense; pass ", name, ".contiguous()");
    size *= x.size(i);
  }
}

// Check that rows do not overlap in a tensor that is written to, as they would in an expanded one.
inline void check_writable(const char* op, const char* name, const Tensor& x) {
  int64_t size = 1;
  for (int64_t i = 1; i < x.dim(); ++i) size *= x.size(i);
  STD_TORCH_CHECK(x.dim() == 0 || x.size(0) <= 1 || x.stride(0) >= size, op, ": ",
                  describe(name, x), ": its rows overlap and it is written to; pass ", name,
                  ".contiguous()");
}

inline Spans parse_spans(const char* op, const std::vector<int64_t>& bounds, int64_t num_rows) {
  STD_TORCH_CHECK(bounds.size() % 2 == 0, op, ": spans ", list(bounds),
                  ": expected start, stop, start, stop, ...");
  Spans spans;
  int64_t first = 0, last = 0;
  for (size_t i = 0; i < bounds.size(); i += 2) {
    const int64_t start = bounds[i], stop = bounds[i + 1];
    STD_TORCH_CHECK(last <= start && start <= stop && stop <= num_rows, op, ": span [", start, ", ",
                    stop, ") after row ", last, " of ", num_rows,
                    ": spans must be sorted, disjoint and inside the tensor");
    if (start < stop) spans.push_back({start, stop, first});
    first += stop - start;
    last = stop;
  }
  return spans;
}

inline int64_t product(const Tensor& x, int64_t begin, int64_t end) {
  int64_t result = 1;
  for (int64_t i = begin; i < end; ++i) result *= x.size(i);
  return result;
}

// ---- dispatch ----

#ifdef HDP_CUDA
// torch's current stream on the device of `x`.
inline cuda::Queue current_queue(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "hdp: a CUDA tensor, but this torch has no CUDA");
  cuda::Queue queue{x.get_device_index(), nullptr};
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(queue.device, &queue.stream) == TORCH_SUCCESS,
                  "hdp: no current stream on CUDA device ", queue.device);
  return queue;
}

#define HDP_LAUNCH(where, kernel, args)                                                \
  do {                                                                                 \
    if ((where).is_cuda()) {                                                           \
      const torch::stable::accelerator::DeviceGuard guard((where).get_device_index()); \
      cuda::kernel(args, current_queue(where));                                        \
    } else {                                                                           \
      cpu::kernel(args);                                                               \
    }                                                                                  \
  } while (false)
#else
#define HDP_LAUNCH(where, kernel, args) cpu::kernel(args)
#endif

// ---- the ops; schemas in library.cpp, semantics in ops.h and hdp/ops/reference.py ----

inline void merge_lse_(Tensor out, Tensor lse, Tensor block_out, Tensor block_lse,
                       std::vector<int64_t> bounds) {
  const char* op = "merge_lse_";
  MergeLse args;
  args.dtype = dtype_of(op, "out", out);
  args.block_dtype = dtype_of(op, "block_out", block_out);
  STD_TORCH_CHECK(out.dim() == 3, op, ": ", describe("out", out), ": expected (rows, heads, dim)");
  STD_TORCH_CHECK(args.dtype == DType::f32 || args.dtype == DType::f64, op, ": ",
                  describe("out", out), ": partial results are kept in fp32 or fp64");
  STD_TORCH_CHECK((args.dtype == DType::f64) == (args.block_dtype == DType::f64), op, ": ",
                  describe("block_out", block_out), " cannot join ", describe("out", out));
  args.spans = parse_spans(op, bounds, out.size(0));
  args.heads = out.size(1);
  args.dim = out.size(2);
  const int64_t packed = num_packed_rows(args.spans);
  check_shape(op, "lse", lse, {args.heads, out.size(0)});
  check_shape(op, "block_out", block_out, {packed, args.heads, args.dim});
  check_shape(op, "block_lse", block_lse, {args.heads, packed});
  for (const auto* x : {&lse, &block_lse}) {
    const char* name = x == &lse ? "lse" : "block_lse";
    STD_TORCH_CHECK(x->scalar_type() == out.scalar_type(), op, ": ", describe(name, *x),
                    ": expected the dtype of out");
    check_dense(op, name, *x, 0, false);
    check_same_device(op, out, *x);
  }
  check_dense(op, "out", out, 0, false);
  check_dense(op, "block_out", block_out, 0, false);
  check_writable(op, "out", out);
  check_writable(op, "lse", lse);
  check_same_device(op, out, block_out);
  if (packed * args.heads == 0) return;
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.block_out = block_out.const_data_ptr();
  args.block_lse = block_lse.const_data_ptr();
  args.out_row_stride = out.stride(0);
  args.block_out_row_stride = block_out.stride(0);
  args.lse_head_stride = lse.stride(0);
  args.block_lse_head_stride = block_lse.stride(0);
  HDP_LAUNCH(out, merge_lse, args);
}

inline int64_t outer_stride(const Tensor& x, int64_t dim) { return dim == 0 ? 0 : x.stride(0); }

// x is (rows, ...) for dim 0 or (outer, rows, ...) for dim 1.
inline void check_rows(const char* op, const char* name, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK((dim == 0 || dim == 1) && x.dim() > dim, op, ": ", describe(name, x), ", dim ",
                  dim, ": expected rows along dimension 0 or 1");
  check_dense(op, name, x, dim, true);
}

inline CopyRows copy_args(const Tensor& x, const Tensor& values, int64_t dim, Spans spans,
                          bool gather) {
  const int64_t item = static_cast<int64_t>(x.element_size());
  CopyRows args;
  args.x = gather ? const_cast<void*>(x.const_data_ptr()) : x.mutable_data_ptr();
  args.values = gather ? values.mutable_data_ptr() : const_cast<void*>(values.const_data_ptr());
  args.outer = product(x, 0, dim);
  args.row_bytes = product(x, dim + 1, x.dim()) * item;
  args.x_outer_bytes = outer_stride(x, dim) * item;
  args.values_outer_bytes = outer_stride(values, dim) * item;
  args.spans = std::move(spans);
  args.gather = gather;
  return args;
}

inline Tensor gather_rows(Tensor x, std::vector<int64_t> bounds, int64_t dim) {
  const char* op = "gather_rows";
  check_rows(op, "x", x, dim);
  Spans spans = parse_spans(op, bounds, x.size(dim));
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[dim] = num_packed_rows(spans);
  Tensor values = torch::stable::new_empty(x, shape);
  if (values.numel() == 0) return values;
  const CopyRows args = copy_args(x, values, dim, std::move(spans), true);
  HDP_LAUNCH(x, copy_rows, args);
  return values;
}

inline void scatter_rows_(Tensor x, Tensor values, std::vector<int64_t> bounds, int64_t dim,
                          bool accumulate) {
  const char* op = "scatter_rows_";
  check_rows(op, "x", x, dim);
  check_writable(op, "x", x);
  check_same_device(op, x, values);
  Spans spans = parse_spans(op, bounds, x.size(dim));
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[dim] = num_packed_rows(spans);
  check_shape(op, "values", values, shape);
  check_rows(op, "values", values, dim);
  if (!accumulate) {
    STD_TORCH_CHECK(x.scalar_type() == values.scalar_type(), op, ": ", describe("values", values),
                    ": expected the dtype of x");
    if (values.numel() == 0) return;
    const CopyRows args = copy_args(x, values, dim, std::move(spans), false);
    HDP_LAUNCH(x, copy_rows, args);
    return;
  }
  AddRows args;
  args.dtype = dtype_of(op, "x", x);
  args.values_dtype = dtype_of(op, "values", values);
  STD_TORCH_CHECK(args.dtype == args.values_dtype ||
                      (args.dtype == DType::f32 && args.values_dtype != DType::f64),
                  op, ": cannot add ", describe("values", values), " to ", describe("x", x));
  if (values.numel() == 0) return;
  args.x = x.mutable_data_ptr();
  args.values = values.const_data_ptr();
  args.outer = product(x, 0, dim);
  args.row_size = product(x, dim + 1, x.dim());
  args.x_outer_stride = outer_stride(x, dim);
  args.values_outer_stride = outer_stride(values, dim);
  args.spans = std::move(spans);
  HDP_LAUNCH(x, add_rows, args);
}

inline void check_logits(const char* op, const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, ": ", describe("logits", logits),
                  ": expected (rows, vocab)");
  STD_TORCH_CHECK(logits.size(0) < kMaxInt && logits.size(1) < kMaxInt, op, ": ",
                  describe("logits", logits), ": too many rows or columns");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, op, ": ", describe("labels", labels),
                  ": expected int64");
  check_dense(op, "logits", logits, 0, false);
  check_shape(op, "labels", labels, {logits.size(0)});
  check_dense(op, "labels", labels, 0, true);
  check_same_device(op, logits, labels);
}

inline ScalarType statistics_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::tuple<Tensor, Tensor> softmax_cross_entropy(Tensor logits, Tensor labels,
                                                        double softcap) {
  const char* op = "softmax_cross_entropy";
  CrossEntropy args;
  args.dtype = dtype_of(op, "logits", logits);
  check_logits(op, logits, labels);
  const std::vector<int64_t> shape = {logits.size(0)};
  Tensor logprobs = torch::stable::new_empty(logits, shape, statistics_type(logits));
  Tensor lse = torch::stable::new_empty(logits, shape, statistics_type(logits));
  if (shape[0] == 0) return {logprobs, lse};
  args.logits = logits.const_data_ptr();
  args.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  args.logprobs = logprobs.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.rows = logits.size(0);
  args.vocab = logits.size(1);
  args.row_stride = logits.stride(0);
  args.softcap = softcap;
  HDP_LAUNCH(logits, cross_entropy, args);
  return {logprobs, lse};
}

inline void softmax_cross_entropy_backward_(Tensor logits, Tensor labels, Tensor lse,
                                            Tensor grad_logprobs, std::optional<Tensor> grad_lse,
                                            double softcap, std::optional<ScalarType> grad_dtype) {
  const char* op = "softmax_cross_entropy_backward_";
  CrossEntropyBackward args;
  args.dtype = args.grad_dtype = dtype_of(op, "logits", logits);
  check_logits(op, logits, labels);
  check_writable(op, "logits", logits);
  if (grad_dtype && *grad_dtype != logits.scalar_type()) {
    const bool half = *grad_dtype == ScalarType::BFloat16 || *grad_dtype == ScalarType::Half;
    STD_TORCH_CHECK(half && args.dtype == DType::f32, op, ": gradients of ",
                    describe("logits", logits),
                    " can be written in their own dtype, or fp32 ones in bf16 or fp16");
    args.grad_dtype = *grad_dtype == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  }
  const auto check = [&](const char* name, const Tensor& x) {
    check_shape(op, name, x, {logits.size(0)});
    check_dense(op, name, x, 0, true);
    check_same_device(op, logits, x);
    STD_TORCH_CHECK(x.scalar_type() == statistics_type(logits), op, ": ", describe(name, x),
                    ": expected fp64 for fp64 logits, else fp32");
    return x.const_data_ptr();
  };
  args.lse = check("lse", lse);
  args.grad_logprobs = check("grad_logprobs", grad_logprobs);
  args.grad_lse = grad_lse ? check("grad_lse", *grad_lse) : nullptr;
  if (logits.size(0) == 0) return;
  args.logits = logits.mutable_data_ptr();
  args.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  args.rows = logits.size(0);
  args.vocab = logits.size(1);
  args.row_stride = logits.stride(0);
  args.softcap = softcap;
  HDP_LAUNCH(logits, cross_entropy_backward, args);
}

}  // namespace hdp
