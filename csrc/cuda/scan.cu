// The running sum of a device array, by one block.
#include "scan.cuh"

namespace aksae {

namespace {

constexpr int kScanThreads = 1024;

__global__ void __launch_bounds__(kScanThreads) exclusive_scan_kernel(const int32_t* in, int64_t n, int64_t* out) {
  constexpr int kEach = 8;
  __shared__ int64_t warp_totals[kScanThreads / kWarp];
  __shared__ int64_t carry;
  if (threadIdx.x == 0) carry = 0;
  for (int64_t base = 0; base <= n; base += kScanThreads * kEach) {
    const int64_t first = base + int64_t(threadIdx.x) * kEach;
    int64_t values[kEach], total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) total += values[i] = first + i < n ? in[first + i] : 0;
    int64_t before = total;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, before, distance);
      if (lane_id() >= distance) before += other;
    }
    if (lane_id() == kWarp - 1) warp_totals[warp_id()] = before;
    before -= total;
    __syncthreads();
    before += carry;
    for (int w = 0; w < warp_id(); ++w) before += warp_totals[w];
    // All have read the carry and the totals before they change.
    __syncthreads();
    if (threadIdx.x == kScanThreads - 1) carry = before + total;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i <= n) out[first + i] = before;
      before += values[i];
    }
  }
}

}  // namespace

int launch_exclusive_scan(Stream stream, const int32_t* in, int64_t n, int64_t* out) {
  return launch(stream, exclusive_scan_kernel, 1, 1, kScanThreads, 0, in, n, out);
}

}  // namespace aksae
