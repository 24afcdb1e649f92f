// One pair of hierarchical_alignment_score by its vectors: (1) to (7) of itm_fast/ops/hierarchical_alignment_score.py.
#pragma once
#include "alignment.h"

namespace itm_fast {

// What one modality adds to a pair's score where vectors are formed, and what a backward pass takes of it. Its rows,
// "own", attend to those of the other modality, "far".
template <class T>
struct VectorSide {
  int64_t size;
  T *attended, *gates, *fused;  // of own rows: what they attend to, their gates, and both as in (4)
  T *context, *star, *global;   // [wide]: the context vector, what it attends to (5), and their sum (6)
  Buffer<T> weight, turned;     // attention, [regions][words] and [words][regions]
  Buffer<T> numbers;
  T context_square = 0, with = 0, star_square = 0;  // |context|^2, context . star, |star|^2

  VectorSide(int64_t R, int64_t L, T* vectors, int64_t wide)
      : size(Item<T>::whole(std::max(R, L))), context(vectors), star(vectors + wide), global(vectors + 2 * wide),
        weight(R * Item<T>::whole(L)), turned(L * Item<T>::whole(R)), numbers(6 * size) {}

  T* array(int64_t k) const { return numbers + k * size; }
  T *dot() const { return array(0); }       // of own rows: products with what they attend to
  T *square() const { return array(1); }    // and its squared lengths
  T *gate() const { return array(2); }      // what far rows add to scalar gates
  T *share() const { return array(3); }     // gamma
  T *with_far() const { return array(4); }  // of far rows: products with the context vector
  T *found() const { return array(5); }     // and the attention that it pays them
};

// What one thread needs to score a pair whose vectors are formed: scratch for images of up to R regions, captions of up
// to L words, gates of width 1 or of all `wide` features. For a backward pass the caller sets `attended` and `gates` of
// both sides, which then keep all that it takes; without one, the sides share a room, where fused rows overwrite what
// rows attend to. E is what the products of attention and rows multiply: T, or pairs of bfloat16 values.
template <class T, class E = T>
struct PairVectors {
  const Alignment& problem;
  int64_t wide, apart;  // D in whole vectors, and how far rows of so many lie apart: padded() says why
  Buffer<T> rows, vectors;
  Buffer<E> left;
  VectorSide<T> image_side, caption_side;
  T square_v = 0, square_t = 0, both = 0;  // |v_g|^2, |t_g|^2, v_g . t_g

  PairVectors(const Alignment& problem, int64_t R, int64_t L, int64_t wide, bool backward = false)
      : problem(problem), wide(wide), apart(padded<T>(wide)),
        rows((backward ? R + L : 2 * std::max(R, L)) * apart), vectors(6 * wide),
        left(IS_PAIR<E> ? depth<E>(std::max(R, L)) * Item<T>::whole(std::max(R, L)) : 0),
        image_side(R, L, vectors, wide), caption_side(R, L, vectors + 3 * wide, wide) {
    for (VectorSide<T>* side : {&image_side, &caption_side}) {
      side->attended = rows;
      side->gates = rows + std::max(R, L) * apart;
      side->fused = backward ? rows + (side == &image_side ? 0 : R * apart) : side->attended;
    }
  }

  // (3).
  static Vec<T> gate(Vec<T> logit) {
#if defined(__AVX512BF16__)
    if constexpr (IS_PAIR<E>) return rough_sigmoid(logit);
    else
#endif
      return sigmoid<T>(logit);
  }

