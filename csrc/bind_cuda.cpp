// The CUDA kernels as torch ops of the namespace aksae_cuda, over the LibTorch stable ABI. Outputs are passed in;
// shapes and dtypes are checked here once more, since a wrong call from Python must not reach a raw pointer. Kernels
// run on torch's current stream of the tensors' device; scratch memory comes from torch's allocator, which orders its
// reuse by that stream and knows of graph capture.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

#include "kernels.h"

// Tests build the kernels for the host, and this file with them for CPU tensors (tests/emulation).
#ifndef AKSAE_DISPATCH_KEY
#define AKSAE_DISPATCH_KEY CUDA
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

aksae::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return aksae::DType::f32;
    case ScalarType::BFloat16:
      return aksae::DType::bf16;
    case ScalarType::Half:
      return aksae::DType::f16;
    default:
      STD_TORCH_CHECK(false, "aksae_cuda: dtype must be float32, bfloat16 or float16");
  }
}

// The device and the dtype of a call, and the checks of its arguments against them. While it lives, its device is the
// current one.
class Call {
 public:
  explicit Call(const Tensor& first)
      : first_(first), type_(first.scalar_type()), dtype_(dtype_of(first)), guard_(first.get_device_index()) {}

  ScalarType type() const { return type_; }
  aksae::DType dtype() const { return dtype_; }

  void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) const {
    bool fits = is_here(t) && t.scalar_type() == type && t.dim() == int64_t(shape.size());
    int64_t d = 0;
    for (const int64_t size : shape) {
      if (!fits) break;
      fits = t.size(d++) == size;
    }
    STD_TORCH_CHECK(fits && t.is_contiguous(), "aksae_cuda: ", name, " has a wrong device, dtype, shape or layout");
  }

  aksae::Matrix matrix(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(is_here(t) && t.dim() == 2 && t.scalar_type() == type_ && (t.stride(1) == 1 || t.size(1) <= 1),
                    "aksae_cuda: ", name,
                    " must be a matrix with contiguous rows, of the dtype and on the device of the call");
    return {t.data_ptr(), t.size(0), t.size(1), t.stride(0)};
  }

  const void* vector(const std::optional<Tensor>& t, const char* name, int64_t n) const {
    if (!t) return nullptr;
    check(*t, name, type_, {n});
    return t->data_ptr();
  }

  float* floats(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    check(t, name, ScalarType::Float, shape);
    return static_cast<float*>(t.data_ptr());
  }
  float* floats(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> shape) const {
    return t ? floats(*t, name, shape) : nullptr;
  }

  const int32_t* row_k(const Tensor& k, int64_t rows) const {
    check(k, "k", ScalarType::Int, {rows});
    return static_cast<const int32_t*>(k.data_ptr());
  }

  // `values` is null where only the pattern is read.
  aksae::Codes codes(const Tensor* values, const Tensor& indices, const Tensor& counts) const {
    STD_TORCH_CHECK(indices.dim() == 2, "aksae_cuda: indices must be [rows, width]");
    const int64_t rows = indices.size(0), width = indices.size(1);
    check(indices, "indices", ScalarType::Int, {rows, width});
    check(counts, "counts", ScalarType::Int, {rows});
    if (values) check(*values, "values", type_, {rows, width});
    return {values ? values->data_ptr() : nullptr, static_cast<const int32_t*>(indices.data_ptr()),
            static_cast<const int32_t*>(counts.data_ptr()), rows, width};
  }

  aksae::CodesOut codes_out(const Tensor& values, const Tensor& indices, const Tensor& counts, int64_t rows,
                            bool is_unrounded = false) const {
    STD_TORCH_CHECK(values.dim() == 2, "aksae_cuda: values must be [rows, width]");
    const int64_t width = values.size(1);
    check(values, "values", is_unrounded ? ScalarType::Float : type_, {rows, width});
    check(indices, "indices", ScalarType::Int, {rows, width});
    check(counts, "counts", ScalarType::Int, {rows});
    return {values.data_ptr(),
            static_cast<int32_t*>(indices.data_ptr()),
            static_cast<int32_t*>(counts.data_ptr()),
            rows,
            width,
            is_unrounded};
  }

  Tensor workspace(int64_t bytes) const {
    return torch::stable::new_empty(first_, {bytes}, std::make_optional(ScalarType::Byte));
  }

  aksae::Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first_.get_device_index(), &stream));
    return static_cast<aksae::Stream>(stream);
  }

 private:
  bool is_here(const Tensor& t) const {
    return t.device().type() == first_.device().type() && t.get_device_index() == first_.get_device_index();
  }

  Tensor first_;
  ScalarType type_;
  aksae::DType dtype_;
  torch::stable::accelerator::DeviceGuard guard_;
};

