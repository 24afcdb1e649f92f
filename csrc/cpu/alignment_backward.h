// The gradients of one pair of hierarchical_alignment_score with scalar gates, from its coefficients: the chain rule
// through (9) to (2), and (10) and (11), of itm_fast/ops/hierarchical_alignment_score.py.
//
// With v_c = (p, q), t_c = (s, r), t*_c = (0, a) and v*_c = (b, 0) as coefficients of the rows [V; T], the products of
// the score's vectors depend on K = [G C; C^T H] by
//
//     d K = (p, q) x (e (p, q) + (0, z)) + f (0, a) x (0, a) + (s, r) x (e' (s, r) + (z', 0)) + f' (b, 0) x (b, 0)
//           + h (p, q + a) x (s + b, r)
//
// where e, f and h are the gradients of |context|^2, |found|^2 and v_g . t_g, and z that of the context's products with
// the rows that it attends to. One thread works on one pair.
#pragma once
#include "alignment.h"
#include "shuffle.h"

namespace itm_fast {

// Adds to the gradients of dot and of the squared lengths of cosine(dot, a, b).
template <class T>
inline void cosine_backward(T dot, T a, T b, T grad, T& d_dot, T& d_a, T& d_b) {
  constexpr T tiny = std::numeric_limits<T>::min();
  const T both = std::sqrt(std::max(a, tiny)) * std::sqrt(std::max(b, tiny));
  d_dot += grad / std::max(both, T(EPS));
  if (!(both >= T(EPS))) return;
  const T half = -grad * dot / both / 2;
  if (a >= tiny) d_a += half / a;
  if (b >= tiny) d_b += half / b;
}

// (1): d A, which the image side writes and the caption side adds to, or writes if it is alone. of(i, j): the gradients
// of the weights of region i and words j ...; `room` holds R rows.
template <bool IMAGE, class T, class Of>
inline void affinities_backward(const Alignment& problem, int64_t R, int64_t ld, const T* weight, Of of, T* room,
                                T* A) {
  const T scale = T(problem.scale);
  if (IMAGE) {
    for (int64_t i = 0; i < R; ++i) {
      Vec<T> all{};
      for (int64_t j = 0; j < ld; j += LANES<T>) {
        const Vec<T> d = of(i, j) * load(weight + i * ld + j);
        store(room + j, d);
        all += d;
      }
      const T mean = sum<T>(all);
      for (int64_t j = 0; j < ld; j += LANES<T>)
        store(A + i * ld + j, (load(room + j) - load(weight + i * ld + j) * mean) * scale);
    }
    return;
  }
  for (int64_t j = 0; j < ld; j += LANES<T>) {
    Vec<T> mean{};
    for (int64_t i = 0; i < R; ++i) {
      const Vec<T> d = of(i, j) * load(weight + i * ld + j);
      store(room + i * ld + j, d);
      mean += d;
    }
    for (int64_t i = 0; i < R; ++i) {
      const Vec<T> d = (load(room + i * ld + j) - load(weight + i * ld + j) * mean) * scale;
      store(A + i * ld + j, problem.image_side ? load(A + i * ld + j) + d : d);
    }
  }
}

template <class T>
class AlignmentGradient {
 public:
  AlignmentGradient(const Alignment& problem, int64_t R, int64_t L)
      : problem_(problem), forward_(problem, R, L), v_(forward_.image_side), t_(forward_.caption_side), size_(v_.size),
        of_image_(size_), of_caption_(size_), turned_((Item<T>::whole(L) + 3) * Item<T>::whole(R)),
        scaled_((std::max(R, L) + 3) * size_), d_weight_(R * Item<T>::whole(L)), x_(size_), y_(size_) {}
  AlignmentGradient(AlignmentGradient&&) = delete;  // v_ and t_ are parts of it

  // Overwrites the affinities A and the products C, both [image.n][caption.ld] with zeros beyond the words, by their
  // gradients, given that of the score; adds those of the items' numbers and Gram matrices to d_image and d_caption.
  void run(T* A, T* C, const Item<T>& image, const Item<T>& caption, T grad, Item<T>& d_image, Item<T>& d_caption) {
    const int64_t R = image.n, ld = caption.ld;
    const bool by_image = problem_.image_side, by_caption = problem_.caption_side;
    forward_.score(A, C, image, caption);
    if (!by_image) mean<true>(C, image, caption);
    if (!by_caption) mean<false>(C, image, caption);
    along<T>(C, R, ld, ld, v_.found(), of_image_.found, image.ld);
    across<T>(t_.found(), C, R, ld, ld, of_caption_.found);
    T h = 0;
    of_image_.reset();
    of_caption_.reset();
    cosine_backward(forward_.both, forward_.square_v, forward_.square_t, grad, h, of_image_.whole, of_caption_.whole);
    const auto share = [&](double mix) { return by_image && by_caption ? grad * T(mix) : grad; };
    const auto each = [&](double mix, int64_t n) { return share(mix) / (problem_.mean ? T(n) : T(1)); };
    side<true>(C, image, caption, each(problem_.local_mix, R), share(problem_.global_mix), h, d_image, d_caption);
    side<false>(C, caption, image, each(1 - problem_.local_mix, caption.n), share(1 - problem_.global_mix), h,
                d_caption, d_image);
    if (by_image) affinities<true>(A, C, image, caption);
    if (by_caption) affinities<false>(A, C, image, caption);
    products(C, image, caption, h);
    grams(image, caption, h, d_image, d_caption);
  }

