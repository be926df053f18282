// Host memory in slabs, handed out in extents. hdp/offloading/pool.py is the reference, and says
// why; the two hand out the same addresses (test_offload_native.py).
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "streams.h"

namespace hdp::offload {

constexpr int64_t kGranuleBytes = 64 << 10;

// A copy out of host memory; the later one of two has the higher number.
struct Read {
  int64_t number = 0;  // 0: none
  EventPtr event;
};

inline const Read& later(const Read& a, const Read& b) { return a.number >= b.number ? a : b; }

// Bytes [start, stop) of a slab.
struct Extent {
  int64_t slab, start, stop;
};

// Makes slabs in threads: ahead of need with prepare(), at need with grow().
class Slabs {
 public:
  Slabs(Streams& streams, int64_t slab_bytes, int64_t num_threads)
      : streams_(streams), slab_bytes_(slab_bytes), num_threads_(num_threads) {}

  ~Slabs() {
    {
      const std::lock_guard lock(mutex_);
      wanted_ = 0;  // threads stop after the slab in hand
    }
    for (auto& thread : threads_) thread.join();
    for (auto& [index, slab] : made_) streams_.free_slab(slab, slab_bytes_);
  }

  // Start making slabs until there are `count`.
  void prepare(int64_t count) {
    const std::lock_guard lock(mutex_);
    wanted_ = std::max(wanted_, count);
    const int64_t missing = std::min(wanted_ - next_, num_threads_ - num_busy_);
    for (int64_t i = 0; i < missing; ++i) {
      ++num_busy_;
      threads_.emplace_back([this] { work(); });
    }
  }

  // Return when slabs 0 .. count - 1 are there.
  void grow(int64_t count) {
    prepare(count);
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return num_ready() >= count || !error_.empty(); });
    if (num_ready() < count) throw std::runtime_error(error_);
  }

  char* operator[](int64_t index) {
    const std::lock_guard lock(mutex_);
    return static_cast<char*>(made_.at(index));
  }

  // Slabs that were made or are being made.
  int64_t count() {
    const std::lock_guard lock(mutex_);
    return next_;
  }

 private:
  int64_t num_ready() const {  // without a gap, from the first on
    int64_t ready = 0;
    for (const auto& [index, slab] : made_) {
      if (index != ready) break;
      ++ready;
    }
    return ready;
  }

  void work() {
    std::unique_lock lock(mutex_);
    while (next_ < wanted_ && error_.empty()) {
      const int64_t index = next_++;
      lock.unlock();
      void* slab = nullptr;
      std::string error;
      try {
        slab = streams_.new_slab(slab_bytes_);
      } catch (const std::bad_alloc&) {
        error = "out of host memory: a slab of " + std::to_string(slab_bytes_) +
                " bytes could not be taken";
      } catch (const std::exception& e) {
        error = e.what();
      }
      lock.lock();
      if (slab != nullptr) made_[index] = slab;
      if (!error.empty()) error_ = error;
      changed_.notify_all();
    }
    --num_busy_;
    changed_.notify_all();
  }

  Streams& streams_;
  const int64_t slab_bytes_, num_threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, void*> made_;
  int64_t wanted_ = 0, next_ = 0, num_busy_ = 0;
  std::string error_;
  std::vector<std::thread> threads_;
};

// Free addresses of the line that all slabs form.
class HostPool {
 public:
  HostPool(std::function<void(int64_t)> grow, int64_t slab_bytes, int64_t max_bytes)
      : grow_(std::move(grow)),
        slab_bytes_(slab_bytes),
        max_bytes_(max_bytes / slab_bytes * slab_bytes) {}

  // Extents of num_bytes together, by address, and the last read of any of them. Nothing if the
  // pool may not grow so far.
  std::optional<std::pair<std::vector<Extent>, Read>> take(int64_t num_bytes) {
    const int64_t size = (num_bytes + kGranuleBytes - 1) / kGranuleBytes * kGranuleBytes;
    const int64_t missing = size - (held_bytes_ - in_use_bytes_);
    if (missing > 0) {
      const int64_t count = (missing + slab_bytes_ - 1) / slab_bytes_;
      const int64_t held = held_bytes_ + count * slab_bytes_;
      if (held > max_bytes_) return std::nullopt;
      grow_(held / slab_bytes_);
      free(held_bytes_, held, Read{});
      held_bytes_ = held;
    }
    std::vector<Extent> extents;
    Read after;
    for (int64_t left = size; left > 0;) {
      const auto run = runs_.begin();
      const int64_t start = run->first, stop = std::min(run->second.stop, start + left);
      after = later(after, run->second.read);
      Run rest = run->second;
      runs_.erase(run);
      if (stop < rest.stop) runs_.emplace(stop, std::move(rest));
      split(start, stop, extents);
      left -= stop - start;
    }
    in_use_bytes_ += size;
    peak_in_use_bytes_ = std::max(peak_in_use_bytes_, in_use_bytes_);
    return std::make_pair(std::move(extents), after);
  }

  // Return what take() handed out; after: the last read of it that may be under way.
  void give(const std::vector<Extent>& extents, const Read& after) {
    for (const Extent& e : extents) {
      free(e.slab * slab_bytes_ + e.start, e.slab * slab_bytes_ + e.stop, after);
      in_use_bytes_ -= e.stop - e.start;
    }
  }

  int64_t in_use_bytes() const { return in_use_bytes_; }
  int64_t peak_in_use_bytes() const { return peak_in_use_bytes_; }
  int64_t max_bytes() const { return max_bytes_; }

 private:
  struct Run {
    int64_t stop;
    Read read;
  };

  void free(int64_t start, int64_t stop, Read read) {
    auto next = runs_.lower_bound(start);
    if (next != runs_.begin()) {
      const auto before = std::prev(next);
      if (before->second.stop == start) {
        start = before->first;
        read = later(read, before->second.read);
        runs_.erase(before);
      }
    }
    if (next != runs_.end() && next->first == stop) {
      stop = next->second.stop;
      read = later(read, next->second.read);
      runs_.erase(next);
    }
    runs_.emplace(start, Run{stop, std::move(read)});
  }

  void split(int64_t start, int64_t stop, std::vector<Extent>& extents) const {
    while (start < stop) {
      const int64_t slab = start / slab_bytes_, offset = start % slab_bytes_;
      const int64_t length = std::min(stop - start, slab_bytes_ - offset);
      extents.push_back({slab, offset, offset + length});
      start += length;
    }
  }

  const std::function<void(int64_t)> grow_;
  const int64_t slab_bytes_, max_bytes_;
  int64_t held_bytes_ = 0, in_use_bytes_ = 0, peak_in_use_bytes_ = 0;
  std::map<int64_t, Run> runs_;  // free, by start; adjacent ones are one
};

}  // namespace hdp::offload
