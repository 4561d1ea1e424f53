// From logits to tokens, row by row: penalties, then truncation, then one draw. The reference is layers/sampling.py.
//
// A row is looked at in spans. The largest logit of each is found in the one pass that reads memory; everything behind it
// looks only at spans that can hold a candidate, which are few where top_k, top_p or min_p leaves few tokens.

constexpr int kSpan = 128;

// A row in spans; the last one is filled up with -inf.
struct Spans {
  const float* row;
  int width;
  int count;
  float last[kSpan];

  DI_INLINE_MEMBER Spans(const float* row, int width) : row(row), width(width), count((width + kSpan - 1) / kSpan) {
    const int first = (count - 1) * kSpan;
    for (int i = 0; i < kSpan; ++i) last[i] = first + i < width ? row[first + i] : -INFINITY;
  }
  DI_INLINE_MEMBER const float* operator[](int span) const { return span + 1 < count ? row + span * kSpan : last; }
  DI_INLINE_MEMBER int size(int span) const { return span + 1 < count ? kSpan : width - span * kSpan; }
};

// What a thread needs for one row; all of them as wide as the row, in whole spans, and one element more.
struct SampleBuffers {
  float* copy;
  float* values;   // of candidates: logits first, then weights
  float* order;    // the same values, in any order
  int32_t* ids;    // of candidates, rising
  float* largest;  // of each span
  float* sums;     // of each span's weights

  DI_INLINE_MEMBER SampleBuffers(int thread, int width) {
    const size_t size = (size_t)(width + kSpan) / kSpan * kSpan + kSpan;
    float* memory = static_cast<float*>(thread_scratch(thread, 6 * size * sizeof(float)));
    copy = memory;
    values = memory + size;
    order = memory + 2 * size;
    ids = reinterpret_cast<int32_t*>(memory + 3 * size);
    largest = memory + 4 * size;
    sums = memory + 5 * size;
  }
};

// Fills `largest` for every span and returns the largest of all; NaN where any logit is NaN.
static float find_largest(const Spans& spans, float* largest) {
  I8 nan = {};
  float top = -INFINITY;
  for (int s = 0; s < spans.count; ++s) {
    const float* x = spans[s];
    F8 even = splat(-INFINITY), odd = even;
    DI_UNROLL for (int i = 0; i < kSpan; i += 16) {
      const F8 a = load(x + i), b = load(x + i + 8);
      nan |= (I8)(a != a) | (I8)(b != b);
      even = max(even, a);
      odd = max(odd, b);
    }
    largest[s] = max_lane(max(even, odd));
    top = largest[s] > top ? largest[s] : top;
  }
  for (int i = 0; i < 8; ++i)
    if (nan[i]) return NAN;
  return top;
}

static int first_equal(const Spans& spans, const float* largest, float value) {
  int s = 0;
  while (largest[s] != value) ++s;
  int i = 0;
  while (spans[s][i] != value) ++i;
  return s * kSpan + i;
}

// Bit i says whether lane i of a is at least that of b.
DI_INLINE unsigned at_least(F8 a, F8 b) {
#ifdef __AVX__
  return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#else
  unsigned lanes = 0;
  for (int i = 0; i < 8; ++i) lanes |= (unsigned)(a[i] >= b[i]) << i;
  return lanes;
#endif
}

// Candidates are the logits from `least` up, in order; returns how many there are.
static int gather(const Spans& spans, float least, const SampleBuffers& b) {
  int n = 0;
  for (int s = 0; s < spans.count; ++s) {
    if (!(b.largest[s] >= least)) continue;
    const float* x = spans[s];
    const int size = spans.size(s);
    for (int i = 0; i < size; i += 8) {
      unsigned lanes = at_least(load(x + i), splat(least));
      if (size - i < 8) lanes &= (1u << (size - i)) - 1;
      for (; lanes; lanes &= lanes - 1) {
        const int at = i + __builtin_ctz(lanes);
        b.values[n] = x[at];
        b.ids[n++] = s * kSpan + at;
      }
    }
  }
  return n;
}

// Keeps every value above `least`, and of those that equal it the first `equal`.
struct Cut {
  float least;
  int equal;
};

DI_INLINE float middle(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}

