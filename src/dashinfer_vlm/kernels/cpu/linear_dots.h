// Products with weights in Layout::kDots on 512-bit vectors. 64 bytes of a panel are 16 columns with 4 bytes of K each:
// one dot-product instruction multiplies them with 4 bytes of a row of activations, which are prepared on entry:
// bf16 weights: bf16, or floats where the level has no bf16 arithmetic
// int8: bytes, one scale and sum per row; weights carry an offset of 128, as the instruction wants one unsigned factor
// types in groups: 16-bit numbers as 4 high bytes (signed), then their 4 low bytes (unsigned); one scale and sum per row
// and group

constexpr int kPieceRows = 128;  // 8 KiB of a panel stay in L1 while all rows of a block pass

struct DotActivations {
  char* data;
  int64_t row_bytes;
  bool tiled;  // [rows / 16][row_bytes / 64][16][64] for linear_amx.h, otherwise [rows][row_bytes]
  int groups;
  float* scales;  // [M][groups]
  int32_t* sums;  // [M][groups], of the high bytes alone for 8-bit weights in groups

  DI_INLINE_MEMBER char* at(int64_t row, int64_t byte) const {
    if (!tiled) return data + row * row_bytes + byte;
    return data + row / 16 * 16 * row_bytes + byte / 64 * 1024 + row % 16 * 64 + byte % 64;
  }
};

enum class Form { kFloats, kBfloat16, kBytes, kTwoBytes };

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
  if (args.group > 0 && !tiled) return Form::kTwoBytes;
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

static void prepare_row(const LinearArgs& args, const DotActivations& a, Form form, int64_t row) {
  const float* x = args.x + row * args.x_stride;
  const int columns = (int)(a.row_bytes / (form == Form::kFloats ? 4 : form == Form::kBytes ? 1 : 2));
  if (form == Form::kFloats)
    for (int c = 0; c < columns; c += 8) store(reinterpret_cast<float*>(a.at(row, c * 4)), columns_at(x, c, args.depth));
  if (form == Form::kBfloat16)
    for (int c = 0; c < columns; c += 8) store(reinterpret_cast<bf16*>(a.at(row, c * 2)), columns_at(x, c, args.depth));
  if (form == Form::kBytes)
    quantise(x, args.depth, columns, 127.f, a.scales + row, a.sums + row,
             [&](int c, I8 v) {
               store_bytes(a.at(row, c), v);
               return v;
             });
  if (form == Form::kTwoBytes)
    for (int g = 0; g < a.groups; ++g) {
      const int k = g * args.group, n = args.depth - k < args.group ? args.depth - k : args.group;
      const int64_t index = row * a.groups + g;
      quantise(x + k, n, args.group, 32767.f, a.scales + index, a.sums + index, [&](int c, I8 v) {
        store_two_bytes(a.at(row, (k + c) * 2), v);
        return args.type == WeightType::kInt4 ? v : v >> 8;
      });
    }
}

static DotActivations prepare_activations(const LinearArgs& args) {
  DotActivations a{};
  if (args.type == WeightType::kF32) return a;
  a.tiled = wants_tiles(args);
  const Form form = form_of(args, a.tiled);
  a.groups = form == Form::kTwoBytes ? (args.depth + args.group - 1) / args.group : 1;
  const int depth = padded(args.depth, args.group > 0 ? args.group : args.type == WeightType::kInt8 ? 64 : 32);
  a.row_bytes = (int64_t)depth * (form == Form::kFloats ? 4 : form == Form::kBytes ? 1 : 2);
  const int64_t data = padded(args.rows, 16) * a.row_bytes, scales = (int64_t)args.rows * a.groups * 4;
  a.data = static_cast<char*>(shared_scratch(data + 2 * scales));
  a.scales = reinterpret_cast<float*>(a.data + data);
  a.sums = reinterpret_cast<int32_t*>(a.data + data + scales);
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

// How weights of one type are multiplied: rows of a tile, bytes of activations per 64 bytes of weights, one step;
// whether groups of K are scaled on the way.
struct BfloatWeights {
  static constexpr int kRows = 12;
  static constexpr bool kGrouped = false;
  typedef F16 Sum;
#ifdef DI_AVX512_BF16
  static constexpr int kBytes = 4;
  typedef U16 Weights;
  static DI_INLINE_MEMBER Weights unpack(const char* w) { return load_row<U16>(w); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, const char* x) {
    sum = (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)splat_word(x));
  }
#else
  static constexpr int kBytes = 8;
  struct Weights {
    F16 even, odd;
  };
  static DI_INLINE_MEMBER Weights unpack(const char* w) {
    const U16 words = load_row<U16>(w);
    return {(F16)(words << 16), (F16)(words & 0xFFFF0000u)};
  }
  static DI_INLINE_MEMBER void add(Sum& sum, const Weights& w, const char* x) {
    const auto* pair = reinterpret_cast<const float*>(x);
    sum += pair[0] * w.even;
    sum += pair[1] * w.odd;
  }
#endif
};

