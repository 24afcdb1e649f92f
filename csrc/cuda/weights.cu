// Attention weights of words over the regions of images, and the lengths of what the words attend to: (1) to (3) of
// itm_fast/ops/_attention.py for direction t2i and affinity norm "clipped_l2norm".
//
//   a = x q^T,  e = exp(scale (a' / (|a'| + eps) - its largest)),  a' = leaky_relu(a), |a'| over the words of a caption
//
// A row of e is written in the dtype of the products that follow; its largest number is 1. P = e x / z with z the sum of
// e, so |P| = |F e| / z with F^T F = x x^T, a sum of squares, which cannot cancel. Then P / (|P| + eps) is e x times
// 1 / (|F e| + eps z), which is written beside e.
#include "tile.h"

struct Weights {
    const void *words, *image;  // [N, D], [images, regions, D]
    const void *factor;         // [images, 2, PITCH, PITCH] F as sums of two float16 numbers, upper triangular
    const float *unit;          // [images] by which F is to be multiplied
    const int *cut, *tile;      // [T + 1] first word of each caption, [tiles + 1] first caption of each tile
    const int *count;           // [images] regions of each image
    void *weight;               // [images, size, PITCH] e
    float *inverse;             // [images, size] 1 / (|F e| + eps z)
    int images, regions, dim;
    int first, size;            // words that are computed: those of the tiles
    float scale;
};

// PITCH: regions, rounded up to a multiple of 8. DEPTH: numbers of a row in a stage.
template <Kind, int PITCH_, int DEPTH_> struct WeightTile {
    static constexpr int PITCH = PITCH_, DEPTH = DEPTH_, WORDS = 128, CAPTIONS = 16;
    static constexpr int WARPS_N = PITCH <= 80 ? 2 : 1, WARPS_M = WARPS / WARPS_N;
    static constexpr int EACH = PITCH <= 20 ? 4 : PITCH <= 80 ? 80 / PITCH : 1;  // images of a warp
    static constexpr int IMAGES = EACH * WARPS_N, ROWS = WORDS / WARPS_M, COLUMNS = EACH * PITCH;
    static constexpr int LD = PITCH % 16 ? PITCH : PITCH + 8;  // 8 or 24 modulo 32: no bank is written twice
    struct Shared {
        union {
            unsigned char stage[2][(WORDS + IMAGES * PITCH) * DEPTH * 2];  // words, then regions
            float square[WARPS_N][WORDS][LD];
        };
        float norm[CAPTIONS][IMAGES * PITCH];
        int owner[WORDS], count[IMAGES];
    };
};

__device__ __forceinline__ float leaky(float x) { return x > 0 ? x : 0.1f * x; }

