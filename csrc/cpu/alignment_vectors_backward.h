// The gradients of one pair of hierarchical_alignment_score with vector gates: the chain rule through (7) to (1) of
// itm_fast/ops/hierarchical_alignment_score.py, where vectors are formed once more. One thread works on one pair.
#pragma once
#include "alignment_backward.h"
#include "alignment_vectors.h"
#include "cross_attention_rows.h"

namespace itm_fast {

// c[i][j] = sum of a_i b_j + e_i f_j over all `wide` features, for n rows a and e and m rows b and f, `apart` values
// apart; zeros from m on up to ld. Vector lanes run along the features, so no row is transposed. E is what the products
// multiply: T, or pairs of bfloat16 values.
template <class T, class E>
class RowProducts {
 public:
  RowProducts(int64_t own, int64_t most, int64_t wide, int64_t apart)
      : wide_(wide), apart_(apart), read_(IS_PAIR<E> ? round_up(paired_size<T>(wide), LANES<T>) : wide),
        step_(IS_PAIR<E> ? read_ : apart), sums_(ROWS * round_up(most, LANES<T>) * LANES<T>),
        pairs_(IS_PAIR<E> ? 2 * (own + most) * step_ : 0) {}

  void run(int64_t n, int64_t m, const T* a, const T* b, const T* e, const T* f, T* c, int64_t ld) {
#if defined(__AVX512BF16__)
    if constexpr (IS_PAIR<E>) {
      T* to = pairs_;
      const auto take = [&](const T*& x, int64_t count) {
        const T* const first = to;
        for (int64_t r = 0; r < count; ++r, to += step_) paired(x + r * apart_, wide_, to);
        x = first;
      };
      take(a, n), take(e, n), take(b, m), take(f, m);
    }
#endif
    const int64_t blocks = (m + COLUMNS - 1) / COLUMNS;
    for (int64_t i = 0; i < n; i += ROWS) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = m * block / blocks;
        columns<COLUMNS>(m * (block + 1) / blocks - first, i, n, first, m, a, b, e, f);
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
  void columns(int64_t count, int64_t i, int64_t n, int64_t j, int64_t m, const T* a, const T* b, const T* e,
               const T* f) {
    if (count == WIDE) return tile<WIDE>(i, n, j, m, a, b, e, f);
    if constexpr (WIDE > 1) columns<WIDE - 1>(count, i, n, j, m, a, b, e, f);
  }
  template <int WIDE>
  void tile(int64_t i, int64_t n, int64_t j, int64_t m, const T* a, const T* b, const T* e, const T* f) {
    Vec<T> c[ROWS][WIDE]{};
    int64_t at[ROWS];
    for (int r = 0; r < ROWS; ++r) at[r] = least(i + r, n - 1) * step_;
    const auto add = [&](const T* x, const T* y) {
      for (int64_t d = 0; d < read_; d += LANES<T>) {
        Vec<T> row[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) row[r] = load(x + at[r] + d);
#pragma GCC unroll 6
        for (int k = 0; k < WIDE; ++k) {
          const Vec<T> column = load(y + (j + k) * step_ + d);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) c[r][k] = sum_of(c[r][k], row[r], column);
        }
      }
    };
    add(a, b);
    add(e, f);
    for (int r = 0; r < ROWS; ++r)
      for (int k = 0; k < WIDE; ++k) store(sums_ + (r * m + j + k) * LANES<T>, c[r][k]);
  }

