// Products with integer weights. Activations are quantised on entry to 16-bit words, pairs of which are multiplied and
// added exactly (vpmaddwd). Weights are stored with an offset (8 bits: + 128, 4 bits: + 8), so that unpacking is masks
// and shifts; the offset is taken back through the sums of the activations.

typedef int16_t S16 __attribute__((vector_size(32)));
typedef uint16_t H16 __attribute__((vector_size(32)));

constexpr int kIntBlockDepth = 512;  // a multiple of every group size but the whole depth

// a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
DI_INLINE I8 multiply_pairs(S16 a, S16 b) {
#if defined(__AVX2__)
  return (I8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  __m128i x[2], y[2];
  __builtin_memcpy(x, &a, sizeof a);
  __builtin_memcpy(y, &b, sizeof b);
  x[0] = _mm_madd_epi16(x[0], y[0]);
  x[1] = _mm_madd_epi16(x[1], y[1]);
  I8 r;
  __builtin_memcpy(&r, x, sizeof r);
  return r;
#else
  I8 r;
  for (int i = 0; i < 8; ++i) r[i] = (int)a[2 * i] * b[2 * i] + (int)a[2 * i + 1] * b[2 * i + 1];
  return r;
#endif
}

DI_INLINE I8 splat_int(int x) { return I8{x, x, x, x, x, x, x, x}; }
DI_INLINE I8 load_int(const int32_t* p) {
  I8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
DI_INLINE void store_int(int32_t* p, I8 v) { __builtin_memcpy(p, &v, sizeof v); }

// The pair of activations at p in every lane.
DI_INLINE S16 splat_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return (S16)splat_int(pair);
}

// Activations of the whole product: words [M][words], one scale and one sum per row and group.
struct IntActivations {
  int64_t words;  // depth padded to 4
  int groups;
  int16_t* q;
  float* scales;  // [M][groups]
  int32_t* sums;  // [M][groups]
};

DI_INLINE void store_words(int16_t* p, I8 v) {
#ifdef __AVX2__
  const __m256i x = (__m256i)v;
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
#else
  typedef int16_t Words __attribute__((vector_size(16)));
  const Words words = __builtin_convertvector(v, Words);
  __builtin_memcpy(p, &words, sizeof words);
#endif
}

// max |x| becomes `levels`; returns the scale, which a NaN or an infinity makes one, so that it is not lost.
DI_INLINE float quantise_group(const float* x, int n, float levels, int16_t* q, int32_t* total) {
  I8 top = {};
  for_columns(n, [&](int c, int lanes) { top = max(top, magnitudes<I8>(load_lanes(x + c, lanes))); });
  const float largest = largest_of(top);
  const F8 inverse = splat(largest > 0.f ? levels / largest : 0.f), magic = splat(12582912.f);
  I8 sums = splat_int(0);
  for_columns(n, [&](int c, int lanes) {
    const I8 v = (I8)(load_lanes(x + c, lanes) * inverse + magic) - (I8)magic;  // adding 1.5 * 2^23 rounds to nearest
    sums += v;
    if (lanes == 8) return store_words(q + c, v);
    for (int i = 0; i < lanes; ++i) q[c + i] = (int16_t)v[i];
  });
  int32_t all = 0;
  for (int i = 0; i < 8; ++i) all += sums[i];
  *total = all;
  return largest / levels;
}

static IntActivations quantise_activations(const LinearArgs& args) {
  IntActivations a{};
  const int group = args.group > 0 ? args.group : args.depth;
  a.words = padded(args.depth, 4);
  a.groups = (args.depth + group - 1) / group;
  const int64_t scales = (int64_t)args.rows * a.groups, words = args.rows * a.words + 16;
  char* p = static_cast<char*>(shared_scratch(scales * 8 + words * 2));
  a.scales = reinterpret_cast<float*>(p);
  a.sums = reinterpret_cast<int32_t*>(p + scales * 4);
  a.q = reinterpret_cast<int16_t*>(p + scales * 8);
  const float levels = args.type == WeightType::kInt8 ? 127.f : 32767.f;
  for_rows(args.rows, args.depth, [&](int row) {
    int16_t* q = a.q + row * a.words;
    for (int g = 0; g < a.groups; ++g) {
      const int k = g * group, n = args.depth - k < group ? args.depth - k : group;
      a.scales[row * a.groups + g] =
          quantise_group(args.x + row * args.x_stride + k, n, levels, q + k, a.sums + row * a.groups + g);
    }
    for (int64_t k = args.depth; k < a.words; ++k) q[k] = 0;
  });
  return a;
}

// The compiler may not start on what follows with this value before what stands above: interleaving the halves of a
// step needs more registers than there are.
#ifdef __AVX2__
#define DI_KEEP_ORDER(value) asm volatile("" : "+x"(value))
#else
#define DI_KEEP_ORDER(value)
#endif

// Clears all but the lowest `bits` of each word. On AVX2 by two shifts: a mask would take the register that the 12 sums
// and the operands of a full tile leave no room for.
template <int kBits>
DI_INLINE S16 low_bits(H16 words) {
#ifdef __AVX2__
  return (S16)_mm256_srli_epi16(_mm256_slli_epi16((__m256i)words, 16 - kBits), 16 - kBits);
#else
  return (S16)(words & (uint16_t)((1 << kBits) - 1));
#endif
}

// sums[R][16] += a[R][depth] * 8-bit weights [depth / 2][16 columns][2]; depth is even.
template <int R>
DI_INLINE void add_products8(const int16_t* a, int64_t lda, const uint8_t* w, int depth, int64_t ahead, I8 (&acc)[R][2]) {
  for (int k = 0; k < depth; k += 2, w += 32) {
    __builtin_prefetch(w + ahead, 0, 3);
    H16 words;
    __builtin_memcpy(&words, w, sizeof words);
    const S16 first = low_bits<8>(words), second = (S16)(words >> 8);
    DI_UNROLL for (int r = 0; r < R; ++r) {
      const S16 x = splat_pair(a + r * lda + k);
      acc[r][0] += multiply_pairs(first, x);
      acc[r][1] += multiply_pairs(second, x);
    }
  }
}

// The same for 4-bit weights [depth / 4][16 columns][4]; depth is a multiple of 4.
template <int R>
DI_INLINE void add_products4(const int16_t* a, int64_t lda, const uint8_t* w, int depth, int64_t ahead, I8 (&acc)[R][2]) {
  for (int k = 0; k < depth; k += 4, w += 32) {
    __builtin_prefetch(w + ahead, 0, 3);
    H16 words;
    __builtin_memcpy(&words, w, sizeof words);
    const S16 first = low_bits<4>(words), second = low_bits<4>(words >> 4);
    DI_UNROLL for (int r = 0; r < R; ++r) {
      const S16 x = splat_pair(a + r * lda + k);
      acc[r][0] += multiply_pairs(first, x);
      acc[r][1] += multiply_pairs(second, x);
    }
    DI_KEEP_ORDER(words);
    const S16 third = low_bits<4>(words >> 8), fourth = (S16)(words >> 12);
    DI_UNROLL for (int r = 0; r < R; ++r) {
      const S16 x = splat_pair(a + r * lda + k + 2);
      acc[r][0] += multiply_pairs(third, x);
      acc[r][1] += multiply_pairs(fourth, x);
    }
  }
}

// A piece of one panel, as many rows as a tile has. c holds exact int32 sums until finish_sums8.
template <int R>
static void int8_rows(const IntActivations& a, int row, const uint8_t* panel, int k, int depth, int64_t ahead, float* c) {
  int32_t* sums = reinterpret_cast<int32_t*>(c);
  I8 acc[R][2];
  DI_UNROLL for (int r = 0; r < R; ++r) DI_UNROLL for (int j = 0; j < 2; ++j)
    acc[r][j] = k > 0 ? load_int(sums + r * kPanel + j * 8) : splat_int(-128 * a.sums[row + r]);
  add_products8<R>(a.q + row * a.words + k, a.words, panel + 32 + (int64_t)k * kPanel, depth, ahead, acc);
  DI_UNROLL for (int r = 0; r < R; ++r) DI_UNROLL for (int j = 0; j < 2; ++j)
    store_int(sums + r * kPanel + j * 8, acc[r][j]);
}

// The same for weights in groups: every group's exact sum is scaled and added to c.
template <int R, WeightType kType>
static void group_rows(const IntActivations& a, int row, const uint8_t* panel, int k, int depth, int group,
                      int64_t ahead, float* c) {
  constexpr int kBits = has_nibbles(kType) ? 4 : 8, kHeader = group_header(kType);
  const int64_t group_bytes = kHeader + (int64_t)group * kPanel * kBits / 8;
  for (int end = k + depth; k < end; k += group) {
    const int g = k / group, n = end - k < group ? end - k : group;
    const uint8_t* w = panel + g * group_bytes;
    I8 zeros[2] = {splat_int(1 << (kBits - 1)), splat_int(1 << (kBits - 1))};
    if constexpr (kType == WeightType::kInt4Zeros) {
      F8 wide[2];
      load_pair(reinterpret_cast<const bf16*>(w + 32), wide[0], wide[1]);
      DI_UNROLL for (int j = 0; j < 2; ++j) zeros[j] = __builtin_convertvector(wide[j], I8);
    }
    I8 acc[R][2];
    DI_UNROLL for (int r = 0; r < R; ++r) DI_UNROLL for (int j = 0; j < 2; ++j)
      acc[r][j] = zeros[j] * splat_int(-a.sums[(row + r) * a.groups + g]);
    if constexpr (kBits == 8)
      add_products8<R>(a.q + row * a.words + k, a.words, w + kHeader, n, ahead, acc);
    else
      add_products4<R>(a.q + row * a.words + k, a.words, w + kHeader, n, ahead, acc);
    F8 scale[2];
    load_pair(reinterpret_cast<const bf16*>(w), scale[0], scale[1]);
    DI_UNROLL for (int r = 0; r < R; ++r) {
      const F8 x_scale = splat(a.scales[(row + r) * a.groups + g]);
      DI_UNROLL for (int j = 0; j < 2; ++j) {
        const F8 v = __builtin_convertvector(acc[r][j], F8) * (scale[j] * x_scale);
        float* out = c + r * kPanel + j * 8;
        store(out, k > 0 ? load(out) + v : v);
      }
    }
  }
}

// One piece of one panel for one tile of rows.
struct IntPiece {
  const LinearArgs& args;
  const IntActivations& a;
  const uint8_t* panel;
  int k;
  int depth;

  template <int R>
  DI_INLINE_MEMBER void rows(int row, int64_t ahead, float* c) const {
    if (args.type == WeightType::kInt8)
      int8_rows<R>(a, row, panel, k, depth, ahead, c);
    else if (args.type == WeightType::kInt8Groups)
      group_rows<R, WeightType::kInt8Groups>(a, row, panel, k, depth, args.group, ahead, c);
    else if (args.type == WeightType::kInt4)
      group_rows<R, WeightType::kInt4>(a, row, panel, k, depth, args.group, ahead, c);
    else
      group_rows<R, WeightType::kInt4Zeros>(a, row, panel, k, depth, args.group, ahead, c);
  }

  void tile(int height, int row, int64_t ahead, float* c) const {
    switch (height) {
      case 1: return rows<1>(row, ahead, c);
      case 2: return rows<2>(row, ahead, c);
#if defined(__AVX2__) || defined(__aarch64__)
      case 3: return rows<3>(row, ahead, c);
      case 4: return rows<4>(row, ahead, c);
      case 5: return rows<5>(row, ahead, c);
      case 6: return rows<6>(row, ahead, c);
#endif
      default: __builtin_unreachable();
    }
  }
};

// Exact sums of one panel to floats.
DI_INLINE void finish_sums8(const IntActivations& a, int row0, int rows, const uint8_t* panel, float* c) {
  F8 scale[2];
  load_pair(reinterpret_cast<const bf16*>(panel), scale[0], scale[1]);
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < 2; ++j) {
      float* sums = c + r * kPanel + j * 8;
      const I8 exact = load_int(reinterpret_cast<const int32_t*>(sums));
      store(sums, __builtin_convertvector(exact, F8) * (scale[j] * splat(a.scales[row0 + r])));
    }
}

static void int_block_sums(const LinearArgs& args, const IntActivations& a, int row0, int rows, int panel0, int panels,
                           float* c) {
  const uint8_t* weights = static_cast<const uint8_t*>(args.panels) + panel0 * args.panel_bytes;
  const int tiles = (rows + kTileRows - 1) / kTileRows, depth = (int)a.words;
  const int step = tiles == 1 ? depth : kIntBlockDepth;
  const int64_t ahead = tiles == 1 ? kStreamAhead : args.panel_bytes;
  for (int k = 0; k < depth; k += step)
    for (int p = 0; p < panels; ++p) {
      const uint8_t* panel = weights + p * args.panel_bytes;
      const IntPiece piece{args, a, panel, k, depth - k < step ? depth - k : step};
      float* sums = c + p * rows * kPanel;
      for (int t = 0, row = 0; t < tiles; ++t) {
        const int height = (rows - row + tiles - t - 1) / (tiles - t);
        piece.tile(height, row0 + row, ahead, sums + row * kPanel);
        row += height;
      }
      if (args.type == WeightType::kInt8 && k + step >= depth) finish_sums8(a, row0, rows, panel, sums);
    }
}
