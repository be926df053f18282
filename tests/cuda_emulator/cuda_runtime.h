// Runs CUDA kernels on a CPU, to test their index arithmetic, barriers and tails without a GPU.
// Replaces the CUDA headers when a .cu file is compiled as C++; tests/test_csrc.py rewrites
// `kernel<<<grid, block, 0, stream>>>(args)` to `emulator::launch(kernel, grid, block)(args)`.
//
// The threads of a block are fibers of a single OS thread. Each runs until it waits at a barrier,
// so it does all its reads and writes between two barriers before the next fiber starts: the
// interleaving most likely to expose a missing barrier. HDP_EMULATOR_REVERSE=1 starts with the last
// thread instead. Threads stuck at different barriers are an error, as is a shuffle from a lane
// that does not take part. Blocks run one after another, so shared memory is static memory.
//
// Not covered: speed, memory ordering, and the rounding of the GPU's own instructions.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu/number.h"

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

using std::abs;
using std::exp;
using std::fmax;
using std::log;
using std::min;
using std::tanh;

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 1 << 16;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  State state;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers{kMaxThreads};
  std::vector<char> stacks = std::vector<char>(kMaxThreads * kStackBytes);
  std::function<void()> body;
  double exchanged[kMaxThreads];
  bool takes_part[kMaxThreads];
  dim3 thread, block, grid;
  int num_threads = 0;
};

inline Machine machine;

inline void wait(State barrier) {
  const unsigned self = machine.thread.x;
  machine.fibers[self].state = barrier;
  swapcontext(&machine.fibers[self].context, &machine.scheduler);
  machine.thread.x = self;
}

inline void fiber_main() {
  machine.body();
  machine.fibers[machine.thread.x].state = State::done;
  swapcontext(&machine.fibers[machine.thread.x].context, &machine.scheduler);
}

// Release threads [begin, end) if all of them that are not done wait at `barrier`.
inline bool release(int begin, int end, State barrier) {
  bool any = false;
  for (int i = begin; i < end; ++i) {
    if (machine.fibers[i].state == State::done) continue;
    if (machine.fibers[i].state != barrier) return false;
    any = true;
  }
  for (int i = begin; any && i < end; ++i) {
    if (machine.fibers[i].state == barrier) machine.fibers[i].state = State::ready;
  }
  return any;
}

inline void run_block() {
  const bool reverse = std::getenv("HDP_EMULATOR_REVERSE") != nullptr;
  const int count = machine.num_threads;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = machine.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = machine.stacks.data() + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.state = State::ready;
  }
  for (;;) {
    for (int n = 0; n < count; ++n) {
      const int i = reverse ? count - 1 - n : n;
      if (machine.fibers[i].state != State::ready) continue;
      machine.thread = dim3(i);
      swapcontext(&machine.scheduler, &machine.fibers[i].context);
    }
    bool released = release(0, count, State::at_block_barrier);
    for (int warp = 0; warp < count; warp += 32) {
      released |= release(warp, std::min(warp + 32, count), State::at_warp_barrier);
    }
    if (released) continue;
    for (int i = 0; i < count; ++i) {
      if (machine.fibers[i].state == State::done) continue;
      std::fprintf(stderr, "emulator: thread %d waits at a barrier that others never reach\n", i);
      std::abort();
    }
    return;
  }
}

template <class Kernel>
auto launch(Kernel kernel, dim3 grid, unsigned threads) {
  return [=](auto... args) {
    machine.grid = grid;
    machine.num_threads = static_cast<int>(threads);
    machine.body = [=] { kernel(args...); };
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        machine.block = dim3(x, y);
        run_block();
      }
    }
  };
}

}  // namespace emulator

#define threadIdx emulator::machine.thread
#define blockIdx emulator::machine.block
#define gridDim emulator::machine.grid

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }

template <class T>
T __shfl_down_sync(unsigned, T value, int distance) {
  auto& machine = emulator::machine;
  const unsigned self = machine.thread.x, lane = self % 32;
  machine.exchanged[self] = value;
  machine.takes_part[self] = true;
  emulator::wait(emulator::State::at_warp_barrier);
  const bool inside = lane + distance < 32;
  if (inside && !machine.takes_part[self + distance]) {
    std::fprintf(stderr, "emulator: lane %u shuffles from one that takes no part\n", lane);
    std::abort();
  }
  const T result = inside ? static_cast<T>(machine.exchanged[self + distance]) : value;
  emulator::wait(emulator::State::at_warp_barrier);
  machine.takes_part[self] = false;
  return result;
}

using __nv_bfloat16 = hdp::cpu::bf16;
using __half = hdp::cpu::f16;

inline float __bfloat162float(__nv_bfloat16 x) { return hdp::cpu::load(x); }
inline float __half2float(__half x) { return hdp::cpu::load(x); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 y;
  hdp::cpu::store(x, &y);
  return y;
}

inline __half __float2half_rn(float x) {
  __half y;
  hdp::cpu::store(x, &y);
  return y;
}
