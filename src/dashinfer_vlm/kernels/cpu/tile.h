// The register tile under every matrix product: R rows of a times one 16-column panel of b.

#ifdef DI_AVX512
constexpr int kTileRows = 12;  // 32 registers, one per row
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;  // 16 registers of 4 lanes: two rows of four, and the panel's four
#endif

// Runs body(task, thread) on the pool for every task.
template <class Body>
DI_INLINE void parallel(int num_tasks, const Body& body) {
  run_tasks(num_tasks, [](void* context, int task, int thread) { (*static_cast<const Body*>(context))(task, thread); },
            const_cast<Body*>(&body));
}

// Row k of a packed panel that is in L1 already.
template <class B>
struct Panel {
  const B* base;
  DI_INLINE_MEMBER void operator()(int k, F8& first, F8& second) const { load_pair(base + k * kPanel, first, second); }
};

// The same, while memory that is needed later is fetched: `step` bytes of it per row.
template <class B>
struct FetchingPanel {
  const B* base;
  const char* later;
  int64_t step;
  DI_INLINE_MEMBER void operator()(int k, F8& first, F8& second) const {
    __builtin_prefetch(later + k * step, 0, 3);
    load_pair(base + k * kPanel, first, second);
  }
};

// Sixteen columns, from offset on, of rows that lie anywhere.
template <class B>
struct Gathered {
  const B* const* rows;
  int offset;
  DI_INLINE_MEMBER void operator()(int k, F8& first, F8& second) const {
    first = load(rows[k] + offset);
    second = load(rows[k] + offset + 8);
  }
};

#define DI_UNROLL _Pragma("GCC unroll 16")

#ifdef DI_AVX512
#include "tile_avx512.h"
#else
// c[R][16] (+)= a[R][depth] * b[depth][16], rows of c ldc apart. kUnroll independent sums hide the latency of the
// multiply-add where R alone does not.
template <int R, int kUnroll, bool kAccumulate, class Rows>
DI_INLINE void tile_rows(const float* a, int64_t lda, Rows b, int depth, float* c, int64_t ldc) {
  F8 acc[kUnroll][R][2];
  DI_UNROLL for (int r = 0; r < R; ++r) DI_UNROLL for (int j = 0; j < 2; ++j) {
    acc[0][r][j] = kAccumulate ? load(c + r * ldc + j * 8) : splat(0.f);
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[u][r][j] = splat(0.f);
  }
  int k = 0;
  for (; k + kUnroll <= depth; k += kUnroll) {
    DI_UNROLL for (int u = 0; u < kUnroll; ++u) {
      F8 b0, b1;
      b(k + u, b0, b1);
      DI_UNROLL for (int r = 0; r < R; ++r) {
        const F8 x = splat(a[r * lda + k + u]);
        acc[u][r][0] += x * b0;
        acc[u][r][1] += x * b1;
      }
    }
  }
  if (kUnroll > 1)
    for (; k < depth; ++k) {
      F8 b0, b1;
      b(k, b0, b1);
      DI_UNROLL for (int r = 0; r < R; ++r) {
        const F8 x = splat(a[r * lda + k]);
        acc[0][r][0] += x * b0;
        acc[0][r][1] += x * b1;
      }
    }
  DI_UNROLL for (int r = 0; r < R; ++r) DI_UNROLL for (int j = 0; j < 2; ++j) {
    DI_UNROLL for (int u = 1; u < kUnroll; ++u) acc[0][r][j] += acc[u][r][j];
    store(c + r * ldc + j * 8, acc[0][r][j]);
  }
}

// 1 to kTileRows rows.
template <bool kAccumulate, class Rows>
static void tile(int rows, const float* a, int64_t lda, Rows b, int depth, float* c, int64_t ldc) {
  switch (rows) {
    case 1: return tile_rows<1, kTileRows == 6 ? 4 : 2, kAccumulate>(a, lda, b, depth, c, ldc);
    case 2: return tile_rows<2, kTileRows == 6 ? 2 : 1, kAccumulate>(a, lda, b, depth, c, ldc);
#if defined(__AVX2__) || defined(__aarch64__)
    case 3: return tile_rows<3, 2, kAccumulate>(a, lda, b, depth, c, ldc);
    case 4: return tile_rows<4, 1, kAccumulate>(a, lda, b, depth, c, ldc);
    case 5: return tile_rows<5, 1, kAccumulate>(a, lda, b, depth, c, ldc);
    case 6: return tile_rows<6, 1, kAccumulate>(a, lda, b, depth, c, ldc);
#endif
    default: __builtin_unreachable();
  }
}
#endif

// Any number of rows, in tiles of equal height as far as possible (7 rows are 4 + 3, not 6 + 1). Tile t of n reads b
// through panel(t, n).
template <bool kAccumulate, class PanelOf>
DI_INLINE void tile_column(int rows, const float* a, int64_t lda, const PanelOf& panel, int depth, float* c,
                           int64_t ldc) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  int row = 0;
  for (int t = 0; t < tiles; ++t) {
    const int height = (rows - row + tiles - t - 1) / (tiles - t);
    tile<kAccumulate>(height, a + row * lda, lda, panel(t, tiles), depth, c + row * ldc, ldc);
    row += height;
  }
}
