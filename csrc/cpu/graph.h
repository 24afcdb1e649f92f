// Graph reasoning over a chunk's nodes, read out at the global ones: equations (1) to (3) of
// itm_fast/ops/similarity_graph.py.
//
// X is [S][nodes], a caption's nodes side by side, its global one first. A step is two large products, Y = M^T X + u
// and H = X^T Wr^T (nodes as rows), and two small ones per caption: with the nodes asked along the lanes, the logits
// X^T Y have the softmax down their columns, and X' = relu(E^T H / sums + br) has whole vectors of features where
// H^T E would have a vector and a bit of nodes. X' is turned for the next step by squares (half the time of writing it
// turned); the read-out takes it as it is: its products have captions as rows and features along the lanes.
//
// A thread holds X, Y, H and X' (240 KB each at S 256 and 224 nodes) beside the weights of a step (2 x 260 KB): a
// product's operands stay in L2, the softmax weights of a caption in L1.
//
// The template's E is what the two large products multiply: T, or pairs of bfloat16 values with sums in float32.
#pragma once
#include "attention.h"
#include "shuffle.h"

namespace itm_fast {

constexpr int64_t GRAPH_NODES = 224;  // of a chunk, and asked at a time in captions longer than that

// The parameters as the K steps read them, made once per call and shared by all threads.
template <class T, class E = T>
struct GraphWeights {
  int64_t S, steps, ld;
  Buffer<T> M;      // [steps][S][ld]
  Buffer<E> ask;    // [steps - 1] M^T packed as rows: Y = M^T X
  Buffer<T> shift;  // [steps][ld] u
  Buffer<T> value;  // [steps][S][ld] Wr^T
  Buffer<E> pairs;  // of `value`'s rows, all steps but the last, when E is Pair
  Buffer<T> bias;   // [steps][ld] br

  // Of the call of similarity_graph or similarity_graph_score.
  template <class Call>
  explicit GraphWeights(const Call& c)
      : GraphWeights(c.S, c.K, {c.query_weight, c.dtype}, {c.query_bias, c.dtype}, {c.key_weight, c.dtype},
                     {c.value_weight, c.dtype}, {c.value_bias, c.dtype}) {}

  GraphWeights(int64_t S, int64_t steps, Source query_weight, Source query_bias, Source key_weight,
               Source value_weight, Source value_bias)
      : S(S), steps(steps), ld(padded<T>(S)), M(steps * S * ld), ask((steps - 1) * packed_size(S, depth<E>(S))),
        shift(steps * ld), value(steps * S * ld),
        pairs(IS_PAIR<E> ? (steps - 1) * depth<E>(S) * ld : 0), bias(steps * ld) {
    Buffer<T> room(S * S), query(S * ld), key(S * ld);
    const auto rows = [&](Source s, int64_t step, T* to) {
      const T* from = read<T>(s, step * S * S, S * S, room);
      for (int64_t r = 0; r < S; ++r) std::copy(from + r * S, from + (r + 1) * S, to + r * ld);
    };
    for (int64_t step = 0; step < steps; ++step) {
      rows(query_weight, step, query);
      rows(key_weight, step, key);
      T* const product = M + step * S * ld;
      gemm(S, S, S, Left<T>{query, ld}, Right<T>{key, ld}, [](int64_t, int64_t) { return Vec<T>{}; },
           [&](int64_t i, int64_t j, Vec<T> c) { store(product + i * ld + j, c); });
      if (step + 1 < steps)
        pack_rows(S, S, ask + step * packed_size(S, depth<E>(S)),
                  [&](int64_t i, int64_t k) { return product[k * ld + i]; });
      T* const u = shift + step * ld;
      const T* b = read<T>(query_bias, step * S, S, room);
      for (int64_t o = 0; o < S; ++o)
        for (int64_t i = 0; i < S; ++i) u[i] += b[o] * key[o * ld + i];
      transpose_by_squares<T>(read<T>(value_weight, step * S * S, S * S, room), S, S, S, value + step * S * ld, ld);
      b = read<T>(value_bias, step * S, S, room);
      std::copy(b, b + S, bias + step * ld);
      if constexpr (IS_PAIR<E>)
        if (step + 1 < steps) pair_rows(S, S, value + step * S * ld, ld, pairs + step * depth<E>(S) * ld);
    }
  }

  Right<E> values(int64_t step) const { return {either<E>(value, pairs) + step * depth<E>(S) * ld, ld}; }
};

// One thread's scratch for graph reasoning over a chunk of captions' nodes, and the reasoning itself.
template <class T, class E = T>
class Graph {
 public:
  // Scratch for chunks of at most `nodes` nodes, captions of at most `longest` nodes.
  Graph(const GraphWeights<T, E>& weights, int64_t nodes, int64_t longest)
      : weights(weights), S(weights.S), ldS(weights.ld), ld(padded<T>(nodes)),
        lde(padded<T>(least(longest, GRAPH_NODES))), x(S * ld), y(S * ld), h(nodes * ldS),
        xt(nodes * ldS), e(longest * lde), total(lde), asked(S * ld), answer(nodes * ldS),
        pairs(IS_PAIR<E> ? depth<E>(S) * ld : 0) {}

  // Where the caller puts X before every run: [S][stride()], columns edge[first] .. edge[last] - edge[first].
  T* nodes() { return x; }
  int64_t stride() const { return ld; }

  // z[t - first][0 .. S] = the global node of caption t after all steps, for the captions first .. last of edge.
  void run(const int64_t* edge, int64_t first, int64_t last, T* z, int64_t ldz) {
    const int64_t origin = edge[first], columns = edge[last] - origin;
    for (int64_t step = 0; step + 1 < weights.steps; ++step) {
      if (step > 0) transpose_by_squares<T>(xt, ldS, columns, S, x, ld);
      reason(edge, first, last, step);
    }
    if (weights.steps == 1) transpose_by_squares<T>(x, ld, S, columns, xt, ldS);
    read_out(edge, first, last, z, ldz);
  }

