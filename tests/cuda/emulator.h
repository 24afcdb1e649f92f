// Runs a CUDA kernel's source on the CPU, so that its results and its synchronisation can be tested without a GPU.
//
// Each thread of a block is a fiber: a stack of its own that is left and entered by `switch_stacks`. Blocks run one
// after the other, in one OS thread, but those of a cluster together. Between two barriers the warps run one after the
// other, and so do the lanes between two operations of a whole warp; `order` chooses in which sequence. A kernel
// without races gives the same bits in all:
//
//   order 0, 1: ascending and descending, so that of any two threads each runs before the other once. Of the blocks of
//     a cluster one runs until it waits for the other.
//   other orders: shuffled anew after every barrier, warps of all blocks of a cluster. Threads that do something to the
//     other block are held back now and then, until all others wait.
//
// What else it checks: shared memory holds NaN until it is written; asynchronous copies land only when they are waited
// for (even orders) or at once (odd orders); all 32 lanes take part in an operation of the warp, all threads in a
// barrier; addresses are aligned and lie in shared memory. Bank conflicts of ldmatrix are counted.
//
// Products of groups of warps (csrc/cuda/hopper.h) read their factors at once (orders 0, 1), or when they are waited
// for, while their accumulators hold NaN (others). They need their fences, and the warps of a group the same products.
//
// An mbarrier (csrc/cuda/cluster.h) needs its fence before the other block uses it, and the bytes that it is told to
// expect. A block may not end while the other uses its memory, or while copies that it has started are on their way. A
// wait that nothing can end is an error; but where `lose` has a message between the blocks lost, it gives up as on a
// GPU. `hurry` has a wait give up although what it waits for would come, as where the other block is late.
#pragma once
#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches stacks by instructions of x86-64 Linux"
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
using std::max;
using std::min;

namespace emulator {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};
struct Copy {
    void *to;
    const void *from;  // null: zeros
};
struct Fiber {
    void *stack_pointer = nullptr;
    unsigned thread = 0, block = 0;  // within the block, and of that within the cluster
    bool done = false, at_barrier = false, at_cluster_barrier = false, held = false, gave_up = false;
    struct Barrier *awaited = nullptr, *hurried = nullptr;
    unsigned parity = 0;
    std::vector<Copy> copies;     // those that have not landed, in the order of their start
    std::vector<size_t> groups;   // of these, the number in each group that was committed
    size_t open = 0;              // and the number that was not
    std::vector<size_t> unseen;   // pieces of shared memory that it has copied to since its last `fence_products`
};
enum class Numbers { FLOAT16, BFLOAT16, TF32 };
// What a lane brings to a product of its group of warps: accumulators and a factor as to mma, or null and where A
// begins in shared memory; and where B begins.
struct GroupOperands {
    float *d;
    const unsigned *a;
    unsigned long long a_place, b;
};
struct Product {
    GroupOperands lane[32];
    Numbers numbers;
    int columns;
    bool add, transposed;
};
struct Warp {
    void *brought[32];  // by each lane to the operation that it waits in
    const char *operation = nullptr;
    int arrived = 0, live = 32;
    long generation = 0;
    std::vector<Product> products;                // of its group that are not done
    std::vector<size_t> groups;                   // as of a fiber's copies
    size_t open = 0;
    std::map<float *, std::vector<float>> sums;   // accumulators of products that are not done
    bool fenced = false;
    std::vector<unsigned long long> started;      // where B and A of each product since the last barrier begin
};
struct Barrier {  // an mbarrier, whose phases take one arrival
    unsigned phase = 0;
    long missing = 1, bytes = 0;  // arrivals and bytes that this phase lacks
    unsigned block = 0;
    bool fenced = false;
};
struct Bulk {  // a copy to one block of a cluster that has not landed
    unsigned char *to;
    const unsigned char *from;
    size_t bytes;
    Barrier *counted;
    unsigned block;  // that has started it
};
struct Counts {
    long operations = 0, matrices = 0, bank_conflicts = 0, barriers = 0;
    long products = 0, flops = 0;  // operations mma of a warp, and the numbers' multiplications and additions in them
    long copies = 0;               // of 16 bytes of global memory, those to both blocks of a cluster once
    long group_flops = 0;          // of `flops`, those of products of groups of warps
    long shared = 0;               // bytes of shared memory: copies that land, ldmatrix, factors of groups' products
    long own = 0;                  // and those that the threads' own loads and stores ask for; see `touched`
};
struct Release {
    void operator()(unsigned char *p) const { ::operator delete(p, std::align_val_t(1024)); }
};

