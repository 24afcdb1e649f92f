// similarity_graph_score from the attention weights on: the nodes of a tile of captions with one image, all steps of
// reasoning over them, (1) to (3) of itm_fast/ops/similarity_graph.py, and the scores. Nodes stay in shared memory.
//
//   Y = X M + u,  E = softmax over a caption's nodes of Y X^T,  X' = relu(E X Wr^T + br);  the last step at first nodes only
#include "nodes.h"

struct Graph {
    Nodes nodes;
    const void *ask, *value;                   // [steps, S, S] M^T, Wr
    const float *shift, *bias;                 // [steps, S] u, br
    const float *score_weight, *score_bias;    // [S], [1]
    void *score;                               // [images, all_captions]
    int steps, all_captions;
};

template <class T> struct GraphShared {
    static constexpr int ROOM = sizeof(typename T::Making) > 2 * T::MATRIX ? sizeof(typename T::Making) : 2 * T::MATRIX;
    unsigned char room[ROOM];  // X, then Y
    unsigned char edges[T::SLOTS * T::SLOTS * 2];
    typename T::Shared tile;
    float share[T::SLOTS];      // of each row of E: 1 / its sum
    float part[WARPS][16];
    __device__ unsigned char *x() { return room; }
    __device__ unsigned char *y() { return room + T::MATRIX; }
};

__device__ __forceinline__ float relu(float x) { return x < 0 ? 0.f : x; }  // NaN stays NaN

// acc = A W^T: the rows of A [., S] that `row` names for the warp's 16 M rows, W [S, S] in global memory from its row
// `column` on. The caller has passed a barrier since a stage was last read.
template <class T, int M, int N, class Row>
__device__ __forceinline__ void weighted(float (&acc)[M][N][4], GraphShared<T> &sh, const unsigned char *a, Row row,
                                         const void *weight, int column) {
    auto load = [&](int step) {
        if (step * T::DEPTH < T::S)
            copy_rows<T::S, T::NARROW>(sh.tile.stage[step % 2], step * T::DEPTH, T::S, weight,
                                       [&](int r) { return row_of(weight, r, T::S); });
        commit();
    };
    clear(acc);
    load(0);
#pragma unroll 1
    for (int step = 0; step * T::DEPTH < T::S; ++step) {
        wait_groups<0>();
        __syncthreads();  // this stage has landed, and the other one has been read
        load(step + 1);
        product<T::KIND, T::NARROW>(
            acc, [&](int r, int chunk) { return a + place<T::WIDE>(row(r), step * T::NARROW + chunk); },
            sh.tile.stage[step % 2], column);
    }
}

// Rows first to first + 15 of E, whose sums are 1 / share, from the same rows of Y. Row r sees the nodes of caption
// `caption(r)`, which lie in the blocks of 16 slots from `begin` to `end` - 1. A warp's work.
template <class T, class Caption>
__device__ __forceinline__ void edges(GraphShared<T> &sh, int first, int begin, int end, Caption caption) {
    constexpr int N = T::SLOTS / 8;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float acc[1][N][4];
    clear(acc);
#pragma unroll 2
    for (int k = 0; k < T::WIDE; k += 2) {
        unsigned a[4], b[4];
        load_matrices(a, sh.y() + place<T::WIDE>(first + lane % 16, k + lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2)
            if (begin <= n / 2 && n / 2 < end) {
                load_matrices(b, sh.x() + place<T::WIDE>((n + lane / 16) * 8 + lane % 8, k + lane / 8 % 2));
                multiply<T::KIND>(acc[0][n], a, b[0], b[1]);
                multiply<T::KIND>(acc[0][n + 1], a, b[2], b[3]);
            }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int row = first + g + 8 * j, mine = caption(row);
        float top = -INFINITE, total = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float &x = acc[0][n][2 * j + i];
                if (sh.tile.owner[n * 8 + 2 * t + i] != mine) x = -INFINITE;
                top = x > top ? x : top;
            }
        top = quad_max(top);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float p = exp2f((acc[0][n][2 * j] - top) * LOG2E), q = exp2f((acc[0][n][2 * j + 1] - top) * LOG2E);
            total += p + q;
            *reinterpret_cast<unsigned *>(sh.edges + place<T::BLOCKS * 2>(row, n) + 4 * t) = rounded<T::KIND>(p, q);
        }
        total = quad_sum(total);
        if (t == 0) sh.share[row] = 1 / total;
    }
}

