// topk_encode: a product whose epilogue keeps the scores and the maximum of every 32 of them, and a selection that
// reads the groups that can win (select.cuh). Rows are taken in chunks, which bounds the memory of the scores.
//
// 16-bit inputs: the scores are ranked as the tensor cores leave them, in fp32. fp32 inputs: both sides are rounded to
// bf16 and the product is a screen (cpu/screen.h has the proof): with e the bound on a score's error, L the k-th
// largest score - e of a row, only latents with score + e >= L can be among its k best. Those are multiplied again in
// fp32, and ranked by that. A row with more of them than fit in shared memory, as one of numbers that are not finite,
// joins a list, and all its scores are computed in fp32; the list stays on the device.
#include "product_sm80.cuh"
#include "product_sm90.cuh"

namespace aksae {

namespace {

// ------------------------------------------------------------------------------------------------------- operands

// Rows in 16 bits at 16-byte boundaries, one warp each. From fp32 to bf16, with norms; from 16 bits as they are.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(Matrix from, int64_t stride, uint16_t* to, Norms* norms) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp_id();
  if (row >= from.rows) return;
  const T* const in = row_of<T>(from, row);
  uint16_t* const out = to + row * stride;
  float squares = 0, lost = 0;
#pragma unroll 4
  for (int64_t i = lane_id(); i < stride; i += kWarp) {
    if constexpr (std::is_same_v<T, float>) {
      const float x = i < from.cols ? in[i] : 0.0f;
      const bf16 rounded = narrow<bf16>(x);
      reinterpret_cast<bf16*>(out)[i] = rounded;
      const float difference = x - widen(rounded);
      squares = fmaf(x, x, squares);
      lost = fmaf(difference, difference, lost);
    } else {
      out[i] = i < from.cols ? reinterpret_cast<const uint16_t*>(in)[i] : uint16_t(0);
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    squares = warp_sum(squares);
    lost = warp_sum(lost);
    if (lane_id() == 0)
      norms[row] = {sqrtf(squares) * kNormMargin + kNormFloor, sqrtf(lost) * kNormMargin + kNormFloor};
  }
}

// ----------------------------------------------------------------------------------------- selection from 16 bits

// Maxima as the product left them, joined to the groups of the selection.
__device__ __forceinline__ void join_maxima(const Key* from, int64_t n, const Grouping& group, Key* to) {
  for (int g = threadIdx.x; g < group.n; g += kThreads) {
    Key best = 0;
    const int64_t width = int64_t(1) << (group.shift - kGroupShift);
    for (int64_t i = g * width; i < min((g + 1) * width, n); ++i) best = max(best, from[i]);
    to[g] = best;
  }
  __syncthreads();
}

template <class Out, class Sink>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    select_scores_kernel(Sink sink, const int32_t* k, CodesOut out, Grouping group) {
  __shared__ SelectShared shared;
  const int64_t row = blockIdx.x;
  const CodeRowOut<Out> codes(out, row);
  const int64_t wanted = min(int64_t(k[row]), out.width);
  if (wanted <= 0) return codes.finish(0);
  const float* const scores = sink.scores + row * sink.stride;
  join_maxima(sink.maxima + row * sink.groups, sink.groups, group, reinterpret_cast<Key*>(shared_memory));
  select_row(
      sink.cols, group.shift, group.n, wanted, [&](int64_t i) { return key_of(scores[i]); }, shared_memory, shared,
      codes);
}

// --------------------------------------------------------------------------------------------- selection from fp32

// The product of a row of x and one of W by a warp, in two levels: no lane adds up more than kRun vectors in a row.
template <bool Aligned>
__device__ __forceinline__ float exact_product(const float* x, const float* w, int64_t cols) {
  constexpr int kSpan = kVector<float>, kRun = 16;
  float total = 0;
  for (int64_t d = lane_id() * kSpan; d < cols;) {
    float run = 0;
#pragma unroll 4
    for (int i = 0; i < kRun && d < cols; ++i, d += kWarp * kSpan) {
      float left[kSpan], right[kSpan];
      load_vector<float, Aligned>(x, d, cols, left);
      load_vector<float, Aligned>(w, d, cols, right);
#pragma unroll
      for (int v = 0; v < kSpan; ++v) run = fmaf(left[v], right[v], run);
    }
    total += run;
  }
  return warp_sum(total);
}

// Rows that the screen could not judge.
struct Unscreened {
  int32_t* count;
  int32_t* rows;
};

using ScreenScores = Scores<float, true>;
constexpr int64_t screen_bytes(int64_t n_groups) { return n_groups * 12 + kCandidates * 12; }
static_assert(screen_bytes(kMostGroups) <= kVaryingShared);

template <bool Aligned>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    select_screened_kernel(ScreenScores sink, Matrix x, Matrix W, const int32_t* k, CodesOut out, Grouping group,
                           Unscreened unscreened) {
  __shared__ SelectShared shared;
  const int64_t row = blockIdx.x;
  const CodeRowOut<float> codes(out, row);
  const int64_t wanted = min(int64_t(k[row]), out.width);
  if (wanted <= 0) return codes.finish(0);
  Key* const lower_maxima = reinterpret_cast<Key*>(shared_memory);
  Key* const maxima = lower_maxima + group.n;
  int32_t* const groups = reinterpret_cast<int32_t*>(maxima + group.n);
  Key* const lower = reinterpret_cast<Key*>(groups + group.n);
  Key* const upper = lower + kCandidates;
  int32_t* const columns = reinterpret_cast<int32_t*>(upper + kCandidates);
  BlockSum sum{shared.sums};
  join_maxima(sink.lower + row * sink.groups, sink.groups, group, lower_maxima);
  join_maxima(sink.maxima + row * sink.groups, sink.groups, group, maxima);

  // Keeps what may reach the k-th largest of some lower bounds.
  const auto reach = [&](int64_t n, const Key* keys) {
    const Cut cut = find_cut(wanted, [&](Key t) { return count_keys(n, [&](int64_t i) { return keys[i]; }, t, sum); });
    return Cut{cut.ties ? cut.key - 1 : cut.key, 0};
  };
  const Cut first = reach(group.n, lower_maxima);
  const int64_t n_read = keep(
      group.n, first, [&](int64_t i) { return maxima[i]; }, shared.counts,
      [&](int64_t at, int64_t g, Key) { groups[at] = int32_t(g); });
  __syncthreads();
  const float* const scores = sink.scores + row * sink.stride;
  const Norms norms = sink.screen.x[row];
  const auto error = [&](int64_t c) {
    return sink.screen.error(norms, sink.screen.W[c], sink.screen.own_error(sink.bias[c]));
  };
  const auto column = [&](int64_t i) {
    return (int64_t(groups[i >> group.shift]) << group.shift) + (i & ((1 << group.shift) - 1));
  };
  const int64_t n_candidates = keep(
      n_read << group.shift, first,
      [&](int64_t i) {
        const int64_t c = column(i);
        return c < sink.cols ? upper_key(scores[c] + error(c)) : 0;
      },
      shared.counts,
      [&](int64_t at, int64_t i, Key x) {
        if (at >= kCandidates) return;
        const int64_t c = column(i);
        upper[at] = x, lower[at] = lower_key(scores[c] - error(c)), columns[at] = int32_t(c);
      });
  __syncthreads();
  if (n_candidates > kCandidates) {
    if (threadIdx.x == 0) unscreened.rows[atomicAdd(unscreened.count, 1)] = int32_t(row);
    return;
  }

  // The k-th largest of all lower bounds is that of the candidates: whoever reaches it is one. Fewer can reach it.
  const Cut second = reach(n_candidates, lower);
  __syncthreads();
  int32_t* const chosen = reinterpret_cast<int32_t*>(lower);
  const int64_t n_chosen = keep(
      n_candidates, second, [&](int64_t i) { return upper[i]; }, shared.counts,
      [&](int64_t at, int64_t i, Key) { chosen[at] = columns[i]; });
  __syncthreads();
  Key* const keys = upper;
  const float* const x_row = row_of<float>(x, row);
  for (int64_t i = warp_id(); i < n_chosen; i += kWarps) {
    const int64_t c = chosen[i];
    const float score = exact_product<Aligned>(x_row, row_of<float>(W, c), x.cols);
    if (lane_id() == 0) keys[i] = key_of(score + sink.bias[c]);
  }
  __syncthreads();
  const auto key = [&](int64_t i) { return keys[i]; };
  const Cut cut = find_cut(wanted, [&](Key t) { return count_keys(n_chosen, key, t, sum); });
  codes.finish(keep(n_chosen, cut, key, shared.counts,
                    [&](int64_t at, int64_t i, Key best) { codes.set(at, chosen[i], best); }));
}

// All scores of the listed rows, in fp32, over those of the screen. Blocks take tiles of 32 rows and 64 latents; sums
// run over kRun columns, then over the runs.
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    exact_scores_kernel(ScreenScores sink, Matrix x, Matrix W, Unscreened unscreened) {
  constexpr int kRows = 32, kCols = 64, kDepth = 32, kRun = 128;
  __shared__ float x_tile[kRows][kDepth + 1], W_tile[kCols][kDepth + 1];
  const int64_t n = *unscreened.count, col_tiles = (sink.cols + kCols - 1) / kCols;
  const int64_t tiles = (n + kRows - 1) / kRows * col_tiles;
  // A thread has rows 2 y and 2 y + 1, and latents x, x + 16, x + 32 and x + 48.
  const int thread_x = threadIdx.x % 16, thread_y = threadIdx.x / 16;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile / col_tiles * kRows, first_col = tile % col_tiles * kCols;
    float sums[2][4] = {}, runs[2][4] = {};
    for (int64_t d = 0; d < x.cols; d += kDepth) {
      __syncthreads();
      for (int i = threadIdx.x; i < (kRows + kCols) * kDepth; i += kThreads) {
        const int row = i / kDepth, c = i % kDepth;
        const bool is_x = row < kRows, inside = d + c < x.cols;
        if (is_x)
          x_tile[row][c] = inside && first + row < n ? row_of<float>(x, unscreened.rows[first + row])[d + c] : 0.0f;
        else
          W_tile[row - kRows][c] =
              inside && first_col + row - kRows < sink.cols ? row_of<float>(W, first_col + row - kRows)[d + c] : 0.0f;
      }
      __syncthreads();
#pragma unroll 8
      for (int c = 0; c < kDepth; ++c)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int l = 0; l < 4; ++l)
            runs[r][l] = fmaf(x_tile[thread_y * 2 + r][c], W_tile[thread_x + l * 16][c], runs[r][l]);
      if ((d + kDepth) % kRun == 0 || d + kDepth >= x.cols) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int l = 0; l < 4; ++l) sums[r][l] += runs[r][l], runs[r][l] = 0;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        const int64_t i = first + thread_y * 2 + r, c = first_col + thread_x + l * 16;
        if (i < n && c < sink.cols)
          sink.scores[int64_t(unscreened.rows[i]) * sink.stride + c] = sums[r][l] + sink.bias[c];
      }
  }
}

