// What a kernel of any ISA level is given, and the table that a level fills. All sizes are in elements, all pointers
// are checked by the caller (bind.cpp); kernels read nothing outside of what the sizes say.
#pragma once
#include <cstdint>

namespace di {

struct bf16 {
  std::uint16_t bits;
};

// kInt8 multiplies activations of 8 bits, the types in groups multiply activations of 16 bits; those of 4 bits with
// Layout::kDots of 8 bits in blocks of 32 columns. Each group of kInt4Zeros has a number that stands for 0; of kInt4 it
// is 8.
enum class WeightType { kF32, kBf16, kInt8, kInt8Groups, kInt4, kInt4Zeros };

constexpr bool is_integer(WeightType type) { return type != WeightType::kF32 && type != WeightType::kBf16; }

constexpr bool has_nibbles(WeightType type) { return type == WeightType::kInt4 || type == WeightType::kInt4Zeros; }

// Bytes of the header of a panel's group: 16 scales as bf16, and 16 zeros likewise.
constexpr int group_header(WeightType type) { return type == WeightType::kInt4Zeros ? 64 : 32; }

enum class CacheType { kF32, kBf16, kInt8 };

enum class Epilogue { kNone, kResidual, kSiluMul, kGelu, kGeluTanh, kQuickGelu };

// How packed weights lie in memory: as the levels up to AVX2 read them, or for the dot products of AVX-512 and AMX.
// 32-bit weights are the same in both.
enum class Layout { kPairs, kDots };

// Columns of the product that one weight panel holds. A panel is contiguous over K:
// f32:  [K][16]
// Layout::kPairs
// bf16: [K][8][2], columns j and j + 8 next to each other
// int8: 16 scales as one bf16 row, then [K / 2][8][2 of K][2 columns j and j + 8], every byte + 128
// int8 in groups: per group the scales and then the bytes, likewise
// int4: per group 16 scales likewise, then [group / 4][8][2 of K] words of nibbles, every one + 8: (j, k), (j + 8, k),
//       (j, k + 2), (j + 8, k + 2)
// int4 with zeros: the same, 16 zeros as one more bf16 row behind the scales, every nibble + its zero
// The integer types pad K to a multiple of 4.
// Layout::kDots: rows of 64 bytes, 4 bytes of consecutive K per column, behind a header that holds the scales as bf16
// rows (in the order of kPairs' bf16 rows), each followed by its zeros, and ends on 64 bytes
// bf16: [K / 2][16][2], K padded to a multiple of 32
// int8, in groups or not: [K / 4][16][4], every byte + 128, K padded to a multiple of 64 or to whole groups
// int4: [K / 8][16][4] bytes, every nibble + 8, the low ones K to K + 3, the high ones K + 4 to K + 7; K padded to whole
//       groups
constexpr int kPanel = 16;

// Limits of the attention kernels' buffers.
constexpr int kMaxHeadDim = 256;
constexpr int kScaleBytes = 4;  // behind the numbers of an 8-bit row of the cache
constexpr int kMaxGroup = 192;  // query heads per key head

// out[M, N] = epilogue(x[M, K] * panels + bias). With kSiluMul a panel holds 8 gate columns, then their 8 up columns,
// and out has half of the columns.
struct LinearArgs {
  const float* x;
  std::int64_t x_stride;
  int rows;         // M
  int depth;        // K
  int num_panels;   // ceil(N / kPanel), or ceil(N / 2 / 8) with gate and up interleaved
  int out_columns;  // valid columns of out
  WeightType type;
  int group;  // rows of K per scale of the types in groups; 0 for the others
  std::int64_t panel_bytes;
  std::int64_t header_bytes;  // of each panel in Layout::kDots
  const void* panels;
  const float* bias;  // in the weight's own row order, or null
  Epilogue epilogue;
  const float* residual;
  std::int64_t residual_stride;
  float* out;
  std::int64_t out_stride;
};

// linear of x widened from bytes; linear.x and linear.x_stride are not set. The weights are float32 or bfloat16.
struct PatchArgs {
  const std::uint8_t* patches;
  std::int64_t patch_stride;
  LinearArgs linear;
};

// A page table's view of the cache [num_blocks, block_size, kv_heads, row]; all strides in elements. A row is head_dim
// numbers; 8-bit ones are followed by their scale (see cache_row.h).
struct PagedCache {
  CacheType type;
  void* k;
  void* v;
  std::int64_t k_strides[3];  // block, slot, head; the head's numbers are dense
  std::int64_t v_strides[3];
  int block_size;
  int kv_heads;
  int head_dim;
};

// Causal attention of the last queries of each sequence over its whole context.
struct PagedAttentionArgs {
  PagedCache cache;
  const float* q;  // [T, heads, head_dim]
  std::int64_t q_strides[2];
  float* out;
  std::int64_t out_strides[2];
  int heads;
  int sequences;
  const std::int32_t* block_tables;
  std::int64_t table_stride;
  const std::int32_t* query_starts;
  const std::int32_t* context_lens;
  float scale;
};

// Attention of positions over all positions of their segment; k, v are [P, heads, head_dim], q and out the part
// [queries, heads, head_dim] that begins at position first_query.
struct VarlenAttentionArgs {
  const float* q;
  const float* k;
  const float* v;
  float* out;
  std::int64_t q_strides[2];  // position, head
  std::int64_t k_strides[2];
  std::int64_t v_strides[2];
  std::int64_t out_strides[2];
  int heads;
  int head_dim;
  int segments;
  const std::int32_t* starts;
  int first_query;
  int queries;
  float scale;
  bool bfloat16;  // products may be of bf16, where the level multiplies it
};

// Copies k and v of every token to its slot in the cache's type; with cos and sin, k gets its position on the way.
struct WriteKvArgs {
  PagedCache cache;
  int tokens;
  const float* k;  // [T, kv_heads, head_dim]
  const float* v;
  std::int64_t k_strides[2];
  std::int64_t v_strides[2];
  const std::int64_t* slots;
  const float* cos;  // [T, head_dim / 2], or null
  const float* sin;
  std::int64_t table_strides[2];  // of cos, of sin
};

// RMSNorm, or LayerNorm where bias is given, of every row.
struct NormArgs {
  const float* x;
  std::int64_t x_stride;
  const float* weight;
  const float* bias;
  float* out;
  std::int64_t out_stride;
  int rows;
  int width;
  float eps;
};

// Rotates x [T, heads, head_dim] in place by the tables [T, head_dim / 2].
struct RopeArgs {
  float* x;
  std::int64_t x_strides[2];
  const float* cos;
  const float* sin;
  std::int64_t table_strides[2];
  int tokens;
  int heads;
  int head_dim;
};

// Which rows each sequence of a step owns, and the seat that its state lies in. With as many tokens in its context as
// rows it begins, and its state is not read.
struct SeatedRows {
  int sequences;
  const std::int64_t* seats;          // no two alike
  const std::int32_t* query_starts;  // [sequences + 1]
  const std::int32_t* context_lens;
};

// SiLU of each channel's weighted sum over its `size` newest inputs.
struct CausalConvArgs {
  SeatedRows rows;
  const float* x;  // [T, channels]
  std::int64_t x_stride;
  float* inputs;        // [seats, size - 1, channels], the last ones of every sequence, which become those of x
  const float* weight;  // [size, channels], that of the newest input last
  float* out;           // [T, channels]
  int channels;
  int size;  // at least 2
};

// Each token decays the memory of each head, moves what its k finds there towards its v, and reads it with its q. k, and
// q before it is divided by the root of key_dim, are brought to length 1.
struct DeltaRuleArgs {
  SeatedRows rows;
  const float* q;  // [T, key_heads, key_dim]
  const float* k;
  const float* v;  // [T, heads, value_dim]
  std::int64_t q_strides[2];
  std::int64_t k_strides[2];
  std::int64_t v_strides[2];
  const float* beta;   // [T, heads]
  const float* decay;  // logarithms
  std::int64_t beta_stride;
  std::int64_t decay_stride;
  float* memory;  // [seats, heads, key_dim, value_dim]
  float* out;     // [T, heads, value_dim]
  int tokens;
  int key_heads;
  int heads;  // a multiple of key_heads
  int key_dim;
  int value_dim;
};

// What `choose` gives where there is no token.
constexpr std::int32_t kNotANumber = -1;      // the row holds NaN or its largest logit is infinite, with or without penalties
constexpr std::int32_t kNothingAllowed = -2;  // everything is forbidden

// Chooses a token for every row of logits [rows, width], which stay as they are. Lists of ids belong to row r from
// starts[r] to starts[r + 1].
struct ChooseArgs {
  const float* logits;
  std::int64_t logits_stride;
  int rows;
  int width;
  const float* temperature;   // 0: the largest logit
  const std::int32_t* top_k;  // 0: all
  const float* top_p;
  const float* min_p;
  const float* uniform;     // from 0 to below 1
  const float* repetition;  // of seen tokens; 1: none
  const float* presence;    // of seen tokens whose count is not 0
  const float* frequency;
  const std::int32_t* bias_starts;  // distinct ids, to whose logits something is added before all else
  const std::int32_t* bias_ids;
  const float* biases;
  const std::int32_t* seen_starts;  // distinct ids, and how often the output has each
  const std::int32_t* seen_ids;
  const std::int32_t* seen_counts;
  const std::int32_t* forbidden_starts;
  const std::int32_t* forbidden_ids;
  const std::uint32_t* mask;  // [rows, width / 32 rounded up], bit i of word w allows token 32 w + i; or null
  std::int64_t mask_stride;
  std::int32_t* tokens;
};

// Of the rows `row_ids`: the rank of one token, the log of the sum of all exp(logit - largest), the likeliest tokens.
struct LikeliestArgs {
  const float* logits;
  std::int64_t logits_stride;
  int rows;
  int width;
  const std::int32_t* row_ids;
  const std::int32_t* tokens;
  int num_top;  // at most width
  float* largest;
  float* log_totals;
  std::int32_t* ranks;    // 1 is the likeliest
  std::int32_t* top_ids;  // [rows, num_top], best first
};

struct KernelTable {
  const char* name;
  Layout layout;             // of the weights that linear reads
  bool multiplies_bfloat16;  // whether activations are rounded to bf16 for bf16 weights
  void (*linear)(const LinearArgs&);
  void (*embed_patches)(const PatchArgs&);
  void (*paged_attention)(const PagedAttentionArgs&);
  void (*varlen_attention)(const VarlenAttentionArgs&);
  void (*write_kv)(const WriteKvArgs&);
  void (*norm)(const NormArgs&);
  void (*rope)(const RopeArgs&);
  void (*causal_conv)(const CausalConvArgs&);
  void (*delta_rule)(const DeltaRuleArgs&);
  void (*choose)(const ChooseArgs&);
  void (*likeliest)(const LikeliestArgs&);
};

const KernelTable& generic_kernels();
#ifdef DI_HAVE_AVX2
const KernelTable& avx2_kernels();
#endif
#ifdef DI_HAVE_AVX512
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();
#endif
#ifdef DI_HAVE_AMX
const KernelTable& amx_kernels();
#endif

}  // namespace di
