// What the forward and the backward pass of cross_attention_score share: weights and similarities of one context set
// with the queries of a chunk, and their pooling.
#pragma once
#include <limits>

#include "cross_attention_rows.h"

namespace itm_fast {

// One thread's scratch for a block of contexts with a chunk of queries, and the functions that fill it, from affinities
// to cosines and pooled scores.
template <class T>
struct Cosines {
  const Problem& problem;
  int64_t ld;
  Buffer<T> s, weight, factor, total, dot, square, r, attended;
  std::vector<int64_t> exact;  // columns whose |P|^2 came from P itself

  Cosines(const Problem& problem, int64_t rows, int64_t set_rows, int64_t columns)
      : problem(problem), ld(padded<T>(columns)), s(round_up(rows, ROW_STEP) * ld),
        weight(round_up(set_rows, ROW_STEP) * ld), factor(set_rows), total(ld), dot(ld), square(ld), r(ld),
        attended(problem.context.D) {}

  // A of ops/_attention.py for all the block's rows.
  template <class E>
  void affinities(const Block<T, E>& block, const Window<T, E>& window, int64_t c) {
    const int64_t columns = window.chunks[c].rows, K = window.K;
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS<T>)
      gemm<E>(block.run.rows, least(TILE_COLUMNS<T>, columns - j), K, Left<E>{block.packed, 0},
              Right<E>{window.panels + (window.column[c] + j) * K, TILE_COLUMNS<T>,
                       window.panels + window.after(c, j) * K},
              [](int64_t, int64_t) { return Vec<T>{}; },
              [&](int64_t i, int64_t jj, Vec<T> v) { store(s + i * ld + j + jj, v); });
  }

  // The columns of a chunk for a block's rows in the affinities of all contexts and queries: `visit(own, whole)` gets a
  // row of `s` and the same row there.
  template <class E, class A, class Visit>
  void each_row(const Block<T, E>& block, const Chunk& chunk, A* all, Visit visit) {
    for (int64_t i = 0; i < block.run.rows; ++i)
      visit(s + i * ld, all + (block.run.begin + i) * problem.query.edge.back() + chunk.begin);
  }
  template <class E>
  void keep_affinities(const Block<T, E>& block, const Chunk& chunk, T* all) {
    each_row(block, chunk, all, [&](const T* own, T* whole) { std::copy_n(own, chunk.rows, whole); });
  }
  template <class E>
  void take_affinities(const Block<T, E>& block, const Chunk& chunk, const T* all) {
    each_row(block, chunk, all, [&](T* own, const T* whole) { std::copy_n(whole, chunk.rows, own); });
  }

