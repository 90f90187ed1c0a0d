// What the CUDA kernels share: dtypes, vectors of 16 bytes, sums over a block, and how a kernel is launched.
//
// Kernels read rows with loads of 16 bytes where `Aligned` says that every row starts at 16 bytes and ends with a whole
// vector, and element by element elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"

namespace aksae {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Threads of a block, where a kernel does not say otherwise.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Blocks a multiprocessor has room for at least: where nothing is said, ptxas may aim higher and spill registers.
constexpr int kLeastBlocks = 2;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, f16>)
    return __float2half_rn(x);
  else
    return x;
}

template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <class T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / kWarp; }

// The host calls it too. nvcc gives a function that is `__device__` alone a host body that ends the process, and does
// not warn of calls to it from templates and lambdas of the host: tests/test_cuda.py looks for them.
template <class T>
__host__ __device__ __forceinline__ const T* row_of(const Matrix& m, int64_t row) {
  return static_cast<const T*>(m.data) + row * m.stride;
}

// Elements [d, d + kVector) of a row of `cols`; past its end 0.
template <class T, bool Aligned>
__device__ __forceinline__ void load_vector(const T* row, int64_t d, int64_t cols, float (&out)[kVector<T>]) {
  if constexpr (Aligned) {
    Vector<T> v{};
    if (d < cols) v = *reinterpret_cast<const Vector<T>*>(row + d);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) out[i] = widen(v.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) out[i] = d + i < cols ? widen(row[d + i]) : 0.0f;
  }
}

template <class T, bool Aligned, int N>
__device__ __forceinline__ void store_vector(T* row, int64_t d, int64_t cols, const float (&in)[N]) {
  if constexpr (Aligned) {
    if (d >= cols) return;
#pragma unroll
    for (int i = 0; i < N; i += kVector<T>) {
      Vector<T> v;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) v.at[j] = narrow<T>(in[i + j]);
      // An assignment would become four stores.
      uint4 bits;
      memcpy(&bits, &v, sizeof(v));
      __stwb(reinterpret_cast<uint4*>(row + d + i), bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (d + i < cols) row[d + i] = narrow<T>(in[i]);
  }
}

// The same in every lane, in an order that is fixed.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bits = kWarp / 2; bits; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

// Sums over the threads of a block, the same in all of them; one barrier each. Two sets of partial sums, because a warp
// may be one call ahead.
struct BlockSums {
  int ints[2][kWarps];
  float floats[2][kWarps];
};
struct BlockSum {
  BlockSums& shared;
  unsigned calls = 0;

  __device__ __forceinline__ int operator()(int x) {
    int (&partial)[kWarps] = shared.ints[calls++ % 2];
    x = __reduce_add_sync(kAllLanes, x);
    if (lane_id() == 0) partial[warp_id()] = x;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w];
    return total;
  }
  __device__ __forceinline__ float operator()(float x) {
    float (&partial)[kWarps] = shared.floats[calls++ % 2];
    x = warp_sum(x);
    if (lane_id() == 0) partial[warp_id()] = x;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w];
    return total;
  }
};

// ------------------------------------------------------------------------------------------------------- host

// Whether a matrix meets `Aligned` for loads of 16 bytes.
inline bool is_aligned(const void* data, int64_t cols, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols * size % 16 == 0 && stride * size % 16 == 0;
}
inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
inline bool is_aligned(DType dtype, Matrix m) { return is_aligned(m.data, m.cols, m.stride, size_of(dtype)); }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The most that a kernel whose dynamic shared memory depends on its arguments may take.
constexpr int64_t kVaryingShared = 72 << 10;

// Launches nothing where there are no blocks.
template <class... Parameters, class... Arguments>
int launch(Stream stream, void (*kernel)(Parameters...), int64_t blocks, int64_t blocks_y, int threads,
           int64_t shared_bytes, Arguments... arguments) {
  if (blocks == 0 || blocks_y == 0) return cudaSuccess;
  if (blocks > INT_MAX || blocks_y > 65535) return cudaErrorInvalidConfiguration;
  // From 48 KB on it has to be asked for, and static arrays count too. A kernel always asks for the same: between here
  // and the launch another thread may ask for less.
  if (shared_bytes > 32 << 10)
    if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               int(std::max(shared_bytes, kVaryingShared))))
      return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks), unsigned(blocks_y));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Of the current device; `otherwise` where it does not say.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = 0;
  return cudaGetDevice(&device) || cudaDeviceGetAttribute(&value, attribute, device) ? otherwise : value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 1); }
// The major number.
inline int compute_capability() { return device_attribute(cudaDevAttrComputeCapabilityMajor, 0); }

// Calls body(T{}) with the type of the dtype.
template <class Body>
int with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    default:
      return cudaErrorInvalidValue;
  }
}
template <class Body>
int with_type(DType dtype, bool aligned, Body body) {
  return with_type(dtype,
                   [&](auto type) { return aligned ? body(type, std::true_type()) : body(type, std::false_type()); });
}

}  // namespace aksae
