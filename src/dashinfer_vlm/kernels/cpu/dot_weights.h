// How weights of each type are multiplied on 512-bit vectors.

// 4 bytes at p in every lane.
DI_INLINE U16 splat_word(const char* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word - U16{};
}

// sum + the products of 4 unsigned with 4 signed bytes.
DI_INLINE I16 dot_bytes(I16 sum, U16 of_unsigned, U16 of_signed) {
  return (I16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)of_unsigned, (__m512i)of_signed);
}

// Scales or zeros of a panel's columns, from their row of its header.
DI_INLINE F16 of_columns(const char* row) {
  F8 first, second;
  load_pair(reinterpret_cast<const bf16*>(row), first, second);
  return join(first, second);
}

enum class Scaling { kAtEnd, kGroups, kBlocks };

// How weights of one type are multiplied. 64 bytes of weights are worked on in kParts parts; a part of a panel meets kBytes
// bytes of a row of activations. kRows rows by two panels fill the registers with sums.
struct BfloatWeights {
  static constexpr int kRows = 12;
  static constexpr Scaling kScaling = Scaling::kAtEnd;
  typedef F16 Sum;
#ifdef DI_AVX512_BF16
  static constexpr int kParts = 1;
  typedef U16 Weights, Factor;
  static DI_INLINE_MEMBER Weights unpack(U16 words, int) { return words; }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return splat_word(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, Factor x) {
    sum = (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
#else
  static constexpr int kParts = 2;  // even, then odd K
  typedef F16 Weights, Factor;
  static DI_INLINE_MEMBER Weights unpack(U16 words, int part) {
    return part == 0 ? (F16)(words << 16) : (F16)(words & 0xFFFF0000u);
  }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return (F16)splat_word(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, Factor x) { sum += w * x; }
#endif
  static constexpr int kBytes = 4;
};

struct ByteWeights {
  static constexpr int kRows = 12;
  static constexpr Scaling kScaling = Scaling::kAtEnd;
  static constexpr int kParts = 1;
  static constexpr int kBytes = 4;
  typedef I16 Sum;
  typedef U16 Weights, Factor;
  static DI_INLINE_MEMBER Weights unpack(U16 words, int) { return words; }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return splat_word(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, Factor x) { sum = dot_bytes(sum, w, x); }
};

// Products with the high and with the low bytes of activations.
struct TwoSums {
  I16 high, low;
  DI_INLINE_MEMBER void operator+=(const TwoSums& other) {
    high += other.high;
    low += other.low;
  }
};

// A word of high bytes, and one of low bytes.
struct TwoFactors {
  U16 high, low;
  static DI_INLINE_MEMBER TwoFactors at(const char* x) { return {splat_word(x), splat_word(x + 4)}; }
};

// 8-bit weights in groups; the offset is in the products of the high bytes only.
struct WideByteWeights {
  static constexpr int kRows = 6;
  static constexpr Scaling kScaling = Scaling::kGroups;
  static constexpr WeightType kType = WeightType::kInt8Groups;
  static constexpr int kParts = 1;
  static constexpr int kBytes = 8;
  static constexpr int kDepth = 4;  // of K per 64 bytes
  typedef TwoSums Sum;
  typedef TwoFactors Factor;
  struct Weights {
    U16 with_offset, without;
  };
  static DI_INLINE_MEMBER Weights unpack(U16 words, int) { return {words, words ^ 0x80808080u}; }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return TwoFactors::at(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, const Weights& w, Factor x) {
    sum.high = dot_bytes(sum.high, w.with_offset, x.high);
    sum.low = dot_bytes(sum.low, x.low, w.without);
  }
  static DI_INLINE_MEMBER Sum start(int32_t sum_of_high) { return {-128 * sum_of_high - I16{}, I16{}}; }
};

// 4-bit weights with an offset of 8, or of a zero for each group.
template <WeightType kOf>
struct NibbleWeights {
  static constexpr WeightType kType = kOf;
  static constexpr int kRows = 6;
  static constexpr Scaling kScaling = Scaling::kBlocks;
  static constexpr int kParts = 2;
  static constexpr int kBytes = 4;
  static constexpr int kDepth = 8;
  typedef I16 Sum;
  typedef U16 Weights, Factor;
  static DI_INLINE_MEMBER Weights unpack(U16 words, int part) { return (words >> (4 * part)) & 0x0F0F0F0Fu; }
  static DI_INLINE_MEMBER Factor factor(const char* x) { return splat_word(x); }
  static DI_INLINE_MEMBER void add(Sum& sum, Weights w, Factor x) { sum = dot_bytes(sum, w, x); }
};

DI_INLINE const char* header_of_group(WeightType type, const char* panel, int g) { return panel + g * group_header(type); }

DI_INLINE F16 column_zeros(WeightType type, const char* header) {
  return type == WeightType::kInt4Zeros ? of_columns(header + 32) : 8.f - F16{};
}
