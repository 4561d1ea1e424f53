#include "packed_weight.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;

namespace di {
namespace {

std::int64_t padded(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// K with what a panel adds to it.
std::int64_t padded_depth(const PackedWeight& w) {
  if (w.type == WeightType::kF32) return w.depth;
  if (w.type == WeightType::kBf16) return padded(w.depth, w.layout == Layout::kDots ? 32 : 1);
  return padded(w.depth, w.layout == Layout::kPairs ? 4 : w.group ? w.group : 64);
}

// Row of the weight that column j of the panel comes from, or -1 for padding.
std::int64_t source_row(const PackedWeight& w, int panel, int j) {
  if (!w.gate_up) {
    const std::int64_t row = static_cast<std::int64_t>(panel) * kPanel + j;
    return row < w.rows ? row : -1;
  }
  const std::int64_t half = w.rows / 2, row = static_cast<std::int64_t>(panel) * 8 + j % 8;
  return row < half ? row + (j < 8 ? 0 : half) : -1;
}

float to_float(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

std::uint16_t to_bf16(float value) {
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if (value != value) return static_cast<std::uint16_t>(word >> 16 | 0x40u);  // rounding could carry it to a zero
  return static_cast<std::uint16_t>((word + 0x7FFFu + ((word >> 16) & 1u)) >> 16);
}

// Place of column j in a row of 16 bf16 (see kernels.h).
constexpr int paired(int j) { return j % 8 * 2 + j / 8; }

template <class T>
struct Rows {
  const T* start[kPanel];  // null for padding
  std::int64_t stride;
};

template <class T>
Rows<T> rows_of(const PackedWeight& w, const TensorView& weight, int panel) {
  Rows<T> rows{{}, weight.strides[1]};
  for (int j = 0; j < kPanel; ++j) {
    const std::int64_t source = source_row(w, panel, j);
    if (source >= 0) rows.start[j] = weight.as<const T>() + source * weight.strides[0];
  }
  return rows;
}

template <class T, Layout kLayout>
constexpr std::int64_t place(std::int64_t k, int j) {
  if (sizeof(T) == sizeof(float)) return k * kPanel + j;
  return kLayout == Layout::kPairs ? k * kPanel + paired(j) : (k / 2 * kPanel + j) * 2 + k % 2;
}

// From 16 streams into one, where the panel is full. It is zero-filled already, so padding is left alone.
template <Layout kLayout, class T>
void pack_rows(const PackedWeight& w, const Rows<T>& rows, T* panel) {
  if (std::find(rows.start, rows.start + kPanel, nullptr) == rows.start + kPanel) {
    for (std::int64_t k = 0; k < w.depth; ++k)
      for (int j = 0; j < kPanel; ++j) panel[place<T, kLayout>(k, j)] = rows.start[j][k * rows.stride];
    return;
  }
  for (int j = 0; j < kPanel; ++j)
    for (std::int64_t k = 0; rows.start[j] && k < w.depth; ++k)
      panel[place<T, kLayout>(k, j)] = rows.start[j][k * rows.stride];
}

float as_float(float value) { return value; }
float as_float(std::uint16_t bits) { return to_float(bits); }

template <class T>
void widen(const T* row, std::int64_t stride, std::int64_t n, float* out) {
  if (stride == 1)
    for (std::int64_t k = 0; k < n; ++k) out[k] = as_float(row[k]);
  else
    for (std::int64_t k = 0; k < n; ++k) out[k] = as_float(row[k * stride]);
}

// Index of the element of largest magnitude, the first of equals. A NaN is larger than all numbers.
std::int64_t largest(const float* x, std::int64_t n) {
  std::int32_t top = 0;
  for (std::int64_t k = 0; k < n; ++k) {
    const std::int32_t magnitude = std::bit_cast<std::int32_t>(x[k]) & 0x7FFFFFFF;
    top = magnitude > top ? magnitude : top;
  }
  std::int64_t k = 0;
  while ((std::bit_cast<std::int32_t>(x[k]) & 0x7FFFFFFF) != top) ++k;
  return k;
}

// q = round(x / scale) + offset within 0 .. 2 * offset - 1, and not below `least`.
void round_all(const float* x, std::int64_t n, float scale, int offset, int least, std::uint8_t* q) {
  const float inverse = scale != 0.f ? 1.f / scale : 0.f, magic = 12582912.f;  // adding 1.5 * 2^23 rounds to nearest
  for (std::int64_t k = 0; k < n; ++k) {
    int v = std::bit_cast<std::int32_t>(x[k] * inverse + magic) - std::bit_cast<std::int32_t>(magic) + offset;
    v = v < least ? least : v;
    q[k] = static_cast<std::uint8_t>(v > 2 * offset - 1 ? 2 * offset - 1 : v);
  }
}

// Rounds n columns of a row; returns the scale's bits.
std::uint16_t round_group(const PackedWeight& w, const float* x, std::int64_t n, std::uint8_t* q) {
  const float top = x[largest(x, n)];
  const bool is_int4 = has_nibbles(w.type);
  std::uint16_t scale = to_bf16(is_int4 ? top / -8.f : std::fabs(top) / 127.f);
  if (std::fabs(to_float(scale)) < FLT_MIN) scale = 0;  // its inverse may not be finite; such weights are nothing
  round_all(x, n, to_float(scale), is_int4 ? 8 : 128, is_int4 ? 0 : 1, q);
  return scale;
}

// One group of rounded numbers q[16][stride] to the order of the panel.
void interleave8(const std::uint8_t* q, std::int64_t stride, std::int64_t depth, std::uint8_t* out) {
  for (std::int64_t k = 0; k < depth; k += 2, out += 32)
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 2; ++i) {
        out[(j * 2 + i) * 2] = q[j * stride + k + i];
        out[(j * 2 + i) * 2 + 1] = q[(j + 8) * stride + k + i];
      }
}

void interleave4(const std::uint8_t* q, std::int64_t stride, std::int64_t depth, std::uint8_t* out) {
  for (std::int64_t k = 0; k < depth; k += 4, out += 32)
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 4; ++i)
        out[(j * 2 + i % 2) * 2 + i / 2] =
            static_cast<std::uint8_t>(q[j * stride + k + i] | q[(j + 8) * stride + k + i] << 4);
}

void interleave8_dots(const std::uint8_t* q, std::int64_t stride, std::int64_t depth, std::uint8_t* out) {
  for (std::int64_t k = 0; k < depth; k += 4)
    for (int j = 0; j < kPanel; ++j, out += 4) std::memcpy(out, q + j * stride + k, 4);
}

void interleave4_dots(const std::uint8_t* q, std::int64_t stride, std::int64_t depth, std::uint8_t* out) {
  for (std::int64_t k = 0; k < depth; k += 8)
    for (int j = 0; j < kPanel; ++j)
      for (int i = 0; i < 4; ++i, ++out)
        *out = static_cast<std::uint8_t>(q[j * stride + k + i] | q[j * stride + k + 4 + i] << 4);
}

// Bytes from the panel's start to the scales and to the numbers of group g.
struct GroupPlaces {
  std::int64_t scales, numbers;
};

GroupPlaces places_of(const PackedWeight& w, std::int64_t g) {
  const std::int64_t bytes = w.group * kPanel / (has_nibbles(w.type) ? 2 : 1), header = group_header(w.type);
  if (w.layout == Layout::kDots) return {g * header, w.header_bytes() + g * bytes};
  return {g * (header + bytes), g * (header + bytes) + header};
}

// All groups of numbers q[16][padded_depth].
void interleave_groups(const PackedWeight& w, const std::uint8_t* q, std::uint8_t* panel) {
  const std::int64_t stride = padded_depth(w), group = w.group ? w.group : stride;
  const bool is_int4 = has_nibbles(w.type);
  const auto interleave = w.layout == Layout::kDots ? (is_int4 ? interleave4_dots : interleave8_dots)
                                                    : (is_int4 ? interleave4 : interleave8);
  for (std::int64_t k = 0, g = 0; k < stride; k += group, ++g)
    interleave(q + k, stride, std::min(group, stride - k), panel + places_of(w, g).numbers);
}

template <class T>
void pack_integers(const PackedWeight& w, const Rows<T>& rows, std::uint8_t* panel, int thread) {
  const std::int64_t stride = padded_depth(w), group = w.group ? w.group : stride;
  const std::size_t numbers = static_cast<std::size_t>(kPanel * stride);
  auto* q = static_cast<std::uint8_t*>(thread_scratch(thread, numbers + w.depth * sizeof(float) + 64));
  auto* wide = reinterpret_cast<float*>(q + (numbers + 63) / 64 * 64);
  std::memset(q, 0, numbers);
  for (int j = 0; j < kPanel; ++j) {
    if (!rows.start[j]) continue;
    widen(rows.start[j], rows.stride, w.depth, wide);
    for (std::int64_t k = 0, g = 0; k < w.depth; k += group, ++g) {
      const std::int64_t n = std::min(group, w.depth - k);
      const std::uint16_t scale = round_group(w, wide + k, n, q + j * stride + k);
      std::memcpy(panel + places_of(w, g).scales + paired(j) * 2, &scale, sizeof scale);
    }
  }
  interleave_groups(w, q, panel);
}

template <class T>
void pack_panel(const PackedWeight& w, const TensorView& weight, int panel, int thread) {
  auto* dst = static_cast<std::uint8_t*>(w.panels.data) + panel * w.panel_bytes();
  const Rows<T> rows = rows_of<T>(w, weight, panel);
  if (is_integer(w.type)) return pack_integers(w, rows, dst, thread);
  (w.layout == Layout::kDots ? pack_rows<Layout::kDots, T> : pack_rows<Layout::kPairs, T>)(w, rows,
                                                                                         reinterpret_cast<T*>(dst));
}

// 4-bit numbers as they are, with their scales and zeros.
struct StoredNibbles {
  const TensorView& numbers;  // u8 [N, K]
  const TensorView& scales;   // f32 [N, groups]
  const TensorView* zeros;    // u8 [N, groups], or null: 8
};

void pack_stored(const PackedWeight& w, const StoredNibbles& from, int panel, int thread) {
  auto* dst = static_cast<std::uint8_t*>(w.panels.data) + panel * w.panel_bytes();
  const std::int64_t stride = padded_depth(w);
  auto* q = static_cast<std::uint8_t*>(thread_scratch(thread, static_cast<std::size_t>(kPanel * stride)));
  std::memset(q, 0, static_cast<std::size_t>(kPanel * stride));
  for (int j = 0; j < kPanel; ++j) {
    const std::int64_t row = source_row(w, panel, j);
    if (row < 0) continue;
    std::memcpy(q + j * stride, from.numbers.as<const std::uint8_t>() + row * from.numbers.strides[0], w.depth);
    for (std::int64_t g = 0; g * w.group < w.depth; ++g) {
      std::uint8_t* header = dst + places_of(w, g).scales + paired(j) * 2;
      const std::uint16_t scale = to_bf16(from.scales.as<const float>()[row * from.scales.strides[0] + g]);
      std::memcpy(header, &scale, sizeof scale);
      if (!from.zeros) continue;
      const std::uint16_t zero = to_bf16(from.zeros->as<const std::uint8_t>()[row * from.zeros->strides[0] + g]);
      std::memcpy(header + 32, &zero, sizeof zero);
    }
  }
  interleave_groups(w, q, dst);
}

PackedWeight pack(const TensorView& weight, bool gate_up, WeightType type, int group) {
  PackedWeight w = empty_weight({type, weight.shape[0], weight.shape[1], group, gate_up}, weight.name);
  struct Context {
    const PackedWeight& w;
    const TensorView& weight;
  } context{w, weight};
  // The threads that will read the panels also touch them first.
  run_tasks(
      w.num_panels,
      [](void* c, int panel, int thread) {
        const auto& [packed, source] = *static_cast<Context*>(c);
        (source.dtype == DType::kBf16 ? pack_panel<std::uint16_t> : pack_panel<float>)(packed, source, panel, thread);
      },
      &context);
  return w;
}

}  // namespace

const char* packing() { return kernels().layout == Layout::kDots ? "dots of 64 bytes, 2" : "panels of 16, 2"; }

std::int64_t PackedWeight::header_bytes() const {
  if (type == WeightType::kInt8) return 64;
  return group > 0 ? padded((depth + group - 1) / group * group_header(type), 64) : 0;
}

std::int64_t PackedWeight::panel_bytes() const {
  const std::int64_t numbers = padded_depth(*this) * kPanel;
  if (type == WeightType::kF32) return numbers * 4;
  if (type == WeightType::kBf16) return numbers * 2;
  const std::int64_t scales = group > 0 ? (depth + group - 1) / group * group_header(type) : 32;
  return (layout == Layout::kDots ? header_bytes() : scales) + (has_nibbles(type) ? numbers / 2 : numbers);
}

PackedWeight empty_weight(const PackedShape& shape, const std::string& what) {
  PackedWeight w;
  static_cast<PackedShape&>(w) = shape;
  w.layout = kernels().layout;
  const auto fail = [&](const char* wanted) {
    const std::string got = ", got [" + std::to_string(w.rows) + ", " + std::to_string(w.depth) + "]";
    throw nb::value_error((what + ": expected " + wanted + got).c_str());
  };
  if (w.rows < 1 || w.depth < 1) fail("[N, K], both at least 1");
  if (w.gate_up && w.rows % 2 != 0) fail("[2 * I, K] with an even number of rows");
  // 2**16 keeps the exact sums of 8-bit products within 32 bits.
  if (w.rows > std::numeric_limits<int>::max() / 2 || w.depth > (1 << 16)) fail("N below 2**30, K up to 2**16");
  const bool in_groups = w.type == WeightType::kInt8Groups || has_nibbles(w.type);
  if (in_groups ? w.group != 128 && (w.group != 32 || !has_nibbles(w.type)) : w.group != 0)
    throw nb::value_error(("group_size: must be 32 or 128 for 4 bits, 128 or 0 for 8 bits, got " +
                           std::to_string(w.group)).c_str());
  const std::int64_t columns = w.gate_up ? w.rows / 2 : w.rows, per_panel = w.gate_up ? 8 : kPanel;
  w.num_panels = static_cast<int>((columns + per_panel - 1) / per_panel);
  w.panels = arena_allocate(static_cast<std::size_t>(w.bytes()));
  return w;
}

PackedWeight pack_linear(const TensorView& weight, bool gate_up) {
  weight.require({DType::kBf16, DType::kF32}, 2);
  return pack(weight, gate_up, weight.dtype == DType::kBf16 ? WeightType::kBf16 : WeightType::kF32, 0);
}

PackedWeight pack_linear_int8(const TensorView& weight, int group_size, bool gate_up) {
  weight.require({DType::kBf16, DType::kF32}, 2);
  return pack(weight, gate_up, group_size ? WeightType::kInt8Groups : WeightType::kInt8, group_size);
}

PackedWeight pack_linear_int4(const TensorView& weight, int group_size, bool gate_up) {
  weight.require({DType::kBf16, DType::kF32}, 2);
  return pack(weight, gate_up, WeightType::kInt4, group_size);
}

PackedWeight pack_stored_int4(const TensorView& numbers, const TensorView& scales, const TensorView* zeros,
                              int group_size, bool gate_up) {
  numbers.require(DType::kU8, 2).require_dense_from(1);
  const WeightType type = zeros ? WeightType::kInt4Zeros : WeightType::kInt4;
  PackedWeight w = empty_weight({type, numbers.shape[0], numbers.shape[1], group_size, gate_up}, numbers.name);
  const std::int64_t groups = (w.depth + w.group - 1) / w.group;
  scales.require(DType::kF32, 2).require_shape({w.rows, groups}).require_dense_from(1);
  if (zeros) zeros->require(DType::kU8, 2).require_shape({w.rows, groups}).require_dense_from(1);
  struct Context {
    const PackedWeight& w;
    StoredNibbles from;
  } context{w, {numbers, scales, zeros}};
  run_tasks(
      w.num_panels,
      [](void* c, int panel, int thread) {
        const auto& [packed, from] = *static_cast<Context*>(c);
        pack_stored(packed, from, panel, thread);
      },
      &context);
  return w;
}

}  // namespace di
