// Products with weights in Layout::kDots on 512-bit vectors. 64 bytes of a panel are 16 columns with 4 bytes of K each:
// one dot-product instruction multiplies them with 4 bytes of a row of activations. A tile is up to kRows rows by two
// panels: registers hold its sums, and every load of activations serves both panels.

constexpr int kPieceRows = 128;  // 8 KiB of each of two panels stay in L1 while all rows of a block pass
constexpr int64_t kFewBytes = 12 * 1024;  // of activations: they stay in L1, however often they are read

// Memory that is needed later: of each panel `step` bytes are fetched per 64 bytes of weights.
struct Later {
  const char* at;  // of the first panel
  int64_t step;
  DI_INLINE_MEMBER Later after(int64_t steps) const { return {at + steps * step, step}; }
};

// GCC would count with other pointers than these, more than there are registers for: a tenth of the time of a product.
#define DI_OPAQUE(pointer) asm("" : "+r"(pointer))

// sums[p][R] += a[R] * n rows of the weights of panel p; w are the first panel's, the next one's are `panel_bytes` on.
template <class Kind, int R, int P>
DI_INLINE void add_rows(const char* a, int64_t stride, const char* w, int64_t panel_bytes, int n, Later later,
                        typename Kind::Sum (&sums)[P][R]) {
  constexpr int kUnroll = unroll_of(R * P);
  typename Kind::Sum acc[kUnroll][P][R];
  DI_UNROLL for (int p = 0; p < P; ++p) DI_UNROLL for (int r = 0; r < R; ++r) {
    acc[0][p][r] = sums[p][r];
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[u][p][r] = typename Kind::Sum{};
  }
  constexpr int kBases = (R + 2) / 3;  // of three rows each: an address may add `stride` once or twice
  const char* base[kBases];
  DI_UNROLL for (int b = 0; b < kBases; ++b) base[b] = a + 3 * b * stride;
  const auto step = [&](typename Kind::Sum(&to)[P][R]) __attribute__((always_inline)) {
    U16 words[P];
    DI_UNROLL for (int p = 0; p < P; ++p) {
      __builtin_prefetch(later.at + p * panel_bytes, 0, 3);
      words[p] = load_row<U16>(w + p * panel_bytes);
    }
    DI_UNROLL for (int part = 0; part < Kind::kParts; ++part) {
      typename Kind::Weights weights[P];
      DI_UNROLL for (int p = 0; p < P; ++p) weights[p] = Kind::unpack(words[p], part);
      DI_UNROLL for (int r = 0; r < R; ++r) {
        const auto x = Kind::factor(base[r / 3] + r % 3 * stride + part * Kind::kBytes);
        DI_UNROLL for (int p = 0; p < P; ++p) Kind::add(to[p][r], weights[p], x);
      }
    }
    DI_UNROLL for (int b = 0; b < kBases; ++b) {
      base[b] += Kind::kParts * Kind::kBytes;
      DI_OPAQUE(base[b]);
    }
    w += 64;
    DI_OPAQUE(w);
    later.at += later.step;
    DI_OPAQUE(later.at);
  };
  int i = 0;
  for (; i + kUnroll <= n; i += kUnroll) DI_UNROLL for (int u = 0; u < kUnroll; ++u) step(acc[u]);
  for (; i < n; ++i) step(acc[0]);
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
  const char* weights() const { return panel + args.header_bytes + (int64_t)first * 64; }  // of the first panel
};

// c[R][16] of each panel, in registers as far as there are enough: through memory each group would wait for the one before.
template <int R, int P>
struct RowSums {
  F16 sums[P][R];

  DI_INLINE_MEMBER RowSums(const DotPiece& piece, const float* c) {
    DI_UNROLL for (int p = 0; p < P; ++p) DI_UNROLL for (int r = 0; r < R; ++r)
      sums[p][r] = piece.first > 0 ? load_row<F16>(c + p * piece.sums_size + r * kPanel) : F16{};
  }
  DI_INLINE_MEMBER void store(const DotPiece& piece, float* c) const {
    DI_UNROLL for (int p = 0; p < P; ++p)
      DI_UNROLL for (int r = 0; r < R; ++r) store_row(c + p * piece.sums_size + r * kPanel, sums[p][r]);
  }
};

