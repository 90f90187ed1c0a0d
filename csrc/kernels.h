// Host entry points of the kernels: raw pointers, 64-bit sizes and strides (in elements), no torch type.
#pragma once

#include <cstdint>

// What a cudaStream_t points to.
struct CUstream_st;

namespace aksae {

enum class DType : int { f32, f64, bf16, f16 };

// A row-major matrix whose rows are contiguous; stride is the distance of rows, 0 for a broadcast row.
struct Matrix {
  const void* data;
  int64_t rows, cols, stride;
};

// Padded rows [rows, width], contiguous; slots from counts[b] on are not read by kernels that take codes.
struct Codes {
  const void* values;  // may be null where only the pattern matters
  const int32_t* indices;
  const int32_t* counts;
  int64_t rows, width;
};

// The same, to be written: padding gets value 0 and index -1.
struct CodesOut {
  void* values;
  int32_t* indices;
  int32_t* counts;
  int64_t rows, width;
  bool unrounded;  // encodes write the values in the accumulation type
};

// Operands of bf16 units are packed in panels of 16 rows and blocks of 32 columns, padded with zeros; panels go in
// pairs.
struct Bf16Units;
constexpr int64_t kBf16Rows = 16, kBf16Cols = 32;
constexpr int64_t panels_of(int64_t rows) { return (rows + 2 * kBf16Rows - 1) / (2 * kBf16Rows) * 2; }
constexpr int64_t panel_size(int64_t cols) { return (cols + kBf16Cols - 1) / kBf16Cols * kBf16Cols * kBf16Rows; }

// Rows of a weight, rounded to bf16 and packed, with |row| and |row - rounded row|.
struct PackedWeight {
  uint16_t* panels;
  float *norms, *residuals;
};

struct AdamStep {
  int64_t step;  // 1 for the first
  double lr, beta1, beta2, eps, grad_scale;
  bool unit_norm_rows, lazy;
};

// Calls body(closure, begin, end) on disjoint ranges that cover [0, n), on several threads; grain is the least range.
using RangeBody = void (*)(const void* closure, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t n, int64_t grain, RangeBody body, const void* closure);

// One table for each vector width. Sums are held in fp32 (fp64 for f64) and rounded once. Sums run in an order fixed
// by the shapes alone, so results do not depend on the number of threads.
struct CpuKernels {
  // k[b] best positive or NaN entries of each row; k is clamped to [0, out.width].
  void (*topk_select)(ParallelFor, DType, int threads, Matrix pre_acts, const int32_t* k, CodesOut);
  // The same of x W^T + b, in tiles that stay in cache; units, b and packed (what pack_weight made of W) may be null.
  // Scores <= threshold (at least 0, a number of the accumulation type) are not selected.
  void (*topk_encode)(ParallelFor, DType, int threads, const Bf16Units* units, Matrix x, Matrix W, const void* b,
                      const PackedWeight* packed, const int32_t* k, double threshold, CodesOut);
  // Rows [first, first + n) of an fp32 W.
  void (*pack_weight)(ParallelFor, const Bf16Units&, Matrix W, int64_t first, int64_t n, PackedWeight);
  // The budget best entries of the whole matrix. Rows past out.width are cut there; their counts are not.
  void (*batch_topk_select)(ParallelFor, DType, Matrix pre_acts, int64_t budget, CodesOut);
  // Entries that are not <= limit[f] (limit >= 0, in the accumulation type). Cut as batch_topk_select.
  void (*threshold_select)(ParallelFor, DType, Matrix pre_acts, const void* limit, CodesOut);

  void (*sparse_decode)(ParallelFor, DType, Codes, Matrix W, const void* b, void* y);
  // loss [B], residual [B, D] and value_grad [B, K] in the accumulation type; the last two may be null.
  void (*decode_mse)(ParallelFor, DType, Codes, Matrix W, const void* b, Matrix target, void* loss, void* residual,
                     void* value_grad);
  // Unrounded, out is in the accumulation type.
  void (*sparse_value_grad)(ParallelFor, DType, Codes pattern, Matrix grad, Matrix W, void* out, bool unrounded);
  // grad [d_sae, D]; sums [d_sae] may be null.
  void (*sparse_weight_grad)(ParallelFor, DType, Codes, Matrix dense, int64_t d_sae, void* grad, void* sums);
  // The indices of a row must be distinct, as those of selections are: repeats would be rounded at every addition.
  void (*scatter_codes)(ParallelFor, DType, Codes, int64_t d_sae, void* dense);
  // The candidates that pay. price [B] is in the accumulation type; the indices of what is written are slots of the
  // candidates, in the order of their latents, which go to latents [B, width].
  void (*price_select)(ParallelFor, DType, Codes candidates, Matrix W, const void* b, Matrix x, const void* price,
                       int64_t passes, CodesOut, int32_t* latents);

  // param and grad [rows, cols] contiguous in the dtype, the moments in the accumulation type.
  void (*adam_step)(ParallelFor, DType, int64_t rows, int64_t cols, void* param, const void* grad, void* exp_avg,
                    void* exp_avg_sq, AdamStep);
};

struct Cpu {
  const char* isa;
  const CpuKernels* kernels;
  const Bf16Units* bf16_units;  // null where there are none
};

// The best this machine runs. `wanted` (may be null) names another; an isa of null comes back where it is not there.
Cpu find_cpu(const char* wanted);

// The CUDA kernels take f32, bf16 and f16, and accumulate in fp32. A launch goes to `stream` of the current device,
// synchronises nothing, and returns a cudaError_t (0: none). Codes are not checked. `workspace` is what the function of
// that name says, in bytes, aligned to 16; kernels leave nothing in it.
using Stream = CUstream_st*;

// In words.
const char* cuda_error(int error);

// As the functions of CpuKernels.
int launch_topk_select(Stream, DType, Matrix pre_acts, const int32_t* k, CodesOut);
int64_t topk_encode_workspace(DType, Matrix x, Matrix W);
int launch_topk_encode(Stream, DType, Matrix x, Matrix W, const void* b, const int32_t* k, CodesOut, void* workspace);
int64_t batch_topk_workspace(int64_t rows);
int launch_batch_topk_select(Stream, DType, Matrix pre_acts, int64_t budget, CodesOut, void* workspace);
int launch_threshold_select(Stream, DType, Matrix pre_acts, const float* limit, CodesOut);

int launch_sparse_decode(Stream, DType, Codes, Matrix W, const void* b, void* y);
int launch_decode_mse(Stream, DType, Codes, Matrix W, const void* b, Matrix target, float* loss, float* residual,
                      float* value_grad);
// out is fp32 for every dtype.
int launch_sparse_value_grad(Stream, DType, Codes pattern, Matrix grad, Matrix W, float* out);
int64_t weight_grad_workspace(int64_t rows, int64_t width, int64_t d_sae);
int launch_sparse_weight_grad(Stream, DType, Codes, Matrix dense, int64_t d_sae, void* grad, void* sums,
                              void* workspace);
int launch_scatter_codes(Stream, DType, Codes, int64_t d_sae, void* dense);

// grad_scale is on the device, and AdamStep's is not read.
int launch_adam_step(Stream, DType, int64_t rows, int64_t cols, void* param, const void* grad, float* exp_avg,
                     float* exp_avg_sq, const float* grad_scale, AdamStep);

// Position of the first bad row in codes: counts outside [0, width], or a live index outside [0, d_sae); else -1.
int64_t first_bad_row(Codes, int64_t d_sae);

}  // namespace aksae
