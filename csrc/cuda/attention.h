// The words' attention over an image's regions, from affinities in accumulators: `ops/_attention.py`, direction t2i.
#pragma once
#include "affinity.h"
#include "choices.h"

constexpr float EPS = 1e-8f;

struct Attention {
    int norm;     // a `Norm`: how the affinities of a context are normalised over the queries
    float slope;  // of the LeakyReLU for negative affinities; 1: none
    float scale;  // inverse temperature of the softmax over the contexts
    int weights;  // a `Sharing`: which contexts share the softmax
    float threshold;  // what normalised affinities exceed with THRESHOLD
};

// What the lengths of attended vectors are computed from. F^T F is the Gram matrix of a set's contexts, each divided by
// its `size`, a power of two near its length, so that short ones count beside long ones. F is upper triangular.
struct Grams {
    const void *factor;
    const float *size;       // [images][BLOCKS * 8], 0 beyond the regions (t2i), or [N] of words (i2t)
    const long long *place;  // where a caption's factor begins (i2t)
};

__device__ __forceinline__ float clipped(float x, float slope) { return x > 0 ? x : rounded_product(slope, x); }

// The exponent of x >= 0 as float32 has it, between 18 and 253: 2^(exponent - 127) <= x.
__device__ __forceinline__ unsigned exponent_of(float x) {
    const unsigned exponent = as_bits(x) >> 23;
    return exponent < 18 ? 18 : exponent > 253 ? 253 : exponent;
}

// Who has the affinities of one norm: a thread alone, or the lanes with the same g.
struct Alone {
    __device__ __forceinline__ static float sum(float x) { return x; }
    __device__ __forceinline__ static float largest(float x) { return x; }
};
struct Quad {
    __device__ __forceinline__ static float sum(float x) { return quad_sum(x); }
    __device__ __forceinline__ static float largest(float x) { return quad_max(x); }
};

// e = exp(logit - the largest one) of a context with the normalised affinity x, of which `top` is the largest. 0 if
// THRESHOLD does not keep it: e itself tells affinities less well apart than they are where `scale` is small.
template <bool SUBSETS> __device__ __forceinline__ float share_of(const Attention &p, float x, float top) {
    if (SUBSETS && p.weights == THRESHOLD && x <= p.threshold) return 0;
    return exp2f((x - top) * (p.scale * LOG2E));
}

// Of a query's n contexts those share the attention whose e is above this number, in the order of `ops/_attention.py`;
// below 0: all, of those that `share_of` keeps. `each(f)` calls f with the e that this thread has.
template <class Owners, class Each>
__device__ __forceinline__ float cut_of(const Attention &p, int n, Each each) {
    if (p.weights == ALL || p.weights == THRESHOLD) return -1;
    float above = 0, below = 0;
    each([&](float e) {
        const float root = sqrtf(e);
        above += p.weights == FOCAL_EQUAL ? e : e * root;
        below += root;
    });
    above = Owners::sum(above), below = Owners::sum(below);
    const float cut = above / (p.weights == FOCAL_EQUAL ? n : below);
    return cut < 1 ? cut : 0;  // all e are 1, and none is above: all are kept
}

// The number that normalises one context's affinities with all queries of a set; see `normalised`. `each(f)` calls f
// with those that this thread has.
template <class Owners, class Each>
__device__ __forceinline__ float norm_over(const Attention &p, Each each) {
    float sum = 0, small = 0;
    if (p.norm == SOFTMAX) {
        float top = -INFINITE;
        each([&](float x) { top = x > top ? x : top; });
        top = Owners::largest(top);
        each([&](float x) { sum += exp2f((x - top) * LOG2E); });
        return top + logf(Owners::sum(sum));
    }
    if (p.norm == L1NORM) {
        each([&](float x) { sum += fabsf(clipped(x, p.slope)); });
        return 1 / (Owners::sum(sum) + EPS);
    }
    each([&](float x) {
        x = clipped(x, p.slope);
        sum += x * x, small += x * 0x1p-64f * (x * 0x1p-64f);
    });
    sum = Owners::sum(sum), small = Owners::sum(small);
    return sum < INFINITE ? 1 / (sqrtf(sum) + EPS) : 1 / (sqrtf(small) * 0x1p64f);  // squares may lie beyond float32
}