// The fewest of n >= 1 values, the largest first, that make up `goal`: by their number, or by their sum. At least one.
// Larger values elsewhere are `kept` already. Moves the values about (Hoare's selection with three parts).
template <bool by_sum>
static Cut find_cut(float* v, int n, double goal, double kept = 0) {
  int low = 0, high = n;  // those before `low` are kept, those from `high` on are not
  for (;;) {
    const float pivot = middle(v[low], v[low + (high - low) / 2], v[high - 1]);
    int above = low, at = low, below = high;
    double sum = 0;
    while (at < below) {
      const float x = v[at];
      if (x > pivot) {
        v[at++] = v[above];
        v[above++] = x;
        sum += by_sum ? x : 1;
      } else if (x < pivot) {
        v[at] = v[--below];
        v[below] = x;
      } else {
        ++at;
      }
    }
    if (above > low && kept + sum >= goal) {
      high = above;
      continue;
    }
    kept += sum;
    const int equal = below - above;
    const double each = by_sum ? pivot : 1, reached = kept + each * equal;
    if (reached >= goal || below == high) {
      if (reached <= goal || !(each > 0)) return {pivot, equal};
      const int needed = (int)ceil((goal - kept) / each);
      return {pivot, needed < 1 ? 1 : needed > equal ? equal : needed};
    }
    kept = reached;
    low = below;
  }
}

static int keep(const SampleBuffers& b, int n, Cut cut) {
  int kept = 0;
  for (int i = 0; i < n; ++i) {  // without a branch: which are kept cannot be foreseen
    const float value = b.values[i];
    const bool equal = value == cut.least;
    b.values[kept] = value;
    b.ids[kept] = b.ids[i];
    kept += (value > cut.least) | (equal & (cut.equal > 0));
    cut.equal -= equal;
  }
  return kept;
}

// Candidates are the k largest logits; of equal ones the first.
static int keep_largest(const Spans& spans, int k, const SampleBuffers& b) {
  float least = -INFINITY;
  if (k <= spans.count) {  // as many spans hold one from there on, at least
    __builtin_memcpy(b.order, b.largest, spans.count * sizeof(float));
    least = find_cut<false>(b.order, spans.count, k).least;
  }
  const int n = gather(spans, least, b);
  if (n <= k) return n;
  __builtin_memcpy(b.order, b.values, n * sizeof(float));
  return keep(b, n, find_cut<false>(b.order, n, k));
}

// Probability of a logit, but for a factor that makes the largest 1.
struct Weigh {
  float top;
  float scale;
  DI_INLINE_MEMBER F8 operator()(F8 x) const { return exp((x - splat(top)) * splat(scale)); }
};

static double sum_spans(const Spans& spans, const Weigh& weigh, float* sums) {
  double total = 0;
  for (int s = 0; s < spans.count; ++s) {
    const float* x = spans[s];
    F8 even = splat(0.f), odd = even;
    for (int i = 0; i < kSpan; i += 16) {
      even += weigh(load(x + i));
      odd += weigh(load(x + i + 8));
    }
    sums[s] = sum(even + odd);
    total += sums[s];
  }
  return total;
}

static void weigh_candidates(const Weigh& weigh, float* values, int n) {
  for_columns(n, [&](int c, int lanes) { store_lanes(values + c, weigh(load_lanes(values + c, lanes)), lanes); });
}

// In spans, as all sums of weights.
static double sum_of(const float* values, int n) {
  double total = 0;
  for (int first = 0; first < n; first += kSpan) {
    F8 span = splat(0.f);
    for_columns(n - first < kSpan ? n - first : kSpan,
                [&](int c, int lanes) { span += load_lanes(values + first + c, lanes); });
    total += sum(span);
  }
  return total;
}

// Weights from 0 to 1 in classes, eight to an octave: their order is that of the weights.
constexpr int kClasses = (127 << 3) + 1;

DI_INLINE int class_of(float weight) {
  uint32_t bits;
  __builtin_memcpy(&bits, &weight, sizeof bits);
  const int c = (int)(bits >> 20);
  return c < kClasses ? c : kClasses - 1;  // 1 + a rounding error
}

