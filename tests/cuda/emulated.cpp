// The kernels of csrc/cuda as a Python module that runs them on the CPU; see emulator.h and tests/cuda_emulated.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "emulator.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace py = pybind11;

asm(R"(
.text
.p2align 4
.globl switch_stacks
.type switch_stacks,@function
switch_stacks:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size switch_stacks, .-switch_stacks
)");

namespace emulator {

namespace {

unsigned char *shared_begin = nullptr;

// Fibers end without returning, so AddressSanitizer still has marks around their last variables.
void forget_variables() {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(stacks.data(), stacks.size());
#endif
}

void prepare(Fiber &fiber, size_t index) {
    auto top = reinterpret_cast<uintptr_t>(stacks.data() + (index + 1) * STACK) & ~uintptr_t(15);
    void **pointer = reinterpret_cast<void **>(top - 8);
    *--pointer = reinterpret_cast<void *>(&entry);
    for (int i = 0; i < 6; ++i) *--pointer = nullptr;  // the registers that `switch_stacks` restores
    fiber.stack_pointer = pointer;
    fiber.thread = index % block.x, fiber.block = index / block.x;
}

bool is_open(const Fiber &fiber) { return fiber.awaited->phase % 2 != fiber.parity; }
bool waits(const Fiber &fiber) {
    return fiber.at_cluster_barrier || fiber.held || (fiber.awaited && !fiber.gave_up && !is_open(fiber));
}
bool stopped(const Fiber &fiber) { return fiber.done || fiber.at_barrier || waits(fiber); }

// Runs a warp until none of its lanes can go on.
void run_warp(unsigned w, const std::vector<unsigned> &lanes) {
    const auto first = fibers.begin() + w * 32;
    for (long before = -1; before != progress;) {
        before = progress;
        for (unsigned lane : lanes)
            if (!stopped(first[lane])) resume(first[lane]);
    }
    if (std::all_of(first, first + 32, stopped) || std::any_of(first, first + 32, waits)) return;
    fail(std::string("not all lanes of a warp come to ") + warps[w].operation);
}

// Lets the threads of a block go on that all wait at its barrier.
void open_barrier(unsigned of) {
    const auto first = fibers.begin() + of * block.x;
    const auto ended = std::count_if(first, first + block.x, [](Fiber &fiber) { return fiber.done; });
    const auto there = std::count_if(first, first + block.x, [](Fiber &fiber) { return fiber.at_barrier; });
    if (!there || ended + there < block.x) return;
    if (ended) fail("a barrier that not all threads come to");
    for (unsigned i = 0; i < block.x; ++i) first[i].at_barrier = false;
    const auto warp = warps.begin() + of * (block.x / 32);
    for (unsigned w = 0; w < block.x / 32; ++w)
        if (warp[w].started != warp[w / 4 * 4].started) fail("the warps of a group start different products");
    for (unsigned w = 0; w < block.x / 32; ++w) warp[w].started.clear();
    ++counts.barriers, ++progress;
}

void end_phase(Barrier &barrier) {
    ++progress;
    if (barrier.missing < 0) fail("an mbarrier with more arrivals than it expects");
    if (barrier.missing || barrier.bytes) return;
    ++barrier.phase, barrier.missing = 1;
}

bool has_ended(unsigned of) {
    const auto first = fibers.begin() + of * block.x;
    return std::any_of(first, first + block.x, [](Fiber &fiber) { return fiber.done; });
}

void land(const Bulk &bulk) {
    if (has_ended(bulk.block)) fail("a block ends while copies that it has started are on their way");
    std::memcpy(bulk.to, bulk.from, bulk.bytes);
    bulk.counted->bytes -= bulk.bytes;
    end_phase(*bulk.counted);
}

// What all threads of a cluster wait for when none can go on.
void open_cluster() {
    auto any = [](auto which) { return std::any_of(fibers.begin(), fibers.end(), which); };
    std::vector<Barrier *> awaited;  // those that copies on their way would serve
    for (const Bulk &bulk : bulks)
        if (any([&](Fiber &fiber) { return fiber.awaited == bulk.counted && !is_open(fiber); }))
            awaited.push_back(bulk.counted);
    const bool some_held = any([](Fiber &fiber) { return fiber.held; });
    if (some_held && (awaited.empty() || random_order() % 2)) {
        for (Fiber &fiber : fibers) fiber.held = false;
        return;
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](Fiber &fiber) { return fiber.at_cluster_barrier; })) {
        for (Fiber &fiber : fibers) fiber.at_cluster_barrier = false;
        return;
    }
    if (!awaited.empty()) {  // of one mbarrier, so that its block may run ahead
        const Barrier *chosen = awaited[random_order() % awaited.size()];
        std::vector<Bulk> wanted;
        std::erase_if(bulks, [&](const Bulk &bulk) {
            if (bulk.counted == chosen) wanted.push_back(bulk);
            return bulk.counted == chosen;
        });
        for (const Bulk &bulk : wanted) land(bulk);
        return;
    }
    bool some = false;
    for (Fiber &fiber : fibers) some |= fiber.gave_up = fiber.awaited && may_give_up;
    if (some) return;
    if (any([](Fiber &fiber) { return fiber.awaited; })) fail("a wait for an mbarrier that nothing ends");
    if (any([](Fiber &fiber) { return fiber.at_cluster_barrier; }))
        fail("a cluster barrier that not all threads come to");
    fail("a barrier that not all threads come to");
}

