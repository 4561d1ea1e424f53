// AMX tiles for bf16 and int8 beside AVX-512: Intel servers from Sapphire Rapids on.
#define DI_ISA amx
#define DI_ISA_NAME "amx"
#define DI_AVX512
#define DI_AVX512_BF16
#define DI_AMX
#define DI_BASE avx512_kernels
#include "isa.inc"

const di::KernelTable& di::amx_kernels() { return di::amx::table(); }
