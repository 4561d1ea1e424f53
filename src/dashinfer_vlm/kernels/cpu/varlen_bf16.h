// The bf16 form of varlen_attention.

// Keys and values of all heads and segments: packed once, read by every tile of queries.
struct SegmentPanels {
  const VarlenAttentionArgs& args;
  const int* first;  // [segments + 1] first tile of each segment; those without queries have none
  char* data;        // [heads][keys of all segments, each padded to whole panels], in tiles of kKeyTile

  int tiles() const { return first[args.segments]; }
  int64_t place(int segment) const { return (int64_t)(args.starts[segment] / kPanel + segment) * kPanel; }
  int64_t bytes() const { return 2 * bfloat_panel_bytes(place(args.segments), args.head_dim) * args.heads; }

  int first_key(int segment, int index) const { return args.starts[segment] + index * kKeyTile; }
  BfloatKeys tile(int head, int segment, int index) const {
    const int left = args.starts[segment + 1] - first_key(segment, index);
    BfloatKeys tile{left < kKeyTile ? left : kKeyTile, nullptr, nullptr};
    const int64_t at = head * place(args.segments) + place(segment) + index * kKeyTile;
    tile.keys = data + 2 * bfloat_panel_bytes(at, args.head_dim);
    tile.values = tile.keys + bfloat_panel_bytes(padded(tile.count, kPanel), args.head_dim);
    return tile;
  }
};

static void pack_segment_tile(const SegmentPanels& panels, int head, int tile_index) {
  const VarlenAttentionArgs& args = panels.args;
  const int segment = find_owner(panels.first, args.segments, tile_index), index = tile_index - panels.first[segment];
  const int64_t key0 = panels.first_key(segment, index);
  const BfloatKeys tile = panels.tile(head, segment, index);
  const float* k = args.k + key0 * args.k_strides[0] + head * args.k_strides[1];
  const float* v = args.v + key0 * args.v_strides[0] + head * args.v_strides[1];
  pack_bfloat_keys(tile, args.head_dim, [&](int i) { return k + i * args.k_strides[0]; });
  pack_bfloat_values(tile, args.head_dim, [&](int i) { return v + i * args.v_strides[0]; });
}

static void attend_segment(const SegmentPanels& panels, const QueryTile& queries, int thread) {
  const VarlenAttentionArgs& args = panels.args;
  const int segment = queries.segment, keys = args.starts[segment + 1] - args.starts[segment];
  BfloatTile t = make_bfloat_tile(thread, args.head_dim);
  begin_rows(t, queries.rows);
  for (int r = 0; r < t.rows; ++r)
    set_query(t, r, args.q + (queries.row0 + r) * args.q_strides[0] + queries.head * args.q_strides[1], args.scale, keys);
  for (int i = 0; i * kKeyTile < keys; ++i) attend_bfloat(t, panels.tile(queries.head, segment, i), i * kKeyTile);
  for (int r = 0; r < t.rows; ++r)
    write_row(t, r, args.out + (queries.row0 + r) * args.out_strides[0] + queries.head * args.out_strides[1]);
}

static void bfloat_varlen_attention(const VarlenAttentionArgs& args) {
  const int64_t index_bytes = padded(2 * (args.segments + 1) * (int)sizeof(int), 64);
  SegmentPanels panels{args, nullptr, nullptr};
  char* shared = static_cast<char*>(shared_scratch(index_bytes + panels.bytes()));
  int *first_of_queries = reinterpret_cast<int*>(shared), *first = first_of_queries + args.segments + 1;
  cut_segments(args, kKeyTile, first, [&](int i) {
    return SegmentQueries(args, i).count() > 0 ? args.starts[i + 1] - args.starts[i] : 0;
  });
  panels.first = first;
  panels.data = shared + index_bytes;
  parallel(args.heads * panels.tiles(), [&](int task, int) {
    pack_segment_tile(panels, task / panels.tiles(), task % panels.tiles());
  });
  for_query_tiles(args, first_of_queries,
                  [&](const QueryTile& tile, int thread) { attend_segment(panels, tile, thread); });
}
