// Gradients of hierarchical_alignment_score: (10) and (11) of itm_fast/ops/hierarchical_alignment_score.py.
//
// The forward pass has kept the affinities and, with scalar gates, the products of features of all pairs. With such
// gates, in the first round a thread owns some captions: pair by pair it overwrites both by their gradients
// (alignment_backward.h), and sums the gradients of the captions' numbers and Gram matrices, and its part of the
// images'. In the second a thread owns an image or a caption: it adds the parts in order, and what numbers and Gram
// matrix give the rows. In the third it owns some features of all images or of all words: it adds the products with the
// gradients of the first round, and what the pools get. So every sum has one owner and one order, whatever the number
// of threads.
//
// With vector gates the first round adds to the gradients of rows, gates and pools itself (by_vectors()), and of the
// others only the products of keys are left.
//
// Where few pairs have a gradient, these alone are taken, and in the third round a thread owns an image or a caption:
// its products are with the rows of those that it has a gradient with.
//
// Scratch beyond inputs, gradients and what was kept: Gram matrices of all captions, at most 33 of each image (its own,
// its gradient, and that of each part), and 2 MiB a thread; with vector gates two rows for each image, and 7 MiB a
// thread with 36 regions of 1024 features, more where one caption alone is larger.
#include <memory>

#include "alignment_backward.h"
#include "alignment_items.h"
#include "alignment_vectors_backward.h"
#include "calls/hierarchical_alignment_score_kept.h"
#include "cross_attention_score_backward.h"

namespace itm_fast {
namespace {

// Of the first round: a part ends before it has more than the words of one of 16 equal parts, or 128. Two neighbours
// together have more, so there are at most 31, or one more than 2 N / 128.
constexpr int64_t EQUAL_PARTS = 16, PART_ROWS = 128;
constexpr int64_t GROUP_BYTES = 2 << 20;  // with vector gates: of a group's captions, about, one at the least
constexpr int64_t DEPTH_BYTES = 1024 * 4, LEFT_ROWS = 96;  // of the third: a product's depth, and its rows at a time

template <class T>
using Items = std::vector<std::unique_ptr<Item<T>>>;

// E is what the products of the third round, and those of rows in by_vectors(), multiply: T, or pairs of bfloat16
// values with sums in float32.
template <class T, class E = T>
struct AlignmentBackward {
  const HierarchicalAlignmentScoreKeptCall& given;
  const AlignmentCall call;
  const Pools<T> pools;
  const int64_t N;
  T *const affinity, *const product;   // [I][R][N]; no product, and none is marked as formed, with vector gates
  const T *const formed, *const grad;  // [I][T]
  const RowSets image_sets, caption_sets;
  const bool few;

  explicit AlignmentBackward(const HierarchicalAlignmentScoreKeptCall& c)
      : given(c), call(c), pools(call), N(c.N), affinity(static_cast<T*>(c.products)),
        product(call.vector() ? nullptr : affinity + c.I * c.R * N),
        formed(call.vector() ? nullptr : product + c.I * c.R * N), grad(static_cast<const T*>(c.grad)),
        image_sets(regions(call.image, c.I, c.R, c.D, c.region_lengths)),
        caption_sets(captions(call.words, c.T, c.D, c.cu_seqlens)),
        few((c.I * c.T - std::count(grad, grad + c.I * c.T, T(0))) * FEW <= c.I * c.T) {}

  void run() const {
    if (call.vector()) by_vectors();
    else by_coefficients();
  }

 private:
  void by_coefficients() const {
    Items<T> images = items(image_sets, 0), captions = items(caption_sets, 1), d_captions = zeros(caption_sets);
    const std::vector<Chunk> parts =
        chunks(caption_sets.edge.data(), call.T, std::max(PART_ROWS, (N + EQUAL_PARTS - 1) / EQUAL_PARTS));
    std::vector<Items<T>> d_images(parts.size());
    parallel(int64_t(parts.size()), call.threads, [&] {
      return [&, pair = AlignmentGradient<T>(call.problem, call.R, caption_sets.most),
              room = Buffer<T>(2 * call.R * Item<T>::whole(caption_sets.most))](int64_t part) mutable {
        d_images[size_t(part)] = zeros(image_sets);
        for (int64_t i = 0; i < call.I; ++i)
          for (int64_t t = parts[size_t(part)].first; t < parts[size_t(part)].last; ++t)
            take_pair(room, i, t, [&](T g, T* A, T* C) {
              pair.run(A, C, *images[size_t(i)], *captions[size_t(t)], g, *d_images[size_t(part)][size_t(i)],
                       *d_captions[size_t(t)]);
            });
      };
    });
    Items<T> all_images = zeros(image_sets);
    parallel(call.I + call.T, call.threads, [&] {
      return [&](int64_t k) {
        if (few && !(k < call.I ? has_gradient(k, true) : has_gradient(k - call.I, false))) return;
        if (k < call.I) {
          for (const Items<T>& part : d_images) sum(*part[size_t(k)], *all_images[size_t(k)]);
          finish(image_sets, k, *images[size_t(k)], *all_images[size_t(k)], 0);
        } else {
          finish(caption_sets, k - call.I, *captions[size_t(k - call.I)], *d_captions[size_t(k - call.I)], 1);
        }
      };
    });
    multiply();
    sum_pools(all_images, d_captions);
  }

