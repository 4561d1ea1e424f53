// Causal attention over the paged cache, for decode and for chunks of prompts.

// How paged attention is cut: a sequence with few query rows by keys, another one by queries.
struct PagedPlan {
  const PagedAttentionArgs& args;
  int group;          // query heads per key head
  int tile_queries;   // queries per task of a sequence that is cut by queries
  int split_keys;     // keys per task of a sequence that is cut by keys
  const int* first;   // [sequences + 1] first part of each sequence; a part is one task per key head
  float* partial;     // [parts][kv_heads][kInPlaceRows][head_dim + 2]: sums, maximum, sum of weights
  int64_t partial_size;

  int queries(int s) const { return args.query_starts[s + 1] - args.query_starts[s]; }
  bool in_place(int s) const { return queries(s) * group <= kInPlaceRows && args.cache.head_dim % kPanel == 0; }
  int parts(int s) const {
    if (queries(s) == 0) return 0;
    return in_place(s) ? (args.context_lens[s] + split_keys - 1) / split_keys
                       : (queries(s) + tile_queries - 1) / tile_queries;
  }
};

// Where keys or values [key0, key0 + n) of a head lie.
template <class T>
static void find_rows(const void* cache, const int64_t* strides, int block_size, const int32_t* table, int head, int key0,
                      int n, const T** rows) {
  int block = key0 / block_size, slot = key0 % block_size;
  for (int k = 0; k < n; ++block, slot = 0) {
    const T* row = static_cast<const T*>(cache) + table[block] * strides[0] + slot * strides[1] + head * strides[2];
    for (; slot < block_size && k < n; ++slot, ++k, row += strides[1]) rows[k] = row;
  }
}

template <class T>
static void attend_paged_range(const PagedPlan& plan, AttentionTile& t, int s, int head, int key_begin, int key_end,
                               bool in_place) {
  const PagedCache& cache = plan.args.cache;
  const int32_t* table = plan.args.block_tables + s * plan.args.table_stride;
  const T *key_rows[2 * kKeyTile], *value_rows[kKeyTile];
  for (int key0 = key_begin; key0 < key_end; key0 += kKeyTile) {
    const int left = key_end - key0, count = left < kKeyTile ? left : kKeyTile;
    const int known = in_place && left > kKeyTile ? (left < 2 * kKeyTile ? left : 2 * kKeyTile) : count;
    find_rows(cache.k, cache.k_strides, cache.block_size, table, head, key0, known, key_rows);
    find_rows(cache.v, cache.v_strides, cache.block_size, table, head, key0, count, value_rows);
    if (in_place && key0 == key_begin)
      for (int k = 0; k < kRowsAhead; ++k) prefetch_row<3>(key_rows, k, known, t.head_dim);
#ifdef DI_AVX512_BF16
    if constexpr (std::is_same_v<T, bf16>)
      if (t.q_bf16) {
        attend_in_place_bfloat(t, key_rows, value_rows, key0, count, known);
        continue;
      }
#endif
    if (in_place)
      attend_in_place(t, key_rows, value_rows, key0, count, known);
    else
      attend_packed(t, key_rows, value_rows, key0, count);
  }
}

// put(row, q, visible keys) for the rows of a tile: queries [query0, query0 + n) of sequence s, the group's heads next to
// each other.
template <class Put>
DI_INLINE void for_paged_queries(const PagedPlan& plan, int s, int head, int query0, int n, const Put& put) {
  const PagedAttentionArgs& args = plan.args;
  const int first_position = args.context_lens[s] - plan.queries(s);
  for (int i = 0; i < n; ++i)
    for (int g = 0; g < plan.group; ++g)
      put(i * plan.group + g,
          args.q + (args.query_starts[s] + query0 + i) * args.q_strides[0] + (head * plan.group + g) * args.q_strides[1],
          first_position + query0 + i + 1);
}

