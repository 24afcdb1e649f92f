// One pair of hierarchical_alignment_score by its vectors: (1) to (7) of itm_fast/ops/hierarchical_alignment_score.py.
#pragma once
#include "alignment.h"

namespace itm_fast {

// What one thread needs to score a pair whose vectors are formed: scratch for images of up to R regions, captions of up
// to L words, gates of width 1 or of all `wide` features.
template <class T>
struct Explicit {
  const Alignment& problem;
  int64_t wide, size;  // wide: D in whole vectors
  Buffer<T> weight, turned, fused, gates, numbers, vectors;

  Explicit(const Alignment& problem, int64_t R, int64_t L, int64_t wide)
      : problem(problem), wide(wide), size(Item<T>::whole(std::max(R, L))), weight(R * Item<T>::whole(L)),
        turned(L * Item<T>::whole(R)), fused(std::max(R, L) * wide), gates(std::max(R, L) * wide), numbers(4 * size),
        vectors(5 * wide) {}

  // One side, given the weights of its n rows over m others, [m][ld]: its terms of (7), and its global vector (6).
  void side(const Item<T>& mine, const Item<T>& others, const T* weights, bool vector, const T* pool, T* local, T* whole,
            T* global) {
    const int64_t n = mine.n, m = others.n;
    T *gate = numbers, *logit = gate + size, *similar = logit + size, *context = vectors, *star = context + wide;
    const auto zero = [](int64_t, int64_t) { return Vec<T>{}; };
    const auto into = [&](T* to) { return [to, this](int64_t i, int64_t d, Vec<T> v) { store(to + i * wide + d, v); }; };
    gemm<T>(n, wide, m, Left<T>{weights, mine.ld}, Right<T>{others.rows, wide}, zero, into(fused));
    if (vector) gemm<T>(n, wide, m, Left<T>{weights, mine.ld}, Right<T>{others.other_gates, wide}, zero, into(gates));
    else across<T>(others.other(), weights, m, mine.ld, mine.ld, gate);
    T all = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* const x = mine.rows + i * wide;
      T* const at = fused + i * wide;
      const Vec<T> one = sigmoid<T>(splat(mine.own()[i] + gate[i]));
      Vec<T> dot{}, square{}, along_pool{};
      for (int64_t d = 0; d < wide; d += LANES<T>) {
        const Vec<T> v = load(x + d), u = load(at + d);
        const Vec<T> g = vector ? sigmoid<T>(load(mine.own_gates + i * wide + d) + load(gates + i * wide + d)) : one;
        dot += v * u;
        square += u * u;
        const Vec<T> f = u + g * (v - u);
        along_pool += f * load(pool + d);
        store(at + d, f);
      }
      logit[i] = sum<T>(along_pool);
      const T length = std::sqrt(std::max(sum<T>(square), std::numeric_limits<T>::min()));
      all += sum<T>(dot) / std::max(mine.norm()[i] * length, T(EPS));
    }
    *local = problem.mean ? all / T(n) : all;
    softmax(logit, n);
    across<T>(logit, fused, n, wide, wide, context);
    along<T>(others.rows, m, wide, wide, context, similar, others.ld);
    const T square = inner(context, context, wide);
    const T length = std::sqrt(std::max(square, std::numeric_limits<T>::min()));
    for (int64_t j = 0; j < m; ++j) similar[j] /= std::max(others.norm()[j] * length, T(EPS));
    softmax(similar, m);
    across<T>(similar, others.rows, m, wide, wide, star);
    *whole = cosine(inner(context, star, wide), square, inner(star, star, wide));
    for (int64_t d = 0; d < wide; ++d) global[d] = context[d] + star[d];
  }

  void mean_row(const Item<T>& item, T* out) {
    T* const share = numbers;
    for (int64_t i = 0; i < item.n; ++i) share[i] = T(1) / T(item.n);
    across<T>(share, item.rows, item.n, wide, wide, out);
  }

  // A: [image.n][caption.ld]; the pools have `wide` numbers.
  T score(const T* A, const Item<T>& image, const Item<T>& caption, bool vector, const T* image_pool,
          const T* caption_pool) {
    const int64_t R = image.n, L = caption.n, ld = caption.ld;
    T local[2]{}, whole[2]{}, *const image_global = vectors + 2 * wide, *const caption_global = vectors + 3 * wide;
    if (problem.image_side) {
      for (int64_t i = 0; i < R; ++i) {
        for (int64_t j = 0; j < ld; j += LANES<T>) store(weight + i * ld + j, load(A + i * ld + j) * T(problem.scale));
        softmax(weight + i * ld, L);
        for (int64_t j = 0; j < L; ++j) turned[j * image.ld + i] = weight[i * ld + j];
      }
      side(image, caption, turned, vector, image_pool, local, whole, image_global);
    } else {
      mean_row(image, image_global);
    }
    if (problem.caption_side) {
      for (int64_t j = 0; j < L; ++j) {
        T* const column = turned + j * image.ld;
        for (int64_t i = 0; i < R; ++i) column[i] = A[i * ld + j] * T(problem.scale);
        softmax(column, R);
        for (int64_t i = 0; i < R; ++i) weight[i * ld + j] = column[i];
      }
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = L; j < ld; ++j) weight[i * ld + j] = 0;
      side(caption, image, weight, vector, caption_pool, local + 1, whole + 1, caption_global);
    } else {
      mean_row(caption, caption_global);
    }
    return problem.total(local, whole,
                         cosine(inner(image_global, caption_global, wide), inner(image_global, image_global, wide),
                                inner(caption_global, caption_global, wide)));
  }
};

}  // namespace itm_fast