  // Captions are cut into groups, and images into as many, which meet in `Rounds`. In a group, an image takes captions
  // in their order, a caption images in theirs. The pools have a gradient for each image, and these are added in order.
  void by_vectors() const {
    const int64_t wide = pools.wide, bytes = N * 3 * pools.apart * int64_t(sizeof(T));
    const int64_t couples = least((call.T + 1) / 2, std::max(EQUAL_PARTS / 2, bytes / (2 * GROUP_BYTES) + 1));
    const Rounds rounds(std::max<int64_t>(1, couples), call.threads);
    std::vector<int64_t> group;  // where each begins, with about as many words as the others, and where the last ends
    for (int64_t g = 0; g <= 2 * rounds.couples; ++g)
      group.push_back(std::lower_bound(call.cu_seqlens, call.cu_seqlens + call.T, N * g / (2 * rounds.couples)) -
                      call.cu_seqlens);
    Buffer<T> d_pools(call.I * 2 * wide);
    for (int64_t step = 0; step < rounds.steps(); ++step)
      parallel(rounds.tasks, call.threads, [&] {
        return [&, pair = VectorsGradient<T, E>(call.problem, call.R, caption_sets.most, wide),
                image = Item<T>(call.R, false, pools.apart, true, IS_PAIR<E>, IS_PAIR<E> ? feature_pairs<T>(wide) : 0),
                room = Buffer<T>(call.R * Item<T>::whole(caption_sets.most))](int64_t k) mutable {
          const int64_t other = rounds.met(k, step);
          if (other < 0) return;
          Items<T> captions(size_t(call.T));
          for (int64_t i = call.I * k / rounds.tasks; i < call.I * (k + 1) / rounds.tasks; ++i) {
            T* const d_pool = d_pools + i * 2 * wide;
            bool taken = false;
            for (int64_t c = other * rounds.joined; c < (other + 1) * rounds.joined; ++c) {
              for (int64_t t = group[size_t(c)]; t < group[size_t(c + 1)]; ++t)
                take_pair(room, i, t, [&](T g, T* A, T*) {
                  std::unique_ptr<Item<T>>& caption = captions[size_t(t)];
                  if (!taken)
                    take_rows<T, E>(call, modality(image_sets, 0), image_sets.first[size_t(i)], image_sets.length(i),
                                    pools, true, image, true);
                  taken = true;
                  if (!caption) caption = made(caption_sets, t, 1, true);
                  pair.run(A, image, *caption, g, pools.image, pools.caption, gradients(image_sets, i, 0),
                           gradients(caption_sets, t, 1), d_pool, d_pool + wide);
                });
              if (taken) pair.finish(image, gradients(image_sets, i, 0));
            }
          }
        };
      });
    multiply();
    for (void* out : {given.d_image_pool, given.d_caption_pool})
      for (int64_t i = 0; out && i < call.I; ++i)
        for (int64_t d = 0; d < call.D; ++d)
          static_cast<T*>(out)[d] += d_pools[(i * 2 + (out == given.d_caption_pool)) * wide + d];
  }
  RowGradients<T> gradients(const RowSets& sets, int64_t set, int64_t own) const {
    const int64_t at = sets.first[size_t(set)] * call.D;
    T* const rows = static_cast<T*>(own ? given.d_words : given.d_image);
    T* const gates = static_cast<T*>(own ? given.d_word_gate : given.d_image_gate);
    return {rows ? rows + at : nullptr, gates ? gates + 2 * at + own * call.D : nullptr,
            gates ? gates + 2 * at + (1 - own) * call.D : nullptr, call.D};
  }