  // One side, given the weights of its n rows over m others, [m][ld]: its terms of (7), and its global vector (6).
  void side(VectorSide<T>& s, const Item<T>& mine, const Item<T>& others, const T* weights, bool vector, const T* pool,
            T* local, T* whole) {
    const int64_t n = mine.n, m = others.n;
    const auto zero = [](int64_t, int64_t) { return Vec<T>{}; };
    const auto into = [&](T* to) {
      return [to, step = apart](int64_t i, int64_t d, Vec<T> v) { store(to + i * step + d, v); };
    };
    const Left<E> by{factors<E>(m, mine.ld, weights, mine.ld, left + 0), mine.ld};
    const auto attend = [&](const T* x, [[maybe_unused]] const Pair* pairs, T* to) {
      const E* right;
      if constexpr (IS_PAIR<E>) right = pairs;
      else right = x;
      gemm<E>(n, wide, depth<E>(m), by, Right<E>{right, apart}, zero, into(to));
    };
    attend(others.rows, others.row_pairs, s.attended);
    if (vector) attend(others.other_gates, others.gate_pairs, s.gates);
    else across<T>(others.other(), weights, m, mine.ld, mine.ld, s.gate());
    T all = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* const x = mine.rows + i * apart;
      T *const at = s.attended + i * apart, *const gates = s.gates + i * apart, *const fused = s.fused + i * apart;
      const Vec<T> one = sigmoid<T>(splat(vector ? T(0) : mine.own()[i] + s.gate()[i]));
      Vec<T> dot{}, square{}, along_pool{};
      for (int64_t d = 0; d < wide; d += LANES<T>) {
        const Vec<T> v = load(x + d), u = load(at + d);
        const Vec<T> g = vector ? gate(load(mine.own_gates + i * apart + d) + load(gates + d)) : one;
        dot += v * u;
        square += u * u;
        const Vec<T> f = u + g * (v - u);
        along_pool += f * load(pool + d);
        store(gates + d, g);
        store(fused + d, f);
      }
      s.dot()[i] = sum<T>(dot);
      s.square()[i] = sum<T>(square);
      s.share()[i] = sum<T>(along_pool);
      const T length = std::sqrt(std::max(s.square()[i], std::numeric_limits<T>::min()));
      all += s.dot()[i] / std::max(mine.norm()[i] * length, T(EPS));
    }
    *local = problem.mean ? all / T(n) : all;
    softmax(s.share(), n);
    across<T>(s.share(), s.fused, n, wide, apart, s.context);
    along<T>(others.rows, m, wide, apart, s.context, s.with_far(), others.ld);
    s.context_square = inner(s.context, s.context, wide);
    const T length = std::sqrt(std::max(s.context_square, std::numeric_limits<T>::min()));
    for (int64_t j = 0; j < m; ++j) s.found()[j] = s.with_far()[j] / std::max(others.norm()[j] * length, T(EPS));
    softmax(s.found(), m);
    across<T>(s.found(), others.rows, m, wide, apart, s.star);
    s.with = inner(s.context, s.star, wide);
    s.star_square = inner(s.star, s.star, wide);
    *whole = cosine(s.with, s.context_square, s.star_square);
    for (int64_t d = 0; d < wide; ++d) s.global[d] = s.context[d] + s.star[d];
  }

  // The side of a modality that attends to nothing: its global vector is the mean of its rows.
  void mean_row(VectorSide<T>& s, const Item<T>& item) {
    for (int64_t i = 0; i < item.n; ++i) s.share()[i] = T(1) / T(item.n);
    across<T>(s.share(), item.rows, item.n, wide, apart, s.global);
  }

  // A: [image.n][caption.ld]; the pools have `wide` numbers.
  T score(const T* A, const Item<T>& image, const Item<T>& caption, bool vector, const T* image_pool,
          const T* caption_pool) {
    const int64_t R = image.n, L = caption.n, ld = caption.ld;
    VectorSide<T>&v = image_side, &t = caption_side;
    T local[2]{}, whole[2]{};
    if (problem.image_side) {
      for (int64_t i = 0; i < R; ++i) {
        T* const row = v.weight + i * ld;
        for (int64_t j = 0; j < ld; j += LANES<T>) store(row + j, load(A + i * ld + j) * T(problem.scale));
        softmax(row, L);
        for (int64_t j = 0; j < L; ++j) v.turned[j * image.ld + i] = row[j];
      }
      side(v, image, caption, v.turned, vector, image_pool, local, whole);
    } else {
      mean_row(v, image);
    }
    if (problem.caption_side) {
      for (int64_t j = 0; j < L; ++j) {
        T* const column = t.turned + j * image.ld;
        for (int64_t i = 0; i < R; ++i) column[i] = A[i * ld + j] * T(problem.scale);
        softmax(column, R);
        for (int64_t i = 0; i < R; ++i) t.weight[i * ld + j] = column[i];
      }
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = L; j < ld; ++j) t.weight[i * ld + j] = 0;
      side(t, caption, image, t.weight, vector, caption_pool, local + 1, whole + 1);
    } else {
      mean_row(t, caption);
    }
    both = inner(v.global, t.global, wide);
    square_v = inner(v.global, v.global, wide);
    square_t = inner(t.global, t.global, wide);
    return problem.total(local, whole, cosine(both, square_v, square_t));
  }
};

}  // namespace itm_fast
