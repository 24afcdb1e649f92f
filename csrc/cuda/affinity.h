// Affinities of words and regions: one block of threads computes those of a tile of captions with a group of images,
// and keeps them in the accumulators of its matrix products.
//
// A tile has SLOTS slots for words, which hold at most CAPTIONS whole captions. An image takes COLUMNS columns; where
// it has fewer regions, the others hold zeros. Warps stand SIDE by side, each has WARP_ROWS slots and whole images.
//
// CLUSTERS (compute capability 9.0): two blocks have neighbouring tiles and the same images, whose regions they share
// (stream.h), and groups of warps multiply (hopper.h).
#pragma once
#include "hopper.h"
#include "stream.h"

constexpr int CAPTIONS = 16;  // at most, in a tile
constexpr int BAND = 16;      // groups of images that go through the tiles together: the L2 cache holds both sides
constexpr unsigned NOTHING = ~0u;

// The inputs. A row of words or regions is `chunks` pieces of 16 bytes: numbers of the kind, zero from D on.
// Tiles: members first[t] to first[t + 1] - 1 are the captions of tile t. Member k is caption[k], in slots begin[k] to
// end[k] - 1.
struct Pairs {
    const void *words;    // [N] rows
    const void *regions;  // [images * R] rows; CLUSTERS: stages of each group of images, as stream.h takes them
    const int *word_exponent, *region_exponent;  // [N], [images * R]: a row holds x / 2^exponent; or null
    const int *count;     // [images] regions of each image; or null: R
    const int *first;     // [tiles + 1]
    const int *caption, *begin, *end;  // [captions]
    const int *row;       // [tiles * SLOTS] the word's row, or -1
    const int *owner;     // [tiles * SLOTS] its caption, counted within the tile; 0 where there is none
    const int *wide;      // [1 + captions + images] whether there is any wide row, and where; or null
    int images, R, captions, chunks, tiles;
    int for_wide;  // whether this launch computes the pairs with wide rows, or the others
    int *failed;   // CLUSTERS: whether any block has ever given up waiting
};

template <Kind KIND_, int COLUMNS_, int SLOTS_, int SIDE_, int STAGES_ = 2, bool CLUSTERS_ = false> struct Tile {
    static constexpr Kind KIND = KIND_;
    static constexpr bool CLUSTERS = CLUSTERS_;
    static constexpr int COLUMNS = COLUMNS_, SLOTS = SLOTS_, SIDE = SIDE_;
    static constexpr int MOST = CLUSTERS ? 288 : 72;  // columns of a warp, for more than one image
    static constexpr int WARP_IMAGES = COLUMNS > MOST ? 1 : MOST / COLUMNS, WARP_COLUMNS = WARP_IMAGES * COLUMNS;
    static constexpr int WARP_ROWS = SIDE == 2 ? 32 : 16, THREADS = SLOTS / WARP_ROWS * SIDE * 32;
    static constexpr int IMAGES = SIDE * WARP_IMAGES, WIDTH = SIDE * WARP_COLUMNS;
    static constexpr int BLOCKS_M = WARP_ROWS / 16, BLOCKS_N = WARP_COLUMNS / 8;  // of accumulators [16, 8]
    static constexpr int BLOCKS = (COLUMNS + 7) / 8;                              // of an image
    static constexpr int STAGES = STAGES_, STAGE = (SLOTS + WIDTH) * 128;  // of a product, in shared memory
    // Distance of rows of floats in shared memory, 24 modulo 32, so that a warp that writes its accumulators by pairs
    // meets no bank twice.
    static constexpr int LD = (WIDTH + 7) / 32 * 32 + 24;
    static constexpr int VALUES = SLOTS * LD * 4, WORK = STAGES * STAGE > VALUES ? STAGES * STAGE : VALUES;
    static constexpr int RING = sizeof(Ring<CLUSTERS ? STAGES : 0>);
    static constexpr int SHARED = WORK + CAPTIONS * LD * 4 + (CLUSTERS ? RING : 0);
    static_assert(COLUMNS % 4 == 0 && WARP_COLUMNS % 8 == 0 && SLOTS % WARP_ROWS == 0);
    using Accumulators = float[BLOCKS_M][BLOCKS_N][4];
};

