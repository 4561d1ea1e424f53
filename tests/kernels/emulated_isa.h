// Included before everything else in the emulated build (see CMakeLists.txt): functions take the place of those
// instructions that the AVX-512 and AMX kernels name, so that the very same sources run on any x86 processor with AVX2.
// Written from the pseudo-code of Intel's Software Developer's Manual, volume 2. Unlike the processor, a wrong use
// (unconfigured tiles, shapes that do not fit) ends the process.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated instruction: %s\n", what);
  std::abort();
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// bf16 arithmetic treats denormal numbers as zeros and returns zeros for them.
inline float flushed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7F800000u) == 0 ? float_of(bits & 0x80000000u) : value;
}

inline float of_bf16(uint16_t bits) { return flushed(float_of(static_cast<uint32_t>(bits) << 16)); }

// One fused multiply-add, rounded to nearest even.
inline float fma_bf16(uint16_t a, uint16_t b, float sum) {
  return flushed(__builtin_fmaf(of_bf16(a), of_bf16(b), flushed(sum)));
}

// VDPBF16PS: the odd element of each pair first.
inline __m512 dpbf16_ps(__m512 sums, __m512bh a_pairs, __m512bh b_pairs) {
  float sum[16];
  uint16_t a[32], b[32];
  std::memcpy(sum, &sums, sizeof sum);
  std::memcpy(a, &a_pairs, sizeof a);
  std::memcpy(b, &b_pairs, sizeof b);
  for (int i = 0; i < 16; ++i) {
    sum[i] = fma_bf16(a[2 * i + 1], b[2 * i + 1], sum[i]);
    sum[i] = fma_bf16(a[2 * i], b[2 * i], sum[i]);
  }
  std::memcpy(&sums, sum, sizeof sum);
  return sums;
}

// VPDPBUSD: unsigned bytes of the first factor, signed bytes of the second; wraps.
inline __m512i dpbusd_epi32(__m512i sums, __m512i of_unsigned, __m512i of_signed) {
  uint32_t sum[16];
  uint8_t a[64];
  int8_t b[64];
  std::memcpy(sum, &sums, sizeof sum);
  std::memcpy(a, &of_unsigned, sizeof a);
  std::memcpy(b, &of_signed, sizeof b);
  for (int i = 0; i < 64; ++i) sum[i / 4] += static_cast<uint32_t>(static_cast<int>(a[i]) * b[i]);
  std::memcpy(&sums, sum, sizeof sum);
  return sums;
}

// VPERMPS: the lowest four bits of each index choose; zero where the mask is.
inline __m512 maskz_permutexvar_ps(uint16_t mask, __m512i indices, __m512 values) {
  uint32_t index[16];
  float value[16], chosen[16];
  std::memcpy(index, &indices, sizeof index);
  std::memcpy(value, &values, sizeof value);
  for (int i = 0; i < 16; ++i) chosen[i] = mask >> i & 1 ? value[index[i] % 16] : 0.f;
  std::memcpy(&values, chosen, sizeof chosen);
  return values;
}

struct Tile {
  uint8_t row[16][64];
};

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline thread_local TileConfig config{};
inline thread_local Tile tiles[8];

inline void storeconfig(void* to) { std::memcpy(to, &config, sizeof config); }

inline void release() {
  config = {};
  std::memset(tiles, 0, sizeof tiles);
}

inline void loadconfig(const void* from) {
  release();
  std::memcpy(&config, from, sizeof config);
  if (config.palette == 0) return release();
  require(config.palette == 1 && config.start_row == 0, "palette 1 from row 0");
  for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes of the configuration are zero");
  for (int t = 0; t < 16; ++t) {
    require(config.rows[t] <= 16 && config.row_bytes[t] <= 64, "at most 16 rows of 64 bytes");
    require(t < 8 || (config.rows[t] == 0 && config.row_bytes[t] == 0), "eight tiles");
    require((config.rows[t] == 0) == (config.row_bytes[t] == 0), "rows and bytes are both zero or neither");
  }
}

inline int rows_of(int t) {
  require(config.palette == 1 && t < 8 && config.rows[t] > 0, "the tile is configured");
  return config.rows[t];
}

inline void zero(int t) {
  rows_of(t);
  tiles[t] = {};
}

inline void loadd(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < rows_of(t); ++r)
    std::memcpy(tiles[t].row[r], static_cast<const uint8_t*>(from) + r * stride, config.row_bytes[t]);
}

inline void stored(int t, void* to, int64_t stride) {
  for (int r = 0; r < rows_of(t); ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, tiles[t].row[r], config.row_bytes[t]);
}

inline void require_shapes(int c, int a, int b) {
  require(a != b && a != c && b != c, "three different tiles");
  require(rows_of(c) == rows_of(a) && config.row_bytes[c] == config.row_bytes[b] &&
              config.row_bytes[a] == rows_of(b) * 4,
          "shapes of the tiles fit");
}

template <class T>
T element(int t, int row, int index) {
  T value;
  std::memcpy(&value, tiles[t].row[row] + index * sizeof(T), sizeof value);
  return value;
}

// TDPBSUD: signed bytes of a, unsigned bytes of b; wraps.
inline void dpbsud(int c, int a, int b) {
  require_shapes(c, a, b);
  for (int m = 0; m < rows_of(c); ++m)
    for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
      auto sum = element<uint32_t>(c, m, n);
      for (int k = 0; k < config.row_bytes[a] / 4; ++k)
        for (int i = 0; i < 4; ++i)
          sum += static_cast<uint32_t>(static_cast<int>(element<int8_t>(a, m, 4 * k + i)) *
                                       element<uint8_t>(b, k, 4 * n + i));
      std::memcpy(tiles[c].row[m] + n * 4, &sum, sizeof sum);
    }
}

// TDPBF16PS: even and odd elements are summed apart, then together, then added.
inline void dpbf16ps(int c, int a, int b) {
  require_shapes(c, a, b);
  for (int m = 0; m < rows_of(c); ++m)
    for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
      float even = 0.f, odd = 0.f;
      for (int k = 0; k < config.row_bytes[a] / 4; ++k) {
        even = fma_bf16(element<uint16_t>(a, m, 2 * k), element<uint16_t>(b, k, 2 * n), even);
        odd = fma_bf16(element<uint16_t>(a, m, 2 * k + 1), element<uint16_t>(b, k, 2 * n + 1), odd);
      }
      const float sum = flushed(flushed(element<float>(c, m, n)) + flushed(even + odd));
      std::memcpy(tiles[c].row[m] + n * 4, &sum, sizeof sum);
    }
}

}  // namespace emulated

#undef _tile_storeconfig
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm512_maskz_permutexvar_ps emulated::maskz_permutexvar_ps
#define _tile_storeconfig emulated::storeconfig
#define _tile_loadconfig emulated::loadconfig
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::loadd
#define _tile_stored emulated::stored
#define _tile_dpbsud emulated::dpbsud
#define _tile_dpbf16ps emulated::dpbf16ps
