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
__device__ __forceinline__ void multiply_stage(typename T::Products &acc, unsigned (&a)[4][4], const unsigned char *stage) {
    const unsigned char *rows = stage + warp_column<T>() * T::NARROW * 16;
    group_fence(acc[0], a);
    for_products<T::KIND>([&](int own, int of_stage) {
        group_multiply<Numbers<T::KIND>::STORED, T::COLUMNS, true, false>(acc[0], a[own], described(rows + of_stage * 32));
    });
    group_commit();
}

// `project` by groups of warps, which make stages of A while they multiply those before: `load(step)` starts the copies
// that a stage needs, `begin(step, made)` products, after a fence and as one group, and `finish(step, made)` makes the
// warp's rows of what these give, DEPTH numbers each.
//
// Groups that share rows make one stage each in a round, which has as many stages as there are such groups. There `finish`
// leaves the rows in shared memory, where `take(step, a)` reads the warp's.
template <class T, class Load, class Begin, class Finish, class Take>
__device__ __forceinline__ void project_by_groups(typename T::Products &acc, typename T::Shared &sh, const void *weight,
                                                  int chunks, typename T::Matrices &matrices, Load load, Begin begin,
                                                  Finish finish, Take take) {
    constexpr int SIDE = T::SIDE;
    auto start = [&](int step) {  // to copy a stage of W
        if (!T::CLUSTERS && step * T::NARROW < chunks)
            copy_rows<T::S, T::NARROW>(sh.stage[step % 2], step * T::NARROW, chunks, weight,
                                       [&](int row) { return row_of(weight, row, chunks); });
    };
    auto load_round = [&](int round) {
#pragma unroll
        for (int i = 0; i < SIDE; ++i)
            if (round * SIDE * T::NARROW < chunks) load(round * SIDE + i);
    };
    auto landed = [&] {
        commit();
        wait_groups<0>();
        fence_products();
        __syncthreads();  // what was copied is there, and what the products before have read can be overwritten
    };
    const int turn = SIDE == 1 ? 0 : threadIdx.x / GROUP;  // which stage of a round this group makes
    const int stages = (chunks + T::NARROW - 1) / T::NARROW, last = (stages - 1) / SIDE;  // the last round
    float made[8][4];
    unsigned a[4][4];
    auto keep = [&] {  // once no product reads `a`
        if constexpr (SIDE > 1) return;
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
    auto multiply = [&](int step) {
        if constexpr (SIDE > 1) take(step, a);
        multiply_stage<T>(acc, a, sh.stage[T::CLUSTERS ? matrices.place() : step % 2]);
        matrices.pass();
    };
    clear(acc);
    load_round(0);
    landed();
    start(0);
    load_round(1);
    begin(turn, made);
    group_wait<0>(made);
    finish(turn, made);
    keep();
#pragma unroll 1
    for (int round = 0; round < last; ++round) {
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
            const int step = round * SIDE + i, next = (round + 1) * SIDE + turn;
            matrices.wait();
            landed();
            start(step + 1);
            if (i == 0) load_round(round + 2), begin(next, made);
            multiply(step);
            if (i == 0) {
                group_wait<1>(made);
                finish(next, made);
            }
            group_wait<0>(acc[0], made, a);
        }
        keep();
    }
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
        const int step = last * SIDE + i;
        if (i > 0 && step == stages) break;
        matrices.wait();
        landed();
        if (i + 1 < SIDE) start(step + 1);
        multiply(step);
        group_wait<0>(acc[0], a);
    }
}
