// Attention over the paged cache and over packed segments.
#include "bindings.h"

namespace di {

void require_starts(const TensorView& starts, std::int64_t total) {
  starts.require(DType::kI32, 1).require_dense_from(0);
  if (starts.shape[0] < 1) starts.fail("at least one element");
  const auto* p = starts.as<const std::int32_t>();
  const std::int64_t n = starts.shape[0] - 1;
  for (std::int64_t i = 0; i < n; ++i)
    if (p[i + 1] < p[i]) throw nb::value_error((starts.name + ": must not fall").c_str());
  if (p[0] != 0 || p[n] != total)
    throw nb::value_error((starts.name + ": must go from 0 to " + std::to_string(total) + ", got " +
                           std::to_string(p[0]) + " to " + std::to_string(p[n]))
                              .c_str());
}

namespace {

// Every context fits its row of the table, covers its queries, and lies in blocks that exist.
void require_tables(const TensorView& tables, const TensorView& starts, const TensorView& contexts,
                    const PagedCache& cache, std::int64_t num_blocks) {
  const std::int64_t sequences = starts.shape[0] - 1;
  tables.require(DType::kI32, 2).require_shape({sequences, tables.shape[1]}).require_dense_from(1);
  contexts.require(DType::kI32, 1).require_shape({sequences}).require_dense_from(0);
  for (std::int64_t s = 0; s < sequences; ++s) {
    const auto* start = starts.as<const std::int32_t>() + s;
    const std::int64_t context = contexts.as<const std::int32_t>()[s], queries = start[1] - start[0];
    const std::int64_t blocks = (context + cache.block_size - 1) / cache.block_size;
    const auto which = [s] { return "sequence " + std::to_string(s) + ": "; };
    if (context < queries)
      throw nb::value_error(("context_lens: " + which() + std::to_string(queries) + " queries, but a context of " +
                             std::to_string(context) + " tokens")
                                .c_str());
    if (blocks > tables.shape[1])
      throw nb::value_error(("block_tables: " + which() + std::to_string(blocks) + " blocks needed, the table has " +
                             std::to_string(tables.shape[1]))
                                .c_str());
    const auto* row = tables.as<const std::int32_t>() + s * tables.strides[0];
    for (std::int64_t b = 0; b < blocks; ++b)
      if (row[b] < 0 || row[b] >= num_blocks)
        throw nb::value_error(("block_tables: " + which() + "block " + std::to_string(row[b]) + " is not one of " +
                               std::to_string(num_blocks))
                                  .c_str());
  }
}

}  // namespace

void set_contexts(PagedAttentionArgs& args, const TensorView& tables, const TensorView& starts,
                  const TensorView& contexts, std::int64_t tokens, std::int64_t num_blocks) {
  require_starts(starts, tokens);
  require_tables(tables, starts, contexts, args.cache, num_blocks);
  args.sequences = as_int(starts.shape[0] - 1, starts);
  args.block_tables = tables.as<const std::int32_t>();
  args.table_stride = tables.strides[0];
  args.query_starts = starts.as<const std::int32_t>();
  args.context_lens = contexts.as<const std::int32_t>();
}

bool divides_heads(std::int64_t heads, const PagedCache& cache) {
  return heads > 0 && heads % cache.kv_heads == 0 && heads / cache.kv_heads <= kMaxGroup;
}

namespace {

void paged_attention(nb::handle q_object, nb::handle k_object, nb::handle v_object, nb::handle tables_object,
                     nb::handle starts_object, nb::handle contexts_object, float scale, nb::handle out_object) {
  const TensorView q(q_object, "q"), k(k_object, "k_cache"), v(v_object, "v_cache"), out(out_object, "out");
  const TensorView tables(tables_object, "block_tables"), starts(starts_object, "query_starts");
  const TensorView contexts(contexts_object, "context_lens");
  PagedAttentionArgs args{};
  args.cache = cache_of(k, v);
  q.require(DType::kF32, 3).require_shape({q.shape[0], q.shape[1], args.cache.head_dim});
  if (!divides_heads(q.shape[1], args.cache))
    q.fail("a multiple of " + std::to_string(args.cache.kv_heads) + " heads, at most " + std::to_string(kMaxGroup) +
           " per key head");
  out.require(DType::kF32, 3).require_shape({q.shape[0], q.shape[1], q.shape[2]});
  for (const TensorView* input : {&q, &k, &v}) require_no_overlap(out, *input);
  set_contexts(args, tables, starts, contexts, q.shape[0], k.shape[0]);
  args.q = q.as<const float>();
  args.out = out.as<float>();
  copy_strides(q, args.q_strides);
  copy_strides(out, args.out_strides);
  args.heads = as_int(q.shape[1], q);
  args.scale = scale;
  const Running running;
  kernels().paged_attention(args);
}

void varlen_attention(nb::handle q_object, nb::handle k_object, nb::handle v_object, nb::handle starts_object,
                      float scale, std::int64_t first_query, bool bfloat16, nb::handle out_object) {
  const TensorView q(q_object, "q"), k(k_object, "k"), v(v_object, "v"), out(out_object, "out");
  const TensorView starts(starts_object, "starts");
  q.require(DType::kF32, 3);
  if (q.shape[1] < 1 || q.shape[2] < 1 || q.shape[2] > kMaxHeadDim)
    q.fail("[P, H, D] with a head and a head_dim from 1 to " + std::to_string(kMaxHeadDim));
  out.require(DType::kF32, 3).require_shape({q.shape[0], q.shape[1], q.shape[2]});
  k.require(DType::kF32, 3).require_shape({k.shape[0], q.shape[1], q.shape[2]});
  v.require(DType::kF32, 3).require_shape({k.shape[0], q.shape[1], q.shape[2]});
  if (first_query < 0 || first_query > k.shape[0] - q.shape[0])
    q.fail("at most " + std::to_string(k.shape[0]) + " positions with first_query, which is " +
           std::to_string(first_query));
  for (const TensorView* input : {&q, &k, &v}) require_no_overlap(out, *input);
  require_starts(starts, k.shape[0]);
  VarlenAttentionArgs args{};
  args.q = q.as<const float>();
  args.k = k.as<const float>();
  args.v = v.as<const float>();
  args.out = out.as<float>();
  copy_strides(q, args.q_strides);
  copy_strides(k, args.k_strides);
  copy_strides(v, args.v_strides);
  copy_strides(out, args.out_strides);
  args.heads = as_int(q.shape[1], q);
  args.head_dim = static_cast<int>(q.shape[2]);
  args.segments = as_int(starts.shape[0] - 1, starts);
  args.starts = starts.as<const std::int32_t>();
  args.first_query = static_cast<int>(first_query);
  args.queries = as_int(q.shape[0], q);
  args.scale = scale;
  args.bfloat16 = bfloat16;
  const Running running;
  kernels().varlen_attention(args);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("paged_attention", paged_attention, nb::arg("q"), nb::arg("k_cache"), nb::arg("v_cache"),
        nb::arg("block_tables"), nb::arg("query_starts"), nb::arg("context_lens"), nb::arg("scale"), nb::arg("out"));
  m.def("varlen_attention", varlen_attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("starts"),
        nb::arg("scale"), nb::arg("first_query"), nb::arg("bfloat16"), nb::arg("out"));
}

}  // namespace di
