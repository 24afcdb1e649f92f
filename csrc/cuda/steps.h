// The parts of SGR's steps (graph.cu): products with weights, a caption's edges, and sums of nodes along them.
#pragma once
#include "nodes.h"

enum Matrix { Y, Z };

template <class T> struct GraphShared {
    static constexpr int ROOM = sizeof(typename T::Making) > 2 * T::MATRIX ? sizeof(typename T::Making) : 2 * T::MATRIX;
    static constexpr bool ALONE = T::SIDE == 1;             // whether a warp has whole rows
    static constexpr int AMONG = T::SLOTS / 8 * T::HALVES;  // chunks of a row of E
    unsigned char room[ROOM];  // X, then Y or Z
    unsigned char edges[T::SLOTS * AMONG * 16];
    typename T::Shared tile;
    float part[WARPS][16];
    // The bits of the largest number in each caption's rows of X, at its first block, and in each row of Y and Z. Those
    // of one step are filled while those of the other are read. ALONE: of Y and Z in the last step alone.
    unsigned nodes_top[2][T::SCALED ? T::BLOCKS : 1];
    unsigned top[ALONE ? 1 : 2][2][!T::SCALED ? 1 : ALONE ? 16 : T::SLOTS];
    __device__ unsigned char *x() { return room; }
    __device__ unsigned char *y() { return room + T::MATRIX; }
    __device__ float *share() { return tile.inverse; }  // of each row of E: 1 / its sum, once the nodes are made
};

// Numbers are stored times 2^exponent, so that they stay below 2^(UNIT + 1). `bits`: those of the largest, as float32.
__device__ __forceinline__ int stored_exponent(unsigned bits) {
    const int exponent = int(bits >> 23) - 127;
    return UNIT - (exponent < -100 ? -100 : exponent);
}

__device__ __forceinline__ float relu(float x) { return x < 0 ? 0.f : x; }  // NaN stays NaN

// acc = A W^T: the rows of A [., S] that `row` names for the warp's 16 M rows, W [S, S] in global memory from its row
// `column` on. The caller has passed a barrier since a stage was last read.
template <class T, int M, int N, class Row>
__device__ __forceinline__ void weighted(float (&acc)[M][N][4], GraphShared<T> &sh, const unsigned char *a, Row row,
                                         const void *weight, typename T::Matrices &matrices, int column) {
    auto load = [&](int step) {
        if (!T::CLUSTERS && step * T::DEPTH < T::S)
            copy_rows<T::S, T::NARROW>(sh.tile.stage[step % 2], step * T::NARROW, T::WIDE, weight,
                                       [&](int r) { return row_of(weight, r, T::WIDE); });
        commit();
    };
    clear(acc);
    load(0);
#pragma unroll 1
    for (int step = 0; step * T::DEPTH < T::S; ++step) {
        wait_groups<0>();
        const int stage = T::CLUSTERS ? matrices.place() : step % 2;
        matrices.wait();
        __syncthreads();  // this stage has landed, and the other one has been read
        matrices.pass();
        load(step + 1);
        product<T::KIND, T::NARROW>(
            acc, [&](int r, int chunk) { return a + place<T::WIDE>(row(r), step * T::NARROW + chunk); },
            sh.tile.stage[stage], column);
    }
}

// acc = A W^T by groups of warps, of the warp's 16 rows of A [SLOTS, S] from `first` on; else as `weighted`.
template <class T>
__device__ __forceinline__ void weighted_by_groups(typename T::Products &acc, GraphShared<T> &sh, const unsigned char *a,
                                                   int first, const void *weight,
                                                   typename T::Matrices &matrices) {
    constexpr int STEPS = T::S / T::DEPTH;
    auto load = [&](int step) {
        if constexpr (T::CLUSTERS) return;
        copy_rows<T::S, T::NARROW>(sh.tile.stage[step % 2], step * T::NARROW, T::WIDE, weight,
                                   [&](int r) { return row_of(weight, r, T::WIDE); });
        commit();
    };
    const int lane = threadIdx.x % 32;
    unsigned own[4][4];
    if constexpr (T::SIDE == 1)
        sync_warp();  // other lanes of the warp have written its rows; unseen: the emulator's lanes see that at once
    else
        __syncthreads();  // and other warps
    clear(acc);
    load(0);
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        group_wait<0>(own);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            load_matrices(own[k], a + place<T::WIDE>(first + lane % 16, step * T::NARROW + 2 * k + lane / 16));
        const int stage = T::CLUSTERS ? matrices.place() : step % 2;
        matrices.wait();
        wait_groups<0>();
        fence_products();
        __syncthreads();  // this stage has landed, and the other one has been read
        if (step + 1 < STEPS) load(step + 1);
        multiply_stage<T>(acc, own, sh.tile.stage[stage]);
        matrices.pass();
    }
    group_wait<0>(acc[0]);
}

