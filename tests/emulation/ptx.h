// The instructions of csrc/cuda/ptx.cuh for a host compiler, as the PTX manual describes them lane by lane. Included
// before the kernels, it stands in for that file.
#define AKSAE_PTX_CUH
#pragma once

#include "cuda.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace aksae {
extern thread_local unsigned char shared_memory[];
}

namespace aksae::ptx {

inline float max_or_nan(float a, float b) { return a != a || b != b ? a + b : std::max(a, b); }

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

// A barrier's 64 bits: arrivals in a phase, those still missing, bytes still missing, and the number of the phase.
struct Barrier {
  int16_t arrivals, missing;
  int32_t bytes : 24;
  uint32_t phase : 8;
  void end_phase_if_due() {
    if (missing == 0 && bytes == 0) missing = arrivals, ++phase;
    if (missing < 0) emulation::fail("more arrivals than a barrier expects");
  }
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

inline Barrier& as_barrier(uint64_t* barrier) { return *reinterpret_cast<Barrier*>(barrier); }
inline void init_barrier(uint64_t* barrier, int arrivals) {
  as_barrier(barrier) = {int16_t(arrivals), int16_t(arrivals), 0, 0};
}
inline void show_barriers() {}
inline void arrive_expecting(uint64_t* barrier, int bytes) {
  as_barrier(barrier).bytes += bytes;
  --as_barrier(barrier).missing;
  as_barrier(barrier).end_phase_if_due();
}
inline void arrive(uint64_t* barrier) { arrive_expecting(barrier, 0); }
inline void wait(uint64_t* barrier, uint32_t parity) {
  while (as_barrier(barrier).phase % 2 == parity) emulation::pause();
}

// A chunk of 16 bytes is where the lower three bits of its number are exchanged with those of its row of 128 bytes.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_tile(void* to, const CUtensorMap* map, int col, int row, uint64_t* barrier) {
  const EmulatedMap& m = *reinterpret_cast<const EmulatedMap*>(map);
  const uint32_t start = uint32_t(static_cast<unsigned char*>(to) - shared_memory);
  if (start % 1024) emulation::fail("a tile that is not at 1024 bytes");
  for (uint32_t r = 0; r < m.box[1]; ++r)
    for (uint32_t c = 0; c < m.box[0]; ++c) {
      const uint64_t from_row = uint64_t(row) + r, from_col = uint64_t(col) + c;
      uint16_t number = 0;
      if (from_row < m.sizes[1] && from_col < m.sizes[0])
        std::memcpy(&number, static_cast<const char*>(m.data) + from_row * m.stride + from_col * 2, 2);
      std::memcpy(shared_memory + swizzled(start + r * 128 + c * 2), &number, 2);
    }
  as_barrier(barrier).bytes -= int32_t(m.box[0] * m.box[1] * 2);
  as_barrier(barrier).end_phase_if_due();
}

template <int>
void take_registers() {}
template <int>
void give_registers() {}

inline uint64_t tile_descriptor(const void* tile) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32;
  return kSwizzle128 | kEightRows | uint64_t(static_cast<const unsigned char*>(tile) - shared_memory) / 16;
}
// The number in column k of a row of the tile.
template <class T>
float tile_number(uint64_t descriptor, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) * 16, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) * 16;
  const uint32_t address = start + uint32_t(row / 8) * eight_rows + uint32_t(row % 8) * 128 + uint32_t(k) * 2;
  uint16_t bits;
  std::memcpy(&bits, shared_memory + swizzled(address), 2);
  return number<T>(bits, 0);
}

// Products read their tiles only when they are waited for: who gives a stage back too early finds another's numbers.
inline void begin_products() {}
inline void end_products() { emulation::end_tasks(); }
template <int Pending>
void wait_products() {
  emulation::wait_tasks(Pending);
}
inline void settle(float (&)[128]) {}
template <class T>
void multiply_tiles(float (&d)[128], uint64_t a, uint64_t b, bool adds) {
  emulation::begin_task([&d, a, b, adds] {
    // A thread has rows l / 4 and 8 + l / 4 of its warp's sixteen.
    const int lane = emulation::self->lane, first = int(threadIdx.x) / 32 % 4 * 16 + lane / 4;
    float left[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) left[half][k] = tile_number<T>(a, first + half * 8, k);
    for (int col = 0; col < 64; ++col) {
      float right[16];
      for (int k = 0; k < 16; ++k) right[k] = tile_number<T>(b, col / 2 * 8 + lane % 4 * 2 + col % 2, k);
      for (int half = 0; half < 2; ++half) {
        float& out = d[col / 2 * 4 + half * 2 + col % 2];
        double sum = adds ? out : 0;
        for (int k = 0; k < 16; ++k) sum += double(left[half][k]) * double(right[k]);
        out = float(sum);
      }
    }
  });
}

}  // namespace aksae::ptx
