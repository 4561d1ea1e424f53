// The causal convolution and the gated delta rule of layers that keep a state of each sequence.

DI_INLINE bool begins(const SeatedRows& rows, int s) {
  return rows.context_lens[s] == rows.query_starts[s + 1] - rows.query_starts[s];
}

constexpr int kConvChannels = 256;  // of one task: the last rows of so many stay in L1

// Some channels of one sequence. Row t of the padded input is row t of what was kept, or row t - (size - 1) of x.
static void conv_channels(const CausalConvArgs& args, int s, int first, int count) {
  const int start = args.rows.query_starts[s], tokens = args.rows.query_starts[s + 1] - start, kept = args.size - 1;
  if (tokens == 0) return;
  float* inputs = args.inputs + args.rows.seats[s] * (int64_t)kept * args.channels + first;
  if (begins(args.rows, s))
    for (int i = 0; i < kept; ++i) __builtin_memset(inputs + i * (int64_t)args.channels, 0, count * sizeof(float));
  const float* x = args.x + start * args.x_stride + first;
  const auto row = [&](int t) {
    return t < kept ? inputs + t * (int64_t)args.channels : x + (t - kept) * args.x_stride;
  };
  const float* weight = args.weight + first;
  for (int t = 0; t < tokens; ++t) {
    float* out = args.out + (start + t) * (int64_t)args.channels + first;
    for_columns(count, [&](int c, int n) {
      F8 total = splat(0.f);
      for (int i = 0; i < args.size; ++i)
        total += load_lanes(row(t + i) + c, n) * load_lanes(weight + i * (int64_t)args.channels + c, n);
      store_lanes(out + c, silu(total), n);
    });
  }
  for (int i = 0; i < kept; ++i)  // from the oldest on: each comes from a later row
    __builtin_memmove(inputs + i * (int64_t)args.channels, row(tokens + i), count * sizeof(float));
}

static void causal_conv(const CausalConvArgs& args) {
  const int parts = (args.channels + kConvChannels - 1) / kConvChannels;
  parallel(args.rows.sequences * parts, [&](int task, int) {
    const int first = task % parts * kConvChannels, left = args.channels - first;
    conv_channels(args, task / parts, first, left < kConvChannels ? left : kConvChannels);
  });
}

#ifdef DI_AVX512
constexpr int kMemoryVectors = 4;  // of a row that one task has: with 32 registers
#else
constexpr int kMemoryVectors = 2;
#endif
constexpr int kMemoryColumns = 8 * kMemoryVectors;

// What a token's q and k, as they come, are multiplied with, and their product.
struct Lengths {
  float q, k, product;
};

static Lengths lengths_of(const DeltaRuleArgs& args, int token, int head) {
  const float* q = args.q + token * args.q_strides[0] + head * args.q_strides[1];
  const float* k = args.k + token * args.k_strides[0] + head * args.k_strides[1];
  F8 qq = splat(0.f), kk = splat(0.f), qk = splat(0.f);
  for_columns(args.key_dim, [&](int c, int n) {
    const F8 a = load_lanes(q + c, n), b = load_lanes(k + c, n);
    qq += a * a;
    kk += b * b;
    qk += a * b;
  });
  const float of_q = 1.f / sqrtf((sum(qq) + 1e-6f) * args.key_dim), of_k = 1.f / sqrtf(sum(kk) + 1e-6f);
  return {of_q, of_k, of_q * of_k * sum(qk)};
}

// Some columns of a row of a head's memory.
struct Row {
  F8 at[kMemoryVectors];
};

// What a token's q and k find in the columns of a memory.
struct Found {
  Row with_q, with_k;
};

// In rows [key_dim][kMemoryColumns]. With a change they are decayed and k of the token before times the change is added
// first, in the same pass. Sums are locals, which no store to the rows can mean.
template <bool kChanges>
DI_INLINE Found find(float* rows, int key_dim, const float* q, const float* k, float keep = 1.f,
                     const float* changed_k = nullptr, Row change = {}) {
  Found found{};
  for (int r = 0; r < key_dim; ++r)
    DI_UNROLL for (int i = 0; i < kMemoryVectors; ++i) {
      float* p = rows + r * kMemoryColumns + 8 * i;
      F8 values = load(p);
      if constexpr (kChanges) store(p, values = values * keep + changed_k[r] * change.at[i]);
      found.with_q.at[i] += values * q[r];
      found.with_k.at[i] += values * k[r];
    }
  return found;
}