// Rows first to first + 15 of E, whose sums are 1 / share, from the same rows of Y. Row r sees the nodes of caption
// `caption(r)`, which lie in the blocks of 16 slots from `begin` to `end` - 1; logits are products times
// `factor(r, j)`, where r is this thread's row j of two. A warp's work.
template <class T, class Caption, class RowFactor>
__device__ __forceinline__ void edges(GraphShared<T> &sh, int first, int begin, int end, Caption caption,
                                      RowFactor factor) {
    constexpr Kind KIND = T::KIND;
    constexpr int N = T::SLOTS / 8;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float acc[1][N][4];
    clear(acc);
#pragma unroll 2
    for (int k = 0; k < T::WIDE; k += 2) {
        if (T::PAIRS && k % 8 >= Numbers<KIND>::REST) continue;
        Factor<KIND> a, b;
        read_factor(a, [&](int rest) { return sh.y() + place<T::WIDE>(first + lane % 16, k + rest + lane / 16); });
#pragma unroll
        for (int n = 0; n < N; n += 2)
            if (begin <= n / 2 && n / 2 < end) {
                read_factor(b, [&](int rest) {
                    return sh.x() + place<T::WIDE>((n + lane / 16) * 8 + lane % 8, k + rest + lane / 8 % 2);
                });
                multiply_block(acc[0][n], a, b, 0);
                multiply_block(acc[0][n + 1], a, b, 1);
            }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int row = first + g + 8 * j, mine = caption(row);
        const float scale = T::SCALED ? factor(row, j) : 1;
        float top = -INFINITE, total = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float &x = acc[0][n][2 * j + i];
                if constexpr (T::SCALED) x *= scale;
                if (sh.tile.owner[n * 8 + 2 * t + i] != mine) x = -INFINITE;
                top = x > top ? x : top;
            }
        top = quad_max(top);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float p = exp2f((acc[0][n][2 * j] - top) * LOG2E), q = exp2f((acc[0][n][2 * j + 1] - top) * LOG2E);
            total += p + q;
            put<KIND, GraphShared<T>::AMONG>(sh.edges, row, n * 8 + 2 * t, p * T::scale(), q * T::scale());
        }
        total = quad_sum(total);
        if (t == 0) sh.share()[row] = 1 / (total * T::scale());
    }
}

// acc = E X for 16 M rows of E from `first` on and columns from `column` on. `sees(m, k)`: whether 16 rows have a
// weight for slots 16 k to 16 k + 15.
template <class T, int M, int N, class Sees>
__device__ __forceinline__ void gathered(float (&acc)[M][N][4], GraphShared<T> &sh, int first, int column, Sees sees) {
    constexpr Kind KIND = T::KIND;
    const int lane = threadIdx.x % 32;
    clear(acc);
#pragma unroll 1
    for (int k = 0; k < T::BLOCKS; ++k) {
        Factor<KIND> a[M], b;
        bool some = false;
#pragma unroll
        for (int m = 0; m < M; ++m) some |= sees(m, k);
        if (!some) continue;
#pragma unroll
        for (int m = 0; m < M; ++m)
            read_factor(a[m], [&](int rest) {
                const int chunk = Numbers<KIND>::chunk(k * 16) + rest + lane / 16;
                return sh.edges + place<GraphShared<T>::AMONG>(first + m * 16 + lane % 16, chunk);
            });
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            read_transposed(b, [&](int rest) {
                const int chunk = Numbers<KIND>::chunk(column + n * 8) + rest + lane / 16;
                return sh.x() + place<T::WIDE>(k * 16 + lane % 16, chunk);
            });
#pragma unroll
            for (int m = 0; m < M; ++m)
                if (sees(m, k)) {
                    multiply_block(acc[m][n], a[m], b, 0);
                    multiply_block(acc[m][n + 1], a[m], b, 1);
                }
        }
    }
}

// The largest numbers of the 16 M rows that the lanes with the same g have in acc.
template <int M, int N>
__device__ __forceinline__ void find_largest(const float (&acc)[M][N][4], float (&largest)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float found = 0;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float x = fabsf(acc[m][n][2 * j + i]);
                    found = x > found ? x : found;  // passes over NaN
                }
            largest[m][j] = quad_max(found);
        }
}

// SCALED: puts the largest numbers of the warp's rows, which must be in acc already, into `top[place(row)]`. On
// return it is there for all rows.
template <class T, int M, int N, class At>
__device__ __forceinline__ void find_tops(const float (&acc)[M][N][4], unsigned *top, int first_row, At at) {
    if constexpr (!T::SCALED) return;
    const int lane = threadIdx.x % 32;
    float largest[M][2];
    find_largest(acc, largest);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (lane % 4 == 0) raise_to(top + at(first_row + m * 16 + lane / 4 + 8 * j), as_bits(largest[m][j]));
    __syncthreads();
}
