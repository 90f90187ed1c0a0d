// Products of bf16 matrices on the units some CPUs have for them: AMX tiles, or the AVX-512 BF16 instructions.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace aksae {

// Matrices are packed in panels (kernels.h) of blocks of 32 columns, 1 KB each; block s of panel p starts at element
// ((p * steps) + s) * 512, with steps = ceil(D / 32). Within a block
//   left  operands (rows of x) lie row by row, [16 rows][32 columns];
//   right operands (latents) in pairs of columns, [16 pairs][16 rows][2].
constexpr int64_t kBf16Block = kBf16Rows * kBf16Cols;

// Rows of a matrix are rounded to nearest even, denormal numbers to 0: both kinds of units read those as 0.
struct Bf16Units {
  const char* isa;
  // Whether the machine and its operating system have them; asked before any other use.
  bool (*available)();

  // Packs `rows` <= 16 rows of fp32 into one panel. norms[r] and residuals[r] are then |row| and |row - rounded row|,
  // up to a relative error of 2^-11 and an absolute one of 2^-54.
  void (*pack_f32)(const float* data, int64_t stride, int64_t rows, int64_t D, bool right, uint16_t* panel,
                   float* norms, float* residuals);
  // The same of bf16, which needs no rounding.
  void (*pack_bf16)(const uint16_t* data, int64_t stride, int64_t rows, int64_t D, bool right, uint16_t* panel);

  // A thread calls multiply between begin and end.
  void (*begin)();
  void (*end)();
  // scores[i * stride + j] = <row i, latent j> for two left panels and `panels` (even) right ones: i < 32, j < 16
  // panels. Terms are added in fp32, in chains of at most max(128, D / 32 + 20), each addition losing at most 2^-23 of
  // its result, or 2^-126 where the result is smaller than that.
  // `ahead` is brought into cache meanwhile.
  void (*multiply)(const uint16_t* left, const uint16_t* right, int64_t steps, int64_t panels, float* scores,
                   int64_t stride, const char* ahead, int64_t ahead_bytes);
};

// In plain C++, for tests on a machine without units. It runs only where it is asked for by name.
extern const Bf16Units emulated_bf16_units;

#if defined(__x86_64__)
extern const Bf16Units amx_units, avx512_bf16_units;
#endif

}  // namespace aksae
