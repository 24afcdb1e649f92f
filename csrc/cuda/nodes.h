// The nodes of a tile of captions with one image, (1) and (2) of `ops/similarity_nodes.py`, for a head that reads them
// from shared memory (graph.cu, filter.cu).
//
//   u = e x / length,   y = W_l (u - q)^2 + b_l,   s = y / (|y| + eps)
//
// with the attention weights e and lengths of weights.cu. The nodes of global vectors, one a pair, are rows of another
// product: `global_nodes` (global_nodes.cu) writes them to memory, and each tile reads its own.
//
// float32 numbers lie as one or two float16 numbers times a power of two (SCALED): words, regions and the matrix of a
// product have an exponent for each row, which `_rows.split_rows` has found, and what is computed here gets one. Words
// and global vectors in float16 have exponents too, but lie as they are: only squares of differences may overflow.
//
// A tile has SLOTS rows, each for one node or empty. A caption takes 16, 32, 64 or 128 of them from a multiple of that
// number on, its global node first (`packing.node_plan`); so no sum depends on the captions beside it.
#pragma once
#include "groups.h"

constexpr float EPS = 1e-8f;

struct Nodes {
    const void *words, *image;    // [N, D], [images, regions, D]
    const void *weight;           // [images, words, pitch] attention weights of a window of words
    const float *inverse;         // [images, words] what e x is to be multiplied by
    const void *overall;          // [images, captions, S] global nodes of the window's captions
    const void *local_weight;     // [S, D]
    const float *local_bias;      // [S]
    const int *word_exponent;     // [N] numbers are below 2^(exponent + 9); SQUARED only
    const int *weight_exponent;   // [S]; SCALED only
    const int *row, *owner;       // [tiles * SLOTS] packed node and caption of each slot, or -1
    const int *start;             // [T + 1] first packed node of each caption
    const int *count;             // [images] regions of each image; or null: all
    int regions, pitch;
    int chunks;                   // of a row of D numbers
    int first_word, size;         // the window's words
    int first_caption, captions;  // the window's captions
    int images;
    int stages;                   // of `stream`
    const void *stream;           // for clusters: local_weight and the head's matrices, as stream.h takes them
    int *failed;                  // for clusters: whether any block has ever given up waiting
};

constexpr int UNIT = 8;  // exponent that numbers of at most 1 are stored with: times 2^UNIT

// KIND: dtype of products' factors. DEPTH: numbers of a row in a stage. REGIONS: a multiple of 16. LONGEST: 0 if single
// warps multiply; else groups of four do (hopper.h), and no caption takes more slots than this. PLACES: 0, or the
// places of a stream (stream.h) of W and the head's matrices, which two blocks of neighbouring images share.
template <Kind KIND_, int S_, int SLOTS_, int DEPTH_, int REGIONS_, bool SCALED_, int LONGEST_ = 0, int PLACES_ = 0>
struct NodeTile {
    static constexpr Kind KIND = KIND_;
    static constexpr int LONGEST = LONGEST_;
    static constexpr bool GROUPS = LONGEST > 0, CLUSTERS = PLACES_ > 0;
    static constexpr bool SCALED = SCALED_, PAIRS = Numbers<KIND>::PAIRS;
    static constexpr bool SQUARED = KIND != BF16;  // squares of differences are multiplied by `squared`
    static constexpr int S = S_, SLOTS = SLOTS_, DEPTH = DEPTH_, REGIONS = REGIONS_, HALVES = PAIRS ? 2 : 1;
    static constexpr int WIDE = S / 8 * HALVES, NARROW = DEPTH / 8 * HALVES;  // chunks of a row: of nodes, of a stage
    // Chunks of a row of attention weights: GROUPS: of one of PARTS.
    static constexpr int FEW = GROUPS ? 8 : REGIONS <= 16 ? 2 : REGIONS <= 32 ? 4 : REGIONS <= 64 ? 8 : 16;
    static constexpr int PARTS = GROUPS ? (REGIONS + 63) / 64 : 1;
    static constexpr int SIDE = GROUPS ? 1 : 4, DOWN = WARPS / SIDE;  // warps that share rows, and columns
    static constexpr int ROWS = SLOTS / DOWN, COLUMNS = S / SIDE;     // of one of them
    static constexpr int M = ROWS / 16, N = COLUMNS / 8, BLOCKS = SLOTS / 16;
    static constexpr int MATRIX = SLOTS * WIDE * 16;  // bytes
    static_assert(!PAIRS || DEPTH % 32 == 0);
    static_assert(!GROUPS || (ROWS == 16 && NARROW == 8));
    static_assert(GROUPS || !CLUSTERS);
    using Products = float[M][N][4];

