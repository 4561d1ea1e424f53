// Attention of few rows (decode) over a bf16 cache with bf16 products and float32 sums, for levels that have them: rows of the
// cache are multiplied where they lie. Queries and softmax weights are rounded to bf16.

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
