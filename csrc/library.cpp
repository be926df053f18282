// The ops of hdp: schemas, and what implements them. bind.h checks arguments and calls cpu/ or
// cuda/; hdp/ops/native.py has each op's fake kernel and gradient, reference.py the op in Python.
//
// Uses only torch's stable ABI, so one build works with every torch from 2.10 on.

#include <torch/csrc/stable/library.h>

#include "bind.h"

STABLE_TORCH_LIBRARY(hdp, m) {
  m.def(
      "merge_lse_(Tensor(a!) out, Tensor(b!) lse, Tensor block_out, Tensor block_lse, "
      "int[] spans) -> ()");
  m.def("gather_rows(Tensor x, int[] spans, int dim) -> Tensor");
  m.def("scatter_rows_(Tensor(a!) x, Tensor values, int[] spans, int dim, bool accumulate) -> ()");
  m.def(
      "softmax_cross_entropy(Tensor logits, Tensor labels, float softcap) "
      "-> (Tensor logprobs, Tensor lse)");
  m.def(
      "softmax_cross_entropy_backward_(Tensor(a!) logits, Tensor labels, Tensor lse, "
      "Tensor grad_logprobs, Tensor? grad_lse, float softcap, ScalarType? grad_dtype) -> ()");
}

namespace {

// The same functions serve every device: they run where their tensors are.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("merge_lse_", TORCH_BOX(&hdp::merge_lse_));
  m.impl("gather_rows", TORCH_BOX(&hdp::gather_rows));
  m.impl("scatter_rows_", TORCH_BOX(&hdp::scatter_rows_));
  m.impl("softmax_cross_entropy", TORCH_BOX(&hdp::softmax_cross_entropy));
  m.impl("softmax_cross_entropy_backward_", TORCH_BOX(&hdp::softmax_cross_entropy_backward_));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hdp, CPU, m) { implement(m); }

#ifdef HDP_CUDA
STABLE_TORCH_LIBRARY_IMPL(hdp, CUDA, m) { implement(m); }
#endif

// "cpu; csrc 0123456789ab" or "cpu, cuda (sm_80 sm_90); csrc ...": devices, and the fingerprint of
// the sources (build.py). Printed at startup, and used to decide whether to rebuild.
extern "C" __attribute__((visibility("default"))) const char* hdp_build_info() {
  return "hdp build: " HDP_BUILD_INFO;
}
