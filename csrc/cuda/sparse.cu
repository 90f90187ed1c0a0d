// Products with codes.
//
// A warp takes a row and a slice of its columns, one vector of 16 bytes a lane; gathered rows are read in pieces of 512
// bytes. All rows pass over one slice before the next, so that the slice of the gathered matrix stays in the
// second-level cache. Nothing is added by atomics: every sum runs in an order fixed by the codes. Its terms are added
// up in runs of run_length(n), then the runs: two levels lose far less than one long chain.
#include "scan.cuh"

namespace aksae {

namespace {

template <class T>
constexpr int kSlice = kWarp * kVector<T>;

__device__ __forceinline__ int64_t run_length(int64_t n) { return max(int64_t(16), int64_t(sqrtf(float(n)))); }

// A term of a sum: weight times a row of the gathered matrix.
struct Hit {
  int32_t row;
  float weight;
};

// Of a row of codes: its entries from j on, one a lane.
template <class T>
struct CodeHits {
  const T* values;
  const int32_t* indices;
  __device__ CodeHits(const Codes& codes, int64_t b)
      : values(static_cast<const T*>(codes.values) + b * codes.width), indices(codes.indices + b * codes.width) {}
  __device__ __forceinline__ Hit operator()(int64_t j) const { return {indices[j], widen(values[j])}; }
};
// Of a latent: its hits as sort_hits left them.
struct ColumnHits {
  const Hit* hits;
  __device__ __forceinline__ Hit operator()(int64_t j) const { return hits[j]; }
};

// sum += terms [from, to), in order. All lanes of a warp call it; d is the lane's column.
template <class T, bool Aligned, class Hits>
__device__ __forceinline__ void add_run(const Hits& hits, int64_t from, int64_t to, const Matrix& m, int64_t d,
                                        float (&sum)[kVector<T>]) {
  constexpr int kAhead = 4;
  for (int64_t first = from; first < to; first += kWarp) {
    const int n = int(min(to - first, int64_t(kWarp)));
    const Hit mine = lane_id() < n ? hits(first + lane_id()) : Hit{0, 0};
    for (int i = 0; i < n; i += kAhead) {
      float piece[kAhead][kVector<T>], weight[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        weight[a] = __shfl_sync(kAllLanes, mine.weight, i + a);
        const int32_t row = __shfl_sync(kAllLanes, mine.row, i + a);
        // Past the end nothing is read: row 0 may hold NaN, or not be there.
        load_vector<T, Aligned>(row_of<T>(m, i + a < n ? row : 0), d, i + a < n ? m.cols : 0, piece[a]);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) sum[v] = fmaf(weight[a], piece[a][v], sum[v]);
    }
  }
}

// The sum of runs first, first + step, ... of n terms.
template <class T, bool Aligned, class Hits>
__device__ __forceinline__ void sum_runs(const Hits& hits, int64_t n, int first, int step, const Matrix& m, int64_t d,
                                         float (&sum)[kVector<T>]) {
  const int64_t length = run_length(n);
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) sum[v] = 0;
  for (int64_t from = first * length; from < n; from += step * length) {
    float run[kVector<T>] = {};
    add_run<T, Aligned>(hits, from, min(from + length, n), m, d, run);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) sum[v] += run[v];
  }
}