__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    select_unscreened_kernel(ScreenScores sink, const int32_t* k, CodesOut out, Grouping group, Unscreened unscreened) {
  __shared__ SelectShared shared;
  for (int64_t i = blockIdx.x; i < *unscreened.count; i += gridDim.x) {
    const int64_t row = unscreened.rows[i];
    const float* const scores = sink.scores + row * sink.stride;
    group_maxima<float, false>(scores, sink.cols, group.shift, group.n, reinterpret_cast<Key*>(shared_memory));
    select_row(
        sink.cols, group.shift, group.n, min(int64_t(k[row]), out.width), [&](int64_t c) { return key_of(scores[c]); },
        shared_memory, shared, CodeRowOut<float>(out, row));
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------------------ host

// Rows whose scores are held at a time: half a gigabyte of them, and 1024 at least, so that W, which every chunk reads,
// is not read more often than its products take. Tests of small shapes set the number.
int64_t chunk_rows(int64_t n_latents) {
#ifdef AKSAE_CHUNK_ROWS
  return AKSAE_CHUNK_ROWS;
#else
  const int64_t most = (int64_t(512) << 20) / (4 * std::max<int64_t>(1, n_latents));
  return std::max<int64_t>(1024, most / sm80::kTile * sm80::kTile);
#endif
}

struct EncodePlan {
  int64_t chunk, groups;                // rows; groups of a row
  int64_t packed_stride, score_stride;  // in elements
  uint16_t *x, *W;                      // packed, where they are not taken as they lie
  Norms *x_norms, *W_norms;
  float *scores, *no_bias;
  Key *maxima, *lower;
  Unscreened unscreened;
  int64_t bytes;
};

EncodePlan encode_plan(DType dtype, Matrix x, Matrix W, void* workspace) {
  const bool screened = dtype == DType::f32;
  EncodePlan plan{};
  plan.chunk = std::min(x.rows, chunk_rows(W.rows));
  plan.groups = ceil_div(W.rows, int64_t(1) << kGroupShift);
  plan.packed_stride = round_up(x.cols, 8);
  plan.score_stride = round_up(W.rows, 2);
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(workspace) + plan.bytes);
    plan.bytes += round_up(count * int64_t(sizeof(*array)), 16);
  };
  if (screened || !is_aligned(dtype, x)) take(plan.x, x.rows * plan.packed_stride);
  if (screened || !is_aligned(dtype, W)) take(plan.W, W.rows * plan.packed_stride);
  take(plan.scores, plan.chunk * plan.score_stride);
  take(plan.no_bias, W.rows);
  take(plan.maxima, plan.chunk * plan.groups);
  if (screened) {
    take(plan.x_norms, x.rows);
    take(plan.W_norms, W.rows);
    take(plan.lower, plan.chunk * plan.groups);
    take(plan.unscreened.count, 1);
    take(plan.unscreened.rows, plan.chunk);
  }
  return plan;
}

