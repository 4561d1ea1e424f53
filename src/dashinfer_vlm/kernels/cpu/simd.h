// Eight float lanes on GCC/Clang vector extensions. The same source compiles to AVX2, SSE2 or NEON, so every ISA level
// runs one algorithm. Included inside an ISA namespace (see isa.inc): no symbol here may be shared between levels,
// or the linker could hand AVX2 code to a machine that lacks it.
#ifndef DI_ISA
#error "include simd.h from an ISA translation unit only"
#endif

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

#define DI_INLINE_MEMBER inline __attribute__((always_inline))
#define DI_INLINE static DI_INLINE_MEMBER

#if defined(__clang__) || __GNUC__ >= 12
#define DI_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DI_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I8{__VA_ARGS__})
#endif

constexpr int kLanes = 8;

#ifdef DI_AVX512  // whole rows of a panel, where 512-bit registers hold them
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

template <class V>
DI_INLINE V load_row(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
DI_INLINE void store_row(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

DI_INLINE F16 join(F8 first, F8 second) {
  return __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

DI_INLINE F8 lower(F16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
DI_INLINE F8 upper(F16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
#endif

DI_INLINE F8 splat(float x) { return F8{x, x, x, x, x, x, x, x}; }

DI_INLINE F8 load(const float* p) {
  F8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

DI_INLINE F8 load(const bf16* p) {
#ifdef __AVX2__  // GCC 12 turns the general form into five instructions
  return (F8)(U8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  H8 h;
  __builtin_memcpy(&h, p, sizeof h);
  return (F8)(__builtin_convertvector(h, U8) << 16);
#endif
}

DI_INLINE F8 load(const int8_t* p) {
#ifdef __AVX2__
  return (F8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t B8 __attribute__((vector_size(8)));
  B8 b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, F8);
#endif
}

// Sixteen weights of a packed panel's row: columns i and i + 8 share a word, so that one load and two cheap
// operations give both vectors, without a shuffle.
DI_INLINE void load_pair(const bf16* p, F8& first, F8& second) {
  U8 words;
  __builtin_memcpy(&words, p, sizeof words);
  first = (F8)(words << 16);
  second = (F8)(words & 0xFFFF0000u);
}

DI_INLINE void load_pair(const float* p, F8& first, F8& second) {
  first = load(p);
  second = load(p + 8);
}

DI_INLINE void store(float* p, F8 v) { __builtin_memcpy(p, &v, sizeof v); }

// Round to nearest even; a NaN keeps its sign and stays a NaN. With bf16 instructions denormal numbers become zero.
DI_INLINE void store(bf16* p, F8 v) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  const __m128bh b = _mm256_cvtneps_pbh((__m256)v);
  __builtin_memcpy(p, &b, sizeof b);
#else
  U8 u = (U8)v;
  U8 rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  U8 nan = (u >> 16) | 0x40u;
  U8 r = v == v ? rounded : nan;
#ifdef __AVX2__
  const __m256i packed = _mm256_packus_epi32((__m256i)r, (__m256i)r);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  H8 h = __builtin_convertvector(r, H8);
  __builtin_memcpy(p, &h, sizeof h);
#endif
#endif
}

#ifdef DI_AVX512
DI_INLINE void store(bf16* p, F16 v) {
#ifdef __AVX512BF16__
  const __m256bh b = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &b, sizeof b);
#else
  store(p, lower(v));
  store(p + 8, upper(v));
#endif
}
#endif

DI_INLINE float to_float(float x) { return x; }
DI_INLINE float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

DI_INLINE void store_one(float* p, float x) { *p = x; }
DI_INLINE void store_one(bf16* p, float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  p->bits = x == x ? (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16) : (uint16_t)((u >> 16) | 0x40u);
}

DI_INLINE F8 max(F8 a, F8 b) { return a > b ? a : b; }
DI_INLINE F8 min(F8 a, F8 b) { return a < b ? a : b; }

DI_INLINE float sum(F8 v) {
  v += DI_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += DI_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}

DI_INLINE float max_lane(F8 v) {
  v = max(v, DI_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = max(v, DI_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  return v[0] > v[1] ? v[0] : v[1];
}

// In-place transpose of an 8 x 8 block.
DI_INLINE void transpose(F8 v[8]) {
  F8 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = DI_SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = DI_SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = DI_SHUFFLE(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = DI_SHUFFLE(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = DI_SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = DI_SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// First n lanes from memory, the rest zero; for tails, where a full load would leave the buffer.
template <class T>
DI_INLINE F8 load_first(const T* p, int n) {
  F8 v = splat(0.f);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}

template <class T>
DI_INLINE void store_first(T* p, F8 v, int n) {
  for (int i = 0; i < n; ++i) store_one(p + i, v[i]);
}

// exp with a relative error below 2e-7: Cody-Waite reduction by ln 2 and a degree-6 polynomial (Cephes expf).
// Arguments below -87 give exactly 0, above 88 they are clamped.
DI_INLINE F8 exp(F8 x) {
  F8 clamped = min(max(x, splat(-87.f)), splat(88.f));
  F8 scaled = clamped * splat(1.44269504088896341f);
  const F8 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  F8 shifted = scaled + magic;
  F8 n = shifted - magic;
  F8 r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  F8 p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.f);
  I8 exponent = ((I8)shifted - (I8)magic + 127) << 23;
  F8 e = p * (F8)exponent;
  return x < splat(-87.f) ? splat(0.f) : e;
}

DI_INLINE F8 sigmoid(F8 x) { return splat(1.f) / (splat(1.f) + exp(-x)); }

DI_INLINE F8 silu(F8 x) { return x * sigmoid(x); }

DI_INLINE F8 quick_gelu(F8 x) { return x * sigmoid(splat(1.702f) * x); }

// (1 + tanh u) / 2 is the sigmoid of 2 u.
DI_INLINE F8 gelu_tanh(F8 x) {
  return x * sigmoid(splat(1.5957691216057308f) * (x + splat(0.044715f) * x * x * x));
}

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
DI_INLINE F8 erf(F8 x) {
  F8 a = x < splat(0.f) ? -x : x;
  F8 t = splat(1.f) / (splat(1.f) + splat(0.3275911f) * a);
  F8 p = splat(1.061405429f);
  p = p * t - splat(1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t - splat(0.284496736f);
  p = p * t + splat(0.254829592f);
  F8 y = splat(1.f) - p * t * exp(-a * a);
  return x < splat(0.f) ? -y : y;
}

DI_INLINE F8 gelu(F8 x) { return splat(0.5f) * x * (splat(1.f) + erf(x * splat(0.70710678118654752f))); }
