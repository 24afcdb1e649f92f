// One pair of hierarchical_alignment_score: equations of itm_fast/ops/hierarchical_alignment_score.py.
//
// With scalar gates no vector of D features is formed (`Coefficients`): each is a sum of the pair's rows, held as its
// coefficients, (8) and (9), and its products follow from the affinities A, the products C of the rows (both with
// regions along rows and words along lanes), the Gram matrices G and H, and a few numbers for each row. The vectors are
// formed (`Explicit`) with vector gates, and for pairs where a squared length of `Coefficients` is dominated by
// cancellation error. One thread works on one pair.
#pragma once
#include <limits>

#include "attention.h"
#include "write.h"

namespace itm_fast {

// The op's options.
struct Alignment {
  bool image_side, caption_side, mean;  // directions i2t and both; t2i and both; pool
  double scale, local_mix, global_mix;

  // (7): the score from both sides' local terms, both sides' terms `whole`, and the term `both` of the global vectors.
  template <class T>
  T total(const T* local, const T* whole, T both) const {
    const auto mixed = [&](const T* x, double mix) {
      return image_side && caption_side ? T(mix) * x[0] + T(1 - mix) * x[1] : x[image_side ? 0 : 1];
    };
    return mixed(local, local_mix) + mixed(whole, global_mix) + both;
  }
};

// The cosine of two vectors from their product and their squared lengths.
template <class T>
inline T cosine(T dot, T square_a, T square_b) {
  const T least_square = std::numeric_limits<T>::min();
  return dot / std::max(std::sqrt(std::max(square_a, least_square)) * std::sqrt(std::max(square_b, least_square)), T(EPS));
}

// x . y of n numbers, where both have zeros beyond them up to a whole vector.
template <class T>
inline T inner(const T* x, const T* y, int64_t n) {
  Vec<T> all{};
  for (int64_t j = 0; j < n; j += LANES<T>) all += load(x + j) * load(y + j);
  return sum<T>(all);
}

// out[i] = sum_j M[i][j] x[j], zeros beyond the rows up to `size`.
template <class T>
inline void along(const T* M, int64_t rows, int64_t n, int64_t ld, const T* x, T* out, int64_t size) {
  for (int64_t i = 0; i < rows; ++i) out[i] = inner(M + i * ld, x, n);
  for (int64_t i = rows; i < size; ++i) out[i] = 0;
}

// out[j] = sum_i x[i] M[i][j], in four chains.
template <class T>
inline void across(const T* x, const T* M, int64_t rows, int64_t n, int64_t ld, T* out) {
  for (int64_t j = 0; j < n; j += LANES<T>) {
    Vec<T> c[4]{};
    for (int64_t i = 0; i < rows; ++i) c[i % 4] += load(M + i * ld + j) * x[i];
    store(out + j, (c[0] + c[1]) + (c[2] + c[3]));
  }
}

// Softmax of the first n numbers of whole vectors, in place; zeros beyond them.
template <class T>
inline void softmax(T* x, int64_t n) {
  Vec<T> top = splat(-INFINITY + T(0)), all{};
  for (int64_t j = 0; j < n; j += LANES<T>) top = max<T>(top, select<T>(inside<T>(j, 0, n), load(x + j), top));
  const T highest = max<T>(top);
  for (int64_t j = 0; j < n; j += LANES<T>) {
    const Vec<T> e = select<T>(inside<T>(j, 0, n), exp<T>(load(x + j) - highest), Vec<T>{});
    store(x + j, e);
    all += e;
  }
  const T inverse = T(1) / sum<T>(all);
  for (int64_t j = 0; j < n; j += LANES<T>) store(x + j, load(x + j) * inverse);
}

// An image or a caption. ld is n in whole vectors, and all arrays of a row's numbers are zeros beyond n.
template <class T>
struct Item {
  int64_t n, ld;
  Buffer<T> numbers, gram;                // gram: [n][ld], for scalar gates
  Buffer<T> rows, own_gates, other_gates;  // [n][wide], where vectors are formed
  T highest = 0;                           // largest |row|^2

  static int64_t whole(int64_t n) { return round_up(n, LANES<T> > ROW_STEP ? LANES<T> : ROW_STEP); }
  Item(int64_t n, bool grams, int64_t wide, bool vectors)
      : n(n), ld(whole(n)), numbers(5 * whole(n)), gram(grams ? n * whole(n) : 0), rows(wide * n),
        own_gates(vectors ? wide * n : 0), other_gates(vectors ? wide * n : 0) {}

