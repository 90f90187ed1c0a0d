// Kernels for what every machine of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include "standard.h"

#define AKSAE_ISA baseline
#define AKSAE_ISA_LEVEL 0
#define AKSAE_LANE_BYTES 16
#include "isa.h"
