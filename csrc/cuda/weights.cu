// The words' attention weights over the regions of images, and the lengths of what they attend to, for the nodes that
// are made of them (nodes.h): `ops/_attention.py`, direction t2i.
//
// A row of weights e is written as numbers of the products that follow. With z the sum of e and P the attended vector,
// P / (|P| + eps) is the sum of e times the regions, times 1 / (z |P| + eps z), which is written too. Where regions
// have exponents, e times 2^exponent is written, times a power of two by which the factor is divided.
#include "attention.h"
#include "tile.h"

struct Weights {
    Pairs pairs;  // of a window of neighbouring captions
    Attention attention;
    Grams grams;
    void *weight;     // [images, size, BLOCKS * 8] e, zero beyond the regions; F16X3: a row's first, then second halves
    float *inverse;   // [images, size] 1 / (z |P| + eps z)
    int first, size;  // the window's words
};

// Grid: tiles x groups of images; see `Place`.
template <Kind KIND, int COLUMNS, int SLOTS, int SIDE>
__global__ void __launch_bounds__(Tile<KIND, COLUMNS, SLOTS, SIDE>::THREADS, 1) weights(Weights p) {
    using T = Tile<KIND, COLUMNS, SLOTS, SIDE>;
    DYNAMIC_SHARED(shared, T::WORK + CAPTIONS * T::LD * 4);
    float *norms = reinterpret_cast<float *>(shared + T::WORK);  // [CAPTIONS][LD]
    const Place<T> at(p.pairs);
    constexpr bool PAIRS = KIND == F16X3;

    typename T::Accumulators acc;
    affinities<T>(acc, shared, p.pairs, at);
    __syncthreads();  // the stages have been read
    norms_of_captions<T>(norms, reinterpret_cast<float *>(shared), acc, p.pairs, p.attention, at);
    __syncthreads();

#pragma unroll
    for (int m = 0; m < T::BLOCKS_M; ++m)
#pragma unroll
        for (int image = 0; image < T::WARP_IMAGES; ++image) {
            const int slot = at.warp_row + m * 16, in_group = at.warp_image + image;
            Attended<T> found;
            attend<T>(found, acc[m], norms, slot, image, p.pairs, p.attention, p.grams, at);
            float over[2] = {1, 1};
            if (p.pairs.region_exponent) {
                const int regions = at.regions(p.pairs, in_group);
                const int *exponent = p.pairs.region_exponent + (long long)(at.first_image + in_group) * p.pairs.R;
                float largest[2] = {0, 0};
#pragma unroll
                for (int n = 0; n < T::BLOCKS; ++n)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const int region = n * 8 + 2 * at.t + j % 2;
                        float &e = found.e[n][j];
                        e = region < regions ? scaled(e, exponent[region]) : 0;  // unseen: else reads behind its end
                        largest[j / 2] = e > largest[j / 2] ? e : largest[j / 2];
                    }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int top = int(as_bits(quad_max(largest[i])) >> 23) - 127;
                    over[i] = power(8 - (top < -100 ? -100 : top));
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = p.pairs.row[at.tile * SLOTS + slot + at.g + 8 * i];
                if (row < 0 || in_group >= at.images) continue;
                const long long to = (at.first_image + in_group) * (long long)p.size + row - p.first;
                unsigned *weight = static_cast<unsigned *>(p.weight) + to * (T::BLOCKS * 4 * (PAIRS ? 2 : 1)) + at.t;
#pragma unroll
                for (int n = 0; n < T::BLOCKS; ++n) {
                    const float x = found.e[n][2 * i] * over[i], y = found.e[n][2 * i + 1] * over[i];
                    const unsigned first = rounded<PAIRS ? F16 : KIND>(x, y);
                    weight[n * 4] = first;
                    if constexpr (PAIRS)
                        weight[(T::BLOCKS + n) * 4] = to_halves(x - half_of(first, false), y - half_of(first, true));
                }
                if (at.t == 0) p.inverse[to] = 1 / (found.length[i] + EPS * found.z[i]) / over[i];
            }
        }
}
