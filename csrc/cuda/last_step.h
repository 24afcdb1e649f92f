// The last step of SGR, at the first nodes of the tile's captions: at most FIRSTS rows.
//
// Rows of weights are the first factor of products, and so the sums of a lane are of columns g and g + 8 and of
// captions 2t and 2t + 1.
#pragma once
#include "steps.h"

// acc = W A^T: rows `column` on of W [S, S], and the rows of A that `Last` holds.
template <class T, int M>
__device__ __forceinline__ void weighted_firsts(float (&acc)[M][4], GraphShared<T> &sh, const void *weight,
                                                typename T::Matrices &matrices, int column) {
    constexpr int EACH = T::NARROW < 4 ? 2 : 4;  // chunks of A, read together
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[m][j] = 0;
    for_stages(sh, weight, matrices, [&](int step, const unsigned char *stage) {
#pragma unroll
        for (int k = 0; k < T::NARROW; k += EACH) {
            if (T::PAIRS && k % 8 >= Numbers<T::KIND>::REST) continue;
            Factor<T::KIND> w, a;
            read_factor(a, [&](int rest) {
                const int chunk = step * T::NARROW + k + rest + lane / 8 % EACH;
                return sh.last().rows + place<T::WIDE>(lane % 8, chunk);
            });
#pragma unroll
            for (int half = 0; half < EACH / 2; ++half)
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    read_factor(w, [&](int rest) {
                        const int chunk = k + 2 * half + rest + lane / 16;
                        return stage + place<T::NARROW>(column + m * 16 + lane % 16, chunk);
                    });
                    multiply_block(acc[m], w, a, half);
                }
        }
    });
}

// The sums of nodes along the first nodes' edges, Z, into the rows of `Last`. Sums of 16 rows take their place.
template <class T> __device__ __forceinline__ void gather_firsts(GraphShared<T> &sh, int step) {
    constexpr int PAIRS = T::S / 64;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto &last = sh.last();
    auto sums = [&](int block) { return reinterpret_cast<float *>(sh.x() + block * 16 * T::WIDE * 16) + lane * 2; };
    // A warp has 16 rows of one caption, and a lane every 32nd pair of columns.
    const int owner = warp < T::BLOCKS ? sh.tile.owner[warp * 16] : -1;
    if (owner >= 0) {  // unseen: else the search for its number runs on behind the captions
        float2 x[16][PAIRS], sum[PAIRS], asked[PAIRS];
        float logit[16], largest = -INFINITE, total = 0;
        int caption = 0;
        while (sh.tile.caption[caption] != owner) ++caption;
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) {
            asked[k] = *reinterpret_cast<const float2 *>(&last.asked[caption][k * 64 + lane * 2]);
            sum[k] = {0, 0};
        }
        const float unit = power(-nodes_exponent(sh, step, sh.tile.begin[warp]));
#pragma unroll
        for (int row = 0; row < 16; ++row) {
            float dot = 0;
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) {
                x[row][k] = get<T::KIND, T::WIDE>(sh.x(), warp * 16 + row, k * 64 + lane * 2);
                dot += x[row][k].x * asked[k].x + x[row][k].y * asked[k].y;
            }
            dot = warp_sum(dot) * unit;
            logit[row] = sh.tile.owner[warp * 16 + row] == owner ? dot : -INFINITE;
            largest = logit[row] > largest ? logit[row] : largest;
        }
#pragma unroll
        for (int row = 0; row < 16; ++row) {
            const float e = exp2f((logit[row] - largest) * LOG2E);
            total += e;
#pragma unroll
            for (int k = 0; k < PAIRS; ++k) sum[k].x += e * x[row][k].x, sum[k].y += e * x[row][k].y;
        }
        sync_warp();  // the rows have been read; unseen: in the emulator the sums have waited for all lanes
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) *reinterpret_cast<float2 *>(sums(warp) + k * 64) = sum[k];
        if (lane == 0) last.largest[warp] = largest, last.total[warp] = total;
    }
    __syncthreads();
    if (warp >= sh.tile.captions) return;  // a warp has a caption; unseen: others read behind its places
    const int begin = sh.tile.first[warp] / 16, end = sh.tile.end[begin];
    float largest = -INFINITE, total = 0;
    for (int block = begin; block < end; ++block) largest = max(largest, last.largest[block]);
    auto factor = [&](int block) { return exp2f((last.largest[block] - largest) * LOG2E); };
    for (int block = begin; block < end; ++block) total += factor(block) * last.total[block];
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
        float x = 0, y = 0;
        for (int block = begin; block < end; ++block) {
            const float2 sum = *reinterpret_cast<const float2 *>(sums(block) + k * 64);
            x += factor(block) * sum.x, y += factor(block) * sum.y;
        }
        put<T::KIND, T::WIDE>(last.rows, warp, k * 64 + lane * 2, x / total, y / total);
    }
}

// Puts the parts of the scores' sums of the first nodes relu(Z Wr^T + br) into `part`; returns how many parts each has.
template <class T>
__device__ __forceinline__ int last_step(const Graph &p, GraphShared<T> &sh, typename T::Matrices &matrices) {
    constexpr int S = T::S, OWNERS = S < 128 ? S / 16 : WARPS, COLUMNS = S / OWNERS, M = COLUMNS / 16;
    constexpr bool SCALED = T::SCALED;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int step = p.steps - 1, column = warp % OWNERS * COLUMNS;  // of a small S, several warps do the same
    auto &last = sh.last();
    for (int i = threadIdx.x; i < FIRSTS * T::WIDE; i += THREADS) {
        const int row = i / T::WIDE, chunk = i % T::WIDE;
        *reinterpret_cast<uint4 *>(last.rows + place<T::WIDE>(row, chunk)) =
            *reinterpret_cast<const uint4 *>(sh.x() + place<T::WIDE>(sh.tile.first[row % T::BLOCKS], chunk));
    }
    float acc[M][4];
    auto each = [&](auto use) {  // use(number of the caption, column, a sum), those of a caption together
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int j = 0; j < 2; ++j) use(2 * t + i, column + m * 16 + 8 * j + g, acc[m][2 * j + i]);
    };
    auto from_stored = [&](int caption, const int *exponent, int c) {
        if constexpr (!SCALED) return 1.f;
        const int block = sh.tile.first[caption % T::BLOCKS] / 16;
        return power(-nodes_exponent(sh, step, block)) * power(exponent[step * S + c]);
    };
    weighted_firsts(acc, sh, matrix_of<T>(p.ask, step), matrices, column);
    each([&](int caption, int c, float x) {
        if (warp < OWNERS)  // redundant: other warps would write the same bits
            last.asked[caption][c] = x * from_stored(caption, p.ask_exponent, c) + p.shift[step * S + c];
    });
    __syncthreads();
    gather_firsts(sh, step);
    weighted_firsts(acc, sh, matrix_of<T>(p.value, step), matrices, column);
    float sum[2] = {0, 0};
    each([&](int caption, int c, float x) {
        x = relu(x * from_stored(caption, p.value_exponent, c) + p.bias[step * S + c]);
        sum[caption % 2] += x * p.score_weight[c];
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int mask = 16; mask > 2; mask /= 2) sum[i] += shuffle_xor(sum[i], mask);
        if (g == 0) sh.part[warp][2 * t + i] = sum[i];
    }
    __syncthreads();
    return OWNERS;
}
