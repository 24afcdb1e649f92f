// A step of SGR but the last one by groups of warps (`NodeTile` with GROUPS, nodes.h), where a warp has 16 rows, all of
// one caption: what they ask, their edges and their sums of nodes along them stay in its registers.
#pragma once
#include "steps.h"

// acc = A W^T, a stage at a time: `take(step, a)` gives the warp's rows of A. What `ahead(step)` does for it runs while
// the products of the stage before do. The caller has passed a barrier since a stage was last read.
template <class T, class Ahead, class Take>
__device__ __forceinline__ void weighted_by_groups(typename T::Products &acc, GraphShared<T> &sh, const void *weight,
                                                   typename T::Matrices &matrices, Ahead ahead, Take take) {
    constexpr int STEPS = T::S / T::DEPTH;
    auto load = [&](int step) {
        if constexpr (T::CLUSTERS) return;
        copy_rows<T::S, T::NARROW, true>(sh.tile.stage[step % 2], step * T::NARROW, T::WIDE, weight,
                                         [&](int r) { return row_of(weight, r, T::WIDE); });
        commit();
    };
    unsigned a[4][4];
    clear(acc);
    load(0);
    ahead(0);
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        group_wait<0>(a);
        take(step, a);
        const int stage = T::CLUSTERS ? matrices.place() : step % 2;
        matrices.wait();
        wait_groups<0>();
        fence_products();
        __syncthreads();  // this stage has landed, and the other one has been read
        if (step + 1 < STEPS) load(step + 1);
        multiply_stage<T>(acc, a, sh.tile.stage[stage]);
        matrices.pass();
        if (step + 1 < STEPS) ahead(step + 1);
    }
    group_wait<0>(acc[0]);
}

// X = relu(E X Wr^T + br).
template <class T>
__device__ __forceinline__ void step_by_groups(const Graph &p, GraphShared<T> &sh, int step,
                                               typename T::Matrices &matrices) {
    constexpr Kind KIND = T::KIND;
    constexpr bool SCALED = T::SCALED;
    constexpr int LONGEST = T::LONGEST / 16;  // blocks of 16 slots of a caption
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = warp_row<T>();
    const int begin = sh.tile.begin[first / 16], blocks = sh.tile.end[first / 16] - begin;
    const float from_nodes = power(-nodes_exponent(sh, step, begin));
    const float *shift = p.shift + step * T::S, *bias = p.bias + step * T::S;
    typename T::Products acc;
    auto each = [&](auto change) {
#pragma unroll
        for (int n = 0; n < T::N; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) change(j, n * 8 + 2 * t, acc[0][n] + 2 * j);
    };
    if (SCALED && int(threadIdx.x) < T::BLOCKS) sh.nodes_top[(step + 1) % 2][threadIdx.x] = 0;

    auto own_rows = [&](int stage, unsigned (&a)[4][4]) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            load_matrices(a[k], sh.x() + place<T::WIDE>(first + lane % 16, stage * T::NARROW + 2 * k + lane / 16));
    };
    weighted_by_groups<T>(acc, sh, matrix_of<T>(p.ask, step), matrices, [](int) {}, own_rows);
    each([&](int, int c, float *x) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (SCALED) x[i] *= from_nodes * power(p.ask_exponent[step * T::S + c + i]);
            x[i] += shift[c + i];
        }
    });

    Factor<KIND> edge[LONGEST];  // 16 slots each
    float share[2];
    {
        float largest[1][2], unit[2] = {1, 1};
        if constexpr (SCALED) {
            find_largest(acc, largest);
#pragma unroll
            for (int j = 0; j < 2; ++j) unit[j] = power(stored_exponent(as_bits(largest[0][j])));
        }
        Factor<KIND> y[T::S / 16];
#pragma unroll
        for (int k = 0; k < T::S / 16; ++k) y[k] = factor_of<KIND>(acc[0][2 * k], acc[0][2 * k + 1], unit[0], unit[1]);
        float logit[1][2 * LONGEST][4];
        clear(logit);
#pragma unroll
        for (int b = 0; b < LONGEST; ++b) {
            if (b >= blocks) continue;  // redundant: saves products whose sums are masked below
#pragma unroll
            for (int k = 0; k < T::S / 16; ++k) {
                Factor<KIND> x;
                read_factor(x, [&](int rest) {
                    const int chunk = Numbers<KIND>::chunk(k * 16) + rest + lane / 8 % 2;
                    return sh.x() + place<T::WIDE>((begin + b) * 16 + lane / 16 * 8 + lane % 8, chunk);
                });
                multiply_block(logit[0][2 * b], y[k], x, 0);
                multiply_block(logit[0][2 * b + 1], y[k], x, 1);
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int mine = sh.tile.owner[first + g + 8 * j];
            float scale = 1, top = -INFINITE, total = 0;
            if constexpr (SCALED) scale = power(-stored_exponent(as_bits(largest[0][j]))) * from_nodes;
#pragma unroll
            for (int n = 0; n < 2 * LONGEST; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float &x = logit[0][n][2 * j + i];
                    const bool seen = n / 2 < blocks && sh.tile.owner[begin * 16 + n * 8 + 2 * t + i] == mine;
                    x = seen ? x * scale : -INFINITE;
                    top = x > top ? x : top;
                }
            top = quad_max(top);
#pragma unroll
            for (int n = 0; n < 2 * LONGEST; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float &x = logit[0][n][2 * j + i];
                    x = exp2f((x - top) * LOG2E);
                    total += x;
                }
            share[j] = 1 / (quad_sum(total) * T::scale());
        }
#pragma unroll
        for (int b = 0; b < LONGEST; ++b)
            edge[b] = factor_of<KIND>(logit[0][2 * b], logit[0][2 * b + 1], T::scale(), T::scale());
    }
    if constexpr (!T::CLUSTERS) __syncthreads();  // the stages have been read

    float sums[1][T::DEPTH / 8][4];  // some columns of E X
    auto gather = [&](int stage) {
        clear(sums);
#pragma unroll
        for (int b = 0; b < LONGEST; ++b) {
            if (b >= blocks) continue;
#pragma unroll
            for (int n = 0; n < T::DEPTH / 8; n += 2) {
                Factor<KIND> x;
                read_transposed(x, [&](int rest) {
                    const int chunk = Numbers<KIND>::chunk(stage * T::DEPTH + n * 8) + rest + lane / 16;
                    return sh.x() + place<T::WIDE>((begin + b) * 16 + lane % 16, chunk);
                });
                multiply_block(sums[0][n], edge[b], x, 0);
                multiply_block(sums[0][n + 1], edge[b], x, 1);
            }
        }
    };
    auto take = [&](int, unsigned (&a)[4][4]) { make_stage<T>(a, sums[0], share[0], share[1]); };
    weighted_by_groups<T>(acc, sh, matrix_of<T>(p.value, step), matrices, gather, take);
    each([&](int, int c, float *x) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (SCALED) x[i] *= from_nodes * power(p.value_exponent[step * T::S + c + i]);
            x[i] = relu(x[i] + bias[c + i]);
        }
    });
    find_tops<T>(acc, sh.nodes_top[(step + 1) % 2], first, [&](int) { return begin; });
    const float unit = power(nodes_exponent(sh, step + 1, begin));
    const int row = opaque(first + g);
    each([&](int j, int c, const float *x) {  // all warps have read X, before the barrier of the last stage
        put_node<T>(sh.tile, sh.x(), row + 8 * j, c, x[0] * unit, x[1] * unit);
    });
    __syncthreads();
}
