#include "standard.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <cstring>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define AKSAE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define AKSAE_AMX __attribute__((target("amx-tile,amx-bf16,avx512f")))

namespace aksae {
namespace {

// rows[i] lane j <-> rows[j] lane i.
AKSAE_AVX512 inline void transpose(__m512i (&rows)[16]) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  __m512i b[16];
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // b[4 g + c] holds columns c, 4 + c, 8 + c, 12 + c of rows 4 g .. 4 g + 3, a quarter each.
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x44),
                  high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xee);
    rows[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    rows[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// Blocks hold rows so far; right operands want pairs.
AKSAE_AVX512 void make_pairs(uint16_t* panel, int64_t D) {
  for (int64_t d = 0; d < D; d += kBf16Cols, panel += kBf16Block) {
    __m512i rows[16];
    for (int r = 0; r < 16; ++r) rows[r] = _mm512_loadu_si512(panel + r * kBf16Cols);
    transpose(rows);
    for (int r = 0; r < 16; ++r) _mm512_storeu_si512(panel + r * kBf16Cols, rows[r]);
  }
}

// Elements that reading memory runs ahead.
constexpr int64_t kAhead = 512;

// The last columns of a row, as a mask.
uint32_t live_columns(int64_t left) { return left >= kBf16Cols ? ~0u : (1u << left) - 1; }

AKSAE_AVX512 void pack_f32(const float* data, int64_t stride, int64_t rows, int64_t D, bool right, uint16_t* panel,
                           float* norms, float* residuals) {
  // Row by row: memory is read in one stream, and the panel stays in cache.
  for (int64_t r = 0; r < kBf16Rows; ++r) {
    const float* const row = data + r * stride;
    uint16_t* out = panel + r * kBf16Cols;
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, errors[2] = {squares[0], squares[0]};
    for (int64_t d = 0; d < D; d += kBf16Cols, out += kBf16Block) {
      const uint32_t live = r < rows ? live_columns(D - d) : 0;
      _mm_prefetch(row + d + kAhead, _MM_HINT_T0);
      _mm_prefetch(row + d + kAhead + 16, _MM_HINT_T0);
      const __m512 x[2] = {_mm512_maskz_loadu_ps(__mmask16(live), row + d),
                           _mm512_maskz_loadu_ps(__mmask16(live >> 16), row + d + 16)};
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
      _mm512_storeu_si512(out, rounded);
      const __m256i halves[2] = {_mm512_castsi512_si256(rounded), _mm512_extracti64x4_epi64(rounded, 1)};
      for (int h = 0; h < 2; ++h) {
        const __m512 error = _mm512_sub_ps(x[h], (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves[h]), 16));
        squares[h] = _mm512_fmadd_ps(x[h], x[h], squares[h]);
        errors[h] = _mm512_fmadd_ps(error, error, errors[h]);
      }
    }
    if (r >= rows) continue;
    norms[r] = std::sqrt(_mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])));
    residuals[r] = std::sqrt(_mm512_reduce_add_ps(_mm512_add_ps(errors[0], errors[1])));
  }
  if (right) make_pairs(panel, D);
}

AKSAE_AVX512 void pack_bf16(const uint16_t* data, int64_t stride, int64_t rows, int64_t D, bool right,
                            uint16_t* panel) {
  for (int64_t r = 0; r < kBf16Rows; ++r)
    for (int64_t d = 0; d < D; d += kBf16Cols) {
      const uint32_t live = r < rows ? live_columns(D - d) : 0;
      _mm_prefetch(data + r * stride + d + kAhead, _MM_HINT_T0);
      _mm512_storeu_si512(panel + d * kBf16Rows + r * kBf16Cols, _mm512_maskz_loadu_epi16(live, data + r * stride + d));
    }
  if (right) make_pairs(panel, D);
}

void nothing() {}

