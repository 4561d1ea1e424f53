// What the binding files share: they check what Python hands over, then run a kernel without the GIL. Nothing behind
// them checks sizes again.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <limits>
#include <mutex>
#include <string>

#include "dispatch.h"
#include "kernels.h"
#include "packed_weight.h"
#include "pool.h"
#include "tensor_view.h"

namespace di {

namespace nb = nanobind;

void bind_linear(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_layer(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_cache(nb::module_& m);
void bind_norm(nb::module_& m);
void bind_sample(nb::module_& m);
void bind_delta_net(nb::module_& m);

// A kernel runs without the GIL and alone.
struct Running {
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock{kernel_mutex()};
};

inline int as_int(std::int64_t n, const TensorView& view) {
  if (n > std::numeric_limits<int>::max() / 2) view.fail("axes below 2**30");
  return static_cast<int>(n);
}

// Strides of the leading axes; the last one must be dense.
template <int N>
void copy_strides(const TensorView& view, std::int64_t (&strides)[N]) {
  view.require_dense_from(N);
  for (int i = 0; i < N; ++i) strides[i] = view.strides[i];
}

inline CacheType cache_type(DType dtype) {
  return dtype == DType::kF32 ? CacheType::kF32 : dtype == DType::kBf16 ? CacheType::kBf16 : CacheType::kInt8;
}

inline PagedCache cache_of(const TensorView& k, const TensorView& v) {
  k.require({DType::kBf16, DType::kF32, DType::kI8}, 4);
  v.require(k.dtype, 4).require_shape({k.shape[0], k.shape[1], k.shape[2], k.shape[3]});
  const CacheType type = cache_type(k.dtype);
  const std::int64_t head_dim = k.shape[3] - (type == CacheType::kInt8 ? kScaleBytes : 0);
  if (k.shape[1] < 1 || k.shape[2] < 1) k.fail("[num_blocks, block_size, Hkv, D] with at least one slot and head");
  if (head_dim < 1 || head_dim > kMaxHeadDim)
    k.fail("a head_dim from 1 to " + std::to_string(kMaxHeadDim) + ", and " + std::to_string(kScaleBytes) +
           " bytes more in int8");
  PagedCache cache{};
  cache.type = type;
  cache.k = k.data;
  cache.v = v.data;
  copy_strides(k, cache.k_strides);
  copy_strides(v, cache.v_strides);
  cache.block_size = as_int(k.shape[1], k);
  cache.kv_heads = as_int(k.shape[2], k);
  cache.head_dim = static_cast<int>(head_dim);
  return cache;
}

// cos and sin [tokens, head_dim / 2].
template <class Args>
void set_tables(Args& args, const TensorView& cos, const TensorView& sin, std::int64_t tokens, std::int64_t head_dim) {
  if (head_dim % 2 != 0) throw nb::value_error("rotary positions need an even head_dim");
  for (const TensorView* table : {&cos, &sin})
    table->require(DType::kF32, 2).require_shape({tokens, head_dim / 2}).require_dense_from(1);
  args.cos = cos.as<const float>();
  args.sin = sin.as<const float>();
  args.table_strides[0] = cos.strides[0];
  args.table_strides[1] = sin.strides[0];
}

// A product with w, but for x, out, their rows and the epilogue's operands.
LinearArgs linear_args(const PackedWeight& w, Epilogue epilogue);

// Every slot [tokens] is one of the cache's.
void require_slots(const TensorView& slots, const TensorView& cache, std::int64_t tokens);

// starts [n + 1] rise from 0 to total.
void require_starts(const TensorView& starts, std::int64_t total);

// Which blocks the context of each of the sequences lies in, checked; args.cache is set already.
void set_contexts(PagedAttentionArgs& args, const TensorView& tables, const TensorView& starts,
                  const TensorView& contexts, std::int64_t tokens, std::int64_t num_blocks);

// `heads` query heads fit the key heads of the cache.
bool divides_heads(std::int64_t heads, const PagedCache& cache);

}  // namespace di