  Modality modality(const RowSets& sets, int64_t own) const {
    return {sets.source, own ? call.word_gate : call.image_gate, own};
  }
  std::unique_ptr<Item<T>> made(const RowSets& sets, int64_t set, int64_t own, bool formed) const {
    return std::make_unique<Item<T>>(
        item<T, E>(call, modality(sets, own), sets.first[size_t(set)], sets.length(set), pools, formed, formed));
  }
  Items<T> items(const RowSets& sets, int64_t own) const {
    Items<T> all(size_t(sets.count()));
    parallel(sets.count(), call.threads, [&] {
      return [&](int64_t k) { all[size_t(k)] = made(sets, k, own, false); };
    });
    return all;
  }
  static Items<T> zeros(const RowSets& sets) {
    Items<T> made;
    for (int64_t k = 0; k < sets.count(); ++k)
      made.push_back(std::make_unique<Item<T>>(sets.length(k), true, 0, false));
    return made;
  }
  static void sum(const Item<T>& part, Item<T>& whole) {
    const auto add = [](const T* x, T* to, int64_t n) {
      for (int64_t k = 0; k < n; k += LANES<T>) store(to + k, load(to + k) + load(x + k));
    };
    add(part.numbers, whole.numbers, 5 * whole.ld);
    add(part.gram, whole.gram, whole.n * whole.ld);
  }

  // The gradient of a pair's score, 0 if its vectors have to be formed.
  T gradient_of(int64_t i, int64_t t) const { return formed && formed[i * call.T + t] ? T(0) : grad[i * call.T + t]; }

  // Whether a pair of an image or of a caption has a gradient.
  bool has_gradient(int64_t set, bool of_images) const {
    for (int64_t k = 0; k < (of_images ? call.T : call.I); ++k)
      if (of_images ? gradient_of(set, k) != 0 : gradient_of(k, set) != 0) return true;
    return false;
  }

  // run(g, A, C) overwrites a pair's affinities and products of features by their gradients, given that of its score. A
  // pair without one leaves zeros, which nothing reads where few have one.
  template <class Run>
  void take_pair(T* room, int64_t i, int64_t t, Run run) const {
    const T g = gradient_of(i, t);
    if (few && g == 0) return;
    const int64_t R = image_sets.length(i), L = caption_sets.length(t), ld = Item<T>::whole(L);
    const int64_t first = i * call.R * N + call.cu_seqlens[t];
    T *const own[] = {room, room + call.R * ld}, *const whole[] = {affinity, product};
    const int count = product ? 2 : 1;
    for (int k = 0; g != 0 && k < count; ++k) gather<T, true>(whole[k] + first, N, R, L, own[k]);
    if (g != 0) run(g, own[0], own[1]);
    for (int k = 0; k < count; ++k)
      for (int64_t r = 0; r < call.R; ++r) {
        T* const to = whole[k] + first + r * N;
        if (g != 0 && r < R) std::copy_n(own[k] + r * ld, L, to);
        else std::fill_n(to, L, T(0));
      }
  }

  // What the numbers and the Gram matrix of a set give its rows and its gates.
  void finish(const RowSets& sets, int64_t set, const Item<T>& item, const Item<T>& d_item, int64_t own) const {
    const int64_t n = item.n, ld = item.ld, D = call.D, wide = pools.wide, first = sets.first[size_t(set)];
    if (T* const gate = static_cast<T*>(own ? given.d_word_gate : given.d_image_gate))
      for (int64_t i = 0; i < n; ++i) {
        gate[(first + i) * 2 + own] = d_item.own()[i];
        gate[(first + i) * 2 + 1 - own] = d_item.other()[i];
      }
    T* const out = static_cast<T*>(own ? given.d_words : given.d_image);
    if (!out) return;
    Buffer<T> square(round_up(n, ROW_STEP) * ld), rows(n * wide);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) square[i * ld + j] = d_item.gram[i * ld + j] + d_item.gram[j * ld + i];
      if (item.norm()[i] > 0) square[i * ld + i] += d_item.norm()[i] / item.norm()[i];
      T* const row = rows + i * wide;
      const T* const from = read<T>(sets.source, (first + i) * D, D, row);
      if (from != row) std::copy_n(from, D, row);
    }
    const T *const pool_own = own ? pools.caption : pools.image, *const pool_other = own ? pools.image : pools.caption;
    gemm<T>(n, D, n, Left<T>{square, ld}, Right<T>{rows, wide},
            [&](int64_t i, int64_t k) {
              i = least(i, n - 1);
              return load(pool_own + k) * d_item.pool_own()[i] + load(pool_other + k) * d_item.pool_other()[i];
            },
            [&](int64_t i, int64_t k, Vec<T> v) {
              std::memcpy(out + (first + i) * D + k, &v, size_t(least(LANES<T>, D - k)) * sizeof(T));
            });
  }