 private:
  // Gradients of one side. Of own rows: of dot, square, the gate's and the pool's attended terms; `found` holds the
  // products of found with own rows. Of far rows: z, and that of the coefficients `far`.
  struct Pass {
    Buffer<T> d_dot, d_square, d_gate, d_pool, found, z, d_far;
    T whole, context_square, found_square;  // of |v_g|^2 (|t_g|^2); e and f

    explicit Pass(int64_t size)
        : d_dot(size), d_square(size), d_gate(size), d_pool(size), found(size), z(size), d_far(size) {}
    void reset() { whole = context_square = found_square = 0; }
  };

  // The side of a modality that attends to nothing: its global vector is the mean of its rows.
  template <bool IMAGE>
  void mean(const T* C, const Item<T>& image, const Item<T>& caption) {
    AlignmentSide<T>& s = IMAGE ? v_ : t_;
    const int64_t n = IMAGE ? image.n : caption.n;
    std::fill_n(s.own(), size_, T(0));
    std::fill_n(s.own(), n, T(1) / T(n));
    for (T* const none : {s.far(), s.rest(), s.found(), s.found_gram()}) std::fill_n(none, size_, T(0));
    if (IMAGE) forward_.products(C, image, caption, s.own(), s.far(), s.with_own(), s.with_far());
    else forward_.products(C, image, caption, s.far(), s.own(), s.with_far(), s.with_own());
  }

  // C x for numbers of far rows, and its transpose, into numbers of the side's own rows.
  template <bool IMAGE>
  static void to_own(const T* C, const Item<T>& own, const Item<T>& far, const T* x, T* out) {
    if (IMAGE) along<T>(C, own.n, far.ld, far.ld, x, out, own.ld);
    else across<T>(x, C, far.n, own.ld, own.ld, out);
  }
  template <bool IMAGE>
  static void to_far(const T* C, const Item<T>& own, const Item<T>& far, const T* x, T* out) {
    if (IMAGE) across<T>(x, C, own.n, far.ld, far.ld, out);
    else along<T>(C, far.n, own.ld, own.ld, x, out, far.ld);
  }

