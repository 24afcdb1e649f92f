// Packed copies of all queries may not fit the scratch memory. So queries are packed one window after the other: a
// window is some chunks of query sets, packed as columns once and read by all threads.
#pragma once
#include "sets.h"
#include "similarity.h"

namespace itm_fast {

constexpr int64_t WINDOW_BYTES = int64_t(16) << 20, CHUNK_BYTES = 224 * 4;  // of all chunks; of a chunk's one feature

// One window: its chunks of sets, and each chunk's rows as columns, in `panels` of the same index. Threads only read
// it.
template <class T>
struct QueryWindow {
  std::vector<Chunk> chunks;
  std::vector<Panels<T>> panels;
  int64_t widest = 0;

  int64_t count() const { return int64_t(chunks.size()); }
};

// Cuts the sets into chunks of at most `columns` rows, and the chunks into windows of at most `bytes_at_most` (one
// chunk at the least); packs one window after the other, on all threads, and runs body(window) on this thread.
template <class T, class Body>
void for_windows(const RowSets& queries, int64_t threads, Body body, int64_t bytes_at_most = WINDOW_BYTES,
                 int64_t columns = CHUNK_BYTES / int64_t(sizeof(T))) {
  const std::vector<Chunk> all = chunks(queries.edge.data(), queries.count(), columns);
  for (size_t next = 0; next < all.size();) {
    QueryWindow<T> window;
    for (int64_t bytes = 0; next < all.size(); ++next) {
      // A narrow chunk counts as a whole one.
      bytes += std::max(CHUNK_BYTES, all[next].rows * int64_t(sizeof(T))) * queries.D;
      if (bytes > bytes_at_most && window.count() > 0) break;
      window.chunks.push_back(all[next]);
      window.panels.emplace_back(all[next].rows, queries.D);
      window.widest = std::max(window.widest, all[next].rows);
    }
    parallel(window.count(), threads, [&] {
      return [&](int64_t c) {
        const Chunk& chunk = window.chunks[c];
        for (int64_t k = chunk.first; k < chunk.last; ++k)
          window.panels[c].read(queries.source, queries.first[k], queries.length(k), queries.D,
                                queries.edge[k] - chunk.begin);
      };
    });
    body(window);
  }
}

}  // namespace itm_fast
