// Two blocks of a cluster, which run at once on neighbouring multiprocessors (compute capability 9.0 and above): what
// both need is read from L2 once and lands in the shared memory of both, at the same place. Beside each instruction its
// twin for the emulator.
//
// An mbarrier counts arrivals and the bytes of copies that name it. Its phase ends when all of both have come, and the
// next one begins. Who waits for the phases in turn gives their parity: 0, 1, 0, 1, and so on.
//
// Waits are bounded, so that no mistake and no fault keeps a GPU busy for ever; see `wait_for`.
#pragma once
#include "gpu.h"

constexpr int CLUSTER = 2;  // blocks
#if defined(ITM_EMULATE) || __CUDA_ARCH__ < 900  // older GPUs have no clusters, and NVRTC refuses the attribute
#define IN_CLUSTERS
#else
#define IN_CLUSTERS __cluster_dims__(1, CLUSTER, 1)  // neighbours in y
#endif

using Barrier = unsigned long long;  // an mbarrier, in shared memory
constexpr unsigned TRY_NS = 1000;    // about how long a try to wait takes
#ifdef ITM_EMULATE
constexpr int TRIES = 2;
#else
constexpr int TRIES = 1 << 20;  // about a second, or somewhat longer than that
#endif

#ifndef ITM_EMULATE
__device__ __forceinline__ unsigned shared_address(const void *at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
#endif

// This block's number within its cluster.
__device__ __forceinline__ unsigned place_in_cluster() {
#ifdef ITM_EMULATE
    return emulator::current->block;
#else
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#endif
}

// All threads of the cluster wait for each other. What they have written before is seen by all after it.
__device__ __forceinline__ void cluster_barrier() {
#ifdef ITM_EMULATE
    emulator::cluster_barrier();
#else
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Makes an mbarrier whose phases take one arrival. After `fence_barriers` and `cluster_barrier` the other block may use
// it.
__device__ __forceinline__ void make_barrier(Barrier *at) {
#ifdef ITM_EMULATE
    emulator::make_barrier(at);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(at)) : "memory");
#endif
}
__device__ __forceinline__ void fence_barriers() {
#ifdef ITM_EMULATE
    emulator::fence_barriers();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives at the mbarrier that lies at the same place in the other block. What this thread has seen or written before
// comes before what a thread does that has waited for it.
__device__ __forceinline__ void arrive_at_other(Barrier *at) {
#ifdef ITM_EMULATE
    emulator::arrive_at_other(at);
#else
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(at)),
                 "r"(place_in_cluster() ^ 1)
                 : "memory");
#endif
}

// Arrives at a mbarrier of this block, whose phase then also takes so many bytes of copies.
__device__ __forceinline__ void expect_bytes(Barrier *at, unsigned bytes) {
#ifdef ITM_EMULATE
    emulator::expect_bytes(at, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes)
                 : "memory");
#endif
}

// Starts to copy a multiple of 16 bytes to the same place in both blocks. The mbarrier at `counted` in each of them
// counts what has landed there.
__device__ __forceinline__ void copy_to_both(void *to, const void *from, unsigned bytes, Barrier *counted) {
#ifdef ITM_EMULATE
    emulator::copy_to_both(to, from, bytes, counted);
#else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(counted)), "h"(static_cast<unsigned short>(3))
                 : "memory");
#endif
}

// Whether the phase of this parity has ended; waits for a while.
__device__ __forceinline__ bool ends(Barrier *at, unsigned parity) {
#ifdef ITM_EMULATE
    return emulator::wait_for(at, parity);
#else
    unsigned ended;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2, %3;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(shared_address(at)), "r"(parity), "r"(TRY_NS)
                 : "memory");
    return ended;
#endif
}

// Waits for the end of the phase of this parity; not for ever, and where `given_up` is set, in shared memory, not at
// all. Where it gives up it sets that and `failed`, which the host reads: what the block computes is then wrong.
__device__ __forceinline__ void wait_for(Barrier *at, unsigned parity, volatile int *given_up, volatile int *failed) {
    for (int i = 0; !ends(at, parity); ++i)
        // Redundant but for the number of tries: what has failed before only ends this wait sooner.
        if (*given_up || i == TRIES || (i % 1024 == 1023 && *failed)) {  // redundant, see above
            *given_up = 1;
            *failed = 1;
            return;
        }
}
