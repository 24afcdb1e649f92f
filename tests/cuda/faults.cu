// A small kernel with one fault at a time, for the tests of the emulator: each must be noticed.
//
// A block of 64 threads copies 2 x 64 pieces of 16 bytes to shared memory, each step into the same place, and thread i
// adds up the first numbers of pieces 63 - i. So it reads what a thread of the other warp has copied.
#include "cluster.h"
#include "hopper.h"

enum Fault {
    NOTHING,
    NO_BARRIER,         // between a piece's copy and its use
    NO_SECOND_BARRIER,  // between its use and the copy that takes its place
    NO_WAIT,            // for a copy before its use
    NO_WAIT_EVER,       // not even before the end
    HALF_A_WARP,   // in an operation of the warp
    HALF_A_BLOCK,  // in a barrier
    OUTSIDE,       // of shared memory
    UNWRITTEN,     // shared memory is read
    ODD_ADDRESS,   // of a copy
};

struct Unsound {
    const float *from;  // [2, 64, 4]
    float *to;          // [64]
};

template <Fault FAULT> __global__ void unsound(Unsound p) {
    DYNAMIC_SHARED(memory, 1024);
    const int i = threadIdx.x;
    float sum = 0;
    for (int step = 0; step < 2; ++step) {
        unsigned char *place = memory + 16 * (FAULT == OUTSIDE ? i + 1 : i) + (FAULT == ODD_ADDRESS ? 4 : 0);
        if (FAULT != UNWRITTEN || i > 0) copy_async(place, p.from + (step * 64 + i) * 4, true);
        commit();
        if (FAULT != NO_WAIT && FAULT != NO_WAIT_EVER) wait_groups<0>();
        if (FAULT != NO_BARRIER && (FAULT != HALF_A_BLOCK || i < 32)) __syncthreads();
        sum += reinterpret_cast<const float *>(memory)[(63 - i) * 4];
        if (FAULT != NO_SECOND_BARRIER) __syncthreads();
    }
    if (FAULT != NO_WAIT_EVER) wait_groups<0>();
    if (FAULT != HALF_A_WARP || i % 2) sum += shuffle_xor(sum, 1);
    p.to[i] = sum;
}

// A warp reads four matrices of 8 rows of 16 bytes, whose rows are PITCH bytes apart.
template <int PITCH> __global__ void matrices(Unsound p) {
    DYNAMIC_SHARED(memory, 32 * PITCH);
    for (int i = threadIdx.x; i < 8 * PITCH; i += 32) reinterpret_cast<float *>(memory)[i] = i;
    __syncthreads();
    unsigned r[4];
    load_matrices(r, memory + threadIdx.x * PITCH);
    p.to[threadIdx.x] = as_float(r[0]) + as_float(r[3]);
}

enum GroupFault {
    GROUP_NOTHING,
    GROUP_NO_FENCE,       // before a product
    GROUP_NO_COMMIT,
    GROUP_NO_WAIT,        // before sums are read
    GROUP_NO_WAIT_EVER,   // not even before the end
    GROUP_NO_COPY_FENCE,  // between a copy and the product that reads it
    GROUP_NO_BARRIER,
    GROUP_REGISTERS,      // of a factor are written before the product is done
    GROUP_OVERWRITTEN,    // the factor in shared memory is, by another warp
    GROUP_HALF,           // two of four warps start a product
    GROUP_ODD_PLACE,      // of the factor in shared memory
    GROUP_OUTSIDE,        // of shared memory
};

struct Grouped {
    const unsigned *a;  // [64, 16] float16 numbers, by twos
    const float4 *b;    // [64, 64] of them, by eights
    float *to;          // [64, 64]
};

