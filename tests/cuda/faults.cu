// A small kernel with one fault at a time, for the tests of the emulator: each must be noticed.
//
// A block of 64 threads copies 2 x 64 pieces of 16 bytes to shared memory, each step into the same place, and thread i
// adds up the first numbers of pieces 63 - i. So it reads what a thread of the other warp has copied.
#include "gpu.h"

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
