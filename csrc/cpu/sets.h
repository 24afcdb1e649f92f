// Images' regions or captions' words: sets of rows that become contexts or columns, and windows of them.
#pragma once
#include "similarity.h"

namespace itm_fast {

constexpr int64_t WINDOW_BYTES = int64_t(16) << 20, CHUNK_BYTES = 224 * 4;  // of all chunks; of a chunk's one feature

struct RowSets {
  Source source;
  std::vector<int64_t> first;  // [sets] row of the tensor that a set begins with
  std::vector<int64_t> edge;   // [sets + 1] the sets' bounds when their rows are counted one after the other
  int64_t most = 0;            // rows of the largest

  int64_t count() const { return int64_t(first.size()); }
  int64_t length(int64_t set) const { return edge[set + 1] - edge[set]; }
};

// The valid regions of images [I, R, D]; `lengths` may be null.
inline RowSets regions(Source image, int64_t I, int64_t R, const int64_t* lengths) {
  RowSets sets{image, std::vector<int64_t>(I), std::vector<int64_t>(I + 1)};
  for (int64_t i = 0; i < I; ++i) {
    sets.first[i] = i * R;
    sets.edge[i + 1] = sets.edge[i] + (lengths ? lengths[i] : R);
    sets.most = std::max(sets.most, sets.length(i));
  }
  return sets;
}

// The words [N, D] of T captions.
inline RowSets captions(Source words, int64_t T, const int64_t* cu_seqlens) {
  RowSets sets{words, {cu_seqlens, cu_seqlens + T}, {cu_seqlens, cu_seqlens + T + 1}};
  for (int64_t t = 0; t < T; ++t) sets.most = std::max(sets.most, sets.length(t));
  return sets;
}

// Every row of a tensor as a set of its own.
inline RowSets single_rows(Source source, int64_t count) {
  RowSets sets{source, std::vector<int64_t>(count), std::vector<int64_t>(count + 1), 1};
  for (int64_t k = 0; k < count; ++k) sets.first[k] = k, sets.edge[k + 1] = k + 1;
  return sets;
}

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
void for_windows(const RowSets& queries, int64_t D, int64_t threads, Body body, int64_t bytes_at_most = WINDOW_BYTES,
                 int64_t columns = CHUNK_BYTES / int64_t(sizeof(T))) {
  const std::vector<Chunk> all = chunks(queries.edge.data(), queries.count(), columns);
  for (size_t next = 0; next < all.size();) {
    QueryWindow<T> window;
    for (int64_t bytes = 0; next < all.size(); ++next) {
      bytes += std::max(CHUNK_BYTES, all[next].rows * int64_t(sizeof(T))) * D;  // a narrow chunk counts as a whole one
      if (bytes > bytes_at_most && window.count() > 0) break;
      window.chunks.push_back(all[next]);
      window.panels.emplace_back(all[next].rows, D);
      window.widest = std::max(window.widest, all[next].rows);
    }
    parallel(window.count(), threads, [&] {
      return [&](int64_t c) {
        const Chunk& chunk = window.chunks[c];
        for (int64_t k = chunk.first; k < chunk.last; ++k)
          window.panels[c].read(queries.source, queries.first[k], queries.length(k), D, queries.edge[k] - chunk.begin);
      };
    });
    body(window);
  }
}

}  // namespace itm_fast
