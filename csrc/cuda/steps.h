// The steps of SGR (graph.cu): what they share, and a step but the last one where warps multiply (mma).
#pragma once
#include "nodes.h"

struct Graph {
    Nodes nodes;
    const void *ask, *value;                        // [steps, S, S] M^T, Wr
    const float *shift, *bias;                      // [steps, S] u, br
    const int *ask_exponent, *value_exponent;       // [steps, S]; SCALED only
    const float *score_weight, *score_bias;         // [S], [1]
    void *score;                                    // [images, all_captions]
    int steps, all_captions, logit;                 // logit: 1 for the argument of the score's sigmoid
};

constexpr int FIRSTS = 8;  // the most captions of a tile

template <class T> struct GraphShared {
    static_assert(T::BLOCKS <= FIRSTS);
    static constexpr int AMONG = T::SLOTS / 8 * T::HALVES;  // chunks of a row of E
    struct Last {  // of the last step
        unsigned char rows[FIRSTS * T::WIDE * 16];  // of each caption: its first node, then that of Z
        float asked[FIRSTS][T::S + 4];              // its first row of Y; the other 4 keep rows apart in the banks
        float largest[T::BLOCKS], total[T::BLOCKS]; // of each 16 slots: the largest logit, and the sum of e
    };
    static constexpr int LAST = (sizeof(Last) + 1023) / 1024 * 1024, MATRICES = T::MATRIX + T::SLOTS * AMONG * 16;
    static constexpr int MORE = T::GROUPS || LAST > MATRICES ? LAST : MATRICES;
    static constexpr int MAKING = sizeof(typename T::Making);
    static constexpr int ROOM = MAKING > T::MATRIX + MORE ? MAKING : T::MATRIX + MORE;
    unsigned char room[ROOM];  // X; Y or Z, and E, if not GROUPS; and in their place `Last`
    typename T::Shared tile;
    float part[WARPS][FIRSTS];
    // The bits of the largest number in each caption's rows of X, at its first block, and in each row of Y. Those of
    // one step are filled while those of the other are read.
    unsigned nodes_top[2][T::SCALED ? T::BLOCKS : 1];
    unsigned top[2][T::SCALED && !T::GROUPS ? T::SLOTS : 1];
    __device__ unsigned char *x() { return room; }
    __device__ unsigned char *y() { return room + T::MATRIX; }
    __device__ unsigned char *edges() { return room + 2 * T::MATRIX; }
    __device__ Last &last() { return *reinterpret_cast<Last *>(room + T::MATRIX); }
    __device__ float *share() { return tile.inverse; }  // of each row of E: 1 / its sum, once the nodes are made
};

// Numbers are stored times 2^exponent, so that they stay below 2^(UNIT + 1). `bits`: those of the largest, as float32.
__device__ __forceinline__ int stored_exponent(unsigned bits) {
    const int exponent = int(bits >> 23) - 127;
    return UNIT - (exponent < -100 ? -100 : exponent);
}
// So are those of the nodes of a caption, of which `block` is the first one; and those of their sums, rows of Z.
template <class T> __device__ __forceinline__ int nodes_exponent(const GraphShared<T> &sh, int step, int block) {
    return T::SCALED ? stored_exponent(sh.nodes_top[step % 2][block]) : 0;
}

__device__ __forceinline__ float relu(float x) { return x < 0 ? 0.f : x; }  // NaN stays NaN

// The matrix of weights [S, S] of a step.
template <class T> __device__ __forceinline__ const void *matrix_of(const void *weights, int step) {
    return row_of(weights, step * (long long)T::S, T::WIDE);
}

// Calls use(step, stage) for each stage of a matrix of weights. A barrier lies between reads of a stage and this call.
template <class T, class Use>
__device__ __forceinline__ void for_stages(GraphShared<T> &sh, const void *weight, typename T::Matrices &matrices,
                                           Use use) {
    auto load = [&](int step) {
        if (!T::CLUSTERS && step * T::DEPTH < T::S)
            copy_rows<T::S, T::NARROW, T::GROUPS>(sh.tile.stage[step % 2], step * T::NARROW, T::WIDE, weight,
                                                  [&](int r) { return row_of(weight, r, T::WIDE); });
        commit();
    };
    load(0);
#pragma unroll 1
    for (int step = 0; step * T::DEPTH < T::S; ++step) {
        wait_groups<0>();
        const int stage = T::CLUSTERS ? matrices.place() : step % 2;
        matrices.wait();
        __syncthreads();  // this stage has landed, and the other one has been read
        matrices.pass();
        load(step + 1);
        use(step, sh.tile.stage[stage]);
    }
}