void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, "aksae_cuda: ", op, " did not start: ", aksae::cuda_error(error));
}

void topk_select(const Tensor& pre_acts, const Tensor& k, const Tensor& values, const Tensor& indices,
                 const Tensor& counts) {
  const Call call(pre_acts);
  const auto scores = call.matrix(pre_acts, "pre_acts");
  check_launch(aksae::launch_topk_select(call.stream(), call.dtype(), scores, call.row_k(k, scores.rows),
                                         call.codes_out(values, indices, counts, scores.rows)),
               "topk_select");
}

void topk_encode(const Tensor& x, const Tensor& W_enc, const std::optional<Tensor>& b_enc, const Tensor& k,
                 const Tensor& values, const Tensor& indices, const Tensor& counts) {
  const Call call(x);
  const auto rows = call.matrix(x, "x"), weight = call.matrix(W_enc, "W_enc");
  STD_TORCH_CHECK(rows.cols == weight.cols, "aksae_cuda: x and W_enc must have the same number of columns");
  const bool is_unrounded = values.scalar_type() != x.scalar_type();
  const Tensor workspace = call.workspace(aksae::topk_encode_workspace(call.dtype(), rows, weight));
  check_launch(
      aksae::launch_topk_encode(call.stream(), call.dtype(), rows, weight, call.vector(b_enc, "b_enc", weight.rows),
                                call.row_k(k, rows.rows),
                                call.codes_out(values, indices, counts, rows.rows, is_unrounded), workspace.data_ptr()),
      "topk_encode");
}

void batch_topk_select(const Tensor& pre_acts, int64_t budget, const Tensor& values, const Tensor& indices,
                       const Tensor& counts) {
  const Call call(pre_acts);
  const auto scores = call.matrix(pre_acts, "pre_acts");
  const Tensor workspace = call.workspace(aksae::batch_topk_workspace(scores.rows));
  check_launch(
      aksae::launch_batch_topk_select(call.stream(), call.dtype(), scores, budget,
                                      call.codes_out(values, indices, counts, scores.rows), workspace.data_ptr()),
      "batch_topk_select");
}

void threshold_select(const Tensor& pre_acts, const Tensor& limit, const Tensor& values, const Tensor& indices,
                      const Tensor& counts) {
  const Call call(pre_acts);
  const auto scores = call.matrix(pre_acts, "pre_acts");
  check_launch(
      aksae::launch_threshold_select(call.stream(), call.dtype(), scores, call.floats(limit, "limit", {scores.cols}),
                                     call.codes_out(values, indices, counts, scores.rows)),
      "threshold_select");
}

void sparse_decode(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& W,
                   const std::optional<Tensor>& b, const Tensor& y) {
  const Call call(values);
  const auto input = call.codes(&values, indices, counts);
  const auto weight = call.matrix(W, "W");
  call.check(y, "y", call.type(), {input.rows, weight.cols});
  check_launch(aksae::launch_sparse_decode(call.stream(), call.dtype(), input, weight, call.vector(b, "b", weight.cols),
                                           y.data_ptr()),
               "sparse_decode");
}

void decode_mse(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& W,
                const std::optional<Tensor>& b, const Tensor& target, const Tensor& loss,
                const std::optional<Tensor>& residual, const std::optional<Tensor>& value_grad) {
  const Call call(values);
  const auto input = call.codes(&values, indices, counts);
  const auto weight = call.matrix(W, "W"), wanted = call.matrix(target, "target");
  STD_TORCH_CHECK(wanted.rows == input.rows && wanted.cols == weight.cols, "aksae_cuda: target has a wrong shape");
  check_launch(aksae::launch_decode_mse(call.stream(), call.dtype(), input, weight, call.vector(b, "b", weight.cols),
                                        wanted, call.floats(loss, "loss", {input.rows}),
                                        call.floats(residual, "residual", {input.rows, weight.cols}),
                                        call.floats(value_grad, "value_grad", {input.rows, input.width})),
               "decode_mse");
}

void sparse_value_grad(const Tensor& grad, const Tensor& indices, const Tensor& counts, const Tensor& W,
                       const Tensor& out) {
  const Call call(grad);
  const auto pattern = call.codes(nullptr, indices, counts);
  const auto dense = call.matrix(grad, "grad"), weight = call.matrix(W, "W");
  STD_TORCH_CHECK(dense.rows == pattern.rows && dense.cols == weight.cols, "aksae_cuda: grad has a wrong shape");
  check_launch(aksae::launch_sparse_value_grad(call.stream(), call.dtype(), pattern, dense, weight,
                                               call.floats(out, "out", {pattern.rows, pattern.width})),
               "sparse_value_grad");
}

