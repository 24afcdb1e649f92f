// Matrices in shared memory, and the product of two of them by the warps of a block.
#pragma once
#include "gpu.h"

constexpr int THREADS = 256, WARPS = 8;
constexpr float EPS = 1e-8f;

// A matrix of half-precision numbers lies in shared memory in chunks of 16 bytes, CHUNKS (a power of two) a row. Where
// chunk `chunk` of row `row` begins: the chunks of a row are exchanged so that those of one number in eight rows, which
// ldmatrix reads at once, lie in different banks.
template <int CHUNKS> __device__ __forceinline__ int place(int row, int chunk) {
    constexpr int ROWS = CHUNKS < 8 ? 8 / CHUNKS : 1, MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;
    return (row * CHUNKS + (chunk ^ (row / ROWS & MASK))) * 16;
}

// Starts the copy of numbers first to first + 8 CHUNKS - 1 of ROWS rows; zeros stand for those from `size` on and for
// rows whose address `from(row)` is null. `readable`: any address.
template <int ROWS, int CHUNKS, class From>
__device__ __forceinline__ void copy_rows(unsigned char *to, int first, int size, const void *readable, From from) {
    constexpr int ALL = ROWS * CHUNKS;
#pragma unroll
    for (int i = 0; i < ALL; i += THREADS) {
        const int at = i + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS, number = first + chunk * 8;
        if (ALL % THREADS == 0 || at < ALL) {
            const char *begin = static_cast<const char *>(from(row));
            const bool real = begin && number < size;
            copy_async(to + place<CHUNKS>(row, chunk), real ? begin + number * 2 : readable, real);
        }
    }
}

// Row `row` of a matrix of half-precision numbers in global memory.
__device__ __forceinline__ const void *row_of(const void *matrix, long long row, int size) {
    return static_cast<const char *>(matrix) + row * size * 2;
}

template <int M, int N> __device__ __forceinline__ void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[m][n][j] = 0;
}

// A warp's acc [16 M, 8 N] += A B^T over 8 CHUNKS numbers. `a(r, c)` is the address of chunk c of row r of A; B are the
// rows of a matrix in shared memory from `column` on.
template <Kind KIND, int CHUNKS, int M, int N, class A>
__device__ __forceinline__ void product(float (&acc)[M][N][4], A a, const unsigned char *matrix, int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < CHUNKS; k += 2) {
        unsigned x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; ++m) load_matrices(x[m], a(m * 16 + lane % 16, k + lane / 16));
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (n % 2 == 0) {  // two blocks of 8 rows at a time; the last of an odd number twice
                const int row = column + (n + (n + 1 < N ? lane / 16 : 0)) * 8 + lane % 8;
                load_matrices(y, matrix + place<CHUNKS>(row, k + lane / 8 % 2));
            }
#pragma unroll
            for (int m = 0; m < M; ++m) multiply<KIND>(acc[m][n], x[m], y[n % 2 * 2], y[n % 2 * 2 + 1]);
        }
    }
}