// Rows first to first + 15 of E, whose sums are 1 / share, from the same rows of Y. They see the nodes of their
// caption, which lie in the blocks of 16 slots from `begin` to `end` - 1; logits are products times `factor(row)`.
// A warp's work.
template <class T, class RowFactor>
__device__ __forceinline__ void edges(GraphShared<T> &sh, int first, int begin, int end, RowFactor factor) {
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
            if (begin <= n / 2 && n / 2 < end) {  // redundant: saves products whose sums are masked below
                read_factor(b, [&](int rest) {
                    return sh.x() + place<T::WIDE>((n + lane / 16) * 8 + lane % 8, k + rest + lane / 8 % 2);
                });
                multiply_block(acc[0][n], a, b, 0);
                multiply_block(acc[0][n + 1], a, b, 1);
            }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int row = first + g + 8 * j, mine = sh.tile.owner[row];
        const float scale = T::SCALED ? factor(row) : 1;
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
            put<KIND, GraphShared<T>::AMONG>(sh.edges(), row, n * 8 + 2 * t, p * T::scale(), q * T::scale());
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
        if (!some) continue;  // redundant: saves products with zeros
#pragma unroll
        for (int m = 0; m < M; ++m)
            read_factor(a[m], [&](int rest) {
                const int chunk = Numbers<KIND>::chunk(k * 16) + rest + lane / 16;
                return sh.edges() + place<GraphShared<T>::AMONG>(first + m * 16 + lane % 16, chunk);
            });
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            read_transposed(b, [&](int rest) {
                const int chunk = Numbers<KIND>::chunk(column + n * 8) + rest + lane / 16;
                return sh.x() + place<T::WIDE>(k * 16 + lane % 16, chunk);
            });
#pragma unroll
            for (int m = 0; m < M; ++m)
                if (sees(m, k)) {  // else 0 times another caption's NaN
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

// A step but the last one: X = relu(E X Wr^T + br).
template <class T>
__device__ __forceinline__ void step_by_warps(const Graph &p, GraphShared<T> &sh, int step,
                                              typename T::Matrices &matrices) {
    constexpr bool SCALED = T::SCALED;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = warp_row<T>(), column = warp_column<T>();
    typename T::Products acc;
    auto each = [&](auto change) {
        const int top = opaque(first_row + g);
#pragma unroll
        for (int m = 0; m < T::M; ++m)
#pragma unroll
            for (int n = 0; n < T::N; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) change(top + m * 16 + 8 * j, column + n * 8 + 2 * t, acc[m][n] + 2 * j);
    };
    auto weighted = [&](const unsigned char *a, const void *weight) {  // acc = A W^T of A [SLOTS, S]
        clear(acc);
        for_stages(sh, weight, matrices, [&](int stage, const unsigned char *rows) {
            auto at = [&](int r, int chunk) { return a + place<T::WIDE>(first_row + r, stage * T::NARROW + chunk); };
            product<T::KIND, T::NARROW>(acc, at, rows, column);
        });
    };
    auto caption_block = [&](int row) { return sh.tile.begin[row / 16]; };
    auto from_nodes = [&](int row) { return power(-nodes_exponent(sh, step, caption_block(row))); };
    auto exponent = [&](int row) { return SCALED ? stored_exponent(sh.top[step % 2][row]) : 0; };  // of Y
    const float *shift = p.shift + step * T::S, *bias = p.bias + step * T::S;
    weighted(sh.x(), matrix_of<T>(p.ask, step));
    each([&](int row, int c, float *x) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (SCALED) x[i] *= from_nodes(row) * power(p.ask_exponent[step * T::S + c + i]);
            x[i] += shift[c + i];
        }
    });
    find_tops<T>(acc, sh.top[step % 2], first_row, [](int row) { return row; });
    each([&](int row, int c, const float *x) {
        const float unit = SCALED ? power(exponent(row)) : 1;
        put<T::KIND, T::WIDE>(sh.y(), row, c, x[0] * unit, x[1] * unit);
    });
    __syncthreads();
    if (warp < T::BLOCKS)
        edges<T>(sh, warp * 16, sh.tile.begin[warp], sh.tile.end[warp],
                 [&](int row) { return power(-exponent(row)) * from_nodes(row); });
    if constexpr (SCALED) {  // the other step's
        if (int(threadIdx.x) < T::BLOCKS) sh.nodes_top[(step + 1) % 2][threadIdx.x] = 0;
        for (int i = threadIdx.x; i < T::SLOTS; i += THREADS) sh.top[(step + 1) % 2][i] = 0;
    }
    __syncthreads();
    gathered<T>(acc, sh, first_row, column, [&](int m, int k) {
        const int block = first_row / 16 + m;
        return sh.tile.begin[block] <= k && k < sh.tile.end[block];
    });
    each([&](int row, int c, const float *x) {  // Z, as Y has been read
        put<T::KIND, T::WIDE>(sh.y(), row, c, x[0] * sh.share()[row], x[1] * sh.share()[row]);
    });
    weighted(sh.y(), matrix_of<T>(p.value, step));
    each([&](int row, int c, float *x) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (SCALED) x[i] *= from_nodes(row) * power(p.value_exponent[step * T::S + c + i]);
            x[i] = relu(x[i] + bias[c + i]);
        }
    });
    find_tops<T>(acc, sh.nodes_top[(step + 1) % 2], first_row, caption_block);
    each([&](int row, int c, const float *x) {  // X has been read
        const float unit = SCALED ? power(nodes_exponent(sh, step + 1, caption_block(row))) : 1;
        put_node<T>(sh.tile, sh.x(), row, c, x[0] * unit, x[1] * unit);
    });
    __syncthreads();
}
