// AVX-512 F, BW, DQ, VL and VNNI: Intel servers from Cascade Lake on, AMD from Zen 4 on.
#define DI_ISA avx512
#define DI_ISA_NAME "avx512"
#define DI_AVX512
#include "isa.inc"

const di::KernelTable& di::avx512_kernels() { return di::avx512::table(); }