// A matrix as an operand; packed first where a place for that is given.
template <class T>
int make_operand(Stream stream, Matrix m, int64_t stride, uint16_t* packed, Norms* norms, Operand& operand) {
  operand = packed ? Operand{packed, m.rows, stride} : Operand{m.data, m.rows, m.stride};
  return packed ? launch(stream, pack_kernel<T>, ceil_div(m.rows, kWarps), 1, kThreads, 0, m, stride, packed, norms)
                : int(cudaSuccess);
}

CodesOut rows_of(CodesOut out, DType dtype, int64_t first, int64_t n) {
  const int64_t size = size_of(out.unrounded ? DType::f32 : dtype);
  return {static_cast<char*>(out.values) + first * out.width * size,
          out.indices + first * out.width,
          out.counts + first,
          n,
          out.width,
          out.unrounded};
}

int select_screened(Stream stream, const ScreenScores& sink, Matrix x, Matrix W, const int32_t* k, CodesOut out,
                    const Unscreened& unscreened) {
  const Grouping group = grouping(W.rows);
  const bool aligned = is_aligned(DType::f32, x) && is_aligned(DType::f32, W);
  if (const int error = cudaMemsetAsync(unscreened.count, 0, sizeof(int32_t), stream)) return error;
  if (const int error = launch(stream, aligned ? select_screened_kernel<true> : select_screened_kernel<false>, x.rows,
                               1, kThreads, screen_bytes(group.n), sink, x, W, k, out, group, unscreened))
    return error;
  const int64_t blocks = int64_t(multiprocessors()) * 4;
  if (const int error = launch(stream, exact_scores_kernel, std::min(blocks, ceil_div(W.rows, 64)), 1, kThreads, 0,
                               sink, x, W, unscreened))
    return error;
  return launch(stream, select_unscreened_kernel, std::min(blocks, x.rows), 1, kThreads, select_bytes(group.n), sink, k,
                out, group, unscreened);
}