// A B^T by a group of four warps, of columns 16 to 31 of B; or A times rows 16 to 31 of B, TRANSPOSED.
template <GroupFault FAULT, bool TRANSPOSED> __global__ void grouped(Grouped p) {
    DYNAMIC_SHARED(memory, 9 << 10);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned char *place = memory + (FAULT == GROUP_ODD_PLACE ? 512 : FAULT == GROUP_OUTSIDE ? 2048 : 0);
    for (int i = threadIdx.x; i < 64 * 8; i += 128) {
        const int row = i / 8, to = row * 128 + ((i % 8 ^ row % 8) << 4);
        if (FAULT != GROUP_OUTSIDE || row < 56) copy_async(place + to, p.b + i, true);
    }
    commit();
    wait_groups<0>();
    if (FAULT != GROUP_NO_COPY_FENCE) fence_products();
    if (FAULT != GROUP_NO_BARRIER) __syncthreads();
    unsigned a[4];
    for (int i = 0; i < 4; ++i) a[i] = p.a[(warp * 16 + g + i % 2 * 8) * 8 + i / 2 * 4 + t];
    float d[8][4];
    if (FAULT != GROUP_NO_FENCE) group_fence();
    if (FAULT != GROUP_HALF || warp < 2)
        group_multiply<F16, 64, false, TRANSPOSED>(d, a, described(place + (TRANSPOSED ? 16 * 128 : 32)));
    if (FAULT != GROUP_NO_COMMIT) group_commit();
    if (FAULT == GROUP_REGISTERS) a[1] = 0;
    if (FAULT == GROUP_OVERWRITTEN && warp == 3)
        for (int i = lane; i < 64 * 32; i += 32) reinterpret_cast<unsigned *>(place)[i] = 0;
    if (FAULT != GROUP_NO_WAIT && FAULT != GROUP_NO_WAIT_EVER) group_wait<0>();
    for (int n = 0; n < 8; ++n)
        for (int j = 0; j < 4; ++j) p.to[(warp * 16 + g + j / 2 * 8) * 64 + n * 8 + 2 * t + j % 2] = d[n][j];
    if (FAULT != GROUP_NO_WAIT_EVER) group_wait<0>();
    __syncthreads();
}

enum ClusterFault {
    CLUSTER_NOTHING,
    CLUSTER_NO_FENCE,          // after the mbarriers were made
    CLUSTER_NO_FIRST_BARRIER,  // before the other block's are used
    CLUSTER_NO_LAST_BARRIER,   // before a block ends
    CLUSTER_NO_ARRIVAL,        // at the other block
    CLUSTER_TWO_ARRIVALS,
    CLUSTER_FEW_BYTES,         // are expected
    CLUSTER_MANY_BYTES,
    CLUSTER_NO_WAIT,           // for a copy before its use
    CLUSTER_NO_OTHER_WAIT,     // for the other block, before the copy that takes the place of what it reads
    CLUSTER_PARITY,            // is always 0
    CLUSTER_HASTY,             // copies although it has given up waiting for the other block
};

struct Clustered {
    const float *from;  // [8, 256]
    float *to;          // [2, 256]
    int *failed;
};

// Both blocks of a cluster add up the rows of `from`, of which each copies one half to both, into two places in turn.
// Warps of 32 threads add the same numbers, one after the other.
template <ClusterFault FAULT> __global__ void IN_CLUSTERS clustered(Clustered p) {
    DYNAMIC_SHARED(memory, 2 * 1024 + 40);
    auto *barriers = reinterpret_cast<Barrier *>(memory + 2 * 1024);  // full, full, empty, empty
    auto *given_up = reinterpret_cast<int *>(barriers + 4);
    const int half = place_in_cluster() * 512;
    auto wait = [&](int which, int phase) {
        wait_for(barriers + which, FAULT == CLUSTER_PARITY ? 0 : phase % 2, given_up, p.failed);
    };
    auto fill = [&](int step) {
        unsigned char *to = memory + step % 2 * 1024 + half;
        expect_bytes(barriers + step % 2, FAULT == CLUSTER_FEW_BYTES ? 512 : FAULT == CLUSTER_MANY_BYTES ? 2048 : 1024);
        copy_to_both(to, p.from + step * 256 + half / 4, 512, barriers + step % 2);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; ++i) make_barrier(barriers + i);
        *given_up = 0;
        if (FAULT != CLUSTER_NO_FENCE) fence_barriers();
    }
    if (FAULT != CLUSTER_NO_FIRST_BARRIER) cluster_barrier();
    if (threadIdx.x == 0) fill(0), fill(1);
    float sum[8] = {};
    for (int step = 0; step < 8; ++step) {
        if (FAULT != CLUSTER_NO_WAIT) wait(step % 2, step / 2);
        sync_warp();
        for (int i = 0; i < 8; ++i)
            sum[i] += reinterpret_cast<const float *>(memory + step % 2 * 1024)[i * 32 + threadIdx.x % 32];
        __syncthreads();
        if (threadIdx.x == 0 && !*given_up) {
            if (FAULT != CLUSTER_NO_ARRIVAL) arrive_at_other(barriers + 2 + step % 2);
            if (FAULT == CLUSTER_TWO_ARRIVALS) arrive_at_other(barriers + 2 + step % 2);
            if (step > 5) continue;
            if (FAULT != CLUSTER_NO_OTHER_WAIT) wait(2 + step % 2, step / 2);
            if (!*given_up || FAULT == CLUSTER_HASTY) fill(step + 2);
        }
    }
    if (FAULT != CLUSTER_NO_LAST_BARRIER) cluster_barrier();
    float *to = p.to + blockIdx.y * 256 + threadIdx.x % 32;
    for (int i = 0; i < 8; ++i) to[i * 32] = *given_up ? as_float(0x7fc00000u) : sum[i];
}
