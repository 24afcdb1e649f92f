// Matrices in shared memory, and the product of two of them by the warps of a block.
//
// A row of numbers lies in chunks of 16 bytes: 8 numbers of 16 bits or, for F16X3, of every 32 numbers four chunks of
// first halves and then four of second ones.
#pragma once
#include "gpu.h"

constexpr int THREADS = 256, WARPS = 8;

template <Kind KIND> struct Numbers {
    static constexpr bool PAIRS = KIND == F16X3;
    static constexpr int EACH = PAIRS ? 4 : 8;            // in a chunk
    static constexpr Kind STORED = PAIRS ? F16 : KIND;
    static constexpr int REST = 4;                        // chunks from a first half to its second one
    // The chunk of a number, or of its first half.
    __device__ __forceinline__ static int chunk(int number) {
        return PAIRS ? number / 32 * 8 + number % 32 / 8 : number / 8;
    }
};

// A matrix has CHUNKS chunks a row, a power of two. Where chunk `chunk` of row `row` begins: the chunks of a row are
// exchanged so that those of one number in eight rows, which ldmatrix reads at once, lie in different banks.
template <int CHUNKS> __device__ __forceinline__ int place(int row, int chunk) {
    constexpr int ROWS = CHUNKS < 8 ? 8 / CHUNKS : 1, MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;
    return (row * CHUNKS + (chunk ^ (row / ROWS & MASK))) * 16;
}

// Writes two neighbouring numbers of a row, rounded. Returns the word of their 16-bit numbers or first halves.
template <Kind KIND, int CHUNKS>
__device__ __forceinline__ unsigned put(unsigned char *matrix, int row, int column, float x, float y) {
    using Rows = Numbers<KIND>;
    const unsigned first = rounded<Rows::STORED>(x, y);
    *reinterpret_cast<unsigned *>(matrix + place<CHUNKS>(row, Rows::chunk(column)) + column % 8 * 2) = first;
    if constexpr (Rows::PAIRS)
        *reinterpret_cast<unsigned *>(matrix + place<CHUNKS>(row, Rows::chunk(column) + Rows::REST) + column % 8 * 2) =
            to_halves(x - half_of(first, false), y - half_of(first, true));
    return first;
}
template <Kind KIND, int CHUNKS>
__device__ __forceinline__ float2 get(const unsigned char *matrix, int row, int column) {
    using Rows = Numbers<KIND>;
    auto word = [&](int chunk) {
        return *reinterpret_cast<const unsigned *>(matrix + place<CHUNKS>(row, chunk) + column % 8 * 2);
    };
    const unsigned first = word(Rows::chunk(column));
    float2 found = {low<Rows::STORED>(first), high<Rows::STORED>(first)};
    if constexpr (Rows::PAIRS) {
        const unsigned second = word(Rows::chunk(column) + Rows::REST);
        found.x += half_of(second, false), found.y += half_of(second, true);
    }
    return found;
}

// Row `row` of a matrix in global memory with `chunks` chunks a row.
__device__ __forceinline__ const void *row_of(const void *matrix, long long row, int chunks) {
    return static_cast<const char *>(matrix) + row * chunks * 16;
}

// Starts the copy of chunks first to first + CHUNKS - 1 of ROWS rows that have `chunks`; zeros stand for those beyond
// and for rows whose address `from(row)` is null. `readable`: any address. ANEW: addresses are computed at each call,
// else they hold registers around the loops of callers, which groups of warps have not.
template <int ROWS, int CHUNKS, bool ANEW = false, class From>
__device__ __forceinline__ void copy_rows(unsigned char *to, int first, int chunks, const void *readable, From from) {
    constexpr int ALL = ROWS * CHUNKS;
    const int thread = ANEW ? opaque(threadIdx.x) : threadIdx.x;
#pragma unroll
    for (int i = 0; i < ALL; i += THREADS) {
        const int at = i + thread, row = at / CHUNKS, chunk = at % CHUNKS;
        if (ALL % THREADS == 0 || at < ALL) {
            const char *begin = static_cast<const char *>(from(row));
            const bool real = begin && first + chunk < chunks;
            copy_async(to + place<CHUNKS>(row, chunk), real ? begin + (first + chunk) * 16 : readable, real);
        }
    }
}

template <int M, int N> __device__ __forceinline__ void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[m][n][j] = 0;
}

// What ldmatrix reads of one factor of a product: words of the numbers, and of second halves.
template <Kind KIND> struct Factor {
    unsigned words[4], rest[Numbers<KIND>::PAIRS ? 4 : 1];
};

// d += a b^T of a [16, 16] and b [8, 16], blocks 8 `half` to 8 `half` + 7 of a factor's rows.
template <Kind KIND>
__device__ __forceinline__ void multiply_block(float (&d)[4], const Factor<KIND> &a, const Factor<KIND> &b, int half) {
    const int i = 2 * half;
    if constexpr (Numbers<KIND>::PAIRS) {
        multiply<F16>(d, a.rest, b.words[i], b.words[i + 1]);
        multiply<F16>(d, a.words, b.rest[i], b.rest[i + 1]);
        multiply<F16>(d, a.words, b.words[i], b.words[i + 1]);
    } else
        multiply<KIND>(d, a.words, b.words[i], b.words[i + 1]);
}

// Reads a factor; `at(offset)` is the address that this lane gives for chunks `offset` on from those of first halves.
template <Kind KIND, class At> __device__ __forceinline__ void read_factor(Factor<KIND> &to, At at) {
    load_matrices(to.words, at(0));
    if constexpr (Numbers<KIND>::PAIRS) load_matrices(to.rest, at(Numbers<KIND>::REST));
}
template <Kind KIND, class At> __device__ __forceinline__ void read_transposed(Factor<KIND> &to, At at) {
    load_transposed(to.words, at(0));
    if constexpr (Numbers<KIND>::PAIRS) load_transposed(to.rest, at(Numbers<KIND>::REST));
}

// A warp's acc [16 M, 8 N] += A B^T over the numbers of CHUNKS chunks. `a(r, c)` is the address of chunk c of row r of
// A; B are the rows of a matrix in shared memory from `column` on.
template <Kind KIND, int CHUNKS, int M, int N, class A>
__device__ __forceinline__ void product(float (&acc)[M][N][4], A a, const unsigned char *matrix, int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < CHUNKS; k += 2) {
        if (Numbers<KIND>::PAIRS && k % 8 >= Numbers<KIND>::REST) continue;
        Factor<KIND> x[M], y;
#pragma unroll
        for (int m = 0; m < M; ++m)
            read_factor(x[m], [&](int rest) { return a(m * 16 + lane % 16, k + rest + lane / 16); });
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (n % 2 == 0) {
                const int row = column + (n + lane / 16) * 8 + lane % 8;
                read_factor(y, [&](int rest) { return matrix + place<CHUNKS>(row, k + rest + lane / 8 % 2); });
            }
#pragma unroll
            for (int m = 0; m < M; ++m) multiply_block(acc[m][n], x[m], y, n % 2);
        }
    }
    static_assert(N % 2 == 0);
}

// 2^exponent for exponents of float32's normal numbers; those beyond are taken for the nearest.
__device__ __forceinline__ float power(int exponent) {
    exponent = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
    return as_float(unsigned(exponent + 127) << 23);
}
