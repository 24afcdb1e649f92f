// Windows of query sets, packed as columns.
#pragma once
#include "sets.h"
#include "similarity.h"

namespace itm_fast {

constexpr int64_t WINDOW_BYTES = int64_t(16) << 20, CHUNK_BYTES = 224 * 4;  // of all chunks; of a chunk's one feature

// Some chunks of sets, packed as columns for all threads.
template <class T>
struct QueryWindow {
  std::vector<Chunk> chunks;
  std::vector<Panels<T>> panels;
  int64_t widest = 0;

  int64_t count() const { return int64_t(chunks.size()); }
};

// Runs body(window) for windows that follow each other: of `bytes_at_most`, one chunk at the least.
template <class T, class Body>
void for_windows(const RowSets& queries, int64_t threads, Body body, int64_t bytes_at_most = WINDOW_BYTES,
                 int64_t columns = CHUNK_BYTES / int64_t(sizeof(T))) {
  const std::vector<Chunk> all = chunks(queries.edge.data(), queries.count(), columns);
  for (size_t next = 0; next < all.size();) {
    QueryWindow<T> window;
    for (int64_t bytes = 0; next < all.size(); ++next) {
      bytes += std::max(CHUNK_BYTES, all[next].rows * int64_t(sizeof(T))) * queries.D;  // a narrow chunk counts as a whole one
      if (bytes > bytes_at_most && window.count() > 0) break;
      window.chunks.push_back(all[next]);
      window.panels.emplace_back(all[next].rows, queries.D);
      window.widest = std::max(window.widest, all[next].rows);
    }
    parallel(window.count(), threads, [&] {
      return [&](int64_t c) {
        const Chunk& chunk = window.chunks[c];
        for (int64_t k = chunk.first; k < chunk.last; ++k)
          window.panels[c].read(queries.source, queries.first[k], queries.length(k), queries.D, queries.edge[k] - chunk.begin);
      };
    });
    body(window);
  }
}

}  // namespace itm_fast
