// The running sum of a device array.
#pragma once

#include "common.cuh"

namespace aksae {

// out[i] = the sum of in[0, i) for i <= n. in and out may not overlap.
int launch_exclusive_scan(Stream, const int32_t* in, int64_t n, int64_t* out);

}  // namespace aksae
