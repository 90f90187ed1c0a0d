// Which kernel table this machine runs, and the check of codes made by hand.
#include <cstring>

#include "../kernels.h"

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

const CpuKernels* cpu_kernels(const char* wanted) {
  const auto picks = [&](const char* isa) { return !wanted || !std::strcmp(wanted, isa); };
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && picks("avx512")) return &avx512::table;
  if (has_avx2 && picks("avx2")) return &avx2::table;
#endif
  return picks("baseline") ? &baseline::table : nullptr;
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