// out[j] (first ? = : +=) the product of `dense`, the lanes' columns d of a row, with row indices[j] of m, for j < n.
template <class T, bool Aligned>
__device__ __forceinline__ void dot_pieces(const int32_t* indices, int64_t n, const Matrix& m, int64_t d,
                                           const float (&dense)[kVector<T>], bool first, float* out) {
  constexpr int kAtOnce = 8;
  for (int64_t base = 0; base < n; base += kAtOnce) {
    const int here = int(min(n - base, int64_t(kAtOnce)));
    const int32_t mine = lane_id() < here ? indices[base + lane_id()] : 0;
    float dots[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t row = __shfl_sync(kAllLanes, mine, i);
      float piece[kVector<T>];
      load_vector<T, Aligned>(row_of<T>(m, row), d, i < here ? m.cols : 0, piece);
      dots[i] = 0;
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) dots[i] = fmaf(dense[v], piece[v], dots[i]);
    }
    // Eight sums over 32 lanes at once: each step leaves a lane half as many, which twice as many lanes have added to.
#pragma unroll
    for (int half = kAtOnce / 2, bit = kWarp / 2; half; half /= 2, bit /= 2) {
      const bool upper = lane_id() & bit;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float sent = upper ? dots[i] : dots[i + half];
        const float kept = upper ? dots[i + half] : dots[i];
        dots[i] = kept + __shfl_xor_sync(kAllLanes, sent, bit);
      }
    }
    dots[0] += __shfl_xor_sync(kAllLanes, dots[0], 2);
    dots[0] += __shfl_xor_sync(kAllLanes, dots[0], 1);
    // Lanes 4 i to 4 i + 3 have dot i.
    const int i = lane_id() / 4;
    if (lane_id() % 4 == 0 && i < here) out[base + i] = first ? dots[0] : out[base + i] + dots[0];
  }
}

// A warp's row and column.
struct Place {
  int64_t row, d;
};
template <class T>
__device__ __forceinline__ Place place(int64_t slice) {
  return {int64_t(blockIdx.x) * kWarps + warp_id(), slice * kSlice<T> + lane_id() * kVector<T>};
}

// -------------------------------------------------------------------------------------------------- sparse_decode

template <class T, bool Aligned>
__device__ __forceinline__ void decode_slice(const Codes& codes, int64_t row, const Matrix& W, const T* b, int64_t d,
                                             float (&y)[kVector<T>]) {
  sum_runs<T, Aligned>(CodeHits<T>(codes, row), codes.counts[row], 0, 1, W, d, y);
  if (!b) return;
  float bias[kVector<T>];
  load_vector<T, Aligned>(b, d, W.cols, bias);
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) y[v] += bias[v];
}

template <class T, bool Aligned>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sparse_decode_kernel(Codes codes, Matrix W, const T* b, T* y) {
  const auto [row, d] = place<T>(blockIdx.y);
  if (row >= codes.rows) return;
  float out[kVector<T>];
  decode_slice<T, Aligned>(codes, row, W, b, d, out);
  store_vector<T, Aligned>(y + row * W.cols, d, W.cols, out);
}

// ----------------------------------------------------------------------------------------------------- decode_mse

// One slice of all rows: the residual, and what the slice adds to the loss and to the gradient of the values. The
// pieces are read twice, for the decode and for the gradient; the second time they come from a cache.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    decode_mse_kernel(Codes codes, Matrix W, const T* b, Matrix target, int64_t slice, float* loss, float* residual,
                      float* value_grad) {
  const auto [row, d] = place<T>(slice);
  if (row >= codes.rows) return;
  const bool first = slice == 0;
  float error[kVector<T>], wanted[kVector<T>];
  decode_slice<T, Aligned>(codes, row, W, b, d, error);
  load_vector<T, Aligned>(row_of<T>(target, row), d, W.cols, wanted);
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) {
    error[v] -= wanted[v];
    squares = fmaf(error[v], error[v], squares);
  }
  squares = warp_sum(squares);
  if (lane_id() == 0) loss[row] = first ? squares : loss[row] + squares;
  if (residual) store_vector<float, Aligned>(residual + row * W.cols, d, W.cols, error);
  if (!value_grad) return;
  float* const dots = value_grad + row * codes.width;
  const int64_t n = codes.counts[row];
  dot_pieces<T, Aligned>(codes.indices + row * codes.width, n, W, d, error, first, dots);
  if (first)
    for (int64_t j = n + lane_id(); j < codes.width; j += kWarp) dots[j] = 0;
}