// c[R][16] of each panel += every group's exact sum, scaled.
template <class Kind, int R, int P>
static void group_rows(const DotPiece& piece, int row, float* c, Later later) {
  const int rows_per_group = piece.args.group / Kind::kDepth;
  RowSums<R, P> all(piece, c);
  for (int i = 0; i < piece.count; i += rows_per_group) {
    const int g = (piece.first + i) / rows_per_group;
    const int64_t index = (int64_t)row * piece.a.groups + g;
    typename Kind::Sum sums[P][R];
    DI_UNROLL for (int p = 0; p < P; ++p)
      DI_UNROLL for (int r = 0; r < R; ++r) sums[p][r] = Kind::start(piece.a.sums[index + r * piece.a.groups]);
    const char* a = piece.a.at(row, (int64_t)(piece.first + i) * Kind::kParts * Kind::kBytes);
    add_rows<Kind, R, P>(a, piece.a.row_bytes, piece.weights() + (int64_t)i * 64, piece.args.panel_bytes, rows_per_group,
                         later.after(i), sums);
    DI_UNROLL for (int p = 0; p < P; ++p) {
      const F16 scale = of_columns(header_of_group(Kind::kType, piece.panel + p * piece.args.panel_bytes, g));
      DI_UNROLL for (int r = 0; r < R; ++r) {
        const I16 exact = (sums[p][r].high << 8) + sums[p][r].low;
        all.sums[p][r] +=
            __builtin_convertvector(exact, F16) * (scale * piece.a.scales[index + r * piece.a.groups]);
      }
    }
  }
  all.store(piece, c);
}

// c[R][16] of each panel += every group's sum: exact within a block, scaled as floats.
template <class Kind, int R, int P>
static void block_rows(const DotPiece& piece, int row, float* c, Later later) {
  constexpr int kRowsPerBlock = kBlockColumns / Kind::kDepth;
  const DotActivations& a = piece.a;
  const int rows_per_group = piece.args.group / Kind::kDepth;
  const float* scales = a.scales + (int64_t)row * a.blocks + piece.first / kRowsPerBlock;
  RowSums<R, P> all(piece, c);
  for (int i = 0; i < piece.count; i += rows_per_group) {
    const int g = (piece.first + i) / rows_per_group;
    F16 totals[P][R];
    DI_UNROLL for (int p = 0; p < P; ++p) {
      const char* header = header_of_group(Kind::kType, piece.panel + p * piece.args.panel_bytes, g);
      const F16 zeros = column_zeros(Kind::kType, header);
      DI_UNROLL for (int r = 0; r < R; ++r) totals[p][r] = zeros * a.offsets[((int64_t)row + r) * a.groups + g];
    }
    for (int j = i; j < i + rows_per_group; j += kRowsPerBlock, ++scales) {
      typename Kind::Sum sums[P][R];
      DI_UNROLL for (int p = 0; p < P; ++p) DI_UNROLL for (int r = 0; r < R; ++r) sums[p][r] = typename Kind::Sum{};
      add_rows<Kind, R, P>(a.at(row, (int64_t)(piece.first + j) * Kind::kDepth), a.row_bytes,
                           piece.weights() + (int64_t)j * 64, piece.args.panel_bytes, kRowsPerBlock, later.after(j), sums);
      DI_UNROLL for (int r = 0; r < R; ++r) DI_UNROLL for (int p = 0; p < P; ++p)
        totals[p][r] += __builtin_convertvector(sums[p][r], F16) * scales[(int64_t)r * a.blocks];
    }
    DI_UNROLL for (int p = 0; p < P; ++p) {
      const F16 scale = of_columns(header_of_group(Kind::kType, piece.panel + p * piece.args.panel_bytes, g));
      DI_UNROLL for (int r = 0; r < R; ++r) all.sums[p][r] += totals[p][r] * scale;
    }
  }
  all.store(piece, c);
}

