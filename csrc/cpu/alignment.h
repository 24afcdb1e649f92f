// One pair of hierarchical_alignment_score: equations of itm_fast/ops/hierarchical_alignment_score.py.
//
// With scalar gates no vector of D features is formed (`Coefficients`): each is a sum of the pair's rows, held as its
// coefficients, (8) and (9), and its products follow from the affinities A, the products C of the rows (both with
// regions along rows and words along lanes), the Gram matrices G and H, and a few numbers for each row. The vectors are
// formed (`PairVectors`, alignment_vectors.h) with vector gates, and for pairs where a squared length of `Coefficients`
// is dominated by cancellation error. One thread works on one pair.
#pragma once
#include <limits>

#include "attention.h"

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
  const T lengths = std::sqrt(std::max(square_a, least_square)) * std::sqrt(std::max(square_b, least_square));
  return dot / std::max(lengths, T(EPS));
}

// x . y of n numbers, where both have zeros beyond them up to a whole vector.
template <class T>
inline T inner(const T* x, const T* y, int64_t n) {
  Vec<T> all{};
  for (int64_t j = 0; j < n; j += LANES<T>) all += load(x + j) * load(y + j);
  return sum<T>(all);
}

// out[i] = sum_j M[i][j] x[j], zeros beyond the rows up to `size`. Four rows at a time, whose sums are inner()'s.
template <class T>
inline void along(const T* M, int64_t rows, int64_t n, int64_t ld, const T* x, T* out, int64_t size) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    Vec<T> c[4]{};
    const T* const row = M + i * ld;
    for (int64_t j = 0; j < n; j += LANES<T>) {
      const Vec<T> by = load(x + j);
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) c[k] += load(row + k * ld + j) * by;
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k) out[i + k] = sum<T>(c[k]);
  }
  for (; i < rows; ++i) out[i] = inner(M + i * ld, x, n);
  for (; i < size; ++i) out[i] = 0;
}

// out[j] = sum_i x[i] M[i][j], in four chains.
template <class T>
inline void across(const T* x, const T* M, int64_t rows, int64_t n, int64_t ld, T* out) {
  for (int64_t j = 0; j < n; j += LANES<T>) {
    Vec<T> c[4]{};
    const T* at = M + j;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, at += 4 * ld)
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) c[k] += load(at + k * ld) * x[i + k];
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k)
      if (i + k < rows) c[k] += load(at + k * ld) * x[i + k];
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

// How far rows of pairs of neighbouring features lie apart, where rows of features have `wide` values.
template <class T>
constexpr int64_t feature_pairs(int64_t wide) {
  return padded<T>(wide / 2);
}

// An image or a caption. ld is n in whole vectors, and all arrays of a row's numbers are zeros beyond n.
template <class T>
struct Item {
  int64_t n, ld;
  Buffer<T> numbers, gram;                 // gram: [n][ld], for scalar gates
  Buffer<T> rows, own_gates, other_gates;  // where vectors are formed, n rows, Pools::apart apart
  // Of rows and of other_gates, where products multiply pairs: pairs of two rows; and, for a backward pass, pairs of
  // two features, n rows of feature_pairs().
  Buffer<Pair> row_pairs, gate_pairs;
  Buffer<T> row_features, gate_features;
  T highest = 0;  // largest |row|^2

  static int64_t whole(int64_t n) { return round_up(n, LANES<T> > ROW_STEP ? LANES<T> : ROW_STEP); }
  Item(int64_t n, bool grams, int64_t wide, bool vectors, bool pairs = false, int64_t features = 0)
      : n(n), ld(whole(n)), numbers(5 * whole(n)), gram(grams ? n * whole(n) : 0), rows(wide * n),
        own_gates(vectors ? wide * n : 0), other_gates(vectors ? wide * n : 0),
        row_pairs(pairs ? wide * depth<Pair>(n) : 0), gate_pairs(pairs && vectors ? wide * depth<Pair>(n) : 0),
        row_features(features * n), gate_features(features * n) {}

  T* norm() const { return numbers; }
  T* own() const { return numbers + ld; }        // a row's term of its own gate
  T* other() const { return numbers + 2 * ld; }  // its term of the gates of the rows that attend to it
  T* pool_own() const { return numbers + 3 * ld; }
  T* pool_other() const { return numbers + 4 * ld; }
};

