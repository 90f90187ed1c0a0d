// The CPU kernels as torch ops of the namespace aksae_cpu, over the LibTorch stable ABI. Outputs are passed in; shapes
// and dtypes are checked here once more, since a wrong call from Python must not reach a raw pointer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const aksae::Cpu& cpu() {
  static const aksae::Cpu found = [] {
    const char* wanted = std::getenv("AKSAE_CPU_ISA");
    const aksae::Cpu cpu = aksae::find_cpu(wanted && *wanted ? wanted : nullptr);
    STD_TORCH_CHECK(cpu.isa, "AKSAE_CPU_ISA must name an instruction set this machine has (baseline, avx2, avx512, ",
                    "avx512_bf16, amx, emulated_bf16), got ", wanted);
    return cpu;
  }();
  return found;
}

const aksae::CpuKernels& kernels() { return *cpu().kernels; }

int threads() { return int(torch::stable::get_num_threads()); }

// A worker goes through a share of its own in small ranges, in order, and then helps others with theirs: one that the
// machine holds up does not hold up all. Shares lie apart, since fresh memory comes in pages that two would both clear.
void run_parallel(int64_t n, int64_t grain, aksae::RangeBody body, const void* closure) {
  constexpr int64_t kRangesOfShare = 16;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t workers = std::min<int64_t>(threads(), (n + grain - 1) / grain);
  if (workers <= 1) {
    if (n > 0) body(closure, 0, n);
    return;
  }
  const int64_t range = std::max(grain, n / (workers * kRangesOfShare));
  const auto shares = std::make_unique<Share[]>(workers);
  for (int64_t w = 0; w < workers; ++w) shares[w].next = n * w / workers, shares[w].end = n * (w + 1) / workers;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w)
      for (int64_t i = 0; i < workers; ++i) {
        Share& share = shares[(w + i) % workers];
        for (int64_t begin; (begin = share.next.fetch_add(range, std::memory_order_relaxed)) < share.end;)
          body(closure, begin, std::min(share.end, begin + range));
      }
  });
}

aksae::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return aksae::DType::f32;
    case ScalarType::Double:
      return aksae::DType::f64;
    case ScalarType::BFloat16:
      return aksae::DType::bf16;
    default:
      STD_TORCH_CHECK(false, "aksae_cpu: dtype must be float32, float64 or bfloat16");
  }
}

ScalarType acc_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  bool fits = t.is_cpu() && t.scalar_type() == type && t.dim() == int64_t(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    if (!fits) break;
    fits = t.size(d++) == size;
  }
  STD_TORCH_CHECK(fits && t.is_contiguous(), "aksae_cpu: ", name, " has a wrong device, dtype, shape or layout");
}

aksae::Matrix matrix(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == type && (t.stride(1) == 1 || t.size(1) <= 1),
                  "aksae_cpu: ", name, " must be a CPU matrix with contiguous rows, of the dtype of the call");
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

const void* vector(const std::optional<Tensor>& t, const char* name, ScalarType type, int64_t n) {
  if (!t) return nullptr;
  check(*t, name, type, {n});
  return t->data_ptr();
}

// `values` may stand for itself or, where only the pattern is read, be absent.
aksae::Codes codes(const Tensor* values, const Tensor& indices, const Tensor& counts) {
  STD_TORCH_CHECK(indices.dim() == 2, "aksae_cpu: indices must be [rows, width]");
  const int64_t rows = indices.size(0), width = indices.size(1);
  check(indices, "indices", ScalarType::Int, {rows, width});
  check(counts, "counts", ScalarType::Int, {rows});
  if (values) check(*values, "values", values->scalar_type(), {rows, width});
  return {values ? values->data_ptr() : nullptr, static_cast<const int32_t*>(indices.data_ptr()),
          static_cast<const int32_t*>(counts.data_ptr()), rows, width};
}

aksae::CodesOut codes_out(const Tensor& values, const Tensor& indices, const Tensor& counts, ScalarType type,
                          int64_t rows) {
  STD_TORCH_CHECK(values.dim() == 2, "aksae_cpu: values must be [rows, width]");
  const int64_t width = values.size(1);
  check(values, "values", type, {rows, width});
  check(indices, "indices", ScalarType::Int, {rows, width});
  check(counts, "counts", ScalarType::Int, {rows});
  return {values.data_ptr(),
          static_cast<int32_t*>(indices.data_ptr()),
          static_cast<int32_t*>(counts.data_ptr()),
          rows,
          width,
          false};
}

