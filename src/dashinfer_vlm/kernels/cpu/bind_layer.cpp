// A layer of the text model in one call. Between its nine kernels Python would take a tenth of the time of a token.
#include <cmath>
#include <utility>

#include "bindings.h"

namespace di {
namespace {

// float32 [size], kept alive by its Python object.
struct Vector {
  nb::object tensor;
  const float* data = nullptr;

  Vector(nb::object object, const char* name, std::int64_t size) : tensor(std::move(object)) {
    if (tensor.is_none()) return;
    const TensorView view(tensor, name);
    view.require(DType::kF32, 1).require_shape({size}).require_dense_from(0);
    data = view.as<const float>();
  }
};

// Rows of floats, one after the other.
struct Rows {
  float* data;
  std::int64_t width;
};

class DecoderLayer {
 public:
  DecoderLayer(nb::object norm1, const PackedWeight& qkv, nb::object qkv_bias, nb::object q_norm, nb::object k_norm,
               const PackedWeight& out, nb::object norm2, const PackedWeight& gate_up, const PackedWeight& down,
               int num_heads, int num_kv_heads, float eps)
      : hidden_(qkv.depth), heads_(num_heads), kv_heads_(num_kv_heads), head_dim_(head_dim(qkv, num_heads, num_kv_heads)),
        eps_(eps), qkv_(qkv), out_(out), gate_up_(gate_up), down_(down),
        norm1_(std::move(norm1), "norm1", hidden_), norm2_(std::move(norm2), "norm2", hidden_),
        qkv_bias_(std::move(qkv_bias), "qkv_bias", qkv.rows), q_norm_(std::move(q_norm), "q_norm", head_dim_),
        k_norm_(std::move(k_norm), "k_norm", head_dim_) {
    require(norm1_.data && norm2_.data, "norm1, norm2: must be given");
    require(!q_norm_.data == !k_norm_.data, "q_norm, k_norm: both or neither");
    require(out.depth == heads_ * head_dim_ && out.rows == hidden_, "out: does not fit qkv");
    require(gate_up.gate_up && gate_up.depth == hidden_, "gate_up: does not fit qkv");
    require(down.depth * 2 == gate_up.rows && down.rows == hidden_, "down: does not fit gate_up");
  }