    struct Making {  // while the nodes are made, where the head's matrices will lie
        unsigned char word[2][SLOTS * NARROW * 16], region[2][REGIONS * NARROW * 16];
        unsigned char weight[HALVES * PARTS][SLOTS * FEW * 16];
    };
    struct Own {
        unsigned char stage[CLUSTERS ? PLACES_ : 2][S * NARROW * 16];
        float part[SIDE][SIDE == 1 ? 1 : SLOTS], inverse[SLOTS];
        int owner[SLOTS], word[SLOTS];           // of each slot: its caption, and its word or -1
        int begin[BLOCKS], end[BLOCKS];          // of 16 slots: the blocks of 16 that their caption takes
        int first[BLOCKS], caption[BLOCKS];      // of each of `captions` captions: its first slot and its number
        float spoiled[BLOCKS];                   // of the caption that begins there: NaN where a node is not finite
        int captions;
        int exponent[SQUARED ? SLOTS : 1];       // of each slot's word
    };
    struct Shared : Own, Ring<PLACES_> {};
    using Matrices = Stream<PLACES_, S * NARROW * 16>;
    __device__ static float scale() { return SCALED ? 1 << UNIT : 1; }  // what nodes of `make_nodes` are multiplied by
};

// The exponent that squares of differences get, so that they are at most 2^14: of vectors whose numbers are below
// 2^(exponent + 9), and of unit vectors.
__device__ __forceinline__ int squared(int exponent) {
    const int above = exponent + 9, found = 14 - 2 * ((above > 0 ? above : 0) + 1);
    return found < -126 ? -126 : found;
}

// Whether one of two 16-bit numbers is infinite or NaN.
template <Kind KIND> __device__ __forceinline__ bool not_finite(unsigned word) {
    constexpr unsigned MOST = KIND == BF16 ? 0x7f80 : 0x7c00;
    return (word & MOST) == MOST || (word >> 16 & MOST) == MOST;
}

// Writes two numbers of a node. Where one is not finite, its caption's score becomes NaN. Both numbers become zero: an
// empty row, which is no node of a caption, has weight 0 in sums over the caption's rows, and 0 times infinity is NaN.
template <class T>
__device__ __forceinline__ void put_node(typename T::Shared &sh, unsigned char *nodes, int row, int column, float x,
                                         float y) {
    if (not_finite<Numbers<T::KIND>::STORED>(put<T::KIND, T::WIDE>(nodes, row, column, x, y))) {
        if (sh.owner[row] >= 0) sh.spoiled[sh.begin[row / 16]] = as_float(0x7fc00000u);
        put<T::KIND, T::WIDE>(nodes, row, column, 0, 0);
    }
}

// acc [SLOTS, S] = A W^T, some numbers of a row at a time: `load(step)` starts the copies that make A's stage in
// `made[step % 2]`, and `finish(step)` makes it once they have landed. W has S rows of `chunks`.
template <class T, class Load, class Finish>
__device__ __forceinline__ void project(typename T::Products &acc, typename T::Shared &sh,
                                        unsigned char (&made)[2][T::SLOTS * T::NARROW * 16], const void *weight,
                                        int chunks, Load load, Finish finish) {
    const int first_row = warp_row<T>();
    auto start = [&](int step) {
        if (step * T::NARROW < chunks) {
            copy_rows<T::S, T::NARROW>(sh.stage[step % 2], step * T::NARROW, chunks, weight,
                                       [&](int row) { return row_of(weight, row, chunks); });
            load(step);
        }
        commit();
    };
    clear(acc);
    start(0);
#pragma unroll 1
    for (int step = 0; step * T::NARROW < chunks; ++step) {
        wait_groups<0>();
        __syncthreads();  // this stage has landed, and the other one has been read
        start(step + 1);
        finish(step);
        __syncthreads();
        const unsigned char *a = made[step % 2];
        product<T::KIND, T::NARROW>(
            acc, [&](int row, int chunk) { return a + place<T::NARROW>(first_row + row, chunk); }, sh.stage[step % 2],
            warp_column<T>());
    }
}

