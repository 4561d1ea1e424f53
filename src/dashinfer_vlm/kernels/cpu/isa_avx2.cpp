// AVX2, FMA and F16C: x86-64 from 2013 (Haswell) and Zen on.
#define DI_ISA avx2
#define DI_ISA_NAME "avx2"
#include "isa.inc"

const di::KernelTable& di::avx2_kernels() { return di::avx2::table(); }
