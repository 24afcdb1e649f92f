// similarity_graph_score from the attention weights on: the nodes of a tile of captions with one image, all steps of
// reasoning over them, (1) to (3) of ops/similarity_graph.py, and the scores. Nodes stay in shared memory.
//
//   Y = X M + u,   E = softmax over a caption's nodes of Y X^T,   X' = relu(E X Wr^T + br)
//
// The last step is computed at the captions' first nodes only.
#include "group_steps.h"
#include "last_step.h"

// A block: one tile with one image. Grid: tiles x images.
template <class T> __device__ __forceinline__ void score_graph(const Graph &p) {
    DYNAMIC_SHARED(memory, sizeof(GraphShared<T>));
    auto &sh = *reinterpret_cast<GraphShared<T> *>(memory);
    if constexpr (T::SCALED) {
        if (int(threadIdx.x) < T::BLOCKS) sh.nodes_top[0][threadIdx.x] = as_bits(1.f);  // nodes are at most 1
        for (int i = threadIdx.x; i < int(sizeof sh.top[0]) / 4; i += THREADS) sh.top[0][i] = 0;
    }
    typename T::Matrices matrices;
    make_nodes<T>(p.nodes, sh.tile, *reinterpret_cast<typename T::Making *>(sh.room), matrices);
    for (int step = 0; step + 1 < p.steps; ++step) {
        if constexpr (T::GROUPS)
            step_by_groups<T>(p, sh, step, matrices);
        else
            step_by_warps<T>(p, sh, step, matrices);
    }
    const int parts = last_step<T>(p, sh, matrices);
    const float gave_up = matrices.end();
    if (int(threadIdx.x) < sh.tile.captions && int(blockIdx.y) < p.nodes.images) {  // unseen: else writes behind scores
        float sum = *p.score_bias + gave_up + sh.tile.spoiled[sh.tile.first[threadIdx.x] / 16];
        for (int w = 0; w < parts; ++w) sum += sh.part[w][threadIdx.x];
        const long long at = blockIdx.y * (long long)p.all_captions + sh.tile.caption[threadIdx.x];
        put_score<T>(p.score, at, sum, p.logit);
    }
}

template <Kind KIND, int S, int SLOTS, int DEPTH, int REGIONS, bool SCALED = KIND == F16X3, int LONGEST = 0>
__global__ void __launch_bounds__(THREADS, 1) graph_scores(Graph p) {
    score_graph<NodeTile<KIND, S, SLOTS, DEPTH, REGIONS, SCALED, LONGEST>>(p);
}
template <Kind KIND, int S, int SLOTS, int DEPTH, int REGIONS, bool SCALED, int LONGEST>
__global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1) graph_scores_in_clusters(Graph p) {
    score_graph<NodeTile<KIND, S, SLOTS, DEPTH, REGIONS, SCALED, LONGEST, KIND == F16X3 ? 2 : 4>>(p);
}
