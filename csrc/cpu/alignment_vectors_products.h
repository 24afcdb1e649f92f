// The products in the gradients of one pair of hierarchical_alignment_score with vector gates: those of attention's
// weights, whose sums run over features, and those of far rows, whose sums run over own rows.
#pragma once
#include "alignment_backward.h"
#include "cross_attention_rows.h"

namespace itm_fast {

// c[i][j] = sum of a_i b_j + e_i f_j over all `wide` features, for n rows a and e and m rows b and f; zeros from m on
// up to ld. Vector lanes run along the features, so no row is transposed. E is what the products multiply: T, with rows
// `apart` values apart; or pairs of a row's bfloat16 values, with rows feature_pairs() apart and zeros beyond `wide`.
template <class T, class E>
class RowProducts {
 public:
  RowProducts(int64_t most, int64_t wide, int64_t apart)
      : read_(IS_PAIR<E> ? round_up(wide / 2, LANES<T>) : wide), step_(IS_PAIR<E> ? feature_pairs<T>(wide) : apart),
        sums_(ROWS * round_up(most, LANES<T>) * LANES<T>) {}

  void run(int64_t n, int64_t m, const T* a, const T* b, const T* e, const T* f, T* c, int64_t ld) {
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

  int64_t read_, step_;
  Buffer<T> sums_;
};

// The gradients of an item's rows and of their two terms of the gates, in tensors whose rows of D values lie D and
// 2 D apart; null if they are not wanted.
template <class T>
struct RowGradients {
  T *rows, *own_gates, *other_gates;
  int64_t D;

  static Vec<T> get(const T* row, int64_t d, int64_t D) {
    if (d + LANES<T> <= D) return load(row + d);
    return d < D ? head(row + d, D - d) : Vec<T>{};
  }
  static void put(T* row, int64_t d, int64_t D, Vec<T> v) {
    if (d + LANES<T> <= D) store(row + d, v);
    else if (d < D) store_head(row + d, v, D - d);
  }
};

// What own rows give the rows of the other modality, "far", to which they and their context vector attend, and these
// rows' terms of their gates. It is collected for some pairs with the same far rows and added by one product for rows
// and one for gates: words of a single caption are so few that reading and writing the gradients would take longer.
template <class T, class E>
class FarGradients {
 public:
  // Holds one pair with up to `most` own rows and up to `far` far rows; or, if `pairs` > 1, up to so many with together
  // at most about ROWS own rows, or at most `most` where that is more.
  FarGradients(int64_t pairs, int64_t most, int64_t far, int64_t wide)
      : pairs_(pairs), room_(depth<E>(std::max(most, pairs > 1 ? ROWS : 0)) + (IS_PAIR<E> ? pairs / 2 : 0)),
        wide_(wide), apart_(padded<T>(wide)), rows_((HEAD * pairs + room_) * apart_), gates_(room_ * apart_),
        weights_((HEAD * pairs + room_) * Item<T>::whole(far)), norms_(Item<T>::whole(far)) {}

  bool fits(int64_t own) const { return taken_ < pairs_ && used_ + depth<E>(own) <= room_; }
  // Where the next pair leaves the gradients of what its own rows attend to, and of their gates.
  E* attended() const { return rows_ + (HEAD * pairs_ + used_) * apart_; }
  E* gates() const { return gates_ + used_ * apart_; }

  // Takes the next pair: its attention [own][far.ld]; how much of d_star and of the context vector each far row gets,
  // `found` and z; and how much of itself, by its length's gradient.
  void take(int64_t own, const Item<T>& far, const T* weights, const T* found, const T* d_star, const T* z,
            const T* context, const T* norm) {
    const int64_t ld = far.ld, first = HEAD * (pairs_ - ++taken_);
    E* const to = weights_ + (HEAD * pairs_ + used_) * ld;
    if constexpr (IS_PAIR<E>) pair_rows(own, ld, weights, ld, to);
    else std::copy_n(weights, own * ld, to);
    put_both(found, z, ld, weights_ + first * ld, ld);
    put_both(d_star, context, wide_, rows_ + first * apart_, apart_);
    for (int64_t j = 0; j < far.n; ++j) norms_[j] += norm[j];
    used_ += depth<E>(own);
  }

  // Adds what the pairs give, and forgets them.
  void add(const Item<T>& far, const RowGradients<T>& to) {
    const int64_t first = HEAD * (pairs_ - taken_), ld = far.ld, D = to.D, last = far.n - 1;
    const auto into = [D](T* out, int64_t step) {
      return [=](int64_t j, int64_t d, Vec<T> x) { RowGradients<T>::put(out + j * step, d, D, x); };
    };
    if (taken_ && to.rows)
      gemm<E>(far.n, wide_, HEAD * taken_ + used_, Left<E>{weights_ + first * ld, ld},
              Right<E>{rows_ + first * apart_, apart_},
              [=, rows = far.rows + 0, apart = apart_, norms = norms_ + 0, out = to.rows](int64_t j, int64_t d) {
                j = least(j, last);
                return RowGradients<T>::get(out + j * D, d, D) + load(rows + j * apart + d) * norms[j];
              },
              into(to.rows, D));
    if (taken_ && to.other_gates)
      gemm<E>(far.n, wide_, used_, Left<E>{weights_ + HEAD * pairs_ * ld, ld}, Right<E>{gates_ + 0, apart_},
              [=, out = to.other_gates](int64_t j, int64_t d) {
                return RowGradients<T>::get(out + least(j, last) * 2 * D, d, D);
              },
              into(to.other_gates, 2 * D));
    std::fill_n(norms_ + 0, ld, T(0));
    taken_ = used_ = 0;
  }

 private:
  static constexpr int64_t ROWS = 104;          // of eight captions of 13 words
  static constexpr int64_t HEAD = depth<E>(2);  // rows of E that hold two rows

  // Two rows of n values as rows of E, ld apart.
  static void put_both(const T* even, const T* odd, int64_t n, E* to, [[maybe_unused]] int64_t ld) {
    for (int64_t k = 0; k < n; k += LANES<T>) {
      if constexpr (IS_PAIR<E>) {
        store(reinterpret_cast<T*>(to + k), in_pairs(load(even + k), load(odd + k)));
      } else {
        store(to + k, load(even + k));
        store(to + ld + k, load(odd + k));
      }
    }
  }

  int64_t pairs_, room_, wide_, apart_, taken_ = 0, used_ = 0;  // room_ and used_: rows of E
  // Rows and weights begin with d_star and the context vector of each pair, the last one first.
  Buffer<E> rows_, gates_, weights_;
  Buffer<T> norms_;
};

}  // namespace itm_fast