// An affinity by the number that `norm_over` gives; the same bits wherever it is computed, as the largest one is taken
// from another copy of it.
__device__ __forceinline__ float normalised(const Attention &p, float x, float number) {
    if (p.norm == SOFTMAX) return exp2f((x - number) * LOG2E);
    x = clipped(x, p.slope);
    return p.norm == NONE ? x : rounded_product(x, number);
}

// Norms over the words of each caption: the numbers of captions [CAPTIONS] and columns [LD]. The affinities pass
// through shared memory, and one thread adds up those of a caption in order, so that the sum's bits do not depend on
// its slots. A barrier before and after it is the caller's.
template <class T>
__device__ __forceinline__ void norms_of_captions(float *norms, float *values, const typename T::Accumulators &acc,
                                                  const Pairs &p, const Attention &attention, const Place<T> &at) {
    store<T>(values, acc, at);
    __syncthreads();
    for (int i = threadIdx.x; i < at.captions * T::WIDTH; i += T::THREADS) {
        const int caption = i / T::WIDTH, column = i % T::WIDTH;
        const int begin = p.begin[at.member + caption], end = p.end[at.member + caption];
        norms[caption * T::LD + column] = norm_over<Alone>(attention, [&](auto use) {
            for (int slot = begin; slot < end; ++slot) use(values[slot * T::LD + column]);
        });
    }
}

