// Products with weights in Layout::kDots on 512-bit vectors. 64 bytes of a panel are 16 columns with 4 bytes of K each:
// one dot-product instruction multiplies them with 4 bytes of a row of activations, which are prepared on entry:
// bf16 weights: bf16, or floats where the level has no bf16 arithmetic
// int8: bytes, one scale and sum per row; weights carry an offset of 128, as the instruction wants one unsigned factor
// int8 in groups: 16-bit numbers as 4 high bytes (signed), then their 4 low bytes (unsigned); one scale and sum per row
// and group
// int4: bytes, one scale per row and block of 32 columns, so that an outlier coarsens few others. Their rounding is far
// below that of the weights; llama.cpp multiplies its 4-bit types with the same blocks (Q8_0).

constexpr int kBlockColumns = 32;
constexpr int kPieceRows = 128;  // 8 KiB of each of two panels stay in L1 while all rows of a block pass

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
  if (args.group > 0 && !tiled) return args.type == WeightType::kInt4 ? Form::kBlocks : Form::kTwoBytes;
#ifdef DI_AVX512_BF16
  return Form::kBfloat16;
#else
  return Form::kFloats;
#endif
}

// Eight columns; zeros behind the last.
DI_INLINE F8 columns_at(const float* x, int column, int depth) {
  const int n = depth - column;
  return n >= 8 ? load(x + column) : n > 0 ? load_first(x + column, n) : splat(0.f);
}

