// Writes into the paged cache.

template <class T>
DI_INLINE void write_value(const float* src, T* dst, int n) {
  int d = 0;
  for (; d + 8 <= n; d += 8) store(dst + d, load(src + d));
  for (; d < n; ++d) store_one(dst + d, src[d]);
}

DI_INLINE void write_value(const float* src, int8_t* dst, int n) { quantise_row(src, dst, n); }

// cos and sin are of the token's position, or null.
template <class T>
DI_INLINE void write_key(const float* src, T* dst, const float* cos, const float* sin, int n) {
  cos ? rotate_head(src, dst, cos, sin, n / 2) : write_value(src, dst, n);
}

DI_INLINE void write_key(const float* src, int8_t* dst, const float* cos, const float* sin, int n) {
  float row[kMaxHeadDim];
  write_key(src, row, cos, sin, n);
  hadamard(row, n);
  quantise_row(row, dst, n);
}

template <class T>
DI_INLINE T* cache_row(void* base, const int64_t (&strides)[3], const WriteKvArgs& args, int token, int head) {
  const int64_t block = args.slots[token] / args.cache.block_size, slot = args.slots[token] % args.cache.block_size;
  return static_cast<T*>(base) + block * strides[0] + slot * strides[1] + head * strides[2];
}

template <class T>
static void write_token(const WriteKvArgs& args, int token) {
  const float* cos = args.cos ? args.cos + token * args.table_strides[0] : nullptr;
  const float* sin = args.sin ? args.sin + token * args.table_strides[1] : nullptr;
  const PagedCache& cache = args.cache;
  for (int h = 0; h < cache.kv_heads; ++h) {
    const float* k = args.k + token * args.k_strides[0] + h * args.k_strides[1];
    const float* v = args.v + token * args.v_strides[0] + h * args.v_strides[1];
    write_key(k, cache_row<T>(cache.k, cache.k_strides, args, token, h), cos, sin, cache.head_dim);
    write_value(v, cache_row<T>(cache.v, cache.v_strides, args, token, h), cache.head_dim);
  }
}

static void write_kv(const WriteKvArgs& args) {
  for_rows(args.tokens, (int64_t)args.cache.kv_heads * args.cache.head_dim * 2, [&](int token) {
    switch (args.cache.type) {
      case CacheType::kF32: return write_token<float>(args, token);
      case CacheType::kBf16: return write_token<bf16>(args, token);
      case CacheType::kInt8: return write_token<int8_t>(args, token);
    }
  });
}
