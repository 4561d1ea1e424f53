// Packing of weights, and products with them.
#include <nanobind/ndarray.h>

#include <cerrno>
#include <optional>
#include <stdexcept>

#include "bindings.h"

namespace di {
namespace {

Epilogue epilogue_of(const std::string& name) {
  if (name == "none") return Epilogue::kNone;
  if (name == "residual") return Epilogue::kResidual;
  if (name == "silu_mul") return Epilogue::kSiluMul;
  if (name == "gelu") return Epilogue::kGelu;
  if (name == "gelu_tanh") return Epilogue::kGeluTanh;
  if (name == "quick_gelu") return Epilogue::kQuickGelu;
  throw nb::value_error(("epilogue: expected none, residual, silu_mul, gelu, gelu_tanh or quick_gelu, got " + name).c_str());
}

void require_layout(const PackedWeight& w) {
  if (w.layout != kernels().layout && w.type != WeightType::kF32)
    throw nb::value_error("weight: packed for another instruction level; pack it again after set_isa");
}

}  // namespace

LinearArgs linear_args(const PackedWeight& w, Epilogue epilogue) {
  require_layout(w);
  if ((epilogue == Epilogue::kSiluMul) != w.gate_up)
    throw nb::value_error("epilogue: silu_mul belongs to weights packed with gate_up=True, and only to those");
  LinearArgs args{};
  args.epilogue = epilogue;
  args.depth = static_cast<int>(w.depth);
  args.num_panels = w.num_panels;
  args.out_columns = static_cast<int>(w.gate_up ? w.rows / 2 : w.rows);
  args.type = w.type;
  args.group = w.group;
  args.panel_bytes = w.panel_bytes();
  args.header_bytes = w.header_bytes();
  args.panels = w.panels.data;
  return args;
}

namespace {

void linear(nb::handle x_object, const PackedWeight& w, nb::handle bias_object, nb::handle out_object,
            const std::string& epilogue, nb::handle residual_object) {
  const TensorView x(x_object, "x"), out(out_object, "out");
  LinearArgs args = linear_args(w, epilogue_of(epilogue));
  x.require(DType::kF32, 2).require_shape({x.shape[0], w.depth}).require_dense_from(1);
  const std::int64_t rows = x.shape[0], columns = args.out_columns;
  out.require(DType::kF32, 2).require_shape({rows, columns}).require_dense_from(1);
  require_no_overlap(out, x);
  args.rows = as_int(rows, x);
  if (!bias_object.is_none()) {
    const TensorView bias(bias_object, "bias");
    bias.require(DType::kF32, 1).require_shape({w.rows}).require_dense_from(0);
    args.bias = bias.as<const float>();
  }
  if (residual_object.is_none() != (args.epilogue != Epilogue::kResidual))
    throw nb::value_error("residual: needed by the epilogue \"residual\", and only by it");
  if (!residual_object.is_none()) {
    const TensorView residual(residual_object, "residual");
    residual.require(DType::kF32, 2).require_shape({rows, columns}).require_dense_from(1);
    if (residual.data != out.data || residual.strides[0] != out.strides[0]) require_no_overlap(out, residual);
    args.residual = residual.as<const float>();
    args.residual_stride = residual.strides[0];
  }
  if (rows == 0) return;
  args.x = x.as<const float>();
  args.x_stride = x.strides[0];
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  const Running running;
  kernels().linear(args);
}

void embed_patches(nb::handle patches_object, const PackedWeight& w, nb::handle bias_object, nb::handle out_object) {
  const TensorView patches(patches_object, "patches"), bias(bias_object, "bias"), out(out_object, "out");
  if (w.gate_up || (w.type != WeightType::kF32 && w.type != WeightType::kBf16))
    throw nb::value_error("weight: patches need one packed by pack_linear, without gate_up");
  PatchArgs args{};
  args.linear = linear_args(w, Epilogue::kNone);
  patches.require(DType::kU8, 2).require_shape({patches.shape[0], w.depth}).require_dense_from(1);
  bias.require(DType::kF32, 1).require_shape({w.rows}).require_dense_from(0);
  out.require(DType::kF32, 2).require_shape({patches.shape[0], w.rows}).require_dense_from(1);
  require_no_overlap(out, patches);
  if (patches.shape[0] == 0) return;
  args.patches = patches.as<const std::uint8_t>();
  args.patch_stride = patches.strides[0];
  args.linear.rows = as_int(patches.shape[0], patches);
  args.linear.bias = bias.as<const float>();
  args.linear.out = out.as<float>();
  args.linear.out_stride = out.strides[0];
  const Running running;
  kernels().embed_patches(args);
}

PackedWeight pack(nb::handle weight_object, bool gate_up) {
  const TensorView weight(weight_object, "weight");
  const Running running;
  return pack_linear(weight, gate_up);
}

PackedWeight pack_int8(nb::handle weight_object, int group_size, bool gate_up) {
  const TensorView weight(weight_object, "weight");
  const Running running;
  return pack_linear_int8(weight, group_size, gate_up);
}

PackedWeight pack_int4(nb::handle weight_object, int group_size, bool gate_up) {
  const TensorView weight(weight_object, "weight");
  const Running running;
  return pack_linear_int4(weight, group_size, gate_up);
}

PackedWeight pack_stored(nb::handle numbers_object, nb::handle scales_object, nb::handle zeros_object, int group_size,
                         bool gate_up) {
  const TensorView numbers(numbers_object, "numbers"), scales(scales_object, "scales");
  std::optional<TensorView> zeros;
  if (!zeros_object.is_none()) zeros.emplace(zeros_object, "zeros");
  const Running running;
  return pack_stored_int4(numbers, scales, zeros ? &*zeros : nullptr, group_size, gate_up);
}

struct TypeName {
  WeightType type;
  const char* name;
};
constexpr TypeName kTypeNames[] = {{WeightType::kF32, "float32"},
                                   {WeightType::kBf16, "bfloat16"},
                                   {WeightType::kInt8, "int8"},
                                   {WeightType::kInt8Groups, "int8 in groups"},
                                   {WeightType::kInt4, "int4"},
                                   {WeightType::kInt4Zeros, "int4 with zeros"}};

std::string type_name(const PackedWeight& w) {
  for (const TypeName& each : kTypeNames)
    if (each.type == w.type) return each.name;
  throw std::logic_error("every type has a name");
}

WeightType type_of(const std::string& name) {
  for (const TypeName& each : kTypeNames)
    if (each.name == name) return each.type;
  throw nb::value_error(("type: no weight type is called " + name).c_str());
}

std::uint64_t checksum(const PackedWeight& w) {
  const Running running;
  return w.checksum();
}

// The panels' bytes; they are nobody's to write.
nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>> panels(nb::handle_t<PackedWeight> weight) {
  const auto& w = nb::cast<const PackedWeight&>(weight);
  return {w.panels.data, {static_cast<std::size_t>(w.bytes())}, weight};
}

PackedWeight read_packed(int fd, std::int64_t offset, std::int64_t bytes, const std::string& type, std::int64_t rows,
                         std::int64_t depth, int group_size, bool gate_up) {
  const PackedWeight w = empty_weight({type_of(type), rows, depth, group_size, gate_up}, "packed weight");
  if (w.bytes() != bytes)
    throw nb::value_error(("packed weight: takes " + std::to_string(w.bytes()) + " bytes, not " +
                           std::to_string(bytes)).c_str());
  int error;
  {
    const Running running;
    error = w.read(fd, offset);
  }
  if (error < 0) throw nb::value_error("packed weight: the file ends too early");
  if (error > 0) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
  return w;
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<PackedWeight>(m, "PackedWeight")
      .def_ro("rows", &PackedWeight::rows)
      .def_ro("depth", &PackedWeight::depth)
      .def_ro("gate_up", &PackedWeight::gate_up)
      .def_ro("group_size", &PackedWeight::group)
      .def_prop_ro("type", type_name)
      .def_prop_ro("nbytes", &PackedWeight::bytes)
      .def("checksum", checksum);
  m.def("packing", packing);
  m.def("panels", panels, nb::arg("weight"));
  m.def("read_packed", read_packed, nb::arg("fd"), nb::arg("offset"), nb::arg("nbytes"), nb::arg("type"),
        nb::arg("rows"), nb::arg("depth"), nb::arg("group_size"), nb::arg("gate_up"));
  m.def("pack_linear", pack, nb::arg("weight"), nb::arg("gate_up"));
  m.def("pack_linear_int8", pack_int8, nb::arg("weight"), nb::arg("group_size"), nb::arg("gate_up"));
  m.def("pack_linear_int4", pack_int4, nb::arg("weight"), nb::arg("group_size"), nb::arg("gate_up"));
  m.def("pack_stored_int4", pack_stored, nb::arg("numbers"), nb::arg("scales"), nb::arg("zeros").none(),
        nb::arg("group_size"), nb::arg("gate_up"));
  m.def("linear", linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"), nb::arg("epilogue"),
        nb::arg("residual").none());
  m.def("embed_patches", embed_patches, nb::arg("patches"), nb::arg("weight"), nb::arg("bias"), nb::arg("out"));
}

}  // namespace di