// ----------------------------------------------------------------------------------------------- sparse_value_grad

template <class T, bool Aligned>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sparse_value_grad_kernel(Codes pattern, Matrix grad, Matrix W, int64_t slice, float* out) {
  const auto [row, d] = place<T>(slice);
  if (row >= pattern.rows) return;
  float dense[kVector<T>];
  load_vector<T, Aligned>(row_of<T>(grad, row), d, grad.cols, dense);
  float* const dots = out + row * pattern.width;
  const int64_t n = pattern.counts[row];
  dot_pieces<T, Aligned>(pattern.indices + row * pattern.width, n, W, d, dense, slice == 0, dots);
  if (slice == 0)
    for (int64_t j = n + lane_id(); j < pattern.width; j += kWarp) dots[j] = 0;
}

// ------------------------------------------------------------------------------------------------ codes by latent
// A stable radix sort of the hits by latent (CSR to CSC). Library sorts want the number of hits on the host, or would
// sort all rows * width slots; here it is read where it is, and the cost follows the hits.

constexpr int kRadixBits = 8, kRadix = 1 << kRadixBits, kSortBlocks = 256;

struct Hits {
  uint32_t* latents;
  Hit* hits;
};
struct SortWorkspace {
  int64_t* offsets;  // [rows + 1]: hits of all rows before; the last is their number
  int64_t* starts;   // [d_sae + 1]: the first hit of a latent
  int32_t* counts;   // [kRadix][blocks]: hits of a block that have a digit
  int64_t* places;   // [kRadix * blocks + 1]: where they go
  Hits from, to;
};

// A warp lists the hits of a row.
template <class T>
__global__ void __launch_bounds__(kThreads) list_hits_kernel(Codes codes, SortWorkspace w) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp_id();
  if (row >= codes.rows) return;
  const CodeHits<T> hits(codes, row);
  const int64_t first = w.offsets[row], n = codes.counts[row];
  for (int64_t j = lane_id(); j < n; j += kWarp) {
    const Hit hit = hits(j);
    w.from.latents[first + j] = uint32_t(hit.row);
    w.from.hits[first + j] = {int32_t(row), hit.weight};
  }
}

// Hits [begin, end) are a block's.
struct Share {
  int64_t begin, end;
};
__device__ __forceinline__ Share block_share(int64_t n) {
  const int64_t each = (n + gridDim.x - 1) / gridDim.x;
  return {min(each * blockIdx.x, n), min(each * (blockIdx.x + 1), n)};
}
__device__ __forceinline__ uint32_t digit_of(uint32_t latent, int shift) { return latent >> shift & (kRadix - 1); }

__global__ void __launch_bounds__(kThreads) count_digits_kernel(SortWorkspace w, int64_t rows, int shift) {
  __shared__ int32_t counts[kRadix];
  counts[threadIdx.x] = 0;
  __syncthreads();
  const Share share = block_share(w.offsets[rows]);
  for (int64_t i = share.begin + threadIdx.x; i < share.end; i += kThreads)
    atomicAdd(&counts[digit_of(w.from.latents[i], shift)], 1);
  __syncthreads();
  w.counts[threadIdx.x * int64_t(gridDim.x) + blockIdx.x] = counts[threadIdx.x];
}

