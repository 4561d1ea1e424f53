// Row-wise kernels: norms and rotary positions.

static void rms_norm_row(const NormArgs& args, int row) {
  const float* x = args.x + row * args.x_stride;
  float* out = args.out + row * args.out_stride;
  F8 squares = splat(0.f);
  for_columns(args.width, [&](int c, int n) {
    const F8 v = load_lanes(x + c, n);
    squares += v * v;
  });
  const F8 scale = splat(1.f / sqrtf(sum(squares) / args.width + args.eps));
  for_columns(args.width, [&](int c, int n) {
    store_lanes(out + c, load_lanes(x + c, n) * scale * load_lanes(args.weight + c, n), n);
  });
}

static void layer_norm_row(const NormArgs& args, int row) {
  const float* x = args.x + row * args.x_stride;
  float* out = args.out + row * args.out_stride;
  F8 total = splat(0.f), squares = splat(0.f);
  for_columns(args.width, [&](int c, int n) { total += load_lanes(x + c, n); });
  const F8 mean = splat(sum(total) / args.width);
  for_columns(args.width, [&](int c, int n) {
    F8 v = load_lanes(x + c, n) - mean;
    if (n < 8) DI_UNROLL for (int i = 0; i < 8; ++i) v[i] = i < n ? v[i] : 0.f;
    squares += v * v;
  });
  const F8 scale = splat(1.f / sqrtf(sum(squares) / args.width + args.eps));
  for_columns(args.width, [&](int c, int n) {
    const F8 v = (load_lanes(x + c, n) - mean) * scale;
    store_lanes(out + c, v * load_lanes(args.weight + c, n) + load_lanes(args.bias + c, n), n);
  });
}

static void norm(const NormArgs& args) {
  for_rows(args.rows, args.width, [&](int row) { args.bias ? layer_norm_row(args, row) : rms_norm_row(args, row); });
}

// Rotates one head: channel i with channel i + half. dst may be src.
template <class T>
DI_INLINE void rotate_head(const float* src, T* dst, const float* cos, const float* sin, int half) {
  for_columns(half, [&](int c, int n) {
    const F8 low = load_lanes(src + c, n), high = load_lanes(src + half + c, n);
    const F8 cosine = load_lanes(cos + c, n), sine = load_lanes(sin + c, n);
    const F8 new_low = low * cosine - high * sine, new_high = high * cosine + low * sine;
    if (n == 8) {
      store(dst + c, new_low);
      store(dst + half + c, new_high);
    } else {
      store_first(dst + c, new_low, n);
      store_first(dst + half + c, new_high, n);
    }
  });
}

static void rope(const RopeArgs& args) {
  const int half = args.head_dim / 2;
  for_rows(args.tokens, (int64_t)args.heads * args.head_dim, [&](int token) {
    for (int h = 0; h < args.heads; ++h) {
      float* x = args.x + token * args.x_strides[0] + h * args.x_strides[1];
      rotate_head(x, x, args.cos + token * args.table_strides[0], args.sin + token * args.table_strides[1], half);
    }
  });
}