  // x [T, hidden] becomes what the layer makes of it; the rest as paged_attention and rope_write_kv take it.
  void forward(nb::handle x_object, nb::handle cos_object, nb::handle sin_object, nb::handle k_object,
               nb::handle v_object, nb::handle slots_object, nb::handle tables_object, nb::handle starts_object,
               nb::handle contexts_object) const {
    const TensorView x(x_object, "x"), cos(cos_object, "cos"), sin(sin_object, "sin"), k(k_object, "k_cache");
    const TensorView v(v_object, "v_cache"), slots(slots_object, "slots"), tables(tables_object, "block_tables");
    const TensorView starts(starts_object, "query_starts"), contexts(contexts_object, "context_lens");
    x.require(DType::kF32, 2).require_shape({x.shape[0], hidden_}).require_dense_from(0);
    const int tokens = as_int(x.shape[0], x);

    WriteKvArgs write{};
    write.cache = cache_of(k, v);
    if (write.cache.head_dim != head_dim_ || write.cache.kv_heads != kv_heads_)
      k.fail("rows of " + std::to_string(kv_heads_) + " heads of " + std::to_string(head_dim_));
    require(divides_heads(heads_, write.cache), "num_heads: too many, or no multiple of the cache's heads");
    require_slots(slots, k, tokens);
    set_tables(write, cos, sin, tokens, head_dim_);
    PagedAttentionArgs attention{};
    attention.cache = write.cache;
    set_contexts(attention, tables, starts, contexts, tokens, k.shape[0]);
    if (tokens == 0) return;

    const Running running;
    const std::int64_t joined_width = qkv_.rows, attended_width = out_.depth, inner_width = down_.depth;
    const std::int64_t both = joined_width + attended_width, widest = both > inner_width ? both : inner_width;
    const Rows residual{x.as<float>(), hidden_};
    const Rows normed{static_cast<float*>(shared_scratch(tokens * (hidden_ + widest) * sizeof(float), 2)), hidden_};
    const Rows joined{normed.data + tokens * hidden_, joined_width};
    const Rows attended{joined.data + tokens * joined_width, attended_width}, inner{joined.data, inner_width};

    norm(tokens, residual, norm1_, normed);
    multiply(tokens, normed, qkv_, Epilogue::kNone, joined, qkv_bias_.data);
    float* const keys = joined.data + heads_ * head_dim_;
    if (q_norm_.data)
      for (int t = 0; t < tokens; ++t) {
        norm(heads_, {joined.data + t * joined_width, head_dim_}, q_norm_);
        norm(kv_heads_, {keys + t * joined_width, head_dim_}, k_norm_);
      }
    const std::int64_t strides[] = {joined_width, head_dim_};
    rotate(tokens, joined.data, strides, write);
    write.tokens = tokens;
    write.slots = slots.as<const std::int64_t>();
    write.k = keys;
    write.v = keys + kv_heads_ * head_dim_;
    for (int i = 0; i < 2; ++i) write.k_strides[i] = write.v_strides[i] = attention.q_strides[i] = strides[i];
    kernels().write_kv(write);
    attention.q = joined.data;
    attention.out = attended.data;
    attention.out_strides[0] = attended_width;
    attention.out_strides[1] = head_dim_;
    attention.heads = heads_;
    attention.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim_)));
    kernels().paged_attention(attention);
    multiply(tokens, attended, out_, Epilogue::kResidual, residual);
    norm(tokens, residual, norm2_, normed);
    multiply(tokens, normed, gate_up_, Epilogue::kSiluMul, inner);
    multiply(tokens, inner, down_, Epilogue::kResidual, residual);
  }

 private:
  static void require(bool holds, const char* otherwise) {
    if (!holds) throw nb::value_error(otherwise);
  }

  static int head_dim(const PackedWeight& qkv, int heads, int kv_heads) {
    require(heads > 0 && kv_heads > 0 && qkv.rows % (heads + 2 * kv_heads) == 0, "qkv: is not of so many heads");
    return static_cast<int>(qkv.rows / (heads + 2 * kv_heads));
  }

  void norm(int rows, Rows x, const Vector& weight, Rows out) const {
    NormArgs args{};
    args.x = x.data;
    args.out = out.data;
    args.x_stride = args.out_stride = x.width;
    args.weight = weight.data;
    args.rows = rows;
    args.width = static_cast<int>(x.width);
    args.eps = eps_;
    kernels().norm(args);
  }
  void norm(int rows, Rows x, const Vector& weight) const { norm(rows, x, weight, x); }

  // With kResidual the product is added to `out`.
  static void multiply(int rows, Rows x, const PackedWeight& w, Epilogue epilogue, Rows out, const float* bias = nullptr) {
    LinearArgs args = linear_args(w, epilogue);
    args.x = x.data;
    args.x_stride = x.width;
    args.rows = rows;
    args.bias = bias;
    args.out = out.data;
    args.out_stride = args.residual_stride = out.width;
    if (epilogue == Epilogue::kResidual) args.residual = out.data;
    kernels().linear(args);
  }

  void rotate(int tokens, float* queries, const std::int64_t (&strides)[2], const WriteKvArgs& tables) const {
    RopeArgs args{};
    args.x = queries;
    for (int i = 0; i < 2; ++i) {
      args.x_strides[i] = strides[i];
      args.table_strides[i] = tables.table_strides[i];
    }
    args.cos = tables.cos;
    args.sin = tables.sin;
    args.tokens = tokens;
    args.heads = heads_;
    args.head_dim = head_dim_;
    kernels().rope(args);
  }

  std::int64_t hidden_;
  int heads_, kv_heads_, head_dim_;
  float eps_;
  PackedWeight qkv_, out_, gate_up_, down_;
  Vector norm1_, norm2_, qkv_bias_, q_norm_, k_norm_;
};

}  // namespace

void bind_layer(nb::module_& m) {
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def(nb::init<nb::object, const PackedWeight&, nb::object, nb::object, nb::object, const PackedWeight&, nb::object,
                    const PackedWeight&, const PackedWeight&, int, int, float>(),
           nb::arg("norm1"), nb::arg("qkv"), nb::arg("qkv_bias").none(), nb::arg("q_norm").none(),
           nb::arg("k_norm").none(), nb::arg("out"), nb::arg("norm2"), nb::arg("gate_up"), nb::arg("down"),
           nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("eps"))
      .def("forward", &DecoderLayer::forward, nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("k_cache"),
           nb::arg("v_cache"), nb::arg("slots"), nb::arg("block_tables"), nb::arg("query_starts"),
           nb::arg("context_lens"));
}

}  // namespace di