// Moves hits to where their digit goes, and hits of one digit in order: tile by tile, in a tile warp by warp, in a warp
// lane by lane.
__global__ void __launch_bounds__(kThreads, kLeastBlocks) move_hits_kernel(SortWorkspace w, int64_t rows, int shift) {
  static_assert(kRadix == kThreads);
  __shared__ int64_t next[kRadix];
  // One more, for lanes past the end.
  __shared__ int32_t before[kWarps][kRadix + 1];
  next[threadIdx.x] = w.places[threadIdx.x * int64_t(gridDim.x) + blockIdx.x];
  const Share share = block_share(w.offsets[rows]);
  for (int64_t tile = share.begin; tile < share.end; tile += kThreads) {
    for (int i = threadIdx.x; i < kWarps * (kRadix + 1); i += kThreads) (&before[0][0])[i] = 0;
    __syncthreads();
    const int64_t i = tile + threadIdx.x;
    const bool is_hit = i < share.end;
    const uint32_t latent = is_hit ? w.from.latents[i] : 0;
    const uint32_t digit = is_hit ? digit_of(latent, shift) : uint32_t(kRadix);
    const unsigned same = __match_any_sync(kAllLanes, digit);
    const int rank = __popc(same & ((1u << lane_id()) - 1));
    if (rank == 0) before[warp_id()][digit] = __popc(same);
    __syncthreads();
    // A thread takes a digit: from counts to those of the warps before.
    int32_t total = 0;
#pragma unroll
    for (int v = 0; v < kWarps; ++v) {
      const int32_t n = before[v][threadIdx.x];
      before[v][threadIdx.x] = total;
      total += n;
    }
    __syncthreads();
    if (is_hit) {
      const int64_t at = next[digit] + before[warp_id()][digit] + rank;
      w.to.latents[at] = latent;
      w.to.hits[at] = w.from.hits[i];
    }
    __syncthreads();
    next[threadIdx.x] += total;
  }
}

// starts[f] = the first hit of a latent >= f.
__global__ void __launch_bounds__(kThreads) find_starts_kernel(SortWorkspace w, int64_t rows, int64_t d_sae) {
  const int64_t f = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (f > d_sae) return;
  int64_t low = 0, high = w.offsets[rows];
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (int64_t(w.from.latents[middle]) < f)
      low = middle + 1;
    else
      high = middle;
  }
  w.starts[f] = low;
}

// ---------------------------------------------------------------------------------------------- sparse_weight_grad

// A warp takes a latent. Where one has more hits than that, all warps of the block add to it, each its own runs.
constexpr int64_t kLongColumn = 128;

template <class T, bool Aligned>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sparse_weight_grad_kernel(SortWorkspace w, Matrix dense, int64_t d_sae, T* grad) {
  __shared__ float partial[kWarps][kSlice<T>];
  const auto [own, d] = place<T>(blockIdx.y);
  float sum[kVector<T>];
  if (own < d_sae) {
    const int64_t first = w.starts[own], n = w.starts[own + 1] - first;
    if (n <= kLongColumn) {
      sum_runs<T, Aligned>(ColumnHits{w.from.hits + first}, n, 0, 1, dense, d, sum);
      store_vector<T, Aligned>(grad + own * dense.cols, d, dense.cols, sum);
    }
  }
  for (int i = 0; i < kWarps; ++i) {
    const int64_t f = int64_t(blockIdx.x) * kWarps + i;
    if (f >= d_sae) return;
    const int64_t first = w.starts[f], n = w.starts[f + 1] - first;
    if (n <= kLongColumn) continue;
    sum_runs<T, Aligned>(ColumnHits{w.from.hits + first}, n, warp_id(), kWarps, dense, d, sum);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) partial[warp_id()][v * kWarp + lane_id()] = sum[v];
    __syncthreads();
    if (warp_id() == 0) {
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v)
        for (int other = 1; other < kWarps; ++other) sum[v] += partial[other][v * kWarp + lane_id()];
      store_vector<T, Aligned>(grad + f * dense.cols, d, dense.cols, sum);
    }
    __syncthreads();
  }
}

