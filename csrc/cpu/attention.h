// Cross-attention of contexts (rows) with queries (columns): equations of itm_fast/ops/_attention.py.
//
// With t2i a context is an image's region and a query a caption's word, with i2t the other way round. Queries come in
// sets (a caption's words, an image's regions): affinities are normalised over the columns of a set.
#pragma once
#include "pack.h"

namespace itm_fast {

enum Norm : int64_t { SOFTMAX, L2NORM, CLIPPED_L2NORM, L1NORM, CLIPPED_L1NORM, CLIPPED, NONE };  // ops/_attention.py
constexpr double SLOPE = 0.1, EPS = 1e-8;

inline bool clips(int64_t norm) { return norm == CLIPPED_L2NORM || norm == CLIPPED_L1NORM || norm == CLIPPED; }
inline bool squares(int64_t norm) { return norm == L2NORM || norm == CLIPPED_L2NORM; }
inline bool over_queries(int64_t norm) { return norm != CLIPPED && norm != NONE; }

template <class T>
inline Vec<T> clip(Vec<T> x) {
  return x > 0 ? x : x * T(SLOPE);
}

// logit = scale * affinity norm of s, for n contexts and sets of queries with column bounds edge[0 .. sets]. Sets are
// read from their own first column on, so that their sums do not depend on where they lie. `factor` holds n values.
template <class T>
inline void logits(int64_t norm, T scale, int64_t n, const int64_t* edge, int64_t sets, const T* s, T* logit,
                   int64_t ld, T* factor) {
  const int64_t origin = edge[0];
  if (!over_queries(norm)) {
    for (int64_t x = 0; x < n; ++x)
      for (int64_t j = 0; j < edge[sets] - origin; j += LANES<T>) {
        const Vec<T> a = load(s + x * ld + j);
        store(logit + x * ld + j, (norm == CLIPPED ? clip<T>(a) : a) * scale);
      }
    return;
  }
  for (int64_t set = 0; set < sets; ++set) {
    const int64_t begin = edge[set] - origin, length = edge[set + 1] - edge[set];
    const T* from = s + begin;
    T* to = logit + begin;  // the last vector may pass the set's end: the next set is written later
    if (norm == SOFTMAX) {
      for (int64_t x = 0; x < n; ++x, from += ld, to += ld) {
        Vec<T> top = splat(-INFINITY + T(0)), total{};
        for (int64_t j = 0; j < length; j += LANES<T>)
          top = max<T>(top, select<T>(inside<T>(j, 0, length), load(from + j), top));
        const T highest = max<T>(top);
        for (int64_t j = 0; j < length; j += LANES<T>) {
          const Vec<T> e = exp<T>(load(from + j) - highest);
          store(to + j, e);
          total += select<T>(inside<T>(j, 0, length), e, Vec<T>{});
        }
        const T weight = scale / sum<T>(total);
        for (int64_t j = 0; j < length; j += LANES<T>) store(to + j, load(to + j) * weight);
      }
      continue;
    }
    const bool cut = clips(norm), square = squares(norm);
    for (int64_t x = 0; x < n; ++x) {
      Vec<T> total{};
      for (int64_t j = 0; j < length; j += LANES<T>) {
        Vec<T> a = load(from + x * ld + j);
        if (cut) a = clip<T>(a);
        a = square ? a * a : (a > 0 ? a : -a);
        total += j + LANES<T> <= length ? a : select<T>(inside<T>(j, 0, length), a, Vec<T>{});
      }
      factor[x] = sum<T>(total);
    }
    for (int64_t x = 0; x < n; x += LANES<T>) {
      const Vec<T> total = load(factor + x);
      store(factor + x, scale / ((square ? root(total) : total) + T(EPS)));
    }
    for (int64_t x = 0; x < n; ++x)
      for (int64_t j = 0; j < length; j += LANES<T>) {
        const Vec<T> a = load(from + x * ld + j);
        store(to + x * ld + j, (cut ? clip<T>(a) : a) * factor[x]);
      }
  }
}

// Softmax over the n contexts, column by column, in place, without the division: total[column] is the sum of the
// weights, which divides whatever is made of them.
template <class T>
inline void exponentials(int64_t n, int64_t columns, T* logit, int64_t ld, T* total) {
  for (int64_t j = 0; j < columns; j += LANES<T>) {
    Vec<T> top = load(logit + j), all{};
    for (int64_t x = 1; x < n; ++x) top = max<T>(top, load(logit + x * ld + j));
    for (int64_t x = 0; x < n; ++x) {
      const Vec<T> e = exp<T>(load(logit + x * ld + j) - top);
      store(logit + x * ld + j, e);
      all += e;
    }
    store(total + j, all);
  }
}

}  // namespace itm_fast