  T* norm() const { return numbers; }
  T* own() const { return numbers + ld; }        // a row's term of its own gate
  T* other() const { return numbers + 2 * ld; }  // its term of the gates of the rows that attend to it
  T* pool_own() const { return numbers + 3 * ld; }
  T* pool_other() const { return numbers + 4 * ld; }
};

// What one thread needs to score a pair with scalar gates: scratch for images of up to R regions and captions of up to
// L words.
template <class T>
struct Coefficients {
  const Alignment& problem;
  int64_t size;
  Buffer<T> weight, numbers;
  bool poor = false;

  Coefficients(const Alignment& problem, int64_t R, int64_t L)
      : problem(problem), size(Item<T>::whole(std::max(R, L))), weight(R * Item<T>::whole(L)), numbers(18 * size) {}

  T* array(int64_t k) { return numbers + k * size; }
  T watched(T square, T highest) {
    poor |= square < T(CANCELLED) * highest;
    return square;
  }
  // The cosines (2) of n rows, pooled.
  T pooled(const T* dot, const T* square, const Item<T>& side, const Item<T>& others) {
    Vec<T> all{};
    for (int64_t i = 0; i < side.n; i += LANES<T>) {
      const Vec<T> s = load(square + i), real = max<T>(s, splat(std::numeric_limits<T>::min()));
      const Vec<Int<T>> in = inside<T>(i, 0, side.n), low = (s < T(CANCELLED) * others.highest) & in;
      for (int k = 0; k < LANES<T>; ++k) poor |= low[k] != 0;
      all += select<T>(in, load(dot + i) / max<T>(load(side.norm() + i) * root(real), splat(T(EPS))), Vec<T>{});
    }
    return problem.mean ? sum<T>(all) / T(side.n) : sum<T>(all);
  }
  // (3) and (4): the coefficients p of the side's own rows, gamma g, and `rest` = gamma (1 - g) of what they attend to.
  // gate and pool: each row's attention-weighted sums of the other side's other() and pool_other().
  void gated(const Item<T>& side, const T* gate, const T* pool, T* p, T* rest) {
    for (int64_t i = 0; i < side.n; i += LANES<T>) {
      const Vec<T> g = sigmoid<T>(load(side.own() + i) + load(gate + i));
      store(p + i, g);
      store(rest + i, g * load(side.pool_own() + i) + (T(1) - g) * load(pool + i));
    }
    softmax(rest, side.n);
    for (int64_t i = 0; i < side.n; i += LANES<T>) {
      const Vec<T> gamma = load(rest + i), own = select<T>(inside<T>(i, 0, side.n), gamma * load(p + i), Vec<T>{});
      store(p + i, own);
      store(rest + i, gamma - own);
    }
    clear(p, side);
    clear(rest, side);
  }
  // (5): the attention weights of a context vector over n rows, from its products `of` with them.
  void found(const T* of, const Item<T>& side, T square, T* weights) {
    const T length = std::sqrt(std::max(square, std::numeric_limits<T>::min()));
    for (int64_t i = 0; i < side.n; i += LANES<T>)
      store(weights + i, load(of + i) / max<T>(load(side.norm() + i) * length, splat(T(EPS))));
    softmax(weights, side.n);
    clear(weights, side);
  }
  // Zeros what products read beyond the vectors that were written: an earlier pair's values, and NaN times 0 is NaN.
  static void clear(T* values, const Item<T>& side) {
    for (int64_t i = round_up(side.n, LANES<T>); i < side.ld; ++i) values[i] = T(0);
  }

