// A mixture of experts in one call: Python would start two products for each expert that a token has chosen.
#include <nanobind/stl/vector.h>

#include <cstring>
#include <utility>
#include <vector>

#include "bindings.h"

namespace di {
namespace {

class Experts {
 public:
  Experts(std::vector<PackedWeight> gate_ups, std::vector<PackedWeight> downs)
      : gate_ups_(std::move(gate_ups)), downs_(std::move(downs)) {
    require(!gate_ups_.empty() && gate_ups_.size() == downs_.size(), "gate_ups, downs: as many of each, one at least");
    hidden_ = gate_ups_[0].depth;
    inner_ = downs_[0].depth;
    for (const PackedWeight& w : gate_ups_)
      require(w.gate_up && w.depth == hidden_ && w.rows == 2 * inner_, "gate_ups: of one size, which fits downs");
    for (const PackedWeight& w : downs_)
      require(!w.gate_up && w.depth == inner_ && w.rows == hidden_, "downs: of one size, which fits gate_ups");
  }

  void add_to(nb::handle out_object, nb::handle x_object, nb::handle chosen_object, nb::handle shares_object) const {
    const TensorView out(out_object, "out"), x(x_object, "x"), chosen(chosen_object, "chosen");
    const TensorView shares(shares_object, "shares");
    x.require(DType::kF32, 2).require_shape({x.shape[0], hidden_}).require_dense_from(0);
    out.require(DType::kF32, 2).require_shape({x.shape[0], hidden_}).require_dense_from(0);
    require_no_overlap(out, x);
    chosen.require(DType::kI64, 2).require_shape({x.shape[0], chosen.shape[1]}).require_dense_from(0);
    shares.require(DType::kF32, 2).require_shape({x.shape[0], chosen.shape[1]}).require_dense_from(0);
    const int rows = as_int(x.shape[0], x), count = as_int(chosen.shape[1], chosen);
    const std::vector<std::vector<std::int64_t>> pairs = by_expert(chosen, std::int64_t{rows} * count);

    std::size_t most = 0;
    for (const auto& mine : pairs) most = mine.size() > most ? mine.size() : most;
    if (most == 0) return;
    const Running running;
    float* const taken = static_cast<float*>(shared_scratch(most * (2 * hidden_ + inner_) * sizeof(float), 2));
    float* const inner = taken + most * hidden_;
    float* const made = inner + most * inner_;
    for (std::size_t e = 0; e < pairs.size(); ++e) {
      const std::vector<std::int64_t>& mine = pairs[e];
      if (mine.empty()) continue;
      const int n = static_cast<int>(mine.size());
      for (int i = 0; i < n; ++i)
        std::memcpy(taken + i * hidden_, x.as<const float>() + mine[i] / count * hidden_, hidden_ * sizeof(float));
      multiply(n, taken, gate_ups_[e], Epilogue::kSiluMul, inner);
      multiply(n, inner, downs_[e], Epilogue::kNone, made);
      for (int i = 0; i < n; ++i) {
        const float share = shares.as<const float>()[mine[i]];
        const float* const from = made + i * hidden_;
        float* const to = out.as<float>() + mine[i] / count * hidden_;
        for (std::int64_t h = 0; h < hidden_; ++h) to[h] += share * from[h];
      }
    }
  }

 private:
  static void require(bool holds, const char* otherwise) {
    if (!holds) throw nb::value_error(otherwise);
  }

  // For each expert its places in `chosen`, in order.
  std::vector<std::vector<std::int64_t>> by_expert(const TensorView& chosen, std::int64_t num_pairs) const {
    std::vector<std::vector<std::int64_t>> pairs(gate_ups_.size());
    for (std::int64_t pair = 0; pair < num_pairs; ++pair) {
      const std::int64_t expert = chosen.as<const std::int64_t>()[pair];
      if (expert < 0 || expert >= static_cast<std::int64_t>(pairs.size()))
        chosen.fail("experts from 0 to " + std::to_string(pairs.size() - 1));
      pairs[expert].push_back(pair);
    }
    return pairs;
  }

  static void multiply(int rows, const float* x, const PackedWeight& w, Epilogue epilogue, float* out) {
    LinearArgs args = linear_args(w, epilogue);
    args.x = x;
    args.x_stride = w.depth;
    args.rows = rows;
    args.out = out;
    args.out_stride = args.out_columns;
    kernels().linear(args);
  }

  std::vector<PackedWeight> gate_ups_, downs_;
  std::int64_t hidden_ = 0, inner_ = 0;
};

}  // namespace

void bind_experts(nb::module_& m) {
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<std::vector<PackedWeight>, std::vector<PackedWeight>>(), nb::arg("gate_ups"), nb::arg("downs"))
      .def("add_to", &Experts::add_to, nb::arg("out"), nb::arg("x"), nb::arg("chosen"), nb::arg("shares"));
}

}  // namespace di
