// What the headers of csrc/cpu do, exported one by one for tests/test_native_headers.py.
#include <chrono>
#include <stdexcept>

#include "shuffle.h"
#include "write.h"

using namespace itm_fast;

namespace {

template <class T>
void copy_in(const T* from, int64_t rows, int64_t columns, T* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * columns, columns, to + i * ld);
}

// C [M][N] = C + A^T B of A [K][M] and B [K][N]; false when a row beyond M was to be written. `packed` reads A by
// panels, with a matrix to fetch for the next product.
template <class T, class E>
bool product(int64_t M, int64_t N, int64_t K, const T* a, const T* b, T* c, bool packed) {
  const int64_t ld = padded<T>(N), rows = round_up(M, ROW_STEP);
  Buffer<T> columns(K * ld), sums(rows * ld);
  copy_in(b, K, N, (T*)columns, ld);
  copy_in(c, M, N, (T*)sums, ld);
  bool within = true;
  Buffer<E> left(packed ? packed_size(M, depth<E>(K)) : depth<E>(K) * rows), right(depth<E>(K) * ld);
  if (packed) pack_rows(M, K, (E*)left, [&](int64_t i, int64_t k) { return a[k * M + i]; });
  if constexpr (IS_PAIR<E>) {
#if defined(__AVX512BF16__)
    pair_rows(K, N, (const float*)columns, ld, (E*)right);
#endif
  } else {
    copy_in(b, K, N, (E*)right, ld);
    if (!packed) copy_in(a, K, M, (E*)left, rows);
  }
  gemm<E>(M, N, depth<E>(K), {left, packed ? 0 : rows}, {right, ld, packed ? (const E*)right : nullptr},
          [&](int64_t i, int64_t j) { return load(sums + i * ld + j); },
          [&](int64_t i, int64_t j, Vec<T> v) {
            within &= i < M;
            store(sums + i * ld + j, v);
          });
  for (int64_t i = 0; i < M; ++i) std::copy_n(sums + i * ld, N, c + i * N);
  return within;
}

}  // namespace

extern "C" {

int64_t lanes() { return LANES<float>; }

// n values of the tensor from `offset` on.
const char* widened(const void* bits, int64_t dtype, int64_t offset, int64_t n, float* single, double* exact) {
  return guarded([&] {
    Buffer<float> room(n);
    Buffer<double> wide(n);
    std::copy_n(read<float>({bits, Dtype(dtype)}, offset, n, (float*)room), n, single);
    std::copy_n(read<double>({bits, Dtype(dtype)}, offset, n, (double*)wide), n, exact);
  });
}

// The values in a dtype, from float and from double.
void narrowed(const float* values, int64_t n, int64_t dtype, void* from_float, void* from_double) {
  write<float>(from_float, Dtype(dtype), 0, n, values, 1.0f);
  Buffer<double> wide(n);
  std::copy_n(values, n, (double*)wide);
  write<double>(from_double, Dtype(dtype), 0, n, wide, 1.0);
}

// Neighbours in pairs, as the compiler's arithmetic and as the processor's instruction rounds them; false without it.
bool paired(const float* even, const float* odd, int64_t n, uint32_t* soft, uint32_t* hard) {
  for (int64_t i = 0; i < n; ++i) soft[i] = narrow_bfloat16(even[i]) | narrow_bfloat16(odd[i]) << 16;
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < n; i += LANES<float>) {
    const Vec<float> both = in_pairs(load(even + i), load(odd + i));
    std::memcpy(hard + i, &both, sizeof both);
  }
  return true;
#else
  return false;
#endif
}

bool product32(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c, bool packed) {
  return product<float, float>(M, N, K, a, b, c, packed);
}
bool product64(int64_t M, int64_t N, int64_t K, const double* a, const double* b, double* c, bool packed) {
  return product<double, double>(M, N, K, a, b, c, packed);
}
#if defined(__AVX512BF16__)
bool product16(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c) {
  return product<float, Pair>(M, N, K, a, b, c, true);
}
#endif

// rows [count][K] of a float32 tensor turned: by squares, by single values, as columns, and both ways at once.
void turned(const float* rows, int64_t count, int64_t K, float* squares, float* single, float* packed, float* both) {
  transpose_by_squares(rows, K, count, K, squares, count);
  transpose(rows, K, count, K, single, count);
  pack_columns<float>({rows, Dtype::FLOAT32}, 0, count, K, packed, count);
  Buffer<float> row(count * K);
  read_both<float>({rows, Dtype::FLOAT32}, 0, count, K, (float*)row, K, both, count);
}
void turned64(const double* rows, int64_t count, int64_t K, double* squares) {
  transpose_by_squares(rows, K, count, K, squares, count);
}

// Sums of LANES vectors, each along its lanes.
void summed(const float* rows, float* out) {
  Vec<float> v[LANES<float>];
  for (int r = 0; r < LANES<float>; ++r) v[r] = load(rows + r * LANES<float>);
  store(out, sums<float>(v));
}
void summed64(const double* rows, double* out) {
  Vec<double> v[LANES<double>];
  for (int r = 0; r < LANES<double>; ++r) v[r] = load(rows + r * LANES<double>);
  store(out, sums<double>(v));
}

// Chunks of sets of rows: first, last, begin, rows of each; returns how many.
int64_t cut(const int64_t* edge, int64_t sets, int64_t most, int64_t* out) {
  const auto found = chunks(edge, sets, most);
  for (const Chunk& c : found) {
    const int64_t four[] = {c.first, c.last, c.begin, c.rows};
    out = std::copy_n(four, 4, out);
  }
  return int64_t(found.size());
}

int64_t distance(int64_t columns) { return padded<float>(columns); }

// Bytes that are not zero in a buffer of n values and the room behind it, after one full of ones was given back.
int64_t unclean(int64_t n) {
  int64_t found = 0;
  for (int round = 0; round < 2; ++round) {
    Buffer<double> buffer(n);
    auto* const bytes = reinterpret_cast<unsigned char*>((double*)buffer);
    for (int64_t i = 0; i < n * 8 + 128; ++i) found += bytes[i] != 0;
    std::memset(bytes, 1, size_t(n) * 8 + 128);
  }
  return found;
}

// Count what each part sees. At part `bad` something fails: 1 out of memory, 2 another error, 3 while making a worker.
const char* spread(int64_t parts, int64_t threads, int64_t bad, int64_t kind, int64_t* seen) {
  return guarded([&] {
    std::atomic<int64_t> makers{0};
    parallel(parts, threads, [&] {
      if (kind == 3 && makers++ == bad) throw std::runtime_error("no worker");
      return [&](int64_t part) {
        ++seen[part];
        if (part != bad) std::this_thread::sleep_for(std::chrono::microseconds(200));
        else if (kind == 1) throw std::bad_alloc();
        else if (kind == 2) throw std::invalid_argument("a bad part");
      };
    });
  });
}

}  // extern "C"
