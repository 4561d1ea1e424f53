// Products on AMX tiles: 16 rows of activations by 64 bytes, times 16 rows of a panel by 64 bytes, are added to 16 x 16
// sums. bf16 weights as bf16, int8 exactly; the types in groups are expanded to bf16 (scaled and rounded) on the way.

constexpr int kTileBytes = 1024;
constexpr int kChunkTiles = 8;                // of each of two panels: 16 KiB stay in L1 while all rows of a block pass
constexpr int64_t kTilesAhead = 8 * 1024;     // bytes; where few rows stream the weights

// The compiler does not know what tile instructions read.
#define DI_MEMORY_BARRIER() asm volatile("" ::: "memory")

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

static const TileConfig kAllTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Tiles of this thread, from here to the end of the scope. The caller's thread may be one on which another library has
// configured tiles: its configuration is put back.
class TileSession {
 public:
  DI_INLINE_MEMBER TileSession() {
    DI_MEMORY_BARRIER();
    _tile_storeconfig(&before_);
    DI_MEMORY_BARRIER();
    _tile_loadconfig(&kAllTiles);
  }
  DI_INLINE_MEMBER ~TileSession() {
    if (before_.palette != 0)
      _tile_loadconfig(&before_);
    else
      _tile_release();
    DI_MEMORY_BARRIER();
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
  TileConfig before_{};
};

// Two 16-row tiles of activations by two panels, or one of either.
struct TilePair {
  const char* a[2];
  const char* b[2];
  char* c[2][2];         // [rows][panel]
  const char* fetch[2];  // of each panel, what is needed later: `fetch_lines` times 64 bytes per tile step
  int fetch_lines;
  int fetch_step;        // bytes of it from one tile step to the next
};

#define DI_DOT_TILES(c, a, b)  \
  {                            \
    if constexpr (kInt8)       \
      _tile_dpbsud(c, a, b);   \
    else                       \
      _tile_dpbf16ps(c, a, b); \
  }

template <bool kInt8, int kRowTiles, int kPanels>
static void multiply_tiles(const TilePair& t, int steps, bool begin) {
  DI_MEMORY_BARRIER();
  if (begin) {
    _tile_zero(0);
    if constexpr (kPanels == 2) _tile_zero(1);
    if constexpr (kRowTiles == 2) _tile_zero(2);
    if constexpr (kRowTiles == 2 && kPanels == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, t.c[0][0], 64);
    if constexpr (kPanels == 2) _tile_loadd(1, t.c[0][1], 64);
    if constexpr (kRowTiles == 2) _tile_loadd(2, t.c[1][0], 64);
    if constexpr (kRowTiles == 2 && kPanels == 2) _tile_loadd(3, t.c[1][1], 64);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t at = s * kTileBytes;
    for (int line = 0; line < t.fetch_lines; ++line)
      DI_UNROLL for (int p = 0; p < kPanels; ++p) __builtin_prefetch(t.fetch[p] + s * t.fetch_step + line * 64, 0, 3);
    _tile_loadd(6, t.b[0] + at, 64);
    _tile_loadd(4, t.a[0] + at, 64);
    DI_DOT_TILES(0, 4, 6)
    if constexpr (kPanels == 2) {
      _tile_loadd(7, t.b[1] + at, 64);
      DI_DOT_TILES(1, 4, 7)
    }
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, t.a[1] + at, 64);
      DI_DOT_TILES(2, 5, 6)
      if constexpr (kPanels == 2) DI_DOT_TILES(3, 5, 7)
    }
  }
  _tile_stored(0, t.c[0][0], 64);
  if constexpr (kPanels == 2) _tile_stored(1, t.c[0][1], 64);
  if constexpr (kRowTiles == 2) _tile_stored(2, t.c[1][0], 64);
  if constexpr (kRowTiles == 2 && kPanels == 2) _tile_stored(3, t.c[1][1], 64);
  DI_MEMORY_BARRIER();
}

template <bool kInt8>
DI_INLINE void multiply_tiles(const TilePair& t, int row_tiles, int panels, int steps, bool begin) {
  if (row_tiles == 2)
    panels == 2 ? multiply_tiles<kInt8, 2, 2>(t, steps, begin) : multiply_tiles<kInt8, 2, 1>(t, steps, begin);
  else
    panels == 2 ? multiply_tiles<kInt8, 1, 2>(t, steps, begin) : multiply_tiles<kInt8, 1, 1>(t, steps, begin);
}

// Weights of consecutive K as bf16 pairs; halves round away from zero.
DI_INLINE void store_pairs(char* out, F16 first, F16 second) {
  const U16 low = (U16)first + 0x8000u, high = (U16)second + 0x8000u;
  store_row(out, (low >> 16) | (high & 0xFFFF0000u));
}

// 8 of K: 4 rows of bf16 weights; `offset` is what stands for zeros, scaled.
DI_INLINE void expand_nibbles(const char* w, F16 scale, F16 offset, char* out) {
  const F16 values = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const U16 words = load_row<U16>(w);
  const auto nibble = [&](int shift) __attribute__((always_inline)) {  // only the lowest four bits of an index count
    return (F16)_mm512_maskz_permutexvar_ps(0xFFFF, (__m512i)(words >> shift), (__m512)values) * scale - offset;
  };
  store_pairs(out, nibble(0), nibble(8));
  store_pairs(out + 64, nibble(16), nibble(24));
  store_pairs(out + 128, nibble(4), nibble(12));
  store_pairs(out + 192, nibble(20), nibble(28));
}