void run_cluster(unsigned order) {
    const unsigned each = block.x / 32;
    std::vector<unsigned> sequence(warps.size()), lanes(32);
    for (unsigned i = 0; i < sequence.size(); ++i) sequence[i] = i;
    for (unsigned i = 0; i < 32; ++i) lanes[i] = i;
    if (order == 1) std::reverse(sequence.begin(), sequence.end()), std::reverse(lanes.begin(), lanes.end());
    auto run = [&](size_t first, size_t number) {
        if (order > 1) {
            std::shuffle(sequence.begin() + first, sequence.begin() + first + number, random_order);
            std::shuffle(lanes.begin(), lanes.end(), random_order);
        }
        for (size_t i = first; i < first + number; ++i) run_warp(sequence[i], lanes);
        for (unsigned b = 0; b < cluster; ++b) open_barrier(b);
    };
    while (!std::all_of(fibers.begin(), fibers.end(), [](Fiber &fiber) { return fiber.done; })) {
        const long before = progress;
        if (order > 1)
            run(0, sequence.size());
        else
            for (unsigned b = 0; b < cluster; ++b)
                for (long last = -1; last != progress;) {
                    last = progress;
                    run(b * each, each);
                }
        if (before == progress) open_cluster();
    }
    for (size_t w = 0; w < warps.size(); ++w)
        if (warps[w].started != warps[w / 4 * 4].started) fail("the warps of a group start different products");
    if (may_give_up) return;
    if (!bulks.empty()) fail("a cluster ends while copies between its blocks are on their way");
    for (const auto &[at, barrier] : mbarriers)
        if (barrier.bytes || barrier.missing != 1) fail("a cluster ends in the middle of an mbarrier's phase");
}

// The same place in the shared memory of block `of` of the cluster.
unsigned char *place_in(void *at, unsigned of) {
    return static_cast<unsigned char *>(at) + (long(of) - long(current->block)) * long(shared_pitch);
}

// The mbarrier at the same place in block `of`.
Barrier &barrier_at(void *at, unsigned of) {
    check_shared(at, 8);
    auto found = mbarriers.find(place_in(at, of));
    if (found == mbarriers.end()) fail("an mbarrier that has not been made");
    if (!found->second.fenced) fail("an mbarrier without a fence after it was made");
    if (has_ended(of)) fail("a block uses the shared memory of one that has ended");
    return found->second;
}

// Whether a message of this thread arrives. In some orders the thread goes on after it only when no other can.
bool sent() {
    if (cluster == 1) fail("a message to the other block of a cluster, of which there is none");
    return losing < 0 || losing-- != 0;
}
void hold() {
    current->held = holds && random_order() % 2;
    while (current->held) leave();
}

}  // namespace

#ifdef __SANITIZE_THREAD__
#define UNWATCHED __attribute__((no_sanitize("thread")))
// The compiler calls these before every access to memory. Those of the kernel's threads to shared memory count.
UNWATCHED void touched(const void *at, size_t bytes) {
    const size_t offset = static_cast<const unsigned char *>(at) - shared_begin;
    if (offset < cluster * shared_pitch && current && !at_work) counts.own += bytes;
}
#define ACCESS(name, bytes) UNWATCHED void __tsan_##name##bytes(void *at) { touched(at, bytes); }
#define ACCESSES(name) ACCESS(name, 1) ACCESS(name, 2) ACCESS(name, 4) ACCESS(name, 8) ACCESS(name, 16)
extern "C" {
ACCESSES(read) ACCESSES(write) ACCESSES(unaligned_read) ACCESSES(unaligned_write)
UNWATCHED void __tsan_read_range(void *at, size_t bytes) { touched(at, bytes); }
UNWATCHED void __tsan_write_range(void *at, size_t bytes) { touched(at, bytes); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void **) {}
void __tsan_vptr_update(void **, void *) {}
// What the compiler makes of the atomic operations of libstdc++ and pybind11.
UNWATCHED char __tsan_atomic8_load(const volatile char *at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
UNWATCHED int __tsan_atomic32_fetch_add(volatile int *at, int x, int) {
    return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);
}
}
#endif

void cluster_barrier() {
    current->at_cluster_barrier = true;
    ++progress;
    while (current->at_cluster_barrier) leave();
}

