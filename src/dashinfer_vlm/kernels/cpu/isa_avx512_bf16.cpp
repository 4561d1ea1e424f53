// AVX-512 with bf16 dot products: Intel from Cooper Lake on (not Ice Lake), AMD from Zen 4 on.
#define DI_ISA avx512_bf16
#define DI_ISA_NAME "avx512_bf16"
#define DI_AVX512
#define DI_AVX512_BF16
#define DI_BASE avx512_kernels
#include "isa.inc"

const di::KernelTable& di::avx512_bf16_kernels() { return di::avx512_bf16::table(); }
