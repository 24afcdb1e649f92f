// SCAN's pair scores in one kernel, `ops/cross_attention_score.py` (1) to (3): affinities, their norm, attention,
// similarities and pooling. No number per pair but its score goes to memory.
#include "attention.h"

struct Scan {
    Pairs pairs;
    Attention attention;
    Grams grams;
    const float *length;  // of the queries' rows, |q|
    float *score;         // [images][captions]
    int pool;             // a `Pool`
    float pool_scale;
    int similarity;  // a `Similarity`
};

// The similarity of a query and what it attends to. With its weights e before they are normalised: `z` is their sum,
// `dot` the sum of e times the affinity, `attended` the length of the sum of e times the context. `length`: |query|.
__device__ __forceinline__ float similarity_of(const Scan &p, float dot, float attended, float z, float length) {
    if (p.similarity == PRODUCT) return dot / z;
    const float both = (p.similarity == COSINE ? length : 1) * (attended / z);
    return dot / z / (both > EPS ? both : EPS);
}

// One score of the similarities r(0) to r(n - 1).
template <class Value> __device__ __forceinline__ float pooled(const Scan &p, int n, Value r) {
    float top = -INFINITE, sum = 0, below = 0;
    for (int q = 0; q < n; ++q) {
        const float more = r(q) - p.attention.threshold;
        top = r(q) > top ? r(q) : top;
        sum += r(q);
        below += more >= 0 ? 0 : more;
    }
    if (p.pool == NEGATIVE) return below / n;
    if (sum != sum) return sum;  // `top` has passed over a NaN
    if (p.pool == MAX) return top;
    if (p.pool == SUM) return sum;
    if (p.pool == MEAN) return sum / n;
    sum = 0;
    for (int q = 0; q < n; ++q) sum += exp2f((r(q) - top) * (p.pool_scale * LOG2E));
    return top + logf(sum) / p.pool_scale;
}

// The affinities as both directions begin; returns 0, or NaN where they are wrong. On return no thread reads a stage.
template <class T>
__device__ __forceinline__ float begin(typename T::Accumulators &acc, unsigned char *shared, const Scan &p,
                                       const Place<T> &at) {
    if constexpr (T::CLUSTERS)
        return affinities_in_clusters<T>(acc, shared, p.pairs, at);
    else {
        affinities<T>(acc, shared, p.pairs, at);
        __syncthreads();
        return 0;
    }
}

// Words attend to regions.
template <class T> __device__ __forceinline__ void score_words(const Scan &p) {
    constexpr int SLOTS = T::SLOTS;
    DYNAMIC_SHARED(shared, T::SHARED);
    float *norms = reinterpret_cast<float *>(shared + T::WORK);  // [CAPTIONS][LD]
    float *work = reinterpret_cast<float *>(shared);
    const Place<T> at(p.pairs);
    if constexpr (!T::CLUSTERS) {  // a block of a cluster has to stay for the other
        if (!at.computes_any(p.pairs)) return;  // redundant for results: scores are written pair by pair
    }

    typename T::Accumulators acc;
    const float gave_up = begin<T>(acc, shared, p, at);
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
            attend<T, true>(found, acc[m], norms, slot, image, p.pairs, p.attention, p.grams, at);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int mine = slot + at.g + 8 * i, row = p.pairs.row[at.tile * SLOTS + mine];
                if (at.t == 0 && row >= 0)
                    cosine[(at.warp_image + image) * SLOTS + mine] =
                        similarity_of(p, found.dot[i], found.length[i], found.z[i], p.length[row]);
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < at.captions * at.images; i += T::THREADS) {
        const int caption = i % at.captions, member = at.member + caption, image = i / at.captions;
        if (!at.computes(p.pairs, caption, image)) continue;
        const int begin = p.pairs.begin[member], words = p.pairs.end[member] - begin;
        const float *r = cosine + image * SLOTS + begin;
        p.score[(long long)(at.first_image + image) * p.pairs.captions + p.pairs.caption[member]] =
            pooled(p, words, [&](int q) { return r[q]; }) + gave_up;
    }
}