void make_barrier(void *at) {
    check_shared(at, 8);
    if (!mbarriers.try_emplace(at).second) fail("an mbarrier that is there already");
    mbarriers[at].block = current->block;
}
void fence_barriers() {
    for (auto &[at, barrier] : mbarriers) barrier.fenced |= barrier.block == current->block;
}

void arrive_at_other(void *at) {
    if (sent()) {
        Barrier &barrier = barrier_at(at, 1 - current->block);
        --barrier.missing;
        end_phase(barrier);
    }
    hold();
}

void expect_bytes(void *at, size_t bytes) {
    Barrier &barrier = barrier_at(at, current->block);
    --barrier.missing, barrier.bytes += bytes;
    end_phase(barrier);
    hold();
}

void copy_to_both(void *to, const void *from, size_t bytes, void *counted) {
    check_shared(to, 16);
    check_shared(static_cast<unsigned char *>(to) + bytes - 16, 16);
    if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a copy of bytes that are not aligned");
    counts.copies += bytes / 16, counts.shared += bytes * cluster;
    const bool arrives = sent();
    for (unsigned of = 0; of < cluster; ++of) {
        const auto *source = static_cast<const unsigned char *>(from);
        const Bulk bulk{place_in(to, of), source, bytes, &barrier_at(counted, of), current->block};
        if (!arrives) continue;
        if (eager)
            land(bulk);
        else
            bulks.push_back(bulk);
    }
    hold();
}

bool wait_for(void *at, unsigned parity) {
    Barrier &barrier = barrier_at(at, current->block);
    current->awaited = &barrier, current->parity = parity;
    if (current->thread == 0 && !is_open(*current) && hurrying >= 0 && hurrying-- == 0) current->hurried = &barrier;
    while (waits(*current) && current->hurried != &barrier) leave();
    const bool ended = is_open(*current);
    current->awaited = nullptr, current->gave_up = false;
    ++progress;
    return ended;
}

void launch(Dim g, Dim b, unsigned of_cluster, size_t bytes, unsigned order, std::function<void()> kernel) {
    if (b.x % 32) throw std::runtime_error("a block must be whole warps");
    if (g.y % of_cluster) throw std::runtime_error("a grid must be whole clusters");
    grid = g, block = b, cluster = of_cluster, body = std::move(kernel), failure.clear();
    eager = order % 2, eager_products = order < 2, holds = order > 1;
    losing = cluster > 1 ? std::exchange(lose, -1) : -1;
    hurrying = cluster > 1 ? std::exchange(hurry, -1) : -1;
    may_give_up = losing >= 0 || hurrying >= 0;
    counts = {};
    forget_variables();
    stacks.resize(cluster * b.x * STACK);
    shared_bytes = bytes, shared_pitch = (bytes / 1024 + 1) * 1024;
    shared.reset(static_cast<unsigned char *>(::operator new(cluster * shared_pitch, std::align_val_t(1024))));
    shared_begin = shared.get();
    random_order.seed(order);
    for (unsigned y = 0; y < g.y; y += cluster)
        for (unsigned x = 0; x < g.x; ++x) {
            first_block = {x, y, 0};
            std::memset(shared.get(), 0xFF, cluster * shared_pitch);
            unseen.assign(cluster * shared_pitch / 16, false);
            mbarriers.clear(), bulks.clear();
            fibers.assign(cluster * b.x, {});
            warps.assign(fibers.size() / 32, {});
            forget_variables();
            for (size_t i = 0; i < fibers.size(); ++i) prepare(fibers[i], i);
            run_cluster(order);
        }
}

}  // namespace emulator

PYBIND11_MODULE(cuda_emulated_module, m) {
    m.def("run", [](const std::string &name, uintptr_t problem, unsigned grid_x, unsigned grid_y, unsigned threads,
                    size_t shared, unsigned order) {
        auto found = emulator::instances().find(name);
        if (found == emulator::instances().end()) throw std::invalid_argument(name + " was not built");
        found->second.run(reinterpret_cast<const void *>(problem), {grid_x, grid_y, 1}, threads, shared, order);
        const emulator::Counts &c = emulator::counts;
        return std::map<std::string, long>{{"operations", c.operations},         {"products", c.products},
                                           {"matrices", c.matrices},             {"bank_conflicts", c.bank_conflicts},
                                           {"barriers", c.barriers},             {"copies", c.copies},
                                           {"flops", c.flops},                   {"group_flops", c.group_flops},
                                           {"shared", c.shared},                 {"own", c.own}};
    });
    m.def("lose", [](int messages) { emulator::lose = messages; });
    m.def("hurry", [](int waits) { emulator::hurry = waits; });
    m.def("problem_bytes", [] {
        std::map<std::string, size_t> bytes;
        for (const auto &[name, instance] : emulator::instances()) bytes[name] = instance.problem_bytes;
        return bytes;
    });
}
