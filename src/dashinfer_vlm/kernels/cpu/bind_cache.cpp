// Rotary positions and writes into the paged cache.
#include "bindings.h"

namespace di {

void require_slots(const TensorView& slots, const TensorView& cache, std::int64_t tokens) {
  slots.require(DType::kI64, 1).require_shape({tokens}).require_dense_from(0);
  const std::int64_t num_slots = cache.shape[0] * cache.shape[1];
  const auto* p = slots.as<const std::int64_t>();
  for (std::int64_t t = 0; t < tokens; ++t)
    if (p[t] < 0 || p[t] >= num_slots)
      throw nb::value_error(("slots: " + std::to_string(p[t]) + " of token " + std::to_string(t) + " is not one of " +
                             std::to_string(num_slots))
                                .c_str());
}

namespace {

WriteKvArgs write_args(const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
                       const TensorView& slots) {
  WriteKvArgs args{};
  args.cache = cache_of(k_cache, v_cache);
  for (const TensorView* source : {&k, &v})
    source->require(DType::kF32, 3).require_shape({k.shape[0], args.cache.kv_heads, args.cache.head_dim});
  require_slots(slots, k_cache, k.shape[0]);
  args.slots = slots.as<const std::int64_t>();
  args.tokens = as_int(k.shape[0], k);
  args.k = k.as<const float>();
  args.v = v.as<const float>();
  copy_strides(k, args.k_strides);
  copy_strides(v, args.v_strides);
  return args;
}

void write_kv(nb::handle k_object, nb::handle v_object, nb::handle k_cache_object, nb::handle v_cache_object,
              nb::handle slots_object) {
  const TensorView k(k_object, "k"), v(v_object, "v"), k_cache(k_cache_object, "k_cache");
  const TensorView v_cache(v_cache_object, "v_cache"), slots(slots_object, "slots");
  const WriteKvArgs args = write_args(k, v, k_cache, v_cache, slots);
  const Running running;
  kernels().write_kv(args);
}

RopeArgs rope_args(const TensorView& x, const TensorView& cos, const TensorView& sin) {
  RopeArgs args{};
  x.require(DType::kF32, 3);
  set_tables(args, cos, sin, x.shape[0], x.shape[2]);
  for (const TensorView* table : {&cos, &sin}) require_no_overlap(x, *table);
  args.x = x.as<float>();
  copy_strides(x, args.x_strides);
  args.tokens = as_int(x.shape[0], x);
  args.heads = as_int(x.shape[1], x);
  args.head_dim = as_int(x.shape[2], x);
  return args;
}

void rope(nb::handle x_object, nb::handle cos_object, nb::handle sin_object) {
  const TensorView x(x_object, "x"), cos(cos_object, "cos"), sin(sin_object, "sin");
  const RopeArgs args = rope_args(x, cos, sin);
  if (x.numel() == 0) return;
  const Running running;
  kernels().rope(args);
}

void rope_write_kv(nb::handle q_object, nb::handle k_object, nb::handle v_object, nb::handle cos_object,
                   nb::handle sin_object, nb::handle k_cache_object, nb::handle v_cache_object,
                   nb::handle slots_object) {
  const TensorView q(q_object, "q"), k(k_object, "k"), v(v_object, "v"), cos(cos_object, "cos"), sin(sin_object, "sin");
  const TensorView k_cache(k_cache_object, "k_cache"), v_cache(v_cache_object, "v_cache"), slots(slots_object, "slots");
  WriteKvArgs write = write_args(k, v, k_cache, v_cache, slots);
  set_tables(write, cos, sin, k.shape[0], k.shape[2]);
  q.require(DType::kF32, 3).require_shape({k.shape[0], q.shape[1], k.shape[2]});
  const RopeArgs rotate = rope_args(q, cos, sin);
  if (k.shape[0] == 0) return;
  const Running running;
  if (q.numel() > 0) kernels().rope(rotate);
  kernels().write_kv(write);
}

}  // namespace

void bind_cache(nb::module_& m) {
  m.def("write_kv", write_kv, nb::arg("k"), nb::arg("v"), nb::arg("k_cache"), nb::arg("v_cache"), nb::arg("slots"));
  m.def("rope", rope, nb::arg("x"), nb::arg("cos"), nb::arg("sin"));
  m.def("rope_write_kv", rope_write_kv, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("cos"), nb::arg("sin"),
        nb::arg("k_cache"), nb::arg("v_cache"), nb::arg("slots"));
}

}  // namespace di
