// One optimizer step. A block takes a row of the weight: its projection, moments, update and renormalisation. The row
// is read from memory once; what later passes read again is in a cache.
#include "common.cuh"

#include <cmath>

namespace aksae {

namespace {

struct AdamFactors {
  float beta1, beta2, keep1, keep2, rate, unbias, eps;
};

// The weight after the step, from where it was and its moments; the same bits whenever it is called.
__device__ __forceinline__ float stepped(float weight, float first, float second, const AdamFactors& f) {
  return fmaf(-f.rate, first / (sqrtf(second * f.unbias) + f.eps), weight);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    adam_step_kernel(int64_t n, int64_t cols, T* param, const T* grad, float* exp_avg, float* exp_avg_sq,
                     const float* grad_scale, AdamFactors f, bool unit, bool lazy) {
  __shared__ BlockSums sums;
  BlockSum sum{sums};
  const int64_t begin = blockIdx.x * cols, end = min(begin + cols, n);
  const float scale = *grad_scale;
  float along = 0;
  // A factor that is not finite must reach the weights: no row may sit that out.
  lazy = lazy && isfinite(scale);
  if (unit || lazy) {
    bool idle = true;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const float g = widen(grad[i]);
      idle = idle && g == 0;
      if (unit) along = fmaf(g, widen(param[i]), along);
    }
    if (lazy && !__syncthreads_or(!idle)) return;
    if (unit) along = sum(along);
  }
  float squares = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    // Each product that is rounded together with a sum says so: what the compiler fuses might differ between the code
    // for rows that are lazy, or of unit norm, and for others.
    const float weight = widen(param[i]), slope = scale * fmaf(-along, weight, widen(grad[i]));
    const float first = exp_avg[i] = fmaf(f.keep1, slope, f.beta1 * exp_avg[i]);
    const float second = exp_avg_sq[i] = fmaf(f.keep2 * slope, slope, f.beta2 * exp_avg_sq[i]);
    const float updated = stepped(weight, first, second, f);
    if (!unit) param[i] = narrow<T>(updated);
    squares = fmaf(updated, updated, squares);
  }
  if (!unit) return;
  const float norm = sqrtf(sum(squares)), shrink = norm > 0 ? 1 / norm : 1;
  // A thread reads the moments that it wrote itself.
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    param[i] = narrow<T>(stepped(widen(param[i]), exp_avg[i], exp_avg_sq[i], f) * shrink);
}

}  // namespace

int launch_adam_step(Stream stream, DType dtype, int64_t rows, int64_t cols, void* param, const void* grad,
                     float* exp_avg, float* exp_avg_sq, const float* grad_scale, AdamStep step) {
  const int64_t n = rows * cols;
  if (n == 0) return cudaSuccess;
  if (!step.unit_norm_rows && !step.lazy) {
    // Rows are of no account: pieces that give every thread some work.
    cols = kThreads * 4;
    rows = ceil_div(n, cols);
  }
  const double rate = step.lr / (1 - std::pow(step.beta1, double(step.step)));
  const double unbias = 1 / (1 - std::pow(step.beta2, double(step.step)));
  const AdamFactors factors{float(step.beta1), float(step.beta2), float(1 - step.beta1), float(1 - step.beta2),
                            float(rate),       float(unbias),     float(step.eps)};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(stream, adam_step_kernel<T>, rows, 1, kThreads, 0, n, cols, static_cast<T*>(param),
                  static_cast<const T*>(grad), exp_avg, exp_avg_sq, grad_scale, factors, step.unit_norm_rows,
                  step.lazy);
  });
}

}  // namespace aksae