// 4 of K: 2 rows.
DI_INLINE void expand_bytes(const char* w, F16 scale, char* out) {
  const U16 words = load_row<U16>(w) ^ 0x80808080u;
  const auto byte = [&](int i) __attribute__((always_inline)) {
    return __builtin_convertvector((I16)(words << (24 - 8 * i)) >> 24, F16) * scale;
  };
  store_pairs(out, byte(0), byte(1));
  store_pairs(out + 64, byte(2), byte(3));
}

// `steps` tiles of bf16 weights from a panel of a type in groups, from K = 32 * step on.
static void expand(const LinearArgs& args, const char* panel, int step, int steps, char* out) {
  const bool nibbles = has_nibbles(args.type);
  const char* w = panel + args.header_bytes + (int64_t)step * (nibbles ? 256 : 512);
  for (const int end = step + steps; step < end; ++step) {
    const char* header = header_of_group(args.type, panel, step * 32 / args.group);
    const F16 scale = of_columns(header);
    if (nibbles) {
      const F16 offset = column_zeros(args.type, header) * scale;
      for (int i = 0; i < 4; ++i, w += 64, out += 256) expand_nibbles(w, scale, offset, out);
    } else
      for (int i = 0; i < 8; ++i, w += 64, out += 128) expand_bytes(w, scale, out);
  }
}

// One block of rows by panels; c is [panel][rows padded to 16][16].
struct TileBlock {
  const LinearArgs& args;
  const DotActivations& a;
  int row0;
  int row_tiles;
  const char* panels;
  float* c;

  const char* weights(int p) const { return panels + p * args.panel_bytes + args.header_bytes; }
  char* sums(int row_tile, int p) const { return reinterpret_cast<char*>(c) + (p * row_tiles + row_tile) * kTileBytes; }

  // One or two panels from tile step s on. b are their weights there; every pair of row tiles fetches its share of what
  // will be read after them: `next`, `next_step` bytes per tile step.
  template <bool kInt8>
  void multiply(const char* const (&b)[2], const char* const (&next)[2], int next_step, int p, int count, int s,
                int steps) const {
    const int pairs = (row_tiles + 1) / 2, lines = (next_step / 64 + pairs - 1) / pairs;
    for (int t = 0; t < row_tiles; t += 2) {
      const int both = t + 1 < row_tiles ? 1 : 0, second = count - 1, share = t / 2 * lines * 64;
      const TilePair pair{{a.at(row0 + t * 16, (int64_t)s * 64), a.at(row0 + (t + both) * 16, (int64_t)s * 64)},
                          {b[0], b[1]},
                          {{sums(t, p), sums(t, p + second)}, {sums(t + both, p), sums(t + both, p + second)}},
                          {next[0] + share, next[1] + share},
                          lines,
                          next_step};
      multiply_tiles<kInt8>(pair, both + 1, count, steps, s == 0);
    }
  }
};

template <bool kInt8>
static void tile_panels(const TileBlock& block, int panels, bool stream) {
  const int steps = (int)(block.a.row_bytes / 64), chunk = stream ? steps : kChunkTiles;
  for (int s = 0; s < steps; s += chunk)
    for (int p = 0; p < panels; p += 2) {
      const int count = panels - p < 2 ? 1 : 2, here = steps - s < chunk ? steps - s : chunk;
      const int64_t at = (int64_t)s * kTileBytes;
      const char* const b[2] = {block.weights(p) + at, block.weights(p + count - 1) + at};
      const int64_t ahead = stream ? kTilesAhead : 2 * block.args.panel_bytes;
      const char* const next[2] = {b[0] + ahead, b[1] + ahead};
      block.multiply<kInt8>(b, next, kTileBytes, p, count, s, here);
    }
}

// Types in groups: expanded to bf16 piece by piece.
static void tile_groups(const TileBlock& block, int panels) {
  alignas(64) char expanded[2][kChunkTiles * kTileBytes];
  const LinearArgs& args = block.args;
  const int steps = (int)(block.a.row_bytes / 64), step_bytes = has_nibbles(args.type) ? 256 : 512;
  for (int s = 0; s < steps; s += kChunkTiles)
    for (int p = 0; p < panels; p += 2) {
      const int count = panels - p < 2 ? 1 : 2, here = steps - s < kChunkTiles ? steps - s : kChunkTiles;
      const char* panel = block.panels + p * args.panel_bytes;
      for (int i = 0; i < count; ++i) expand(args, panel + i * args.panel_bytes, s, here, expanded[i]);
      const char* const b[2] = {expanded[0], expanded[1]};
      const char* later = panel + 2 * args.panel_bytes + args.header_bytes + (int64_t)s * step_bytes;
      const char* const next[2] = {later, later + args.panel_bytes};
      block.multiply<false>(b, next, step_bytes, p, count, s, here);
    }
}

static void tile_block_sums(const LinearArgs& args, const DotActivations& a, int row0, int rows, int panel0, int panels,
                            float* c) {
  const TileSession session;
  const char* first_panel = static_cast<const char*>(args.panels) + panel0 * args.panel_bytes;
  const TileBlock block{args, a, row0, (rows + 15) / 16, first_panel, c};
  const bool stream = block.row_tiles <= 2;
  if (args.group > 0) return tile_groups(block, panels);
  if (args.type == WeightType::kBf16) return tile_panels<false>(block, panels, stream);
  tile_panels<true>(block, panels, stream);
}