  // (1) and (3) for one set: weight[x][j] = alpha * total_j, dot = q . P * total, square = |P|^2, r.
  // each(x, j, v) sees v = sum_y G_xy weight_yj.
  template <class E, class Each>
  void cosines(const Block<T, E>& block, int64_t set, const Window<T, E>& window, int64_t c, Each each) {
    const Chunk& chunk = window.chunks[c];
    const int64_t at = block.sets.edge[set] - block.run.begin, n = block.sets.length(set);
    const int64_t columns = chunk.rows, k = set - block.run.first;
    const T* const a = s + at * ld;
    const T* const gram = block.grams + block.gram_at[size_t(k)];
    const T *length = window.length + window.column[c], scale = T(problem.scale);
    if (problem.norm == Norm::COSINE) {
      for (int64_t x = 0; x < n; ++x) {
        const T own = std::sqrt(gram[x * round_up(n, ROW_STEP) + x]);
        for (int64_t j = 0; j < columns; j += LANES<T>)
          store(weight + x * ld + j, load(a + x * ld + j) * scale / max<T>(load(length + j) * own, splat(T(EPS))));
      }
    } else {
      logits<T>(problem.norm, scale, n, window.sets.edge.data() + chunk.first, chunk.last - chunk.first, a, weight, ld,
                factor);
    }
    for (int64_t j = 0; problem.weights == Weights::SOFTMAX && j < columns; j += LANES<T>) {
      Vec<T> top = load(weight + j), all{}, product{};
      for (int64_t x = 1; x < n; ++x) top = max<T>(top, load(weight + x * ld + j));
      for (int64_t x = 0; x < n; ++x) {
        const Vec<T> e = exp<T>(load(weight + x * ld + j) - top);
        store(weight + x * ld + j, e);
        all += e;
        product += e * load(a + x * ld + j);
      }
      store(total + j, all);
      store(dot + j, product);
      store(square + j, Vec<T>{});
    }
    if (problem.weights != Weights::SOFTMAX) kept_weights(n, columns, a);
    exact.clear();
    if (problem.similarity == Similarity::PRODUCT) {
      for (int64_t j = 0; j < columns; j += LANES<T>) store(r + j, load(dot + j) / load(total + j));
      return;
    }
    gemm<T>(n, columns, n, Left<T>{gram, round_up(n, ROW_STEP)}, Right<T>{weight, ld},
            [](int64_t, int64_t) { return Vec<T>{}; },
            [&](int64_t x, int64_t j, Vec<T> v) {
              each(x, j, v);
              store(square + j, load(square + j) + v * load(weight + x * ld + j));
            });
    const T least_square = T(CANCELLED) * block.highest[size_t(k)];
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      const Vec<T> inverse = T(1) / load(total + j);
      Vec<T> p = load(square + j) * inverse * inverse;
      const Vec<Int<T>> poor = (p < least_square) & inside<T>(j, 0, columns) & (inverse > 0);
      for (int64_t i = 0; i < LANES<T>; ++i)
        if (poor[i]) p[i] = exact_square(block.rows + at, n, j + i);
      store(square + j, p);
      const Vec<T> both = query_length(length + j) * root(max<T>(p, splat(std::numeric_limits<T>::min())));
      store(r + j, load(dot + j) * inverse / max<T>(both, splat(T(EPS))));
    }
  }

  // |q| as (1) has it.
  Vec<T> query_length(const T* length) const {
    return problem.similarity == Similarity::COSINE ? load(length) : splat(T(1));
  }

  // From the logits in `weight`: weights e = exp(logit - largest) of the contexts that are kept, 0 of the others, their
  // sum `total` and `dot`, of set by set with affinities a. A column that keeps no context has an infinite total, and
  // so alpha = 0. Comparisons are such that NaN is kept.
  void kept_weights(int64_t n, int64_t columns, const T* a) {
    const Weights how = problem.weights;
    const bool focal = how == Weights::FOCAL_EQUAL || how == Weights::FOCAL_PROB;
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      Vec<T> top = load(weight + j), cut{}, all{}, product{};
      for (int64_t x = 1; x < n; ++x) top = max<T>(top, load(weight + x * ld + j));
      if (focal) {
        Vec<T> roots{}, powers{};
        for (int64_t x = 0; x < n; ++x) {
          const Vec<T> e = exp<T>(load(weight + x * ld + j) - top);
          store(weight + x * ld + j, e);
          all += e;
          if (how == Weights::FOCAL_EQUAL) continue;
          const Vec<T> half = root(e);
          roots += half;
          powers += e * half;
        }
        cut = how == Weights::FOCAL_EQUAL ? all / T(n) : powers / roots;
        cut = cut < 1 ? cut : Vec<T>{};  // all weights are equal, and none is above: all are kept
        all = Vec<T>{};
      } else {
        cut = how == Weights::HARD ? top : splat(T(problem.scale * problem.threshold));
      }
      for (int64_t x = 0; x < n; ++x) {
        const Vec<T> logit = load(weight + x * ld + j);
        Vec<T> e;
        if (focal) e = logit <= cut ? Vec<T>{} : logit;  // it is e already
        else if (how == Weights::HARD) e = logit < cut ? Vec<T>{} : logit * T(0) + T(1);
        else e = logit <= cut ? Vec<T>{} : exp<T>(logit - top);
        store(weight + x * ld + j, e);
        all += e;
        product += e * load(a + x * ld + j);
      }
      store(total + j, all == T(0) ? splat(INFINITY + T(0)) : all);
      store(dot + j, product);
      store(square + j, Vec<T>{});
    }
  }

  // r of all columns for one set whose affinities begin at row `at`: the largest of each.
  void maxima(int64_t at, int64_t n, int64_t columns) {
    const T* const a = s + at * ld;
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      Vec<T> top = load(a + j), all = top;
      for (int64_t x = 1; x < n; ++x) {
        const Vec<T> one = load(a + x * ld + j);
        top = max<T>(top, one);
        all += one;
      }
      store(r + j, all == all ? top : all);  // NaN stays NaN
    }
  }

  // The queries from j on, of a set whose r begin at `from`, that the pools of negative similarities count.
  Vec<Int<T>> unmatched(const T* from, int64_t j, int64_t n, const T* smooth) const {
    const T threshold = T(problem.threshold);
    Vec<T> mean = load(from + j) - threshold;
    if (smooth) {
      mean = Vec<T>{};
      for (int64_t k = 0; k < n; ++k) mean += load(smooth + k * Window<T>::smooth_ld(n) + j) * (from[k] - threshold);
    }
    return ~(mean >= 0);
  }

  // |P_j|^2 from P itself, where the terms of the Gram form cancel.
  T exact_square(const T* const* row, int64_t n, int64_t j) {
    exact.push_back(j);
    const int64_t D = problem.context.D;
    return attend<T>(row, n, [&](int64_t x) { return weight[x * ld + j] / total[j]; }, 0, D, D, attended);
  }

  // (2) for a set of queries whose columns are begin .. begin + n.
  T pooled(int64_t begin, int64_t n, const T* smooth) const {
    const T* from = r + begin;
    Vec<T> all{}, top = splat(-INFINITY + T(0));
    if (problem.pool == Pool::NEGATIVE || problem.pool == Pool::SMOOTHED_NEGATIVE) {
      for (int64_t j = 0; j < n; j += LANES<T>)
        all += select<T>(unmatched(from, j, n, smooth) & inside<T>(j, 0, n), load(from + j) - T(problem.threshold),
                         Vec<T>{});
      return sum<T>(all) / T(n);
    }
    for (int64_t j = 0; j < n; j += LANES<T>) {
      const Vec<T> a = load(from + j);
      const Vec<Int<T>> real = inside<T>(j, 0, n);
      all += select<T>(real, a, Vec<T>{});
      top = max<T>(select<T>(real, a, top), top);
    }
    if (problem.pool == Pool::SUM) return sum<T>(all);
    if (problem.pool == Pool::MEAN) return sum<T>(all) / T(n);
    const T highest = max<T>(top), scale = T(problem.pool_scale);
    if (problem.pool == Pool::MAX) return sum<T>(all) == sum<T>(all) ? highest : sum<T>(all);  // NaN stays NaN
    all = Vec<T>{};
    for (int64_t j = 0; j < n; j += LANES<T>)
      all += select<T>(inside<T>(j, 0, n), exp<T>((load(from + j) - highest) * scale), Vec<T>{});
    return highest + std::log(sum<T>(all)) / scale;
  }
};

}  // namespace itm_fast
