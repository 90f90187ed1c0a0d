// Scores on the tensor cores of sm_90a (wgmma), fed by the copy engine (TMA). Tiles of 128 rows and 256 latents. One
// warpgroup copies, kStages steps of kStep columns ahead, also into the next tile; two multiply 64 rows each with the
// latents that they share. A block takes tile after tile.
#pragma once

#include <cudaTypedefs.h>

#include "score.cuh"

namespace aksae::sm90 {

constexpr int kRows = 128, kCols = 256, kStep = 64, kStages = 4;
constexpr int kGroupThreads = 128, kConsumers = 2, kBlock = kGroupThreads * (1 + kConsumers);
constexpr int kConsumerRows = kRows / kConsumers, kConsumerWarps = kConsumers * kGroupThreads / kWarp;
constexpr int kRowBytes = kStep * 2, kStageBytes = (kRows + kCols) * kRowBytes;
constexpr int64_t kSharedBytes = kStages * kStageBytes + 2 * kStages * sizeof(uint64_t);

// Where a role is in the ring of stages. Phases alternate with every round.
struct Turn {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

template <class T, class Sink>
__global__ void __launch_bounds__(kBlock, 1)
    product_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap W, int steps,
                   int64_t row_tiles, int64_t tiles, Sink sink) {
// Other architectures have no such instructions, and are not given this kernel. Where both sm_90 and sm_90a are built
// the driver chooses: should it take sm_90, this must not pass for a product.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  uint64_t* const filled = reinterpret_cast<uint64_t*>(shared_memory + kStages * kStageBytes);
  uint64_t* const emptied = filled + kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) ptx::init_barrier(&filled[s], 1), ptx::init_barrier(&emptied[s], kConsumerWarps);
    ptx::show_barriers();
  }
  __syncthreads();
  const int group = int(threadIdx.x) / kGroupThreads;
  if (group == 0) {
    ptx::give_registers<40>();
    if (threadIdx.x != 0) return;
    Turn turn;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x)
      for (int step = 0; step < steps; ++step, turn.next()) {
        // Nobody has to empty a stage before its first use: the phase before the first counts as over.
        ptx::wait(&emptied[turn.stage], turn.phase ^ 1);
        unsigned char* const stage = shared_memory + turn.stage * kStageBytes;
        ptx::arrive_expecting(&filled[turn.stage], kStageBytes);
        ptx::copy_tile(stage, &x, step * kStep, int(tile % row_tiles * kRows), &filled[turn.stage]);
        ptx::copy_tile(stage + kRows * kRowBytes, &W, step * kStep, int(tile / row_tiles * kCols), &filled[turn.stage]);
      }
  } else {
    ptx::take_registers<232>();
    const int consumer = group - 1;
    Turn turn;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      float sums[kCols / 2];
      int last = 0;
      for (int step = 0; step < steps; ++step, turn.next()) {
        ptx::wait(&filled[turn.stage], turn.phase);
        const unsigned char* const stage = shared_memory + turn.stage * kStageBytes;
        const uint64_t a = ptx::tile_descriptor(stage + consumer * kConsumerRows * kRowBytes);
        const uint64_t b = ptx::tile_descriptor(stage + kRows * kRowBytes);
        ptx::begin_products();
#pragma unroll
        for (int chunk = 0; chunk < kRowBytes / 16; chunk += 2)
          ptx::multiply_tiles<T>(sums, a + chunk, b + chunk, step > 0 || chunk > 0);
        ptx::end_products();
        // This warp has read the step before.
        ptx::wait_products<1>();
        if (step > 0 && lane_id() == 0) ptx::arrive(&emptied[last]);
        last = turn.stage;
      }
      ptx::wait_products<0>();
      ptx::settle(sums);
      if (lane_id() == 0) ptx::arrive(&emptied[last]);

      const int64_t first_col = tile / row_tiles * kCols;
      const int64_t row = tile % row_tiles * kRows + consumer * kConsumerRows + warp_id() % 4 * 16 + lane_id() / 4;
      const auto columns = sink.columns(first_col, kCols);
      const typename Sink::Row rows[2] = {sink.row(row, first_col), sink.row(row + 8, first_col)};
#pragma unroll
      for (int c = 0; c < kCols; c += 1 << kGroupShift) sink.keep(rows, columns, c, &sums[c / 2]);
    }
  }
#else
  __trap();
#endif
}

// A map of tiles of `rows` rows and kStep columns.
inline int make_map(const Operand& m, int64_t depth, int rows, bool is_bf16, CUtensorMap& map) {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (const int error =
          cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found))
    return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {cuuint64_t(depth), cuuint64_t(m.rows)}, strides[1] = {cuuint64_t(m.stride) * 2};
  const cuuint32_t box[2] = {kStep, cuuint32_t(rows)}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(encode)(
      &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(m.data),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// What the copy engine takes: rows that do not overlap.
inline bool can_run(const Operand& x, const Operand& W, int64_t depth) {
#ifdef AKSAE_SM90A
  return depth > 0 && x.stride >= depth && W.stride >= depth && x.rows <= INT_MAX && depth <= INT_MAX - kStep &&
         compute_capability() == 9;
#else
  return false;
#endif
}

template <class T, class Sink>
int launch_product(Stream stream, Operand x, Operand W, int64_t depth, Sink sink) {
  if (x.rows == 0 || W.rows == 0) return cudaSuccess;
  CUtensorMap x_map, W_map;
  constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  if (const int error = make_map(x, depth, kRows, kIsBf16, x_map)) return error;
  if (const int error = make_map(W, depth, kCols, kIsBf16, W_map)) return error;
  const int64_t row_tiles = ceil_div(x.rows, kRows), tiles = row_tiles * ceil_div(W.rows, kCols);
  return launch(stream, product_kernel<T, Sink>, std::min<int64_t>(multiprocessors(), tiles), 1, kBlock, kSharedBytes,
                x_map, W_map, int(ceil_div(depth, kStep)), row_tiles, tiles, sink);
}

}  // namespace aksae::sm90
