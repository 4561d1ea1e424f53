// Patches of bytes through float weights. They are widened a few rows at a time into a buffer that stays in the caches:
// a tile of the product reads every number once per panel, too often to widen it there.

constexpr int kPatchRows = 2 * kBlockRows;

DI_INLINE F8 load_bytes(const uint8_t* p) {
#ifdef __AVX2__
  return (F8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, F8);
#endif
}

DI_INLINE void widen(const uint8_t* bytes, float* out, int n) {
  int k = 0;
  for (; k + 8 <= n; k += 8) store(out + k, load_bytes(bytes + k));
  for (; k < n; ++k) out[k] = (float)bytes[k];
}

static void embed_patches(const PatchArgs& args) {
  LinearArgs piece = args.linear;
  float* wide = static_cast<float*>(shared_scratch((size_t)kPatchRows * piece.depth * sizeof(float), 1));
  piece.x = wide;
  piece.x_stride = piece.depth;
  for (int first = 0; first < args.linear.rows; first += kPatchRows) {
    piece.rows = args.linear.rows - first < kPatchRows ? args.linear.rows - first : kPatchRows;
    piece.out = args.linear.out + first * piece.out_stride;
    const uint8_t* patches = args.patches + first * args.patch_stride;
    for_rows(piece.rows, piece.depth, [&](int row) {
      widen(patches + row * args.patch_stride, wide + (int64_t)row * piece.depth, piece.depth);
    });
    linear(piece);
  }
}
