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

#ifdef DI_AVX512  // whole rows of a panel, where 512-bit registers hold them
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

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

template <class F>
DI_INLINE F max(F a, F b) {
#ifdef __AVX512F__  // GCC 12 makes a comparison and a move under its mask
  if constexpr (sizeof(F) == 64) return (F)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

template <class F>
DI_INLINE F min(F a, F b) {
#ifdef __AVX512F__
  if constexpr (sizeof(F) == 64) return (F)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#endif
  return a < b ? a : b;
}

// Of floats or integers.
template <class V>
DI_INLINE auto sum(V v) {
  v += DI_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += DI_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}

// Of floats or integers.
template <class V>
DI_INLINE auto max_lane(V v) {
  v = max(v, DI_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = max(v, DI_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  return v[0] > v[1] ? v[0] : v[1];
}

// Bits of |v|. They are in the order of the magnitudes, and those of a NaN are above all others.
template <class I, class F>
DI_INLINE I magnitudes(F v) {
  return (I)v & 0x7FFFFFFF;
}

// The largest of eight magnitudes.
DI_INLINE float largest_of(I8 magnitudes) {
  const int32_t bits = max_lane(magnitudes);
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof largest);
  return largest;
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

// exp of an argument between -87 and 87, to which others are clamped, with a relative error below 2e-7: Cody-Waite reduction
// by ln 2 and a degree-6 polynomial (Cephes expf).
template <class F>
DI_INLINE F exp_clamped(F x) {
  typedef decltype(x < x) I;
  const F magic = 12582912.f - F{};  // 1.5 * 2^23: adding it rounds to an integer
  x = min(max(x, -87.f - F{}), 87.f - F{});
  const F shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  F r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return (F)((I)p + ((I)shifted << 23));  // the integer's low bits are added to the exponent
}

// The same, exactly 0 below -87.
template <class F>
DI_INLINE F exp(F x) {
  return x < -87.f ? F{} : exp_clamped(x);
}

// 1 / (1 + e^87) is still a normal number: what is below costs some processors a hundred cycles.
template <class F>
DI_INLINE F sigmoid(F x) {
  return 1.f / (1.f + exp_clamped(-x));
}

template <class F>
DI_INLINE F silu(F x) {
  return x * sigmoid(x);
}

template <class F>
DI_INLINE F quick_gelu(F x) {
  return x * sigmoid(1.702f * x);
}

// (1 + tanh u) / 2 is the sigmoid of 2 u.
template <class F>
DI_INLINE F gelu_tanh(F x) {
  return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
template <class F>
DI_INLINE F erf(F x) {
  const F a = x < F{} ? -x : x;
  const F t = 1.f / (1.f + 0.3275911f * a);
  F p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const F y = 1.f - p * t * exp(-a * a);
  return x < F{} ? -y : y;
}

template <class F>
DI_INLINE F gelu(F x) {
  return 0.5f * x * (1.f + erf(x * 0.70710678118654752f));
}