  // The pair's score; `poor` is then true if vectors have to be formed instead (`Explicit`). A and C:
  // [image.n][caption.ld], zeros beyond the words.
  T score(const T* A, const T* C, const Item<T>& image, const Item<T>& caption);
};

template <class T>
T Coefficients<T>::score(const T* A, const T* C, const Item<T>& image, const Item<T>& caption) {
  const int64_t R = image.n, L = caption.n, ld = caption.ld, wide = image.ld;
  const T scale = T(problem.scale), highest = std::max(image.highest, caption.highest);
  T local[2]{}, whole[2]{};
  T *dot = array(0), *square = array(1), *gate = array(2), *pool = array(3), *x = array(4), *y = array(5);
  T *p = array(6), *q = array(7), *w = array(8), *u = array(9), *alpha = array(10), *alpha_gram = array(11);
  T *r = array(12), *s = array(13), *of_v = array(14), *of_t = array(15), *beta = array(16), *beta_gram = array(17);
  T square_v = 0, square_t = 0;  // |v_g|^2, |t_g|^2
  poor = false;
  // Products of x = V^T v + T^T t with all rows; what lies beyond the real rows stays zero, as the coefficients do.
  const auto products = [&](const T* v, const T* t, T* with_v, T* with_t) {
    across<T>(v, image.gram, R, wide, wide, with_v);
    for (int64_t i = 0; i < R; ++i) with_v[i] += inner(C + i * ld, t, ld);
    across(v, C, R, ld, ld, with_t);
    across<T>(t, caption.gram, L, ld, ld, x);
    for (int64_t j = 0; j < ld; j += LANES<T>) store(with_t + j, load(with_t + j) + load(x + j));
  };
  if (problem.image_side) {
    for (int64_t i = 0; i < R; ++i) {
      T* const row = weight + i * ld;
      for (int64_t j = 0; j < ld; j += LANES<T>) store(row + j, load(A + i * ld + j) * scale);
      softmax(row, L);
      dot[i] = inner(row, C + i * ld, ld);
      gate[i] = inner(row, caption.other(), ld);
      pool[i] = inner(row, caption.pool_other(), ld);
      across<T>(row, caption.gram, L, ld, ld, x);
      square[i] = inner(row, x, ld);
    }
    local[0] = pooled(dot, square, image, caption);
    gated(image, gate, pool, p, y);
    across<T>(y, weight, R, ld, ld, q);
    products(p, q, w, u);
    const T square_c = watched(inner(p, w, wide) + inner(q, u, ld), highest);
    found(u, caption, square_c, alpha);
    across<T>(alpha, caption.gram, L, ld, ld, alpha_gram);
    const T with = inner(alpha, u, ld), own = watched(inner(alpha, alpha_gram, ld), caption.highest);
    whole[0] = cosine(with, square_c, own);
    square_v = watched(square_c + 2 * with + own, highest);
  }
  if (problem.caption_side) {
    for (int64_t j = 0; j < ld; j += LANES<T>) {
      Vec<T> top = splat(-INFINITY + T(0)), all{}, d{}, g{}, m{};
      for (int64_t i = 0; i < R; ++i) top = max<T>(top, load(A + i * ld + j));
      for (int64_t i = 0; i < R; ++i) {
        const Vec<T> e = exp<T>((load(A + i * ld + j) - top) * scale);
        store(weight + i * ld + j, e);
        all += e;
        d += e * load(C + i * ld + j);
        g += e * image.other()[i];
        m += e * image.pool_other()[i];
      }
      const Vec<T> inverse = select<T>(inside<T>(j, 0, L), T(1) / all, Vec<T>{});
      for (int64_t i = 0; i < R; ++i) store(weight + i * ld + j, load(weight + i * ld + j) * inverse);
      store(dot + j, d * inverse);
      store(gate + j, g * inverse);
      store(pool + j, m * inverse);
      store(square + j, Vec<T>{});
    }
    gemm<T>(R, ld, R, Left<T>{image.gram, wide}, Right<T>{weight, ld}, [](int64_t, int64_t) { return Vec<T>{}; },
            [&](int64_t i, int64_t j, Vec<T> v) {
              store(square + j, load(square + j) + v * load(weight + i * ld + j));
            });
    local[1] = pooled(dot, square, caption, image);
    gated(caption, gate, pool, r, y);
    along<T>(weight, R, ld, ld, y, s, wide);
    products(s, r, of_v, of_t);
    const T square_c = watched(inner(s, of_v, wide) + inner(r, of_t, ld), highest);
    found(of_v, image, square_c, beta);
    across<T>(beta, image.gram, R, wide, wide, beta_gram);
    const T with = inner(beta, of_v, wide), own = watched(inner(beta, beta_gram, wide), image.highest);
    whole[1] = cosine(with, square_c, own);
    square_t = watched(square_c + 2 * with + own, highest);
  }
  T both;
  const auto total = [](const T* a, int64_t n) {
    T all = 0;
    for (int64_t i = 0; i < n; ++i) all += a[i];
    return all;
  };
  if (!problem.image_side) {  // v_g is the mean of the regions
    T all = 0;
    for (int64_t i = 0; i < R; ++i) all += total(image.gram + i * wide, R);
    square_v = watched(all / (T(R) * T(R)), image.highest);
    both = (total(of_v, R) + total(beta_gram, R)) / T(R);
  } else if (!problem.caption_side) {
    T all = 0;
    for (int64_t j = 0; j < L; ++j) all += total(caption.gram + j * ld, L);
    square_t = watched(all / (T(L) * T(L)), caption.highest);
    both = (total(u, L) + total(alpha_gram, L)) / T(L);
  } else {
    along(C, R, ld, ld, alpha, x, wide);
    both = inner(s, w, wide) + inner(beta, w, wide) + inner(r, u, ld) + inner(alpha, of_t, ld) + inner(beta, x, wide);
  }
  return problem.total(local, whole, cosine(both, square_v, square_t));
}

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