// c[R][16] of each panel; of bytes the exact 32-bit sums, with the weights' offset.
template <class Kind, int R, int P>
static void piece_rows(const DotPiece& piece, int row, float* c, Later later) {
  typedef typename Kind::Sum Sum;
  Sum sums[P][R];
  DI_UNROLL for (int p = 0; p < P; ++p) DI_UNROLL for (int r = 0; r < R; ++r)
    sums[p][r] = piece.first > 0 ? load_row<Sum>(c + p * piece.sums_size + r * kPanel) : Sum{};
  const char* a = piece.a.at(row, (int64_t)piece.first * Kind::kParts * Kind::kBytes);
  add_rows<Kind, R, P>(a, piece.a.row_bytes, piece.weights(), piece.args.panel_bytes, piece.count, later, sums);
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
DI_INLINE void run_piece(int rows, const DotPiece& piece, int row, float* c, Later later,
                         std::integer_sequence<int, R...>) {
  static constexpr void (*kTiles[])(const DotPiece&, int, float*, Later) = {
      tile_of_piece<Kind, R + 1, P>()...};
  kTiles[rows - 1](piece, row, c, later);
}

// One tile of rows streams whole panels and fetches kStreamAhead ahead. What follows the end of a panel is not the panel
// behind it where two are read at once, but the one after that.
template <class Kind, int P>
static void stream_panels(const DotPiece& whole, int row0, int rows, float* c) {
  constexpr int kAhead = kStreamAhead / 64;
  const int before_end = whole.count > kAhead ? whole.count - kAhead : 0;
  for (const bool at_end : {false, true}) {
    DotPiece piece = whole;
    piece.first = at_end ? before_end : 0;
    piece.count = at_end ? whole.count - before_end : before_end;
    if (piece.count == 0) continue;
    const Later later{piece.weights() + kStreamAhead + (at_end ? (P - 1) * whole.args.panel_bytes : 0), 64};
    run_piece<Kind, P>(rows, piece, row0, c, later, std::make_integer_sequence<int, Kind::kRows>{});
  }
}

// All rows of a block through one piece; each tile of several fetches its share of the next piece.
template <class Kind, int P>
static void dot_piece(const DotPiece& piece, const char* next, int row0, int rows, float* c) {
  const int tiles = (rows + Kind::kRows - 1) / Kind::kRows;
  if (tiles == 1) return stream_panels<Kind, P>(piece, row0, rows, c);
  const int64_t step = (64 + tiles - 1) / tiles;
  for (int t = 0, row = 0; t < tiles; ++t) {
    const int height = (rows - row + tiles - t - 1) / (tiles - t);
    run_piece<Kind, P>(height, piece, row0 + row, c + row * kPanel, Later{next + t * step * piece.count, step},
                       std::make_integer_sequence<int, Kind::kRows>{});
    row += height;
  }
}

// Panels are multiplied in pairs, so that every load of activations serves two; few rows read them one by one, since
// memory gives one stream sooner than two.
template <class Kind>
static void dot_block(const LinearArgs& args, const DotActivations& a, int row0, int rows, int panel0, int panels,
                      int weight_rows, float* c) {
  const char* first_panel = static_cast<const char*>(args.panels) + panel0 * args.panel_bytes;
  const int step = rows <= Kind::kRows ? weight_rows : kPieceRows;
  const int together = rows == 1 || rows * a.row_bytes <= kFewBytes ? 1 : 2;
  for (int i = 0; i < weight_rows; i += step)
    for (int p = 0; p < panels; p += together) {
      const int count = weight_rows - i < step ? weight_rows - i : step;
      const DotPiece piece{args, a, first_panel + p * args.panel_bytes, i, count, (int64_t)rows * kPanel};
      const char* next = p + 2 < panels ? piece.weights() + 2 * args.panel_bytes
                                        : first_panel + args.header_bytes + (int64_t)(i + step) * 64;
      float* sums = c + p * piece.sums_size;
      if (together == 2 && p + 1 < panels)
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
    return dot_block<NibbleWeights<WeightType::kInt4>>(args, a, row0, rows, panel0, panels, depth / 8, c);
  if (args.type == WeightType::kInt4Zeros)
    return dot_block<NibbleWeights<WeightType::kInt4Zeros>>(args, a, row0, rows, panel0, panels, depth / 8, c);
  if (args.type == WeightType::kInt8Groups)
    return dot_block<WideByteWeights>(args, a, row0, rows, panel0, panels, depth / WideByteWeights::kDepth, c);
  dot_block<ByteWeights>(args, a, row0, rows, panel0, panels, (args.depth + 3) / 4, c);
}
