// The kernel table of one instruction set. The including file defines AKSAE_ISA (its name), AKSAE_ISA_LEVEL (512, 2 or
// 0) and AKSAE_LANE_BYTES, and turns the instruction set on by a pragma after the standard headers.

namespace aksae::AKSAE_ISA {
namespace {

#include "simd.h"
#include "dot.h"
#include "select.h"
#include "encode.h"
#include "screen.h"
#include "sparse.h"
#include "price.h"
#include "adam.h"

// An entry of the table: the kernel for the storage type that the call names.
#define AKSAE_ENTRY(kernel)                                     \
  [](ParallelFor run, DType dtype, auto... args) {              \
    return dtype == DType::f32   ? kernel<float>(run, args...)  \
           : dtype == DType::f64 ? kernel<double>(run, args...) \
                                 : kernel<bf16>(run, args...);  \
  }

}  // namespace

extern const CpuKernels table;
const CpuKernels table = {
    .topk_select = AKSAE_ENTRY(topk_select),
    .topk_encode = AKSAE_ENTRY(topk_encode),
    .pack_weight = pack_weight,
    .batch_topk_select = AKSAE_ENTRY(batch_topk_select),
    .threshold_select = AKSAE_ENTRY(threshold_select),
    .sparse_decode = AKSAE_ENTRY(sparse_decode),
    .decode_mse = AKSAE_ENTRY(decode_mse),
    .sparse_value_grad = AKSAE_ENTRY(sparse_value_grad),
    .sparse_weight_grad = AKSAE_ENTRY(sparse_weight_grad),
    .scatter_codes = AKSAE_ENTRY(scatter_codes),
    .price_select = AKSAE_ENTRY(price_select),
    .adam_step = AKSAE_ENTRY(adam_step),
};

}  // namespace aksae::AKSAE_ISA
