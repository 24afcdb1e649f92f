// SCAN's pair scores in one kernel, `ops/cross_attention_score.py` (1) to (3): affinities, their norm, attention, cosines
// and pooling. No number per pair but its score goes to memory.
#include "attention.h"

enum Pool { LSE, MAX, SUM, MEAN };

struct Scan {
    Pairs pairs;
    Attention attention;
    const float *length;  // [N] of words (t2i), |q|
    float *score;         // [images][captions]
    int pool;
    float pool_scale;
};

// One score of the cosines r(0) to r(n - 1).
template <class Value> __device__ __forceinline__ float pooled(const Scan &p, int n, Value r) {
    float top = -INFINITE, sum = 0;
    for (int q = 0; q < n; ++q) {
        top = r(q) > top ? r(q) : top;
        sum += r(q);
    }
    if (sum != sum) return sum;  // `top` has passed over a NaN
    if (p.pool == MAX) return top;
    if (p.pool == SUM) return sum;
    if (p.pool == MEAN) return sum / n;
    sum = 0;
    for (int q = 0; q < n; ++q) sum += exp2f((r(q) - top) * (p.pool_scale * LOG2E));
    return top + logf(sum) / p.pool_scale;
}

// Words attend to regions. Grid: tiles x groups of images; see `Place`.
template <Kind KIND, int COLUMNS, int SLOTS = 128, int SIDE = COLUMNS <= 72 ? 2 : 1>
__global__ void __launch_bounds__(Tile<KIND, COLUMNS, SLOTS, SIDE>::THREADS, 1) scan_t2i(Scan p) {
    using T = Tile<KIND, COLUMNS, SLOTS, SIDE>;
    if (p.pairs.wide && *p.pairs.wide != p.pairs.for_wide) return;
    DYNAMIC_SHARED(shared, T::WORK + CAPTIONS * T::LD * 4);
    float *norms = reinterpret_cast<float *>(shared + T::WORK);  // [CAPTIONS][LD]
    float *work = reinterpret_cast<float *>(shared);
    const Place<T> at(p.pairs);

    typename T::Accumulators acc;
    affinities<T>(acc, shared, p.pairs, at);
    __syncthreads();  // the stages have been read
    if (p.attention.norm != NONE) {
        norms_of_captions<T>(norms, work, acc, p.pairs, p.attention, at);
        __syncthreads();  // the norms are there, and the affinities have been read
    }

    float *cosine = work;  // [IMAGES][SLOTS]
#pragma unroll
    for (int m = 0; m < T::BLOCKS_M; ++m)
#pragma unroll
        for (int image = 0; image < T::WARP_IMAGES; ++image) {
            Attended<T> found;
            const int slot = at.warp_row + m * 16;
            attend<T>(found, acc[m], norms, slot, image, p.pairs, p.attention, at);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int mine = slot + at.g + 8 * i, row = p.pairs.row[at.tile * SLOTS + mine];
                if (at.t == 0 && row >= 0) {
                    const float both = p.length[row] * (found.length[i] / found.z[i]);
                    cosine[(at.warp_image + image) * SLOTS + mine] = found.dot[i] / found.z[i] / (both > EPS ? both : EPS);
                }
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < at.captions * at.images; i += T::THREADS) {
        const int member = at.member + i % at.captions, image = i / at.captions;
        const int begin = p.pairs.begin[member], words = p.pairs.end[member] - begin;
        const float *r = cosine + image * SLOTS + begin;
        p.score[(long long)(at.first_image + image) * p.pairs.captions + p.pairs.caption[member]] =
            pooled(p, words, [&](int q) { return r[q]; });
    }
}