static void load_paged_queries(const PagedPlan& plan, AttentionTile& t, int s, int head, int query0, int n) {
  const PagedAttentionArgs& args = plan.args;
  t.rows = n * plan.group;
  const bool rotated = args.cache.type == CacheType::kInt8;
  const float scale = rotated ? args.scale / hadamard_size(t.head_dim) : args.scale;
  for_paged_queries(plan, s, head, query0, n, [&](int row, const float* q, int visible) {
    set_query(t, row, q, scale, visible);
    if (rotated) hadamard(t.q + row * t.head_dim, t.head_dim);
  });
  begin_rows(t);
}

DI_INLINE float* paged_out(const PagedPlan& plan, int s, int head, int query0, int row) {
  const PagedAttentionArgs& args = plan.args;
  return args.out + (args.query_starts[s] + query0 + row / plan.group) * args.out_strides[0] +
         (head * plan.group + row % plan.group) * args.out_strides[1];
}

#ifdef DI_AVX512_BF16
// Many rows over a bf16 cache.
static void attend_paged_bfloat(const PagedPlan& plan, int s, int head, int query0, int n, int thread) {
  const PagedCache& cache = plan.args.cache;
  const int32_t* table = plan.args.block_tables + s * plan.args.table_stride;
  const int key_end = plan.args.context_lens[s] - plan.queries(s) + query0 + n;
  BfloatTile t = make_bfloat_tile(thread, cache.head_dim);
  begin_rows(t, n * plan.group);
  for_paged_queries(plan, s, head, query0, n, [&](int row, const float* q, int visible) {
    set_query(t, row, q, plan.args.scale, visible);
  });
  const bf16* rows[kKeyTile];
  for (int key0 = 0; key0 < key_end; key0 += kKeyTile) {
    t.own.count = key_end - key0 < kKeyTile ? key_end - key0 : kKeyTile;
    const auto row = [&](int k) { return rows[k]; };
    find_rows(cache.k, cache.k_strides, cache.block_size, table, head, key0, t.own.count, rows);
    pack_bfloat_keys(t.own, cache.head_dim, row);
    find_rows(cache.v, cache.v_strides, cache.block_size, table, head, key0, t.own.count, rows);
    pack_bfloat_values(t.own, cache.head_dim, row);
    attend_bfloat(t, t.own, key0);
  }
  for (int r = 0; r < t.rows; ++r) write_row(t, r, paged_out(plan, s, head, query0, r));
}
#endif

// Queries [query0, query0 + n) of a sequence that is cut by queries.
template <class T>
static void attend_many(const PagedPlan& plan, int s, int head, int query0, int n, int thread) {
#ifdef DI_AVX512_BF16
  if constexpr (std::is_same_v<T, bf16>) return attend_paged_bfloat(plan, s, head, query0, n, thread);
#endif
  AttentionTile t = make_tile(thread, plan.args.cache.head_dim);
  load_paged_queries(plan, t, s, head, query0, n);
  attend_paged_range<T>(plan, t, s, head, 0, plan.args.context_lens[s] - plan.queries(s) + query0 + n, false);
  for (int r = 0; r < t.rows; ++r) write_row(t, r, paged_out(plan, s, head, query0, r));
}

template <class T>
static void paged_task(const PagedPlan& plan, int task, int thread) {
  const PagedAttentionArgs& args = plan.args;
  const int part = task / args.cache.kv_heads, head = task % args.cache.kv_heads;
  const int s = find_owner(plan.first, args.sequences, part), index = part - plan.first[s];
  const int parts = plan.first[s + 1] - plan.first[s], context = args.context_lens[s];
  if (!plan.in_place(s)) {
    // The last queries see most keys: they go first, so that no thread ends alone on a long one.
    const int query0 = (parts - 1 - index) * plan.tile_queries, left = plan.queries(s) - query0;
    return attend_many<T>(plan, s, head, query0, left < plan.tile_queries ? left : plan.tile_queries, thread);
  }
  AttentionTile t = make_tile(thread, args.cache.head_dim);
  load_paged_queries(plan, t, s, head, 0, plan.queries(s));
#ifdef DI_AVX512_BF16
  alignas(64) bf16 q_bf16[kInPlaceRows * kMaxHeadDim];
  if (decodes_in_bfloat(args.cache.type, t.head_dim)) {
    round_row(t.q, q_bf16, t.rows * t.head_dim);
    t.q_bf16 = q_bf16;
  }
#endif
  const int key0 = index * plan.split_keys, key1 = key0 + plan.split_keys;
  attend_paged_range<T>(plan, t, s, head, key0, key1 < context ? key1 : context, true);
  for (int r = 0; r < t.rows; ++r) {
    if (parts == 1) {
      write_row(t, r, paged_out(plan, s, head, 0, r));
      continue;
    }
    float* dst = plan.partial + ((int64_t)task * kInPlaceRows + r) * plan.partial_size;
    __builtin_memcpy(dst, t.out + r * t.width, sizeof(float) * t.head_dim);
    dst[t.head_dim] = t.row_max[r];
    dst[t.head_dim + 1] = t.row_sum[r];
  }
}

