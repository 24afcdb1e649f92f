// The building blocks of csrc/cpu as a Python module, for tests/test_white_box_*.py. Submodules float32 and float64
// offer each function for numbers of that type, on numpy arrays. The caller provides the padding that a header asks
// for: a matrix is the corner of a larger array, where what a function writes beyond the matrix can be seen.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <unistd.h>

#include <chrono>
#include <optional>
#include <set>

#include "held_contexts.h"
#include "sets.h"
#include "shuffle.h"
#include "white_box.h"
#include "write.h"

namespace py = pybind11;
using namespace itm_fast;
using white_box::Matrix;
using Edge = std::vector<int64_t>;

namespace {

template <class T>
Matrix<T> matrix(const py::array_t<T>& a) {
  if (a.ndim() != 2 || a.strides(1) != py::ssize_t(sizeof(T)))
    throw std::invalid_argument("want a matrix whose rows are contiguous");
  return {const_cast<T*>(a.data()), a.shape(0), a.shape(1), a.strides(0) / int64_t(sizeof(T))};
}

template <class T>
py::array_t<T> array(const std::vector<T>& values, int64_t rows, int64_t columns) {
  return py::array_t<T>({rows, columns}, values.data());
}

// A contiguous tensor; bfloat16 values come as integers of 16 bits.
Source source(const py::array& a) {
  if (a.dtype().kind() != 'f') return {a.data(), Dtype::BFLOAT16};
  return {a.data(), a.itemsize() == 2 ? Dtype::FLOAT16 : a.itemsize() == 4 ? Dtype::FLOAT32 : Dtype::FLOAT64};
}

// C = A^T B, or C + A^T B, of A [K, M] and B [K, N]. `packed` reads A by panels, with a matrix to fetch ahead.
template <class T>
void product(const py::array_t<T>& a, const py::array_t<T>& b, py::array_t<T> c, bool accumulate, bool packed) {
  const Matrix<T> A = matrix(a), B = matrix(b), C = matrix(c);
  const int64_t M = A.columns, K = A.rows;
  Buffer<T> left(packed ? packed_size(M, K) : 0);
  if (packed) pack_rows(M, K, left + 0, [&](int64_t i, int64_t k) { return A.row(k)[i]; });
  const auto begin = [&](int64_t i, int64_t j) { return accumulate ? load(C.row(i) + j) : Vec<T>{}; };
  const auto end = [&](int64_t i, int64_t j, Vec<T> v) { store(C.row(i) + j, v); };
  gemm<T>(M, B.columns, K, packed ? Left<T>{left, 0} : Left<T>{A.data, A.ld}, {B.data, B.ld, packed ? B.data : nullptr},
          begin, end);
}

// A matrix rounded to bfloat16, as k-major pairs in rows ld apart, zeros beyond it.
Buffer<Pair> k_major_pairs(Matrix<float> from, int64_t ld) {
  Buffer<Pair> pairs(depth<Pair>(from.rows) * ld);
  for (int64_t k = 0; k < from.rows; ++k)
    for (int64_t i = 0; i < from.columns; ++i)
      pairs[k / 2 * ld + i].bits |= narrow_bfloat16(from.row(k)[i]) << (k % 2 ? 16 : 0);
  return pairs;
}

// The left side of a product of pairs, either way, and the distance of its rows.
std::pair<Buffer<Pair>, int64_t> left_pairs(Matrix<float> A, bool packed) {
  const int64_t M = A.columns, K = A.rows, ld = round_up(M, LANES<float>);
  if (!packed) return {k_major_pairs(A, ld), ld};
  Buffer<Pair> left(packed_size(M, depth<Pair>(K)));
  pack_rows(M, K, left + 0, [&](int64_t i, int64_t k) { return A.row(k)[i]; });
  return {std::move(left), 0};
}

#if defined(__AVX512BF16__)
// The same as product() of pairs of bfloat16 values, which A and B are rounded to.
void product_of_pairs(const py::array_t<float>& a, const py::array_t<float>& b, py::array_t<float> c, bool packed) {
  const Matrix<float> A = matrix(a), B = matrix(b), C = matrix(c);
  const auto [left, ld] = left_pairs(A, packed);
  Buffer<Pair> right(depth<Pair>(A.rows) * B.ld);
  pair_rows(A.rows, B.columns, B.data, B.ld, right + 0);
#if defined(__AMX_BF16__)
  const struct Release {  // as guarded() does: another library that releases them does not know of these
    ~Release() { AmxTiles::release(); }
  } at_the_end;
#endif
  gemm<Pair>(A.columns, B.columns, depth<Pair>(A.rows), {left, ld}, {right, B.ld},
             [&](int64_t i, int64_t j) { return load(C.row(i) + j); },
             [&](int64_t i, int64_t j, Vec<float> v) { store(C.row(i) + j, v); });
}
#endif

// The same product by the kernel for AMX, whose tiles are plain C++ here. What it must not read is NaN; returned is
// what it wrote, rows as long as it may write, 7 where it wrote nothing. It starts from `start`, whole vectors wide.
py::array_t<float> product_by_tiles(const py::array_t<float>& a, const py::array_t<float>& b,
                                    const py::array_t<float>& start, bool packed) {
  const Matrix<float> A = matrix(a), B = matrix(b), S = matrix(start);
  const int64_t M = A.columns, N = B.columns, K = depth<Pair>(A.rows), wide = round_up(N, SIDE), ldb = wide + SIDE + 1;
  const auto [left, ld] = left_pairs(A, packed);
  const Buffer<Pair> pairs = k_major_pairs(B, ldb);
  Buffer<Pair> right((K + SIDE) * ldb);
  for (int64_t k = 0; k < K + SIDE; ++k)
    for (int64_t j = 0; j < ldb; ++j) right[k * ldb + j] = k < K && j < wide ? pairs[k * ldb + j] : Pair{0x7fc07fc0};
  std::vector<float> c(size_t((M + ROW_STEP) * ldb), 7);
  multiply_by_tiles(
      PlainTiles(TileShapes()), M, N, K, Left<Pair>{left, ld}, Right<Pair>{right, ldb, right},
      [&](int64_t i, int64_t j) {
        SumRow sums;
        std::memcpy(&sums, S.row(i) + j, sizeof sums);
        return sums;
      },
      [&](int64_t i, int64_t j, SumRow v) { std::memcpy(&c[size_t(i * ldb + j)], &v, sizeof v); });
  return array(c, M + ROW_STEP, ldb);
}

// Does what a product does with tiles of these shapes, of which the plain ones refuse what a processor refuses.
void try_tiles(int palette, const std::vector<int>& rows, const std::vector<int>& bytes) {
  TileShapes shapes;
  shapes.palette = uint8_t(palette);
  for (size_t t = 0; t < rows.size(); ++t) {
    shapes.rows[t] = uint8_t(rows[t]);
    shapes.bytes[t] = uint16_t(bytes[t]);
  }
  PairRow memory[SIDE] = {};
  PlainTiles tiles(shapes);
  tiles.load<4>(memory, sizeof(PairRow));
  tiles.load<6>(memory, sizeof(PairRow));
  tiles.multiply_add<0, 4, 6>();
  tiles.store<0>(memory, sizeof(PairRow));
}

// Neighbours in one word as narrow_bfloat16() rounds them, and as the processor's instruction does, where it has one.
py::tuple pairs(const py::array_t<float>& even, const py::array_t<float>& odd) {
  const int64_t n = even.size();
  std::vector<uint32_t> soft;
  [[maybe_unused]] std::vector<uint32_t> hard(size_t(round_up(n, LANES<float>)));
  for (int64_t i = 0; i < n; ++i)
    soft.push_back(narrow_bfloat16(even.data()[i]) | narrow_bfloat16(odd.data()[i]) << 16);
  py::object instruction = py::none();
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < n; i += LANES<float>) {
    float values[2][LANES<float>]{};
    std::copy_n(even.data() + i, least(LANES<float>, n - i), values[0]);
    std::copy_n(odd.data() + i, least(LANES<float>, n - i), values[1]);
    const Vec<float> both = in_pairs(load(values[0]), load(values[1]));
    std::memcpy(&hard[size_t(i)], &both, sizeof both);
  }
  instruction = py::array_t<uint32_t>(n, hard.data());
#endif
  return py::make_tuple(py::array_t<uint32_t>(n, soft.data()), instruction);
}

