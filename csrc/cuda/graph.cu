// similarity_graph_score from the attention weights on: the nodes of a tile of captions with one image, all steps of
// reasoning over them, (1) to (3) of ops/similarity_graph.py, and the scores. Nodes stay in shared memory.
//
//   Y = X M + u,   E = softmax over a caption's nodes of Y X^T,   X' = relu(E X Wr^T + br)
//
// The last step is computed at the captions' first nodes only.
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

enum Matrix { X, Y, Z };

template <class T> struct GraphShared {
    static constexpr int ROOM = sizeof(typename T::Making) > 2 * T::MATRIX ? sizeof(typename T::Making) : 2 * T::MATRIX;
    static constexpr int AMONG = T::SLOTS / 8 * T::HALVES;  // chunks of a row of E
    unsigned char room[ROOM];  // X, then Y or Z
    unsigned char edges[T::SLOTS * AMONG * 16];
    typename T::Shared tile;
    float part[WARPS][16];
    // The bits of the largest number in each row of Y and Z, and in each caption's rows of X, at its first slot. Those
    // of one step are filled while those of the other are read.
    unsigned top[2][3][T::SCALED ? T::SLOTS : 1];
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
    unsigned own[T::DEPTH / 16][4];
    sync_warp();  // other lanes of the warp have written its rows
    clear(acc);
    load(0);
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        group_wait<0>(own);
#pragma unroll
        for (int k = 0; k < T::DEPTH / 16; ++k)
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
// `caption(r)`, which lie in the blocks of 16 slots from `begin` to `end` - 1; logits are products times `factor(r)`.
// A warp's work.
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

// SCALED: puts the largest numbers of the warp's rows, which must be in acc already, into `top[place(row)]`. On
// return it is there for all rows.
template <class T, int M, int N, class At>
__device__ __forceinline__ void find_tops(const float (&acc)[M][N][4], unsigned *top, int first_row, At at) {
    if constexpr (!T::SCALED) return;
    const int lane = threadIdx.x % 32, g = lane / 4;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float largest = 0;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float x = fabsf(acc[m][n][2 * j + i]);
                    largest = x > largest ? x : largest;  // passes over NaN
                }
            largest = quad_max(largest);
            if (lane % 4 == 0) raise_to(top + at(first_row + m * 16 + g + 8 * j), as_bits(largest));
        }
    __syncthreads();
}