struct ByteWeights {
  static constexpr int kRows = 12;
  static constexpr bool kGrouped = false;
  static constexpr int kBytes = 4;
  typedef I16 Sum;
  typedef U16 Weights;
  static DI_INLINE_MEMBER Weights unpack(const char* w) { return load_row<U16>(w); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, const char* x) { sum = dot_bytes(sum, w, splat_word(x)); }
};

// Products with the high and with the low bytes of activations.
struct TwoSums {
  I16 high, low;
  DI_INLINE_MEMBER void operator+=(const TwoSums& other) {
    high += other.high;
    low += other.low;
  }
};

// 8-bit weights in groups; the offset is in the products of the high bytes only.
struct WideByteWeights {
  static constexpr int kRows = 8;
  static constexpr bool kGrouped = true;
  static constexpr int kBytes = 8;
  static constexpr int kDepth = 4;  // of K per 64 bytes
  typedef TwoSums Sum;
  struct Weights {
    U16 with_offset, without;
  };
  static DI_INLINE_MEMBER Weights unpack(const char* w) {
    const U16 bytes = load_row<U16>(w);
    return {bytes, bytes ^ 0x80808080u};
  }
  static DI_INLINE_MEMBER void add(Sum& sum, const Weights& w, const char* x) {
    sum.high = dot_bytes(sum.high, w.with_offset, splat_word(x));
    sum.low = dot_bytes(sum.low, splat_word(x + 4), w.without);
  }
  static DI_INLINE_MEMBER Sum start(int32_t sum_of_high) { return {-128 * sum_of_high - I16{}, I16{}}; }
};

// 4-bit weights; small enough to pass for unsigned and for signed bytes.
struct NibbleWeights {
  static constexpr int kRows = 8;
  static constexpr bool kGrouped = true;
  static constexpr int kBytes = 16;
  static constexpr int kDepth = 8;
  typedef TwoSums Sum;
  struct Weights {
    U16 first, second;
  };
  static DI_INLINE_MEMBER Weights unpack(const char* w) {
    const U16 words = load_row<U16>(w);
    return {words & 0x0F0F0F0Fu, (words >> 4) & 0x0F0F0F0Fu};
  }
  static DI_INLINE_MEMBER void add(Sum& sum, const Weights& w, const char* x) {
    sum.high = dot_bytes(sum.high, w.first, splat_word(x));
    sum.low = dot_bytes(sum.low, splat_word(x + 4), w.first);
    sum.high = dot_bytes(sum.high, w.second, splat_word(x + 8));
    sum.low = dot_bytes(sum.low, splat_word(x + 12), w.second);
  }
  static DI_INLINE_MEMBER Sum start(int32_t sum) { return {I16{}, -8 * sum - I16{}}; }
};

// sums[R] += a[R] * n rows of weights.
template <class Kind, int R>
DI_INLINE void add_rows(const char* a, int64_t stride, const char* w, int n, int64_t ahead,
                        typename Kind::Sum (&sums)[R]) {
  constexpr int kUnroll = unroll_of(R);
  typename Kind::Sum acc[kUnroll][R];
  DI_UNROLL for (int r = 0; r < R; ++r) {
    acc[0][r] = sums[r];
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[u][r] = typename Kind::Sum{};
  }
  const auto step = [&](int i, typename Kind::Sum(&to)[R]) __attribute__((always_inline)) {
    __builtin_prefetch(w + i * 64 + ahead, 0, 3);
    const auto weights = Kind::unpack(w + i * 64);
    DI_UNROLL for (int r = 0; r < R; ++r) Kind::add(to[r], weights, a + r * stride + i * Kind::kBytes);
  };
  int i = 0;
  for (; i + kUnroll <= n; i += kUnroll) DI_UNROLL for (int u = 0; u < kUnroll; ++u) step(i + u, acc[u]);
  for (; i < n; ++i) step(i, acc[0]);
  DI_UNROLL for (int r = 0; r < R; ++r) {
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[0][r] += acc[u][r];
    sums[r] = acc[0][r];
  }
}