// Which tile and which images a block has, and a thread's place in it.
template <class T> struct Place {
    int tile, first_image, images;  // this group's images
    int member, captions;           // the tile's first member, and how many it has
    int lane, warp_row, warp_image, g, t;

    __device__ __forceinline__ explicit Place(const Pairs &p) {
        const int tiles = T::CLUSTERS ? (p.tiles + 1) / 2 : p.tiles;  // or pairs of tiles
        const int groups = (p.images + T::IMAGES - 1) / T::IMAGES, in_band = BAND * tiles;
        const int band = blockIdx.x / in_band, left = groups - band * BAND, high = left < BAND ? left : BAND;
        const int index = blockIdx.x % in_band;
        tile = T::CLUSTERS ? index / high * 2 + blockIdx.y : index / high;
        const bool empty = tile >= p.tiles;  // the second of the last two
        if (empty) --tile;
        first_image = (band * BAND + index % high) * T::IMAGES;
        images = min(T::IMAGES, p.images - first_image);
        member = p.first[tile];
        captions = empty ? 0 : p.first[tile + 1] - member;
        const int warp = threadIdx.x / 32;
        lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        warp_row = warp / T::SIDE * T::WARP_ROWS, warp_image = warp % T::SIDE * T::WARP_IMAGES;
    }
    // Whether this launch computes the pair of a member, counted within the tile, and an image, within the group.
    __device__ __forceinline__ bool computes(const Pairs &p, int caption, int image) const {
        if (!p.wide || !*p.wide) return !p.for_wide;
        const int *wide = p.wide + 1;
        return (wide[p.caption[member + caption]] | wide[p.captions + first_image + image]) == p.for_wide;
    }
    __device__ __forceinline__ bool computes_any(const Pairs &p) const {
        if (!p.wide || !*p.wide) return !p.for_wide;
        for (int i = 0; i < captions * images; ++i)
            if (computes(p, i % captions, i / captions)) return true;
        return false;
    }
    __device__ __forceinline__ int regions(const Pairs &p, int image) const {  // image within the group
        if (image >= images) return 0;  // unseen: else reads behind the last image
        return p.count ? p.count[first_image + image] : p.R;
    }
};

// A row of a stage is 128 bytes, 8 chunks of 16. Chunk c of row r lies at c ^ (r % 8): the same chunk of eight rows is
// in eight different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// x * 2^exponent; in two steps, as one power of two may lie beyond float32.
__device__ __forceinline__ float scaled(float x, int exponent) {
    exponent = exponent < -252 ? -252 : exponent > 252 ? 252 : exponent;
    const int half = exponent >> 1;
    return x * as_float(unsigned(half + 127) << 23) * as_float(unsigned(exponent - half + 127) << 23);
}

