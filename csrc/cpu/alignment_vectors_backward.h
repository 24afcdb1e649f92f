// The gradients of one pair of hierarchical_alignment_score with vector gates: the chain rule through (7) to (1) of
// itm_fast/ops/hierarchical_alignment_score.py, where vectors are formed once more. One thread works on one pair.
#pragma once
#include "alignment_backward.h"
#include "alignment_vectors.h"
#include "cross_attention_rows.h"

namespace itm_fast {

// c[i][j] = sum of a_i b_j + e_i f_j over all features, for n rows a and e and m rows b and f, `wide` apart; zeros from
// m on up to ld. Vector lanes run along the features, so no row is transposed.
template <class T>
class RowProducts {
 public:
  explicit RowProducts(int64_t most) : sums_(ROWS * round_up(most, LANES<T>) * LANES<T>) {}

  void run(int64_t n, int64_t m, int64_t wide, const T* a, const T* b, const T* e, const T* f, T* c, int64_t ld) {
    const int64_t blocks = (m + COLUMNS - 1) / COLUMNS;
    for (int64_t i = 0; i < n; i += ROWS) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = m * block / blocks;
        columns<COLUMNS>(m * (block + 1) / blocks - first, i, n, first, m, wide, a, b, e, f);
      }
      for (int64_t r = 0; r < least(ROWS, n - i); ++r)
        for (int64_t j = 0; j < ld; j += LANES<T>) {
          Vec<T> v[LANES<T>]{};
          for (int64_t k = 0; k < least(LANES<T>, m - j); ++k) v[k] = load(sums_ + (r * m + j + k) * LANES<T>);
          store(c + (i + r) * ld + j, sums<T>(v));
        }
    }
  }

 private:
  static constexpr int ROWS = 4, COLUMNS = VECTOR_BYTES == 64 ? 6 : 2;  // 24 of 32 or 8 of 16 registers are sums

  template <int WIDE>
  void columns(int64_t count, int64_t i, int64_t n, int64_t j, int64_t m, int64_t wide, const T* a, const T* b,
               const T* e, const T* f) {
    if (count == WIDE) return tile<WIDE>(i, n, j, m, wide, a, b, e, f);
    if constexpr (WIDE > 1) columns<WIDE - 1>(count, i, n, j, m, wide, a, b, e, f);
  }
  template <int WIDE>
  void tile(int64_t i, int64_t n, int64_t j, int64_t m, int64_t wide, const T* a, const T* b, const T* e, const T* f) {
    Vec<T> c[ROWS][WIDE]{};
    int64_t at[ROWS];
    for (int r = 0; r < ROWS; ++r) at[r] = least(i + r, n - 1) * wide;
    const auto add = [&](const T* x, const T* y) {
      for (int64_t d = 0; d < wide; d += LANES<T>) {
        Vec<T> row[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) row[r] = load(x + at[r] + d);
#pragma GCC unroll 6
        for (int k = 0; k < WIDE; ++k) {
          const Vec<T> column = load(y + (j + k) * wide + d);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) c[r][k] += row[r] * column;
        }
      }
    };
    add(a, b);
    add(e, f);
    for (int r = 0; r < ROWS; ++r)
      for (int k = 0; k < WIDE; ++k) store(sums_ + (r * m + j + k) * LANES<T>, c[r][k]);
  }

  Buffer<T> sums_;
};

// The gradients of an item's rows and of their two terms of the gates, in tensors whose rows of D values lie D and
// 2 D apart; null if they are not wanted.
template <class T>
struct RowGradients {
  T *rows, *own_gates, *other_gates;
  int64_t D;

  static Vec<T> get(const T* row, int64_t d, int64_t D) {
    return d < D ? head(row + d, D - d) : Vec<T>{};
  }
  static void put(T* row, int64_t d, int64_t D, Vec<T> v) {
    if (d < D) store_head(row + d, v, least(LANES<T>, D - d));
  }
};

