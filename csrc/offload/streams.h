// What a device offers to move memory: the caller's stream, one for copies out, one for copies in.
// hdp/offloading/streams.py has the same in Python, and says what each call orders.
#pragma once

#include <cstdint>
#include <memory>

namespace hdp::offload {

struct Stream {
  enum Kind { caller, out, in } kind;
  int64_t handle = 0;  // of the caller's stream: a cudaStream_t
};
constexpr Stream kOut{Stream::out}, kIn{Stream::in};

class Event {
 public:
  virtual ~Event() = default;
};
using EventPtr = std::shared_ptr<Event>;

// Errors are std::runtime_error; new_slab throws std::bad_alloc where memory is what is missing.
// new_slab is called from several threads at once, the others from one at a time.
class Streams {
 public:
  virtual ~Streams() = default;
  virtual EventPtr record(Stream stream) = 0;
  virtual void wait(Stream stream, const EventPtr& event) = 0;
  virtual void copy(Stream stream, void* dst, const void* src, int64_t num_bytes) = 0;
  virtual void* new_slab(int64_t num_bytes) = 0;
  virtual void free_slab(void* slab, int64_t num_bytes) = 0;
  virtual void synchronize() = 0;
};

// Two threads are the streams, and the caller waits for events itself. seed: of random delays
// before each operation, so that a wait that is missing shows; 0: none.
std::unique_ptr<Streams> cpu_streams(uint64_t seed);

std::unique_ptr<Streams> cuda_streams(int device);

}  // namespace hdp::offload
