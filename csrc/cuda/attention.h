// The words' attention over an image's regions, from affinities in accumulators: `ops/_attention.py`, direction t2i.
#pragma once
#include "affinity.h"

constexpr float EPS = 1e-8f;

// How the affinities of a context are normalised over the queries. The other names in `ops/_attention.py` are these with
// or without the LeakyReLU before.
enum Norm { NONE, L1, L2, SOFTMAX };

struct Attention {
    int norm;
    float slope;           // of the LeakyReLU for negative affinities; 1: none
    float scale;           // inverse temperature of the softmax over the contexts
    const unsigned *factor;  // [images][BLOCKS * 8][BLOCKS * 4][2] see `attend`
    const float *size;     // [images][BLOCKS * 8] powers of two, near the regions' lengths; 0 beyond the regions
};

__device__ __forceinline__ float clipped(float x, float slope) { return x > 0 ? x : slope * x; }

// The number that normalises one context's affinities x(0) to x(n - 1) with all queries of a set; see `normalised`.
template <class Value>
__device__ __forceinline__ float norm_over(const Attention &p, int n, Value value) {
    float sum = 0;
    if (p.norm == SOFTMAX) {
        float top = -INFINITE;
        for (int q = 0; q < n; ++q) top = value(q) > top ? value(q) : top;
        for (int q = 0; q < n; ++q) sum += exp2f((value(q) - top) * LOG2E);
        return top + logf(sum);
    }
    if (p.norm == L1) {
        for (int q = 0; q < n; ++q) sum += fabsf(clipped(value(q), p.slope));
        return 1 / (sum + EPS);
    }
    for (int q = 0; q < n; ++q) {
        const float x = clipped(value(q), p.slope);
        sum += x * x;
    }
    if (!(sum < INFINITE)) {  // squares beyond float32, though the norm is within it
        sum = 0;
        for (int q = 0; q < n; ++q) {
            const float x = clipped(value(q), p.slope) * 0x1p-64f;
            sum += x * x;
        }
        return 1 / (sqrtf(sum) * 0x1p64f);
    }
    return 1 / (sqrtf(sum) + EPS);
}

// An affinity by the number that `norm_over` gives.
__device__ __forceinline__ float normalised(const Attention &p, float x, float number) {
    if (p.norm == SOFTMAX) return exp2f((x - number) * LOG2E);
    return p.norm == NONE ? clipped(x, p.slope) : clipped(x, p.slope) * number;
}

// Norms over the words of each caption: the numbers of captions [CAPTIONS] and columns [LD]. The affinities pass through
// shared memory, and one thread adds up those of a caption in order, so that the sum's bits do not depend on its slots.
// A barrier before and after it is the caller's.
template <class T>
__device__ __forceinline__ void norms_of_captions(float *norms, float *values, const typename T::Accumulators &acc,
                                                  const Pairs &p, const Attention &attention, const Place<T> &at) {
    store<T>(values, acc, at);
    __syncthreads();
    for (int i = threadIdx.x; i < at.captions * T::WIDTH; i += T::THREADS) {
        const int caption = i / T::WIDTH, column = i % T::WIDTH;
        const int begin = p.begin[at.member + caption], words = p.end[at.member + caption] - begin;
        const float *value = values + begin * T::LD + column;
        norms[caption * T::LD + column] = norm_over(attention, words, [&](int q) { return value[q * T::LD]; });
    }
}

__device__ __forceinline__ float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    float y = shuffle_xor(x, 1);
    x = y > x ? y : x;
    y = shuffle_xor(x, 2);
    return y > x ? y : x;
}

// Softmax of words g and g + 8 over an image's regions.
template <class T> struct Attended {
    float e[T::BLOCKS][4];  // exp(logit - the largest one), 0 beyond the regions, where `take_image` puts them
    float z[2], dot[2], length[2];  // sum of e, of e times the affinity, and |sum of e times the region|
};

// Attends with 16 words, whose first slot is `row`, to an image, counted within the warp.
//
// The attended vector's length is |F v|, a sum of squares that cannot cancel: v = e times `size`, and F^T F is the Gram
// matrix of the regions divided by their `size`. F is upper triangular. It and v, divided by a power of two near its
// largest number, are sums of two float16 numbers; F lies there as (first, second) halves of two neighbouring columns.
template <class T>
__device__ __forceinline__ void attend(Attended<T> &out, const float (&acc)[T::BLOCKS_N][4], const float *norms, int row,
                                       int image, const Pairs &p, const Attention &attention, const Place<T> &at) {
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
    const float *size = attention.size + in_all * BLOCKS * 8;
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float e = exp2f((out.e[n][j] - top[j / 2]) * (attention.scale * LOG2E));
            out.z[j / 2] += e;
            out.dot[j / 2] += e * raw[n][j];
            out.e[n][j] = e;
            const float v = e * size[n * 8 + 2 * t + j % 2];
            largest[j / 2] = v > largest[j / 2] ? v : largest[j / 2];
        }
    // 2^-8 times v's least power of two, and its inverse, from the exponent's bits.
    float unit[2], over[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        unsigned exponent = as_bits(quad_max(largest[i])) >> 23;
        exponent = exponent < 9 ? 9 : exponent > 253 ? 253 : exponent;
        unit[i] = as_float((exponent - 8) << 23), over[i] = as_float((254 + 8 - exponent) << 23);
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
    const unsigned *factor = attention.factor + in_all * (BLOCKS * 8) * (BLOCKS * 8) + (at.g * BLOCKS * 4 + t) * 2;
    float square[2] = {0, 0};
#pragma unroll(BLOCKS > 9 ? 1 : BLOCKS)  // all of a larger F at a time takes too many registers
    for (int b = 0; b < BLOCKS; ++b) {  // eight rows of F: what lies left of them is zero
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n) {
            if (n < b) continue;
            const uint2 f = *reinterpret_cast<const uint2 *>(factor + (b * 8 * BLOCKS * 4 + n * 4) * 2);
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
        out.length[i] = sqrtf(quad_sum(square[i])) * unit[i];
    }
}