// Norms over the regions of each image, of 16 words from slot `row` on with an image, counted within the warp: into
// norms [IMAGES][SLOTS].
template <class T>
__device__ __forceinline__ void norms_of_image(float *norms, const float (&acc)[T::BLOCKS_N][4], int row, int image,
                                               const Pairs &p, const Attention &attention, const Place<T> &at) {
    const int in_group = at.warp_image + image, regions = at.regions(p, in_group);
    float raw[T::BLOCKS][4];
    take_image<T>(raw, acc, image, at.t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float number = norm_over<Quad>(attention, [&](auto use) {
#pragma unroll
            for (int n = 0; n < T::BLOCKS; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    if (n * 8 + 2 * at.t + j < regions) use(raw[n][2 * i + j]);
        });
        if (at.t == 0) norms[in_group * T::SLOTS + row + at.g + 8 * i] = number;
    }
}

// Weights of words g and g + 8 over an image's regions.
template <class T> struct Attended {
    float e[T::BLOCKS][4];  // exp(logit - the largest one), 0 beyond the regions, where `take_image` puts them
    // The sum of e, infinite instead of 0; of e times the affinity; and |sum of e times the region|.
    float z[2], dot[2], length[2];
};

// Attends with 16 words, whose first slot is `row`, to an image, counted within the warp. Without SUBSETS all regions
// share the attention.
//
// The attended vector's length is |F v| with v = e times `size`, a sum of squares, which cannot cancel. Times powers of
// two, F and v are sums of two float16 numbers below 2^9. F lies in memory times 2^9,
// [images][BLOCKS * 8][BLOCKS * 4][2] words: the first and the second numbers of two neighbouring columns.
template <class T, bool SUBSETS = false>
__device__ __forceinline__ void attend(Attended<T> &out, const float (&acc)[T::BLOCKS_N][4], const float *norms,
                                       int row, int image, const Pairs &p, const Attention &attention,
                                       const Grams &grams, const Place<T> &at) {
    constexpr int BLOCKS = T::BLOCKS;
    const int in_group = at.warp_image + image, regions = at.regions(p, in_group), t = at.t;
    float raw[BLOCKS][4], top[2] = {-INFINITE, -INFINITE};
    take_image<T>(raw, acc, image, t);
    const int *owner = p.owner + at.tile * T::SLOTS + row + at.g;
    const float *norm_of[2] = {norms + owner[0] * T::LD + in_group * T::COLUMNS,
                               norms + owner[8] * T::LD + in_group * T::COLUMNS};
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int region = n * 8 + 2 * t + j % 2;
            const bool real = region < regions;
            const float number = real && attention.norm != NONE ? norm_of[j / 2][region] : 0;
            raw[n][j] = real ? raw[n][j] : 0;
            out.e[n][j] = real ? normalised(attention, raw[n][j], number) : -INFINITE;
            top[j / 2] = out.e[n][j] > top[j / 2] ? out.e[n][j] : top[j / 2];
        }
    float largest[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) top[i] = quad_max(top[i]), out.z[i] = out.dot[i] = 0;
    const long long in_all = at.first_image + min(in_group, at.images - 1);
    const float *size = grams.size + in_all * BLOCKS * 8;
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            out.e[n][j] = share_of<SUBSETS>(attention, out.e[n][j], top[j / 2]);
        }
    if (SUBSETS && attention.weights != ALL) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float cut = cut_of<Quad>(attention, regions, [&](auto use) {
#pragma unroll
                for (int n = 0; n < BLOCKS; ++n) use(out.e[n][2 * i]), use(out.e[n][2 * i + 1]);
            });
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; ++j) out.e[n][j] = out.e[n][j] <= cut ? 0 : out.e[n][j];
        }
    }
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float e = out.e[n][j];
            out.z[j / 2] += e;
            out.dot[j / 2] += e * raw[n][j];
            const float v = e * size[n * 8 + 2 * t + j % 2];
            largest[j / 2] = v > largest[j / 2] ? v : largest[j / 2];
        }
    // v times `over` is below 2^9, as F is; `unit` makes up for both.
    float unit[2], over[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned exponent = exponent_of(quad_max(largest[i]));
        unit[i] = as_float((exponent - 17) << 23), over[i] = as_float((254 + 8 - exponent) << 23);
    }
    unsigned v[BLOCKS][2], rest[BLOCKS][2];
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 s = *reinterpret_cast<const float2 *>(size + n * 8 + 2 * t);
            const float x = out.e[n][2 * i] * s.x * over[i], y = out.e[n][2 * i + 1] * s.y * over[i];
            v[n][i] = to_halves(x, y);
            rest[n][i] = to_halves(x - half_of(v[n][i], false), y - half_of(v[n][i], true));
        }
    const unsigned *factor = static_cast<const unsigned *>(grams.factor) + in_all * (BLOCKS * 8) * (BLOCKS * 8);
    float square[2] = {0, 0};
#pragma unroll(BLOCKS > 7 ? 1 : BLOCKS)  // all of a larger F at a time takes too many registers
    for (int b = 0; b < BLOCKS; ++b) {  // eight rows of F: what lies left of them is zero
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n) {
            if (n < b) continue;
            const uint2 f = *reinterpret_cast<const uint2 *>(factor + (((b * 8 + at.g) * BLOCKS + n) * 4 + t) * 2);
            multiply_short(sum, rest[n][0], rest[n][1], f.x);
            multiply_short(sum, v[n][0], v[n][1], f.y);
            multiply_short(sum, v[n][0], v[n][1], f.x);
        }
        square[0] += sum[0] * sum[0] + sum[1] * sum[1];
        square[1] += sum[2] * sum[2] + sum[3] * sum[3];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        out.z[i] = quad_sum(out.z[i]), out.dot[i] = quad_sum(out.dot[i]);
        if (SUBSETS && out.z[i] == 0) out.z[i] = INFINITE;
        out.length[i] = sqrtf(quad_sum(square[i])) * unit[i];
    }
}
