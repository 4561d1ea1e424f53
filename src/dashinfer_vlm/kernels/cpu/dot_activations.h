// Activations as the products of linear_dots.h and linear_amx.h read them, prepared on entry:
// for bf16 weights: bf16, or floats where the level has no bf16 arithmetic
// for int8: bytes, one scale and sum per row; weights carry an offset of 128, as the instruction wants one unsigned factor
// for int8 in groups: 16-bit numbers as 4 high bytes (signed), then their 4 low bytes (unsigned); one scale and sum per
// row and group
// for int4: bytes, one scale per row and block of 32 columns, so that an outlier coarsens few others. Their rounding is
// far below that of the weights; llama.cpp multiplies its 4-bit types with the same blocks (Q8_0).

constexpr int kBlockColumns = 32;

struct DotActivations {
  char* data;
  int64_t row_bytes;
  bool tiled;  // [rows / 16][row_bytes / 64][16][64] for linear_amx.h, otherwise [rows][row_bytes]
  int groups;
  int blocks;      // scales of a row: of its groups, or of its blocks for 4-bit weights
  float* scales;   // [M][blocks]
  int32_t* sums;   // [M][groups], of the high bytes alone for 8-bit weights in groups
  float* offsets;  // [M][groups], for 4-bit weights instead of sums: what their offset adds, negative

  DI_INLINE_MEMBER char* at(int64_t row, int64_t byte) const {
    if (!tiled) return data + row * row_bytes + byte;
    return data + row / 16 * 16 * row_bytes + byte / 64 * 1024 + row % 16 * 64 + byte % 64;
  }
};

enum class Form { kFloats, kBfloat16, kBytes, kTwoBytes, kBlocks };

DI_INLINE bool wants_tiles([[maybe_unused]] const LinearArgs& args) {
#ifdef DI_AMX
  // A tile costs the same for 1 row as for 16, and expanding groups for tiles costs more than the products of few rows.
  return args.rows > (args.group > 0 ? 15 : 4);
#else
  return false;
#endif
}

DI_INLINE Form form_of(const LinearArgs& args, bool tiled) {
  if (args.type == WeightType::kInt8) return Form::kBytes;
  if (args.group > 0 && !tiled) return has_nibbles(args.type) ? Form::kBlocks : Form::kTwoBytes;
#ifdef DI_AVX512_BF16
  return Form::kBfloat16;
#else
  return Form::kFloats;
#endif
}

// Eight columns; zeros behind the last.
template <class T>
DI_INLINE F8 columns_at(const T* x, int column, int depth) {
  const int n = depth - column;
  return n >= 8 ? load(x + column) : n > 0 ? load_first(x + column, n) : splat(0.f);
}

// Sixteen of them.
DI_INLINE F16 wide_columns_at(const float* x, int column, int depth) {
  if (depth - column >= 16) return load_row<F16>(x + column);
  return join(columns_at(x, column, depth), columns_at(x, column + 8, depth));
}

// The low byte of every lane.
DI_INLINE void store_bytes(char* p, I16 v) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  store_row(p, __builtin_convertvector(v, Bytes));
}

// Of each four lanes the second bytes, then the low bytes.
DI_INLINE void store_two_bytes(char* p, I16 v) {
  char high[16], low[16];
  store_bytes(high, v >> 8);
  store_bytes(low, v);
  for (int i = 0; i < 16; i += 4) {
    __builtin_memcpy(p + 2 * i, high + i, 4);
    __builtin_memcpy(p + 2 * i + 4, low + i, 4);
  }
}

// Rounds x[n] so that max |x| becomes `levels`, and hands it on in sixteens, with zeros up to column `to`, a multiple of 16.
// put returns what is to be summed. A NaN or an infinity makes the scale one, so that it is not lost.
template <class Put>
DI_INLINE void quantise(const float* x, int n, int to, float levels, float* scale, int32_t* total, const Put& put) {
  I16 top{};
  for (int c = 0; c < n; c += 16) {
    const I16 found = magnitudes<I16>(wide_columns_at(x, c, n));
    top = found > top ? found : top;
  }
  const float largest = largest_of(max((I8)lower((F16)top), (I8)upper((F16)top)));
  const float inverse = largest > 0.f ? levels / largest : 0.f;
  const F16 magic = 12582912.f - F16{};  // 1.5 * 2^23: adding it rounds to nearest
  I16 sums{};
  for (int c = 0; c < to; c += 16) sums += put(c, (I16)(wide_columns_at(x, c, n) * inverse + magic) - (I16)magic);
  *scale = largest / levels;
  *total = sum((I8)lower((F16)sums) + (I8)upper((F16)sums));
}

