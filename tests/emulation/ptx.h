// The instructions of csrc/cuda/ptx.cuh for a host compiler, as the PTX manual describes them lane by lane. Included
// before the kernels, it stands in for that file.
#define AKSAE_PTX_CUH
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace aksae::ptx {

// Copies happen only when they are waited for: who reads too early finds what was there before.
inline void copy_16(void* to, const void* from, bool is_there) { emulation::begin_copy(to, is_there ? from : nullptr); }
inline void end_copies() { emulation::end_copies(); }
template <int Pending>
void wait_copies() {
  emulation::wait_copies(Pending);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto rows = emulation::exchange(row);
  const int lane = emulation::self->lane;
  for (int i = 0; i < 4; ++i) {
    const void* const from = emulation::lane_value<const void*>(rows, i * 8 + lane / 4);
    std::memcpy(&r[i], static_cast<const char*>(from) + lane % 4 * 4, 4);
  }
}

template <class T>
float number(uint32_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> 16 * which);
  T value;
  std::memcpy(&value, &bits, 2);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(value);
  else
    return __bfloat162float(value);
}

// Sixteen products and the sum so far, added exactly and rounded once.
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    float a[8], b[4];
  } mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = number<T>(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) mine.b[i] = number<T>(i < 2 ? b0 : b1, i % 2);
  const auto all = emulation::exchange(mine);
  const auto of = [&](int lane) { return reinterpret_cast<const Fragments*>(all[lane]); };
  const int lane = emulation::self->lane, row = lane / 4;
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, col = lane % 4 * 2 + i % 2;
    double sum = d[i];
    // Column k of a row: register k / 8 of the lower or upper rows, of the lane that has k % 8 / 2.
    for (int k = 0; k < 16; ++k)
      sum += double(of(row * 4 + k % 8 / 2)->a[(k / 8 * 2 + half) * 2 + k % 2]) *
             double(of(col * 4 + k % 8 / 2)->b[k / 8 * 2 + k % 2]);
    d[i] = float(sum);
  }
}

}  // namespace aksae::ptx
