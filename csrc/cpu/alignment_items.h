// A call of hierarchical_alignment_score, forward or backward, and its images and captions as Items (alignment.h).
#pragma once
#include "alignment.h"
#include "cross_attention_score.h"

namespace itm_fast {

// The arguments of a call.
struct AlignmentCall {
  Source image, image_key, image_gate, words, word_key, word_gate, image_pool, caption_pool;
  int64_t I, R, D, P, K, T;
  const int64_t *cu_seqlens, *region_lengths;
  Alignment problem;
  void* score;
  int64_t threads;

  template <class Call>
  explicit AlignmentCall(const Call& c)
      : image{c.image, c.dtype}, image_key{c.image_key, c.dtype}, image_gate{c.image_gate, c.dtype},
        words{c.words, c.dtype}, word_key{c.word_key, c.dtype}, word_gate{c.word_gate, c.dtype},
        image_pool{c.image_pool, c.dtype}, caption_pool{c.caption_pool, c.dtype}, I(c.I), R(c.R), D(c.D), P(c.P),
        K(c.K), T(c.T), cu_seqlens(c.cu_seqlens), region_lengths(c.region_lengths),
        problem{c.direction != Direction::T2I, c.direction != Direction::I2T, c.pool == Pool::MEAN, c.scale,
                c.local_mix, c.global_mix},
        score(c.score), threads(c.threads) {}

  bool vector() const { return K > 1; }
  int64_t regions(int64_t i) const { return region_lengths ? region_lengths[i] : R; }
};

// One modality's tensors. `own`: 0 for images, 1 for words; it is also which of a row's two gate terms belongs to the
// gate of its own side, the other one being for the other side's gate.
struct Modality {
  Source rows, gates;
  int64_t own;
};

template <class T>
struct Pools {
  int64_t wide, apart;  // D in whole vectors, and how far rows of so many lie apart: padded() says why
  Buffer<T> image, caption;

  explicit Pools(const AlignmentCall& call)
      : wide(round_up(call.D, LANES<T>)), apart(padded<T>(wide)), image(wide), caption(wide) {
    Buffer<T> room(call.D);
    std::copy_n(read<T>(call.image_pool, 0, call.D, room), call.D, image + 0);
    std::copy_n(read<T>(call.caption_pool, 0, call.D, room), call.D, caption + 0);
  }
};

// Makes `made` rows first .. first + n: an Item with room for so many, with Gram matrix or with rows, and, if these are
// for a backward pass, with what that multiplies. E is what the products of features multiply. Where these are pairs,
// the Gram matrix is that of the same rounded rows: a squared length whose terms nearly cancel is then off by what
// rounding does to its vector, not to its terms.
template <class T, class E>
void take_rows(const AlignmentCall& call, const Modality& from, int64_t first, int64_t n, const Pools<T>& pools,
               bool formed, Item<T>& made, [[maybe_unused]] bool backward = false) {
  const int64_t D = call.D, K = call.K, wide = pools.wide, apart = pools.apart;
  Buffer<T> room(2 * std::max(D, K)), passing(formed ? 0 : n * apart);
  const T *own = from.own ? pools.caption : pools.image, *other = from.own ? pools.image : pools.caption;
  std::vector<const T*> row;
  made.n = n;
  made.ld = Item<T>::whole(n);
  made.highest = 0;
  std::fill_n(made.numbers + 0, 5 * made.ld, T(0));
  for (int64_t i = 0; i < n; ++i) {
    T* const x = (formed ? made.rows : passing) + i * apart;
    std::copy_n(read<T>(from.rows, (first + i) * D, D, room), D, x);
    row.push_back(x);
    const T* const gate = read<T>(from.gates, (first + i) * 2 * K, 2 * K, room);
    if (!call.vector()) {
      made.own()[i] = gate[from.own];
      made.other()[i] = gate[1 - from.own];
      made.pool_own()[i] = inner(x, own, wide);
      made.pool_other()[i] = inner(x, other, wide);
    } else if (formed) {
      std::copy_n(gate + from.own * K, K, made.own_gates + i * apart);
      std::copy_n(gate + (1 - from.own) * K, K, made.other_gates + i * apart);
    }
    if constexpr (IS_PAIR<E>)
      for (int64_t k = 0; !formed && k < D; ++k) x[k] = widen_bfloat16(uint16_t(narrow_bfloat16(x[k])));
    const T square = inner(x, x, wide);
    made.norm()[i] = std::sqrt(square);
    made.highest = std::max(made.highest, square);
  }
  if constexpr (IS_PAIR<E>) {
    if (formed) pair_rows(n, wide, made.rows, apart, made.row_pairs);
    if (formed && call.vector()) pair_rows(n, wide, made.other_gates, apart, made.gate_pairs);
    for (int64_t i = 0; backward && i < n; ++i) {
      paired(made.rows + i * apart, wide, made.row_features + i * feature_pairs<T>(wide));
      paired(made.other_gates + i * apart, wide, made.gate_features + i * feature_pairs<T>(wide));
    }
  }
  if (!formed) gram_matrix<T>([&](int64_t i) { return row[size_t(i)]; }, n, wide, nullptr, made.gram, made.ld);
}

// These rows as an Item; `formed`: it will be used where vectors of a pair are formed; `backward`: and their gradients.
template <class T, class E>
Item<T> item(const AlignmentCall& call, const Modality& from, int64_t first, int64_t n, const Pools<T>& pools,
             bool formed, bool backward = false) {
  Item<T> made(n, !formed, formed ? pools.apart : 0, formed && call.vector(), IS_PAIR<E> && formed,
               IS_PAIR<E> && backward ? feature_pairs<T>(pools.wide) : 0);
  take_rows<T, E>(call, from, first, n, pools, formed, made, backward);
  return made;
}

// Copies the columns of a caption's L words, n rows of them that lie `step` apart, to rows of an Item's ld, with zeros
// beyond the words. Reads up to a whole vector, but no column beyond the words where these are `shared`: other threads
// may be overwriting them.
template <class T, bool shared>
void gather(const T* from, int64_t step, int64_t n, int64_t L, T* to) {
  const int64_t ld = Item<T>::whole(L);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < ld; j += LANES<T>) {
      const T* const x = from + i * step + j;
      Vec<T> v{};
      if constexpr (!shared) v = select<T>(inside<T>(j, 0, L), load(x), v);
      else if (j < L) v = head(x, L - j);
      store(to + i * ld + j, v);
    }
}

}  // namespace itm_fast