// acc += bias, after a row was multiplied by `row_factor(row)` (SQUARED) and a column by 2^exponent (SCALED); and
// returns 1 / (|row| + eps) of the thread's rows. All threads have finished `project` when it returns.
template <class T, class RowFactor>
__device__ __forceinline__ void add_bias(typename T::Products &acc, typename T::Shared &sh, const float *bias,
                                         const int *exponent, RowFactor row_factor, float (&inverse)[T::M][2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first_row = warp_row<T>(), column = warp_column<T>();
#pragma unroll
    for (int m = 0; m < T::M; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = first_row + m * 16 + g + 8 * j;
            float square = 0;
#pragma unroll
            for (int n = 0; n < T::N; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int c = column + n * 8 + 2 * t + i;
                    float &x = acc[m][n][2 * j + i];
                    if constexpr (T::SCALED)
                        x *= row_factor(row) * power(exponent[c]);
                    else if constexpr (T::SQUARED)
                        x *= row_factor(row);
                    x += bias[c];
                    square += x * x;
                }
            square = quad_sum(square);
            if constexpr (T::SIDE == 1)
                inverse[m][j] = square;
            else if (t == 0)
                sh.part[warp_column<T>() / T::COLUMNS][row] = square;
        }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < T::M; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = first_row + m * 16 + g + 8 * j;
            float square = inverse[m][j];
            if constexpr (T::SIDE > 1) square = sh.part[0][row] + sh.part[1][row] + sh.part[2][row] + sh.part[3][row];
            inverse[m][j] = 1 / (sqrtf(square) + EPS);
        }
}

// This block's image. The last block of a cluster may have none, and then does the same as the first.
__device__ __forceinline__ int image_of(const Nodes &p) { return min(int(blockIdx.y), p.images - 1); }

// What the slots of this block's tile hold. Before `begin` and what follows it are read, the caller passes a barrier.
template <class T> __device__ __forceinline__ void read_slots(const Nodes &p, typename T::Shared &sh) {
    const int slot = threadIdx.x;
    if (slot < T::SLOTS) {
        const int owner = p.owner[blockIdx.x * T::SLOTS + slot], node = p.row[blockIdx.x * T::SLOTS + slot];
        const bool word = owner >= 0 && node != p.start[owner];
        sh.owner[slot] = owner;
        sh.word[slot] = word ? node - owner - 1 : -1;  // each caption before it has one node more than words
        if constexpr (T::SQUARED) sh.exponent[slot] = word ? p.word_exponent[sh.word[slot]] : 0;
        sh.inverse[slot] = word ? p.inverse[image_of(p) * (long long)p.size + sh.word[slot] - p.first_word] : 0;
    }
    __syncthreads();
    if (slot < T::BLOCKS) {
        const int owner = sh.owner[slot * 16];
        int begin = slot, end = slot + 1;  // of an empty block: itself, which saves products with other empty ones
        while (owner >= 0 && begin > 0 && sh.owner[begin * 16 - 16] == owner) --begin;  // redundant: owner >= 0
        while (owner >= 0 && end < T::BLOCKS && sh.owner[end * 16] == owner) ++end;
        sh.begin[slot] = begin, sh.end[slot] = end, sh.spoiled[slot] = 0;
    }
    if (slot == 0) {
        int count = 0;
        for (int block = 0; block < T::BLOCKS; ++block) {
            const int owner = sh.owner[block * 16];
            if (owner >= 0 && (block == 0 || sh.owner[block * 16 - 16] != owner))
                sh.first[count] = block * 16, sh.caption[count++] = owner;
        }
        sh.captions = count;
        for (; count < T::BLOCKS; ++count) sh.first[count] = 0, sh.caption[count] = -2;
    }
}