// Rows [first, first + count) of a panel's weights.
struct DotPiece {
  const LinearArgs& args;
  const DotActivations& a;
  const char* panel;
  int first;
  int count;
  int64_t ahead;
  const char* weights() const { return panel + args.header_bytes + (int64_t)first * 64; }
};

// c[R][16] += every group's exact sum, scaled.
template <class Kind, int R>
static void group_rows(const DotPiece& p, int row, float* c) {
  const int rows_per_group = p.args.group / Kind::kDepth;
  F16 total[R];
  DI_UNROLL for (int r = 0; r < R; ++r) total[r] = p.first > 0 ? load_row<F16>(c + r * kPanel) : F16{};
  for (int i = 0; i < p.count; i += rows_per_group) {
    const int g = (p.first + i) / rows_per_group;
    const int64_t index = (int64_t)row * p.a.groups + g;
    TwoSums sums[R];
    DI_UNROLL for (int r = 0; r < R; ++r) sums[r] = Kind::start(p.a.sums[index + r * p.a.groups]);
    add_rows<Kind, R>(p.a.at(row, (int64_t)(p.first + i) * Kind::kBytes), p.a.row_bytes, p.weights() + (int64_t)i * 64,
                      rows_per_group, p.ahead, sums);
    const F16 scale = column_scales(p.panel, g);
    DI_UNROLL for (int r = 0; r < R; ++r) {
      const I16 exact = (sums[r].high << 8) + sums[r].low;
      total[r] += __builtin_convertvector(exact, F16) * (scale * p.a.scales[index + r * p.a.groups]);
    }
  }
  DI_UNROLL for (int r = 0; r < R; ++r) store_row(c + r * kPanel, total[r]);
}

// c[R][16] holds exact 32-bit sums until finish_bytes.
template <class Kind, int R>
static void piece_rows(const DotPiece& p, int row, float* c) {
  typedef typename Kind::Sum Sum;
  Sum sums[R];
  DI_UNROLL for (int r = 0; r < R; ++r) sums[r] = p.first > 0 ? load_row<Sum>(c + r * kPanel) : Sum{};
  add_rows<Kind, R>(p.a.at(row, (int64_t)p.first * Kind::kBytes), p.a.row_bytes, p.weights(), p.count, p.ahead, sums);
  DI_UNROLL for (int r = 0; r < R; ++r) store_row(c + r * kPanel, sums[r]);
}

template <class Kind, int R>
constexpr auto tile_of_piece() {
  if constexpr (Kind::kGrouped)
    return &group_rows<Kind, R>;
  else
    return &piece_rows<Kind, R>;
}

// 1 to Kind::kRows rows.
template <class Kind, int... R>
DI_INLINE void run_piece(int rows, const DotPiece& p, int row, float* c, std::integer_sequence<int, R...>) {
  static constexpr void (*kTiles[])(const DotPiece&, int, float*) = {tile_of_piece<Kind, R + 1>()...};
  kTiles[rows - 1](p, row, c);
}

// Exact sums of one panel to floats.
DI_INLINE void finish_bytes(const DotActivations& a, int row0, int rows, const char* panel, float* c) {
  const F16 scale = column_scales(panel, 0);
  for (int r = 0; r < rows; ++r) {
    const I16 exact = load_row<I16>(c + r * kPanel) - 128 * a.sums[row0 + r];
    store_row(c + r * kPanel, __builtin_convertvector(exact, F16) * (scale * a.scales[row0 + r]));
  }
}

template <class Kind>
static void dot_block(const LinearArgs& args, const DotActivations& a, int row0, int rows, int panel0, int panels,
                      int weight_rows, float* c) {
  const char* first_panel = static_cast<const char*>(args.panels) + panel0 * args.panel_bytes;
  const int tiles = (rows + Kind::kRows - 1) / Kind::kRows, step = tiles == 1 ? weight_rows : kPieceRows;
  const int64_t ahead = tiles == 1 ? kStreamAhead : args.panel_bytes;
  for (int i = 0; i < weight_rows; i += step)
    for (int p = 0; p < panels; ++p) {
      const int count = weight_rows - i < step ? weight_rows - i : step;
      const DotPiece piece{args, a, first_panel + p * args.panel_bytes, i, count, ahead};
      float* sums = c + (int64_t)p * rows * kPanel;
      for (int t = 0, row = 0; t < tiles; ++t) {
        const int height = (rows - row + tiles - t - 1) / (tiles - t);
        run_piece<Kind>(height, piece, row0 + row, sums + row * kPanel,
                        std::make_integer_sequence<int, Kind::kRows>{});
        row += height;
      }
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