// Function of a vector, on any number of values.
template <class T, class Function>
auto each(Function function) {
  return [function](const py::array_t<T>& x) {
    const int64_t n = x.size(), room = round_up(n, LANES<T>);
    Buffer<T> values(room);
    std::copy_n(x.data(), n, values + 0);
    for (int64_t i = 0; i < room; i += LANES<T>) store<T>(values + i, function(load<T>(values + i)));
    return py::array_t<T>(n, values + 0);
  };
}

// Count what each part sees. At part `bad` something fails: 1 out of memory, 2 another error, 3 while making a worker.
// Returns the counts and the sentence of the failure.
std::pair<std::vector<int64_t>, std::optional<std::string>> spread(int64_t parts, int64_t threads, int64_t bad,
                                                                   int64_t kind) {
  std::vector<int64_t> seen(static_cast<size_t>(parts));
  const char* failed = guarded([&] {
    std::atomic<int64_t> makers{0};
    parallel(parts, threads, [&] {
      if (kind == 3 && makers++ == bad) throw std::runtime_error("no worker");
      return [&](int64_t part) {
        ++seen[size_t(part)];
        if (part != bad) std::this_thread::sleep_for(std::chrono::microseconds(200));
        else if (kind == 1) throw std::bad_alloc();
        else if (kind == 2) throw std::invalid_argument("a bad part");
      };
    });
  });
  return {seen, failed ? std::optional<std::string>(failed) : std::nullopt};
}

