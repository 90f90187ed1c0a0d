// Selections over scores in memory. A block takes a row.
#include "scan.cuh"
#include "select.cuh"

namespace aksae {

namespace {

// ---------------------------------------------------------------------------------------------- topk_select

template <class T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    topk_select_kernel(Matrix pre_acts, const int32_t* k, CodesOut out, Grouping group) {
  __shared__ SelectShared shared;
  const int64_t row = blockIdx.x;
  const T* const scores = row_of<T>(pre_acts, row);
  const CodeRowOut<T> codes(out, row);
  const int64_t wanted = min(int64_t(k[row]), out.width);
  if (wanted <= 0) return codes.finish(0);
  group_maxima<T, Aligned>(scores, pre_acts.cols, group.shift, group.n, reinterpret_cast<Key*>(shared_memory));
  select_row(
      pre_acts.cols, group.shift, group.n, wanted, [&](int64_t i) { return key_of(widen(scores[i])); }, shared_memory,
      shared, codes);
}

// --------------------------------------------------------------------------------------------- threshold_select

template <class T>
__global__ void __launch_bounds__(kThreads) threshold_select_kernel(Matrix pre_acts, const float* limit, CodesOut out) {
  __shared__ KeepCounts counts;
  const int64_t row = blockIdx.x;
  const T* const scores = row_of<T>(pre_acts, row);
  const CodeRowOut<T> codes(out, row);
  const auto key = [&](int64_t i) {
    const float score = widen(scores[i]);
    return score <= limit[i] ? 0 : key_of(score);
  };
  codes.finish(
      keep(pre_acts.cols, kKeepSelectable, key, counts, [&](int64_t at, int64_t i, Key x) { codes.set(at, i, x); }));
}

// ------------------------------------------------------------------------------------------ batch_topk_select
// A radix search over the whole matrix: three passes find the bits of the budget-th best key, from the top. Digits of
// 11 bits overlap by one, which is known by then.

constexpr int kDigits = 3, kBins = 2048;
__host__ __device__ constexpr int digit_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }

struct BatchSearch {
  Key prefix;      // the digits found, others 0
  int all;         // nonzero: no more than the budget are selectable
  int64_t wanted;  // how many of the keys that begin with prefix
};
struct BatchWorkspace {
  unsigned long long* bins;  // [kDigits][kBins]
  BatchSearch* search;
  int32_t* row_ties;     // [rows]: keys equal to the budget-th best
  int64_t* ties_before;  // [rows + 1]: of all rows before
};

__device__ __forceinline__ bool begins_with(Key key, Key prefix, int pass) {
  return pass == 0 ? key != 0 : key >> digit_shift(pass - 1) == prefix >> digit_shift(pass - 1);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    digit_histogram_kernel(Matrix pre_acts, BatchWorkspace w, int pass) {
  __shared__ unsigned bins[kBins];
  if (w.search->all) return;
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const Key prefix = w.search->prefix;
  const int shift = digit_shift(pass);
  constexpr int kTile = kThreads * 8;
  const int64_t row_tiles = (pre_acts.cols + kTile - 1) / kTile;
  for (int64_t tile = blockIdx.x; tile < row_tiles * pre_acts.rows; tile += gridDim.x) {
    const T* const scores = row_of<T>(pre_acts, tile / row_tiles);
    const int64_t first = tile % row_tiles * kTile;
    for (int64_t c = first + warp_id() * kWarp; c < min(first + kTile, pre_acts.cols); c += kThreads) {
      const Key key = c + lane_id() < pre_acts.cols ? key_of(widen(scores[c + lane_id()])) : 0;
      const bool counts = key != 0 && begins_with(key, prefix, pass);
      const unsigned bin = key >> shift & (kBins - 1);
      // Where a warp's keys are alike, one of its lanes adds for all: else ties would queue for one bin.
      const unsigned same = __match_any_sync(kAllLanes, counts ? bin : unsigned(kBins));
      if (counts && __ffs(same) - 1 == lane_id()) atomicAdd(&bins[bin], unsigned(__popc(same)));
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (bins[i]) atomicAdd(&w.bins[pass * kBins + i], static_cast<unsigned long long>(bins[i]));
}

// One block: the bin that holds the wanted key.
__global__ void __launch_bounds__(kThreads) pick_digit_kernel(BatchWorkspace w, int64_t budget, int pass) {
  constexpr int kEach = kBins / kThreads;
  __shared__ int64_t shares[kThreads];
  // Thread 0 has the largest keys.
  const unsigned long long* const bins = w.bins + pass * kBins;
  const int top = kBins - 1 - int(threadIdx.x) * kEach;
  int64_t share = 0;
  for (int i = 0; i < kEach; ++i) share += int64_t(bins[top - i]);
  shares[threadIdx.x] = share;
  __syncthreads();
  if (threadIdx.x != 0) return;
  BatchSearch search = pass == 0 ? BatchSearch{0, 0, budget} : *w.search;
  if (search.all) return;
  int thread = 0;
  while (thread < kThreads && shares[thread] < search.wanted) search.wanted -= shares[thread++];
  if (thread == kThreads) {
    *w.search = {0, 1, 0};
    return;
  }
  int bin = kBins - 1 - thread * kEach;
  while (int64_t(bins[bin]) < search.wanted) search.wanted -= int64_t(bins[bin--]);
  search.prefix |= Key(bin) << digit_shift(pass);
  *w.search = search;
}

template <class T>
__global__ void __launch_bounds__(kThreads) count_ties_kernel(Matrix pre_acts, BatchWorkspace w) {
  __shared__ BlockSums sums;
  const T* const scores = row_of<T>(pre_acts, blockIdx.x);
  const Key key = w.search->prefix;
  int ties = 0;
  if (!w.search->all)
    for (int64_t i = threadIdx.x; i < pre_acts.cols; i += kThreads) ties += key_of(widen(scores[i])) == key;
  ties = BlockSum{sums}(ties);
  if (threadIdx.x == 0) w.row_ties[blockIdx.x] = ties;
}

template <class T>
__global__ void __launch_bounds__(kThreads) batch_topk_select_kernel(Matrix pre_acts, BatchWorkspace w, CodesOut out) {
  __shared__ KeepCounts counts;
  const int64_t row = blockIdx.x;
  const T* const scores = row_of<T>(pre_acts, row);
  const CodeRowOut<T> codes(out, row);
  const BatchSearch search = *w.search;
  const Cut cut =
      search.all ? kKeepSelectable : Cut{search.prefix, max(search.wanted - w.ties_before[row], int64_t(0))};
  codes.finish(keep(
      pre_acts.cols, cut, [&](int64_t i) { return key_of(widen(scores[i])); }, counts,
      [&](int64_t at, int64_t i, Key x) { codes.set(at, i, x); }));
}

template <class Out>
__global__ void __launch_bounds__(kThreads) no_codes_kernel(CodesOut out) {
  CodeRowOut<Out>(out, blockIdx.x).finish(0);
}

BatchWorkspace batch_workspace(void* data, int64_t rows) {
  BatchWorkspace w;
  w.bins = static_cast<unsigned long long*>(data);
  w.search = reinterpret_cast<BatchSearch*>(w.bins + kDigits * kBins);
  w.ties_before = reinterpret_cast<int64_t*>(w.search + 1);
  w.row_ties = reinterpret_cast<int32_t*>(w.ties_before + rows + 1);
  return w;
}

}  // namespace

const char* cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

int launch_topk_select(Stream stream, DType dtype, Matrix pre_acts, const int32_t* k, CodesOut out) {
  const Grouping group = grouping(pre_acts.cols);
  return with_type(dtype, is_aligned(dtype, pre_acts), [&](auto type, auto aligned) {
    return launch(stream, topk_select_kernel<decltype(type), aligned()>, pre_acts.rows, 1, kThreads,
                  select_bytes(group.n), pre_acts, k, out, group);
  });
}

int launch_threshold_select(Stream stream, DType dtype, Matrix pre_acts, const float* limit, CodesOut out) {
  return with_type(dtype, [&](auto type) {
    return launch(stream, threshold_select_kernel<decltype(type)>, pre_acts.rows, 1, kThreads, 0, pre_acts, limit, out);
  });
}

int64_t batch_topk_workspace(int64_t rows) {
  return kDigits * kBins * 8 + sizeof(BatchSearch) + (rows + 1) * 8 + rows * 4;
}

int launch_batch_topk_select(Stream stream, DType dtype, Matrix pre_acts, int64_t budget, CodesOut out,
                             void* workspace) {
  const BatchWorkspace w = batch_workspace(workspace, pre_acts.rows);
  if (pre_acts.rows == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) -> int {
    using T = decltype(type);
    if (budget <= 0) return launch(stream, no_codes_kernel<T>, pre_acts.rows, 1, kThreads, 0, out);
    if (const int error = cudaMemsetAsync(workspace, 0, kDigits * kBins * 8 + sizeof(BatchSearch), stream))
      return error;
    const int64_t blocks =
        std::min<int64_t>(pre_acts.rows * ceil_div(pre_acts.cols, kThreads * 8), int64_t(multiprocessors()) * 8);
    for (int pass = 0; pass < kDigits; ++pass) {
      if (const int error = launch(stream, digit_histogram_kernel<T>, blocks, 1, kThreads, 0, pre_acts, w, pass))
        return error;
      if (const int error = launch(stream, pick_digit_kernel, 1, 1, kThreads, 0, w, budget, pass)) return error;
    }
    if (const int error = launch(stream, count_ties_kernel<T>, pre_acts.rows, 1, kThreads, 0, pre_acts, w))
      return error;
    if (const int error = launch_exclusive_scan(stream, w.row_ties, pre_acts.rows, w.ties_before)) return error;
    return launch(stream, batch_topk_select_kernel<T>, pre_acts.rows, 1, kThreads, 0, pre_acts, w, out);
  });
}

}  // namespace aksae
