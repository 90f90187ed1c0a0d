// The scheduler behind cuda_runtime.h, and the two functions of a CUDA build of torch that the binding calls.
#include "cuda.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {
constexpr size_t kMostShared = 227 << 10, kStack = 256 << 10, kCanary = 64;
// Dynamic shared memory that need not be asked for: 48 KB, less 16 that static arrays may take.
constexpr size_t kUnasked = 32 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN as a float, -1 as an integer
}  // namespace

namespace aksae {
// The one dynamic array of shared memory that kernels declare.
alignas(1024) thread_local unsigned char shared_memory[kMostShared + kCanary];
}  // namespace aksae

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 gridDim;

namespace emulation {

thread_local Thread* self;

void fail(const char* why) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u, %u, thread %u)\n", why, blockIdx.x, blockIdx.y, threadIdx.x);
  std::abort();
}

namespace {

enum class State { ready, waiting, done };

// What a thread has begun and will see when it waits for it, by groups.
struct Queue {
  std::vector<std::function<void()>> tasks;
  std::vector<size_t> ends;

  void wait(int pending_groups) {
    const size_t done = ends.size() > size_t(pending_groups) ? ends.size() - size_t(pending_groups) : 0;
    if (!done) return;
    const size_t end = ends[done - 1];
    for (size_t i = 0; i < end; ++i) tasks[i]();
    tasks.erase(tasks.begin(), tasks.begin() + ptrdiff_t(end));
    ends.erase(ends.begin(), ends.begin() + ptrdiff_t(done));
    for (size_t& later : ends) later -= end;
  }
};

struct Fiber : Thread {
  unsigned index;
  State state;
  bool paused = false;
  jmp_buf here;
  ucontext_t start{};
  bool started = false;
  Queue copies, products;
};

// The fibers of one OS thread.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  jmp_buf scheduler;
  const std::function<void()>* body;
  int threads, done, arrived, sum, last_sum;

  void run(const cudaLaunchConfig_t&, const std::function<void()>&, bool backwards);
  void resume(Fiber*);
  void release_warp(Warp*);
  void release_block();
};
thread_local Block block;

void wait() {
  Fiber* const fiber = static_cast<Fiber*>(self);
  if (_setjmp(fiber->here) == 0) _longjmp(block.scheduler, 1);
  // Some other fiber ran meanwhile; the scheduler made this one `self` again.
}

// A fiber lives on from block to block: one turn of the loop for each.
void fiber_main() {
  for (;;) {
    (*block.body)();
    Fiber* const fiber = static_cast<Fiber*>(self);
    fiber->state = State::done;
    ++block.done;
    ++fiber->warp->done;
    if (block.arrived && block.arrived == block.threads - block.done) block.release_block();
    wait();
  }
}

void Block::resume(Fiber* fiber) {
  self = fiber;
  threadIdx = {fiber->index, 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber->started) _longjmp(fiber->here, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

void Block::release_warp(Warp* warp) {
  warp->arrived = 0;
  const size_t first = size_t(warp - warps.data()) * kWarp;
  for (size_t i = first; i < first + kWarp; ++i)
    if (fibers[i]->state == State::waiting) fibers[i]->state = State::ready;
}

void Block::release_block() {
  arrived = 0;
  last_sum = sum;
  sum = 0;
  for (int i = 0; i < threads; ++i)
    if (fibers[i]->state == State::waiting) fibers[i]->state = State::ready;
}

void Block::run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel, bool backwards) {
  threads = int(config.blockDim.x);
  body = &kernel;
  done = arrived = sum = 0;
  while (int(fibers.size()) < threads) {
    auto fiber = std::make_unique<Fiber>();
    void* const stack =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks");
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = stack;
    fiber->start.uc_stack.ss_size = kStack;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    fibers.push_back(std::move(fiber));
  }
  const int n_warps = threads / kWarp;
  warps.resize(std::max<size_t>(warps.size(), size_t(n_warps)));
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.index = unsigned(i);
    fiber.warp = &warps[i / kWarp];
    fiber.lane = i % kWarp;
    fiber.operations = 0;
    fiber.state = State::ready;
    fiber.copies = fiber.products = {};
  }
  for (int w = 0; w < n_warps; ++w) warps[w].arrived = warps[w].done = 0;
  std::memset(aksae::shared_memory, kPoison, config.dynamicSmemBytes + kCanary);
  int idle = 0;
  while (done < threads) {
    bool progress = false, all_paused = true;
    for (int i = 0; i < n_warps; ++i) {
      const int w = backwards ? n_warps - 1 - i : i;
      for (bool again = true; again;) {
        again = false;
        for (int j = 0; j < kWarp; ++j) {
          Fiber* const fiber = fibers[w * kWarp + (backwards ? kWarp - 1 - j : j)].get();
          if (fiber->state != State::ready) continue;
          fiber->paused = false;
          resume(fiber);
          all_paused = all_paused && fiber->paused;
          // One that merely paused gives way to the other warps.
          again |= fiber->state != State::ready;
          progress = true;
        }
      }
    }
    if (!progress) fail("a barrier or a warp operation that not all threads reach");
    idle = all_paused ? idle + 1 : 0;
    if (idle > 100) fail("a wait for memory that nobody changes");
  }
  for (size_t i = 0; i < kCanary; ++i)
    if (aksae::shared_memory[config.dynamicSmemBytes + i] != kPoison) fail("a write past the shared memory");
}