// Captions of at most so many words are attended to from registers: nearly all of COCO's.
constexpr int SHORT = 24;

// Calls f(w) for words w from `first` to n - 1, in order. MOST > 0: n is at most that, and every w is known when this
// is compiled, so that f may use it as the place of a register.
template <int MOST, class F> __device__ __forceinline__ void for_words(int first, int n, F f) {
    if constexpr (MOST > 0) {
#pragma unroll
        for (int w = 0; w < MOST; ++w)
            if (w >= first)  // redundant: F is zero there
                if (w < n) f(w);
    } else
        for (int w = first; w < n; ++w) f(w);
}

// A column of `values`.
struct Column {
    float *first;
    int pitch;
    __device__ __forceinline__ float &operator[](int w) const { return first[w * pitch]; }
};

// The similarity of a region of this length and what it attends to of a caption's n words. `raw`: its affinities, in
// whose place e times `size` is left; logit(w): the normalised ones. MOST: see `for_words`.
//
// The caption's factor is [ceil(n / 4)][n][4]: of four rows of F, word by word.
template <int MOST, class Raw, class Logit>
__device__ __forceinline__ float attend_words(const Scan &p, Raw &raw, Logit logit, int n, const float *size,
                                              const float4 *factor, float length) {
    float top = -INFINITE, z = 0, dot = 0, square = 0, largest = 0;
    for_words<MOST>(0, n, [&](int w) {
        const float x = logit(w);
        top = x > top ? x : top;
    });
    auto share = [&](int w) { return share_of<true>(p.attention, logit(w), top); };
    const float cut =
        cut_of<Alone>(p.attention, n, [&](auto use) { for_words<MOST>(0, n, [&](int w) { use(share(w)); }); });
    for_words<MOST>(0, n, [&](int w) {
        float e = share(w);
        e = e <= cut ? 0 : e;
        z += e;
        dot += e * raw[w];
        const float v = e * size[w];
        largest = v > largest ? v : largest;
        raw[w] = v;
    });
    const unsigned exponent = exponent_of(largest);
    const float unit = as_float(exponent << 23), over = as_float((254 - exponent) << 23);  // squares fit float32
    auto add_rows = [&](int y) {
        float a = 0, b = 0, c = 0, d = 0;
        for_words<MOST>(y, n, [&](int w) {
            const float v = raw[w] * over;
            const float4 f = factor[w];
            a += f.x * v, b += f.y * v, c += f.z * v, d += f.w * v;
        });
        square += a * a + b * b + c * c + d * d;
        factor += n;
    };
    if constexpr (MOST > 0) {
#pragma unroll
        for (int y = 0; y < MOST; y += 4)
            if (y < n) add_rows(y);  // redundant for results: there is nothing to add
    } else
        for (int y = 0; y < n; y += 4) add_rows(y);
    return similarity_of(p, dot, sqrtf(square) * unit, z == 0 ? INFINITE : z, length);
}