// The low byte of every lane.
DI_INLINE void store_bytes(char* p, I8 v) {
  typedef int8_t Bytes __attribute__((vector_size(8)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  __builtin_memcpy(p, &bytes, sizeof bytes);
}

// Of each four lanes the second bytes, then the low bytes.
DI_INLINE void store_two_bytes(char* p, I8 v) {
  char high[8], low[8];
  store_bytes(high, v >> 8);
  store_bytes(low, v);
  for (int i = 0; i < 8; i += 4) {
    __builtin_memcpy(p + 2 * i, high + i, 4);
    __builtin_memcpy(p + 2 * i + 4, low + i, 4);
  }
}

// Rounds x[n] so that max |x| becomes `levels`, and hands it on in eights, with zeros up to column `to`. put returns what
// is to be summed.
template <class Put>
DI_INLINE void quantise(const float* x, int n, int to, float levels, float* scale, int32_t* total, const Put& put) {
  F8 top = splat(0.f);
  for (int c = 0; c < n; c += 8) {
    const F8 v = columns_at(x, c, n);
    top = max(top, max(v, -v));
  }
  const float largest = max_lane(top);
  const F8 inverse = splat(largest > 0.f ? levels / largest : 0.f), magic = splat(12582912.f);
  I8 sums = {};
  for (int c = 0; c < to; c += 8) {
    const I8 v = (I8)(columns_at(x, c, n) * inverse + magic) - (I8)magic;  // adding 1.5 * 2^23 rounds to nearest
    sums += put(c, v);
  }
  int32_t all = 0;
  for (int i = 0; i < 8; ++i) all += sums[i];
  *scale = largest / levels;
  *total = all;
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
      quantise(x + k, n, kBlockColumns, 127.f, scale, &total, [&](int c, I8 v) {
        store_bytes(a.at(row, k + c), v);
        return v;
      });
      offset -= 8.f * *scale * (float)total;
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
      return quantise(x, args.depth, columns, 127.f, a.scales + row, a.sums + row, [&](int c, I8 v) {
        store_bytes(a.at(row, c), v);
        return v;
      });
    case Form::kTwoBytes:
      for (int g = 0; g < a.groups; ++g) {
        const int k = g * args.group, n = args.depth - k < args.group ? args.depth - k : args.group;
        const int64_t index = row * a.groups + g;
        quantise(x + k, n, args.group, 32767.f, a.scales + index, a.sums + index, [&](int c, I8 v) {
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

// 4 bytes at p in every lane.
DI_INLINE U16 splat_word(const char* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word - U16{};
}

// sum + the products of 4 unsigned with 4 signed bytes.
DI_INLINE I16 dot_bytes(I16 sum, U16 of_unsigned, U16 of_signed) {
  return (I16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)of_unsigned, (__m512i)of_signed);
}

// Scales of a panel's columns, from row g of its header.
DI_INLINE F16 column_scales(const char* panel, int g) {
  F8 first, second;
  load_pair(reinterpret_cast<const bf16*>(panel + g * 32), first, second);
  return join(first, second);
}

enum class Scaling { kAtEnd, kGroups, kBlocks };

// How weights of one type are multiplied. 64 bytes of weights are worked on in kParts parts; a part of a panel meets kBytes
// bytes of a row of activations. kRows rows by two panels fill the registers with sums.
struct BfloatWeights {
  static constexpr int kRows = 12;
  static constexpr Scaling kScaling = Scaling::kAtEnd;
  typedef F16 Sum;
#ifdef DI_AVX512_BF16
  static constexpr int kParts = 1;
  typedef U16 Weights, Factor;
  static DI_INLINE_MEMBER Weights unpack(U16 words, int) { return words; }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return splat_word(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, Factor x) {
    sum = (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
#else
  static constexpr int kParts = 2;  // even, then odd K
  typedef F16 Weights, Factor;
  static DI_INLINE_MEMBER Weights unpack(U16 words, int part) {
    return part == 0 ? (F16)(words << 16) : (F16)(words & 0xFFFF0000u);
  }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return (F16)splat_word(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, Factor x) { sum += w * x; }
#endif
  static constexpr int kBytes = 4;
};

struct ByteWeights {
  static constexpr int kRows = 12;
  static constexpr Scaling kScaling = Scaling::kAtEnd;
  static constexpr int kParts = 1;
  static constexpr int kBytes = 4;
  typedef I16 Sum;
  typedef U16 Weights, Factor;
  static DI_INLINE_MEMBER Weights unpack(U16 words, int) { return words; }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return splat_word(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, Factor x) { sum = dot_bytes(sum, w, x); }
};

// Products with the high and with the low bytes of activations.
struct TwoSums {
  I16 high, low;
  DI_INLINE_MEMBER void operator+=(const TwoSums& other) {
    high += other.high;
    low += other.low;
  }
};

// A word of high bytes, and one of low bytes.
struct TwoFactors {
  U16 high, low;
  static DI_INLINE_MEMBER TwoFactors at(const char* x) { return {splat_word(x), splat_word(x + 4)}; }
};

// 8-bit weights in groups; the offset is in the products of the high bytes only.
struct WideByteWeights {
  static constexpr int kRows = 6;
  static constexpr Scaling kScaling = Scaling::kGroups;
  static constexpr int kParts = 1;
  static constexpr int kBytes = 8;
  static constexpr int kDepth = 4;  // of K per 64 bytes
  typedef TwoSums Sum;
  typedef TwoFactors Factor;
  struct Weights {
    U16 with_offset, without;
  };
  static DI_INLINE_MEMBER Weights unpack(U16 words, int) { return {words, words ^ 0x80808080u}; }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return TwoFactors::at(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, const Weights& w, Factor x) {
    sum.high = dot_bytes(sum.high, w.with_offset, x.high);
    sum.low = dot_bytes(sum.low, x.low, w.without);
  }
  static DI_INLINE_MEMBER Sum start(int32_t sum_of_high) { return {-128 * sum_of_high - I16{}, I16{}}; }
};

// 4-bit weights with an offset of 8.
struct NibbleWeights {
  static constexpr int kRows = 6;
  static constexpr Scaling kScaling = Scaling::kBlocks;
  static constexpr int kParts = 2;
  static constexpr int kBytes = 4;
  static constexpr int kDepth = 8;
  typedef I16 Sum;
  typedef U16 Weights, Factor;
  static DI_INLINE_MEMBER Weights unpack(U16 words, int part) { return (words >> (4 * part)) & 0x0F0F0F0Fu; }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return splat_word(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, Factor x) { sum = dot_bytes(sum, w, x); }
};

// Memory that is needed later: `step` bytes of it are fetched per 64 bytes of weights.
struct Later {
  const char* at;
  int64_t step;
};

// sums[p][R] += a[R] * n rows of the weights of panel p.
template <class Kind, int R, int P>
DI_INLINE void add_rows(const char* a, int64_t stride, const char* const (&w)[P], int n, const Later (&later)[P],
                        typename Kind::Sum (&sums)[P][R]) {
  constexpr int kUnroll = unroll_of(R * P);
  typename Kind::Sum acc[kUnroll][P][R];
  DI_UNROLL for (int p = 0; p < P; ++p) DI_UNROLL for (int r = 0; r < R; ++r) {
    acc[0][p][r] = sums[p][r];
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[u][p][r] = typename Kind::Sum{};
  }
  const auto step = [&](int i, typename Kind::Sum(&to)[P][R]) __attribute__((always_inline)) {
    U16 words[P];
    DI_UNROLL for (int p = 0; p < P; ++p) {
      __builtin_prefetch(later[p].at + i * later[p].step, 0, 3);
      words[p] = load_row<U16>(w[p] + i * 64);
    }
    DI_UNROLL for (int part = 0; part < Kind::kParts; ++part) {
      typename Kind::Weights weights[P];
      DI_UNROLL for (int p = 0; p < P; ++p) weights[p] = Kind::unpack(words[p], part);
      DI_UNROLL for (int r = 0; r < R; ++r) {
        const auto x = Kind::factor(a + r * stride + (i * Kind::kParts + part) * Kind::kBytes);
        DI_UNROLL for (int p = 0; p < P; ++p) Kind::add(to[p][r], weights[p], x);
      }
    }
  };
  int i = 0;
  for (; i + kUnroll <= n; i += kUnroll) DI_UNROLL for (int u = 0; u < kUnroll; ++u) step(i + u, acc[u]);
  for (; i < n; ++i) step(i, acc[0]);
  DI_UNROLL for (int p = 0; p < P; ++p) DI_UNROLL for (int r = 0; r < R; ++r) {
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[0][p][r] += acc[u][p][r];
    sums[p][r] = acc[0][p][r];
  }
}

// Rows [first, first + count) of the weights of one panel or two, `panel_bytes` apart, and where their sums go.
struct DotPiece {
  const LinearArgs& args;
  const DotActivations& a;
  const char* panel;
  int first;
  int count;
  int64_t sums_size;  // floats from one panel's sums to the next one's
  const char* weights(int p) const {
    return panel + p * args.panel_bytes + args.header_bytes + (int64_t)first * 64;
  }
};

// c[R][16] of each panel += every group's exact sum, scaled.
template <class Kind, int R, int P>
static void group_rows(const DotPiece& piece, int row, float* c, const Later (&later)[P]) {
  const int rows_per_group = piece.args.group / Kind::kDepth;
  for (int i = 0; i < piece.count; i += rows_per_group) {
    const int g = (piece.first + i) / rows_per_group;
    const int64_t index = (int64_t)row * piece.a.groups + g;
    typename Kind::Sum sums[P][R];
    const char* w[P];
    Later next[P];
    DI_UNROLL for (int p = 0; p < P; ++p) {
      w[p] = piece.weights(p) + (int64_t)i * 64;
      next[p] = {later[p].at + i * later[p].step, later[p].step};
      DI_UNROLL for (int r = 0; r < R; ++r) sums[p][r] = Kind::start(piece.a.sums[index + r * piece.a.groups]);
    }
    const char* a = piece.a.at(row, (int64_t)(piece.first + i) * Kind::kParts * Kind::kBytes);
    add_rows<Kind, R, P>(a, piece.a.row_bytes, w, rows_per_group, next, sums);
    DI_UNROLL for (int p = 0; p < P; ++p) {
      const F16 scale = column_scales(piece.panel + p * piece.args.panel_bytes, g);
      DI_UNROLL for (int r = 0; r < R; ++r) {
        float* total = c + p * piece.sums_size + r * kPanel;
        const I16 exact = (sums[p][r].high << 8) + sums[p][r].low;
        const F16 product = __builtin_convertvector(exact, F16) * (scale * piece.a.scales[index + r * piece.a.groups]);
        store_row(total, g > 0 ? load_row<F16>(total) + product : product);
      }
    }
  }
}

// c[R][16] of each panel += every group's sum: exact within a block, scaled as floats.
template <class Kind, int R, int P>
static void block_rows(const DotPiece& piece, int row, float* c, const Later (&later)[P]) {
  constexpr int kRowsPerBlock = kBlockColumns / Kind::kDepth;
  const DotActivations& a = piece.a;
  const int rows_per_group = piece.args.group / Kind::kDepth;
  const float* scales = a.scales + (int64_t)row * a.blocks + piece.first / kRowsPerBlock;
  for (int i = 0; i < piece.count; i += rows_per_group) {
    const int g = (piece.first + i) / rows_per_group;
    F16 totals[P][R];
    DI_UNROLL for (int r = 0; r < R; ++r) {
      const float offset = a.offsets[((int64_t)row + r) * a.groups + g];
      DI_UNROLL for (int p = 0; p < P; ++p) totals[p][r] = offset - F16{};
    }
    for (int j = i; j < i + rows_per_group; j += kRowsPerBlock, ++scales) {
      typename Kind::Sum sums[P][R];
      const char* w[P];
      Later next[P];
      DI_UNROLL for (int p = 0; p < P; ++p) {
        w[p] = piece.weights(p) + (int64_t)j * 64;
        next[p] = {later[p].at + j * later[p].step, later[p].step};
        DI_UNROLL for (int r = 0; r < R; ++r) sums[p][r] = typename Kind::Sum{};
      }
      add_rows<Kind, R, P>(a.at(row, (int64_t)(piece.first + j) * Kind::kDepth), a.row_bytes, w, kRowsPerBlock, next, sums);
      DI_UNROLL for (int r = 0; r < R; ++r) DI_UNROLL for (int p = 0; p < P; ++p)
        totals[p][r] += __builtin_convertvector(sums[p][r], F16) * scales[(int64_t)r * a.blocks];
    }
    DI_UNROLL for (int p = 0; p < P; ++p) {
      const F16 scale = column_scales(piece.panel + p * piece.args.panel_bytes, g);
      DI_UNROLL for (int r = 0; r < R; ++r) {
        float* sum = c + p * piece.sums_size + r * kPanel;
        store_row(sum, g > 0 ? load_row<F16>(sum) + totals[p][r] * scale : totals[p][r] * scale);
      }
    }
  }
}

// c[R][16] of each panel holds exact 32-bit sums until finish_bytes.
template <class Kind, int R, int P>
static void piece_rows(const DotPiece& piece, int row, float* c, const Later (&later)[P]) {
  typedef typename Kind::Sum Sum;
  Sum sums[P][R];
  const char* w[P];
  DI_UNROLL for (int p = 0; p < P; ++p) {
    w[p] = piece.weights(p);
    DI_UNROLL for (int r = 0; r < R; ++r)
      sums[p][r] = piece.first > 0 ? load_row<Sum>(c + p * piece.sums_size + r * kPanel) : Sum{};
  }
  const char* a = piece.a.at(row, (int64_t)piece.first * Kind::kParts * Kind::kBytes);
  add_rows<Kind, R, P>(a, piece.a.row_bytes, w, piece.count, later, sums);
  DI_UNROLL for (int p = 0; p < P; ++p)
    DI_UNROLL for (int r = 0; r < R; ++r) store_row(c + p * piece.sums_size + r * kPanel, sums[p][r]);
}

template <class Kind, int R, int P>
constexpr auto tile_of_piece() {
  if constexpr (Kind::kScaling == Scaling::kGroups)
    return &group_rows<Kind, R, P>;
  else if constexpr (Kind::kScaling == Scaling::kBlocks)
    return &block_rows<Kind, R, P>;
  else
    return &piece_rows<Kind, R, P>;
}

// 1 to Kind::kRows rows.
template <class Kind, int P, int... R>
DI_INLINE void run_piece(int rows, const DotPiece& piece, int row, float* c, const Later (&later)[P],
                         std::integer_sequence<int, R...>) {
  static constexpr void (*kTiles[])(const DotPiece&, int, float*, const Later(&)[P]) = {
      tile_of_piece<Kind, R + 1, P>()...};
  kTiles[rows - 1](piece, row, c, later);
}

// Exact sums of one panel to floats.
DI_INLINE void finish_bytes(const DotActivations& a, int row0, int rows, const char* panel, float* c) {
  const F16 scale = column_scales(panel, 0);
  for (int r = 0; r < rows; ++r) {
    const I16 exact = load_row<I16>(c + r * kPanel) - 128 * a.sums[row0 + r];
    store_row(c + r * kPanel, __builtin_convertvector(exact, F16) * (scale * a.scales[row0 + r]));
  }
}

// All rows of a block through one piece. One tile streams the weights, and fetches a page ahead; of several, each fetches
// its share of the next piece.
template <class Kind, int P>
static void dot_piece(const DotPiece& piece, const char* next, int row0, int rows, float* c) {
  const int tiles = (rows + Kind::kRows - 1) / Kind::kRows;
  const int64_t step = (64 + tiles - 1) / tiles;
  for (int t = 0, row = 0; t < tiles; ++t) {
    const int height = (rows - row + tiles - t - 1) / (tiles - t);
    Later later[P];
    for (int p = 0; p < P; ++p)
      later[p] = tiles == 1 ? Later{piece.weights(p) + kStreamAhead, 64}
                            : Later{next + p * piece.args.panel_bytes + t * step * piece.count, step};
    run_piece<Kind>(height, piece, row0 + row, c + row * kPanel, later,
                    std::make_integer_sequence<int, Kind::kRows>{});
    row += height;
  }
}

template <class Kind>
static void dot_block(const LinearArgs& args, const DotActivations& a, int row0, int rows, int panel0, int panels,
                      int weight_rows, float* c) {
  const char* first_panel = static_cast<const char*>(args.panels) + panel0 * args.panel_bytes;
  const int step = rows <= Kind::kRows ? weight_rows : kPieceRows;
  for (int i = 0; i < weight_rows; i += step)
    for (int p = 0; p < panels; p += 2) {
      const int count = weight_rows - i < step ? weight_rows - i : step;
      const DotPiece piece{args, a, first_panel + p * args.panel_bytes, i, count, (int64_t)rows * kPanel};
      const char* next = p + 2 < panels ? piece.weights(2) : first_panel + args.header_bytes + (int64_t)(i + step) * 64;
      float* sums = c + p * piece.sums_size;
      if (p + 1 < panels)
        dot_piece<Kind, 2>(piece, next, row0, rows, sums);
      else
        dot_piece<Kind, 1>(piece, next, row0, rows, sums);
    }
}

static void dot_block_sums(const LinearArgs& args, const DotActivations& a, int row0, int rows, int panel0, int panels,
                           float* c) {
  if (args.type == WeightType::kBf16)
    return dot_block<BfloatWeights>(args, a, row0, rows, panel0, panels, (args.depth + 1) / 2, c);
  const int depth = a.groups * args.group;
  if (args.type == WeightType::kInt4)
    return dot_block<NibbleWeights>(args, a, row0, rows, panel0, panels, depth / NibbleWeights::kDepth, c);
  if (args.type == WeightType::kInt8Groups)
    return dot_block<WideByteWeights>(args, a, row0, rows, panel0, panels, depth / WideByteWeights::kDepth, c);
  dot_block<ByteWeights>(args, a, row0, rows, panel0, panels, (args.depth + 3) / 4, c);
  const char* first_panel = static_cast<const char*>(args.panels) + panel0 * args.panel_bytes;
  for (int p = 0; p < panels; ++p)
    finish_bytes(a, row0, rows, first_panel + p * args.panel_bytes, c + (int64_t)p * rows * kPanel);
}