// Eight rows times 32 latents in registers; 128 columns of D, then the sums join those in memory.
AKSAE_AVX512 void multiply_avx512(const uint16_t* left, const uint16_t* right, int64_t steps, int64_t panels,
                                  float* scores, int64_t stride, const char* ahead, int64_t ahead_bytes) {
  for (int64_t byte = 0; byte < ahead_bytes; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T1);
  constexpr int kRows = 8;
  constexpr int64_t kStepsInChain = 4;
  for (int64_t p = 0; p < panels; p += 2)
    for (int i = 0; i < 2 * kBf16Rows; i += kRows)
      for (int64_t first = 0; first < steps; first += kStepsInChain) {
        __m512 acc[kRows][2];
        for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
        for (int64_t s = first; s < std::min(steps, first + kStepsInChain); ++s) {
          const uint16_t* const x = left + (i / kBf16Rows * steps + s) * kBf16Block + i % kBf16Rows * kBf16Cols;
          const uint16_t* const w = right + (p * steps + s) * kBf16Block;
#pragma GCC unroll 4
          for (int pair = 0; pair < kBf16Cols / 2; ++pair) {
            const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + pair * 32);
            const __m512bh w1 = (__m512bh)_mm512_loadu_si512(w + steps * kBf16Block + pair * 32);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
              int32_t bits;
              std::memcpy(&bits, x + r * kBf16Cols + 2 * pair, sizeof bits);
              const __m512bh both = (__m512bh)_mm512_set1_epi32(bits);
              acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, both);
              acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, both);
            }
          }
        }
        for (int r = 0; r < kRows; ++r)
          for (int half = 0; half < 2; ++half) {
            float* const out = scores + (i + r) * stride + (p + half) * kBf16Rows;
            const __m512 before = first ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
            _mm512_storeu_ps(out, _mm512_add_ps(before, acc[r][half]));
          }
      }
}

// Eight tiles of 16 rows of 64 bytes. Static: compilers do not see that the instruction reads all of it.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);
alignas(64) const TileConfig tile_config = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

AKSAE_AMX void begin_amx() { _tile_loadconfig(&tile_config); }
AKSAE_AMX void end_amx() { _tile_release(); }

AKSAE_AMX void multiply_amx(const uint16_t* left, const uint16_t* right, int64_t steps, int64_t panels, float* scores,
                            int64_t stride, const char* ahead, int64_t ahead_bytes) {
  const uint16_t *const x0 = left, *const x1 = left + steps * kBf16Block;
  const char* const end = ahead + ahead_bytes;
  const int64_t all_steps = std::max<int64_t>(1, steps * panels / 2);
  const int64_t per_step = ((ahead_bytes + all_steps - 1) / all_steps + 63) / 64 * 64;
  for (int64_t p = 0; p < panels; p += 2) {
    const uint16_t *const w0 = right + p * steps * kBf16Block, *const w1 = w0 + steps * kBf16Block;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s) {
      for (const char* const stop = ahead + std::min(per_step, end - ahead); ahead < stop; ahead += 64)
        _mm_prefetch(ahead, _MM_HINT_T1);
      _tile_loadd(4, x0 + s * kBf16Block, 64);
      _tile_loadd(6, w0 + s * kBf16Block, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w1 + s * kBf16Block, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, x1 + s * kBf16Block, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* const out = scores + p * kBf16Rows;
    _tile_stored(0, out, 4 * stride);
    _tile_stored(1, out + kBf16Rows, 4 * stride);
    _tile_stored(2, out + kBf16Rows * stride, 4 * stride);
    _tile_stored(3, out + kBf16Rows * stride + kBf16Rows, 4 * stride);
  }
}

bool cpuid_bit(int subleaf, int reg, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}

bool has_avx512_bf16() { return cpuid_bit(1, 0, 5); }

bool has_amx() {
#if defined(__linux__)
  // The kernel hands out the tiles' state only to processes that ask for it.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512_bf16() && cpuid_bit(0, 3, 22) && cpuid_bit(0, 3, 24) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

const Bf16Units amx_units = {"amx", has_amx, pack_f32, pack_bf16, begin_amx, end_amx, multiply_amx};
const Bf16Units avx512_bf16_units = {"avx512_bf16", has_avx512_bf16, pack_f32,       pack_bf16,
                                     nothing,       nothing,         multiply_avx512};

}  // namespace aksae
#endif