template <class T>
class VectorsGradient {
 public:
  VectorsGradient(const Alignment& problem, int64_t R, int64_t L, int64_t wide)
      : problem_(problem), forward_(problem, R, L, wide, true), wide_(wide), size_(forward_.image_side.size),
        numbers_(4 * size_), vectors_(3 * wide), products_(L), d_weight_(R * Item<T>::whole(L)),
        scratch_(R * Item<T>::whole(L)) {}

  // Overwrites the affinities A, [image.n][caption.ld] with zeros beyond the words, by their gradients, given that of
  // the score. Adds to the gradients of rows, and to those of the pools, `wide` numbers each.
  void run(T* A, const Item<T>& image, const Item<T>& caption, T grad, const T* image_pool, const T* caption_pool,
           const RowGradients<T>& d_image, const RowGradients<T>& d_caption, T* d_image_pool, T* d_caption_pool) {
    const bool by_image = problem_.image_side, by_caption = problem_.caption_side;
    VectorSide<T>&v = forward_.image_side, &t = forward_.caption_side;
    forward_.score(A, image, caption, true, image_pool, caption_pool);
    T h = 0, square_v = 0, square_t = 0;
    cosine_backward(forward_.both, forward_.square_v, forward_.square_t, grad, h, square_v, square_t);
    const auto share = [&](double mix) { return by_image && by_caption ? grad * T(mix) : grad; };
    const auto each = [&](double mix, int64_t n) { return share(mix) / (problem_.mean ? T(n) : T(1)); };
    if (by_image) {
      side(v, t.global, h, square_v, each(problem_.local_mix, image.n), share(problem_.global_mix), v.weight,
           caption.ld, image, caption, image_pool, d_image, d_caption, d_image_pool);
      products_.run(image.n, caption.n, wide_, v.attended, caption.rows, v.gates, caption.other_gates, d_weight_,
                    caption.ld);
    } else {
      mean(v, t.global, h, square_v, image, d_image);
    }
    const auto of = [&](int64_t i, int64_t j) { return load(d_weight_ + i * caption.ld + j); };
    if (by_image) affinities_backward<true>(problem_, image.n, caption.ld, v.weight + 0, of, scratch_ + 0, A);
    if (by_caption) {
      side(t, v.global, h, square_t, each(1 - problem_.local_mix, caption.n), share(1 - problem_.global_mix), t.turned,
           image.ld, caption, image, caption_pool, d_caption, d_image, d_caption_pool);
      products_.run(image.n, caption.n, wide_, image.rows, t.attended, image.other_gates, t.gates, d_weight_,
                    caption.ld);
      affinities_backward<false>(problem_, image.n, caption.ld, t.weight + 0, of, scratch_ + 0, A);
    } else {
      mean(t, v.global, h, square_t, caption, d_caption);
    }
  }

