// The ops of the offload link: schemas and argument checks. hdp/offloading/native.py calls them.
//
// A link and its blocks are numbers, because torch's stable ABI has no classes. The number of a
// block that was freed is never given again, so a use after free is an error and not another block.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "link.h"

namespace hdp::offload {
namespace {

using torch::stable::Tensor;

class Links {
 public:
  int64_t add(std::unique_ptr<Link> link) {
    const std::lock_guard lock(mutex_);
    links_.emplace(++last_, std::move(link));
    return last_;
  }

  std::shared_ptr<Link> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = links_.find(number);
    STD_TORCH_CHECK(found != links_.end(), "offload: link ", number, " is closed");
    return found->second;
  }

  void remove(int64_t number) {
    const std::shared_ptr<Link> link = find(number);
    const std::lock_guard lock(mutex_);
    links_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Link>> links_;
  int64_t last_ = 0;
};

// Never destroyed: at exit, CUDA may be gone before us.
Links& links() {
  static Links& all = *new Links;
  return all;
}

Stream caller(int64_t handle) { return Stream{Stream::caller, handle}; }

int64_t dense_bytes(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 1 && x.is_contiguous(), op, ": expected a dense row of bytes");
  return x.numel() * static_cast<int64_t>(x.element_size());
}

int64_t open(int64_t device, int64_t max_bytes, int64_t slab_bytes, int64_t num_threads,
             int64_t seed) {
  STD_TORCH_CHECK(slab_bytes > 0 && slab_bytes % kGranuleBytes == 0,
                  "offload: slab_bytes=", slab_bytes, " must be a multiple of ", kGranuleBytes);
  STD_TORCH_CHECK(num_threads > 0, "offload: num_threads=", num_threads, " must be 1 or more");
  std::unique_ptr<Streams> streams;
  if (device < 0) {
    streams = cpu_streams(static_cast<uint64_t>(seed));
  } else {
#ifdef HDP_CUDA
    streams = cuda_streams(static_cast<int>(device));
#else
    STD_TORCH_CHECK(false, "offload: this library was built without CUDA");
#endif
  }
  return links().add(
      std::make_unique<Link>(std::move(streams), max_bytes, slab_bytes, num_threads));
}

void prepare(int64_t link, int64_t num_bytes) { links().find(link)->prepare(num_bytes); }

int64_t send(int64_t link, Tensor data, int64_t stream) {
  const int64_t num_bytes = dense_bytes("offload_send", data);
  return links().find(link)->send(data.const_data_ptr(), num_bytes, caller(stream));
}

void sent(int64_t link, int64_t block, int64_t stream) {
  links().find(link)->sent(block, caller(stream));
}

void fetch(int64_t link, int64_t block, Tensor out, int64_t stream) {
  const int64_t num_bytes = dense_bytes("offload_fetch_", out);
  links().find(link)->fetch(block, out.mutable_data_ptr(), num_bytes, caller(stream));
}

void fetched(int64_t link, int64_t block, int64_t stream) {
  links().find(link)->fetched(block, caller(stream));
}

void free_block(int64_t link, int64_t block) { links().find(link)->free(block); }

int64_t stat(int64_t link, int64_t which) { return links().find(link)->stat(which); }

void close(int64_t link) { links().remove(link); }

}  // namespace
}  // namespace hdp::offload

STABLE_TORCH_LIBRARY_FRAGMENT(hdp, m) {
  m.def(
      "offload_open(int device, int max_bytes, int slab_bytes, int num_threads, int seed) -> int");
  m.def("offload_prepare(int link, int num_bytes) -> ()");
  m.def("offload_send(int link, Tensor data, int stream) -> int");
  m.def("offload_sent(int link, int block, int stream) -> ()");
  m.def("offload_fetch_(int link, int block, Tensor(a!) out, int stream) -> ()");
  m.def("offload_fetched(int link, int block, int stream) -> ()");
  m.def("offload_free(int link, int block) -> ()");
  m.def("offload_stat(int link, int which) -> int");
  m.def("offload_close(int link) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hdp, CompositeExplicitAutograd, m) {
  m.impl("offload_open", TORCH_BOX(&hdp::offload::open));
  m.impl("offload_prepare", TORCH_BOX(&hdp::offload::prepare));
  m.impl("offload_send", TORCH_BOX(&hdp::offload::send));
  m.impl("offload_sent", TORCH_BOX(&hdp::offload::sent));
  m.impl("offload_fetch_", TORCH_BOX(&hdp::offload::fetch));
  m.impl("offload_fetched", TORCH_BOX(&hdp::offload::fetched));
  m.impl("offload_free", TORCH_BOX(&hdp::offload::free_block));
  m.impl("offload_stat", TORCH_BOX(&hdp::offload::stat));
  m.impl("offload_close", TORCH_BOX(&hdp::offload::close));
}