  // sum + x y, for each lane.
  static Vec<T> sum_of(Vec<T> sum, Vec<T> x, Vec<T> y) {
#if defined(__AVX512BF16__)
    if constexpr (IS_PAIR<E>) return (Vec<T>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
    else
#endif
      return sum + x * y;
  }

  int64_t wide_, apart_, read_, step_;  // of the rows, and of what is multiplied
  Buffer<T> sums_, pairs_;
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

// What own rows give the rows of the other modality, "far", to which they and their context vector attend, and these
// rows' terms of their gates. It is collected for some pairs with the same far rows and added by one product for rows
// and one for gates: words of a single caption are so few that reading and writing the gradients would take longer.
template <class T, class E>
class FarGradients {
 public:
  // Holds one pair with up to `most` own rows and up to `far` far rows; or, if `pairs` > 1, up to so many with together
  // at most ROWS own rows, or at most `most` where that is more.
  FarGradients(int64_t pairs, int64_t most, int64_t far, int64_t wide)
      : pairs_(pairs), room_(std::max(most, pairs > 1 ? ROWS : 0)), wide_(wide), apart_(padded<T>(wide)),
        rows_((2 * pairs + room_) * apart_), gates_(room_ * apart_),
        weights_((2 * pairs + room_) * Item<T>::whole(far)), norms_(Item<T>::whole(far)),
        left_(IS_PAIR<E> ? depth<E>(2 * pairs + room_) * Item<T>::whole(far) : 0),
        right_(IS_PAIR<E> ? depth<E>(2 * pairs + room_) * apart_ : 0) {}

  bool fits(int64_t own) const { return taken_ < pairs_ && used_ + own <= room_; }
  // Where the next pair has what its own rows attend to and their gates, and leaves the gradients of both.
  T* attended() const { return rows_ + (2 * pairs_ + used_) * apart_; }
  T* gates() const { return gates_ + used_ * apart_; }

  // Takes the next pair: its attention [own][far.ld]; how much of d_star and of the context vector each far row gets,
  // `found` and z; and how much of itself, by its length's gradient.
  void take(int64_t own, const Item<T>& far, const T* weights, const T* found, const T* d_star, const T* z,
            const T* context, const T* norm) {
    const int64_t ld = far.ld, first = 2 * (pairs_ - ++taken_);
    std::copy_n(weights, own * ld, weights_ + (2 * pairs_ + used_) * ld);
    std::copy_n(found, ld, weights_ + first * ld);
    std::copy_n(z, ld, weights_ + (first + 1) * ld);
    std::copy_n(d_star, wide_, rows_ + first * apart_);
    std::copy_n(context, wide_, rows_ + (first + 1) * apart_);
    for (int64_t j = 0; j < far.n; ++j) norms_[j] += norm[j];
    used_ += own;
  }

  // Adds what the pairs give, and forgets them.
  void add(const Item<T>& far, const RowGradients<T>& to) {
    const int64_t first = 2 * (pairs_ - taken_), ld = far.ld, D = to.D, last = far.n - 1;
    const auto into = [D](T* out, int64_t step) {
      return [=](int64_t j, int64_t d, Vec<T> x) { RowGradients<T>::put(out + j * step, d, D, x); };
    };
    const auto product = [&](int64_t K, const T* weights, const T* rows, auto begin, auto end) {
      gemm<E>(far.n, wide_, depth<E>(K), Left<E>{factors<E>(K, ld, weights, ld, left_ + 0), ld},
              Right<E>{factors<E>(K, wide_, rows, apart_, right_ + 0), apart_}, begin, end);
    };
    if (taken_ && to.rows)
      product(2 * taken_ + used_, weights_ + first * ld, rows_ + first * apart_,
              [=, rows = far.rows + 0, apart = apart_, norms = norms_ + 0, out = to.rows](int64_t j, int64_t d) {
                j = least(j, last);
                return RowGradients<T>::get(out + j * D, d, D) + load(rows + j * apart + d) * norms[j];
              },
              into(to.rows, D));
    if (taken_ && to.other_gates)
      product(used_, weights_ + 2 * pairs_ * ld, gates_ + 0,
              [=, out = to.other_gates](int64_t j, int64_t d) {
                return RowGradients<T>::get(out + least(j, last) * 2 * D, d, D);
              },
              into(to.other_gates, 2 * D));
    std::fill_n(norms_ + 0, ld, T(0));
    taken_ = used_ = 0;
  }

 private:
  static constexpr int64_t ROWS = 104;  // of eight captions of 13 words

  int64_t pairs_, room_, wide_, apart_, taken_ = 0, used_ = 0;
  // Rows and weights begin with d_star and the context vector of each pair, the last one first.
  Buffer<T> rows_, gates_, weights_, norms_;
  Buffer<E> left_, right_;  // of a product
};

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
        to_regions_(CAPTIONS, L, R, wide), wide_(wide), size_(forward_.image_side.size), numbers_(3 * size_),
        vectors_(2 * wide), products_(R, L, wide, forward_.apart), d_weight_(R * Item<T>::whole(L)),
        scratch_(R * Item<T>::whole(L)) {}

  // Overwrites the affinities A, [image.n][caption.ld] with zeros beyond the words, by their gradients, given that of
  // the score. Adds to the gradients of rows, and to those of the pools, `wide` numbers each. What words give the
  // image's rows is collected for some captions at a time; finish() adds the last of it.
  void run(T* A, const Item<T>& image, const Item<T>& caption, T grad, const T* image_pool, const T* caption_pool,
           const RowGradients<T>& d_image, const RowGradients<T>& d_caption, T* d_image_pool, T* d_caption_pool) {
    const bool by_image = problem_.image_side, by_caption = problem_.caption_side;
    VectorSide<T>&v = forward_.image_side, &t = forward_.caption_side;
    if (!to_regions_.fits(caption.n)) finish(image, d_image);
    v.attended = to_words_.attended(), v.gates = to_words_.gates();
    t.attended = to_regions_.attended(), t.gates = to_regions_.gates();
    forward_.score(A, image, caption, true, image_pool, caption_pool);
    T h = 0, square_v = 0, square_t = 0;
    cosine_backward(forward_.both, forward_.square_v, forward_.square_t, grad, h, square_v, square_t);
    const auto share = [&](double mix) { return by_image && by_caption ? grad * T(mix) : grad; };
    const auto each = [&](double mix, int64_t n) { return share(mix) / (problem_.mean ? T(n) : T(1)); };
    if (by_image) {
      side(v, t.global, h, square_v, each(problem_.local_mix, image.n), share(problem_.global_mix), v.weight, image,
           caption, image_pool, d_image, d_image_pool, to_words_);
      products_.run(image.n, caption.n, v.attended, caption.rows, v.gates, caption.other_gates, d_weight_, caption.ld);
      to_words_.add(caption, d_caption);
    } else {
      mean(v, t.global, h, square_v, image, d_image);
    }
    const auto of = [&](int64_t i, int64_t j) { return load(d_weight_ + i * caption.ld + j); };
    if (by_image) affinities_backward<true>(problem_, image.n, caption.ld, v.weight + 0, of, scratch_ + 0, A);
    if (by_caption) {
      side(t, v.global, h, square_t, each(1 - problem_.local_mix, caption.n), share(1 - problem_.global_mix), t.turned,
           caption, image, caption_pool, d_caption, d_caption_pool, to_regions_);
      products_.run(image.n, caption.n, image.rows, t.attended, image.other_gates, t.gates, d_weight_, caption.ld);
      affinities_backward<false>(problem_, image.n, caption.ld, t.weight + 0, of, scratch_ + 0, A);
    } else {
      mean(t, v.global, h, square_t, caption, d_caption);
    }
  }

  void finish(const Item<T>& image, const RowGradients<T>& d_image) { to_regions_.add(image, d_image); }

 private:
  static constexpr int64_t CAPTIONS = 8;  // whose words' gradients are collected

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
  // cos(context, star). weights: attention, [own rows][far.ld]. Overwrites `attended` by its gradient, and `gates` by
  // that of the gates before the sigmoid, which far rows have yet to get.
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
    for (int64_t i = 0; i < own.n; ++i) {
      const T norm = own.norm()[i], both = norm * std::sqrt(std::max(s.square()[i], tiny));
      const T d_dot = local / std::max(both, T(EPS)), lost = both >= T(EPS) ? s.dot()[i] * d_dot : T(0);
      const T d_square = s.square()[i] >= tiny ? -lost / s.square()[i] : T(0);  // twice
      const T d_share = inner(s.fused + i * forward_.apart, d_context, wide_);
      row(s, i, own, pool, s.share()[i], s.share()[i] * (d_share - along_share), d_dot, d_square,
          norm > 0 ? -lost / norm / norm : T(0), d_own, d_pool);
    }
    to_far.take(own.n, far, weights, s.found(), d_star, z, s.context, far_norm);
  }

