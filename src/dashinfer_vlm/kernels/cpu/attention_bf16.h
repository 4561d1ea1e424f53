// Attention inside packed segments with bf16 products and float32 sums: the tile of attention_tile.h for levels whose
// dot products are of bf16 pairs. q, keys, values and softmax weights are rounded to bf16, as a bf16 model's are.

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
