// Sampling: tokens from logits, and what is told of them.
#include "bindings.h"

namespace di {
namespace {

template <class T>
T* column(const nb::handle& object, const char* name, DType dtype, std::int64_t rows) {
  const TensorView view(object, name);
  view.require(dtype, 1).require_shape({rows}).require_dense_from(0);
  return view.as<T>();
}

// The starts [rows + 1] of lists that lie one behind the other in `ids`, which are ids of the vocabulary.
const std::int32_t* starts_of(const nb::handle& object, const char* name, std::int64_t rows, const TensorView& ids,
                              std::int64_t width) {
  const std::int32_t* starts = column<const std::int32_t>(object, name, DType::kI32, rows + 1);
  ids.require(DType::kI32, 1).require_dense_from(0);
  for (std::int64_t r = 0; r < rows; ++r)
    if (starts[r] > starts[r + 1]) ids.fail(std::string("rising ") + name);
  if (starts[0] != 0 || starts[rows] != ids.shape[0]) ids.fail(std::string(name) + " from 0 to its length");
  for (std::int64_t i = 0; i < ids.shape[0]; ++i)
    if (const std::int32_t id = ids.as<const std::int32_t>()[i]; id < 0 || id >= width)
      ids.fail("ids from 0 to below " + std::to_string(width));
  return starts;
}

template <class Args>
void set_logits(Args& args, const TensorView& logits) {
  logits.require(DType::kF32, 2).require_dense_from(1);
  if (logits.shape[1] < 1) logits.fail("at least one column");
  args.logits = logits.as<const float>();
  args.logits_stride = logits.strides[0];
  args.width = as_int(logits.shape[1], logits);
}

// `choices` has the fields of kernels/choices.py.
void choose(nb::handle logits_object, nb::handle choices, nb::handle tokens) {
  const TensorView logits(logits_object, "logits");
  const std::int64_t rows = logits.shape[0];
  ChooseArgs args{};
  set_logits(args, logits);
  args.rows = as_int(rows, logits);
  const auto floats = [&](const char* name) {
    return column<const float>(nb::getattr(choices, name), name, DType::kF32, rows);
  };
  args.temperature = floats("temperature");
  args.top_k = column<const std::int32_t>(nb::getattr(choices, "top_k"), "top_k", DType::kI32, rows);
  args.top_p = floats("top_p");
  args.min_p = floats("min_p");
  args.uniform = floats("uniform");
  args.repetition = floats("repetition_penalty");
  args.presence = floats("presence_penalty");
  args.frequency = floats("frequency_penalty");
  const auto list = [&](const char* starts_name, const char* ids_name, const std::int32_t*& starts) {
    const TensorView ids(nb::getattr(choices, ids_name), ids_name);
    starts = starts_of(nb::getattr(choices, starts_name), starts_name, rows, ids, logits.shape[1]);
    return ids.as<const std::int32_t>();
  };
  args.bias_ids = list("bias_starts", "bias_ids", args.bias_starts);
  args.seen_ids = list("seen_starts", "seen_ids", args.seen_starts);
  args.forbidden_ids = list("forbidden_starts", "forbidden_ids", args.forbidden_starts);
  args.biases = column<const float>(nb::getattr(choices, "biases"), "biases", DType::kF32, args.bias_starts[rows]);
  args.seen_counts = column<const std::int32_t>(nb::getattr(choices, "seen_counts"), "seen_counts", DType::kI32,
                                                args.seen_starts[rows]);
  if (const nb::object object = nb::getattr(choices, "mask"); !object.is_none()) {
    const TensorView mask(object, "mask");
    mask.require(DType::kI32, 2).require_shape({rows, (logits.shape[1] + 31) / 32}).require_dense_from(1);
    args.mask = mask.as<const std::uint32_t>();
    args.mask_stride = mask.strides[0];
  }
  args.tokens = column<std::int32_t>(tokens, "tokens", DType::kI32, rows);
  const Running running;
  kernels().choose(args);
}

void likeliest(nb::handle logits_object, nb::handle row_ids_object, nb::handle tokens_object, nb::handle largest,
               nb::handle log_totals, nb::handle ranks, nb::handle top_ids_object) {
  const TensorView logits(logits_object, "logits"), row_ids(row_ids_object, "rows"), tokens(tokens_object, "tokens"),
      top_ids(top_ids_object, "top_ids");
  LikeliestArgs args{};
  set_logits(args, logits);
  row_ids.require(DType::kI32, 1).require_dense_from(0);
  const std::int64_t rows = row_ids.shape[0];
  args.rows = as_int(rows, row_ids);
  args.row_ids = row_ids.as<const std::int32_t>();
  args.tokens = column<const std::int32_t>(tokens_object, "tokens", DType::kI32, rows);
  for (std::int64_t i = 0; i < rows; ++i) {
    if (args.row_ids[i] < 0 || args.row_ids[i] >= logits.shape[0]) row_ids.fail("rows of the logits");
    if (args.tokens[i] < 0 || args.tokens[i] >= args.width) tokens.fail("ids of the vocabulary");
  }
  top_ids.require(DType::kI32, 2).require_shape({rows, top_ids.shape[1]});
  if (top_ids.numel()) top_ids.require_dense_from(0);
  if (top_ids.shape[1] > args.width) top_ids.fail("no more columns than the logits have");
  args.num_top = as_int(top_ids.shape[1], top_ids);
  args.top_ids = top_ids.as<std::int32_t>();
  args.largest = column<float>(largest, "largest", DType::kF32, rows);
  args.log_totals = column<float>(log_totals, "log_totals", DType::kF32, rows);
  args.ranks = column<std::int32_t>(ranks, "ranks", DType::kI32, rows);
  const Running running;
  kernels().likeliest(args);
}

}  // namespace

void bind_sample(nb::module_& m) {
  m.def("choose", choose, nb::arg("logits"), nb::arg("choices"), nb::arg("tokens"));
  m.def("likeliest", likeliest, nb::arg("logits"), nb::arg("rows"), nb::arg("tokens"), nb::arg("largest"),
        nb::arg("log_totals"), nb::arg("ranks"), nb::arg("top_ids"));
}

}  // namespace di
