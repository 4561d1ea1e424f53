// A linear layer's weight in the order in which the kernels read it.
#pragma once
#include <cstdint>
#include <string>

#include "arena.h"
#include "kernels.h"
#include "tensor_view.h"

namespace di {

// Names the panels that the level in use reads: packed weights are kept in files, and a file of others is not read.
const char* packing();

struct PackedShape {
  WeightType type = WeightType::kBf16;
  std::int64_t rows = 0;   // N of the weight [N, K] it was packed from
  std::int64_t depth = 0;  // K
  int group = 0;           // rows of K per scale of the types in groups
  bool gate_up = false;
};

struct PackedWeight : PackedShape {
  Layout layout = Layout::kPairs;
  int num_panels = 0;
  ArenaPiece panels;

  std::int64_t header_bytes() const;  // of each panel in Layout::kDots
  std::int64_t panel_bytes() const;
  std::int64_t bytes() const { return num_panels * panel_bytes(); }
  // Over the bytes and places of all panels; not made to withstand somebody who wants it equal.
  std::uint64_t checksum() const;
  // Reads all panels from a file; 0, or errno, or -1 where the file ends too early.
  int read(int fd, std::int64_t offset) const;
};

// Zeros, for the level in use. `what` begins the message where the shape is impossible.
PackedWeight empty_weight(const PackedShape& shape, const std::string& what);

// Packs weight [N, K] (bf16 or f32, any strides); with gate_up the first N/2 rows are the gate's, the rest the up's.
PackedWeight pack_linear(const TensorView& weight, bool gate_up);

// Rounds to 8 bits, symmetric, one scale per row of the weight, or per row and `group_size` (128) columns:
// bf16(max |w| / 127). With groups activations keep 16 bits, without (0) they are rounded to 8 as well.
PackedWeight pack_linear_int8(const TensorView& weight, int group_size, bool gate_up);

// Rounds to 4 bits, one scale per row and `group_size` (32 or 128) columns: the element of largest magnitude becomes
// -8 times the scale.
PackedWeight pack_linear_int4(const TensorView& weight, int group_size, bool gate_up);

// Takes numbers (u8 [N, K], below 16), scales (f32 [N, K / group_size], rounded to bf16) and zeros (u8, likewise, or null
// for 8) as they are: a weight is (number - zero) * scale.
PackedWeight pack_stored_int4(const TensorView& numbers, const TensorView& scales, const TensorView* zeros,
                              int group_size, bool gate_up);

}  // namespace di
