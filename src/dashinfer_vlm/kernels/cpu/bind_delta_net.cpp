// Layers that keep a state of each sequence in place of keys and values.
#include "bindings.h"

namespace di {
namespace {

SeatedRows seated_rows(const TensorView& seats, const TensorView& starts, const TensorView& contexts,
                       std::int64_t tokens, std::int64_t num_seats) {
  require_starts(starts, tokens);
  const std::int64_t sequences = starts.shape[0] - 1;
  seats.require(DType::kI64, 1).require_shape({sequences}).require_dense_from(0);
  contexts.require(DType::kI32, 1).require_shape({sequences}).require_dense_from(0);
  SeatedRows rows{};
  rows.sequences = as_int(sequences, seats);
  rows.seats = seats.as<const std::int64_t>();
  rows.query_starts = starts.as<const std::int32_t>();
  rows.context_lens = contexts.as<const std::int32_t>();
  for (std::int64_t s = 0; s < sequences; ++s)
    if (rows.seats[s] < 0 || rows.seats[s] >= num_seats)
      throw nb::value_error(("seats: " + std::to_string(rows.seats[s]) + " of sequence " + std::to_string(s) +
                             " is not one of " + std::to_string(num_seats))
                                .c_str());
  return rows;
}

void causal_conv(nb::handle x_object, nb::handle inputs_object, nb::handle weight_object, nb::handle seats_object,
                 nb::handle starts_object, nb::handle contexts_object, nb::handle out_object) {
  const TensorView x(x_object, "x"), inputs(inputs_object, "inputs"), weight(weight_object, "weight");
  const TensorView seats(seats_object, "seats"), starts(starts_object, "query_starts");
  const TensorView contexts(contexts_object, "context_lens"), out(out_object, "out");
  CausalConvArgs args{};
  x.require(DType::kF32, 2).require_dense_from(1);
  weight.require(DType::kF32, 2).require_shape({weight.shape[0], x.shape[1]}).require_dense_from(0);
  if (weight.shape[0] < 2 || x.shape[1] < 1) weight.fail("at least two inputs of at least one channel");
  inputs.require(DType::kF32, 3).require_shape({inputs.shape[0], weight.shape[0] - 1, x.shape[1]});
  inputs.require_dense_from(0);
  out.require(DType::kF32, 2).require_shape({x.shape[0], x.shape[1]}).require_dense_from(0);
  require_no_overlap(out, x);
  args.rows = seated_rows(seats, starts, contexts, x.shape[0], inputs.shape[0]);
  args.x = x.as<const float>();
  args.x_stride = x.strides[0];
  args.inputs = inputs.as<float>();
  args.weight = weight.as<const float>();
  args.out = out.as<float>();
  args.channels = as_int(x.shape[1], x);
  args.size = as_int(weight.shape[0], weight);
  const Running running;
  kernels().causal_conv(args);
}

void delta_rule(nb::handle q_object, nb::handle k_object, nb::handle v_object, nb::handle beta_object,
                nb::handle decay_object, nb::handle memory_object, nb::handle seats_object, nb::handle starts_object,
                nb::handle contexts_object, nb::handle out_object) {
  const TensorView q(q_object, "q"), k(k_object, "k"), v(v_object, "v"), beta(beta_object, "beta");
  const TensorView decay(decay_object, "decay"), memory(memory_object, "memory"), seats(seats_object, "seats");
  const TensorView starts(starts_object, "query_starts"), contexts(contexts_object, "context_lens");
  const TensorView out(out_object, "out");
  DeltaRuleArgs args{};
  q.require(DType::kF32, 3);
  const std::int64_t tokens = q.shape[0], key_heads = q.shape[1], key_dim = q.shape[2];
  k.require(DType::kF32, 3).require_shape({tokens, key_heads, key_dim});
  v.require(DType::kF32, 3).require_shape({tokens, v.shape[1], v.shape[2]});
  const std::int64_t heads = v.shape[1], value_dim = v.shape[2];
  if (key_heads < 1 || heads < 1 || heads % key_heads != 0)
    v.fail("a multiple of " + std::to_string(key_heads) + " heads");
  if (key_dim < 1 || value_dim < 1) v.fail("heads of at least one channel");
  for (const TensorView* rates : {&beta, &decay})
    rates->require(DType::kF32, 2).require_shape({tokens, heads}).require_dense_from(1);
  memory.require(DType::kF32, 4).require_shape({memory.shape[0], heads, key_dim, value_dim}).require_dense_from(0);
  out.require(DType::kF32, 3).require_shape({tokens, heads, value_dim}).require_dense_from(0);
  for (const TensorView* input : {&q, &k, &v, &beta, &decay}) require_no_overlap(out, *input);
  args.rows = seated_rows(seats, starts, contexts, tokens, memory.shape[0]);
  args.q = q.as<const float>();
  args.k = k.as<const float>();
  args.v = v.as<const float>();
  copy_strides(q, args.q_strides);
  copy_strides(k, args.k_strides);
  copy_strides(v, args.v_strides);
  args.beta = beta.as<const float>();
  args.decay = decay.as<const float>();
  args.beta_stride = beta.strides[0];
  args.decay_stride = decay.strides[0];
  args.memory = memory.as<float>();
  args.out = out.as<float>();
  args.tokens = as_int(tokens, q);
  args.key_heads = as_int(key_heads, q);
  args.heads = as_int(heads, v);
  args.key_dim = as_int(key_dim, q);
  args.value_dim = as_int(value_dim, v);
  const Running running;
  kernels().delta_rule(args);
}

}  // namespace

void bind_delta_net(nb::module_& m) {
  m.def("causal_conv", causal_conv, nb::arg("x"), nb::arg("inputs"), nb::arg("weight"), nb::arg("seats"),
        nb::arg("query_starts"), nb::arg("context_lens"), nb::arg("out"));
  m.def("delta_rule", delta_rule, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("beta"), nb::arg("decay"),
        nb::arg("memory"), nb::arg("seats"), nb::arg("query_starts"), nb::arg("context_lens"), nb::arg("out"));
}

}  // namespace di
