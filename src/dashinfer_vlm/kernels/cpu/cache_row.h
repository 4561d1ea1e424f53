// Rows of 8-bit numbers in the paged cache: head_dim of them, then the float that they are multiples of. Keys are stored
// after a Walsh-Hadamard transform, and queries take the same one when they are read: their products stay the same,
// while the few channels that a bias makes a hundred times larger than the others (as in Qwen2's keys) are spread over
// all of them and no longer decide how coarsely each is rounded (QuaRot, Ashkboos et al. 2024).

constexpr float kSmallestTop = 1e-30f;  // rows with no larger number are zero: 127 / top must stay finite

// Channels that one transform mixes; 1 is none. Transforming both factors multiplies their product by this.
DI_INLINE int hadamard_size(int dim) { return dim % 8 == 0 ? dim & -dim : 1; }

// In place on every hadamard_size(dim) numbers, not normalised.
DI_INLINE void hadamard(float* x, int dim) {
  const int size = hadamard_size(dim);
  if (size == 1) return;
  for (int d = 0; d < dim; d += 8) {
    F8 v = load(x + d);
    v = DI_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3) + v * F8{1, 1, 1, 1, -1, -1, -1, -1};
    v = DI_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5) + v * F8{1, 1, -1, -1, 1, 1, -1, -1};
    v = DI_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6) + v * F8{1, -1, 1, -1, 1, -1, 1, -1};
    store(x + d, v);
  }
  for (int half = 8; half < size; half *= 2)
    for (int first = 0; first < dim; first += 2 * half)
      for (int d = first; d < first + half; d += 8) {
        const F8 a = load(x + d), b = load(x + d + half);
        store(x + d, a + b);
        store(x + d + half, a - b);
      }
}

// Lanes from -128 to 127 as bytes.
DI_INLINE void store_bytes(int8_t* p, I8 v) {
#ifdef __AVX2__
  const __m256i x = (__m256i)v;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
#else
  typedef int8_t B8 __attribute__((vector_size(8)));
  const B8 bytes = __builtin_convertvector(v, B8);
  __builtin_memcpy(p, &bytes, sizeof bytes);
#endif
}

// A NaN or an infinity makes the scale one, so that it is not lost.
DI_INLINE void quantise_row(const float* x, int8_t* dst, int n) {
  I8 top = {};
  for_columns(n, [&](int c, int lanes) { top = max(top, magnitudes<I8>(load_lanes(x + c, lanes))); });
  const float largest = largest_of(top);
  const F8 inverse = splat(largest > kSmallestTop ? 127.f / largest : 0.f);
  for_columns(n, [&](int c, int lanes) {
    const F8 magic = splat(12582912.f);  // adding 1.5 * 2^23 rounds to nearest
    const I8 v = (I8)(load_lanes(x + c, lanes) * inverse + magic) - (I8)magic;
    if (lanes == 8) return store_bytes(dst + c, v);
    for (int i = 0; i < lanes; ++i) dst[c + i] = (int8_t)v[i];
  });
  const float scale = largest / 127.f;
  __builtin_memcpy(dst + n, &scale, kScaleBytes);
}

DI_INLINE float row_scale(const int8_t* row, int head_dim) {
  float scale;
  __builtin_memcpy(&scale, row + head_dim, kScaleBytes);
  return scale;
}

// Numbers d to d + n <= d + 8 of a row of any type; the other lanes are zero.
template <class T>
DI_INLINE F8 load_row(const T* row, int d, int n, int) {
  return n == 8 ? load(row + d) : load_first(row + d, n);
}

DI_INLINE F8 load_row(const int8_t* row, int d, int n, int head_dim) {
  return (n == 8 ? load(row + d) : load_first(row + d, n)) * splat(row_scale(row, head_dim));
}
