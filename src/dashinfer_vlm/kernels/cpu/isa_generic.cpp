// Baseline of the platform: SSE2 on x86-64, NEON on ARM.
#define DI_ISA generic
#define DI_ISA_NAME "generic"
#include "isa.inc"

const di::KernelTable& di::generic_kernels() { return di::generic::table(); }
