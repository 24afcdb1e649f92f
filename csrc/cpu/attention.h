// Cross-attention of contexts (rows) with queries (columns): equations of itm_fast/ops/_attention.py.
//
// With t2i a context is an image's region and a query a caption's word, with i2t the other way round. Queries come in
// sets (a caption's words, an image's regions): affinities are normalised over the columns of a set.
#pragma once
#include "pack.h"

namespace itm_fast {

constexpr double SLOPE = 0.1, EPS = 1e-8;

inline bool clips(Norm norm) {
  return norm == Norm::CLIPPED_L2NORM || norm == Norm::CLIPPED_L1NORM || norm == Norm::CLIPPED;
}
inline bool squares(Norm norm) { return norm == Norm::L2NORM || norm == Norm::CLIPPED_L2NORM; }
inline bool over_queries(Norm norm) { return norm != Norm::CLIPPED && norm != Norm::NONE; }

// d [S], the gradient of y / (|y| + eps), becomes that of y; s is the quotient and `inverse` 1 / (|y| + eps). Both have
// zeros from S to a whole vector.
template <class T>
inline void backward_of_norm(T* d, int64_t S, const T* s, T inverse) {
  Vec<T> product{};
  for (int64_t k = 0; k < S; k += LANES<T>) product += load(s + k) * load(d + k);
  const T length = 1 / inverse - T(EPS), back = length > 0 ? sum<T>(product) / length : T(0);
  for (int64_t k = 0; k < S; k += LANES<T>) store(d + k, load(d + k) * inverse - load(s + k) * back);
}

template <class T>
inline Vec<T> clip(Vec<T> x) {
  return x > 0 ? x : x * T(SLOPE);
}

// A squared length below this share of its largest term is dominated by cancellation error, and is computed another
// way: CANCELLED of itm_fast/ops/_attention.py, which says why.
constexpr double CANCELLED = 1e-3;

// logit = scale * affinity norm of s, for n contexts and sets of queries with column bounds edge[0 .. sets]. Sets are
// read from their own first column on, so that their sums do not depend on where they lie. `factor` holds n values.
template <class T>
inline void logits(Norm norm, T scale, int64_t n, const int64_t* edge, int64_t sets, const T* s, T* logit,
                   int64_t ld, T* factor) {
  const int64_t origin = edge[0];
  if (!over_queries(norm)) {
    for (int64_t x = 0; x < n; ++x)
      for (int64_t j = 0; j < edge[sets] - origin; j += LANES<T>) {
        const Vec<T> a = load(s + x * ld + j);
        store(logit + x * ld + j, (norm == Norm::CLIPPED ? clip<T>(a) : a) * scale);
      }
    return;
  }
  for (int64_t set = 0; set < sets; ++set) {
    const int64_t begin = edge[set] - origin, length = edge[set + 1] - edge[set];
    const T* from = s + begin;
    T* to = logit + begin;  // the last vector may pass the set's end: the next set is written later
    if (norm == Norm::SOFTMAX) {
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

// The gradient of logits(): overwrites s with d s, given d = d logit, plus add(x, j), the gradient of whatever else
// depends on s.
template <class T, class Add>
inline void logits_backward(Norm norm, T scale, int64_t n, const int64_t* edge, int64_t sets, T* s, const T* d,
                            int64_t ld, Add add) {
  const bool cut = clips(norm), square = squares(norm);
  const int64_t origin = edge[0];
  for (int64_t set = 0; set < (over_queries(norm) ? sets : 1); ++set) {
    const int64_t begin = edge[set] - origin, end = (over_queries(norm) ? edge[set + 1] : edge[sets]) - origin;
    for (int64_t x = 0; x < n; ++x) {
      T* const at = s + x * ld;
      const T* const slope = d + x * ld;
      Vec<T> size{}, along{};
      T top = 0;
      if (norm == Norm::SOFTMAX) {
        Vec<T> highest = splat(-INFINITY + T(0));
        for (int64_t j = begin; j < end; j += LANES<T>)
          highest = max<T>(highest, select<T>(inside<T>(j, begin, end), load(at + j), highest));
        top = max<T>(highest);
      }
      for (int64_t j = begin; over_queries(norm) && j < end; j += LANES<T>) {
        const Vec<T> a = load(at + j), u = norm == Norm::SOFTMAX ? exp<T>(a - top) : cut ? clip<T>(a) : a;
        const Vec<T> part = norm == Norm::SOFTMAX ? u : square ? u * u : (u > 0 ? u : -u);
        const Vec<T> product = u * load(slope + j);
        const Vec<Int<T>> real = inside<T>(j, begin, end);
        size += select<T>(real, part, Vec<T>{});
        along += select<T>(real, product, Vec<T>{});
      }
      // logit = factor u. `back`: the gradient that reaches u through the norm, divided by u (l2), by u's sign (l1) or
      // by 1 (softmax).
      T factor = scale, back = 0;
      if (over_queries(norm)) {
        const T total = sum<T>(size), length = square ? std::sqrt(total) : total;
        factor = scale / (norm == Norm::SOFTMAX ? total : length + T(EPS));
        if (norm == Norm::SOFTMAX) back = -sum<T>(along) / total;
        else if (length > 0) back = -sum<T>(along) * factor / (length + T(EPS)) / (square ? length : T(1));
      }
      for (int64_t j = begin; j < end; j += LANES<T>) {
        const Vec<T> a = load(at + j), g = load(slope + j);
        Vec<T> change;
        if (norm == Norm::SOFTMAX) {
          change = exp<T>(a - top) * factor * (g + back);
        } else {
          change = g * factor;
          if (square) change += back * (cut ? clip<T>(a) : a);
          else if (over_queries(norm)) change += a > 0 ? splat(back) : a < 0 ? splat(-back) : Vec<T>{};
          if (cut) change = a > 0 ? change : change * T(SLOPE);
        }
        store(at + j, select<T>(inside<T>(j, begin, end), change + add(x, j), a));
      }
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
