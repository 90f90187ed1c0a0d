// Scores of rows and latents: what the matrix products share. A product hands its sums over tile by tile; Scores says
// what becomes of them.
#pragma once

#include "ptx.cuh"
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
// Of longer rows the norms' own sums would leave their margin.
constexpr int64_t kScreenDepth = int64_t(1) << 20;
constexpr float kSumLoss = 0x1p-22f, kBiasLoss = 0x1p-20f, kUnderflow = 0x1p-120f;

struct Screen {
  const Norms *x, *W;
  float terms;  // D + 32; infinite where D is beyond kScreenDepth

  // The part of the error that a latent brings by itself.
  __device__ __forceinline__ float own_error(float bias) const { return kBiasLoss * fabsf(bias) + terms * kUnderflow; }
  // Infinite where the bound says nothing.
  __device__ __forceinline__ float error(const Norms& x, const Norms& w, float own) const {
    const float length = x.norm + x.residual, of_w = fmaf(terms * kSumLoss, x.norm, x.residual);
    const float e = fmaf(of_w, w.norm, fmaf(length, w.residual, own));
    return length * (w.norm + w.residual) < kNearOverflow ? e : INFINITY;
  }
};
// The fp32 score is at least score - error and at most score + error. Either may be NaN where one of the two is not
// finite: then it may be anything. A bound from below says no more than kNearOverflow, since sums overflow in some
// orders and not in others.
__device__ __forceinline__ Key lower_key(float least) {
  return least == least ? key_of(fminf(least, kNearOverflow)) : 0;
}
__device__ __forceinline__ Key upper_key(float most) { return key_of(most); }

// Where scores go. Bias is the type of the biases.
template <class Bias, bool Screened>
struct Scores {
  static constexpr bool kIsScreen = Screened;
  const Bias* bias;
  int64_t rows, cols, stride, groups;
  float* scores;        // [rows, stride], the stride even
  Key *maxima, *lower;  // [rows, groups of 2^kGroupShift columns]; of a screen, maxima of upper and of lower bounds
  Screen screen;

  // Rows and columns of a tile, as a thread that keeps some of them sees them: columns are counted from the tile's.
  struct Columns {
    const Bias* bias;
    const Norms* norms;
    int left;  // columns of the tile that there are
  };
  __device__ __forceinline__ Columns columns(int64_t first, int n) const {
    return {bias + first, screen.W + (kIsScreen ? first : 0), int(min(cols - first, int64_t(n)))};
  }
  struct Row {
    float* scores;
    Key *maxima, *lower;
    Norms norms;
    bool is_there;
  };
  __device__ __forceinline__ Row row(int64_t row, int64_t first_col) const {
    const int64_t group = row * groups + (first_col >> kGroupShift);
    Row of{scores + row * stride + first_col, maxima + group, lower + (kIsScreen ? group : 0), {0, 0}, row < rows};
    if constexpr (kIsScreen)
      if (of.is_there) of.norms = screen.x[row];
    return of;
  }
  struct Latent {
    float bias, own_error;
    Norms norms;
    bool is_there;
  };
  __device__ __forceinline__ Latent latent(const Columns& columns, int c) const {
    Latent of{0, 0, {0, 0}, c < columns.left};
    if (of.is_there) {
      of.bias = widen(columns.bias[c]);
      if constexpr (kIsScreen) of.norms = columns.norms[c];
    }
    if constexpr (kIsScreen) of.own_error = screen.own_error(of.bias);
    return of;
  }

  // Keeps a warp's sums of 16 rows and of one group, which starts at column `first` of the tile, as the tensor cores
  // leave them: lane l has columns 2 (l % 4) and the next of row l / 4 in sums[4 n] and sums[4 n + 1], of row 8 + l / 4
  // in the next two, n counting by 8 columns.
  __device__ __forceinline__ void keep(const Row (&rows)[2], const Columns& columns, int first,
                                       const float* sums) const {
    constexpr int kN = (1 << kGroupShift) / 8;
    const auto column = [&](int n) { return first + n * 8 + lane_id() % 4 * 2; };
    // All before the first store: no load may pass one, and each would be waited for.
    Latent latents[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) latents[n][i] = latent(columns, column(n) + i);
    Best best[2];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        set(rows[half], column(n), sums[n * 4 + half * 2], sums[n * 4 + half * 2 + 1], latents[n], best[half]);
#pragma unroll
    for (int half = 0; half < 2; ++half) set_maxima(rows[half], columns, first, best[half]);
  }

 private:
  // The largest that scores of a group may be, and of a screen the largest that one of them is at least.
  struct Best {
    float most = 0, least = 0;
  };
  // Keeps the scores of two columns, the first of them even.
  __device__ __forceinline__ void set(const Row& row, int c, float sum0, float sum1, const Latent (&of)[2],
                                      Best& best) const {
    const float score[2] = {sum0 + of[0].bias, sum1 + of[1].bias};
    // With an odd last column the stride has room for one more. An assignment would become two stores.
    if (row.is_there && of[0].is_there)
      __stwb(reinterpret_cast<float2*>(row.scores + c), make_float2(score[0], score[1]));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = score[i];
      if constexpr (kIsScreen) {
        const float error = screen.error(row.norms, of[i].norms, of[i].own_error);
        const float least = score[i] - error;
        most += error;
        // Drops NaN, of which nothing is known.
        best.least = fmaxf(best.least, of[i].is_there ? least : 0.0f);
      }
      best.most = ptx::max_or_nan(best.most, of[i].is_there ? most : 0.0f);
    }
  }
  // Of four lanes that share the group of a row.
  __device__ __forceinline__ void set_maxima(const Row& row, const Columns& columns, int c, Best best) const {
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
      best.most = ptx::max_or_nan(best.most, __shfl_xor_sync(kAllLanes, best.most, bits));
      if constexpr (kIsScreen) best.least = fmaxf(best.least, __shfl_xor_sync(kAllLanes, best.least, bits));
    }
    if (lane_id() % 4 || !row.is_there || c >= columns.left) return;
    row.maxima[c >> kGroupShift] = upper_key(best.most);
    if constexpr (kIsScreen) row.lower[c >> kGroupShift] = lower_key(best.least);
  }
};

}  // namespace aksae
