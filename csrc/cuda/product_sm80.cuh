// Scores on the tensor cores of sm_80 and later (mma.sync). Tiles of 128 rows and 128 latents; copies run kStages - 1
// steps of kStep columns ahead; a warp multiplies 64 rows with 32 latents, one group.
#pragma once

#include "score.cuh"

namespace aksae::sm80 {

constexpr int kTile = 128, kStep = 32, kStages = 4;
constexpr int kWarpRows = 64, kWarpCols = 32;
static_assert(kWarpCols == 1 << kGroupShift);
constexpr int kRowChunks = kStep * 2 / 16;  // of 16 bytes
constexpr int kOperandBytes = kTile * kStep * 2, kStageBytes = 2 * kOperandBytes;
constexpr int64_t kSharedBytes = kStages * kStageBytes;

// Where a chunk of a row is. Eight rows that are read at once lie in different banks.
__device__ __forceinline__ int place_of(int row, int chunk) {
  return (row * kRowChunks + (chunk ^ (row >> 1 & (kRowChunks - 1)))) * 16;
}

// Begins to copy columns [first, first + kStep) of a tile's rows.
__device__ __forceinline__ void copy_tile(unsigned char* to, const Operand& from, int64_t first_row, int64_t first,
                                          int64_t depth) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kRowChunks; i += kThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    const int64_t r = first_row + row, c = first + chunk * 8;
    const bool is_there = r < from.rows && c < depth;
    const uint16_t* const data = static_cast<const uint16_t*>(from.data);
    ptx::copy_16(to + place_of(row, chunk), is_there ? data + r * from.stride + c : data, is_there);
  }
}

// A screen's bounds take registers that leave room for one block.
template <class T, class Sink>
__global__ void __launch_bounds__(kThreads, Sink::kIsScreen ? 1 : kLeastBlocks)
    product_kernel(Operand x, Operand W, int64_t depth, int64_t row_tiles, Sink sink) {
  constexpr int kM = kWarpRows / 16, kN = kWarpCols / 8;
  // Tiles of one set of latents follow each other, so that W is read from memory once.
  const int64_t first_row = blockIdx.x % row_tiles * kTile, first_col = blockIdx.x / row_tiles * kTile;
  const int warp_row = warp_id() / 4 * kWarpRows, warp_col = warp_id() % 4 * kWarpCols;
  const int steps = int((depth + kStep - 1) / kStep);

  const auto begin_step = [&](int step) {
    unsigned char* const stage = shared_memory + step % kStages * kStageBytes;
    if (step < steps) {
      copy_tile(stage, x, first_row, int64_t(step) * kStep, depth);
      copy_tile(stage + kOperandBytes, W, first_col, int64_t(step) * kStep, depth);
    }
    // A group even where there is nothing left, so that counts of groups stay right.
    ptx::end_copies();
  };

  float sums[kM][kN][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) begin_step(step);
  for (int step = 0; step < steps; ++step) {
    ptx::wait_copies<kStages - 2>();
    // This step's tiles are there for all, and all are done with those of the step before.
    __syncthreads();
    begin_step(step + kStages - 1);
    const unsigned char* const x_tile = shared_memory + step % kStages * kStageBytes;
    const unsigned char* const W_tile = x_tile + kOperandBytes;
#pragma unroll
    for (int chunk = 0; chunk < kRowChunks; chunk += 2) {
      uint32_t a[kM][4], b[kN / 2][4];
      // Matrices: rows 0 to 7 and 8 to 15 of the first chunk, then of the second.
#pragma unroll
      for (int m = 0; m < kM; ++m)
        ptx::load_matrices(a[m], x_tile + place_of(warp_row + m * 16 + lane_id() % 16, chunk + lane_id() / 16));
      // Both chunks of latents 0 to 7, then of 8 to 15.
#pragma unroll
      for (int n = 0; n < kN / 2; ++n)
        ptx::load_matrices(
            b[n], W_tile + place_of(warp_col + n * 16 + lane_id() / 16 * 8 + lane_id() % 8, chunk + lane_id() / 8 % 2));
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
          ptx::multiply_add<T>(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }

  const int64_t own_col = first_col + warp_col;
  const auto columns = sink.columns(own_col, kWarpCols);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int64_t row = first_row + warp_row + m * 16 + lane_id() / 4;
    const typename Sink::Row rows[2] = {sink.row(row, own_col), sink.row(row + 8, own_col)};
    sink.keep(rows, columns, 0, &sums[m][0][0]);
  }
}

template <class T, class Sink>
int launch_product(Stream stream, Operand x, Operand W, int64_t depth, Sink sink) {
  const int64_t row_tiles = ceil_div(x.rows, kTile);
  return launch(stream, product_kernel<T, Sink>, row_tiles * ceil_div(W.rows, kTile), 1, kThreads, kSharedBytes, x, W,
                depth, row_tiles, sink);
}

}  // namespace aksae::sm80