// find_cut for many weights, of which it looks closely at one class only: the parting of all is slow, since no branch of
// it can be foreseen.
static Cut find_nucleus(float* weights, int n, double goal) {
  double sums[kClasses] = {};
  for (int i = 0; i < n; ++i) sums[class_of(weights[i])] += weights[i];
  double kept = 0;
  int at = kClasses - 1, lowest = 0;
  while (!(sums[lowest] > 0)) ++lowest;
  for (; at > lowest && !(sums[at] > 0 && kept + sums[at] >= goal); --at) kept += sums[at];
  int count = 0;
  for (int i = 0; i < n; ++i) {
    const float weight = weights[i];
    weights[count] = weight;
    count += class_of(weight) == at;
  }
  return find_cut<true>(weights, count, goal, kept);
}

// Candidates are weights; those that make up the share top_p of `total` stay.
static int keep_nucleus(const SampleBuffers& b, int n, double top_p, double total) {
  __builtin_memcpy(b.order, b.values, n * sizeof(float));
  const double goal = top_p * total;
  return keep(b, n, n < kClasses ? find_cut<true>(b.order, n, goal) : find_nucleus(b.order, n, goal));
}

// Never the sum itself, whatever was rounded: what lies behind the last weight above 0 must not be drawn.
DI_INLINE double passed_mass(float uniform, double total) {
  const double passed = uniform * total, most = total * (1 - 0x1p-52);
  return passed < most ? passed : most;
}

static int draw(const SampleBuffers& b, int n, float uniform) {
  const double passed = passed_mass(uniform, sum_of(b.values, n));
  double mass = 0;
  int last = 0;  // with a weight
  for (int i = 0; i < n; ++i) {
    mass += b.values[i];
    if (mass > passed) return b.ids[i];
    if (b.values[i] > 0) last = i;
  }
  return b.ids[last];
}

static int draw_from_all(const Spans& spans, const Weigh& weigh, const float* sums, double total, float uniform) {
  const double passed = passed_mass(uniform, total);
  double mass = 0;
  int span = 0, last = 0;
  for (; span < spans.count; ++span) {
    if (sums[span] > 0) last = span;
    if (mass + sums[span] > passed) break;
    mass += sums[span];
  }
  if (span == spans.count) span = last;
  float weights[kSpan];
  for (int i = 0; i < kSpan; i += 8) store(weights + i, weigh(load(spans[span] + i)));
  last = 0;
  for (int i = 0; i < kSpan; ++i) {
    mass += weights[i];
    if (weights[i] > 0) last = i;
    if (mass > passed) break;
  }
  return span * kSpan + last;
}

static int choose_from(const ChooseArgs& args, int row, const Spans& spans, float top, const SampleBuffers& b) {
  if (args.temperature[row] == 0) return first_equal(spans, b.largest, top);
  const Weigh weigh{top, 1.f / args.temperature[row]};
  const int top_k = args.top_k[row];
  const float top_p = args.top_p[row], min_p = args.min_p[row], uniform = args.uniform[row];
  int n;
  double total = 0;
  if (top_k > 0 && top_k < spans.width) {
    n = keep_largest(spans, top_k, b);
  } else if (min_p > 0 || top_p < 1) {
    float share = min_p;
    if (!(min_p > 0)) {  // all that weigh less than an equal part of the rest weigh less than the rest together
      total = sum_spans(spans, weigh, b.sums);
      share = (float)((1 - (double)top_p) / spans.width * total);
    }
    // a little lower: what weighs too little by rounding alone is sorted out below
    n = gather(spans, top + logf(share) / weigh.scale - 1e-3f / weigh.scale - 1e-6f * fabsf(top), b);
  } else {
    return draw_from_all(spans, weigh, b.sums, sum_spans(spans, weigh, b.sums), uniform);
  }
  weigh_candidates(weigh, b.values, n);
  if (min_p > 0) n = keep(b, n, {min_p, n});
  if (top_p < 1) n = keep_nucleus(b, n, top_p, total > 0 ? total : sum_of(b.values, n));
  return draw(b, n, uniform);
}

