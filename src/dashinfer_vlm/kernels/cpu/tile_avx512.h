// The register tile where one 512-bit register holds a panel's row.

template <class Rows>
DI_INLINE F16 panel_row(const Rows& b, int k) {
  F8 first, second;
  b(k, first, second);
  return join(first, second);
}

DI_INLINE F16 panel_row(const Panel<float>& b, int k) { return load_row<F16>(b.base + k * kPanel); }

DI_INLINE F16 panel_row(const FetchingPanel<float>& b, int k) {
  __builtin_prefetch(b.later + k * b.step, 0, 3);
  return load_row<F16>(b.base + k * kPanel);
}

// Independent sums per row that hide the latency of the multiply-add where R rows alone do not.
constexpr int unroll_of(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

// c[R][16] (+)= a[R][depth] * b[depth][16], rows of c ldc apart.
template <int R, bool kAccumulate, class Rows>
static void tile_rows(const float* a, int64_t lda, Rows b, int depth, float* c, int64_t ldc) {
  constexpr int kUnroll = unroll_of(R);
  F16 acc[kUnroll][R];
  DI_UNROLL for (int r = 0; r < R; ++r) {
    acc[0][r] = kAccumulate ? load_row<F16>(c + r * ldc) : F16{};
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[u][r] = F16{};
  }
  int k = 0;
  for (; k + kUnroll <= depth; k += kUnroll)
    DI_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const F16 row = panel_row(b, k + u);
      DI_UNROLL for (int r = 0; r < R; ++r) acc[u][r] += a[r * lda + k + u] * row;
    }
  for (; k < depth; ++k) {
    const F16 row = panel_row(b, k);
    DI_UNROLL for (int r = 0; r < R; ++r) acc[0][r] += a[r * lda + k] * row;
  }
  DI_UNROLL for (int r = 0; r < R; ++r) {
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[0][r] += acc[u][r];
    store_row(c + r * ldc, acc[0][r]);
  }
}

template <bool kAccumulate, class Rows, int... R>
DI_INLINE void tile_of(int rows, const float* a, int64_t lda, const Rows& b, int depth, float* c, int64_t ldc,
                       std::integer_sequence<int, R...>) {
  static constexpr void (*kTiles[])(const float*, int64_t, Rows, int, float*, int64_t) = {
      tile_rows<R + 1, kAccumulate, Rows>...};
  kTiles[rows - 1](a, lda, b, depth, c, ldc);
}

// 1 to kTileRows rows.
template <bool kAccumulate, class Rows>
static void tile(int rows, const float* a, int64_t lda, Rows b, int depth, float* c, int64_t ldc) {
  tile_of<kAccumulate>(rows, a, lda, b, depth, c, ldc, std::make_integer_sequence<int, kTileRows>{});
}