 private:
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
  // cos(context, star). weights: attention, [own rows][ld]. Overwrites `attended` by its gradient, and `gates` by that
  // of the gates before the sigmoid.
  void side(VectorSide<T>& s, const T* other, T h, T square, T local, T whole, const T* weights, int64_t ld,
            const Item<T>& own, const Item<T>& far, const T* pool, const RowGradients<T>& d_own,
            const RowGradients<T>& d_far, T* d_pool) {
    constexpr T tiny = std::numeric_limits<T>::min();
    T with = 0, context_square = 0, star_square = 0;
    cosine_backward(s.with, s.context_square, s.star_square, whole, with, context_square, star_square);
    T *const d_star = vectors_, *const d_context = vectors_ + wide_;
    for (int64_t d = 0; d < wide_; d += LANES<T>)
      store(d_star + d, of_global(s, other, h, square, d) + load(s.context + d) * with +
                            load(s.star + d) * (2 * star_square));
    // (5)
    T *const d_found = numbers_, *const z = numbers_ + size_, *const far_norm = numbers_ + 2 * size_;
    along<T>(far.rows, far.n, wide_, wide_, d_star, d_found, far.ld);
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
    across<T>(z, far.rows, far.n, wide_, wide_, d_context);
    for (int64_t d = 0; d < wide_; d += LANES<T>)
      store(d_context + d, load(d_context + d) + of_global(s, other, h, square, d) + load(s.star + d) * with +
                               load(s.context + d) * (2 * context_square));
    // (4) and (2)
    T* const d_share = numbers_ + 3 * size_;
    along<T>(s.fused, own.n, wide_, wide_, d_context, d_share, own.ld);
    T along_share = 0;
    for (int64_t i = 0; i < own.n; ++i) along_share += s.share()[i] * d_share[i];
    for (int64_t i = 0; i < own.n; ++i) {
      const T norm = own.norm()[i], both = norm * std::sqrt(std::max(s.square()[i], tiny));
      const T d_dot = local / std::max(both, T(EPS)), lost = both >= T(EPS) ? s.dot()[i] * d_dot : T(0);
      const T d_square = s.square()[i] >= tiny ? -lost / s.square()[i] : T(0);  // twice
      row(s, i, own, pool, s.share()[i], s.share()[i] * (d_share[i] - along_share), d_dot, d_square,
          norm > 0 ? -lost / norm / norm : T(0), d_own, d_pool);
    }
    // What far rows get: as those attended to, as those that the context vector attends to, and by their lengths.
    if (d_far.rows)
      gemm<T>(far.n, wide_, own.n, Left<T>{weights, ld}, Right<T>{s.attended, wide_},
              [&](int64_t j, int64_t d) {
                j = least(j, far.n - 1);
                return d_far.get(d_far.rows + j * d_far.D, d, d_far.D) + load(d_star + d) * s.found()[j] +
                       load(s.context + d) * z[j] + load(far.rows + j * wide_ + d) * far_norm[j];
              },
              [&](int64_t j, int64_t d, Vec<T> x) { d_far.put(d_far.rows + j * d_far.D, d, d_far.D, x); });
    if (d_far.other_gates)
      gemm<T>(far.n, wide_, own.n, Left<T>{weights, ld}, Right<T>{s.gates, wide_},
              [&](int64_t j, int64_t d) {
                return d_far.get(d_far.other_gates + least(j, far.n - 1) * 2 * d_far.D, d, d_far.D);
              },
              [&](int64_t j, int64_t d, Vec<T> x) {
                d_far.put(d_far.other_gates + j * 2 * d_far.D, d, d_far.D, x);
              });
  }

  // The backward pass of one row. share: its gamma. d_logit: the gradient of pool . fused; d_dot: of row . attended;
  // d_square: twice that of |attended|^2; d_norm: that of |row|, divided by |row|.
  void row(VectorSide<T>& s, int64_t i, const Item<T>& own, const T* pool, T share, T d_logit, T d_dot, T d_square,
           T d_norm, const RowGradients<T>& d_own, T* d_pool) {
    const T *const x = own.rows + i * wide_, *const fused = s.fused + i * wide_, *const d_context = vectors_ + wide_;
    T *const attended = s.attended + i * wide_, *const gates = s.gates + i * wide_, *const d_row = vectors_ + 2 * wide_;
    for (int64_t d = 0; d < wide_; d += LANES<T>) {
      const Vec<T> v = load(x + d), u = load(attended + d), g = load(gates + d), rest = T(1) - g;
      const Vec<T> d_fused = load(d_context + d) * share + load(pool + d) * d_logit;
      store(d_pool + d, load(d_pool + d) + load(fused + d) * d_logit);
      store(attended + d, d_fused * rest + v * d_dot + u * d_square);
      store(gates + d, d_fused * (v - u) * g * rest);
      store(d_row + d, d_fused * g + u * d_dot + v * d_norm);
    }
    const auto add = [&](T* to, const T* from) {
      for (int64_t d = 0; to && d < d_own.D; d += LANES<T>)
        d_own.put(to, d, d_own.D, d_own.get(to, d, d_own.D) + load(from + d));
    };
    add(d_own.rows ? d_own.rows + i * d_own.D : nullptr, d_row);
    add(d_own.own_gates ? d_own.own_gates + i * 2 * d_own.D : nullptr, gates);
  }

  const Alignment& problem_;
  PairVectors<T> forward_;
  int64_t wide_, size_;
  Buffer<T> numbers_, vectors_;
  RowProducts<T> products_;
  Buffer<T> d_weight_, scratch_;
};

}  // namespace itm_fast