// Values of an encode, or dots: of the call's dtype, or unrounded, of its accumulation type.
bool is_unrounded(const Tensor& data, const Tensor& out) { return out.scalar_type() != data.scalar_type(); }
ScalarType written_type(const Tensor& data, const Tensor& out) {
  return is_unrounded(data, out) ? acc_type(data) : data.scalar_type();
}

const int32_t* row_k(const Tensor& k, int64_t rows) {
  check(k, "k", ScalarType::Int, {rows});
  return static_cast<const int32_t*>(k.data_ptr());
}

void topk_select(const Tensor& pre_acts, const Tensor& k, const Tensor& values, const Tensor& indices,
                 const Tensor& counts) {
  const auto type = pre_acts.scalar_type();
  const auto scores = matrix(pre_acts, "pre_acts", type);
  kernels().topk_select(run_parallel, dtype_of(pre_acts), threads(), scores, row_k(k, scores.rows),
                        codes_out(values, indices, counts, type, scores.rows));
}

// Numbers in the packed copy of an fp32 weight; 0 where there are no units to multiply it.
int64_t packed_size(int64_t rows, int64_t cols) {
  return cpu().bf16_units ? aksae::panels_of(rows) * aksae::panel_size(cols) : 0;
}

aksae::PackedWeight packed_weight(const Tensor& panels, const Tensor& norms, const aksae::Matrix& W) {
  const int64_t rows = aksae::panels_of(W.rows) * aksae::kBf16Rows;
  STD_TORCH_CHECK(cpu().bf16_units, "aksae_cpu: this machine has no bf16 units");
  check(panels, "panels", ScalarType::BFloat16, {packed_size(W.rows, W.cols)});
  check(norms, "norms", ScalarType::Float, {2, rows});
  float* const data = static_cast<float*>(norms.data_ptr());
  return {static_cast<uint16_t*>(panels.data_ptr()), data, data + rows};
}

void pack_weight(const Tensor& W_enc, const Tensor& panels, const Tensor& norms) {
  const auto weight = matrix(W_enc, "W_enc", ScalarType::Float);
  const auto packed = packed_weight(panels, norms, weight);
  kernels().pack_weight(run_parallel, *cpu().bf16_units, weight, 0, weight.rows, packed);
}

void topk_encode(const Tensor& x, const Tensor& W_enc, const std::optional<Tensor>& b_enc,
                 const std::optional<Tensor>& panels, const std::optional<Tensor>& norms, const Tensor& k,
                 double threshold, const Tensor& values, const Tensor& indices, const Tensor& counts) {
  const auto type = x.scalar_type();
  const auto rows = matrix(x, "x", type), weight = matrix(W_enc, "W_enc", type);
  STD_TORCH_CHECK(rows.cols == weight.cols, "aksae_cpu: x and W_enc must have the same number of columns");
  std::optional<aksae::PackedWeight> packed;
  if (panels && norms && type == ScalarType::Float) packed = packed_weight(*panels, *norms, weight);
  auto out = codes_out(values, indices, counts, written_type(x, values), rows.rows);
  out.unrounded = is_unrounded(x, values);
  kernels().topk_encode(run_parallel, dtype_of(x), threads(), cpu().bf16_units, rows, weight,
                        vector(b_enc, "b_enc", type, weight.rows), packed ? &*packed : nullptr, row_k(k, rows.rows),
                        threshold, out);
}

void batch_topk_select(const Tensor& pre_acts, int64_t budget, const Tensor& values, const Tensor& indices,
                       const Tensor& counts) {
  const auto type = pre_acts.scalar_type();
  const auto scores = matrix(pre_acts, "pre_acts", type);
  kernels().batch_topk_select(run_parallel, dtype_of(pre_acts), scores, budget,
                              codes_out(values, indices, counts, type, scores.rows));
}

void threshold_select(const Tensor& pre_acts, const Tensor& limit, const Tensor& values, const Tensor& indices,
                      const Tensor& counts) {
  const auto type = pre_acts.scalar_type();
  const auto scores = matrix(pre_acts, "pre_acts", type);
  kernels().threshold_select(run_parallel, dtype_of(pre_acts), scores,
                             vector(limit, "limit", acc_type(pre_acts), scores.cols),
                             codes_out(values, indices, counts, type, scores.rows));
}