// The threads that took part in a loop of so many parts: each waits in a part until all have one, for half a second at
// most.
std::set<int64_t> taking_part(int64_t threads) {
  std::set<int64_t> seen;
  std::mutex guard;
  std::atomic<int64_t> here{0};
  parallel(threads, threads, [&] {
    return [&](int64_t) {
      ++here;
      for (int wait = 0; here < threads && wait < 5000; ++wait)
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      const std::lock_guard<std::mutex> lock(guard);
      seen.insert(int64_t(gettid()));
    };
  });
  return seen;
}

// Bytes that are not zero in a buffer of n values and the room behind it, after one full of ones was given back.
// threads: that write the zeros; 0 for a buffer that this thread makes.
int64_t unclean(int64_t n, int64_t threads) {
  int64_t found = 0;
  for (int round = 0; round < 2; ++round) {
    Buffer<double> buffer = threads ? Buffer<double>::zeros(n, threads) : Buffer<double>(n);
    auto* const bytes = reinterpret_cast<unsigned char*>(buffer + 0);
    for (int64_t i = 0; i < n * 8 + 128; ++i) found += bytes[i] != 0;
    std::memset(bytes, 1, size_t(n) * 8 + 128);
  }
  return found;
}

py::tuple bounds(const RowSets& sets) { return py::make_tuple(sets.first, sets.edge, sets.most); }

