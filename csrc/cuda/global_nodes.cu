// The nodes of pairs' global vectors, (1) of itm_fast/ops/similarity_nodes.py: y = W_g (v - t)^2 + b_g, y / (|y| + eps).
#include "nodes.h"

struct GlobalNodes {
    const void *image, *caption;  // [images, D], [captions, D] global vectors
    const void *weight;           // [S, D]
    const float *bias;            // [S]
    void *result;                 // [images, captions, S]
    int captions, dim;
};

template <class T> struct GlobalShared {
    unsigned char caption[2][T::SLOTS * T::DEPTH * 2];
    typename T::Shared tile;
};

// A block: SLOTS captions with one image. Grid: captions / SLOTS x images.
template <Kind KIND, int S, int SLOTS, int DEPTH>
__global__ void __launch_bounds__(THREADS, 1) global_nodes(GlobalNodes p) {
    using T = NodeTile<KIND, S, SLOTS, DEPTH>;
    DYNAMIC_SHARED(memory, sizeof(GlobalShared<T>));
    auto &sh = *reinterpret_cast<GlobalShared<T> *>(memory);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = blockIdx.x * SLOTS;
    const auto *image = static_cast<const unsigned *>(row_of(p.image, blockIdx.y, p.dim));
    auto load = [&](int step) {
        copy_rows<SLOTS, T::NARROW>(sh.caption[step % 2], step * DEPTH, p.dim, p.caption, [&](int row) {
            return first + row < p.captions ? row_of(p.caption, first + row, p.dim) : nullptr;
        });
    };
    auto difference = [&](int step) {
#pragma unroll
        for (int i = threadIdx.x; i < SLOTS * DEPTH / 2; i += THREADS) {
            const int row = i / (DEPTH / 2), pair = i % (DEPTH / 2);
            const unsigned v = step * DEPTH + 2 * pair < p.dim ? image[step * DEPTH / 2 + pair] : 0;
            unsigned &q = *reinterpret_cast<unsigned *>(sh.caption[step % 2] + place<T::NARROW>(row, pair / 4) + pair % 4 * 4);
            const float x = low<KIND>(v) - low<KIND>(q), y = high<KIND>(v) - high<KIND>(q);
            q = rounded<KIND>(x * x, y * y);
        }
    };
    typename T::Products acc;
    float inverse[T::M][2];
    project<T>(acc, sh.tile, sh.caption, p.weight, p.dim, load, difference);
    add_bias<T>(acc, sh.tile, p.bias, inverse);
#pragma unroll
    for (int m = 0; m < T::M; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = first + warp_row<T>() + m * 16 + g + 8 * j;
            auto *to = static_cast<unsigned *>(p.result) + (blockIdx.y * (long long)p.captions + row) * (S / 2);
#pragma unroll
            for (int n = 0; n < T::N; ++n)
                if (row < p.captions)
                    to[(warp_column<T>() + n * 8) / 2 + t] =
                        rounded<KIND>(acc[m][n][2 * j] * inverse[m][j], acc[m][n][2 * j + 1] * inverse[m][j]);
        }
}
