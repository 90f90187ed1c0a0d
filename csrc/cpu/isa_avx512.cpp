// Kernels for AVX-512 (F, BW, DQ, VL).
#include "standard.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#endif
#define AKSAE_ISA avx512
#define AKSAE_ISA_LEVEL 512
#define AKSAE_LANE_BYTES 64
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
