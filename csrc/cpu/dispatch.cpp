// Which kernel table this machine runs, and the check of codes made by hand.
#include <cstring>

#include "../kernels.h"
#include "bf16_units.h"

namespace aksae {

namespace baseline {
extern const CpuKernels table;
}

#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels table;
}
namespace avx512 {
extern const CpuKernels table;
}
#endif

Cpu find_cpu(const char* wanted) {
  const auto picks = [&](const char* isa) { return !wanted || !std::strcmp(wanted, isa); };
  if (wanted && picks(emulated_bf16_units.isa))
    return {emulated_bf16_units.isa, &baseline::table, &emulated_bf16_units};
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Bf16Units* const all_units[] = {&amx_units, &avx512_bf16_units};
  for (const Bf16Units* units : all_units)
    if (has_avx512 && picks(units->isa) && units->available()) return {units->isa, &avx512::table, units};
  if (has_avx512 && picks("avx512")) return {"avx512", &avx512::table, nullptr};
  if (has_avx2 && picks("avx2")) return {"avx2", &avx2::table, nullptr};
#endif
  if (picks("baseline")) return {"baseline", &baseline::table, nullptr};
  return {};
}

int64_t first_bad_row(Codes codes, int64_t d_sae) {
  for (int64_t b = 0; b < codes.rows; ++b) {
    const int64_t count = codes.counts[b];
    if (count < 0 || count > codes.width) return b;
    const int32_t* const indices = codes.indices + b * codes.width;
    bool bad = false;
    for (int64_t j = 0; j < count; ++j) bad |= uint32_t(indices[j]) >= uint64_t(d_sae);
    if (bad) return b;
  }
  return -1;
}

}  // namespace aksae
