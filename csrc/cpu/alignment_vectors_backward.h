// The gradients of one pair of hierarchical_alignment_score with vector gates: the chain rule through (7) to (1) of
// itm_fast/ops/hierarchical_alignment_score.py, where vectors are formed once more. One thread works on one pair.
#pragma once
#include "alignment_vectors.h"
#include "alignment_vectors_products.h"

namespace itm_fast {

// Which group of captions a group of images meets when, if both have as many groups and two neighbours are a couple: in
// round r, couple a of images meets couple a + r of captions, modulo their number. A task takes a couple of images, so
// that their rows are copied once for both groups of captions; or one group, if that leaves fewer threads without work,
// and the second group then stays one step behind the first. In a step no two tasks have the same captions, and either
// way a group meets the others in one order: sums over them have the same bits.
struct Rounds {
  const int64_t couples, joined, split, tasks;  // groups that a task takes, tasks of a couple, and of all images

  Rounds(int64_t couples, int64_t threads)
      : couples(couples), joined(2 * turns(couples, threads) <= turns(2 * couples, threads) ? 2 : 1), split(2 / joined),
        tasks(couples * split) {}

  int64_t steps() const { return tasks + split - 1; }
  // The captions, as a task's number, that a task takes in a step; -1 if none.
  int64_t met(int64_t task, int64_t step) const {
    const int64_t own = step - task % split;
    return own < 0 || own >= tasks ? -1 : (task / split + own / split) % couples * split + own % split;
  }

 private:
  static int64_t turns(int64_t tasks, int64_t threads) { return (tasks + threads - 1) / threads; }
};

template <class T, class E>
class VectorsGradient {
 public:
  VectorsGradient(const Alignment& problem, int64_t R, int64_t L, int64_t wide)
      : problem_(problem), forward_(problem, R, L, wide, true), to_words_(1, R, L, wide),
        to_regions_(CAPTIONS, L, R, wide), wide_(wide), size_(forward_.image_side.size), numbers_(4 * size_),
        vectors_(2 * wide), formed_(IS_PAIR<E> ? 2 * (R + L) * forward_.apart : 0),
        d_attended_(IS_PAIR<E> ? round_up(std::max(R, L), 2) * feature_pairs<T>(wide) : 0),
        d_gates_(IS_PAIR<E> ? round_up(std::max(R, L), 2) * feature_pairs<T>(wide) : 0),
        products_(L, wide, forward_.apart), d_weight_(R * Item<T>::whole(L)), scratch_(R * Item<T>::whole(L)) {
    if constexpr (IS_PAIR<E>) {
      T* to = formed_;
      for (VectorSide<T>* side : {&forward_.image_side, &forward_.caption_side})
        for (T** rows : {&side->attended, &side->gates}) {
          *rows = to;
          to += (side == &forward_.image_side ? R : L) * forward_.apart;
        }
    }
  }

  // Overwrites the affinities A, [image.n][caption.ld] with zeros beyond the words, by their gradients, given that of
  // the score. Adds to the gradients of rows, and to those of the pools, `wide` numbers each. What words give the
  // image's rows is collected for some captions at a time; finish() adds the last of it.
  void run(T* A, const Item<T>& image, const Item<T>& caption, T grad, const T* image_pool, const T* caption_pool,
           const RowGradients<T>& d_image, const RowGradients<T>& d_caption, T* d_image_pool, T* d_caption_pool) {
    const bool by_image = problem_.image_side, by_caption = problem_.caption_side;
    VectorSide<T>&v = forward_.image_side, &t = forward_.caption_side;
    if (!to_regions_.fits(caption.n)) finish(image, d_image);
    if constexpr (!IS_PAIR<E>) {
      v.attended = to_words_.attended(), v.gates = to_words_.gates();
      t.attended = to_regions_.attended(), t.gates = to_regions_.gates();
    }
    forward_.score(A, image, caption, true, image_pool, caption_pool);
    T h = 0, square_v = 0, square_t = 0;
    cosine_backward(forward_.both, forward_.square_v, forward_.square_t, grad, h, square_v, square_t);
    const auto share = [&](double mix) { return by_image && by_caption ? grad * T(mix) : grad; };
    const auto each = [&](double mix, int64_t n) { return share(mix) / (problem_.mean ? T(n) : T(1)); };
    if (by_image) {
      side(v, t.global, h, square_v, each(problem_.local_mix, image.n), share(problem_.global_mix), v.weight, image,
           caption, image_pool, d_image, d_image_pool, to_words_);
      products_.run(image.n, caption.n, multiplied(v.attended, d_attended_),
                    multiplied(caption.rows, caption.row_features), multiplied(v.gates, d_gates_),
                    multiplied(caption.other_gates, caption.gate_features), d_weight_, caption.ld);
      to_words_.add(caption, d_caption);
    } else {
      mean(v, t.global, h, square_v, image, d_image);
    }
    const auto of = [&](int64_t i, int64_t j) { return load(d_weight_ + i * caption.ld + j); };
    if (by_image) affinities_backward<true>(problem_, image.n, caption.ld, v.weight + 0, of, scratch_ + 0, A);
    if (by_caption) {
      side(t, v.global, h, square_t, each(1 - problem_.local_mix, caption.n), share(1 - problem_.global_mix), t.turned,
           caption, image, caption_pool, d_caption, d_caption_pool, to_regions_);
      products_.run(image.n, caption.n, multiplied(image.rows, image.row_features),
                    multiplied(t.attended, d_attended_), multiplied(image.other_gates, image.gate_features),
                    multiplied(t.gates, d_gates_), d_weight_, caption.ld);
      affinities_backward<false>(problem_, image.n, caption.ld, t.weight + 0, of, scratch_ + 0, A);
    } else {
      mean(t, v.global, h, square_t, caption, d_caption);
    }
  }