template <class T>
void define(py::module_ m) {
  using Array = py::array_t<T>;
  m.attr("LANES") = int64_t(LANES<T>);
  m.attr("TILE_COLUMNS") = int64_t(TILE_COLUMNS<T>);
  m.def("padded", &padded<T>);
  m.def("gemm", &product<T>);

  m.def("exp", each<T>([](Vec<T> v) { return itm_fast::exp<T>(v); }));
  m.def("tanh", each<T>([](Vec<T> v) { return itm_fast::tanh<T>(v); }));
  m.def("sigmoid", each<T>([](Vec<T> v) { return sigmoid<T>(v); }));
  m.def("root", each<T>([](Vec<T> v) { return root(v); }));
  m.def("sum_of_lanes", [](const Array& v) { return sum<T>(load(v.data())); });
  m.def("largest_lane", [](const Array& v) { return itm_fast::max<T>(load(v.data())); });
  m.def("inside", [](int64_t first, int64_t begin, int64_t end) {
    const Vec<Int<T>> mask = inside<T>(first, begin, end);
    std::vector<int64_t> lanes;
    for (int i = 0; i < LANES<T>; ++i) lanes.push_back(mask[i]);
    return lanes;
  });
  m.def("sums", [](const Array& rows) {
    Vec<T> v[LANES<T>];
    for (int r = 0; r < LANES<T>; ++r) v[r] = load(matrix(rows).row(r));
    const Vec<T> all = sums<T>(v);
    return Array(LANES<T>, reinterpret_cast<const T*>(&all));
  });

  m.def("read", [](const py::array& from, int64_t offset, int64_t n) {
    Array room(n);
    const T* values = read<T>(source(from), offset, n, room.mutable_data());
    return Array(n, values);
  });
  m.def("read_unknown_dtype", [] {
    T room;
    read<T>({nullptr, Dtype(9)}, 0, 1, &room);
  });
  m.def("write", [](py::array to, int64_t offset, const Array& values, T factor) {
    const Source s = source(to);
    write<T>(to.mutable_data(), s.dtype, offset, values.size(), values.data(), factor);
  });
  m.def("transpose", [](const Array& rows, Array out, bool by_squares) {
    const Matrix<T> from = matrix(rows), to = matrix(out);
    (by_squares ? transpose_by_squares<T> : transpose<T>)(from.data, from.ld, from.rows, from.columns, to.data, to.ld);
  });
  m.def("pack_columns", [](const py::array& rows, int64_t first, Array out) {
    const Matrix<T> to = matrix(out);
    pack_columns<T>(source(rows), first, to.columns, to.rows, to.data, to.ld);
  });
  m.def("read_both", [](const py::array& rows, int64_t first, Array row, Array column) {
    const Matrix<T> r = matrix(row), c = matrix(column);
    read_both<T>(source(rows), first, r.rows, r.columns, r.data, r.ld, c.data, c.ld);
  });
  m.def("multiply_with_each_other", [](const Array& column, Array gram) {
    const Matrix<T> c = matrix(column), g = matrix(gram);
    return multiply_with_each_other<T>(c.columns, c.rows, c.data, c.ld, g.data, g.ld);
  });
  m.def("pack_rows", [](const Array& values) {
    const Matrix<T> from = matrix(values);
    Buffer<T> out(packed_size(from.rows, from.columns));
    pack_rows(from.rows, from.columns, out + 0, [&](int64_t i, int64_t k) { return from.row(i)[k]; });
    return Array(packed_size(from.rows, from.columns), out + 0);
  });
  m.def("pack_rows_of_pairs", [](const Array& values) {
    const Matrix<T> from = matrix(values);
    const int64_t size = packed_size(from.rows, depth<Pair>(from.columns));
    Buffer<Pair> out(size);
    pack_rows(from.rows, from.columns, out + 0, [&](int64_t i, int64_t k) { return from.row(i)[k]; });
    return py::array_t<uint32_t>(size, reinterpret_cast<const uint32_t*>(out + 0));
  });

  m.def("logits", [](int64_t norm, double scale, const Edge& edge, const Array& s, Array logit) {
    white_box::logits(norm, scale, edge, matrix(s), matrix(logit));
  });
  m.def("logits_backward", [](int64_t norm, double scale, const Edge& edge, Array s, const Array& d,
                              const Array& more) {
    white_box::logits_backward(norm, scale, edge, matrix(s), matrix(d), matrix(more));
  });
  m.def("exponentials", [](Array logit) {
    const std::vector<T> total = white_box::exponentials(matrix(logit));
    return Array(py::ssize_t(total.size()), total.data());
  });
  m.def("attend", [](const py::array& context, const py::array& query, int64_t norm, double scale, const Edge& edge,
                     const py::array& weight, const py::array& bias) {
    const int64_t n = context.shape(0), D = context.shape(1), S = weight.shape(0), columns = edge.back() - edge.front();
    const auto found = white_box::attend<T>(source(context), n, source(query), D, norm, scale, edge, source(weight),
                                            source(bias), S);
    return py::make_tuple(array(found.weight, n, columns), array(found.total, 1, columns),
                          array(found.length, 1, columns), array(found.similar, S, columns));
  });
  m.def("gram_matrix", [](const Array& rows, const std::optional<Array>& weight, Array gram) {
    white_box::gram_matrix(matrix(rows), weight ? weight->data() : nullptr, matrix(gram));
  });
  m.def("weighted_sum", [](const Array& rows, const Array& weight, int64_t first, int64_t last, Array out) {
    return white_box::weighted_sum(matrix(rows), weight.data(), first, last, matrix(out).data);
  });
  m.def("windows", [](const py::array& rows, const Edge& edge, int64_t bytes, int64_t columns, int64_t threads) {
    return white_box::windows<T>(source(rows), rows.shape(1), edge, bytes, columns, threads);
  });

  using Held = HeldContexts<T>;
  py::class_<Held>(m, "HeldContexts", py::module_local())
      .def(py::init<int64_t, int64_t, int64_t>())
      .def("clear", &Held::clear)
      .def("add", &Held::add)
      .def("read_set",
           [](Held& held, int64_t k, const py::array& rows, int64_t first) { held.read_set(k, source(rows), first); })
      .def("multiply_set", &Held::multiply_set)
      .def_readonly("n", &Held::n)
      .def("columns", [](const Held& held) {  // all sets' rows as the product with all queries reads them: [D, n]
        Array out({held.D, held.n});
        for (int64_t d = 0; d < held.D; ++d)
          std::copy_n(held.column_factors() + d * held.ld, held.n, out.mutable_data(d, 0));
        return out;
      })
      .def("set", [](const Held& held, int64_t k) {  // its rows [n, D], columns [D, n], Gram matrix [n, n], largest
        const HeldSet<T, T>& set = held.sets.at(size_t(k));
        Array row({set.n, set.D}), column({set.D, set.n}), gram({set.n, set.n});
        for (int64_t i = 0; i < set.n; ++i) {
          for (int64_t d = 0; d < set.D; ++d) *row.mutable_data(i, d) = set.features(d).data[i * set.features(d).ld];
          std::copy_n(set.gram + i * set.ld, set.n, gram.mutable_data(i, 0));
        }
        for (int64_t d = 0; d < set.D; ++d)
          std::copy_n(set.column + d * held.ld, set.n, column.mutable_data(d, 0));
        return py::make_tuple(row, column, gram, set.largest);
      });
}

}  // namespace