void sparse_decode(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& W,
                   const std::optional<Tensor>& b, const Tensor& y) {
  const auto type = values.scalar_type();
  const auto input = codes(&values, indices, counts);
  const auto weight = matrix(W, "W", type);
  check(y, "y", type, {input.rows, weight.cols});
  kernels().sparse_decode(run_parallel, dtype_of(values), input, weight, vector(b, "b", type, weight.cols),
                          y.data_ptr());
}

void decode_mse(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& W,
                const std::optional<Tensor>& b, const Tensor& target, const Tensor& loss,
                const std::optional<Tensor>& residual, const std::optional<Tensor>& value_grad) {
  const auto type = values.scalar_type(), acc = acc_type(values);
  const auto input = codes(&values, indices, counts);
  const auto weight = matrix(W, "W", type), wanted = matrix(target, "target", type);
  STD_TORCH_CHECK(wanted.rows == input.rows && wanted.cols == weight.cols, "aksae_cpu: target has a wrong shape");
  check(loss, "loss", acc, {input.rows});
  if (residual) check(*residual, "residual", acc, {input.rows, weight.cols});
  if (value_grad) check(*value_grad, "value_grad", acc, {input.rows, input.width});
  kernels().decode_mse(run_parallel, dtype_of(values), input, weight, vector(b, "b", type, weight.cols), wanted,
                       loss.data_ptr(), residual ? residual->data_ptr() : nullptr,
                       value_grad ? value_grad->data_ptr() : nullptr);
}

void sparse_value_grad(const Tensor& grad, const Tensor& indices, const Tensor& counts, const Tensor& W,
                       const Tensor& out) {
  const auto type = grad.scalar_type();
  const auto pattern = codes(nullptr, indices, counts);
  const auto dense = matrix(grad, "grad", type), weight = matrix(W, "W", type);
  STD_TORCH_CHECK(dense.rows == pattern.rows && dense.cols == weight.cols, "aksae_cpu: grad has a wrong shape");
  check(out, "out", written_type(grad, out), {pattern.rows, pattern.width});
  kernels().sparse_value_grad(run_parallel, dtype_of(grad), pattern, dense, weight, out.data_ptr(),
                              is_unrounded(grad, out));
}

void sparse_weight_grad(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& dense,
                        const Tensor& grad, const std::optional<Tensor>& sums) {
  const auto type = values.scalar_type();
  const auto input = codes(&values, indices, counts);
  const auto right = matrix(dense, "dense", type);
  const int64_t d_sae = grad.size(0);
  STD_TORCH_CHECK(right.rows == input.rows, "aksae_cpu: dense has a wrong shape");
  check(grad, "grad", type, {d_sae, right.cols});
  if (sums) check(*sums, "sums", type, {d_sae});
  kernels().sparse_weight_grad(run_parallel, dtype_of(values), input, right, d_sae, grad.data_ptr(),
                               sums ? sums->data_ptr() : nullptr);
}

void scatter_codes(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& dense) {
  const auto input = codes(&values, indices, counts);
  check(dense, "dense", values.scalar_type(), {input.rows, dense.size(1)});
  kernels().scatter_codes(run_parallel, dtype_of(values), input, dense.size(1), dense.data_ptr());
}

void price_select(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& W,
                  const std::optional<Tensor>& b, const Tensor& x, const Tensor& price, int64_t passes,
                  const Tensor& chosen_values, const Tensor& slots, const Tensor& chosen_counts,
                  const Tensor& latents) {
  const auto type = values.scalar_type();
  const auto candidates = codes(&values, indices, counts);
  const auto weight = matrix(W, "W", type), rows = matrix(x, "x", type);
  STD_TORCH_CHECK(rows.rows == candidates.rows && rows.cols == weight.cols, "aksae_cpu: x has a wrong shape");
  check(price, "price", acc_type(values), {candidates.rows});
  check(slots, "slots", ScalarType::Int, {candidates.rows, candidates.width});
  check(latents, "latents", ScalarType::Int, {candidates.rows, candidates.width});
  kernels().price_select(run_parallel, dtype_of(values), candidates, weight, vector(b, "b", type, weight.cols), rows,
                         price.data_ptr(), passes,
                         codes_out(chosen_values, slots, chosen_counts, type, candidates.rows),
                         static_cast<int32_t*>(latents.data_ptr()));
}