// Columns of a memory and the rows of a task, one to the other; a memory's last columns may be fewer.
template <class Move>
DI_INLINE void move_columns(const DeltaRuleArgs& args, float* memory, float* rows, int count, const Move& move) {
  for (int r = 0; r < args.key_dim; ++r)
    for_columns(count, [&](int c, int n) {
      move(memory + r * (int64_t)args.value_dim + c, rows + r * kMemoryColumns + c, n);
    });
}

DI_INLINE void read_columns(const float* memory, float* rows, int n) { store(rows, load_lanes(memory, n)); }
DI_INLINE void write_columns(float* memory, const float* rows, int n) { store_lanes(memory, load(rows), n); }

// `count` columns of head h of sequence s, all of its tokens: columns do not know each other.
static void columns_of_head(const DeltaRuleArgs& args, const Lengths* lengths, int s, int h, int first, int count,
                            float* rows) {
  const int start = args.rows.query_starts[s], stop = args.rows.query_starts[s + 1];
  if (start == stop) return;
  const int key_head = h / (args.heads / args.key_heads);
  float* memory = args.memory + (args.rows.seats[s] * args.heads + h) * (int64_t)args.key_dim * args.value_dim + first;
  __builtin_memset(rows, 0, args.key_dim * kMemoryColumns * sizeof(float));
  if (!begins(args.rows, s)) move_columns(args, memory, rows, count, read_columns);
  const auto q = [&](int t) { return args.q + t * args.q_strides[0] + key_head * args.q_strides[1]; };
  const auto k = [&](int t) { return args.k + t * args.k_strides[0] + key_head * args.k_strides[1]; };

  Found found = find<false>(rows, args.key_dim, q(start), k(start));
  for (int t = start; t < stop; ++t) {
    const Lengths& length = lengths[t * args.key_heads + key_head];
    const float keep = expf(args.decay[t * args.decay_stride + h]), beta = args.beta[t * args.beta_stride + h];
    const float* v = args.v + t * args.v_strides[0] + h * args.v_strides[1] + first;
    float* out = args.out + (t * (int64_t)args.heads + h) * args.value_dim + first;
    Row change{};
    for_columns(count, [&](int c, int n) {
      const int i = c / 8;
      const F8 moved = beta * (load_lanes(v + c, n) - keep * length.k * found.with_k.at[i]);
      store_lanes(out + c, keep * length.q * found.with_q.at[i] + length.product * moved, n);
      change.at[i] = length.k * moved;
    });
    const int next = t + 1 < stop ? t + 1 : t;  // nobody looks at what the last token finds
    found = find<true>(rows, args.key_dim, q(next), k(next), keep, k(t), change);
  }
  move_columns(args, memory, rows, count, write_columns);
}

static void delta_rule(const DeltaRuleArgs& args) {
  auto* lengths = static_cast<Lengths*>(shared_scratch(args.tokens * (int64_t)args.key_heads * sizeof(Lengths)));
  for_rows(args.tokens, 2 * (int64_t)args.key_heads * args.key_dim, [&](int t) {
    for (int h = 0; h < args.key_heads; ++h) lengths[t * args.key_heads + h] = lengths_of(args, t, h);
  });
  const int parts = (args.value_dim + kMemoryColumns - 1) / kMemoryColumns;
  parallel(args.rows.sequences * args.heads * parts, [&](int task, int thread) {
    const int first = task % parts * kMemoryColumns, left = args.value_dim - first, head = task / parts;
    auto* rows = static_cast<float*>(thread_scratch(thread, args.key_dim * kMemoryColumns * sizeof(float)));
    columns_of_head(args, lengths, head / args.heads, head % args.heads, first,
                    left < kMemoryColumns ? left : kMemoryColumns, rows);
  });
}
