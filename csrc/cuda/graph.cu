// similarity_graph_score from the attention weights on: the nodes of a tile of captions with one image, all steps of
// reasoning over them, (1) to (3) of ops/similarity_graph.py, and the scores. Nodes stay in shared memory.
//
//   Y = X M + u,   E = softmax over a caption's nodes of Y X^T,   X' = relu(E X Wr^T + br)
//
// The last step is computed at the captions' first nodes only.
#include "steps.h"

struct Graph {
    Nodes nodes;
    const void *ask, *value;                        // [steps, S, S] M^T, Wr
    const float *shift, *bias;                      // [steps, S] u, br
    const int *ask_exponent, *value_exponent;       // [steps, S]; SCALED only
    const float *score_weight, *score_bias;         // [S], [1]
    void *score;                                    // [images, all_captions]
    int steps, all_captions, logit;                 // logit: 1 for the argument of the score's sigmoid
};

// A block: one tile with one image. Grid: tiles x images.
template <class T> __device__ __forceinline__ void score_graph(const Graph &p) {
    constexpr Kind KIND = T::KIND;
    constexpr int S = T::S, SLOTS = T::SLOTS;
    constexpr bool SCALED = T::SCALED, ALONE = GraphShared<T>::ALONE;
    DYNAMIC_SHARED(memory, sizeof(GraphShared<T>));
    auto &sh = *reinterpret_cast<GraphShared<T> *>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = warp_row<T>(), column = warp_column<T>();
    if constexpr (SCALED) {
        constexpr int ROWS = sizeof sh.top[0][0] / 4;
        for (int i = threadIdx.x; i < 2 * T::BLOCKS; i += THREADS)
            sh.nodes_top[i / T::BLOCKS][i % T::BLOCKS] = i < T::BLOCKS ? as_bits(1.f) : 0;  // nodes are at most 1
        for (int i = threadIdx.x; i < int(sizeof sh.top) / 4; i += THREADS)
            sh.top[i / ROWS / 2][i / ROWS % 2][i % ROWS] = 0;
    }
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
    auto caption_block = [&](int row) { return sh.tile.begin[row / 16]; };
    // The numbers of the nodes of a caption, of which `block` is the first one, are stored times 2^exponent.
    auto nodes_exponent = [&](int step, int block) {
        return SCALED ? stored_exponent(sh.nodes_top[step % 2][block]) : 0;
    };
    // And so are those of row `row` of Y or Z.
    auto tops = [&](int step, Matrix which) { return sh.top[ALONE ? 0 : step % 2][which]; };
    auto exponent = [&](int step, Matrix which, int row) {
        return SCALED ? stored_exponent(tops(step, which)[row]) : 0;
    };
    for (int step = 0; step + 1 < p.steps; ++step) {
        typename T::Products acc;
        float largest[T::M][2];  // of this thread's rows of Y or Z; ALONE
        auto each = [&](auto change) {
            const int top = opaque(first_row + g);
#pragma unroll
            for (int m = 0; m < T::M; ++m)
#pragma unroll
                for (int n = 0; n < T::N; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        change(top + m * 16 + 8 * j, column + n * 8 + 2 * t, acc[m][n] + 2 * j, 2 * m + j);
        };
        auto own_exponent = [&](Matrix which, int row, int place) {  // `place`: of the row among this thread's
            if constexpr (SCALED && ALONE) return stored_exponent(as_bits(largest[place / 2][place % 2]));
            return exponent(step, which, row);
        };
        auto put_y = [&](Matrix which) {
            if constexpr (SCALED && ALONE)
                find_largest(acc, largest);
            else
                find_tops<T>(acc, tops(step, which), first_row, [](int row) { return row; });
            each([&](int row, int c, const float *x, int place) {
                const float unit = SCALED ? power(own_exponent(which, row, place)) : 1;
                put<KIND, T::WIDE>(sh.y(), row, c, x[0] * unit, x[1] * unit);
            });
        };
        const float *shift = p.shift + step * S, *bias = p.bias + step * S;
        multiplied(acc, sh.x(), matrix(p.ask, step));
        each([&](int row, int c, float *x, int) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if constexpr (SCALED)
                    x[i] *= power(-nodes_exponent(step, caption_block(row))) * power(p.ask_exponent[step * S + c + i]);
                x[i] += shift[c + i];
            }
        });
        put_y(Y);
        __syncthreads();
        if (warp < T::BLOCKS)
            edges<T>(
                sh, warp * 16, sh.tile.begin[warp], sh.tile.end[warp], [&](int row) { return sh.tile.owner[row]; },
                [&](int row, int j) {
                    return power(-own_exponent(Y, row, j)) * power(-nodes_exponent(step, caption_block(row)));
                });
        if constexpr (SCALED) {  // the other step's
            if (int(threadIdx.x) < T::BLOCKS) sh.nodes_top[(step + 1) % 2][threadIdx.x] = 0;
            if constexpr (!ALONE)
                for (int i = threadIdx.x; i < 2 * SLOTS; i += THREADS) sh.top[(step + 1) % 2][0][i] = 0;
        }
        __syncthreads();
        gathered<T>(acc, sh, first_row, column, sees);
        each([&](int row, int, float *x, int) {
            const float unit = SCALED ? power(-nodes_exponent(step, caption_block(row))) : 1;
            x[0] *= sh.share()[row] * unit, x[1] *= sh.share()[row] * unit;
        });
        put_y(Z);  // Y has been read
        multiplied(acc, sh.y(), matrix(p.value, step));
        each([&](int row, int c, float *x, int place) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if constexpr (SCALED)
                    x[i] *= power(-own_exponent(Z, row, place)) * power(p.value_exponent[step * S + c + i]);
                x[i] = relu(x[i] + bias[c + i]);
            }
        });
        find_tops<T>(acc, sh.nodes_top[(step + 1) % 2], first_row, caption_block);
        each([&](int row, int c, const float *x, int) {  // X has been read
            const float unit = SCALED ? power(nodes_exponent(step + 1, caption_block(row))) : 1;
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
        find_tops<T>(acc, tops(last, which), 0, [](int row) { return row; });
        each([&](int row, int c, const float *x) {
            const float unit = SCALED ? power(exponent(last, which, row)) : 1;
            if (warp < OWNERS) put<KIND, T::WIDE>(sh.y(), row, c, x[0] * unit, x[1] * unit);  // redundant: copies
        });
    };
    auto first_block = [&](int row) { return sh.tile.first[row % T::BLOCKS] / 16; };
    weighted<T>(acc, sh, sh.y(), [](int r) { return 16 + r; }, matrix(p.ask, last), matrices, mine);
    each([&](int row, int c, float *x) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (SCALED)
                x[i] *= power(-nodes_exponent(last, first_block(row))) * power(p.ask_exponent[last * S + c + i]);
            x[i] += shift[c + i];
        }
    });
    put_y(Y);
    __syncthreads();
    if (warp == 0)
        edges<T>(
            sh, 0, 0, T::BLOCKS, [&](int row) { return row < T::BLOCKS ? sh.tile.caption[row] : -2; },
            [&](int row, int) {
                return power(-exponent(last, Y, row)) * power(-nodes_exponent(last, first_block(row)));
            });
    __syncthreads();
    gathered<T>(acc, sh, 0, mine, [](int, int) { return true; });
    each([&](int row, int, float *x) {
        const float unit = SCALED ? power(-nodes_exponent(last, first_block(row))) : 1;
        x[0] *= sh.share()[row] * unit, x[1] *= sh.share()[row] * unit;
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