DI_INLINE int bytes_per_number(Form form) {
  switch (form) {
    case Form::kFloats: return 4;
    case Form::kBfloat16:
    case Form::kTwoBytes: return 2;
    case Form::kBytes:
    case Form::kBlocks: return 1;
  }
  __builtin_unreachable();
}

// Every group of a row in its blocks.
static void prepare_blocks(const LinearArgs& args, const DotActivations& a, const float* x, int64_t row) {
  for (int g = 0; g < a.groups; ++g) {
    float offset = 0.f;
    for (int k = g * args.group; k < (g + 1) * args.group; k += kBlockColumns) {
      const int n = args.depth - k < kBlockColumns ? args.depth - k : kBlockColumns;
      float* scale = a.scales + row * a.blocks + k / kBlockColumns;
      int32_t total;
      quantise(x + k, n, kBlockColumns, 127.f, scale, &total, [&](int c, I16 v) {
        store_bytes(a.at(row, k + c), v);
        return v;
      });
      offset -= *scale * (float)total;
    }
    a.offsets[row * a.groups + g] = offset;
  }
}

static void prepare_row(const LinearArgs& args, const DotActivations& a, Form form, int64_t row) {
  const float* x = args.x + row * args.x_stride;
  const int columns = (int)(a.row_bytes / bytes_per_number(form));
  switch (form) {
    case Form::kFloats:
      for (int c = 0; c < columns; c += 8) store(reinterpret_cast<float*>(a.at(row, c * 4)), columns_at(x, c, args.depth));
      return;
    case Form::kBfloat16:
      for (int c = 0; c < columns; c += 8) store(reinterpret_cast<bf16*>(a.at(row, c * 2)), columns_at(x, c, args.depth));
      return;
    case Form::kBytes:
      return quantise(x, args.depth, columns, 127.f, a.scales + row, a.sums + row, [&](int c, I16 v) {
        store_bytes(a.at(row, c), v);
        return v;
      });
    case Form::kTwoBytes:
      for (int g = 0; g < a.groups; ++g) {
        const int k = g * args.group, n = args.depth - k < args.group ? args.depth - k : args.group;
        const int64_t index = row * a.groups + g;
        quantise(x + k, n, args.group, 32767.f, a.scales + index, a.sums + index, [&](int c, I16 v) {
          store_two_bytes(a.at(row, (k + c) * 2), v);
          return v >> 8;
        });
      }
      return;
    case Form::kBlocks: return prepare_blocks(args, a, x, row);
  }
}

static DotActivations prepare_activations(const LinearArgs& args) {
  DotActivations a{};
  if (args.type == WeightType::kF32) return a;
  a.tiled = wants_tiles(args);
  const Form form = form_of(args, a.tiled);
  const bool in_groups = form == Form::kTwoBytes || form == Form::kBlocks;
  a.groups = in_groups ? (args.depth + args.group - 1) / args.group : 1;
  a.blocks = form == Form::kBlocks ? a.groups * args.group / kBlockColumns : a.groups;
  const int depth = padded(args.depth, args.group > 0 ? args.group : args.type == WeightType::kInt8 ? 64 : 32);
  a.row_bytes = padded(depth * bytes_per_number(form), 64);
  if (!a.tiled && a.row_bytes / 64 % 2 == 0) a.row_bytes += 64;  // rows of a tile must not meet in few sets of the L1
  const int64_t data = padded(args.rows, 16) * a.row_bytes;
  const int64_t scales = (int64_t)args.rows * a.blocks * 4, sums = (int64_t)args.rows * a.groups * 4;
  a.data = static_cast<char*>(shared_scratch(data + scales + sums));
  a.scales = reinterpret_cast<float*>(a.data + data);
  a.sums = reinterpret_cast<int32_t*>(a.data + data + scales);
  a.offsets = reinterpret_cast<float*>(a.sums);
  for_rows(args.rows, args.depth, [&](int row) { prepare_row(args, a, form, row); });
  return a;
}