  // (7) to (2), down to what attention's weights get: fills the side's Pass. local, whole: the gradients of a row's
  // cosine and of cos(context, found).
  template <bool IMAGE>
  void side(const T* C, const Item<T>& own, const Item<T>& far, T local, T whole, T h, Item<T>& d_own, Item<T>& d_far) {
    constexpr T tiny = std::numeric_limits<T>::min();
    const AlignmentSide<T>&s = IMAGE ? v_ : t_, &other = IMAGE ? t_ : v_;
    Pass &pass = IMAGE ? of_image_ : of_caption_, &others = IMAGE ? of_caption_ : of_image_;
    pass.context_square = pass.whole;
    if (!(IMAGE ? problem_.image_side : problem_.caption_side)) {
      std::fill_n(pass.z + 0, size_, T(0));
      return;
    }
    T with = 2 * pass.whole;
    pass.found_square = pass.whole;
    cosine_backward(s.with, s.context_square, s.found_square, whole, with, pass.context_square, pass.found_square);
    // The other side's global vector times far rows, and times own rows.
    const auto other_far = [&](int64_t j) { return load(other.with_own() + j) + load(others.found + j); };
    const auto other_own = [&](int64_t i) { return load(other.with_far() + i) + load(other.found_gram() + i); };
    // (5)
    Vec<T> along_found{};
    for (int64_t j = 0; j < far.ld; j += LANES<T>) {
      const Vec<T> d =
          load(s.with_far() + j) * with + load(s.found_gram() + j) * (2 * pass.found_square) + other_far(j) * h;
      store(x_ + j, d);
      along_found += load(s.found() + j) * d;
    }
    const T mean = sum<T>(along_found), length = std::sqrt(std::max(s.context_square, tiny));
    Vec<T> lost_all{};
    for (int64_t j = 0; j < far.ld; j += LANES<T>) {
      const Vec<T> norm = load(far.norm() + j), both = norm * length, bounded = max<T>(both, splat(T(EPS)));
      const Vec<T> share = load(s.found() + j), d_x = share * (load(x_ + j) - mean);
      const Vec<T> lost = both >= T(EPS) ? d_x * load(s.with_far() + j) / bounded : Vec<T>{};
      store(d_far.norm() + j, load(d_far.norm() + j) - (norm > 0 ? lost / norm : Vec<T>{}));
      lost_all += lost;
      store(pass.z + j, d_x / bounded + share * with);
    }
    if (s.context_square >= tiny) pass.context_square -= sum<T>(lost_all) / (2 * s.context_square);
    // (8): the coefficients of the context vector.
    across<T>(pass.z, far.gram, far.n, far.ld, far.ld, pass.d_far);
    for (int64_t j = 0; j < far.ld; j += LANES<T>)
      store(pass.d_far + j,
            load(pass.d_far + j) + load(s.with_far() + j) * (2 * pass.context_square) + other_far(j) * h);
    to_own<IMAGE>(C, own, far, pass.z, x_);
    to_own<IMAGE>(s.weight, own, far, pass.d_far, y_);  // what gamma (1 - g) gets
    const auto gate = [&](int64_t i) {
      return select<T>(inside<T>(i, 0, own.n), sigmoid<T>(load(own.own() + i) + load(s.gate() + i)), Vec<T>{});
    };
    Vec<T> along_gamma{};
    for (int64_t i = 0; i < own.ld; i += LANES<T>) {
      const Vec<T> d_p = load(x_ + i) + load(s.with_own() + i) * (2 * pass.context_square) + other_own(i) * h;
      const Vec<T> g = gate(i);
      store(x_ + i, d_p);
      along_gamma += (load(s.own() + i) + load(s.rest() + i)) * (d_p * g + load(y_ + i) * (T(1) - g));
    }
    const T mean_gamma = sum<T>(along_gamma);
    for (int64_t i = 0; i < own.ld; i += LANES<T>) {
      const Vec<Int<T>> real = inside<T>(i, 0, own.n);
      const Vec<T> g = gate(i), d_p = load(x_ + i), d_rest = load(y_ + i);
      // (4) and (3)
      const Vec<T> gamma = load(s.own() + i) + load(s.rest() + i);
      const Vec<T> d_logit = gamma * (d_p * g + d_rest * (T(1) - g) - mean_gamma);
      const Vec<T> d_g = gamma * (d_p - d_rest) + d_logit * (load(own.pool_own() + i) - load(s.pool() + i));
      const Vec<T> d_gate = select<T>(real, d_g * g * (T(1) - g), Vec<T>{});
      store(pass.d_gate + i, d_gate);
      store(pass.d_pool + i, select<T>(real, d_logit * (T(1) - g), Vec<T>{}));
      store(d_own.own() + i, load(d_own.own() + i) + d_gate);
      store(d_own.pool_own() + i, load(d_own.pool_own() + i) + select<T>(real, d_logit * g, Vec<T>{}));
      // (2)
      const Vec<T> square = load(s.square() + i), norm = load(own.norm() + i);
      const Vec<T> both = norm * root(max<T>(square, splat(tiny))), bounded = max<T>(both, splat(T(EPS)));
      const Vec<T> lost = both >= T(EPS) ? load(s.dot() + i) / bounded * local : Vec<T>{};
      store(pass.d_dot + i, select<T>(real, local / bounded, Vec<T>{}));
      store(pass.d_square + i, select<T>(real & (square >= tiny), lost / square * T(-0.5), Vec<T>{}));
      store(d_own.norm() + i, load(d_own.norm() + i) - select<T>(real & (norm > 0), lost / norm, Vec<T>{}));
    }
    const auto add = [&](const T* x, T* to) {
      to_far<IMAGE>(s.weight, own, far, x, x_);
      for (int64_t j = 0; j < far.ld; j += LANES<T>) store(to + j, load(to + j) + load(x_ + j));
    };
    add(pass.d_gate, d_far.other());
    add(pass.d_pool, d_far.pool_other());
  }

