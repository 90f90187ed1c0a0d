// CUDA C++ for a host compiler: enough of the language and of the runtime to run this project's kernels on a CPU.
//
// Every thread of a block is a fiber; fibers switch where a thread has to wait for others. Blocks run on two OS
// threads. A wait that cannot end (a barrier or a warp operation that some thread never reaches) stops the process with
// a message, and so do writes past a block's shared memory and launches that no device would take. Odd and even
// launches run threads in opposite orders, so a missing barrier changes results. What is not here (copies,
// synchronisation, allocation) a launch must not use.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

// ------------------------------------------------------------------------------------------------------ runtime

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int device);
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(data, value, bytes);
  return cudaSuccess;
}

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kSlot = 128;

// What a warp exchanges: two sets of slots, since a lane may be one operation ahead of the others, and no more.
struct Warp {
  alignas(16) unsigned char slots[2][kWarp][kSlot];
  int arrived = 0, done = 0;
};

struct Thread {
  Warp* warp;
  int lane;
  unsigned operations = 0;
};

extern thread_local Thread* self;

cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel, const std::function<void()>& body);
cudaError_t allow_shared(const void* kernel, int bytes);
// Waits until all threads of the warp, or of the block, are here.
void meet_warp();
// The sum of the threads' numbers.
int meet_block(int number);
// Copies of 16 bytes, or of zeros, that take place when their group is waited for.
void begin_copy(void* to, const void* from);
void end_copies();
void wait_copies(int pending_groups);
// The same of anything.
void begin_task(std::function<void()>);
void end_tasks();
void wait_tasks(int pending_groups);
// Lets the others run: for loops that wait for memory to change.
void pause();
[[noreturn]] void fail(const char* why);

// What each lane of the warp handed in; valid until the lane's operation after the next.
template <class V>
const unsigned char (*exchange(const V& value))[kSlot] {
  static_assert(sizeof(V) <= kSlot && std::is_trivially_copyable_v<V>);
  Thread* const me = self;
  auto& slots = me->warp->slots[me->operations++ % 2];
  std::memcpy(slots[me->lane], &value, sizeof(V));
  meet_warp();
  return slots;
}
template <class V>
V lane_value(const unsigned char (*slots)[kSlot], int lane) {
  V value;
  std::memcpy(&value, slots[lane & (kWarp - 1)], sizeof(V));
  return value;
}
inline void require_full(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp operation with a partial mask");
}

}  // namespace emulation

// Those of the thread that runs now.
extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 gridDim;

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const std::tuple<P...> parameters(std::forward<A>(arguments)...);
  return emulation::launch(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, parameters); });
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  return emulation::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

// ----------------------------------------------------------------------------------------------------- language

using std::isfinite;
using std::max;
using std::min;

inline void __syncthreads() { emulation::meet_block(0); }
inline int __syncthreads_or(int predicate) { return emulation::meet_block(predicate != 0) != 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::require_full(mask);
  emulation::exchange(0);
}
template <class V>
V __shfl_sync(unsigned mask, V value, int lane) {
  emulation::require_full(mask);
  return emulation::lane_value<V>(emulation::exchange(value), lane);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits) {
  emulation::require_full(mask);
  return emulation::lane_value<V>(emulation::exchange(value), emulation::self->lane ^ bits);
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned distance) {
  emulation::require_full(mask);
  const auto slots = emulation::exchange(value);
  const int lane = emulation::self->lane;
  return emulation::lane_value<V>(slots, lane < int(distance) ? lane : lane - int(distance));
}
template <class V, class F>
V warp_fold(unsigned mask, V value, F fold) {
  emulation::require_full(mask);
  const auto slots = emulation::exchange(value);
  V total = emulation::lane_value<V>(slots, 0);
  for (int lane = 1; lane < emulation::kWarp; ++lane) total = fold(total, emulation::lane_value<V>(slots, lane));
  return total;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return warp_fold(mask, value, std::plus<unsigned>());
}
inline int __reduce_add_sync(unsigned mask, int value) { return warp_fold(mask, value, std::plus<int>()); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return warp_fold(mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate ? 1u << emulation::self->lane : 0u;
  return warp_fold(mask, bit, std::bit_or<unsigned>());
}
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  emulation::require_full(mask);
  const auto slots = emulation::exchange(value);
  unsigned same = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane)
    same |= unsigned(emulation::lane_value<unsigned>(slots, lane) == value) << lane;
  return same;
}

inline void __stwb(uint4* address, uint4 value) { *address = value; }
inline void __stwb(float2* address, float2 value) { *address = value; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Blocks run on two OS threads.
template <class V>
V atomicAdd(V* address, V value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class V>
V atomicMax(V* address, V value) {
  V old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