// What one modality adds to a pair's score, with all that its backward pass needs. Its rows, "own", attend to those of
// the other modality, "far". (Image side: p, q, V v_c, T v_c and t*_c of the op's equations.) weight and product are
// [regions][words] on both sides; every array of numbers is zero beyond its rows. It has the room of three more rows of
// weights, which backward takes.
template <class T>
struct AlignmentSide {
  int64_t size;
  Buffer<T> weight, product, numbers;  // attention; attention times the far rows' Gram matrix; the arrays below
  T context_square = 0, with = 0, found_square = 0;  // |context|^2, context . found, |found|^2

  AlignmentSide(int64_t R, int64_t L)
      : size(Item<T>::whole(std::max(R, L))), weight((R + 3) * Item<T>::whole(L)), product(R * Item<T>::whole(L)),
        numbers(11 * size) {}

  T* array(int64_t k) const { return numbers + k * size; }
  // Of own rows: products with, and squared lengths of, what they attend to; what that adds to their gates and to the
  // pool's logits before the gate.
  T *dot() const { return array(0); }
  T *square() const { return array(1); }
  T *gate() const { return array(2); }
  T *pool() const { return array(3); }
  T *own() const { return array(4); }          // gamma g
  T *rest() const { return array(5); }         // gamma (1 - g)
  T *far() const { return array(6); }          // of far rows: context vector = own() of own rows + far() of far rows
  T *with_own() const { return array(7); }     // products of the context vector with own rows
  T *with_far() const { return array(8); }     // with far rows
  T *found() const { return array(9); }        // of far rows: what the context vector attends to
  T *found_gram() const { return array(10); }  // its products with far rows
};

// What one thread needs to score a pair with scalar gates: scratch for images of up to R regions and captions of up to
// L words.
template <class T>
struct Coefficients {
  const Alignment& problem;
  AlignmentSide<T> image_side, caption_side;
  Buffer<T> x, y;
  T square_v = 0, square_t = 0, both = 0;  // |v_g|^2, |t_g|^2, v_g . t_g
  bool poor = false;

  Coefficients(const Alignment& problem, int64_t R, int64_t L)
      : problem(problem), image_side(R, L), caption_side(R, L), x(image_side.size), y(image_side.size) {}

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

  // Products of x = V^T v + T^T t with all rows; what lies beyond the real rows stays zero, as the coefficients do.
  void products(const T* C, const Item<T>& image, const Item<T>& caption, const T* v, const T* t, T* with_v,
                T* with_t) {
    const int64_t R = image.n, ld = caption.ld, wide = image.ld;
    across<T>(v, image.gram, R, wide, wide, with_v);
    for (int64_t i = 0; i < R; ++i) with_v[i] += inner(C + i * ld, t, ld);
    across(v, C, R, ld, ld, with_t);
    across<T>(t, caption.gram, caption.n, ld, ld, x);
    for (int64_t j = 0; j < ld; j += LANES<T>) store(with_t + j, load(with_t + j) + load(x + j));
  }

  // The pair's score; `poor` is then true if vectors have to be formed instead (`PairVectors`). A and C:
  // [image.n][caption.ld], zeros beyond the words.
  T score(const T* A, const T* C, const Item<T>& image, const Item<T>& caption);
};

