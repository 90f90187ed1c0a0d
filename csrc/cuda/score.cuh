// Scores of rows and latents: what the matrix products share. A product hands its sums over tile by tile; Scores says
// what becomes of them.
#pragma once

#include "select.cuh"

namespace aksae {

// Both sides of a product: rows of 16 bits, `depth` of them at 16-byte boundaries. Past `depth` columns there is
// nothing.
struct Operand {
  const void* data;
  int64_t rows, stride;  // in elements
};

// |row| and |row - rounded row|, each not less than that.
struct Norms {
  float norm, residual;
};

// The bound on the error of a screen; the derivation stands at the top of cpu/screen.h. Tensor cores may lose more in
// an addition than it says of units there, since they align the terms of a step to the largest and cut: at most 2^-23
// of |x~||w~| for each of 17 terms in a step of 16 columns. That is 17/16 D 2^-23 in all, and with the fp32 sum's n
// 2^-24 still below the n 2^-22 |x||w| that is allowed.
constexpr float kNormMargin = 1 + 0x1p-10f, kNormFloor = 0x1p-53f, kNearOverflow = 0x1p126f;
constexpr float kSumLoss = 0x1p-22f, kBiasLoss = 0x1p-20f, kUnderflow = 0x1p-120f;

struct Screen {
  const Norms *x, *W;
  float terms;  // D + 32

  // Infinite, or NaN, where the bound says nothing.
  __device__ __forceinline__ float error(const Norms& x, const Norms& w, float bias) const {
    const float e = (x.residual + terms * kSumLoss * x.norm) * w.norm + (x.norm + x.residual) * w.residual +
                    kBiasLoss * fabsf(bias) + terms * kUnderflow;
    return (x.norm + x.residual) * (w.norm + w.residual) < kNearOverflow ? e : INFINITY;
  }
};
// Keys of the least and of the largest number that the fp32 score may be.
__device__ __forceinline__ Key lower_key(float score, float error) {
  return fabsf(score) < kNearOverflow && error < kNearOverflow ? key_of(score - error) : 0;
}
__device__ __forceinline__ Key upper_key(float score, float error) {
  return fabsf(score) < kNearOverflow && error < kNearOverflow ? key_of(score + error) : kNanKey;
}

// Where scores go. Bias is the type of the biases.
template <class Bias, bool Screened>
struct Scores {
  const Bias* bias;  // may be null
  int64_t rows, cols, groups;
  float* scores;  // [rows, cols]
  Key *maxima,
      *lower;  // [rows, groups of 2^kGroupShift columns]; lower, and maxima of upper keys, where they are a screen's
  Screen screen;

  // Of a column; those past the end are latents that nothing is known of, and nothing is kept of.
  struct Latent {
    float bias;
    Norms norms;
  };
  __device__ __forceinline__ Latent latent(int64_t col) const {
    Latent of{0, {0, 0}};
    if (col < cols) {
      if (bias) of.bias = widen(bias[col]);
      if constexpr (Screened) of.norms = screen.W[col];
    }
    return of;
  }
  __device__ __forceinline__ Norms row_norms(int64_t row) const {
    if constexpr (Screened)
      if (row < rows) return screen.x[row];
    return {0, 0};
  }
  // Keeps a score, and adds it to the maxima of its group.
  __device__ __forceinline__ void set(int64_t row, int64_t col, float sum, const Latent& of, const Norms& norms,
                                      Key& best, Key& best_lower) const {
    if (row >= rows || col >= cols) return;
    const float score = sum + of.bias;
    scores[row * cols + col] = score;
    if constexpr (Screened) {
      const float error = screen.error(norms, of.norms, of.bias);
      best = max(best, upper_key(score, error));
      best_lower = max(best_lower, lower_key(score, error));
    } else {
      best = max(best, key_of(score));
    }
  }
  __device__ __forceinline__ void set_maxima(int64_t row, int64_t col, Key best, Key best_lower) const {
    if (row >= rows || col >= cols) return;
    maxima[row * groups + (col >> kGroupShift)] = best;
    if constexpr (Screened) lower[row * groups + (col >> kGroupShift)] = best_lower;
  }
};

}  // namespace aksae