  // The backward pass of one row. share: its gamma. d_logit: the gradient of pool . fused; d_dot: of row . attended;
  // d_square: twice that of |attended|^2; d_norm: that of |row|, divided by |row|.
  void row(VectorSide<T>& s, int64_t i, const Item<T>& own, const T* pool, T share, T d_logit, T d_dot, T d_square,
           T d_norm, const RowGradients<T>& d_own, T* d_pool) {
    const int64_t at = i * forward_.apart, D = d_own.D;
    const T *const x = own.rows + at, *const fused = s.fused + at, *const d_context = vectors_ + wide_;
    T *const attended = s.attended + at, *const gates = s.gates + at;
    T *const to = d_own.rows ? d_own.rows + i * D : nullptr;
    T *const to_gates = d_own.own_gates ? d_own.own_gates + i * 2 * D : nullptr;
    for (int64_t d = 0; d < wide_; d += LANES<T>) {
      const Vec<T> v = load(x + d), u = load(attended + d), g = load(gates + d), rest = T(1) - g;
      const Vec<T> d_fused = load(d_context + d) * share + load(pool + d) * d_logit;
      const Vec<T> d_gate = d_fused * (v - u) * g * rest;
      store(d_pool + d, load(d_pool + d) + load(fused + d) * d_logit);
      store(attended + d, d_fused * rest + v * d_dot + u * d_square);
      store(gates + d, d_gate);
      if (to) d_own.put(to, d, D, d_own.get(to, d, D) + (d_fused * g + u * d_dot + v * d_norm));
      if (to_gates) d_own.put(to_gates, d, D, d_own.get(to_gates, d, D) + d_gate);
    }
  }

  const Alignment& problem_;
  PairVectors<T, E> forward_;
  FarGradients<T, E> to_words_, to_regions_;
  int64_t wide_, size_;
  Buffer<T> numbers_, vectors_;
  RowProducts<T, E> products_;
  Buffer<T> d_weight_, scratch_;
};

}  // namespace itm_fast
