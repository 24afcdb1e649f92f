// similarity_filter_score in evaluation from the attention weights on: the nodes of a tile of captions with one image,
// (1) to (4) of itm_fast/ops/similarity_filter.py over them, and the scores. Nodes stay in shared memory.
//
//   g = sigmoid(w . x + b),   beta = g / (sum of |g| + eps),   m = sum of beta x
//   score = sigmoid(w_e . m / (|m| + eps) + b_e)
//
// w and b hold the batch normalisation as well.
#include "nodes.h"

struct Filter {
    Nodes nodes;
    const float *gate_weight, *gate_bias;      // [S], [1]
    const float *score_weight, *score_bias;    // [S], [1]
    void *score;                               // [images, all_captions]
    int all_captions, logit;                   // logit: 1 for the argument of the score's sigmoid
};

template <class T> struct FilterShared {
    static constexpr int ROOM = sizeof(typename T::Making) > T::MATRIX ? sizeof(typename T::Making) : T::MATRIX;
    unsigned char room[ROOM];  // X
    typename T::Shared tile;
    float total[T::BLOCKS];  // of the gates of 16 rows
};

// A block: one tile with one image. Grid: tiles x images.
template <class T> __device__ __forceinline__ void score_filter(const Filter &p) {
    constexpr Kind KIND = T::KIND;
    constexpr int S = T::S, SLOTS = T::SLOTS;
    constexpr bool SCALED = T::SCALED;
    DYNAMIC_SHARED(memory, sizeof(FilterShared<T>));
    auto &sh = *reinterpret_cast<FilterShared<T> *>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    typename T::Matrices matrices;
    make_nodes<T>(p.nodes, sh.tile, *reinterpret_cast<typename T::Making *>(sh.room), matrices);
    const float gave_up = matrices.end();
    auto pair = [&](int row, int column) {
        float2 x = get<KIND, T::WIDE>(sh.room, row, column);
        if constexpr (SCALED) x.x /= T::scale(), x.y /= T::scale();
        return x;
    };

    // A warp has 16 rows of one caption, the first ones nodes and the others empty, and a lane every 32nd pair of
    // columns: sums of gate x, which take the place of the rows.
    constexpr int PAIRS = S / 64;
    static_assert(T::BLOCKS <= WARPS);
    auto sums = [&](int block) { return reinterpret_cast<float *>(sh.room + block * 16 * T::WIDE * 16) + lane * 2; };
    if (warp < T::BLOCKS) {
        float sum[PAIRS][2] = {}, weight[PAIRS][2], total = 0;
        const int held = int(warp_sum(lane < 16 && sh.tile.owner[warp * 16 + lane] >= 0));  // nodes
#pragma unroll
        for (int k = 0; k < PAIRS; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i) weight[k][i] = p.gate_weight[k * 64 + lane * 2 + i];
#pragma unroll 4
        for (int row = warp * 16; row < warp * 16 + held; ++row) {
            float2 x[PAIRS];
            float dot = 0;
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) {
                x[k] = pair(row, k * 64 + lane * 2);
                dot += x[k].x * weight[k][0] + x[k].y * weight[k][1];
            }
            dot = warp_sum(dot) + *p.gate_bias;
            const float gate = 1 / (1 + exp2f(-dot * LOG2E));
            total += gate;
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) sum[k][0] += gate * x[k].x, sum[k][1] += gate * x[k].y;
        }
        sync_warp();  // the rows have been read; unseen: in the emulator the sums have waited for all lanes
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) *reinterpret_cast<float2 *>(sums(warp) + k * 64) = {sum[k][0], sum[k][1]};
        if (lane == 0) sh.total[warp] = total;
    }
    __syncthreads();
    // A warp's captions, one after the other.
    for (int caption = warp; caption < sh.tile.captions; caption += WARPS) {
        const int first = sh.tile.first[caption], stop = sh.tile.end[first / 16];
        float total = 0, square = 0, dot = 0;
        for (int block = first / 16; block < stop; ++block) total += sh.total[block];
        const float share = 1 / (total + EPS);
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) {
            const int c = k * 64 + lane * 2;
            float x = 0, y = 0;
            for (int block = first / 16; block < stop; ++block) {
                const float2 sum = *reinterpret_cast<const float2 *>(sums(block) + k * 64);
                x += sum.x, y += sum.y;
            }
            x *= share, y *= share;
            square += x * x + y * y;
            dot += x * p.score_weight[c] + y * p.score_weight[c + 1];
        }
        square = warp_sum(square);
        dot = warp_sum(dot);
        if (lane == 0 && int(blockIdx.y) < p.nodes.images) {  // unseen: else writes behind scores
            const float sum = dot / (sqrtf(square) + EPS) + *p.score_bias + gave_up + sh.tile.spoiled[first / 16];
            const long long at = blockIdx.y * (long long)p.all_captions + sh.tile.caption[caption];
            put_score<T>(p.score, at, sum, p.logit);
        }
    }
}

template <Kind KIND, int S, int SLOTS, int DEPTH, int REGIONS, bool SCALED = KIND == F16X3, int LONGEST = 0>
__global__ void __launch_bounds__(THREADS, 1) filter_scores(Filter p) {
    score_filter<NodeTile<KIND, S, SLOTS, DEPTH, REGIONS, SCALED, LONGEST>>(p);
}
template <Kind KIND, int S, int SLOTS, int DEPTH, int REGIONS, bool SCALED, int LONGEST>
__global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1) filter_scores_in_clusters(Filter p) {
    score_filter<NodeTile<KIND, S, SLOTS, DEPTH, REGIONS, SCALED, LONGEST, KIND == F16X3 ? 3 : 4>>(p);
}
