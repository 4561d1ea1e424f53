// x * W^T with packed weights. Work is cut into blocks of rows by groups of panels; a block's sums stay in the L2 cache
// until its last K, then the epilogue writes out once.

#ifdef DI_AMX
constexpr int kBlockRows = 384;   // tiles are quick, so a larger L2 (2 MiB) must give each weight more work
#else
constexpr int kBlockRows = 192;   // rows * kBlockDepth floats of x and rows * 256 sums fit in a 512 KiB L2
#endif
constexpr int kBlockDepth = 256;  // this much of a panel, of the next one and of a tile's rows fit in L1 together
constexpr int kBlockPanels = 16;
constexpr int64_t kStreamAhead = 4096;  // bytes; a page: hardware prefetchers stop at page ends

#ifdef DI_AVX512
#include "dot_activations.h"
#include "dot_weights.h"
#include "linear_dots.h"
#ifdef DI_AMX
#include "linear_amx.h"
#endif
#else
#include "linear_int.h"
#endif

template <class B>
DI_INLINE const char* bytes_of(const B* p) {
  return reinterpret_cast<const char*>(p);
}

// Sums of a block into c[panel][row][16]. One tile of rows streams whole panels; more rows use each piece of a panel
// again from L1, while every tile fetches its share of the next piece: a burst in one tile would wait for memory, and
// leave it idle in the others.
template <class B>
DI_INLINE void block_sums(const LinearArgs& args, int row0, int rows, int panel0, int panels, float* c) {
  constexpr int64_t kRowBytes = kPanel * sizeof(B);
  const float* x = args.x + row0 * args.x_stride;
  const int64_t panel_size = (int64_t)args.depth * kPanel;
  const B* weights = static_cast<const B*>(args.panels) + panel0 * panel_size;
  if (rows <= kTileRows) {
    for (int p = 0; p < panels; ++p) {
      const B* panel = weights + p * panel_size;
      tile<false>(rows, x, args.x_stride, FetchingPanel<B>{panel, bytes_of(panel) + kStreamAhead, kRowBytes},
                  args.depth, c + p * rows * kPanel, kPanel);
    }
    return;
  }
  for (int k = 0; k < args.depth; k += kBlockDepth) {
    const int depth = args.depth - k < kBlockDepth ? args.depth - k : kBlockDepth;
    for (int p = 0; p < panels; ++p) {
      const B* piece = weights + p * panel_size + (int64_t)k * kPanel;
      const B* next = p + 1 < panels ? piece + panel_size : weights + (int64_t)(k + depth) * kPanel;
      const auto panel = [&](int t, int tiles) {
        const int64_t step = (kRowBytes + tiles - 1) / tiles;
        return FetchingPanel<B>{piece, bytes_of(next) + t * depth * step, step};
      };
      float* sums = c + p * rows * kPanel;
      if (k == 0)
        tile_column<false>(rows, x, args.x_stride, panel, depth, sums, kPanel);
      else
        tile_column<true>(rows, x + k, args.x_stride, panel, depth, sums, kPanel);
    }
  }
}

template <Epilogue E, class F>
DI_INLINE F finish(F v, F extra) {
  if (E == Epilogue::kGelu) return gelu(v);
  if (E == Epilogue::kGeluTanh) return gelu_tanh(v);
  if (E == Epilogue::kQuickGelu) return quick_gelu(v);
  if (E == Epilogue::kResidual) return v + extra;
  return v;
}

// As many columns of out as F has lanes, from `column` on; all are valid.
template <Epilogue E, class F>
DI_INLINE void finish_whole(const LinearArgs& args, F v, int64_t row, int column) {
  if (args.bias) v += load_row<F>(args.bias + column);
  F extra{};
  if (E == Epilogue::kResidual) extra = load_row<F>(args.residual + row * args.residual_stride + column);
  store_row(args.out + row * args.out_stride + column, finish<E>(v, extra));
}

// The same, of which those up to args.out_columns are valid.
template <Epilogue E>
DI_INLINE void finish_columns(const LinearArgs& args, F8 v, int64_t row, int column) {
  const int n = args.out_columns - column;
  if (n >= 8) return finish_whole<E>(args, v, row, column);
  if (n <= 0) return;
  if (args.bias) v += load_first(args.bias + column, n);
  F8 extra{};
  if (E == Epilogue::kResidual) extra = load_first(args.residual + row * args.residual_stride + column, n);
  store_first(args.out + row * args.out_stride + column, finish<E>(v, extra), n);
}