 private:
  static Vec<T> relu(Vec<T> v) { return v < 0 ? Vec<T>{} : v; }
  static Vec<T> nothing(int64_t, int64_t) { return Vec<T>{}; }

  // One step: from x to X' in xt.
  void reason(const int64_t* edge, int64_t first, int64_t last, int64_t step) {
    const int64_t origin = edge[first], columns = edge[last] - origin;
    const T *u = weights.shift + step * ldS, *br = weights.bias + step * ldS;
    const E* const factor = factors<E>(S, columns, x, ld, pairs);
    gemm(S, columns, depth<E>(S), Left<E>{weights.ask + step * packed_size(S, depth<E>(S)), 0}, Right<E>{factor, ld},
         [&](int64_t i, int64_t) { return splat(u[i]); },
         [&](int64_t i, int64_t j, Vec<T> c) { store(y + i * ld + j, c); });
    gemm(columns, S, depth<E>(S), Left<E>{factor, ld}, weights.values(step), nothing,
         [&](int64_t i, int64_t j, Vec<T> c) { store(h + i * ldS + j, c); });
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = edge[t] - origin, n = edge[t + 1] - edge[t];
      for (int64_t at = 0; at < n; at += GRAPH_NODES) {
        const int64_t some = least(GRAPH_NODES, n - at);
        T* const asking = y + begin + at;
        gemm(n, some, S, Left<T>{x + begin, ld}, Right<T>{asking, ld}, nothing,
             [&](int64_t i, int64_t j, Vec<T> c) { store(e + i * lde + j, c); });
        exponentials<T>(n, some, e, lde, total);
        for (int64_t j = 0; j < some; j += LANES<T>) store(total + j, 1 / load(total + j));
        gemm(some, S, n, Left<T>{e, lde}, Right<T>{h + begin * ldS, ldS}, nothing,
             [&](int64_t i, int64_t j, Vec<T> c) {
               store(xt + (begin + at + i) * ldS + j, relu(c * total[i] + load(br + j)));
             });
      }
    }
  }

  // The last step at node 0 of every caption, from the nodes as rows in xt.
  void read_out(const int64_t* edge, int64_t first, int64_t last, T* z, int64_t ldz) {
    const int64_t origin = edge[first], captions = last - first, step = weights.steps - 1;
    const T *u = weights.shift + step * ldS, *br = weights.bias + step * ldS;
    for (int64_t t = 0; t < captions; ++t) {
      const T* const node = xt + (edge[first + t] - origin) * ldS;
      std::copy(node, node + S, answer + t * ldS);
    }
    transpose_by_squares<T>(answer, ldS, captions, S, asked, ld);
    gemm(captions, S, S, Left<T>{asked, ld}, Right<T>{weights.M + step * S * ldS, ldS},
         [&](int64_t, int64_t j) { return load(u + j); },
         [&](int64_t i, int64_t j, Vec<T> c) { store(answer + i * ldS + j, c); });
    for (int64_t t = 0; t < captions; ++t) {
      const int64_t begin = edge[first + t] - origin, n = edge[first + t + 1] - edge[first + t];
      const T* const keys = xt + begin * ldS;
      T* const row = answer + t * ldS;
      T top = -INFINITY, sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        e[j] = dot(keys + j * ldS, row);
        top = e[j] > top ? e[j] : top;
      }
      for (int64_t j = 0; j < n; j += LANES<T>) {
        const Vec<T> weight = select<T>(inside<T>(j, 0, n), exp<T>(load(e + j) - top), Vec<T>{});
        store(e + j, weight);
        sum += itm_fast::sum<T>(weight);
      }
      const T share = 1 / sum;
      for (int64_t s = 0; s < S; s += 4 * LANES<T>) {  // four chains; what passes a row's end is dropped
        Vec<T> c[4] = {};
        for (int64_t j = 0; j < n; ++j)
          for (int v = 0; v < 4; ++v) c[v] += load(keys + j * ldS + s + v * LANES<T>) * e[j];
        for (int v = 0; v < 4 && s + v * LANES<T> < S; ++v) store(row + s + v * LANES<T>, c[v] * share);
      }
    }
    transpose_by_squares<T>(answer, ldS, captions, S, asked, ld);
    gemm(captions, S, S, Left<T>{asked, ld}, Right<T>{weights.value + step * S * ldS, ldS},
         [&](int64_t, int64_t j) { return load(br + j); },
         [&](int64_t i, int64_t j, Vec<T> c) { store(answer + i * ldS + j, relu(c)); });
    for (int64_t t = 0; t < captions; ++t) std::copy(answer + t * ldS, answer + t * ldS + S, z + t * ldz);
  }

  // Rows are zero from S to a whole vector.
  T dot(const T* a, const T* b) const {
    Vec<T> even{}, odd{};
    int64_t s = 0;
    for (; s + LANES<T> < S; s += 2 * LANES<T>) {
      even += load(a + s) * load(b + s);
      odd += load(a + s + LANES<T>) * load(b + s + LANES<T>);
    }
    if (s < S) even += load(a + s) * load(b + s);
    return sum<T>(even + odd);
  }

  const GraphWeights<T, E>& weights;
  const int64_t S, ldS, ld, lde;
  Buffer<T> x, y, h, xt, e, total, asked, answer;
  Buffer<E> pairs;  // of X's rows, when E is Pair
};

}  // namespace itm_fast
