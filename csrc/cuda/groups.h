// Products of a tile of nodes by groups of four warps (`NodeTile` with GROUPS, nodes.h); see hopper.h.
#pragma once
#include "hopper.h"
#include "stream.h"
#include "tile.h"

// The first row and the first column that a warp owns of a product [SLOTS, S].
template <class T> __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % T::DOWN * T::ROWS; }
template <class T> __device__ __forceinline__ int warp_column() {
    return T::SIDE == 1 ? 0 : threadIdx.x / 32 / T::DOWN * T::COLUMNS;
}

// acc += A W^T by groups of warps, over the numbers of a stage of W. A warp's 16 rows of A are `a`, as in a stage.
template <class T>
__device__ __forceinline__ void multiply_stage(typename T::Products &acc, unsigned (&a)[4][4],
                                               const unsigned char *stage) {
    const unsigned char *rows = stage + warp_column<T>() * T::NARROW * 16;
    group_fence(acc[0], a);
    for_products<T::KIND>([&](int own, int of_stage) {
        const auto weights = described(rows + of_stage * 32);
        group_multiply<Numbers<T::KIND>::STORED, T::COLUMNS, true, false>(acc[0], a[own], weights);
    });
    group_commit();
}

// 16 numbers of the warp's rows of a factor: sums of products, times `above` in rows g and `below` in rows g + 8.
template <Kind KIND>
__device__ __forceinline__ Factor<KIND> factor_of(const float (&left)[4], const float (&right)[4], float above,
                                                  float below) {
    Factor<KIND> to;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float unit = i % 2 ? below : above, *both = (i / 2 ? right : left) + i % 2 * 2;
        const float x = both[0] * unit, y = both[1] * unit;
        to.words[i] = rounded<Numbers<KIND>::STORED>(x, y);
        if constexpr (Numbers<KIND>::PAIRS)
            to.rest[i] = to_halves(x - half_of(to.words[i], false), y - half_of(to.words[i], true));
    }
    return to;
}

// A stage of the warp's rows, as `multiply_stage` takes it, of DEPTH columns of sums.
template <class T, int N>
__device__ __forceinline__ void make_stage(unsigned (&a)[4][4], const float (&sums)[N][4], float above, float below) {
#pragma unroll
    for (int k = 0; k < T::DEPTH / 16; ++k) {
        const auto made = factor_of<T::KIND>(sums[2 * k], sums[2 * k + 1], above, below);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[k][i] = made.words[i];
            if constexpr (T::PAIRS) a[2 + k][i] = made.rest[i];
        }
    }
}

// `project` by groups of warps, which make stages of A while they multiply those before: `load(step)` starts the copies
// that a stage needs, `begin(step, made)` products, after a fence and as one group, and `finish(step, made)` makes the
// warp's rows of what these give, DEPTH numbers each.
template <class T, class Load, class Begin, class Finish>
__device__ __forceinline__ void project_by_groups(typename T::Products &acc, typename T::Shared &sh, const void *weight,
                                                  int chunks, typename T::Matrices &matrices, Load load, Begin begin,
                                                  Finish finish) {
    auto start = [&](int step) {  // to copy a stage of W
        if (!T::CLUSTERS && step * T::NARROW < chunks)
            copy_rows<T::S, T::NARROW, true>(sh.stage[step % 2], step * T::NARROW, chunks, weight,
                                             [&](int row) { return row_of(weight, row, chunks); });
    };
    auto landed = [&] {
        commit();
        wait_groups<0>();
        fence_products();
        __syncthreads();  // what was copied is there, and what the products before have read can be overwritten
    };
    auto multiply = [&](int step, unsigned (&a)[4][4]) {
        multiply_stage<T>(acc, a, sh.stage[T::CLUSTERS ? matrices.place() : step % 2]);
        matrices.pass();
    };
    const int last = (chunks + T::NARROW - 1) / T::NARROW - 1;  // stage
    float made[8][4];
    unsigned a[4][4];
    auto take = [&] {  // the stage made, once the products before have read theirs
        group_wait<0>(acc[0], made, a);
        make_stage<T>(a, made, 1, 1);
    };
    // Where the loop begins, as the compiler moves arithmetic of `finish` behind a wait that follows it. With PAIRS it
    // moves less, and there makes products wait for each other.
    constexpr bool FIRST = !T::PAIRS;
    clear(acc);
    load(0);
    landed();
    start(0);
    if (last > 0) load(1);
    begin(0, made);
    group_wait<0>(made);
    finish(0, made);
    if (!FIRST) make_stage<T>(a, made, 1, 1);
#pragma unroll 1
    for (int step = 0; step < last; ++step) {
        if (FIRST) take();
        matrices.wait();
        landed();
        start(step + 1);
        if (step + 2 <= last) load(step + 2);
        begin(step + 1, made);
        multiply(step, a);
        group_wait<1>(made);
        finish(step + 1, made);
        if (!FIRST) take();
    }
    if (FIRST) take();
    matrices.wait();
    landed();
    multiply(last, a);
    group_wait<0>(acc[0], a);
}