template <class F>
DI_INLINE void silu_mul_whole(const LinearArgs& args, F gate, F up, int64_t row, int column) {
  if (args.bias) {
    gate += load_row<F>(args.bias + column);
    up += load_row<F>(args.bias + args.out_columns + column);
  }
  store_row(args.out + row * args.out_stride + column, silu(gate) * up);
}

DI_INLINE void silu_mul_columns(const LinearArgs& args, F8 gate, F8 up, int64_t row, int column) {
  const int n = args.out_columns - column;
  if (n >= 8) return silu_mul_whole(args, gate, up, row, column);
  if (args.bias) {
    gate += load_first(args.bias + column, n);
    up += load_first(args.bias + args.out_columns + column, n);
  }
  store_first(args.out + row * args.out_stride + column, silu(gate) * up, n);
}

#ifdef DI_AVX512
// sums(p) are those of panel p of the block, in one register.
template <Epilogue E, class Sums>
DI_INLINE void finish_row(const LinearArgs& args, const Sums& sums, int64_t row, int panel0, int panels) {
  for (int p = 0; p < panels; ++p) {
    const F16 v = sums(p);
    const int column = (panel0 + p) * kPanel;
    if (args.out_columns - column >= kPanel) {
      finish_whole<E>(args, v, row, column);
      continue;
    }
    finish_columns<E>(args, lower(v), row, column);
    finish_columns<E>(args, upper(v), row, column + 8);
  }
}

template <class Sums>
DI_INLINE void silu_mul_row(const LinearArgs& args, const Sums& sums, int64_t row, int panel0, int panels) {
  for (int p = 0; p < panels; p += 2) {
    const int column = (panel0 + p) * 8;
    const F16 first = sums(p), second = sums(p + 1 < panels ? p + 1 : p);
    if (p + 1 < panels && args.out_columns - column >= 16) {
      silu_mul_whole(args, join(lower(first), lower(second)), join(upper(first), upper(second)), row, column);
      continue;
    }
    silu_mul_columns(args, lower(first), upper(first), row, column);
    if (p + 1 < panels) silu_mul_columns(args, lower(second), upper(second), row, column + 8);
  }
}
#else
// sums(p) points to those of panel p of the block.
template <Epilogue E, class Sums>
DI_INLINE void finish_row(const LinearArgs& args, const Sums& sums, int64_t row, int panel0, int panels) {
  for (int p = 0; p < panels; ++p)
    for (int half = 0; half < kPanel; half += 8)
      finish_columns<E>(args, load(sums(p) + half), row, (panel0 + p) * kPanel + half);
}

template <class Sums>
DI_INLINE void silu_mul_row(const LinearArgs& args, const Sums& sums, int64_t row, int panel0, int panels) {
  for (int p = 0; p < panels; ++p) silu_mul_columns(args, load(sums(p)), load(sums(p) + 8), row, (panel0 + p) * 8);
}
#endif

// sums(r, p) are those of row r and panel p of the block, in the form that finish_row wants.
template <Epilogue E, class Sums>
static void finish_block(const LinearArgs& args, const Sums& sums, int row0, int rows, int panel0, int panels) {
  for (int r = 0; r < rows; ++r) {
    const auto of_row = [&](int p) __attribute__((always_inline)) { return sums(r, p); };
    if constexpr (E == Epilogue::kSiluMul)
      silu_mul_row(args, of_row, row0 + r, panel0, panels);
    else
      finish_row<E>(args, of_row, row0 + r, panel0, panels);
  }
}

template <class Sums>
static void finish_block(const LinearArgs& args, const Sums& sums, int row0, int rows, int panel0, int panels) {
  switch (args.epilogue) {
    case Epilogue::kNone: return finish_block<Epilogue::kNone>(args, sums, row0, rows, panel0, panels);
    case Epilogue::kResidual: return finish_block<Epilogue::kResidual>(args, sums, row0, rows, panel0, panels);
    case Epilogue::kSiluMul: return finish_block<Epilogue::kSiluMul>(args, sums, row0, rows, panel0, panels);
    case Epilogue::kGelu: return finish_block<Epilogue::kGelu>(args, sums, row0, rows, panel0, panels);
    case Epilogue::kGeluTanh: return finish_block<Epilogue::kGeluTanh>(args, sums, row0, rows, panel0, panels);
    case Epilogue::kQuickGelu: return finish_block<Epilogue::kQuickGelu>(args, sums, row0, rows, panel0, panels);
  }
}

#ifdef DI_AVX512
typedef DotActivations Activations;

static void block_sums(const LinearArgs& args, const Activations& a, int row0, int rows, int panel0, int panels,
                       float* c) {
  if (args.type == WeightType::kF32) return block_sums<float>(args, row0, rows, panel0, panels, c);
#ifdef DI_AMX
  if (a.tiled) return tile_block_sums(args, a, row0, rows, panel0, panels, c);
#endif
  dot_block_sums(args, a, row0, rows, panel0, panels, c);
}