// A warp sums the weights of a latent, in fp64: one number for each latent, so that costs nothing.
template <class T>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(SortWorkspace w, int64_t d_sae, T* sums) {
  const int64_t f = int64_t(blockIdx.x) * kWarps + warp_id();
  if (f >= d_sae) return;
  const int64_t last = w.starts[f + 1];
  double sum = 0;
  for (int64_t i = w.starts[f] + lane_id(); i < last; i += kWarp) sum += w.from.hits[i].weight;
#pragma unroll
  for (int bits = kWarp / 2; bits; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  if (lane_id() == 0) sums[f] = narrow<T>(float(sum));
}

// --------------------------------------------------------------------------------------------------- scatter_codes

// A warp takes a row.
template <class T>
__global__ void __launch_bounds__(kThreads) scatter_codes_kernel(Codes codes, int64_t d_sae, T* dense) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp_id();
  if (row >= codes.rows) return;
  const T* const values = static_cast<const T*>(codes.values) + row * codes.width;
  const int32_t* const indices = codes.indices + row * codes.width;
  const int64_t n = codes.counts[row];
  for (int64_t j = lane_id(); j < n; j += kWarp) dense[row * d_sae + indices[j]] = values[j];
}

// ------------------------------------------------------------------------------------------------------------ host

int64_t sort_blocks(int64_t rows, int64_t width) {
  return std::clamp<int64_t>(ceil_div(rows * width, kThreads * 8), 1, kSortBlocks);
}

// The arrays in `data`, and their size.
SortWorkspace sort_workspace(void* data, int64_t rows, int64_t width, int64_t d_sae, int64_t* bytes) {
  const int64_t n = rows * width, digits = kRadix * sort_blocks(rows, width);
  int64_t used = 0;
  const auto take = [&](auto* type, int64_t count) {
    auto* const array = reinterpret_cast<decltype(type)>(static_cast<char*>(data) + used);
    used += round_up(count * int64_t(sizeof(*type)), 16);
    return array;
  };
  SortWorkspace w;
  w.offsets = take((int64_t*)nullptr, rows + 1);
  w.starts = take((int64_t*)nullptr, d_sae + 1);
  w.places = take((int64_t*)nullptr, digits + 1);
  w.counts = take((int32_t*)nullptr, digits);
  for (Hits* hits : {&w.from, &w.to}) {
    hits->hits = take((Hit*)nullptr, n);
    hits->latents = take((uint32_t*)nullptr, n);
  }
  *bytes = used;
  return w;
}

// Leaves the hits sorted in w.from, and w.starts.
template <class T>
int sort_hits(Stream stream, const Codes& codes, int64_t d_sae, SortWorkspace& w) {
  const int64_t warp_blocks = ceil_div(codes.rows, kWarps), blocks = sort_blocks(codes.rows, codes.width);
  if (const int error = launch_exclusive_scan(stream, codes.counts, codes.rows, w.offsets)) return error;
  if (const int error = launch(stream, list_hits_kernel<T>, warp_blocks, 1, kThreads, 0, codes, w)) return error;
  for (int shift = 0; shift < 31 && (d_sae - 1) >> shift > 0; shift += kRadixBits) {
    if (const int error = launch(stream, count_digits_kernel, blocks, 1, kThreads, 0, w, codes.rows, shift))
      return error;
    if (const int error = launch_exclusive_scan(stream, w.counts, kRadix * blocks, w.places)) return error;
    if (const int error = launch(stream, move_hits_kernel, blocks, 1, kThreads, 0, w, codes.rows, shift)) return error;
    std::swap(w.from, w.to);
  }
  return launch(stream, find_starts_kernel, ceil_div(d_sae + 1, kThreads), 1, kThreads, 0, w, codes.rows, d_sae);
}

// Slices of a row; at least one, so that outputs of rows without columns are written.
int64_t slices(DType dtype, int64_t cols) {
  return std::max<int64_t>(1, ceil_div(cols, dtype == DType::f32 ? kSlice<float> : kSlice<bf16>));
}

bool fits(DType dtype, std::initializer_list<Matrix> matrices, std::initializer_list<const void*> vectors) {
  for (const Matrix& m : matrices)
    if (!is_aligned(dtype, m)) return false;
  for (const void* vector : vectors)
    if (reinterpret_cast<uintptr_t>(vector) % 16) return false;
  return true;
}

}  // namespace