// acc = E X for 16 M rows of E from `first` on and columns from `column` on. `sees(m, k)`: whether 16 rows have a weight
// for slots 16 k to 16 k + 15.
template <class T, int M, int N, class Sees>
__device__ __forceinline__ void gathered(float (&acc)[M][N][4], GraphShared<T> &sh, int first, int column, Sees sees) {
    const int lane = threadIdx.x % 32;
    clear(acc);
#pragma unroll 1
    for (int k = 0; k < T::BLOCKS; ++k) {
        unsigned a[M][4], b[4];
        bool some = false;
#pragma unroll
        for (int m = 0; m < M; ++m) some |= sees(m, k);
        if (!some) continue;
#pragma unroll
        for (int m = 0; m < M; ++m)
            load_matrices(a[m], sh.edges + place<T::BLOCKS * 2>(first + m * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            load_transposed(b, sh.x() + place<T::WIDE>(k * 16 + lane % 16, column / 8 + n + lane / 16));
#pragma unroll
            for (int m = 0; m < M; ++m)
                if (sees(m, k)) {
                    multiply<T::KIND>(acc[m][n], a[m], b[0], b[1]);
                    multiply<T::KIND>(acc[m][n + 1], a[m], b[2], b[3]);
                }
        }
    }
}

// A block: one tile with one image. Grid: tiles x images.
template <Kind KIND, int S, int SLOTS, int DEPTH, int REGIONS>
__global__ void __launch_bounds__(THREADS, 1) graph_scores(Graph p) {
    using T = NodeTile<KIND, S, SLOTS, DEPTH, REGIONS>;
    DYNAMIC_SHARED(memory, sizeof(GraphShared<T>));
    auto &sh = *reinterpret_cast<GraphShared<T> *>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = warp_row<T>(), column = warp_column<T>();
    make_nodes<T>(p.nodes, sh.tile, *reinterpret_cast<typename T::Making *>(sh.room));

    auto matrix = [&](const void *weights, int step) { return row_of(weights, step * (long long)S, S); };
    auto own_row = [&](int r) { return first_row + r; };
    auto sees = [&](int m, int k) {
        const int block = first_row / 16 + m;
        return sh.tile.begin[block] <= k && k < sh.tile.end[block];
    };
    for (int step = 0; step + 1 < p.steps; ++step) {
        typename T::Products acc;
        auto each = [&](auto store) {
#pragma unroll
            for (int m = 0; m < T::M; ++m)
#pragma unroll
                for (int n = 0; n < T::N; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        store(first_row + m * 16 + g + 8 * j, column + n * 8 + 2 * t, acc[m][n] + 2 * j);
        };
        auto put_y = [&](int row, int c, unsigned pair) {
            *reinterpret_cast<unsigned *>(sh.y() + place<T::WIDE>(row, c / 8) + c % 8 * 2) = pair;
        };
        weighted<T>(acc, sh, sh.x(), own_row, matrix(p.ask, step), column);
        const float *shift = p.shift + step * S, *bias = p.bias + step * S;
        each([&](int row, int c, const float *x) { put_y(row, c, rounded<KIND>(x[0] + shift[c], x[1] + shift[c + 1])); });
        __syncthreads();
        if (warp < T::BLOCKS)
            edges<T>(sh, warp * 16, sh.tile.begin[warp], sh.tile.end[warp], [&](int r) { return sh.tile.owner[r]; });
        __syncthreads();
        gathered<T>(acc, sh, first_row, column, sees);
        each([&](int row, int c, const float *x) {  // Y has been read
            put_y(row, c, rounded<KIND>(x[0] * sh.share[row], x[1] * sh.share[row]));
        });
        weighted<T>(acc, sh, sh.y(), own_row, matrix(p.value, step), column);
        each([&](int row, int c, const float *x) {  // X has been read
            put_node<T>(sh.tile, sh.x(), row, c, rounded<KIND>(relu(x[0] + bias[c]), relu(x[1] + bias[c + 1])));
        });
        __syncthreads();
    }

    // The last step, at the first nodes of the tile's captions: rows 0 to 15 of Y and E. The nodes, which lie multiples of
    // 16 rows apart, are copied to rows 16 to 31 of Y first, where ldmatrix reads them without bank conflicts.
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
    auto put_y = [&](auto value) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row = g + 8 * j, c = mine + n * 8 + 2 * t;
                if (warp < OWNERS)
                    *reinterpret_cast<unsigned *>(sh.y() + place<T::WIDE>(row, c / 8) + c % 8 * 2) =
                        rounded<KIND>(value(acc[0][n][2 * j], row, c), value(acc[0][n][2 * j + 1], row, c + 1));
            }
    };
    auto caption = [&](int r) { return r < T::BLOCKS ? sh.tile.caption[r] : -2; };
    weighted<T>(acc, sh, sh.y(), [](int r) { return 16 + r; }, matrix(p.ask, last), mine);
    put_y([&](float x, int, int c) { return x + shift[c]; });
    __syncthreads();
    if (warp == 0) edges<T>(sh, 0, 0, T::BLOCKS, caption);
    __syncthreads();
    gathered<T>(acc, sh, 0, mine, [](int, int) { return true; });
    put_y([&](float x, int row, int) { return x * sh.share[row]; });
    weighted<T>(acc, sh, sh.y(), [](int r) { return r; }, matrix(p.value, last), mine);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int c = mine + n * 8 + 2 * t + i;
                sum += relu(acc[0][n][2 * j + i] + bias[c]) * p.score_weight[c];
            }
        sum = quad_sum(sum);
        if (t == 0) sh.part[warp][g + 8 * j] = sum;
    }
    __syncthreads();
    if (int(threadIdx.x) < sh.tile.captions) {
        float sum = *p.score_bias + sh.tile.spoiled[sh.tile.first[threadIdx.x] / 16];
        for (int w = 0; w < OWNERS; ++w) sum += sh.part[w][threadIdx.x];
        const long long at = blockIdx.y * (long long)p.all_captions + sh.tile.caption[threadIdx.x];
        put_score<KIND>(p.score, at, sum);
    }
}
