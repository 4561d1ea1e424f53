// Attention with bf16 products and float32 sums, for levels whose dot products are of bf16 pairs: inside packed segments,
// and of few rows (decode) over a bf16 cache. q, keys, values and softmax weights are rounded to bf16, as a bf16 model's are.

struct BfloatTile {
  int rows;
  int head_dim;
  int width;         // head_dim padded to whole panels: the row length of out
  int64_t q_bytes;   // of a row; an odd number of cache lines, so that rows do not meet in few sets of the L1
  char* q;           // [rows][head_dim], scaled so that 2^score is the weight
  char* keys;        // [kKeyTile / 16][head_dim / 2][16][2]
  char* values;      // [width / 16][kKeyTile / 2][16][2]
  char* weights;     // [rows][kKeyTile]
  float* scores;     // [rows][kKeyTile]
  float* out;        // [rows][width], sums not yet divided by row_sum
  float* row_max;
  float* row_sum;

  int steps() const { return (head_dim + 1) / 2; }
};

constexpr int64_t kWeightBytes = kKeyTile * 2 + 64;

static BfloatTile make_bfloat_tile(int thread, int head_dim) {
  BfloatTile t{};
  t.head_dim = head_dim;
  t.width = padded(head_dim, kPanel);
  t.q_bytes = padded(head_dim * 2, 64);
  if (t.q_bytes / 64 % 2 == 0) t.q_bytes += 64;
  const int64_t floats = kQueryRows * (kKeyTile + t.width + 2) * sizeof(float);
  const int64_t panels = 2 * kKeyTile * 2 * t.width, rows = kQueryRows * (t.q_bytes + kWeightBytes);
  char* p = static_cast<char*>(thread_scratch(thread, floats + panels + rows));
  const auto take = [&](int64_t bytes) {
    char* taken = p;
    p += bytes;
    return taken;
  };
  t.q = take(kQueryRows * t.q_bytes);
  t.weights = take(kQueryRows * kWeightBytes);
  t.keys = take(kKeyTile * 2 * t.width);
  t.values = take(kKeyTile * 2 * t.width);
  t.scores = reinterpret_cast<float*>(take(kQueryRows * kKeyTile * sizeof(float)));
  t.out = reinterpret_cast<float*>(take(kQueryRows * t.width * sizeof(float)));
  t.row_max = reinterpret_cast<float*>(take(kQueryRows * sizeof(float)));
  t.row_sum = reinterpret_cast<float*>(take(kQueryRows * sizeof(float)));
  return t;
}