int launch_sparse_decode(Stream stream, DType dtype, Codes codes, Matrix W, const void* b, void* y) {
  if (W.cols == 0) return cudaSuccess;
  return with_type(dtype, fits(dtype, {W}, {b, y}), [&](auto type, auto aligned) {
    using T = decltype(type);
    return launch(stream, sparse_decode_kernel<T, aligned()>, ceil_div(codes.rows, kWarps), slices(dtype, W.cols),
                  kThreads, 0, codes, W, static_cast<const T*>(b), static_cast<T*>(y));
  });
}

// One launch for each slice adds to loss and value_grad in a fixed order, without room for partial sums.
int launch_decode_mse(Stream stream, DType dtype, Codes codes, Matrix W, const void* b, Matrix target, float* loss,
                      float* residual, float* value_grad) {
  return with_type(dtype, fits(dtype, {W, target}, {b, residual}), [&](auto type, auto aligned) {
    using T = decltype(type);
    int error = cudaSuccess;
    for (int64_t slice = 0; slice < slices(dtype, W.cols) && !error; ++slice)
      error = launch(stream, decode_mse_kernel<T, aligned()>, ceil_div(codes.rows, kWarps), 1, kThreads, 0, codes, W,
                     static_cast<const T*>(b), target, slice, loss, residual, value_grad);
    return error;
  });
}

int launch_sparse_value_grad(Stream stream, DType dtype, Codes pattern, Matrix grad, Matrix W, float* out) {
  return with_type(dtype, fits(dtype, {grad, W}, {}), [&](auto type, auto aligned) {
    int error = cudaSuccess;
    for (int64_t slice = 0; slice < slices(dtype, W.cols) && !error; ++slice)
      error = launch(stream, sparse_value_grad_kernel<decltype(type), aligned()>, ceil_div(pattern.rows, kWarps), 1,
                     kThreads, 0, pattern, grad, W, slice, out);
    return error;
  });
}

int64_t weight_grad_workspace(int64_t rows, int64_t width, int64_t d_sae) {
  int64_t bytes;
  sort_workspace(nullptr, rows, width, d_sae, &bytes);
  return bytes;
}

int launch_sparse_weight_grad(Stream stream, DType dtype, Codes codes, Matrix dense, int64_t d_sae, void* grad,
                              void* sums, void* workspace) {
  if (d_sae == 0) return cudaSuccess;
  if (codes.rows > INT32_MAX) return cudaErrorInvalidValue;
  int64_t bytes;
  SortWorkspace w = sort_workspace(workspace, codes.rows, codes.width, d_sae, &bytes);
  return with_type(dtype, fits(dtype, {dense}, {grad}), [&](auto type, auto aligned) -> int {
    using T = decltype(type);
    if (const int error = sort_hits<T>(stream, codes, d_sae, w)) return error;
    const int64_t blocks = ceil_div(d_sae, kWarps);
    if (sums)
      if (const int error =
              launch(stream, column_sums_kernel<T>, blocks, 1, kThreads, 0, w, d_sae, static_cast<T*>(sums)))
        return error;
    if (dense.cols == 0) return cudaSuccess;
    return launch(stream, sparse_weight_grad_kernel<T, aligned()>, blocks, slices(dtype, dense.cols), kThreads, 0, w,
                  dense, d_sae, static_cast<T*>(grad));
  });
}

int launch_scatter_codes(Stream stream, DType dtype, Codes codes, int64_t d_sae, void* dense) {
  if (const int error = cudaMemsetAsync(dense, 0, size_t(codes.rows * d_sae * size_of(dtype)), stream)) return error;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(stream, scatter_codes_kernel<T>, ceil_div(codes.rows, kWarps), 1, kThreads, 0, codes, d_sae,
                  static_cast<T*>(dense));
  });
}

}  // namespace aksae