// The products of one stage: two chunks of every row at a time.
template <class T>
__device__ __forceinline__ void multiply_stage(typename T::Accumulators &acc, const unsigned char *words,
                                               const Place<T> &at) {
    constexpr Kind KIND = T::KIND;
    const unsigned char *regions = words + T::SLOTS * 128;
    const int lane = at.lane, first_column = at.warp_image * T::COLUMNS;
#pragma unroll
    for (int k = 0; k < (KIND == F16X3 ? 2 : 4); ++k) {
        unsigned a[T::BLOCKS_M][4], less_a[T::BLOCKS_M][4], b[4], less_b[4];
#pragma unroll
        for (int m = 0; m < T::BLOCKS_M; ++m) {
            int row = at.warp_row + m * 16 + lane % 16;
            load_matrices(a[m], words + swizzled(row, 2 * k + lane / 16));
            if constexpr (KIND == F16X3) load_matrices(less_a[m], words + swizzled(row, 4 + 2 * k + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < T::BLOCKS_N; ++n) {
            if (n % 2 == 0) {  // two blocks of 8 regions at a time; the last of an odd number twice
                int row = first_column + (n + (n + 1 < T::BLOCKS_N ? lane / 16 : 0)) * 8 + lane % 8;
                load_matrices(b, regions + swizzled(row, 2 * k + lane / 8 % 2));
                if constexpr (KIND == F16X3) load_matrices(less_b, regions + swizzled(row, 4 + 2 * k + lane / 8 % 2));
            }
            const int i = n % 2 * 2;
#pragma unroll
            for (int m = 0; m < T::BLOCKS_M; ++m) {
                if constexpr (KIND == F16X3) {
                    multiply<F16>(acc[m][n], less_a[m], b[i], b[i + 1]);
                    multiply<F16>(acc[m][n], a[m], less_b[i], less_b[i + 1]);
                    multiply<F16>(acc[m][n], a[m], b[i], b[i + 1]);
                } else if constexpr (KIND == TF32X3)
                    multiply_floats<KIND>(acc[m][n], a[m], b[i], b[i + 1]);
                else
                    multiply<KIND>(acc[m][n], a[m], b[i], b[i + 1]);
            }
        }
    }
}

// Multiplies the affinities of rows that have exponents by these powers of two.
template <class T>
__device__ __forceinline__ void apply_exponents(typename T::Accumulators &acc, const Pairs &p, const Place<T> &at) {
    if (!p.word_exponent) return;
#pragma unroll
    for (int n = 0; n < T::BLOCKS_N; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = n * 8 + 2 * at.t + i, image = at.warp_image + column / T::COLUMNS;
            const int region = column % T::COLUMNS;
            if (region >= at.regions(p, image)) continue;  // unseen: else reads behind the last exponent
            const int exponent = p.region_exponent[(at.first_image + image) * p.R + region];
#pragma unroll
            for (int m = 0; m < T::BLOCKS_M; ++m)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int row = p.row[at.tile * T::SLOTS + at.warp_row + m * 16 + at.g + 8 * j];
                    if (row >= 0) acc[m][n][2 * j + i] = scaled(acc[m][n][2 * j + i], exponent + p.word_exponent[row]);
                }
        }
}

// The affinities of the tile's words with the group's regions. Uses the first STAGES stages of shared memory; on return
// other threads may still read them.
template <class T>
__device__ __forceinline__ void affinities(typename T::Accumulators &acc, unsigned char *shared, const Pairs &p,
                                           const Place<T> &at) {
#pragma unroll
    for (int m = 0; m < T::BLOCKS_M; ++m)
#pragma unroll
        for (int n = 0; n < T::BLOCKS_N; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[m][n][j] = 0;

    // A thread copies one chunk of every ROWS-th row, first of the words and then of the regions.
    constexpr int ROWS = T::THREADS / 8, WORDS = T::SLOTS / ROWS, REGIONS = (T::WIDTH + ROWS - 1) / ROWS;
    const int row0 = threadIdx.x / 8, chunk = threadIdx.x % 8, to = swizzled(row0, chunk);
    unsigned from[WORDS + REGIONS];  // chunk's place among all chunks, or NOTHING
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const int row = p.row[at.tile * T::SLOTS + row0 + i * ROWS];
        from[i] = row < 0 ? NOTHING : unsigned(row) * p.chunks + chunk;
    }
#pragma unroll
    for (int i = 0; i < REGIONS; ++i) {
        const int column = row0 + i * ROWS, image = column / T::COLUMNS, region = column % T::COLUMNS;
        // The comparison with the image's regions is redundant for results, which leave the others out. Their rows are
        // not read to save the traffic, and behind the last image there are none.
        const bool real = column < T::WIDTH && region < at.regions(p, image);  // redundant, see above
        from[WORDS + i] = real ? unsigned((at.first_image + image) * p.R + region) * p.chunks + chunk : NOTHING;
    }
    const int steps = (p.chunks + 7) / 8;
    auto load = [&](int step) {
        if (step < steps) {
            unsigned char *stage = shared + step % T::STAGES * T::STAGE + to;
            const bool inside = step * 8 + chunk < p.chunks;
#pragma unroll
            for (int i = 0; i < WORDS + REGIONS; ++i) {
                const char *rows = static_cast<const char *>(i < WORDS ? p.words : p.regions);
                const bool real = inside && from[i] != NOTHING;
                const int row = i < WORDS ? i * ROWS : T::SLOTS + (i - WORDS) * ROWS;
                if (row + ROWS <= T::SLOTS + T::WIDTH || row + row0 < T::SLOTS + T::WIDTH)
                    copy_async(stage + row * 128, rows + (real ? (from[i] + step * 8ull) * 16 : 0), real);
            }
        }
        commit();
    };
#pragma unroll
    for (int step = 0; step < T::STAGES - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
        wait_groups<T::STAGES - 2>();
        __syncthreads();  // this step's stage has landed, and the step before has been read
        load(step + T::STAGES - 1);
        multiply_stage<T>(acc, shared + step % T::STAGES * T::STAGE, at);
    }

    apply_exponents<T>(acc, p, at);
}

// The same in clusters. Uses all stages and the ring behind the work; returns 0, or NaN where the block has given up
// waiting, and then the affinities are wrong. On return no thread reads a stage.
template <class T>
__device__ __forceinline__ float affinities_in_clusters(typename T::Accumulators &acc, unsigned char *shared,
                                                        const Pairs &p, const Place<T> &at) {
    constexpr int STAGE = T::WIDTH * 128, HALF = T::WIDTH / 2, ROWS = T::THREADS / 8, EACH = T::SLOTS / ROWS;
    constexpr Kind STORED = T::KIND == F16X3 ? F16 : T::KIND;
    static_assert(T::SIDE == 1 && T::BLOCKS_M == 1 && STAGE % 1024 == 0 && HALF * 128 % 1024 == 0);
    auto &left = reinterpret_cast<float(&)[HALF / 8][4]>(acc[0][0]);
    auto &right = reinterpret_cast<float(&)[HALF / 8][4]>(acc[0][HALF / 8]);
    const int steps = (p.chunks + 7) / 8, group = at.first_image / T::IMAGES;
    Stream<T::STAGES, STAGE> regions;
    regions.begin(shared, *reinterpret_cast<Ring<T::STAGES> *>(shared + T::SHARED - T::RING),
                  static_cast<const char *>(p.regions) + group * (long long)steps * STAGE, steps, p.failed);
    unsigned char *words = shared + T::STAGES * STAGE;  // a thread copies one chunk of every ROWS-th row
    const int row0 = threadIdx.x / 8, chunk = threadIdx.x % 8;
    int row[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) row[i] = p.row[at.tile * T::SLOTS + row0 + i * ROWS];
    auto load = [&](int step) {
        if (step < steps) {
            unsigned char *to = words + step % T::STAGES * (T::SLOTS * 128) + swizzled(row0, chunk);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const bool real = row[i] >= 0 && step * 8 + chunk < p.chunks;
                const unsigned long long at_chunk = row[i] * (unsigned long long)p.chunks + step * 8 + chunk;
                const char *from = static_cast<const char *>(p.words) + (real ? at_chunk * 16 : 0);
                copy_async(to + i * ROWS * 128, from, real);
            }
        }
        commit();
    };
#pragma unroll
    for (int n = 0; n < T::BLOCKS_N; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[0][n][j] = 0;
#pragma unroll
    for (int step = 0; step < T::STAGES - 1; ++step) load(step);
    unsigned own[4][4];
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        group_wait<0>(own);
        wait_groups<T::STAGES - 2>();
        regions.wait();
        __syncthreads();  // this step's stage has landed, and the step before has been read
        load(step + T::STAGES - 1);
        const unsigned char *mine = words + step % T::STAGES * (T::SLOTS * 128);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            load_matrices(own[k], mine + swizzled(at.warp_row + at.lane % 16, 2 * k + at.lane / 16));
        const unsigned char *stage = shared + regions.place() * STAGE;
        group_fence(left, right, own);
        for_products<T::KIND>([&](int a, int b) {
            group_multiply<STORED, HALF, true, false>(left, own[a], described(stage + b * 32));
            group_multiply<STORED, HALF, true, false>(right, own[a], described(stage + HALF * 128 + b * 32));
        });
        group_commit();
        regions.pass();
    }
    group_wait<0>(left, right);
    const float gave_up = regions.end();
    apply_exponents<T>(acc, p, at);
    return gave_up;
}