// Regions attend to words.
//
// A caption's words lie in several warps, so affinities pass through shared memory, and one thread has a caption with
// one region. It reads those of a short caption once.
template <class T> __device__ __forceinline__ void score_regions(const Scan &p) {
    constexpr int COLUMNS = T::COLUMNS, SLOTS = T::SLOTS;
    static_assert(T::IMAGES * SLOTS <= CAPTIONS * T::LD);
    DYNAMIC_SHARED(shared, T::SHARED);
    float *norms = reinterpret_cast<float *>(shared + T::WORK);  // [IMAGES][SLOTS]
    // [SLOTS][LD]: affinities, then e times `size` of long captions, and then, in its first slot, a caption's cosines.
    float *values = reinterpret_cast<float *>(shared);
    const Place<T> at(p.pairs);
    if constexpr (!T::CLUSTERS) {  // a block of a cluster has to stay for the other
        if (!at.computes_any(p.pairs)) return;  // redundant for results: scores are written pair by pair
    }

    typename T::Accumulators acc;
    const float gave_up = begin<T>(acc, shared, p, at);
    store<T>(values, acc, at);
    if (p.attention.norm != NONE)
#pragma unroll
        for (int m = 0; m < T::BLOCKS_M; ++m)
#pragma unroll
            for (int image = 0; image < T::WARP_IMAGES; ++image)
                norms_of_image<T>(norms, acc[m], at.warp_row + m * 16, image, p.pairs, p.attention, at);
    __syncthreads();

    for (int i = threadIdx.x; i < at.captions * T::WIDTH; i += T::THREADS) {
        const int member = at.member + i / T::WIDTH, column = i % T::WIDTH;
        const int image = column / COLUMNS, region = column % COLUMNS, caption = p.pairs.caption[member];
        if (region >= at.regions(p.pairs, image)) continue;  // unseen: else reads behind the end of `length`
        const int begin = p.pairs.begin[member], words = p.pairs.end[member] - begin;
        Column value{values + begin * T::LD + column, T::LD};
        const float *number = norms + image * SLOTS + begin;
        auto logit = [&](int w) {
            return normalised(p.attention, value[w], p.attention.norm == NONE ? 0 : number[w]);
        };
        const float *size = p.grams.size + p.pairs.row[at.tile * SLOTS + begin];
        const float4 *factor = static_cast<const float4 *>(p.grams.factor) + p.grams.place[caption];
        const float length = p.length[(long long)(at.first_image + image) * p.pairs.R + region];
        if (words > SHORT) {
            value[0] = attend_words<0>(p, value, logit, words, size, factor, length);
            continue;
        }
        float raw[SHORT], x[SHORT];
        for_words<SHORT>(0, words, [&](int w) { raw[w] = value[w], x[w] = logit(w); });
        value[0] = attend_words<SHORT>(p, raw, [&](int w) { return x[w]; }, words, size, factor, length);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < at.captions * at.images; i += T::THREADS) {
        const int caption = i % at.captions, member = at.member + caption, image = i / at.captions;
        if (!at.computes(p.pairs, caption, image)) continue;
        const float *r = values + p.pairs.begin[member] * T::LD + image * COLUMNS;
        p.score[(long long)(at.first_image + image) * p.pairs.captions + p.pairs.caption[member]] =
            pooled(p, at.regions(p.pairs, image), [&](int x) { return r[x]; }) + gave_up;
    }
}

// Grid: tiles x groups of images in x, or pairs of tiles, whose two are in y; see `Place`.
template <Kind KIND, int COLUMNS, int SLOTS, int SIDE, int STAGES>
__global__ void __launch_bounds__(Tile<KIND, COLUMNS, SLOTS, SIDE>::THREADS, 1) scan_t2i(Scan p) {
    score_words<Tile<KIND, COLUMNS, SLOTS, SIDE, STAGES>>(p);
}
template <Kind KIND, int COLUMNS, int SLOTS, int SIDE, int STAGES>
__global__ void __launch_bounds__(Tile<KIND, COLUMNS, SLOTS, SIDE>::THREADS, 1) scan_i2t(Scan p) {
    score_regions<Tile<KIND, COLUMNS, SLOTS, SIDE, STAGES>>(p);
}
template <Kind KIND, int COLUMNS, int SLOTS, int STAGES>
__global__ void IN_CLUSTERS __launch_bounds__(2 * SLOTS, 1) scan_t2i_in_clusters(Scan p) {
    score_words<Tile<KIND, COLUMNS, SLOTS, 1, STAGES, true>>(p);
}
template <Kind KIND, int COLUMNS, int SLOTS, int STAGES>
__global__ void IN_CLUSTERS __launch_bounds__(2 * SLOTS, 1) scan_i2t_in_clusters(Scan p) {
    score_regions<Tile<KIND, COLUMNS, SLOTS, 1, STAGES, true>>(p);
}
