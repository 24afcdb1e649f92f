// The nodes of pairs' global vectors, (1) of `ops/similarity_nodes.py`: y = W_g (v - t)^2 + b_g, y / (|y| + eps).
#include "nodes.h"

struct GlobalNodes {
    const void *image, *caption;  // [images, D], [captions, D] global vectors
    const void *weight;           // [S, D]
    const float *bias;            // [S]
    const int *image_exponent, *caption_exponent;  // [images], [captions] numbers are below 2^(exponent + 9); SQUARED
    const int *weight_exponent;                    // [S]; SCALED only
    void *result;                 // [images, captions, S]
    int captions, chunks;         // chunks of a row of D numbers
};

template <class T> struct GlobalShared {
    unsigned char caption[2][T::SLOTS * T::NARROW * 16];
    typename T::Shared tile;
};

// A block: SLOTS captions with one image. Grid: captions / SLOTS x images.
template <Kind KIND, int S, int SLOTS, int DEPTH, bool SCALED = KIND == F16X3>
__global__ void __launch_bounds__(THREADS, 1) global_nodes(GlobalNodes p) {
    using T = NodeTile<KIND, S, SLOTS, DEPTH, 16, SCALED>;
    using Rows = Numbers<KIND>;
    DYNAMIC_SHARED(memory, sizeof(GlobalShared<T>));
    auto &sh = *reinterpret_cast<GlobalShared<T> *>(memory);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = blockIdx.x * SLOTS;
    const auto *image = static_cast<const unsigned *>(row_of(p.image, blockIdx.y, p.chunks));
    const int image_exponent = T::SQUARED ? p.image_exponent[blockIdx.y] : 0;
    if (T::SQUARED && threadIdx.x < SLOTS) {
        const int caption = first + threadIdx.x;
        sh.tile.exponent[threadIdx.x] = caption < p.captions ? p.caption_exponent[caption] : 0;
    }
    auto square = [&](int row) {  // the exponent of a row's squares
        const int exponent = sh.tile.exponent[row];
        return squared(exponent > image_exponent ? exponent : image_exponent);
    };
    auto load = [&](int step) {
        copy_rows<SLOTS, T::NARROW>(sh.caption[step % 2], step * T::NARROW, p.chunks, p.caption, [&](int row) {
            return first + row < p.captions ? row_of(p.caption, first + row, p.chunks) : nullptr;
        });
    };
    auto difference = [&](int step) {
#pragma unroll
        for (int i = threadIdx.x; i < SLOTS * DEPTH / 2; i += THREADS) {
            const int row = i / (DEPTH / 2), column = i % (DEPTH / 2) * 2, chunk = Rows::chunk(column);
            auto word = [&](int rest) {
                const int at = step * T::NARROW + chunk + rest;
                return at < p.chunks ? image[at * 4 + column % 8 / 2] : 0;
            };
            float2 v = {low<Rows::STORED>(word(0)), high<Rows::STORED>(word(0))};
            if constexpr (T::PAIRS) v.x += half_of(word(Rows::REST), false), v.y += half_of(word(Rows::REST), true);
            const float2 q = get<KIND, T::NARROW>(sh.caption[step % 2], row, column);
            float v_unit = 1, q_unit = 1, raised = 1;
            if constexpr (SCALED) v_unit = power(image_exponent), q_unit = power(sh.tile.exponent[row]);
            if constexpr (T::SQUARED) raised = power(square(row));
            const float x = v.x * v_unit - q.x * q_unit, y = v.y * v_unit - q.y * q_unit;
            put<KIND, T::NARROW>(sh.caption[step % 2], row, column, x * x * raised, y * y * raised);
        }
    };
    auto *result = &sh.tile.stage[0][0];  // once the stages have been read
    static_assert(SLOTS <= 2 * DEPTH);
    typename T::Products acc;
    float inverse[T::M][2];
    project<T>(acc, sh.tile, sh.caption, p.weight, p.chunks, load, difference);
    add_bias<T>(acc, sh.tile, p.bias, p.weight_exponent, [&](int row) { return power(-square(row)); }, inverse);
#pragma unroll
    for (int m = 0; m < T::M; ++m)
#pragma unroll
        for (int n = 0; n < T::N; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float factor = inverse[m][j] * T::scale();
                put<KIND, T::WIDE>(result, warp_row<T>() + m * 16 + g + 8 * j, warp_column<T>() + n * 8 + 2 * t,
                                   acc[m][n][2 * j] * factor, acc[m][n][2 * j + 1] * factor);
            }
    __syncthreads();
    for (int i = threadIdx.x; i < SLOTS * T::WIDE; i += THREADS) {
        const int row = i / T::WIDE, chunk = i % T::WIDE;
        if (first + row < p.captions)
            static_cast<uint4 *>(p.result)[(blockIdx.y * (long long)p.captions + first + row) * T::WIDE + chunk] =
                *reinterpret_cast<const uint4 *>(result + place<T::WIDE>(row, chunk));
    }
}