// Writes the accumulators to `values` [SLOTS][LD].
template <class T>
__device__ __forceinline__ void store(float *values, const typename T::Accumulators &acc, const Place<T> &at) {
#pragma unroll
    for (int m = 0; m < T::BLOCKS_M; ++m)
#pragma unroll
        for (int n = 0; n < T::BLOCKS_N; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row = at.warp_row + m * 16 + at.g + 8 * j;
                const int column = at.warp_image * T::COLUMNS + n * 8 + 2 * at.t;
                *reinterpret_cast<float2 *>(values + row * T::LD + column) = {acc[m][n][2 * j], acc[m][n][2 * j + 1]};
            }
}

// An image's accumulators of 16 words, moved so that lane t has regions 8n + 2t and 8n + 2t + 1 in [n], wherever the
// image stands in its warp, where it is number `image`: sums over its regions then have the same bits everywhere.
template <class T>
__device__ __forceinline__ void take_image(float (&to)[T::BLOCKS][4], const float (&acc)[T::BLOCKS_N][4], int image,
                                           int t) {
    const int first = image * T::COLUMNS / 8;
#pragma unroll
    for (int n = 0; n < T::BLOCKS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (image * T::COLUMNS % 8 == 0)
                to[n][j] = acc[first + n][j];
            else {  // it begins in the middle of a block
                const float left = acc[first + n][j];
                const float right = first + n + 1 < T::BLOCKS_N ? acc[first + n + 1][j] : 0;
                to[n][j] = shuffle_xor(t < 2 ? right : left, 2);
            }
        }
}