// The tile's nodes, X [SLOTS, S], over `making`. Empty slots have finite numbers, unless parameters have not.
template <class T>
__device__ __forceinline__ void make_nodes(const Nodes &p, typename T::Shared &sh, typename T::Making &making,
                                           typename T::Matrices &matrices) {
    constexpr Kind KIND = T::KIND;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, image = image_of(p);
    const int count = p.count ? p.count[image] : p.regions;
    matrices.begin(sh.stage[0], sh, p.stream, p.stages, p.failed);
    read_slots<T>(p, sh);
    constexpr bool KEPT = T::GROUPS && !T::SQUARED;  // where registers suffice
    int kept[KEPT ? T::SLOTS * T::NARROW / THREADS : 1];  // the words of a thread's rows, as `copy_rows` takes them
    static_assert(!KEPT || T::FEW == T::NARROW);  // so a thread copies weights of the same words
#pragma unroll
    for (int i = 0; KEPT && i < T::SLOTS * T::NARROW / THREADS; ++i)
        kept[i] = sh.word[(i * THREADS + threadIdx.x) / T::NARROW];
#pragma unroll
    for (int i = 0; i < T::HALVES * T::PARTS; ++i) {
        int next = 0;
        copy_rows<T::SLOTS, T::FEW>(making.weight[i], i % T::PARTS * T::FEW, p.pitch / 8, p.words, [&](int slot) {
            const int word = KEPT ? kept[next++] : sh.word[slot];
            const long long row = image * (long long)p.size + word - p.first_word;
            return word < 0 ? nullptr  // unseen: else reads before the weights
                            : row_of(p.weight, row * T::HALVES + i / T::PARTS, p.pitch / 8);
        });
    }
    auto load = [&](int step) {
        int next = 0;
        copy_rows<T::SLOTS, T::NARROW, T::GROUPS>(
            making.word[step % 2], step * T::NARROW, p.chunks, p.words, [&](int slot) {
                const int word = KEPT ? kept[next++] : sh.word[slot];
                return word < 0 ? nullptr : row_of(p.words, word, p.chunks);  // unseen: else reads before the words
            });
        copy_rows<T::REGIONS, T::NARROW, T::GROUPS>(
            making.region[step % 2], step * T::NARROW, p.chunks, p.words, [&](int region) {
                return region < count ? row_of(p.image, image * (long long)p.regions + region, p.chunks) : nullptr;
            });
    };
    // (u - q)^2 in the place of q, by blocks of 16 x 16, one to a warp.
    auto difference = [&](int step) {
#pragma unroll
        for (int job = warp; job < T::BLOCKS * (T::DEPTH / 16); job += WARPS) {
            const int row = job % T::BLOCKS * 16, column = job / T::BLOCKS * 16, chunk = Numbers<KIND>::chunk(column);
            float u[2][4] = {};
#pragma unroll
            for (int k = 0; k < T::REGIONS / 16; ++k) {
                Factor<KIND> a, b;
                read_factor(a, [&](int rest) {
                    return making.weight[rest != 0] + place<T::FEW>(row + lane % 16, 2 * k + lane / 16);
                });
                read_transposed(b, [&](int rest) {
                    return making.region[step % 2] + place<T::NARROW>(k * 16 + lane % 16, chunk + rest + lane / 16);
                });
                multiply_block(u[0], a, b, 0);
                multiply_block(u[1], a, b, 1);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int slot = row + g + 8 * j;
                const float factor = sh.inverse[slot];
                float unit = 1, raised = 1;
                if constexpr (T::SCALED) unit = power(sh.exponent[slot]);
                if constexpr (T::SQUARED) raised = power(squared(sh.exponent[slot]));
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int c = column + n * 8 + 2 * t;
                    const float2 q = get<KIND, T::NARROW>(making.word[step % 2], slot, c);
                    const float x = u[n][2 * j] * factor - q.x * unit, y = u[n][2 * j + 1] * factor - q.y * unit;
                    put<KIND, T::NARROW>(making.word[step % 2], slot, c, x * x * raised, y * y * raised);
                }
            }
        }
    };
    typename T::Products acc;
    float inverse[T::M][2];
    if constexpr (T::GROUPS) {
        const int first = warp_row<T>();
        constexpr Kind STORED = Numbers<KIND>::STORED;
        constexpr int EACH = T::REGIONS / 16;
        // u = e V; PAIRS: both halves of e by the first halves of V, and beside them by its second ones. So the product
        // of two second halves is made too, as columns of B cannot be left out. A warp's rows of e stay in registers,
        // if they are so few that these suffice; else products read them from shared memory.
        constexpr bool HELD = !T::PAIRS && EACH <= 4;
        unsigned e[HELD ? EACH : 1][4];
        auto weight = [&](int k) {  // second halves first
            return making.weight[k % EACH / 4 + (T::HALVES - 1 - k / EACH) * T::PARTS];
        };
        auto begin = [&](int step, float (&u)[8][4]) {
            if (HELD && step == 0) {  // once they have landed
#pragma unroll
                for (int k = 0; k < T::HALVES * EACH; ++k)
                    load_matrices(e[k], weight(k) + place<T::FEW>(first + lane % 16, k % EACH % 4 * 2 + lane / 16));
            }
            const unsigned char *regions = making.region[step % 2];
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j) u[n][j] = 0;  // else registers keep what was there, and are too few
            group_fence(u, e);
#pragma unroll
            for (int k = 0; k < T::HALVES * EACH; ++k) {
                const auto rows = described(regions + k % EACH * 16 * 128);
                if constexpr (HELD)
                    group_multiply<STORED, 64, true, true>(u, e[k], rows);
                else {
                    const auto own = described(weight(k) + first / 64 * 64 * 128 + k % EACH % 4 * 32);
                    group_multiply_shared<STORED>(u, own, rows);
                }
            }
            group_commit();
        };
        float factor[2];
        auto read_factors = [&] {
#pragma unroll
            for (int j = 0; j < 2; ++j) factor[j] = sh.inverse[first + g + 8 * j];
        };
        if constexpr (KEPT) read_factors();
        auto finish = [&](int step, float (&u)[8][4]) {  // (u - q)^2
            float unit[2] = {1, 1}, raised[2] = {1, 1};
            if constexpr (!KEPT) read_factors();
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int slot = first + g + 8 * j;
                if constexpr (T::SCALED) unit[j] = power(sh.exponent[slot]);
                if constexpr (T::SQUARED) raised[j] = power(squared(sh.exponent[slot]));
            }
