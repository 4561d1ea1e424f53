// Flash attention over one tile of query rows and one tile of keys at a time: scores, running softmax, weighted values.
// Rows share one key head; a row's visible keys are the first visible[row] of all that are shown to it.

constexpr int kQueryRows = 192;  // with kKeyTile and head_dim 128 all buffers of a thread still fit in a 512 KiB L2
constexpr int kKeyTile = 128;
constexpr int kInPlaceRows = 12;  // up to here packing a key tile costs more than it saves
static_assert(kMaxGroup <= kQueryRows);

struct AttentionTile {
  int rows;
  int head_dim;
  int width;       // head_dim padded to whole panels: the row length of out
  float* q;        // [rows][head_dim], scaled
  bf16* q_bf16;    // the same, where attend_in_place_bfloat reads it; else null
  float* scores;   // [rows][kKeyTile]
  float* keys;     // [kKeyTile / 16][head_dim][16]
  float* values;   // [width / 16][kKeyTile][16]
  float* out;      // [rows][width], sums not yet divided by row_sum
  float* row_max;
  float* row_sum;
  int* visible;
};

// Index of the sequence or segment that a task belongs to: the last one with first[i] <= task.
DI_INLINE int find_owner(const int* first, int n, int task) {
  int low = 0, high = n;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= task ? low : high) = middle;
  }
  return low;
}

template <bool kAccumulate, class B>
DI_INLINE void tile_all(int rows, const float* a, int64_t lda, B b, int depth, float* c, int64_t ldc) {
  tile_column<kAccumulate>(rows, a, lda, [&](int, int) { return b; }, depth, c, ldc);
}

static AttentionTile make_tile(int thread, int head_dim) {
  AttentionTile t{};
  t.head_dim = head_dim;
  t.width = padded(head_dim, kPanel);
  const size_t q = kQueryRows * padded(head_dim, 16), scores = kQueryRows * kKeyTile, keys = kKeyTile * t.width,
               out = kQueryRows * t.width;
  float* p = static_cast<float*>(
      thread_scratch(thread, (q + scores + 2 * keys + out + 3 * kQueryRows) * sizeof(float)));
  t.q = p;
  t.scores = t.q + q;
  t.keys = t.scores + scores;
  t.values = t.keys + keys;
  t.out = t.values + keys;
  t.row_max = t.out + out;
  t.row_sum = t.row_max + kQueryRows;
  t.visible = reinterpret_cast<int*>(t.row_sum + kQueryRows);
  return t;
}

DI_INLINE void begin_rows(AttentionTile& t) {
  __builtin_memset(t.out, 0, sizeof(float) * t.rows * t.width);
  for (int r = 0; r < t.rows; ++r) {
    t.row_max[r] = -INFINITY;
    t.row_sum[r] = 0.f;
  }
}

DI_INLINE void set_query(AttentionTile& t, int row, const float* q, float scale, int visible) {
  float* dst = t.q + row * t.head_dim;
  for (int d = 0; d < t.head_dim; ++d) dst[d] = q[d] * scale;
  t.visible[row] = visible;
}

// Turns the scores of keys [key0, key0 + count) into weights relative to the new row maximum; zero where not visible.
static void softmax_tile(AttentionTile& t, int key0, int count) {
  const int width = padded(count, 8);
  for (int r = 0; r < t.rows; ++r) {
    float* s = t.scores + r * kKeyTile;
    const int visible = t.visible[r] - key0 < count ? t.visible[r] - key0 : count;
    const int whole = visible > 0 ? visible / 8 * 8 : 0;
    if (visible > whole)
      for (int k = visible; k < whole + 8; ++k) s[k] = -INFINITY;
    const int live = visible > whole ? whole + 8 : whole;
    for (int k = live; k < width; k += 8) store(s + k, splat(0.f));
    if (live == 0) continue;
    F8 top = load(s);
    for (int k = 8; k < live; k += 8) top = max(top, load(s + k));
    const float old_max = t.row_max[r], tile_max = max_lane(top), new_max = tile_max > old_max ? tile_max : old_max;
    const F8 shift = splat(new_max);
    F8 total = splat(0.f);
    for (int k = 0; k < live; k += 8) {
      const F8 e = exp(load(s + k) - shift);
      store(s + k, e);
      total += e;
    }
    if (new_max > old_max) {
      const float shrink = exp(splat(old_max - new_max))[0];
      t.row_sum[r] *= shrink;
      t.row_max[r] = new_max;
      float* out = t.out + r * t.width;
      for (int d = 0; d < t.width; d += 8) store(out + d, load(out + d) * splat(shrink));
    }
    t.row_sum[r] += sum(total);
  }
}

// Rows lie far apart, each on a page of its own: no hardware prefetcher follows them.
constexpr int kRowsAhead = 8;

template <int kLocality, class T>
DI_INLINE void prefetch_row(const T* const* rows, int k, int count, int head_dim) {
  if (k >= count) return;
  const int end = sizeof(T) == 1 ? head_dim + 64 : head_dim;  // an 8-bit row begins anywhere in a line
  for (int d = 0; d < end; d += 64 / (int)sizeof(T)) __builtin_prefetch(rows[k] + d, 0, kLocality);
}

// keys[panel][d][16] from rows in memory; rows at and past count are zero.
template <class T>
static void pack_keys(AttentionTile& t, const T* const* rows, int count) {
  for (int k0 = 0; k0 < count; k0 += 8) {
    for (int i = k0 + kRowsAhead; i < k0 + kRowsAhead + 8; ++i) prefetch_row<3>(rows, i, count, t.head_dim);
    float* dst = t.keys + k0 / kPanel * t.head_dim * kPanel + k0 % kPanel;
    for (int d = 0; d < t.head_dim; d += 8) {
      const int n = t.head_dim - d < 8 ? t.head_dim - d : 8;
      F8 block[8];
      for (int i = 0; i < 8; ++i)
        block[i] = k0 + i >= count ? splat(0.f) : load_row(rows[k0 + i], d, n, t.head_dim);
      transpose(block);
      for (int i = 0; i < n; ++i) store(dst + (d + i) * kPanel, block[i]);
    }
  }
}