  void finish(const Item<T>& image, const RowGradients<T>& d_image) { to_regions_.add(image, d_image); }

 private:
  static constexpr int64_t CAPTIONS = 8;  // whose words' gradients are collected

  // What RowProducts takes of rows.
  static const T* multiplied(const T* rows, const T* features) { return IS_PAIR<E> ? features : rows; }

  // The gradient of a global vector from a place on.
  static Vec<T> of_global(const VectorSide<T>& s, const T* other, T h, T square, int64_t d) {
    return load(other + d) * h + load(s.global + d) * (2 * square);
  }

  // The side of a modality that attends to nothing.
  void mean(const VectorSide<T>& s, const T* other, T h, T square, const Item<T>& own, const RowGradients<T>& d_own) {
    if (!d_own.rows) return;
    for (int64_t i = 0; i < own.n; ++i)
      for (int64_t d = 0; d < d_own.D; d += LANES<T>) {
        T* const row = d_own.rows + i * d_own.D;
        d_own.put(row, d, d_own.D, d_own.get(row, d, d_own.D) + of_global(s, other, h, square, d) / T(own.n));
      }
  }

  // The backward pass of (7) to (2) for one modality. other: the global vector of the other one; h, square: the
  // gradients of v_g . t_g and of this one's |v_g|^2. local, whole: the gradients of each row's cosine and of
  // cos(context, star). weights: attention, [own rows][far.ld]. Leaves the gradients of what is attended to, and of the
  // gates before the sigmoid, in to_far, and for RowProducts.
  void side(VectorSide<T>& s, const T* other, T h, T square, T local, T whole, const T* weights,
            const Item<T>& own, const Item<T>& far, const T* pool, const RowGradients<T>& d_own, T* d_pool,
            FarGradients<T, E>& to_far) {
    constexpr T tiny = std::numeric_limits<T>::min();
    T with = 0, context_square = 0, star_square = 0;
    cosine_backward(s.with, s.context_square, s.star_square, whole, with, context_square, star_square);
    T *const d_star = vectors_, *const d_context = vectors_ + wide_;
    for (int64_t d = 0; d < wide_; d += LANES<T>)
      store(d_star + d, of_global(s, other, h, square, d) + load(s.context + d) * with +
                            load(s.star + d) * (2 * star_square));
    // (5)
    T *const d_found = numbers_, *const z = numbers_ + size_, *const far_norm = numbers_ + 2 * size_;
    along<T>(far.rows, far.n, wide_, forward_.apart, d_star, d_found, far.ld);
    T along_found = 0, lost_all = 0;
    for (int64_t j = 0; j < far.n; ++j) along_found += s.found()[j] * d_found[j];
    const T length = std::sqrt(std::max(s.context_square, tiny));
    for (int64_t j = 0; j < far.n; ++j) {
      const T norm = far.norm()[j], both = norm * length;
      z[j] = s.found()[j] * (d_found[j] - along_found) / std::max(both, T(EPS));
      const T lost = both >= T(EPS) ? z[j] * s.with_far()[j] : T(0);
      far_norm[j] = norm > 0 ? -lost / norm / norm : T(0);
      lost_all += lost;
    }
    if (s.context_square >= tiny) context_square -= lost_all / (2 * s.context_square);
    across<T>(z, far.rows, far.n, wide_, forward_.apart, d_context);
    for (int64_t d = 0; d < wide_; d += LANES<T>)
      store(d_context + d, load(d_context + d) + of_global(s, other, h, square, d) + load(s.star + d) * with +
                               load(s.context + d) * (2 * context_square));
    // (4) and (2)
    const T along_share = inner(s.context, d_context, wide_);
    T* const d_share = numbers_ + 3 * size_;
    along<T>(s.fused, own.n, wide_, forward_.apart, d_context, d_share, own.n);
    const auto terms = [&](int64_t i) {
      const T norm = own.norm()[i], both = norm * std::sqrt(std::max(s.square()[i], tiny));
      const T d_dot = local / std::max(both, T(EPS)), lost = both >= T(EPS) ? s.dot()[i] * d_dot : T(0);
      const T d_square = s.square()[i] >= tiny ? -lost / s.square()[i] : T(0);  // twice
      return RowTerms{s.share()[i], s.share()[i] * (d_share[i] - along_share), d_dot, d_square,
                      norm > 0 ? -lost / norm / norm : T(0)};
    };
    int64_t i = 0;
    for (; IS_PAIR<E> && i + 2 <= own.n; i += 2)
      rows<2>(s, i, {terms(i), terms(i + 1)}, own, pool, d_own, d_pool, to_far);
    for (; i < own.n; ++i) rows<1>(s, i, {terms(i)}, own, pool, d_own, d_pool, to_far);
    to_far.take(own.n, far, weights, s.found(), d_star, z, s.context, far_norm);
  }