static void forbid_masked(const uint32_t* words, float* x, int width) {
  for (int first = 0; first < width; first += 32) {
    const uint32_t word = words[first / 32];
    if (word == ~0u) continue;
    const int n = width - first < 32 ? width - first : 32;
    for (int i = 0; i < n; ++i) x[first + i] = word >> i & 1 ? x[first + i] : -INFINITY;
  }
}

static void shape_row(const ChooseArgs& args, int row, float* x) {
  for (int i = args.bias_starts[row]; i < args.bias_starts[row + 1]; ++i) x[args.bias_ids[i]] += args.biases[i];
  const float repetition = args.repetition[row], presence = args.presence[row], frequency = args.frequency[row];
  for (int i = args.seen_starts[row]; i < args.seen_starts[row + 1]; ++i) {
    const float count = (float)args.seen_counts[i];
    float& logit = x[args.seen_ids[i]];
    const float divided = logit / repetition, multiplied = logit * repetition;  // both: signs cannot be foreseen
    logit = (logit > 0 ? divided : multiplied) - (count > 0 ? presence + frequency * count : 0.f);
  }
  for (int i = args.forbidden_starts[row]; i < args.forbidden_starts[row + 1]; ++i) x[args.forbidden_ids[i]] = -INFINITY;
  if (args.mask) forbid_masked(args.mask + row * args.mask_stride, x, args.width);
}

static bool is_shaped(const ChooseArgs& args, int row) {
  return args.mask || args.bias_starts[row] < args.bias_starts[row + 1] ||
         args.seen_starts[row] < args.seen_starts[row + 1] || args.forbidden_starts[row] < args.forbidden_starts[row + 1];
}

static int choose_row(const ChooseArgs& args, int row, const SampleBuffers& b) {
  const float* source = args.logits + row * args.logits_stride;
  const Spans plain(source, args.width);
  float top = find_largest(plain, b.largest);
  if (!(top - top == 0)) return kNotANumber;  // infinite ones are none either
  if (!is_shaped(args, row)) return choose_from(args, row, plain, top, b);
  __builtin_memcpy(b.copy, source, args.width * sizeof(float));
  shape_row(args, row, b.copy);
  const Spans shaped(b.copy, args.width);
  top = find_largest(shaped, b.largest);
  if (top == -INFINITY) return kNothingAllowed;
  return top - top == 0 ? choose_from(args, row, shaped, top, b) : kNotANumber;
}

static void choose(const ChooseArgs& args) {
  parallel(args.rows, [&](int row, int thread) {
    args.tokens[row] = choose_row(args, row, SampleBuffers(thread, args.width));
  });
}

static int rank_of(const Spans& spans, const float* largest, float value) {
  int rank = 1;
  for (int s = 0; s < spans.count; ++s) {
    if (!(largest[s] > value)) continue;
    const float* x = spans[s];
    for (int i = 0; i < kSpan; ++i) rank += x[i] > value;
  }
  return rank;
}

// Best first, of equal ones the first; n is small.
static void sort_by_value(const SampleBuffers& b, int n) {
  for (int i = 1; i < n; ++i) {
    const float value = b.values[i];
    const int32_t id = b.ids[i];
    int j = i;
    for (; j > 0 && b.values[j - 1] < value; --j) {
      b.values[j] = b.values[j - 1];
      b.ids[j] = b.ids[j - 1];
    }
    b.values[j] = value;
    b.ids[j] = id;
  }
}

static void likeliest_of_row(const LikeliestArgs& args, int i, const SampleBuffers& b) {
  const float* x = args.logits + args.row_ids[i] * args.logits_stride;
  const Spans spans(x, args.width);
  const float top = find_largest(spans, b.largest);
  args.log_totals[i] = (float)log(sum_spans(spans, {top, 1.f}, b.sums));
  args.largest[i] = top;
  args.ranks[i] = rank_of(spans, b.largest, x[args.tokens[i]]);
  if (!args.num_top) return;
  const int n = keep_largest(spans, args.num_top, b);
  sort_by_value(b, n);
  __builtin_memcpy(args.top_ids + (int64_t)i * args.num_top, b.ids, n * sizeof(int32_t));
}

static void likeliest(const LikeliestArgs& args) {
  parallel(args.rows, [&](int i, int thread) { likeliest_of_row(args, i, SampleBuffers(thread, args.width)); });
}