inline Dim grid, block, block_index, thread_index, first_block;  // the last: of the cluster
inline Counts counts;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<char> stacks;
inline std::unique_ptr<unsigned char, Release> shared;  // of the blocks of a cluster, one after the other
inline size_t shared_bytes = 0, shared_pitch = 0;       // of one of them, and from one to the next
inline std::vector<bool> unseen;  // of each 16 bytes of shared memory: whether a product does not see what was copied
inline std::map<void *, Barrier> mbarriers;
inline std::vector<Bulk> bulks;
inline unsigned cluster = 1;      // blocks
inline long progress = 0;         // grows with all that threads do to each other
// Messages between the blocks of a cluster until one is lost, from the next launch with clusters on; below 0: none is.
inline int lose = -1, losing = -1;
inline int hurry = -1, hurrying = -1;  // the same of waits of the blocks' first threads, until one gives up
inline bool may_give_up = false;
inline Fiber *current = nullptr;
inline bool at_work = false;      // whether an operation of the emulator runs, whose accesses are not the threads'
inline void *scheduler = nullptr;
inline std::function<void()> body;
inline std::string failure;
inline bool eager = false;  // whether copies land at once
inline bool eager_products = false;
inline bool holds = false;  // whether threads are held back
inline std::mt19937 random_order;
constexpr size_t STACK = 96 << 10;

// Saves the registers that a call preserves, and continues where `to` was saved. Written in emulated.cpp.
extern "C" void switch_stacks(void **from, void *to);

inline void leave() { switch_stacks(&current->stack_pointer, scheduler); }

// Ends the launch with an error. It never returns to the fiber: the scheduler throws on its own stack.
[[noreturn]] inline void fail(const std::string &why) {
    failure = "block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + "), thread " +
              std::to_string(current ? current->thread : 0) + ": " + why;
    if (!current) throw std::runtime_error(failure);
    for (;;) leave();
}

inline Warp &own_warp() { return warps[current->block * (block.x / 32) + current->thread / 32]; }
inline unsigned char *own_shared() { return shared.get() + current->block * shared_pitch; }

inline void entry() {
    body();
    if (!current->copies.empty()) fail("a thread ends while copies are on their way");
    if (!own_warp().products.empty()) fail("a thread ends while products are on their way");
    current->done = true;
    ++progress;
    --own_warp().live;
    for (;;) leave();
}

inline void resume(Fiber &fiber) {
    current = &fiber;
    thread_index = {fiber.thread, 0, 0};
    block_index = {first_block.x, first_block.y + fiber.block, 0};
    switch_stacks(&scheduler, fiber.stack_pointer);
    current = nullptr;
    if (!failure.empty()) throw std::runtime_error(failure);
}

inline void barrier() {
    current->at_barrier = true;
    ++progress;
    while (current->at_barrier) leave();
}

// An operation of the whole warp: every lane brings `mine`, and the last to come does `work` for all of them.
template <class Work> void together(const char *operation, void *mine, Work work) {
    Warp &warp = own_warp();
    ++progress;
    if (warp.arrived && std::strcmp(warp.operation, operation))
        fail(std::string("lanes of a warp meet in ") + operation + " and in " + warp.operation);
    warp.operation = operation;
    warp.brought[current->thread % 32] = mine;
    if (++warp.arrived == 32) {
        at_work = true;
        work(warp.brought);
        at_work = false;
        ++counts.operations;
        warp.arrived = 0;
        ++warp.generation;
    } else
        for (long g = warp.generation; warp.generation == g;) leave();
}

inline unsigned char *shared_memory(size_t bytes = 0) {
    if (bytes > shared_bytes) fail("the launch gives less shared memory than the kernel uses");
    return own_shared();
}

