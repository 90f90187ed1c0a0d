// Kernels for AVX2 with FMA.
#include "standard.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define AKSAE_ISA avx2
#define AKSAE_ISA_LEVEL 2
#define AKSAE_LANE_BYTES 32
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
