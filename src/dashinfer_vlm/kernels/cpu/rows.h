// Loops over rows and columns that the row-wise kernels share.

constexpr int64_t kElementsPerTask = 16384;  // below this, sharing the work costs more than doing it

// Runs body(row) for every row; several rows per task so that a task is worth handing out.
template <class Body>
DI_INLINE void for_rows(int rows, int64_t row_elements, const Body& body) {
  const int64_t per_task = kElementsPerTask / row_elements + 1;
  const int tasks = (int)((rows + per_task - 1) / per_task);
  parallel(tasks, [&](int task, int) {
    const int end = (int)((int64_t)rows * (task + 1) / tasks);
    for (int row = (int)((int64_t)rows * task / tasks); row < end; ++row) body(row);
  });
}

// Applies f(column, lanes) to whole vectors and to the tail.
template <class F>
DI_INLINE void for_columns(int width, const F& f) {
  int c = 0;
  for (; c + 8 <= width; c += 8) f(c, 8);
  if (c < width) f(c, width - c);
}

DI_INLINE F8 load_lanes(const float* p, int n) { return n == 8 ? load(p) : load_first(p, n); }
DI_INLINE void store_lanes(float* p, F8 v, int n) { n == 8 ? store(p, v) : store_first(p, v, n); }

DI_INLINE int padded(int n, int to) { return (n + to - 1) / to * to; }