template <Kind KIND, int PITCH, int DEPTH>
__global__ void __launch_bounds__(THREADS, 1) weights(Weights p) {
    using Tile = WeightTile<KIND, PITCH, DEPTH>;
    constexpr int M = Tile::ROWS / 16, N = Tile::COLUMNS / 8, EACH = Tile::EACH, CHUNKS = DEPTH / 8, BLOCKS = PITCH / 8;
    DYNAMIC_SHARED(memory, sizeof(typename Tile::Shared));
    auto &sh = *reinterpret_cast<typename Tile::Shared *>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int warp_n = warp % Tile::WARPS_N, first_row = warp / Tile::WARPS_N * Tile::ROWS;
    const int first_caption = p.tile[blockIdx.x], captions = p.tile[blockIdx.x + 1] - first_caption;
    const int first_word = p.cut[first_caption], words = p.cut[first_caption + captions] - first_word;
    const int first_image = blockIdx.y * Tile::IMAGES;

    if (threadIdx.x < Tile::WORDS) {
        int caption = 0;
        while (caption + 1 < captions && p.cut[first_caption + caption + 1] - first_word <= int(threadIdx.x)) ++caption;
        sh.owner[threadIdx.x] = caption;
    }
    if (threadIdx.x < Tile::IMAGES) {
        const int image = first_image + threadIdx.x;
        sh.count[threadIdx.x] = image < p.images ? p.count[image] : 0;
    }
    __syncthreads();

    float acc[M][N][4];
    clear(acc);
    auto load = [&](int step) {
        if (step * DEPTH < p.dim) {
            unsigned char *stage = sh.stage[step % 2];
            copy_rows<Tile::WORDS, CHUNKS>(stage, step * DEPTH, p.dim, p.words, [&](int row) {
                return row < words ? row_of(p.words, first_word + row, p.dim) : nullptr;
            });
            stage += Tile::WORDS * DEPTH * 2;
            copy_rows<Tile::IMAGES * PITCH, CHUNKS>(stage, step * DEPTH, p.dim, p.words, [&](int row) {
                const int image = row / PITCH, region = row % PITCH;
                const long long at = (long long)(first_image + image) * p.regions + region;
                return region < sh.count[image] ? row_of(p.image, at, p.dim) : nullptr;
            });
        }
        commit();
    };
    load(0);
    for (int step = 0; step * DEPTH < p.dim; ++step) {
        wait_groups<0>();
        __syncthreads();  // this stage has landed, and the other one has been read
        load(step + 1);
        const unsigned char *stage = sh.stage[step % 2];
        auto word = [&](int row, int chunk) { return stage + place<CHUNKS>(first_row + row, chunk); };
        product<KIND, CHUNKS>(acc, word, stage + Tile::WORDS * DEPTH * 2, warp_n * Tile::COLUMNS);
    }

    // 1 / (norm + eps) of every caption and region, some images at a time. A caption's squares are added word by word,
    // so the sum does not depend on where in the tile the caption lies.
#pragma unroll
    for (int w = 0; w < EACH; ++w) {
        __syncthreads();  // what lies in this memory has been read
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float x = acc[m][w * BLOCKS + n][2 * j], y = acc[m][w * BLOCKS + n][2 * j + 1];
                    const float2 pair = {leaky(x) * leaky(x), leaky(y) * leaky(y)};
                    *reinterpret_cast<float2 *>(&sh.square[warp_n][first_row + m * 16 + g + 8 * j][n * 8 + 2 * t]) = pair;
                }
        __syncthreads();
        for (int i = threadIdx.x; i < captions * Tile::WARPS_N * PITCH; i += THREADS) {
            const int region = i % PITCH, part = i / PITCH % Tile::WARPS_N, caption = i / PITCH / Tile::WARPS_N;
            const int stop = p.cut[first_caption + caption + 1] - first_word;
            float sum = 0;
            for (int row = p.cut[first_caption + caption] - first_word; row < stop; ++row)
                sum += sh.square[part][row][region];
            sh.norm[caption][(part * EACH + w) * PITCH + region] = 1 / (sqrtf(sum) + EPS);
        }
    }
    __syncthreads();

    // A warp: 16 words with one image at a time. Lane (g, t) has words g and g + 8, and of every 8 regions 2t and 2t + 1.
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int w = 0; w < EACH; ++w) {
            const int slot = warp_n * EACH + w, image = first_image + slot, row = first_row + m * 16 + g;
            if (image >= p.images) continue;
            float top[2] = {-INFINITE, -INFINITE}, z[2] = {0, 0}, square[2] = {0, 0};
            unsigned e[BLOCKS][2];  // in the dtype of the products
            unsigned a[BLOCKS][2];  // as float16 numbers
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int region = n * 8 + 2 * t + j % 2;
                    float &x = acc[m][w * BLOCKS + n][j];
                    x = leaky(x) * sh.norm[sh.owner[row + j / 2 * 8]][slot * PITCH + region];
                    if (region >= sh.count[slot]) x = -INFINITE;
                    top[j / 2] = x > top[j / 2] ? x : top[j / 2];
                }
#pragma unroll
            for (int j = 0; j < 2; ++j) top[j] = quad_max(top[j]);
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float *x = acc[m][w * BLOCKS + n] + 2 * j;
                    const float scale = p.scale * LOG2E;
                    e[n][j] = rounded<KIND>(exp2f((x[0] - top[j]) * scale), exp2f((x[1] - top[j]) * scale));
                    const float first = low<KIND>(e[n][j]), second = high<KIND>(e[n][j]);
                    z[j] += first + second;
                    a[n][j] = to_halves(first, second);
                }
            // Rows 8 b to 8 b + 7 of the factor; what lies left of them is zero.
            const unsigned short *factor = static_cast<const unsigned short *>(p.factor) + image * 2LL * PITCH * PITCH;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                float out[4] = {0, 0, 0, 0};
#pragma unroll
                for (int n = b; n < BLOCKS; ++n) {
                    const unsigned short *f = factor + (b * 8 + g) * PITCH + n * 8 + 2 * t;
                    multiply_short(out, a[n][0], a[n][1], *reinterpret_cast<const unsigned *>(f + PITCH * PITCH));
                    multiply_short(out, a[n][0], a[n][1], *reinterpret_cast<const unsigned *>(f));
                }
                square[0] += out[0] * out[0] + out[1] * out[1];
                square[1] += out[2] * out[2] + out[3] * out[3];
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                z[j] = quad_sum(z[j]);
                square[j] = quad_sum(square[j]);
                if (row + 8 * j < words) {
                    const long long at = image * (long long)p.size + first_word + row + 8 * j - p.first;
                    unsigned short *to = static_cast<unsigned short *>(p.weight) + at * PITCH + 2 * t;
#pragma unroll
                    for (int n = 0; n < BLOCKS; ++n) *reinterpret_cast<unsigned *>(to + n * 8) = e[n][j];
                    if (t == 0) p.inverse[at] = 1 / (sqrtf(square[j]) * p.unit[image] + EPS * z[j]);
                }
            }
        }
}