// c is [panel][c_rows][16], of which the first `rows` rows are wanted; sums of bytes are exact integers.
static void finish_block(const LinearArgs& args, const Activations& a, int row0, int rows, int panel0, int panels,
                         const float* c, int c_rows) {
  const auto at = [&](int r, int p) __attribute__((always_inline)) { return c + (p * c_rows + r) * kPanel; };
  if (args.type != WeightType::kInt8)
    return finish_block(args, [&](int r, int p) __attribute__((always_inline)) { return load_row<F16>(at(r, p)); }, row0,
                        rows, panel0, panels);
  F16 scales[kBlockPanels];
  for (int p = 0; p < panels; ++p)
    scales[p] = of_columns(static_cast<const char*>(args.panels) + (panel0 + p) * args.panel_bytes);
  const auto scaled = [&](int r, int p) __attribute__((always_inline)) {
    const I16 exact = load_row<I16>(at(r, p)) - 128 * a.sums[row0 + r];
    return __builtin_convertvector(exact, F16) * (scales[p] * a.scales[row0 + r]);
  };
  finish_block(args, scaled, row0, rows, panel0, panels);
}
#else
typedef IntActivations Activations;

static Activations prepare_activations(const LinearArgs& args) {
  return is_integer(args.type) ? quantise_activations(args) : Activations{};
}

static void block_sums(const LinearArgs& args, const Activations& a, int row0, int rows, int panel0, int panels,
                       float* c) {
  switch (args.type) {
    case WeightType::kF32: return block_sums<float>(args, row0, rows, panel0, panels, c);
    case WeightType::kBf16: return block_sums<bf16>(args, row0, rows, panel0, panels, c);
    case WeightType::kInt8:
    case WeightType::kInt8Groups:
    case WeightType::kInt4:
    case WeightType::kInt4Zeros: return int_block_sums(args, a, row0, rows, panel0, panels, c);
  }
}

// c is [panel][c_rows][16], of which the first `rows` rows are wanted.
static void finish_block(const LinearArgs& args, const Activations&, int row0, int rows, int panel0, int panels,
                         const float* c, int c_rows) {
  const auto at = [&](int r, int p) __attribute__((always_inline)) { return c + (p * c_rows + r) * kPanel; };
  finish_block(args, at, row0, rows, panel0, panels);
}
#endif

// Rows that a block's sums are cut in.
DI_INLINE int row_unit([[maybe_unused]] const Activations& a) {
#ifdef DI_AMX
  if (a.tiled) return 16;
#endif
  return 1;
}

static void linear_block(const LinearArgs& args, const Activations& a, int row0, int rows, int panel0, int panels,
                         int thread) {
  auto* sums = static_cast<float*>(thread_scratch(thread, kBlockRows * kBlockPanels * kPanel * sizeof(float)));
  block_sums(args, a, row0, rows, panel0, panels, sums);
  finish_block(args, a, row0, rows, panel0, panels, sums, padded(rows, row_unit(a)));
}

// Enough groups for every thread to take several blocks of them (they run at different speeds), each a long stretch of
// memory.
DI_INLINE int panels_per_group(const LinearArgs& args, int row_blocks) {
  int wanted = (int)((int64_t)args.num_panels * row_blocks / (num_threads() * 8));
#ifdef DI_AVX512
  wanted += wanted % 2;  // products take panels in pairs
#endif
  return wanted < 1 ? 1 : wanted > kBlockPanels ? kBlockPanels : wanted;
}

static void linear(const LinearArgs& args) {
  const Activations a = prepare_activations(args);
  const int unit = row_unit(a), units = (args.rows + unit - 1) / unit;
  const int row_blocks = (args.rows + kBlockRows - 1) / kBlockRows;
  const int group = panels_per_group(args, row_blocks);
  const int groups = (args.num_panels + group - 1) / group;
  // Row blocks are the inner index: threads that run side by side share a group's weights in L3.
  parallel(row_blocks * groups, [&](int task, int thread) {
    const int block = task % row_blocks, panel0 = task / row_blocks * group;
    const int row0 = (int)((int64_t)units * block / row_blocks) * unit;
    const int row1 = (int)((int64_t)units * (block + 1) / row_blocks) * unit;
    const int rows = (row1 < args.rows ? row1 : args.rows) - row0;
    const int panels = args.num_panels - panel0 < group ? args.num_panels - panel0 : group;
    linear_block(args, a, row0, rows, panel0, panels, thread);
  });
}
