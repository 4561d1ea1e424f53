// Flash attention with bf16 products and float32 sums over one tile of query rows and one tile of keys, for levels whose dot
// products are of bf16 pairs. q, keys, values and softmax weights are rounded to bf16, as a bf16 model's are.

// A tile of keys and values as the products read them.
struct BfloatKeys {
  int count;
  char* keys;    // [count / 16][head_dim / 2][16][2], the count padded to 16
  char* values;  // [width / 16][count / 2][16][2]

  int64_t value_bytes() const { return padded(count, kPanel) / 2 * 64; }  // of a panel
};

// Bytes of `keys` keys, a multiple of 16, or of as many values.
DI_INLINE int64_t bfloat_panel_bytes(int64_t keys, int head_dim) { return keys * 2 * padded(head_dim, kPanel); }

// Rows share one key head; a row's visible keys are the first visible[row] of all that are shown to it, at least one.
struct BfloatTile {
  int rows;
  int head_dim;
  int width;          // head_dim padded to whole panels
  int64_t q_bytes;    // of a row; an odd number of cache lines, so that rows do not meet in few sets of the L1
  char* q;            // [rows][head_dim], scaled so that 2^score is the weight
  char* weights;      // [rows][kKeyTile]
  float* scores;      // [rows][kKeyTile]
  float* out;         // [rows][width], sums not yet divided by row_sum
  float* row_max;
  float* row_sum;
  int* visible;
  BfloatKeys own;     // room for one tile of keys

  int steps() const { return (head_dim + 1) / 2; }
};

constexpr int64_t kWeightBytes = kKeyTile * 2 + 64;

static BfloatTile make_bfloat_tile(int thread, int head_dim) {
  BfloatTile t{};
  t.head_dim = head_dim;
  t.width = padded(head_dim, kPanel);
  t.q_bytes = padded(head_dim * 2, 64);
  if (t.q_bytes / 64 % 2 == 0) t.q_bytes += 64;
  const int64_t floats = kQueryRows * (kKeyTile + t.width + 3) * sizeof(float);
  const int64_t panels = 2 * bfloat_panel_bytes(kKeyTile, head_dim), rows = kQueryRows * (t.q_bytes + kWeightBytes);
  char* p = static_cast<char*>(thread_scratch(thread, floats + panels + rows));
  const auto take = [&](int64_t bytes) {
    char* taken = p;
    p += bytes;
    return taken;
  };
  t.q = take(kQueryRows * t.q_bytes);
  t.weights = take(kQueryRows * kWeightBytes);
  t.own.keys = take(panels / 2);
  t.own.values = take(panels / 2);
  t.scores = reinterpret_cast<float*>(take(kQueryRows * kKeyTile * sizeof(float)));
  t.out = reinterpret_cast<float*>(take(kQueryRows * t.width * sizeof(float)));
  t.row_max = reinterpret_cast<float*>(take(kQueryRows * sizeof(float)));
  t.row_sum = reinterpret_cast<float*>(take(kQueryRows * sizeof(float)));
  t.visible = reinterpret_cast<int*>(take(kQueryRows * sizeof(int)));
  return t;
}

DI_INLINE void begin_rows(BfloatTile& t, int rows) {
  t.rows = rows;
  __builtin_memset(t.out, 0, sizeof(float) * rows * t.width);
  for (int r = 0; r < rows; ++r) {
    t.row_max[r] = -INFINITY;
    t.row_sum[r] = 0.f;
  }
}

DI_INLINE void set_query(BfloatTile& t, int row, const float* q, float scale, int visible) {
  const float log2_e = 1.44269504088896341f;
  auto* dst = reinterpret_cast<bf16*>(t.q + row * t.q_bytes);
  for (int d = 0; d < padded(t.head_dim, 8); d += 8) store(dst + d, columns_at(q, d, t.head_dim) * splat(scale * log2_e));
  t.visible[row] = visible;
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
  DI_UNROLL for (int p = 0; p < P; ++p)
    DI_UNROLL for (int r = 0; r < R; ++r) sums[p][r] = accumulate ? load_row<F16>(c + r * ldc + p * kPanel) : F16{};
  const Later nothing{b, 0};  // all in the caches already
  add_rows<BfloatWeights, R, P>(a, a_bytes, b, panel_bytes, steps, nothing, sums);
  DI_UNROLL for (int p = 0; p < P; ++p)
    DI_UNROLL for (int r = 0; r < R; ++r) store_row(c + r * ldc + p * kPanel, sums[p][r]);
}

template <int P, int... R>
DI_INLINE void bfloat_rows_of(int rows, const char* a, int64_t a_bytes, const char* b, int64_t panel_bytes, int steps,
                              float* c, int64_t ldc, bool accumulate, std::integer_sequence<int, R...>) {
  static constexpr void (*kTiles[])(const char*, int64_t, const char*, int64_t, int, float*, int64_t, bool) = {
      bfloat_rows<R + 1, P>...};
  kTiles[rows - 1](a, a_bytes, b, panel_bytes, steps, c, ldc, accumulate);
}

