#include "tensor_view.h"

#include <unordered_map>

namespace nb = nanobind;

namespace di {
namespace {

// DLPack 1.3's table of C functions, which a tensor type publishes as __dlpack_c_exchange_api__. It answers in
// nanoseconds; __dlpack__() takes microseconds, which a step of several hundred kernel calls would feel.
struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, nb::dlpack::dltensor* out);
};

const ExchangeApi* exchange_api(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, const ExchangeApi*> known;  // guarded by the GIL
  if (auto it = known.find(type); it != known.end()) return it->second;
  const ExchangeApi* api = nullptr;
  nb::object capsule = nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", nb::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api && api->version.major != 1) api = api->previous;
  if (api && !api->dltensor_from_py_object) api = nullptr;
  Py_INCREF(type);  // the key must not be reused by another type
  known.emplace(type, api);
  return api;
}

std::optional<DType> dtype_of(nb::dlpack::dtype d) {
  if (d.lanes != 1) return std::nullopt;
  using Code = nb::dlpack::dtype_code;
  const auto code = static_cast<Code>(d.code);
  if (code == Code::Float && d.bits == 32) return DType::kF32;
  if (code == Code::Bfloat && d.bits == 16) return DType::kBf16;
  if (code == Code::Int && d.bits == 32) return DType::kI32;
  if (code == Code::Int && d.bits == 64) return DType::kI64;
  if (code == Code::Int && d.bits == 8) return DType::kI8;
  if (code == Code::UInt && d.bits == 8) return DType::kU8;
  return std::nullopt;
}

std::int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32: return 4;
    case DType::kBf16: return 2;
    case DType::kI64: return 8;
    case DType::kI8:
    case DType::kU8: return 1;
  }
  return 0;
}

std::string join(const std::int64_t* values, int n) {
  std::string s = "[";
  for (int i = 0; i < n; ++i) s += (i ? ", " : "") + std::to_string(values[i]);
  return s + "]";
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "float32";
    case DType::kBf16: return "bfloat16";
    case DType::kI32: return "int32";
    case DType::kI64: return "int64";
    case DType::kI8: return "int8";
    case DType::kU8: return "uint8";
  }
  return "?";
}

TensorView::TensorView(nb::handle tensor, const char* name_) : name(name_) {
  nb::dlpack::dltensor raw{};
  if (const ExchangeApi* api = exchange_api(Py_TYPE(tensor.ptr()))) {
    if (api->dltensor_from_py_object(tensor.ptr(), &raw) != 0) nb::raise_python_error();
  } else {
    if (!nb::try_cast(tensor, keep_)) throw nb::value_error((name + ": expected a tensor that speaks DLPack").c_str());
    raw.data = keep_.data();
    raw.device = {keep_.device_type(), keep_.device_id()};
    raw.ndim = static_cast<std::int32_t>(keep_.ndim());
    raw.dtype = keep_.dtype();
    raw.shape = const_cast<std::int64_t*>(keep_.shape_ptr());
    raw.strides = const_cast<std::int64_t*>(keep_.stride_ptr());
  }
  if (raw.device.device_type != nb::device::cpu::value) throw nb::value_error((name + ": must be on the CPU").c_str());
  if (raw.ndim > 5) throw nb::value_error((name + ": more than five axes").c_str());
  const auto known = dtype_of(raw.dtype);
  if (!known) throw nb::value_error((name + ": dtype is not one of float32, bfloat16, int64, int32, int8, uint8").c_str());
  dtype = *known;
  ndim = raw.ndim;
  data = static_cast<char*>(raw.data) + raw.byte_offset;
  std::int64_t dense = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    shape[i] = raw.shape[i];
    strides[i] = raw.strides ? raw.strides[i] : dense;
    dense *= shape[i];
  }
}

std::string TensorView::describe() const { return name + " " + dtype_name(dtype) + " " + join(shape, ndim); }

void TensorView::fail(const std::string& wanted) const {
  throw nb::value_error((name + ": expected " + wanted + ", got " + dtype_name(dtype) + " shape " + join(shape, ndim) +
                         " strides " + join(strides, ndim))
                            .c_str());
}

const TensorView& TensorView::require(DType wanted, int axes) const { return require({wanted}, axes); }

const TensorView& TensorView::require(std::initializer_list<DType> dtypes, int axes) const {
  std::string wanted;
  bool found = false;
  for (DType d : dtypes) {
    wanted += (wanted.empty() ? "" : " or ") + std::string(dtype_name(d));
    found |= d == dtype;
  }
  if (!found || ndim != axes) fail(wanted + " with " + std::to_string(axes) + " axes");
  return *this;
}

const TensorView& TensorView::require_shape(std::initializer_list<std::int64_t> expected) const {
  bool same = static_cast<int>(expected.size()) == ndim;
  for (int i = 0; same && i < ndim; ++i) same = shape[i] == expected.begin()[i];
  if (!same) fail("shape " + join(expected.begin(), static_cast<int>(expected.size())));
  return *this;
}

const TensorView& TensorView::require_dense_from(int first) const {
  std::int64_t dense = 1;
  for (int i = ndim - 1; i >= first; --i) {
    if (shape[i] > 1 && strides[i] != dense) fail("the axes from " + std::to_string(first) + " on to be dense");
    dense *= shape[i];
  }
  return *this;
}

std::int64_t TensorView::numel() const {
  std::int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

void TensorView::extent(const char*& begin, const char*& end) const {
  begin = end = static_cast<const char*>(data);
  if (numel() == 0) return;
  std::int64_t low = 0, high = 0;
  for (int i = 0; i < ndim; ++i) (strides[i] < 0 ? low : high) += (shape[i] - 1) * strides[i];
  begin += low * item_size(dtype);
  end += (high + 1) * item_size(dtype);
}

void require_no_overlap(const TensorView& out, const TensorView& input) {
  const char *out_begin, *out_end, *in_begin, *in_end;
  out.extent(out_begin, out_end);
  input.extent(in_begin, in_end);
  if (out_begin < in_end && in_begin < out_end)
    throw nb::value_error((out.name + " must not share memory with " + input.name).c_str());
}

}  // namespace di
