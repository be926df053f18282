// Moves bytes between a device and the host, ordered by events alone. hdp/offloading/link.py is the
// reference and says what each call orders.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pool.h"

namespace hdp::offload {

class Link {
 public:
  Link(std::unique_ptr<Streams> streams, int64_t max_bytes, int64_t slab_bytes, int64_t num_threads)
      : streams_(std::move(streams)),
        slab_bytes_(slab_bytes),
        slabs_(*streams_, slab_bytes, num_threads),
        pool_([this](int64_t count) { slabs_.grow(count); }, slab_bytes, max_bytes) {}

  ~Link() {
    try {
      streams_->synchronize();
    } catch (const std::exception&) {
      // The device is lost, or the process ends: nothing copies any more.
    }
  }

  void prepare(int64_t num_bytes) {
    const std::lock_guard lock(mutex_);
    const int64_t wanted = (num_bytes + slab_bytes_ - 1) / slab_bytes_;
    slabs_.prepare(std::min(wanted, pool_.max_bytes() / slab_bytes_));
  }

  // The number of a new block with a copy of src, or -1: the pool is full.
  int64_t send(const void* src, int64_t num_bytes, Stream caller) {
    const std::lock_guard lock(mutex_);
    auto taken = pool_.take(num_bytes);
    if (!taken) return -1;
    Block block{std::move(taken->first), num_bytes, nullptr, Read{}};
    const Read& read = taken->second;
    streams_->wait(kOut, streams_->record(caller));
    if (read.event != nullptr) streams_->wait(kOut, read.event);
    const char* from = static_cast<const char*>(src);
    each(block, [&](char* host, int64_t at, int64_t length) {
      streams_->copy(kOut, host, from + at, length);
    });
    block.sent = streams_->record(kOut);
    sent_bytes_ += num_bytes;
    blocks_.emplace(++last_block_, std::move(block));
    return last_block_;
  }

  void sent(int64_t number, Stream caller) {
    const std::lock_guard lock(mutex_);
    streams_->wait(caller, find(number).sent);
  }

  void fetch(int64_t number, void* dst, int64_t num_bytes, Stream caller) {
    const std::lock_guard lock(mutex_);
    Block& block = find(number);
    if (num_bytes != block.num_bytes) {
      throw std::runtime_error("offload: a block of " + std::to_string(block.num_bytes) +
                               " bytes is fetched to " + std::to_string(num_bytes));
    }
    streams_->wait(kIn, block.sent);
    streams_->wait(kIn, streams_->record(caller));
    char* to = static_cast<char*>(dst);
    each(block, [&](char* host, int64_t at, int64_t length) {
      streams_->copy(kIn, to + at, host, length);
    });
    block.read = Read{++num_reads_, streams_->record(kIn)};
    fetched_bytes_ += num_bytes;
  }

  void fetched(int64_t number, Stream caller) {
    const std::lock_guard lock(mutex_);
    const Block& block = find(number);
    if (block.read.event == nullptr) throw std::runtime_error("offload: fetched before fetch");
    streams_->wait(caller, block.read.event);
  }

  void free(int64_t number) {
    const std::lock_guard lock(mutex_);
    const Block& block = find(number);
    pool_.give(block.extents, block.read);
    blocks_.erase(number);
  }

  enum Stat { held, in_use, peak_in_use, most, sent_in_all, fetched_in_all };

  int64_t stat(int64_t which) {
    const std::lock_guard lock(mutex_);
    switch (which) {
      case held:
        return slabs_.count() * slab_bytes_;
      case in_use:
        return pool_.in_use_bytes();
      case peak_in_use:
        return pool_.peak_in_use_bytes();
      case most:
        return pool_.max_bytes();
      case sent_in_all:
        return sent_bytes_;
      case fetched_in_all:
        return fetched_bytes_;
      default:
        throw std::runtime_error("offload: no such statistic");
    }
  }

 private:
  struct Block {
    std::vector<Extent> extents;
    int64_t num_bytes;
    EventPtr sent;
    Read read;  // the last fetch
  };

  Block& find(int64_t number) {
    const auto found = blocks_.find(number);
    if (found == blocks_.end()) {
      throw std::runtime_error("offload: block " + std::to_string(number) +
                               " was used after it was freed");
    }
    return found->second;
  }

  template <class F>
  void each(const Block& block, const F& copy) {
    int64_t at = 0;
    for (const Extent& e : block.extents) {
      const int64_t length = std::min(e.stop - e.start, block.num_bytes - at);
      copy(slabs_[e.slab] + e.start, at, length);
      at += length;
    }
  }

  std::mutex mutex_;
  const std::unique_ptr<Streams> streams_;
  const int64_t slab_bytes_;
  Slabs slabs_;
  HostPool pool_;
  std::unordered_map<int64_t, Block> blocks_;
  int64_t last_block_ = 0, num_reads_ = 0, sent_bytes_ = 0, fetched_bytes_ = 0;
};

}  // namespace hdp::offload
