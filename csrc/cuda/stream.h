// Matrices of weights that all tiles multiply with, for the two blocks of a cluster together: they lie in memory as
// stages of BYTES, in the order of their use and as products read them, and pass through PLACES places in shared
// memory. Each block copies one half of a stage to both blocks.
//
// For each stage a block calls `wait`; a barrier of its own, after which no thread reads the stage before; and `pass`,
// which thread 0 takes its time for: it copies a later stage to the place of the one before, once the other block has
// read that too. So it comes after products that run meanwhile.
#pragma once
#include "cluster.h"

template <int PLACES> struct Ring {  // in shared memory
    Barrier full[PLACES], empty[PLACES];  // of each place: its stage is there, and the other block has read it
    int given_up;
};
template <> struct Ring<0> {};

template <int PLACES, int BYTES> struct Stream {  // a thread's
    unsigned char *places;
    Ring<PLACES> *ring;
    const unsigned char *from;
    int *failed;
    int stages, now;  // all, and the one to take

    // All threads of the cluster call this. `from`: the first stage in memory.
    __device__ __forceinline__ void begin(unsigned char *places, Ring<PLACES> &own, const void *from, int stages,
                                          int *failed) {
        this->places = places, ring = &own, this->from = static_cast<const unsigned char *>(from);
        this->stages = stages, this->failed = failed, now = 0;
        if (threadIdx.x == 0) {
            for (int i = 0; i < PLACES; ++i) make_barrier(&ring->full[i]), make_barrier(&ring->empty[i]);
            ring->given_up = 0;
            fence_barriers();
        }
        cluster_barrier();
        if (threadIdx.x == 0)
            for (int i = 0; i < PLACES - 1 && i < stages; ++i) fill(i);
    }
    __device__ __forceinline__ int place() const { return now % PLACES; }  // of the stage to take
    __device__ __forceinline__ void wait() {
        wait_for(&ring->full[now % PLACES], now / PLACES % 2, &ring->given_up, failed);
    }
    __device__ __forceinline__ void pass() {
        const int next = now++ + PLACES - 1, place = next % PLACES;
        if (threadIdx.x != 0 || next >= stages || ring->given_up) return;  // redundant, the last: waits end at once
        if (next >= PLACES) {
            arrive_at_other(&ring->empty[place]);
            wait_for(&ring->empty[place], (next / PLACES - 1) % 2, &ring->given_up, failed);
        }
        if (!ring->given_up) fill(next);  // a block that is late still reads there
    }
    // 0, or NaN where the block has given up waiting. The threads of the cluster stay until none uses another's memory.
    __device__ __forceinline__ float end() {
        cluster_barrier();
        return ring->given_up ? as_float(0x7fc00000u) : 0;
    }

private:
    __device__ __forceinline__ void fill(int stage) {
        const unsigned half = place_in_cluster() * (BYTES / 2);
        Barrier *full = &ring->full[stage % PLACES];
        expect_bytes(full, BYTES);
        copy_to_both(places + stage % PLACES * BYTES + half, from + stage * (long long)BYTES + half, BYTES / 2, full);
    }
};
template <int BYTES> struct Stream<0, BYTES> {
    __device__ __forceinline__ void begin(unsigned char *, Ring<0> &, const void *, int, int *) {}
    __device__ __forceinline__ int place() const { return 0; }
    __device__ __forceinline__ void wait() {}
    __device__ __forceinline__ void pass() {}
    __device__ __forceinline__ float end() { return 0; }
};
