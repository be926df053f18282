// The CPU twin: two threads are the streams. A wait that is missing shows as a wrong value, and
// ThreadSanitizer sees it as a race.

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <utility>

#include "streams.h"

namespace hdp::offload {
namespace {

class Flag : public Event {
 public:
  void set() {
    {
      const std::lock_guard lock(mutex_);
      set_ = true;
    }
    changed_.notify_all();
  }

  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return set_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool set_ = false;
};

class Worker {
 public:
  explicit Worker(uint64_t seed) : seed_(seed), random_(seed), thread_([this] { work(); }) {}

  ~Worker() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void queue(std::function<void()> operation) {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(operation));
    }
    changed_.notify_all();
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const auto operation = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (seed_ != 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 200));
      operation();
      lock.lock();
    }
  }

  const uint64_t seed_;
  std::minstd_rand random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool stop_ = false;
  std::thread thread_;
};

class CPUStreams : public Streams {
 public:
  explicit CPUStreams(uint64_t seed) : out_(seed), in_(seed == 0 ? 0 : seed + 1) {}

  EventPtr record(Stream stream) override {
    auto flag = std::make_shared<Flag>();
    if (stream.kind == Stream::caller) {
      flag->set();  // its kernels have run
    } else {
      worker(stream).queue([flag] { flag->set(); });
    }
    return flag;
  }

  void wait(Stream stream, const EventPtr& event) override {
    const auto flag = std::static_pointer_cast<Flag>(event);
    if (stream.kind == Stream::caller) {
      flag->wait();
    } else {
      worker(stream).queue([flag] { flag->wait(); });
    }
  }

  void copy(Stream stream, void* dst, const void* src, int64_t num_bytes) override {
    worker(stream).queue([=] { std::memcpy(dst, src, static_cast<size_t>(num_bytes)); });
  }

  void* new_slab(int64_t num_bytes) override {
    void* slab = std::malloc(static_cast<size_t>(num_bytes));
    if (slab == nullptr) throw std::bad_alloc();
    std::memset(slab, 0xff, static_cast<size_t>(num_bytes));  // NaN
    return slab;
  }

  void free_slab(void* slab, int64_t) override { std::free(slab); }

  void synchronize() override {
    for (const Stream stream : {kOut, kIn}) {
      std::static_pointer_cast<Flag>(record(stream))->wait();
    }
  }

 private:
  Worker& worker(Stream stream) { return stream.kind == Stream::out ? out_ : in_; }

  Worker out_, in_;
};

}  // namespace

std::unique_ptr<Streams> cpu_streams(uint64_t seed) { return std::make_unique<CPUStreams>(seed); }

}  // namespace hdp::offload