PYBIND11_MODULE(white_box_module, m) {
  m.attr("TILE_ROWS") = int64_t(TILE_ROWS);
  m.attr("ROW_STEP") = int64_t(ROW_STEP);
  define<float>(m.def_submodule("float32"));
  define<double>(m.def_submodule("float64"));
#if defined(__AVX512BF16__)
  m.def("product_of_pairs", &product_of_pairs);
  m.def("rough_sigmoid", each<float>([](Vec<float> v) { return rough_sigmoid(v); }));
#endif
  m.def("product_by_tiles", &product_by_tiles);
  m.def("try_tiles", &try_tiles);
  m.def("pairs", &pairs);
  m.def("chunks", [](const Edge& edge, int64_t most) {
    std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> found;
    for (const Chunk& c : chunks(edge.data(), int64_t(edge.size()) - 1, most))
      found.emplace_back(c.first, c.last, c.begin, c.rows);
    return found;
  });
  m.def("regions", [](int64_t I, int64_t R, const std::optional<Edge>& lengths) {
    return bounds(regions({}, I, R, 1, lengths ? lengths->data() : nullptr));
  });
  m.def("captions", [](const Edge& edge) { return bounds(captions({}, int64_t(edge.size()) - 1, 1, edge.data())); });
  m.def("single_rows", [](int64_t count) { return bounds(single_rows({}, count, 1)); });
  m.def("spread", &spread, py::call_guard<py::gil_scoped_release>());
  m.def("taking_part", &taking_part, py::call_guard<py::gil_scoped_release>());
  m.def("unclean", &unclean);
}