// Panels are the inner loop: all of them stay in L1, or nearly so with the largest heads.
static void bfloat_product(int rows, const char* a, int64_t a_bytes, const char* b, int64_t panel_bytes, int panels,
                           int steps, float* c, int64_t ldc, bool accumulate) {
  const auto heights = std::make_integer_sequence<int, BfloatWeights::kRows>{};
  const int tiles = (rows + BfloatWeights::kRows - 1) / BfloatWeights::kRows;
  for (int t = 0, row = 0; t < tiles; ++t) {
    const int height = (rows - row + tiles - t - 1) / (tiles - t);
    const char* x = a + row * a_bytes;
    float* sums = c + row * ldc;
    int p = 0;
    for (; p + 2 <= panels; p += 2)
      bfloat_rows_of<2>(height, x, a_bytes, b + p * panel_bytes, panel_bytes, steps, sums + p * kPanel, ldc, accumulate,
                        heights);
    if (p < panels)
      bfloat_rows_of<1>(height, x, a_bytes, b + p * panel_bytes, panel_bytes, steps, sums + p * kPanel, ldc, accumulate,
                        heights);
    row += height;
  }
}

// Keys as pairs along head_dim, eight keys and eight pairs at a time. row(k) is key k, in bf16 or floats.
template <class Row>
static void pack_bfloat_keys(const BfloatKeys& tile, int head_dim, const Row& row) {
  const int steps = (head_dim + 1) / 2;
  for (int k0 = 0; k0 < padded(tile.count, kPanel); k0 += 8) {
    char* panel = tile.keys + (int64_t)(k0 / kPanel) * steps * 64 + k0 % kPanel * 4;
    for (int s = 0; s < steps; s += 8) {
      F8 block[8];
      for (int i = 0; i < 8; ++i) {
        bf16 pairs[16];
        for (int half = 0; half < 16; half += 8)
          store(pairs + half, k0 + i < tile.count ? columns_at(row(k0 + i), 2 * s + half, head_dim) : splat(0.f));
        __builtin_memcpy(&block[i], pairs, sizeof pairs);
      }
      transpose(block);
      for (int i = 0; i < 8 && s + i < steps; ++i) __builtin_memcpy(panel + (s + i) * 64, &block[i], sizeof block[i]);
    }
  }
}

// Values as pairs along the keys; a missing last one is zero.
template <class Row>
static void pack_bfloat_values(const BfloatKeys& tile, int head_dim, const Row& row) {
  const auto columns = [&](int k, int d) __attribute__((always_inline)) {
    if (k >= tile.count) return U16{};
    return rounded(join(columns_at(row(k), d, head_dim), columns_at(row(k), d + 8, head_dim)));
  };
  for (int k = 0; k < tile.count; k += 2)
    for (int d = 0; d < head_dim; d += kPanel)
      store_row(tile.values + d / kPanel * tile.value_bytes() + k / 2 * 64,
                (columns(k, d) >> 16) | (columns(k + 1, d) & 0xFFFF0000u));
}

// 2^x for x <= 0 within 3e-6, by the polynomial of degree 4 with the least relative error on [-1/2, 1/2] that is 1 at 0;
// 2^-126 for all x below -126.
DI_INLINE F16 power_of_two(F16 x) {
  const F16 magic = 12582912.f - F16{};  // 1.5 * 2^23: adding it rounds to an integer
  const F16 least = -126.f - F16{};
  x = x > least ? x : least;
  const F16 shifted = x + magic, f = x - (shifted - magic);
  F16 p = f * 9.5828522e-3f + 5.5906426e-2f;
  p = p * f + 2.4024099e-1f;
  p = p * f + 6.9312419e-1f;
  p = p * f + 1.f;
  return (F16)((I16)p + ((I16)shifted << 23));  // the integer's low bits become the exponent's
}

// Turns the scores of a row into weights relative to its new maximum. Width is a number of keys, a multiple of kPanel.
template <class Width>
DI_INLINE void softmax_row(BfloatTile& t, int r, Width width) {
  const float* s = t.scores + r * kKeyTile;
  F16 top = load_row<F16>(s);
  for (int k = kPanel; k < width; k += kPanel) {
    const F16 more = load_row<F16>(s + k);
    top = top > more ? top : more;
  }
  const float old_max = t.row_max[r], tile_max = max_lane(max(lower(top), upper(top)));
  const float new_max = tile_max > old_max ? tile_max : old_max;
  F16 total{};
  auto* weights = reinterpret_cast<bf16*>(t.weights + r * kWeightBytes);
  for (int k = 0; k < width; k += kPanel) {
    const F16 e = power_of_two(load_row<F16>(s + k) - new_max);
    store(weights + k, e);
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

// Shows keys [key0, key0 + tile.count) to all rows. Those that a row does not see get weights of 2^-126 of its largest.
static void attend_bfloat(BfloatTile& t, const BfloatKeys& tile, int key0) {
  const int width = padded(tile.count, kPanel);
  bfloat_product(t.rows, t.q, t.q_bytes, tile.keys, (int64_t)t.steps() * 64, width / kPanel, t.steps(), t.scores,
                 kKeyTile, false);
  for (int r = 0; r < t.rows; ++r) {
    const int left = t.visible[r] - key0, visible = left < tile.count ? left : tile.count;
    if (visible == kKeyTile) {
      softmax_row(t, r, std::integral_constant<int, kKeyTile>{});
      continue;
    }
    for (int k = visible > 0 ? visible : 0; k < width; ++k) t.scores[r * kKeyTile + k] = -INFINITY;
    softmax_row(t, r, width);
  }
  bfloat_product(t.rows, t.weights, kWeightBytes, tile.values, tile.value_bytes(), t.width / kPanel,
                 (tile.count + 1) / 2, t.out, t.width, true);
}

DI_INLINE void write_row(const BfloatTile& t, int row, float* out) {
  const F8 inverse = splat(1.f / t.row_sum[row]);
  for_columns(t.head_dim, [&](int d, int lanes) {
    store_lanes(out + d, load(t.out + row * t.width + d) * inverse, lanes);
  });
}