template <class T>
static void pack_values(AttentionTile& t, const T* const* rows, int count) {
  for (int k = 0; k < count; ++k) {
    prefetch_row<3>(rows, k + kRowsAhead, count, t.head_dim);
    for (int d = 0; d < t.width; d += 8) {
      const int n = t.head_dim - d < 8 ? t.head_dim - d : 8;
      store(t.values + (d / kPanel * kKeyTile + k) * kPanel + d % kPanel, load_row(rows[k], d, n, t.head_dim));
    }
  }
}

// Many rows: keys and values are expanded once and used by every row.
template <class T>
static void attend_packed(AttentionTile& t, const T* const* key_rows, const T* const* value_rows, int key0, int count) {
  pack_keys(t, key_rows, count);
  for (int k = 0; k < count; k += kPanel)
    tile_all<false>(t.rows, t.q, t.head_dim, Panel<float>{t.keys + (int64_t)k * t.head_dim}, t.head_dim, t.scores + k,
                    kKeyTile);
  softmax_tile(t, key0, count);
  pack_values(t, value_rows, count);
  for (int d = 0; d < t.width; d += kPanel)
    tile_all<true>(t.rows, t.scores, kKeyTile, Panel<float>{t.values + (int64_t)d * kKeyTile}, count, t.out + d,
                   t.width);
}

// scores of R rows against two keys, each key read once.
template <int R, class T>
DI_INLINE void dot_two(const float* q, int head_dim, const T* k0, const T* k1, float* scores) {
  F8 acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = splat(0.f);
  for (int d = 0; d < head_dim; d += 8) {
    const F8 x0 = load(k0 + d), x1 = load(k1 + d);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F8 x = load(q + r * head_dim + d);
      acc[r][0] += x * x0;
      acc[r][1] += x * x1;
    }
  }
  for (int r = 0; r < R; ++r) {
    scores[r * kKeyTile] = sum(acc[r][0]);
    scores[r * kKeyTile + 1] = sum(acc[r][1]);
  }
}

template <class T>
DI_INLINE void dot_rows(int rows, const float* q, int head_dim, const T* k0, const T* k1, float* scores) {
  switch (rows) {
    case 1: return dot_two<1>(q, head_dim, k0, k1, scores);
    case 2: return dot_two<2>(q, head_dim, k0, k1, scores);
    case 3: return dot_two<3>(q, head_dim, k0, k1, scores);
    case 4: return dot_two<4>(q, head_dim, k0, k1, scores);
    case 5: return dot_two<5>(q, head_dim, k0, k1, scores);
    default: return dot_two<6>(q, head_dim, k0, k1, scores);
  }
}

// Column k of the scores times the scale of row k.
DI_INLINE void scale_columns(AttentionTile& t, const int8_t* const* rows, int count) {
  float scales[kKeyTile];
  for (int k = 0; k < count; ++k) scales[k] = row_scale(rows[k], t.head_dim);
  for (int k = count; k < padded(count, 8); ++k) scales[k] = 0.f;
  for (int r = 0; r < t.rows; ++r)
    for (int k = 0; k < count; k += 8) {
      float* s = t.scores + r * kKeyTile + k;
      store(s, load(s) * load(scales + k));
    }
}

template <class T>
DI_INLINE void scale_columns(AttentionTile&, const T* const*, int) {}

// Few rows (decode): keys and values are read where they lie, straight into registers. head_dim is a multiple of 16. The
// first kRowsAhead keys have been fetched already. Rows from count to `known` are the next tile's: its keys are fetched
// while the values are multiplied, as these are meanwhile, so that memory is never waited for and never idle.
template <class T>
static void attend_in_place(AttentionTile& t, const T* const* key_rows, const T* const* value_rows, int key0, int count,
                            int known) {
  for (int k = 0; k < count; k += 2) {
    for (int i = k; i < k + 2; ++i) {
      prefetch_row<3>(key_rows, i + kRowsAhead, known, t.head_dim);
      prefetch_row<2>(value_rows, i, count, t.head_dim);
    }
    const T* second = key_rows[k + 1 < count ? k + 1 : k];
    for (int row = 0; row < t.rows; row += 6)
      dot_rows(t.rows - row < 6 ? t.rows - row : 6, t.q + row * t.head_dim, t.head_dim, key_rows[k], second,
               t.scores + row * kKeyTile + k);
  }
  scale_columns(t, key_rows, count);
  softmax_tile(t, key0, count);
  scale_columns(t, value_rows, count);
  const int panels = t.width / kPanel, share = (known - count + panels - 1) / panels;
  for (int p = 0; p < panels; ++p) {
    for (int k = count + p * share; k < count + (p + 1) * share; ++k) prefetch_row<2>(key_rows, k, known, t.head_dim);
    tile_all<true>(t.rows, t.scores, kKeyTile, Gathered<T>{value_rows, p * kPanel}, count, t.out + p * kPanel, t.width);
  }
}

DI_INLINE void write_row(const AttentionTile& t, int row, float* out) {
  const F8 inverse = splat(1.f / t.row_sum[row]);
  const float* sums = t.out + row * t.width;
  int d = 0;
  for (; d + 8 <= t.head_dim; d += 8) store(out + d, load(sums + d) * inverse);
  if (d < t.head_dim) store_first(out + d, load(sums + d) * inverse, t.head_dim - d);
}
