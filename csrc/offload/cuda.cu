// CUDA streams of one device, and pinned slabs. Runtime API only: no kernel is here, and nothing of
// torch's, so that the file compiles against any torch.
//
// Pinning costs a page fault and a driver call per page. Slabs are therefore made of 2 MiB pages
// where the system has them, touched and then registered, several at once, on the CPUs next to the
// GPU: the first touch decides on which side of the machine a page lies, and the far one is slower.

#include <cuda_runtime_api.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "streams.h"

namespace hdp::offload {
namespace {

constexpr int64_t kPageBytes = 4096;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is reported here; do not let the next call report it again
  if (status == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw std::runtime_error(std::string("offload: ") + what + ": " + cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// The CPUs next to a GPU, from sysfs ("0-15,32-47"); empty where that is not known.
cpu_set_t cpus_next_to(int device) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  char bus_id[32] = {};
  if (cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, device) != cudaSuccess) return cpus;
  std::string name(bus_id);
  std::transform(name.begin(), name.end(), name.begin(), ::tolower);
  std::ifstream file("/sys/bus/pci/devices/" + name + "/local_cpulist");
  std::string item;
  while (std::getline(file, item, ',')) {
    int first = 0, last = 0;
    const int fields = std::sscanf(item.c_str(), "%d-%d", &first, &last);
    if (fields < 1) continue;
    for (int cpu = first; cpu <= (fields == 2 ? last : first) && cpu < CPU_SETSIZE; ++cpu) {
      CPU_SET(cpu, &cpus);
    }
  }
  return cpus;
}

// Events are made once and used again; one goes back when the last who might wait for it is gone.
class EventPool {
 public:
  ~EventPool() {
    for (cudaEvent_t event : free_) cudaEventDestroy(event);
  }

  cudaEvent_t take() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        cudaEvent_t event = free_.back();
        free_.pop_back();
        return event;
      }
    }
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    return event;
  }

  void give(cudaEvent_t event) {
    const std::lock_guard lock(mutex_);
    free_.push_back(event);
  }

 private:
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_;
};

class CudaEvent : public Event {
 public:
  explicit CudaEvent(std::shared_ptr<EventPool> pool)
      : pool_(std::move(pool)), event_(pool_->take()) {}
  ~CudaEvent() override { pool_->give(event_); }
  cudaEvent_t get() const { return event_; }

 private:
  const std::shared_ptr<EventPool> pool_;  // before event_, which comes from it
  const cudaEvent_t event_;
};

class CudaStreams : public Streams {
 public:
  explicit CudaStreams(int device) : device_(device), near_(cpus_next_to(device)) {
    const DeviceGuard guard(device_);
    check(cudaStreamCreateWithFlags(&out_, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaStreamCreateWithFlags(&in_, cudaStreamNonBlocking), "cudaStreamCreate");
  }

  ~CudaStreams() override {
    cudaStreamDestroy(out_);
    cudaStreamDestroy(in_);
  }

  EventPtr record(Stream stream) override {
    const DeviceGuard guard(device_);
    auto event = std::make_shared<CudaEvent>(events_);
    check(cudaEventRecord(event->get(), raw(stream)), "cudaEventRecord");
    return event;
  }

  void wait(Stream stream, const EventPtr& event) override {
    const DeviceGuard guard(device_);
    const cudaEvent_t raw_event = static_cast<CudaEvent&>(*event).get();
    check(cudaStreamWaitEvent(raw(stream), raw_event, 0), "cudaStreamWaitEvent");
  }

  void copy(Stream stream, void* dst, const void* src, int64_t num_bytes) override {
    const DeviceGuard guard(device_);
    const auto kind = stream.kind == Stream::out ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    check(cudaMemcpyAsync(dst, src, static_cast<size_t>(num_bytes), kind, raw(stream)),
          "cudaMemcpyAsync");
  }

  void* new_slab(int64_t num_bytes) override {
    const size_t size = static_cast<size_t>(num_bytes);
    void* slab = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    madvise(slab, size, MADV_HUGEPAGE);          // where the system has none, small pages do
    sched_setaffinity(0, sizeof near_, &near_);  // this thread's; it fails where that is not known
    for (int64_t i = 0; i < num_bytes; i += kPageBytes) static_cast<volatile char*>(slab)[i] = 0;
    cudaError_t status = cudaSetDevice(device_);
    if (status == cudaSuccess) status = cudaHostRegister(slab, size, cudaHostRegisterPortable);
    if (status != cudaSuccess) {
      munmap(slab, size);
      check(status, "cudaHostRegister");
    }
    return slab;
  }

  void free_slab(void* slab, int64_t num_bytes) override {
    cudaHostUnregister(slab);
    munmap(slab, static_cast<size_t>(num_bytes));
  }

  void synchronize() override {
    const DeviceGuard guard(device_);
    check(cudaStreamSynchronize(out_), "cudaStreamSynchronize");
    check(cudaStreamSynchronize(in_), "cudaStreamSynchronize");
  }

 private:
  cudaStream_t raw(Stream stream) const {
    switch (stream.kind) {
      case Stream::out:
        return out_;
      case Stream::in:
        return in_;
      default:
        return reinterpret_cast<cudaStream_t>(stream.handle);
    }
  }

  const int device_;
  const cpu_set_t near_;
  cudaStream_t out_ = nullptr, in_ = nullptr;
  const std::shared_ptr<EventPool> events_ = std::make_shared<EventPool>();
};

}  // namespace

std::unique_ptr<Streams> cuda_streams(int device) { return std::make_unique<CudaStreams>(device); }

}  // namespace hdp::offload