std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

struct Launch {
  const cudaLaunchConfig_t& config;
  const std::function<void()>& body;
  bool backwards;
  std::atomic<int64_t> next{0};

  void work() {
    gridDim = config.gridDim;
    const int64_t width = config.gridDim.x, blocks = width * config.gridDim.y;
    for (int64_t i; (i = next.fetch_add(1)) < blocks;) {
      const int64_t b = backwards ? blocks - 1 - i : i;
      blockIdx = {unsigned(b % width), unsigned(b / width), 0};
      block.run(config, body, backwards);
    }
    self = nullptr;
  }
};

// The second OS thread. It never ends: the process may not wait for it.
struct Helper {
  std::mutex mutex;
  std::condition_variable changed;
  Launch* launch = nullptr;

  Helper() {
    std::thread([this] {
      std::unique_lock lock(mutex);
      for (;;) {
        changed.wait(lock, [this] { return launch != nullptr; });
        Launch* const mine = launch;
        lock.unlock();
        mine->work();
        lock.lock();
        launch = nullptr;
        changed.notify_all();
      }
    }).detach();
  }
};

}  // namespace

void meet_warp() {
  Fiber* const fiber = static_cast<Fiber*>(self);
  Warp* const warp = fiber->warp;
  if (++warp->arrived == kWarp) {
    block.release_warp(warp);
    return;
  }
  fiber->state = State::waiting;
  wait();
}

int meet_block(int number) {
  Fiber* const fiber = static_cast<Fiber*>(self);
  block.sum += number;
  if (++block.arrived == block.threads - block.done) {
    block.release_block();
    return block.last_sum;
  }
  fiber->state = State::waiting;
  wait();
  return block.last_sum;
}

void pause() {
  static_cast<Fiber*>(self)->paused = true;
  wait();
}

void begin_copy(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("an unaligned copy");
  static_cast<Fiber*>(self)->copies.tasks.push_back([=] {
    if (from)
      std::memcpy(to, from, 16);
    else
      std::memset(to, 0, 16);
  });
}
void end_copies() {
  Queue& copies = static_cast<Fiber*>(self)->copies;
  copies.ends.push_back(copies.tasks.size());
}
void wait_copies(int pending_groups) { static_cast<Fiber*>(self)->copies.wait(pending_groups); }

void begin_task(std::function<void()> task) { static_cast<Fiber*>(self)->products.tasks.push_back(std::move(task)); }
void end_tasks() {
  Queue& products = static_cast<Fiber*>(self)->products;
  products.ends.push_back(products.tasks.size());
}
void wait_tasks(int pending_groups) { static_cast<Fiber*>(self)->products.wait(pending_groups); }

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return cudaErrorInvalidValue;
  shared_limits()[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  static std::atomic<unsigned> launches{0};
  static Helper* const helper = new Helper;
  const dim3 grid = config.gridDim, threads = config.blockDim;
  if (!grid.x || !grid.y || grid.z != 1 || grid.x > 0x7fffffffu || grid.y > 65535 || !threads.x || threads.x > 1024 ||
      threads.x % kWarp || threads.y != 1 || threads.z != 1)
    return cudaErrorInvalidConfiguration;
  std::unique_lock lock(one_at_a_time);
  const auto limit = shared_limits().find(kernel);
  if (config.dynamicSmemBytes > (limit == shared_limits().end() ? kUnasked : size_t(limit->second)))
    return cudaErrorInvalidValue;
  Launch job{config, body, launches++ % 2 == 1};
  const bool shared = int64_t(grid.x) * grid.y > 1;
  if (shared) {
    std::unique_lock hand(helper->mutex);
    helper->launch = &job;
    helper->changed.notify_all();
  }
  job.work();
  if (shared) {
    std::unique_lock hand(helper->mutex);
    helper->changed.wait(hand, [] { return helper->launch == nullptr; });
  }
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : EMULATED_MAJOR;
  return cudaSuccess;
}

// The driver's tensor maps.
static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill) {
  // What the manual asks of them.
  const bool fits = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 &&
                    strides[0] > 0 && strides[0] < uint64_t(1) << 40 && sizes[0] && sizes[1] &&
                    sizes[0] <= uint64_t(1) << 32 && sizes[1] <= uint64_t(1) << 32 && box[0] * 2 == 128 && box[1] &&
                    box[1] <= 256 && steps[0] == 1 && steps[1] == 1;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  *reinterpret_cast<EmulatedMap*>(map) = {data, {sizes[0], sizes[1]}, strides[0], {box[0], box[1]}};
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(encode_tiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Of torch: the current stream, and a guard of the device. Hidden, so that they stand in for nobody else.
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
}