void adam_step(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, int64_t step,
               double lr, double beta1, double beta2, double eps, double grad_scale, bool unit_norm_rows, bool lazy) {
  const auto type = param.scalar_type(), acc = acc_type(param);
  STD_TORCH_CHECK(param.dim() == 2, "aksae_cpu: param must be a matrix");
  const int64_t rows = param.size(0), cols = param.size(1);
  check(param, "param", type, {rows, cols});
  check(grad, "grad", type, {rows, cols});
  check(exp_avg, "exp_avg", acc, {rows, cols});
  check(exp_avg_sq, "exp_avg_sq", acc, {rows, cols});
  kernels().adam_step(run_parallel, dtype_of(param), rows, cols, param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(),
                      exp_avg_sq.data_ptr(), {step, lr, beta1, beta2, eps, grad_scale, unit_norm_rows, lazy});
}

int64_t first_bad_row(const Tensor& indices, const Tensor& counts, int64_t d_sae) {
  return aksae::first_bad_row(codes(nullptr, indices, counts), d_sae);
}

std::string isa() { return cpu().isa; }

}  // namespace

STABLE_TORCH_LIBRARY(aksae_cpu, m) {
  m.def("topk_select(Tensor pre_acts, Tensor k, Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts) -> ()");
  m.def(
      "topk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? panels, Tensor? norms, Tensor k, "
      "float threshold, Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts) -> ()");
  m.def("pack_weight(Tensor W_enc, Tensor(a!) panels, Tensor(b!) norms) -> ()");
  m.def("packed_size(int rows, int cols) -> int");
  m.def(
      "batch_topk_select(Tensor pre_acts, int budget, Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts) -> "
      "()");
  m.def(
      "threshold_select(Tensor pre_acts, Tensor limit, Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts) -> "
      "()");
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor counts, Tensor W, Tensor? b, Tensor(a!) y) -> ()");
  m.def(
      "decode_mse(Tensor values, Tensor indices, Tensor counts, Tensor W, Tensor? b, Tensor target, Tensor(a!) loss, "
      "Tensor(b!)? residual, Tensor(c!)? value_grad) -> ()");
  m.def("sparse_value_grad(Tensor grad, Tensor indices, Tensor counts, Tensor W, Tensor(a!) out) -> ()");
  m.def(
      "sparse_weight_grad(Tensor values, Tensor indices, Tensor counts, Tensor dense, Tensor(a!) grad, "
      "Tensor(b!)? sums) -> ()");
  m.def("scatter_codes(Tensor values, Tensor indices, Tensor counts, Tensor(a!) dense) -> ()");
  m.def(
      "price_select(Tensor values, Tensor indices, Tensor counts, Tensor W, Tensor? b, Tensor x, Tensor price, "
      "int passes, Tensor(a!) chosen_values, Tensor(b!) slots, Tensor(c!) chosen_counts, Tensor(d!) latents) -> ()");
  m.def(
      "adam_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, int step, float lr, "
      "float beta1, float beta2, float eps, float grad_scale, bool unit_norm_rows, bool lazy) -> ()");
  m.def("first_bad_row(Tensor indices, Tensor counts, int d_sae) -> int");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(aksae_cpu, CPU, m) {
  m.impl("topk_select", TORCH_BOX(&topk_select));
  m.impl("topk_encode", TORCH_BOX(&topk_encode));
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("batch_topk_select", TORCH_BOX(&batch_topk_select));
  m.impl("threshold_select", TORCH_BOX(&threshold_select));
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("decode_mse", TORCH_BOX(&decode_mse));
  m.impl("sparse_value_grad", TORCH_BOX(&sparse_value_grad));
  m.impl("sparse_weight_grad", TORCH_BOX(&sparse_weight_grad));
  m.impl("scatter_codes", TORCH_BOX(&scatter_codes));
  m.impl("price_select", TORCH_BOX(&price_select));
  m.impl("adam_step", TORCH_BOX(&adam_step));
  m.impl("first_bad_row", TORCH_BOX(&first_bad_row));
}

// They take no tensor that could choose a key.
STABLE_TORCH_LIBRARY_IMPL(aksae_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("packed_size", TORCH_BOX(&packed_size));
}