template <class T>
int encode(Stream stream, DType dtype, Matrix x, Matrix W, const void* b, const int32_t* k, CodesOut out,
           const EncodePlan& plan) {
  constexpr bool kScreened = std::is_same_v<T, float>;
  using Element = std::conditional_t<kScreened, bf16, T>;
  Operand all_rows, weight;
  if (const int error = make_operand<T>(stream, x, plan.packed_stride, plan.x, plan.x_norms, all_rows)) return error;
  if (const int error = make_operand<T>(stream, W, plan.packed_stride, plan.W, plan.W_norms, weight)) return error;
  if (!b) {
    if (const int error = cudaMemsetAsync(plan.no_bias, 0, size_t(W.rows) * sizeof(float), stream)) return error;
    b = plan.no_bias;
  }
  for (int64_t first = 0; first < x.rows; first += plan.chunk) {
    const int64_t n = std::min(plan.chunk, x.rows - first);
    const Operand rows{static_cast<const uint16_t*>(all_rows.data) + first * all_rows.stride, n, all_rows.stride};
    Scores<T, kScreened> sink{
        static_cast<const T*>(b),
        n,
        W.rows,
        plan.score_stride,
        plan.groups,
        plan.scores,
        plan.maxima,
        plan.lower,
        {plan.x_norms + (kScreened ? first : 0), plan.W_norms, x.cols <= kScreenDepth ? float(x.cols + 32) : INFINITY}};
    const CodesOut codes = rows_of(out, dtype, first, n);
    int error = sm90::can_run(rows, weight, x.cols) ? sm90::launch_product<Element>(stream, rows, weight, x.cols, sink)
                                                    : sm80::launch_product<Element>(stream, rows, weight, x.cols, sink);
    if (error) return error;
    if constexpr (kScreened) {
      const Matrix chunk{row_of<float>(x, first), n, x.cols, x.stride};
      error = select_screened(stream, sink, chunk, W, k + first, codes, plan.unscreened);
    } else {
      const Grouping group = grouping(W.rows);
      const auto select =
          codes.unrounded ? select_scores_kernel<float, decltype(sink)> : select_scores_kernel<T, decltype(sink)>;
      error = launch(stream, select, n, 1, kThreads, select_bytes(group.n), sink, k + first, codes, group);
    }
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t topk_encode_workspace(DType dtype, Matrix x, Matrix W) { return encode_plan(dtype, x, W, nullptr).bytes; }

int launch_topk_encode(Stream stream, DType dtype, Matrix x, Matrix W, const void* b, const int32_t* k, CodesOut out,
                       void* workspace) {
  const EncodePlan plan = encode_plan(dtype, x, W, workspace);
  return with_type(dtype, [&](auto type) { return encode<decltype(type)>(stream, dtype, x, W, b, k, out, plan); });
}

}  // namespace aksae