inline void check_shared(const void *at, size_t bytes) {
    auto offset = static_cast<const unsigned char *>(at) - own_shared();
    if (offset < 0 || size_t(offset) + bytes > shared_bytes) fail("an address outside of shared memory");
    if (offset % bytes) fail("an address in shared memory that is not aligned");
}

inline void land(const Copy &copy) {
    at_work = true;
    copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    at_work = false;
    const size_t piece = (static_cast<unsigned char *>(copy.to) - shared.get()) / 16;
    unseen[piece] = true;
    current->unseen.push_back(piece);
}
inline void start_copy(void *to, const void *from) {
    check_shared(to, 16);
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("a copy from an address that is not aligned");
    counts.copies += from != nullptr, counts.shared += 16;
    if (eager) land({to, from});
    current->copies.push_back({to, from});
    ++current->open;
}
inline void commit() {
    current->groups.push_back(current->open);
    current->open = 0;
}
inline void wait(size_t most) {
    auto &copies = current->copies;
    auto &groups = current->groups;
    while (groups.size() > most) {
        for (size_t i = 0; i < groups[0] && !eager; ++i) land(copies[i]);
        copies.erase(copies.begin(), copies.begin() + groups[0]);
        groups.erase(groups.begin());
    }
}

// The bank conflicts of eight rows of 16 bytes that are read at a time.
inline void count_conflicts(const void *const (&row)[8]) {
    unsigned banks = 0;
    for (const void *at : row) {
        check_shared(at, 16);
        unsigned bank = 1u << (reinterpret_cast<uintptr_t>(at) / 16 % 8);
        counts.bank_conflicts += (banks & bank) != 0;
        banks |= bank;
    }
}

// What a lane brings to mma: accumulators [16, 8], of which it has two neighbours in rows lane / 4 and lane / 4 + 8,
// and the numbers of A [16, K] and B [8, K] that PTX gives to this lane.
struct Operands {
    float *d;
    const unsigned *a, *b;
};
// d += A B^T.
void multiply(void *const (&operands)[32], Numbers numbers, int K);

// Products of groups of warps, by one of its warps; see csrc/cuda/hopper.h.
void group_multiply(void *const (&operands)[32], Numbers numbers, int columns, bool add, bool transposed);
void wait_group(size_t most);
inline void fence_group() { own_warp().fenced = true; }
inline void commit_group() {
    own_warp().groups.push_back(own_warp().open);
    own_warp().open = 0;
}
inline void fence_products() {
    for (size_t piece : current->unseen) unseen[piece] = false;
    current->unseen.clear();
}

// What blocks of a cluster do to each other; see csrc/cuda/cluster.h.
void cluster_barrier();
void make_barrier(void *at);
void fence_barriers();
void arrive_at_other(void *at);
void expect_bytes(void *at, size_t bytes);
void copy_to_both(void *to, const void *from, size_t bytes, void *counted);
bool wait_for(void *at, unsigned parity);

// float16 as its bits; `to_half` rounds to nearest, ties to even.
float from_half(unsigned short bits);
unsigned short to_half(float x);

// Runs `kernel` for every thread of the grid, whose blocks are in clusters of neighbours in y.
// Throws std::runtime_error where a check fails.
void launch(Dim grid, Dim block, unsigned cluster, size_t shared_bytes, unsigned order, std::function<void()> kernel);

// The kernels of the module, by the C++ expression of their instance.
struct Instance {
    size_t problem_bytes;
    std::function<void(const void *problem, Dim grid, unsigned threads, size_t shared_bytes, unsigned order)> run;
};
inline std::map<std::string, Instance> &instances() {
    static std::map<std::string, Instance> all;
    return all;
}
template <class Problem> bool offer(const char *name, void (*kernel)(Problem), unsigned cluster = 1) {
    auto run = [=](const void *at, Dim grid, unsigned threads, size_t bytes, unsigned order) {
        Problem problem;
        std::memcpy(&problem, at, sizeof problem);
        launch(grid, {threads, 1, 1}, cluster, bytes, order, [&] { kernel(problem); });
    };
    instances()[name] = {sizeof(Problem), run};
    return true;
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block
#define gridDim emulator::grid
#define __syncthreads emulator::barrier
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
