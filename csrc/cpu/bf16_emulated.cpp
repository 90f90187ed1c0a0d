// What bf16 units do, in plain C++: a machine without them tests the code that is built on them.
#include <bit>
#include <cmath>
#include <cstring>

#include "bf16_units.h"

namespace aksae {
namespace {

bool always() { return true; }
void nothing() {}

// To nearest even; denormal numbers, and what becomes one, to 0.
uint16_t rounded(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  const auto bf16 = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return (bf16 & 0x7f80) ? bf16 : uint16_t(bf16 & 0x8000);
}

float widened(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits & 0x7f80 ? bits : bits & 0x8000) << 16); }

// Where row r, column d of a panel lies.
int64_t place(int64_t r, int64_t d, bool right) {
  const int64_t block = d / kBf16Cols * kBf16Block, col = d % kBf16Cols;
  return block + (right ? (col / 2 * kBf16Rows + r) * 2 + col % 2 : r * kBf16Cols + col);
}

template <class Number>
void pack(int64_t rows, int64_t D, bool right, uint16_t* panel, const Number& number) {
  std::memset(panel, 0, panel_size(D) * sizeof(uint16_t));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < D; ++d) panel[place(r, d, right)] = number(r, d);
}

void pack_f32(const float* data, int64_t stride, int64_t rows, int64_t D, bool right, uint16_t* panel, float* norms,
              float* residuals) {
  pack(rows, D, right, panel, [&](int64_t r, int64_t d) { return rounded(data[r * stride + d]); });
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0, errors = 0;
    for (int64_t d = 0; d < D; ++d) {
      const double x = data[r * stride + d], error = x - widened(panel[place(r, d, right)]);
      squares += x * x;
      errors += error * error;
    }
    norms[r] = float(std::sqrt(squares)), residuals[r] = float(std::sqrt(errors));
  }
}

void pack_bf16(const uint16_t* data, int64_t stride, int64_t rows, int64_t D, bool right, uint16_t* panel) {
  pack(rows, D, right, panel, [&](int64_t r, int64_t d) { return data[r * stride + d]; });
}

void multiply(const uint16_t* left, const uint16_t* right, int64_t steps, int64_t panels, float* scores, int64_t stride,
              const char*, int64_t) {
  for (int64_t i = 0; i < 2 * kBf16Rows; ++i)
    for (int64_t p = 0; p < panels; ++p) {
      float sums[kBf16Rows] = {};
      // Chains as long as the shortest that units make.
      for (int64_t s = 0; s < steps; ++s) {
        const uint16_t* const x = left + (i / kBf16Rows * steps + s) * kBf16Block + i % kBf16Rows * kBf16Cols;
        const uint16_t* const w = right + (p * steps + s) * kBf16Block;
        float chain[kBf16Rows] = {};
        for (int64_t d = 0; d < kBf16Cols; ++d)
          for (int64_t r = 0; r < kBf16Rows; ++r)
            chain[r] += widened(x[d]) * widened(w[(d / 2 * kBf16Rows + r) * 2 + d % 2]);
        for (int64_t r = 0; r < kBf16Rows; ++r) sums[r] += chain[r];
      }
      std::memcpy(scores + i * stride + p * kBf16Rows, sums, sizeof sums);
    }
}

}  // namespace

const Bf16Units emulated_bf16_units = {"emulated_bf16", always, pack_f32, pack_bf16, nothing, nothing, multiply};

}  // namespace aksae
