// Attention inside packed segments, no mask within them.

// The positions of a segment that are asked for.
struct SegmentQueries {
  int begin, end;
  SegmentQueries(const VarlenAttentionArgs& args, int segment) {
    const int start = args.starts[segment], stop = args.starts[segment + 1], last = args.first_query + args.queries;
    begin = start > args.first_query ? start : args.first_query;
    end = stop < last ? stop : last;
    if (end < begin) end = begin;
  }
  int count() const { return end - begin; }
};

// Cuts count(segment) things of every segment into tiles of `size`; first[segments + 1] gets the first tile of each.
template <class Count>
static void cut_segments(const VarlenAttentionArgs& args, int size, int* first, const Count& count) {
  first[0] = 0;
  for (int i = 0; i < args.segments; ++i) first[i + 1] = first[i] + (count(i) + size - 1) / size;
}

// Rows [row0, row0 + rows) of args.q and args.out, all of one segment.
struct QueryTile {
  int segment, head, row0, rows;
};

// attend(tile, thread) for the queries of all heads and segments. Tiles of one head follow each other: its keys and values
// stay in the caches. `first` is room for [segments + 1].
template <class Attend>
static void for_query_tiles(const VarlenAttentionArgs& args, int* first, const Attend& attend) {
  cut_segments(args, kQueryRows, first, [&](int i) { return SegmentQueries(args, i).count(); });
  const int tiles = first[args.segments];
  parallel(tiles * args.heads, [&](int task, int thread) {
    const int head = task / tiles, tile = task % tiles;
    const int segment = find_owner(first, args.segments, tile), index = tile - first[segment];
    const SegmentQueries queries(args, segment);
    const int n = queries.count(), parts = first[segment + 1] - first[segment];
    const int row0 = (int)((int64_t)n * index / parts), row1 = (int)((int64_t)n * (index + 1) / parts);
    attend(QueryTile{segment, head, queries.begin - args.first_query + row0, row1 - row0}, thread);
  });
}

#ifdef DI_AVX512_BF16
#include "varlen_bf16.h"
#endif

static void attend_segment(const VarlenAttentionArgs& args, const QueryTile& tile, int thread) {
  AttentionTile t = make_tile(thread, args.head_dim);
  const int start = args.starts[tile.segment], keys = args.starts[tile.segment + 1] - start;
  t.rows = tile.rows;
  for (int r = 0; r < t.rows; ++r)
    set_query(t, r, args.q + (int64_t)(tile.row0 + r) * args.q_strides[0] + tile.head * args.q_strides[1], args.scale,
              keys);
  begin_rows(t);
  const float *key_rows[kKeyTile], *value_rows[kKeyTile];
  for (int key0 = 0; key0 < keys; key0 += kKeyTile) {
    const int count = keys - key0 < kKeyTile ? keys - key0 : kKeyTile;
    for (int k = 0; k < count; ++k) {
      key_rows[k] = args.k + (int64_t)(start + key0 + k) * args.k_strides[0] + tile.head * args.k_strides[1];
      value_rows[k] = args.v + (int64_t)(start + key0 + k) * args.v_strides[0] + tile.head * args.v_strides[1];
    }
    attend_packed(t, key_rows, value_rows, key0, count);
  }
  for (int r = 0; r < t.rows; ++r)
    write_row(t, r, args.out + (int64_t)(tile.row0 + r) * args.out_strides[0] + tile.head * args.out_strides[1]);
}

static void varlen_attention(const VarlenAttentionArgs& args) {
#ifdef DI_AVX512_BF16
  if (args.bfloat16) return bfloat_varlen_attention(args);
#endif
  int* first = static_cast<int*>(shared_scratch((args.segments + 1) * sizeof(int)));
  for_query_tiles(args, first, [&](const QueryTile& tile, int thread) { attend_segment(args, tile, thread); });
}