void sparse_weight_grad(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& dense,
                        const Tensor& grad, const std::optional<Tensor>& sums) {
  const Call call(values);
  const auto input = call.codes(&values, indices, counts);
  const auto right = call.matrix(dense, "dense");
  const int64_t d_sae = grad.size(0);
  STD_TORCH_CHECK(right.rows == input.rows, "aksae_cuda: dense has a wrong shape");
  call.check(grad, "grad", call.type(), {d_sae, right.cols});
  if (sums) call.check(*sums, "sums", call.type(), {d_sae});
  const Tensor workspace = call.workspace(aksae::weight_grad_workspace(input.rows, input.width, d_sae));
  check_launch(aksae::launch_sparse_weight_grad(call.stream(), call.dtype(), input, right, d_sae, grad.data_ptr(),
                                                sums ? sums->data_ptr() : nullptr, workspace.data_ptr()),
               "sparse_weight_grad");
}

void scatter_codes(const Tensor& values, const Tensor& indices, const Tensor& counts, const Tensor& dense) {
  const Call call(values);
  const auto input = call.codes(&values, indices, counts);
  call.check(dense, "dense", call.type(), {input.rows, dense.size(1)});
  check_launch(aksae::launch_scatter_codes(call.stream(), call.dtype(), input, dense.size(1), dense.data_ptr()),
               "scatter_codes");
}

void adam_step(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& grad_scale, int64_t step, double lr, double beta1, double beta2, double eps,
               bool unit_norm_rows, bool lazy) {
  const Call call(param);
  STD_TORCH_CHECK(param.dim() == 2, "aksae_cuda: param must be a matrix");
  const int64_t rows = param.size(0), cols = param.size(1);
  call.check(param, "param", call.type(), {rows, cols});
  call.check(grad, "grad", call.type(), {rows, cols});
  check_launch(aksae::launch_adam_step(
                   call.stream(), call.dtype(), rows, cols, param.data_ptr(), grad.data_ptr(),
                   call.floats(exp_avg, "exp_avg", {rows, cols}), call.floats(exp_avg_sq, "exp_avg_sq", {rows, cols}),
                   call.floats(grad_scale, "grad_scale", {}), {step, lr, beta1, beta2, eps, 0, unit_norm_rows, lazy}),
               "adam_step");
}

}  // namespace

STABLE_TORCH_LIBRARY(aksae_cuda, m) {
  m.def("topk_select(Tensor pre_acts, Tensor k, Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts) -> ()");
  m.def(
      "topk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor k, Tensor(a!) values, Tensor(b!) indices, "
      "Tensor(c!) counts) -> ()");
  m.def(
      "batch_topk_select(Tensor pre_acts, int budget, Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts) -> "
      "()");
  m.def(
      "threshold_select(Tensor pre_acts, Tensor limit, Tensor(a!) values, Tensor(b!) indices, Tensor(c!) counts) -> "
      "()");
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor counts, Tensor W, Tensor? b, Tensor(a!) y) -> ()");
  m.def(
      "decode_mse(Tensor values, Tensor indices, Tensor counts, Tensor W, Tensor? b, Tensor target, "
      "Tensor(a!) loss, Tensor(b!)? residual, Tensor(c!)? value_grad) -> ()");
  m.def("sparse_value_grad(Tensor grad, Tensor indices, Tensor counts, Tensor W, Tensor(a!) out) -> ()");
  m.def(
      "sparse_weight_grad(Tensor values, Tensor indices, Tensor counts, Tensor dense, Tensor(a!) grad, "
      "Tensor(b!)? sums) -> ()");
  m.def("scatter_codes(Tensor values, Tensor indices, Tensor counts, Tensor(a!) dense) -> ()");
  m.def(
      "adam_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad_scale, "
      "int step, float lr, float beta1, float beta2, float eps, bool unit_norm_rows, bool lazy) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aksae_cuda, AKSAE_DISPATCH_KEY, m) {
  m.impl("topk_select", TORCH_BOX(&topk_select));
  m.impl("topk_encode", TORCH_BOX(&topk_encode));
  m.impl("batch_topk_select", TORCH_BOX(&batch_topk_select));
  m.impl("threshold_select", TORCH_BOX(&threshold_select));
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("decode_mse", TORCH_BOX(&decode_mse));
  m.impl("sparse_value_grad", TORCH_BOX(&sparse_value_grad));
  m.impl("sparse_weight_grad", TORCH_BOX(&sparse_weight_grad));
  m.impl("scatter_codes", TORCH_BOX(&scatter_codes));
  m.impl("adam_step", TORCH_BOX(&adam_step));
}