  // Of one row. share: its gamma. d_logit: the gradient of pool . fused; d_dot: of row . attended; d_square: twice that
  // of |attended|^2; d_norm: that of |row|, divided by |row|.
  struct RowTerms {
    T share, d_logit, d_dot, d_square, d_norm;
  };

  // The backward pass of COUNT rows from i on, which is even.
  template <int COUNT>
  void rows(const VectorSide<T>& s, int64_t i, const RowTerms (&of)[COUNT], const Item<T>& own, const T* pool,
            const RowGradients<T>& to, T* d_pool, const FarGradients<T, E>& to_far) {
    const int64_t wide = wide_, apart = forward_.apart, step = feature_pairs<T>(wide), first = i * apart, D = to.D;
    const int64_t far = depth<E>(i) * apart;
    const T *const d_context = vectors_ + wide, *const x = own.rows + first;
    const T *const attended = s.attended + first, *const gates = s.gates + first;
    T *const d_rows = to.rows ? to.rows + i * D : nullptr, *const d_attended = d_attended_ + i * step;
    T *const d_own_gates = to.own_gates ? to.own_gates + i * 2 * D : nullptr, *const d_gates = d_gates_ + i * step;
    E *const far_attended = to_far.attended() + far, *const far_gates = to_far.gates() + far;
    for (int64_t d = 0; d < wide; d += LANES<T>) {
      const Vec<T> of_context = load(d_context + d), by_pool = load(pool + d);
      Vec<T> to_pool = load(d_pool + d), d_u[2]{}, d_g[2]{}, d_x[COUNT];
#pragma GCC unroll 2
      for (int k = 0; k < COUNT; ++k) {
        const int64_t at = k * apart + d;
        const Vec<T> v = load(x + at), u = load(attended + at), g = load(gates + at), rest = T(1) - g;
        const Vec<T> d_fused = of_context * of[k].share + by_pool * of[k].d_logit;
        to_pool += (u + g * (v - u)) * of[k].d_logit;
        d_u[k] = d_fused * rest + v * of[k].d_dot + u * of[k].d_square;
        d_g[k] = d_fused * (v - u) * g * rest;
        d_x[k] = d_fused * g + u * of[k].d_dot + v * of[k].d_norm;
      }
      store(d_pool + d, to_pool);
      put<COUNT>(d_u, apart, far_attended + d, step, d_attended + d / 2);
      put<COUNT>(d_g, apart, far_gates + d, step, d_gates + d / 2);
#pragma GCC unroll 2
      for (int k = 0; k < COUNT; ++k) {
        if (d_rows) to.put(d_rows + k * D, d, D, to.get(d_rows + k * D, d, D) + d_x[k]);
        if (d_own_gates) to.put(d_own_gates + k * 2 * D, d, D, to.get(d_own_gates + k * 2 * D, d, D) + d_g[k]);
      }
    }
  }

  // Vectors of two rows for FarGradients, whose sums run over rows, and, if these are pairs, for RowProducts, whose
  // sums run over features.
  template <int COUNT>
  static void put(const Vec<T> (&v)[2], int64_t apart, E* far, [[maybe_unused]] int64_t step,
                  [[maybe_unused]] T* features) {
#if defined(__AVX512BF16__)
    if constexpr (IS_PAIR<E>) {
      store(reinterpret_cast<T*>(far), in_pairs(v[0], v[1]));
      store_rounded(features, v[0]);
      if (COUNT == 2) store_rounded(features + step, v[1]);
      return;
    } else
#endif
    {
      store(far, v[0]);
      if (COUNT == 2) store(far + apart, v[1]);
    }
  }

  const Alignment& problem_;
  PairVectors<T, E> forward_;
  FarGradients<T, E> to_words_, to_regions_;
  int64_t wide_, size_;
  Buffer<T> numbers_, vectors_;
  // Where products multiply pairs: what own rows of both sides attend to, and their gates, which FarGradients holds
  // otherwise; and of one side the gradients of both, as pairs of features.
  Buffer<T> formed_, d_attended_, d_gates_;
  RowProducts<T, E> products_;
  Buffer<T> d_weight_, scratch_;
};

}  // namespace itm_fast