  // One of the products of (10) and (11): the factor [images' rows][N], or its transpose, with the rows `far`, which is
  // added to the gradient of the rows `own`.
  struct Product {
    const Source own, far;
    const int64_t D;
    const T* factor;
    void* out;
    bool of_images;
  };

  // d V += d C T, d T += d C^T V with scalar gates, and the same of the keys with d A.
  std::vector<Product> all_products() const {
    std::vector<Product> all = {{call.image_key, call.word_key, call.P, affinity, given.d_image_key, true},
                                {call.word_key, call.image_key, call.P, affinity, given.d_word_key, false}};
    if (product) {
      all.push_back({call.image, call.words, call.D, product, given.d_image, true});
      all.push_back({call.words, call.image, call.D, product, given.d_words, false});
    }
    return all;
  }

  void multiply() const {
    if (few) multiply_few();
    else multiply_all();
  }
  void multiply_all() const {
    const std::vector<Product> all = all_products();
    const int64_t rows = call.I * call.R, D = std::max(call.D, call.P);
    const int64_t wide = round_up((D + call.threads - 1) / call.threads, TILE_COLUMNS<T>), each = (D + wide - 1) / wide;
    parallel(int64_t(all.size()) * each, call.threads, [&] {
      return [&](int64_t part) {
        const Product& one = all[size_t(part / each)];
        const int64_t from = part % each * wide, to = least(from + wide, one.D);
        const RowSets own = single_rows(one.own, one.of_images ? rows : N, one.D);
        if (one.out && from < to)
          multiply(one, own, single_rows(one.far, one.of_images ? N : rows, one.D), one.factor, N, from, to);
      };
    });
  }

  // The rows of some sets as sets of their own.
  static RowSets rows_of(const RowSets& sets) {
    RowSets rows{sets.source, sets.D, {}, {0}, 1};
    for (int64_t set = 0; set < sets.count(); ++set)
      for (int64_t r = 0; r < sets.length(set); ++r) {
        rows.first.push_back(sets.first[size_t(set)] + r);
        rows.edge.push_back(rows.count());
      }
    return rows;
  }

  void multiply_few() const {
    parallel(call.I + call.T, call.threads, [&] {
      return [&](int64_t k) {
        const bool of_images = k < call.I;
        const RowSets &mine = of_images ? image_sets : caption_sets, &others = of_images ? caption_sets : image_sets;
        const int64_t set = of_images ? k : k - call.I;
        std::vector<int64_t> partners;
        for (int64_t other = 0; other < others.count(); ++other)
          if (of_images ? gradient_of(set, other) != 0 : gradient_of(other, set) != 0) partners.push_back(other);
        if (partners.empty()) return;
        const RowSets some = chosen(mine, {set}), other = chosen(others, partners);
        const RowSets &images = of_images ? some : other, &words = of_images ? other : some;
        RowSets own = rows_of(some), far = rows_of(other);
        const int64_t ld = words.edge.back();
        Buffer<T> factor(images.edge.back() * ld);
        for (const Product& one : all_products()) {
          if (one.of_images != of_images || !one.out) continue;
          for (int64_t i = 0; i < images.count(); ++i)
            for (int64_t r = 0; r < images.length(i); ++r)
              for (int64_t t = 0; t < words.count(); ++t)
                std::copy_n(one.factor + (images.first[size_t(i)] + r) * N + words.first[size_t(t)], words.length(t),
                            factor + (images.edge[size_t(i)] + r) * ld + words.edge[size_t(t)]);
          own.source = one.own, far.source = one.far, own.D = far.D = one.D;
          multiply(one, own, far, factor, ld, 0, one.D);
        }
      };
    });
  }

