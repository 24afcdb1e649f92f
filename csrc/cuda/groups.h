// Products of a tile of nodes by groups of four warps (`NodeTile` with GROUPS, nodes.h); see hopper.h.
#pragma once
#include "hopper.h"
#include "stream.h"
#include "tile.h"

// acc += A W^T by groups of warps, over the numbers of a stage of W. A warp's 16 rows of A are `a`, as in a stage.
template <class T>
__device__ __forceinline__ void multiply_stage(typename T::Products &acc, unsigned (&a)[4][4], const unsigned char *stage) {
    group_fence(acc[0], a);
    for_products<T::KIND>([&](int own, int of_stage) {
        group_multiply<Numbers<T::KIND>::STORED, T::S, true, false>(acc[0], a[own], described(stage + of_stage * 32));
    });
    group_commit();
}

// `project` by groups of warps, which make one stage of A while they multiply the one before: `load(step)` starts the
// copies that it needs, `begin(step, made)` products, after a fence and as one group, and `finish(step, made)` makes the
// warp's rows of what these give, DEPTH numbers each.
template <class T, class Load, class Begin, class Finish>
__device__ __forceinline__ void project_by_groups(typename T::Products &acc, typename T::Shared &sh, const void *weight,
                                                  int chunks, typename T::Matrices &matrices, Load load, Begin begin,
                                                  Finish finish) {
    auto start = [&](int step, int made) {
        if (!T::CLUSTERS && step >= 0 && step * T::NARROW < chunks)
            copy_rows<T::S, T::NARROW>(sh.stage[step % 2], step * T::NARROW, chunks, weight,
                                       [&](int row) { return row_of(weight, row, chunks); });
        if (made * T::NARROW < chunks) load(made);
        commit();
    };
    auto landed = [&] {
        wait_groups<0>();
        fence_products();
        __syncthreads();  // what was copied is there, and what the products before have read can be overwritten
    };
    float made[8][4];
    unsigned a[4][4];
    auto keep = [&] {  // once no product reads `a`
#pragma unroll
        for (int k = 0; k < T::DEPTH / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float *both = made[2 * k + i / 2] + i % 2 * 2;
                a[k][i] = rounded<Numbers<T::KIND>::STORED>(both[0], both[1]);
                if constexpr (T::PAIRS)
                    a[2 + k][i] = to_halves(both[0] - half_of(a[k][i], false), both[1] - half_of(a[k][i], true));
            }
    };
    const int last = (chunks + T::NARROW - 1) / T::NARROW - 1;
    clear(acc);
    start(-1, 0);
    landed();
    start(0, 1);
    begin(0, made);
    group_wait<0>(made);
    finish(0, made);
    keep();
#pragma unroll 1
    for (int step = 0; step < last; ++step) {
        matrices.wait();
        landed();
        start(step + 1, step + 2);
        begin(step + 1, made);
        multiply_stage<T>(acc, a, sh.stage[T::CLUSTERS ? matrices.place() : step % 2]);
        matrices.pass();
        group_wait<1>(made);
        finish(step + 1, made);
        group_wait<0>(acc[0], made, a);
        keep();
    }
    matrices.wait();
    landed();
    multiply_stage<T>(acc, a, sh.stage[T::CLUSTERS ? matrices.place() : last % 2]);
    matrices.pass();
    group_wait<0>(acc[0]);
}