template <class T>
T Coefficients<T>::score(const T* A, const T* C, const Item<T>& image, const Item<T>& caption) {
  const int64_t R = image.n, L = caption.n, ld = caption.ld, wide = image.ld;
  const T scale = T(problem.scale), highest = std::max(image.highest, caption.highest);
  T local[2]{}, whole[2]{};
  poor = false;
  AlignmentSide<T>&v = image_side, &t = caption_side;
  if (problem.image_side) {
    for (int64_t i = 0; i < R; ++i) {
      T *const row = v.weight + i * ld, *const product = v.product + i * ld;
      for (int64_t j = 0; j < ld; j += LANES<T>) store(row + j, load(A + i * ld + j) * scale);
      softmax(row, L);
      v.dot()[i] = inner(row, C + i * ld, ld);
      v.gate()[i] = inner(row, caption.other(), ld);
      v.pool()[i] = inner(row, caption.pool_other(), ld);
      across<T>(row, caption.gram, L, ld, ld, product);
      v.square()[i] = inner(row, product, ld);
    }
    local[0] = pooled(v.dot(), v.square(), image, caption);
    gated(image, v.gate(), v.pool(), v.own(), v.rest());
    across<T>(v.rest(), v.weight, R, ld, ld, v.far());
    products(C, image, caption, v.own(), v.far(), v.with_own(), v.with_far());
    v.context_square = watched(inner(v.own(), v.with_own(), wide) + inner(v.far(), v.with_far(), ld), highest);
    found(v.with_far(), caption, v.context_square, v.found());
    across<T>(v.found(), caption.gram, L, ld, ld, v.found_gram());
    v.with = inner(v.found(), v.with_far(), ld);
    v.found_square = watched(inner(v.found(), v.found_gram(), ld), caption.highest);
    whole[0] = cosine(v.with, v.context_square, v.found_square);
    square_v = watched(v.context_square + 2 * v.with + v.found_square, highest);
  }
  if (problem.caption_side) {
    for (int64_t j = 0; j < ld; j += LANES<T>) {
      Vec<T> top = splat(-INFINITY + T(0)), all{}, d{}, g{}, m{};
      for (int64_t i = 0; i < R; ++i) top = max<T>(top, load(A + i * ld + j));
      for (int64_t i = 0; i < R; ++i) {
        const Vec<T> e = exp<T>((load(A + i * ld + j) - top) * scale);
        store(t.weight + i * ld + j, e);
        all += e;
        d += e * load(C + i * ld + j);
        g += e * image.other()[i];
        m += e * image.pool_other()[i];
      }
      const Vec<T> inverse = select<T>(inside<T>(j, 0, L), T(1) / all, Vec<T>{});
      for (int64_t i = 0; i < R; ++i) store(t.weight + i * ld + j, load(t.weight + i * ld + j) * inverse);
      store(t.dot() + j, d * inverse);
      store(t.gate() + j, g * inverse);
      store(t.pool() + j, m * inverse);
      store(t.square() + j, Vec<T>{});
    }
    gemm<T>(R, ld, R, Left<T>{image.gram, wide}, Right<T>{t.weight, ld}, [](int64_t, int64_t) { return Vec<T>{}; },
            [&](int64_t i, int64_t j, Vec<T> c) {
              store(t.product + i * ld + j, c);
              store(t.square() + j, load(t.square() + j) + c * load(t.weight + i * ld + j));
            });
    local[1] = pooled(t.dot(), t.square(), caption, image);
    gated(caption, t.gate(), t.pool(), t.own(), t.rest());
    along<T>(t.weight, R, ld, ld, t.rest(), t.far(), wide);
    products(C, image, caption, t.far(), t.own(), t.with_far(), t.with_own());
    t.context_square = watched(inner(t.far(), t.with_far(), wide) + inner(t.own(), t.with_own(), ld), highest);
    found(t.with_far(), image, t.context_square, t.found());
    across<T>(t.found(), image.gram, R, wide, wide, t.found_gram());
    t.with = inner(t.found(), t.with_far(), wide);
    t.found_square = watched(inner(t.found(), t.found_gram(), wide), image.highest);
    whole[1] = cosine(t.with, t.context_square, t.found_square);
    square_t = watched(t.context_square + 2 * t.with + t.found_square, highest);
  }
  const auto total = [](const T* a, int64_t n) {
    T all = 0;
    for (int64_t i = 0; i < n; ++i) all += a[i];
    return all;
  };
  if (!problem.image_side) {  // v_g is the mean of the regions
    T all = 0;
    for (int64_t i = 0; i < R; ++i) all += total(image.gram + i * wide, R);
    square_v = watched(all / (T(R) * T(R)), image.highest);
    both = (total(t.with_far(), R) + total(t.found_gram(), R)) / T(R);
  } else if (!problem.caption_side) {
    T all = 0;
    for (int64_t j = 0; j < L; ++j) all += total(caption.gram + j * ld, L);
    square_t = watched(all / (T(L) * T(L)), caption.highest);
    both = (total(v.with_far(), L) + total(v.found_gram(), L)) / T(L);
  } else {
    along<T>(C, R, ld, ld, v.found(), y, wide);
    both = inner(t.far(), v.with_own(), wide) + inner(t.found(), v.with_own(), wide) +
           inner(t.own(), v.with_far(), ld) + inner(v.found(), t.with_own(), ld) + inner<T>(t.found(), y, wide);
  }
  return problem.total(local, whole, cosine(both, square_v, square_t));
}

}  // namespace itm_fast