// Upper halves of the words that hold the nearest bf16 values, ties to even.
DI_INLINE U16 rounded(F16 v) {
  const U16 bits = (U16)v;
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

// c[R][16] of each panel, ldc apart (+)= a[R] * steps pairs of rows of the panels.
template <int R, int P>
static void bfloat_rows(const char* a, int64_t a_bytes, const char* b, int64_t panel_bytes, int steps, float* c,
                        int64_t ldc, bool accumulate) {
  F16 sums[P][R];
  const char* w[P];
  Later later[P];
  DI_UNROLL for (int p = 0; p < P; ++p) {
    w[p] = b + p * panel_bytes;
    later[p] = {w[p], 0};  // all in the caches already
    DI_UNROLL for (int r = 0; r < R; ++r) sums[p][r] = accumulate ? load_row<F16>(c + r * ldc + p * kPanel) : F16{};
  }
  add_rows<BfloatWeights, R, P>(a, a_bytes, w, steps, later, sums);
  DI_UNROLL for (int p = 0; p < P; ++p)
    DI_UNROLL for (int r = 0; r < R; ++r) store_row(c + r * ldc + p * kPanel, sums[p][r]);
}

template <int P, int... R>
DI_INLINE void bfloat_column(int rows, const char* a, int64_t a_bytes, const char* b, int64_t panel_bytes, int steps,
                             float* c, int64_t ldc, bool accumulate, std::integer_sequence<int, R...>) {
  static constexpr void (*kTiles[])(const char*, int64_t, const char*, int64_t, int, float*, int64_t, bool) = {
      bfloat_rows<R + 1, P>...};
  const int tiles = (rows + BfloatWeights::kRows - 1) / BfloatWeights::kRows;
  for (int t = 0, row = 0; t < tiles; ++t) {
    const int height = (rows - row + tiles - t - 1) / (tiles - t);
    kTiles[height - 1](a + row * a_bytes, a_bytes, b, panel_bytes, steps, c + row * ldc, ldc, accumulate);
    row += height;
  }
}

static void bfloat_product(int rows, const char* a, int64_t a_bytes, const char* b, int64_t panel_bytes, int panels,
                           int steps, float* c, int64_t ldc, bool accumulate) {
  const auto heights = std::make_integer_sequence<int, BfloatWeights::kRows>{};
  for (int p = 0; p < panels; p += 2) {
    const char* panel = b + p * panel_bytes;
    float* sums = c + p * kPanel;
    if (p + 1 < panels)
      bfloat_column<2>(rows, a, a_bytes, panel, panel_bytes, steps, sums, ldc, accumulate, heights);
    else
      bfloat_column<1>(rows, a, a_bytes, panel, panel_bytes, steps, sums, ldc, accumulate, heights);
  }
}

// Keys as pairs along head_dim, eight keys and eight pairs at a time.
static void pack_bfloat_keys(BfloatTile& t, const float* k, int64_t stride, int count) {
  for (int k0 = 0; k0 < padded(count, kPanel); k0 += 8) {
    char* panel = t.keys + (int64_t)(k0 / kPanel) * t.steps() * 64 + k0 % kPanel * 4;
    for (int s = 0; s < t.steps(); s += 8) {
      F8 block[8];
      for (int i = 0; i < 8; ++i) {
        bf16 pairs[16];
        for (int half = 0; half < 16; half += 8)
          store(pairs + half, k0 + i < count ? columns_at(k + (k0 + i) * stride, 2 * s + half, t.head_dim) : splat(0.f));
        __builtin_memcpy(&block[i], pairs, sizeof pairs);
      }
      transpose(block);
      for (int i = 0; i < 8 && s + i < t.steps(); ++i) __builtin_memcpy(panel + (s + i) * 64, &block[i], sizeof block[i]);
    }
  }
}

// Values as pairs along the keys; a missing last one is zero.
static void pack_bfloat_values(BfloatTile& t, const float* v, int64_t stride, int count) {
  const auto row = [&](int k, int d) __attribute__((always_inline)) {
    const float* x = v + k * stride;
    return k < count ? rounded(join(columns_at(x, d, t.head_dim), columns_at(x, d + 8, t.head_dim))) : U16{};
  };
  for (int d = 0; d < t.width; d += kPanel)
    for (int k = 0; k < count; k += 2)
      store_row(t.values + (int64_t)d / kPanel * kKeyTile / 2 * 64 + k / 2 * 64,
                (row(k, d) >> 16) | (row(k + 1, d) & 0xFFFF0000u));
}

// 2^x for x <= 0 within 3e-6; below -126 it is 0.
DI_INLINE F16 power_of_two(F16 x) {
  const F16 magic = 12582912.f - F16{};  // 1.5 * 2^23: adding it rounds to an integer
  const F16 bounded = x > -126.f ? x : -126.f - F16{};
  const F16 shifted = bounded + magic, f = bounded - (shifted - magic);
  F16 p = f * 1.3333558e-3f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  const I16 exponent = ((I16)shifted - (I16)magic + 127) << 23;
  return x > -126.f ? p * (F16)exponent : F16{};
}

DI_INLINE F8 lower(F16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
DI_INLINE F8 upper(F16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }

// As softmax_tile, with every key visible to every row.
static void softmax_bfloat(BfloatTile& t, int count) {
  const int width = padded(count, kPanel);
  for (int r = 0; r < t.rows; ++r) {
    float* s = t.scores + r * kKeyTile;
    for (int k = count; k < width; ++k) s[k] = -INFINITY;
    F16 top = load_row<F16>(s);
    for (int k = kPanel; k < width; k += kPanel) {
      const F16 more = load_row<F16>(s + k);
      top = top > more ? top : more;
    }
    const float old_max = t.row_max[r], tile_max = max_lane(max(lower(top), upper(top)));
    const float new_max = tile_max > old_max ? tile_max : old_max;
    F16 total{};
    char* weights = t.weights + r * kWeightBytes;
    for (int k = 0; k < width; k += kPanel) {
      const F16 e = power_of_two(load_row<F16>(s + k) - new_max);
      store(reinterpret_cast<bf16*>(weights) + k, lower(e));
      store(reinterpret_cast<bf16*>(weights) + k + 8, upper(e));
      total += e;
    }
    if (new_max > old_max) {
      const float shrink = power_of_two(old_max - new_max - F16{})[0];
      t.row_sum[r] *= shrink;
      t.row_max[r] = new_max;
      float* out = t.out + r * t.width;
      for (int d = 0; d < t.width; d += kPanel) store_row(out + d, load_row<F16>(out + d) * shrink);
    }
    t.row_sum[r] += sum(lower(total) + upper(total));
  }
}

// Rows row0 .. row0 + rows of args.q and args.out, which all belong to the segment.
static void bfloat_varlen_task(const VarlenAttentionArgs& args, int segment, int head, int row0, int rows, int thread) {
  BfloatTile t = make_bfloat_tile(thread, args.head_dim);
  const int start = args.starts[segment], keys = args.starts[segment + 1] - start;
  const float log2_e = 1.44269504088896341f;
  t.rows = rows;
  __builtin_memset(t.out, 0, sizeof(float) * rows * t.width);
  for (int r = 0; r < rows; ++r) {
    const float* q = args.q + (int64_t)(row0 + r) * args.q_strides[0] + head * args.q_strides[1];
    auto* dst = reinterpret_cast<bf16*>(t.q + r * t.q_bytes);
    for (int d = 0; d < padded(t.head_dim, 8); d += 8)
      store(dst + d, columns_at(q, d, t.head_dim) * splat(args.scale * log2_e));
    t.row_max[r] = -INFINITY;
    t.row_sum[r] = 0.f;
  }
  for (int key0 = 0; key0 < keys; key0 += kKeyTile) {
    const int count = keys - key0 < kKeyTile ? keys - key0 : kKeyTile;
    const float* k = args.k + (int64_t)(start + key0) * args.k_strides[0] + head * args.k_strides[1];
    const float* v = args.v + (int64_t)(start + key0) * args.v_strides[0] + head * args.v_strides[1];
    pack_bfloat_keys(t, k, args.k_strides[0], count);
    bfloat_product(rows, t.q, t.q_bytes, t.keys, (int64_t)t.steps() * 64, (count + kPanel - 1) / kPanel, t.steps(),
                   t.scores, kKeyTile, false);
    softmax_bfloat(t, count);
    pack_bfloat_values(t, v, args.v_strides[0], count);
    bfloat_product(rows, t.weights, kWeightBytes, t.values, kKeyTile / 2 * 64, t.width / kPanel, (count + 1) / 2, t.out,
                   t.width, true);
  }
  for (int r = 0; r < rows; ++r) {
    float* out = args.out + (int64_t)(row0 + r) * args.out_strides[0] + head * args.out_strides[1];
    for_columns(t.head_dim, [&](int d, int lanes) {
      store_lanes(out + d, load(t.out + r * t.width + d) * splat(1.f / t.row_sum[r]), lanes);
    });
  }
}

// Decode: rows of the cache are multiplied where they lie.

constexpr int kBfloatColumns = 64;  // of head_dim at a time: 4 sums for each of 6 rows

DI_INLINE bool decodes_in_bfloat(CacheType type, int head_dim) {
  return type == CacheType::kBf16 && head_dim % kBfloatColumns == 0;
}

DI_INLINE F16 dot_pairs(F16 sum, U16 a, U16 b) { return (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

// scores of R rows against two keys, each key read once.
template <int R>
static void bfloat_scores(const bf16* q, int head_dim, const bf16* k0, const bf16* k1, float* scores) {
  F16 acc[R][2] = {};
  for (int d = 0; d < head_dim; d += 32) {
    const U16 x0 = load_row<U16>(k0 + d), x1 = load_row<U16>(k1 + d);
    DI_UNROLL for (int r = 0; r < R; ++r) {
      const U16 x = load_row<U16>(q + r * head_dim + d);
      acc[r][0] = dot_pairs(acc[r][0], x0, x);
      acc[r][1] = dot_pairs(acc[r][1], x1, x);
    }
  }
  DI_UNROLL for (int r = 0; r < R; ++r)
    DI_UNROLL for (int i = 0; i < 2; ++i) scores[r * kKeyTile + i] = sum(lower(acc[r][i]) + upper(acc[r][i]));
}

typedef uint16_t H32 __attribute__((vector_size(64)));

// Elements 0 to 3, 8 to 11 ... of two rows as pairs, and elements 4 to 7, 12 to 15 ...: shuffles within 128 bits are cheap.
DI_INLINE U16 first_pairs(H32 a, H32 b) {
  return (U16)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18,
                                      50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
}

DI_INLINE U16 second_pairs(H32 a, H32 b) {
  return (U16)__builtin_shufflevector(a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53,
                                      22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
}

// 32 sums in memory order to the order of the pairs, and back.
DI_INLINE void load_sums(const float* p, F16& first, F16& second) {
  const F16 a = load_row<F16>(p), b = load_row<F16>(p + 16);
  first = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  second = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

DI_INLINE void store_sums(float* p, F16 first, F16 second) {
  store_row(p, __builtin_shufflevector(first, second, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
  store_row(p + 16, __builtin_shufflevector(first, second, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
}

// out[R][kBfloatColumns] += weights[R][count] * those columns of `count` rows of values. A weight behind the last is zero.
template <int R>
static void bfloat_values(const bf16* const* rows, int count, const bf16* weights, int column, float* out, int64_t ldo) {
  F16 acc[R][4];
  DI_UNROLL for (int r = 0; r < R; ++r) {
    load_sums(out + r * ldo, acc[r][0], acc[r][1]);
    load_sums(out + r * ldo + 32, acc[r][2], acc[r][3]);
  }
  for (int k = 0; k < count; k += 2) {
    const bf16 *first = rows[k] + column, *second = rows[k + 1 < count ? k + 1 : k] + column;
    const H32 a0 = load_row<H32>(first), b0 = load_row<H32>(second);
    const H32 a1 = load_row<H32>(first + 32), b1 = load_row<H32>(second + 32);
    const U16 pairs[4] = {first_pairs(a0, b0), second_pairs(a0, b0), first_pairs(a1, b1), second_pairs(a1, b1)};
    DI_UNROLL for (int r = 0; r < R; ++r) {
      const U16 w = splat_word(reinterpret_cast<const char*>(weights + r * kKeyTile + k));
      DI_UNROLL for (int i = 0; i < 4; ++i) acc[r][i] = dot_pairs(acc[r][i], pairs[i], w);
    }
  }
  DI_UNROLL for (int r = 0; r < R; ++r) {
    store_sums(out + r * ldo, acc[r][0], acc[r][1]);
    store_sums(out + r * ldo + 32, acc[r][2], acc[r][3]);
  }
}

constexpr int kBfloatRows = 6;

template <int... R>
DI_INLINE void bfloat_scores_of(int rows, const bf16* q, int head_dim, const bf16* k0, const bf16* k1, float* scores,
                                std::integer_sequence<int, R...>) {
  static constexpr void (*kRows[])(const bf16*, int, const bf16*, const bf16*, float*) = {bfloat_scores<R + 1>...};
  kRows[rows - 1](q, head_dim, k0, k1, scores);
}

template <int... R>
DI_INLINE void bfloat_values_of(int rows, const bf16* const* value_rows, int count, const bf16* weights, int column,
                                float* out, int64_t ldo, std::integer_sequence<int, R...>) {
  static constexpr void (*kRows[])(const bf16* const*, int, const bf16*, int, float*, int64_t) = {
      bfloat_values<R + 1>...};
  kRows[rows - 1](value_rows, count, weights, column, out, ldo);
}

static void round_row(const float* x, bf16* out, int n) {
  for (int i = 0; i < n; i += 8) store(out + i, load(x + i));
}

// attend_in_place with bf16 products; t.q_bf16 holds the rounded queries.
static void attend_in_place_bfloat(AttentionTile& t, const bf16* const* key_rows, const bf16* const* value_rows, int key0,
                                   int count, int known) {
  const auto heights = std::make_integer_sequence<int, kBfloatRows>{};
  const auto for_heights = [&](const auto& body) {
    for (int row = 0; row < t.rows; row += kBfloatRows) body(row, t.rows - row < kBfloatRows ? t.rows - row : kBfloatRows);
  };
  for (int k = 0; k < count; k += 2) {
    for (int i = k; i < k + 2; ++i) {
      prefetch_row<3>(key_rows, i + kRowsAhead, known, t.head_dim);
      prefetch_row<2>(value_rows, i, count, t.head_dim);
    }
    const bf16* second = key_rows[k + 1 < count ? k + 1 : k];
    for_heights([&](int row, int n) {
      bfloat_scores_of(n, t.q_bf16 + row * t.head_dim, t.head_dim, key_rows[k], second, t.scores + row * kKeyTile + k,
                       heights);
    });
  }
  softmax_tile(t, key0, count);
  alignas(64) bf16 weights[kInPlaceRows * kKeyTile];
  for (int r = 0; r < t.rows; ++r) round_row(t.scores + r * kKeyTile, weights + r * kKeyTile, padded(count, 8));
  const int pieces = t.head_dim / kBfloatColumns, share = (known - count + pieces - 1) / pieces;
  for (int p = 0; p < pieces; ++p) {
    for (int k = count + p * share; k < count + (p + 1) * share; ++k) prefetch_row<2>(key_rows, k, known, t.head_dim);
    for_heights([&](int row, int n) {
      bfloat_values_of(n, value_rows, count, weights + row * kKeyTile, p * kBfloatColumns,
                       t.out + row * t.width + p * kBfloatColumns, t.width, heights);
    });
  }
}