#pragma unroll
            for (int k = 0; k < T::DEPTH / 16; ++k) {
                Factor<KIND> q;
                read_factor(q, [&](int rest) {
                    return making.word[step % 2] + place<T::NARROW>(first + lane % 16, 2 * k + rest + lane / 16);
                });
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int j = i % 2;
                    float *both = u[2 * k + i / 2] + 2 * j;
                    float2 word = {low<STORED>(q.words[i]), high<STORED>(q.words[i])};
                    if constexpr (T::PAIRS) {
                        both[0] += u[4 + 2 * k + i / 2][2 * j], both[1] += u[4 + 2 * k + i / 2][2 * j + 1];
                        word.x += half_of(q.rest[i], false), word.y += half_of(q.rest[i], true);
                    }
                    const float x = both[0] * factor[j] - word.x * unit[j], y = both[1] * factor[j] - word.y * unit[j];
                    both[0] = x * x * raised[j], both[1] = y * y * raised[j];
                }
            }
        };
        project_by_groups<T>(acc, sh, p.local_weight, p.chunks, matrices, load, begin, finish);
    } else
        project<T>(acc, sh, making.word, p.local_weight, p.chunks, load, difference);
    auto lowered = [&](int slot) { return power(-squared(sh.exponent[slot])); };
    add_bias<T>(acc, sh, p.local_bias, p.weight_exponent, lowered, inverse);
    auto *nodes = reinterpret_cast<unsigned char *>(&making);
#pragma unroll
    for (int m = 0; m < T::M; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = warp_row<T>() + m * 16 + g + 8 * j;
            if (sh.word[row] < 0 && sh.owner[row] >= 0) continue;  // a global node
#pragma unroll
            for (int n = 0; n < T::N; ++n) {
                const float x = acc[m][n][2 * j] * inverse[m][j], y = acc[m][n][2 * j + 1] * inverse[m][j];
                put_node<T>(sh, nodes, row, warp_column<T>() + n * 8 + 2 * t, x * T::scale(), y * T::scale());
            }
        }
    // Not finite means NaN here, as it was divided by its length; only its caption's sums hold it.
    for (int caption = warp; caption < sh.captions; caption += WARPS) {
        const int slot = sh.first[caption];
        const long long row = image * (long long)p.captions + sh.caption[caption] - p.first_caption;
        for (int chunk = lane; chunk < T::WIDE; chunk += 32)
            *reinterpret_cast<uint4 *>(nodes + place<T::WIDE>(slot, chunk)) =
                static_cast<const uint4 *>(row_of(p.overall, row, T::WIDE))[chunk];
    }
    __syncthreads();
}

// Writes the score of a pair, sigmoid(x), or its logit x.
template <class T> __device__ __forceinline__ void put_score(void *scores, long long at, float x, bool logit) {
    const float score = logit ? x : 1 / (1 + exp2f(-x * LOG2E));
    if constexpr (T::SCALED)
        static_cast<float *>(scores)[at] = score;
    else
        static_cast<unsigned short *>(scores)[at] = static_cast<unsigned short>(rounded<T::KIND>(score, 0));
}