// Joins the parts of a sequence that was cut by keys.
static void join_parts(const PagedPlan& plan, int s, int head) {
  const int dim = plan.args.cache.head_dim, kv_heads = plan.args.cache.kv_heads, rows = plan.queries(s) * plan.group;
  for (int r = 0; r < rows; ++r) {
    const auto part = [&](int p) {
      return plan.partial + (((int64_t)p * kv_heads + head) * kInPlaceRows + r) * plan.partial_size;
    };
    float top = -INFINITY, weights = 0.f;
    for (int p = plan.first[s]; p < plan.first[s + 1]; ++p) top = part(p)[dim] > top ? part(p)[dim] : top;
    float* out = paged_out(plan, s, head, 0, r);
    for (int d = 0; d < dim; ++d) out[d] = 0.f;
    for (int p = plan.first[s]; p < plan.first[s + 1]; ++p) {
      const float shrink = exp(splat(part(p)[dim] - top))[0];
      weights += shrink * part(p)[dim + 1];
      for (int d = 0; d < dim; ++d) out[d] += shrink * part(p)[d];
    }
    for (int d = 0; d < dim; ++d) out[d] /= weights;
  }
}

// Long enough to be worth a task, short enough that all threads get some of a single long sequence.
DI_INLINE int choose_split(const PagedAttentionArgs& args) {
  int64_t keys = 0;
  for (int s = 0; s < args.sequences; ++s) keys += args.context_lens[s];
  const int64_t share = keys * args.cache.kv_heads / (num_threads() * 4);
  return share < 2 * kKeyTile ? 2 * kKeyTile : (int)(share / kKeyTile * kKeyTile);
}

static void paged_attention(const PagedAttentionArgs& args) {
  const int kv_heads = args.cache.kv_heads, group = args.heads / kv_heads;
  const int split = choose_split(args);
  PagedPlan plan{args, group, kQueryRows / group, split, nullptr, nullptr, args.cache.head_dim + 2};
  int parts = 0;
  for (int s = 0; s < args.sequences; ++s) parts += plan.parts(s);
  const int64_t index_floats = padded(args.sequences + 1, 16);
  const int64_t partials = (int64_t)parts * kv_heads * kInPlaceRows * plan.partial_size;
  float* shared = static_cast<float*>(shared_scratch((index_floats + partials) * sizeof(float)));
  int* first = reinterpret_cast<int*>(shared);
  first[0] = 0;
  bool cut_by_keys = false;
  for (int s = 0; s < args.sequences; ++s) {
    first[s + 1] = first[s] + plan.parts(s);
    cut_by_keys |= plan.in_place(s) && plan.parts(s) > 1;
  }
  plan.first = first;
  plan.partial = shared + index_floats;
  parallel(parts * kv_heads, [&](int task, int thread) {
    switch (args.cache.type) {
      case CacheType::kF32: return paged_task<float>(plan, task, thread);
      case CacheType::kBf16: return paged_task<bf16>(plan, task, thread);
      case CacheType::kInt8: return paged_task<int8_t>(plan, task, thread);
    }
  });
  if (!cut_by_keys) return;
  parallel(args.sequences * kv_heads, [&](int task, int) {
    const int s = task / kv_heads;
    if (plan.in_place(s) && plan.parts(s) > 1) join_parts(plan, s, task % kv_heads);
  });
}
