// RMSNorm and LayerNorm.
#include "bindings.h"

namespace di {
namespace {

// bias may be None.
void norm(nb::handle x_object, nb::handle weight_object, nb::handle bias_object, float eps, nb::handle out_object) {
  const TensorView x(x_object, "x"), weight(weight_object, "weight"), out(out_object, "out");
  NormArgs args{};
  x.require(DType::kF32, 2).require_dense_from(1);
  if (x.shape[1] < 1) x.fail("at least one column");
  out.require(DType::kF32, 2).require_shape({x.shape[0], x.shape[1]}).require_dense_from(1);
  weight.require(DType::kF32, 1).require_shape({x.shape[1]}).require_dense_from(0);
  if (out.data != x.data || out.strides[0] != x.strides[0]) require_no_overlap(out, x);
  if (!bias_object.is_none()) {
    const TensorView bias(bias_object, "bias");
    bias.require(DType::kF32, 1).require_shape({x.shape[1]}).require_dense_from(0);
    args.bias = bias.as<const float>();
  }
  args.x = x.as<const float>();
  args.x_stride = x.strides[0];
  args.weight = weight.as<const float>();
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  args.rows = as_int(x.shape[0], x);
  args.width = as_int(x.shape[1], x);
  args.eps = eps;
  const Running running;
  kernels().norm(args);
}

}  // namespace

void bind_norm(nb::module_& m) {
  m.def("norm", norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("eps"), nb::arg("out"));
}

}  // namespace di