  // Adds the factor, whose rows lie ld apart, or its transpose, times the features from `from` to `to` of the rows
  // `far` to those of the gradient of the rows `own`. Padding regions have a factor of zeros and count as zeros.
  void multiply(const Product& one, const RowSets& own, const RowSets& far, const T* factor, int64_t ld, int64_t from,
                int64_t to) const {
    const int64_t most = least(DEPTH_BYTES / int64_t(sizeof(T)), round_up(far.count(), ROW_STEP));
    const Gradient<T> gradient(static_cast<T*>(one.out), own, {0, own.count(), 0, own.count()});
    Buffer<E> panels(round_up(to - from, TILE_COLUMNS<T>) * depth<E>(most));
    Buffer<E> left(round_up(least(LEFT_ROWS, own.count()), TILE_ROWS) * depth<E>(most));
    Buffer<T> room(IS_PAIR<E> ? TILE_ROWS * paired_size<T>(most) : 0);
    const Buffer<T> none(far.D);
    Rows<T> rows(far, most);
    std::vector<const T*> row;
    for (int64_t k = 0; k < far.count(); k += most) {
      const int64_t count = least(most, far.count() - k);
      const int64_t padded = round_up(count, one.of_images ? PER_ROW<E> : ROW_STEP), K = depth<E>(padded);
      rows.take({k, k + count, k, count});
      row.clear();
      for (int64_t r = 0; r < count; ++r) row.push_back((padding(one, k + r) ? none + 0 : rows[r]) + from);
      feature_panels(row.data(), count, to - from, panels + 0, padded);
      for (int64_t i = 0; i < own.count(); i += LEFT_ROWS) {
        const int64_t n = least(LEFT_ROWS, own.count() - i);
        if (one.of_images) pack_left<T, E>(factor + i * ld + k, ld, n, count, left, K, 0, room);
        else pack_turned<T, E>(factor + k * ld + i, ld, count, n, left, K, 0);
        gradient.template add<E>(i, n, K, {left, 0}, panels + 0, K * TILE_COLUMNS<T>, from, to);
      }
    }
  }
  bool padding(const Product& one, int64_t row) const {
    return !one.of_images && !few && row % call.R >= call.regions(row / call.R);
  }

  // The pools' gradients: what the logits of the rows that they weigh give them.
  void sum_pools(const Items<T>& d_images, const Items<T>& d_captions) const {
    T* const image_pool = static_cast<T*>(given.d_image_pool);
    T* const caption_pool = static_cast<T*>(given.d_caption_pool);
    const int64_t step = 128;
    if (!image_pool && !caption_pool) return;
    parallel((call.D + step - 1) / step, call.threads, [&] {
      return [&, room = Buffer<T>(step), sums = Buffer<T>(2 * step)](int64_t part) {
        const int64_t from = part * step, n = least(step, call.D - from);
        std::fill_n(sums + 0, 2 * step, T(0));
        const auto add = [&](const RowSets& sets, const Items<T>& d_items, T* own, T* other) {
          for (int64_t set = 0; set < sets.count(); ++set)
            for (int64_t i = 0; i < sets.length(set); ++i) {
              const T a = d_items[size_t(set)]->pool_own()[i], b = d_items[size_t(set)]->pool_other()[i];
              if (a == 0 && b == 0) continue;
              const T* const x = read<T>(sets.source, (sets.first[size_t(set)] + i) * call.D + from, n, room);
              for (int64_t k = 0; k < n; k += LANES<T>) {
                store(own + k, load(own + k) + head(x + k, n - k) * a);
                store(other + k, load(other + k) + head(x + k, n - k) * b);
              }
            }
        };
        add(image_sets, d_images, sums, sums + step);
        add(caption_sets, d_captions, sums + step, sums);
        if (image_pool) std::copy_n(sums + 0, n, image_pool + from);
        if (caption_pool) std::copy_n(sums + step, n, caption_pool + from);
      };
    });
  }
};

}  // namespace
}  // namespace itm_fast

// Adds to the gradients that are not null, which hold zeros, and overwrites `products`, the forward pass's; these and
// grad [I, T] are float, or double if the tensors are double. A pair that `products` marks as one whose vectors were
// formed adds nothing: the `torch` backend computes its gradients.
extern "C" const char* hierarchical_alignment_score_kept_backward(
    const itm_fast::HierarchicalAlignmentScoreKeptCall& call) {
  using namespace itm_fast;
  return guarded([&] {
    if (call.dtype == Dtype::FLOAT64) return AlignmentBackward<double>(call).run();
#if defined(__AVX512BF16__)
    if (call.bfloat16) return AlignmentBackward<float, Pair>(call).run();
#endif
    AlignmentBackward<float>(call).run();
  });
}
