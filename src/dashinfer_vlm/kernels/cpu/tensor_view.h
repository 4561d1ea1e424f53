// A checked look at a CPU tensor that Python handed over. The tensor stays owned by its Python object, which the
// caller's frame keeps alive for the length of the call.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace di {

enum class DType { kF32, kBf16, kI32, kI64, kI8, kU8 };

const char* dtype_name(DType dtype);

struct TensorView {
  std::string name;
  void* data = nullptr;
  DType dtype = DType::kF32;
  int ndim = 0;
  std::int64_t shape[5] = {};
  std::int64_t strides[5] = {};  // in elements

  // Throws ValueError for another device, an unknown dtype or more than five axes.
  TensorView(nanobind::handle tensor, const char* name);

  // "q float32 [3, 4, 128]"
  std::string describe() const;
  [[noreturn]] void fail(const std::string& wanted) const;
  const TensorView& require(DType dtype, int ndim) const;
  const TensorView& require(std::initializer_list<DType> dtypes, int ndim) const;
  const TensorView& require_shape(std::initializer_list<std::int64_t> expected) const;
  // The axes from `first` on lie densely one after another.
  const TensorView& require_dense_from(int first) const;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  std::int64_t numel() const;
  // First and one-past-last byte that an index can reach.
  void extent(const char*& begin, const char*& end) const;

 private:
  nanobind::ndarray<> keep_;  // set when the slow path had to make a DLPack capsule
};

// Throws ValueError where writing `out` would change `input` while it is still read.
void require_no_overlap(const TensorView& out, const TensorView& input);

}  // namespace di