// A block: one tile with one image. Grid: tiles x images.
template <class T> __device__ __forceinline__ void score_graph(const Graph &p) {
    constexpr Kind KIND = T::KIND;
    constexpr int S = T::S, SLOTS = T::SLOTS;
    constexpr bool SCALED = T::SCALED;
    DYNAMIC_SHARED(memory, sizeof(GraphShared<T>));
    auto &sh = *reinterpret_cast<GraphShared<T> *>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = warp_row<T>(), column = warp_column<T>();
    if constexpr (SCALED)
        for (int i = threadIdx.x; i < 6 * SLOTS; i += THREADS)
            (&sh.top[0][0][0])[i] = i < SLOTS ? as_bits(1.f) : 0;  // nodes are at most 1
    typename T::Matrices matrices;
    make_nodes<T>(p.nodes, sh.tile, *reinterpret_cast<typename T::Making *>(sh.room), matrices);

    auto matrix = [&](const void *weights, int step) { return row_of(weights, step * (long long)S, T::WIDE); };
    auto multiplied = [&](typename T::Products &acc, const unsigned char *a, const void *weight) {
        if constexpr (T::GROUPS)
            weighted_by_groups<T>(acc, sh, a, first_row, weight, matrices);
        else
            weighted<T>(acc, sh, a, [&](int r) { return first_row + r; }, weight, matrices, column);
    };
    auto sees = [&](int m, int k) {
        const int block = first_row / 16 + m;
        return sh.tile.begin[block] <= k && k < sh.tile.end[block];
    };
    auto caption_slot = [&](int row) { return sh.tile.begin[row / 16] * 16; };
    // The numbers of row `at` of a matrix are stored times 2^exponent.
    auto exponent = [&](int step, Matrix which, int at) {
        return SCALED ? stored_exponent(sh.top[step % 2][which][at]) : 0;
    };
    for (int step = 0; step + 1 < p.steps; ++step) {
        typename T::Products acc;
        auto each = [&](auto change) {
            const int top = opaque(first_row + g);
#pragma unroll
            for (int m = 0; m < T::M; ++m)
#pragma unroll
                for (int n = 0; n < T::N; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        change(top + m * 16 + 8 * j, column + n * 8 + 2 * t, acc[m][n] + 2 * j);
        };
        auto put_y = [&](Matrix which) {
            find_tops<T>(acc, sh.top[step % 2][which], first_row, [](int row) { return row; });
            each([&](int row, int c, const float *x) {
                const float unit = SCALED ? power(exponent(step, which, row)) : 1;
                put<KIND, T::WIDE>(sh.y(), row, c, x[0] * unit, x[1] * unit);
            });
        };
        const float *shift = p.shift + step * S, *bias = p.bias + step * S;
        multiplied(acc, sh.x(), matrix(p.ask, step));
        each([&](int row, int c, float *x) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if constexpr (SCALED)
                    x[i] *= power(-exponent(step, X, caption_slot(row))) * power(p.ask_exponent[step * S + c + i]);
                x[i] += shift[c + i];
            }
        });
        put_y(Y);
        __syncthreads();
        if (warp < T::BLOCKS)
            edges<T>(
                sh, warp * 16, sh.tile.begin[warp], sh.tile.end[warp], [&](int row) { return sh.tile.owner[row]; },
                [&](int row) { return power(-exponent(step, Y, row)) * power(-exponent(step, X, caption_slot(row))); });
        if constexpr (SCALED)  // the other step's
            for (int i = threadIdx.x; i < 3 * SLOTS; i += THREADS) sh.top[(step + 1) % 2][0][i] = 0;
        __syncthreads();
        gathered<T>(acc, sh, first_row, column, sees);
        each([&](int row, int, float *x) {
            const float factor = SCALED ? sh.share()[row] * power(-exponent(step, X, caption_slot(row))) : sh.share()[row];
            x[0] *= factor, x[1] *= factor;
        });
        put_y(Z);  // Y has been read
        multiplied(acc, sh.y(), matrix(p.value, step));
        each([&](int row, int c, float *x) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if constexpr (SCALED)
                    x[i] *= power(-exponent(step, Z, row)) * power(p.value_exponent[step * S + c + i]);
                x[i] = relu(x[i] + bias[c + i]);
            }
        });
        find_tops<T>(acc, sh.top[(step + 1) % 2][X], first_row, caption_slot);
        each([&](int row, int c, const float *x) {  // X has been read
            const float unit = SCALED ? power(exponent(step + 1, X, caption_slot(row))) : 1;
            put_node<T>(sh.tile, sh.x(), row, c, x[0] * unit, x[1] * unit);
        });
        __syncthreads();
    }

    // The last step, at the first nodes of the tile's captions: rows 0 to 15 of Y and E. The nodes, which lie multiples
    // of 16 rows apart, are copied to rows 16 to 31 of Y first, where ldmatrix reads them without bank conflicts.
    constexpr int OWNERS = S < 128 ? S / 16 : WARPS, COLUMNS = S / OWNERS, N = COLUMNS / 8;  // warps with columns
    static_assert(T::BLOCKS <= 16 && SLOTS >= 32);
    for (int i = threadIdx.x; i < 16 * T::WIDE; i += THREADS) {
        const int row = i / T::WIDE, chunk = i % T::WIDE;
        *reinterpret_cast<uint4 *>(sh.y() + place<T::WIDE>(16 + row, chunk)) =
            *reinterpret_cast<const uint4 *>(sh.x() + place<T::WIDE>(sh.tile.first[row % T::BLOCKS], chunk));
    }
    const int last = p.steps - 1, mine = warp % OWNERS * COLUMNS;
    const float *shift = p.shift + last * S, *bias = p.bias + last * S;
    float acc[1][N][4];
    auto each = [&](auto change) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) change(g + 8 * j, mine + n * 8 + 2 * t, acc[0][n] + 2 * j);
    };
    auto put_y = [&](Matrix which) {
        find_tops<T>(acc, sh.top[last % 2][which], 0, [](int row) { return row; });
        each([&](int row, int c, const float *x) {
            const float unit = SCALED ? power(exponent(last, which, row)) : 1;
            if (warp < OWNERS) put<KIND, T::WIDE>(sh.y(), row, c, x[0] * unit, x[1] * unit);  // redundant: copies
        });
    };
    auto first_slot = [&](int row) { return sh.tile.first[row % T::BLOCKS]; };
    weighted<T>(acc, sh, sh.y(), [](int r) { return 16 + r; }, matrix(p.ask, last), matrices, mine);
    each([&](int row, int c, float *x) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (SCALED)
                x[i] *= power(-exponent(last, X, first_slot(row))) * power(p.ask_exponent[last * S + c + i]);
            x[i] += shift[c + i];
        }
    });
    put_y(Y);
    __syncthreads();
    if (warp == 0)
        edges<T>(
            sh, 0, 0, T::BLOCKS, [&](int row) { return row < T::BLOCKS ? sh.tile.caption[row] : -2; },
            [&](int row) { return power(-exponent(last, Y, row)) * power(-exponent(last, X, first_slot(row))); });
    __syncthreads();
    gathered<T>(acc, sh, 0, mine, [](int, int) { return true; });
    each([&](int row, int, float *x) {
        const float factor = SCALED ? sh.share()[row] * power(-exponent(last, X, first_slot(row))) : sh.share()[row];
        x[0] *= factor, x[1] *= factor;
    });
    put_y(Z);
    weighted<T>(acc, sh, sh.y(), [](int r) { return r; }, matrix(p.value, last), matrices, mine);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int c = mine + n * 8 + 2 * t + i;
                float x = acc[0][n][2 * j + i];
                if constexpr (SCALED) x *= power(-exponent(last, Z, g + 8 * j)) * power(p.value_exponent[last * S + c]);
                sum += relu(x + bias[c]) * p.score_weight[c];
            }
        sum = quad_sum(sum);
        if (t == 0) sh.part[warp][g + 8 * j] = sum;
    }
    __syncthreads();
    const float gave_up = matrices.end();
    if (int(threadIdx.x) < sh.tile.captions && int(blockIdx.y) < p.nodes.images) {
        float sum = *p.score_bias + gave_up + sh.tile.spoiled[sh.tile.first[threadIdx.x] / 16];
        for (int w = 0; w < OWNERS; ++w) sum += sh.part[w][threadIdx.x];
        const long long at = blockIdx.y * (long long)p.all_captions + sh.tile.caption[threadIdx.x];
        put_score<T>(p.score, at, sum, p.logit);
    }
}

template <Kind KIND, int S, int SLOTS, int DEPTH, int REGIONS, bool SCALED = KIND == F16X3, bool GROUPS = false>
__global__ void __launch_bounds__(THREADS, 1) graph_scores(Graph p) {
    score_graph<NodeTile<KIND, S, SLOTS, DEPTH, REGIONS, SCALED, GROUPS>>(p);
}
template <Kind KIND, int S, int SLOTS, int DEPTH, int REGIONS, bool SCALED>
__global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1) graph_scores_in_clusters(Graph p) {
    score_graph<NodeTile<KIND, S, SLOTS, DEPTH, REGIONS, SCALED, true, 2>>(p);
}