  // What attention's weights get, and from it d A.
  template <bool IMAGE>
  void affinities(T* A, const T* C, const Item<T>& image, const Item<T>& caption) {
    const int64_t R = image.n, ld = caption.ld;
    const AlignmentSide<T>& s = IMAGE ? v_ : t_;
    const Pass& pass = IMAGE ? of_image_ : of_caption_;
    const Item<T>& far = IMAGE ? caption : image;
    // d weight of region i and words j ...; an own row's number stands for all far rows, and the other way round.
    const auto of = [&](int64_t i, int64_t j) {
      const auto own = [&](const T* x) { return IMAGE ? splat(x[i]) : load(x + j); };
      const auto others = [&](const T* x) { return IMAGE ? load(x + j) : splat(x[i]); };
      return load(C + i * ld + j) * own(pass.d_dot) + others(far.other()) * own(pass.d_gate) +
             others(far.pool_other()) * own(pass.d_pool) + load(s.product + i * ld + j) * (own(pass.d_square) * T(2)) +
             own(s.rest()) * others(pass.d_far);
    };
    affinities_backward<IMAGE>(problem_, R, ld, s.weight + 0, of, d_weight_ + 0, A);
  }

  // d C: (p)(2 e q + z + h r)^T + (2 e' s + z')(r)^T + h (s + b)(q + a)^T, and what (2) adds.
  void products(T* C, const Item<T>& image, const Item<T>& caption, T h) {
    const int64_t R = image.n, ld = caption.ld;
    const T e = 2 * of_image_.context_square, f = 2 * of_caption_.context_square;
    const T *p = v_.own(), *q = v_.far(), *r = t_.own(), *s = t_.far();
    for (int64_t j = 0; j < ld; j += LANES<T>) {
      const Vec<T> of_p = load(q + j) * e + load(of_image_.z + j) + load(r + j) * h, of_s = load(r + j);
      const Vec<T> of_sum = (load(q + j) + load(v_.found() + j)) * h, dot = load(of_caption_.d_dot + j);
      for (int64_t i = 0; i < R; ++i) {
        Vec<T> d = of_p * p[i] + of_s * (s[i] * f + of_caption_.z[i]) + of_sum * (s[i] + t_.found()[i]);
        if (problem_.image_side) d += load(v_.weight + i * ld + j) * of_image_.d_dot[i];
        if (problem_.caption_side) d += load(t_.weight + i * ld + j) * dot;
        store(C + i * ld + j, d);
      }
    }
  }

  // (10): adds d H = sum_i d|t*_i|^2 alpha_i x alpha_i + q x (e q + z) + f a x a + r x (e' r + h (q + a)), and d G,
  // alike but for h, of which it has p x h (s + b).
  void grams(const Item<T>& image, const Item<T>& caption, T h, Item<T>& d_image, Item<T>& d_caption) {
    const int64_t R = image.n, L = caption.n, ld = caption.ld, wide = image.ld;
    const auto add = [&](T* rows, int64_t count, int64_t width, const T* d_square, const T* found, T of_found,
                         const T* far, T of_far, const T* z, const T* own, T of_own, const T* other,
                         const T* other_found, Item<T>& d_item) {
      T* const to = rows + count * width;
      for (int64_t j = 0; j < width; j += LANES<T>) {
        for (int64_t k = 0; k < count; ++k)
          store(scaled_ + k * width + j, load(rows + k * width + j) * d_square[k]);
        T* const scaled = scaled_ + count * width + j;
        store(to + j, load(far + j));
        store(scaled, load(far + j) * of_far + load(z + j));
        store(to + width + j, load(found + j));
        store(scaled + width, load(found + j) * of_found);
        store(to + 2 * width + j, load(own + j));
        store(scaled + 2 * width, load(own + j) * of_own + (load(other + j) + load(other_found + j)) * h);
      }
      T* const gram = d_item.gram;
      gemm<T>(d_item.n, d_item.n, count + 3, Left<T>{rows, width}, Right<T>{scaled_, width},
              [&](int64_t i, int64_t j) { return load(gram + least(i, d_item.n - 1) * width + j); },
              [&](int64_t i, int64_t j, Vec<T> c) { store(gram + i * width + j, c); });
    };
    add(v_.weight, problem_.image_side ? R : 0, ld, of_image_.d_square, v_.found(), of_image_.found_square, v_.far(),
        of_image_.context_square, of_image_.z, t_.own(), of_caption_.context_square, v_.far(), v_.found(), d_caption);
    if (problem_.caption_side) transpose_by_squares<T>(t_.weight, ld, R, ld, turned_, wide);
    add(turned_, problem_.caption_side ? L : 0, wide, of_caption_.d_square, t_.found(), of_caption_.found_square,
        t_.far(), of_caption_.context_square, of_caption_.z, v_.own(), of_image_.context_square, t_.far(), t_.found(),
        d_image);
  }

  const Alignment& problem_;
  Coefficients<T> forward_;
  AlignmentSide<T>&v_, &t_;
  int64_t size_;
  Pass of_image_, of_caption_;
  Buffer<T> turned_, scaled_, d_weight_, x_, y_;
};

}  // namespace itm_fast
