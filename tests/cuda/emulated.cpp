// The kernels of csrc/cuda as a Python module that runs them on the CPU; see emulator.h and tests/cuda_emulated.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

float from_half(unsigned short bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return float(x);
}
unsigned short to_half(float x) {
    auto half = static_cast<_Float16>(x);
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

void multiply(void *const (&operands)[32], Numbers numbers, int K) {
    typedef float Row __attribute__((vector_size(32)));
    const int each = numbers == Numbers::TF32 ? 1 : 2;  // numbers in a word
    auto value = [=](unsigned word, int e) {
        if (numbers == Numbers::FLOAT16) return from_half(static_cast<unsigned short>(word >> 16 * e));
        unsigned bits = numbers == Numbers::TF32 ? word & ~0x1fffu : e ? word & 0xffff0000u : word << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    };
    float A[16][16];
    Row columns[16];
    for (int lane = 0; lane < 32; ++lane) {
        const Operands &mine = *static_cast<Operands *>(operands[lane]);
        for (int chunk = 0; chunk < K / (4 * each); ++chunk)
            for (int e = 0; e < each; ++e) {
                int k = (chunk * 4 + lane % 4) * each + e;
                A[lane / 4][k] = value(mine.a[2 * chunk], e);
                A[lane / 4 + 8][k] = value(mine.a[2 * chunk + 1], e);
                columns[k][lane / 4] = value(mine.b[chunk], e);
            }
    }
    for (int m = 0; m < 16; ++m) {
        Row sum = {};
        for (int k = 0; k < K; ++k) sum += A[m][k] * columns[k];
        for (int n = 0; n < 8; ++n)
            static_cast<Operands *>(operands[m % 8 * 4 + n / 2])->d[m / 8 * 2 + n % 2] += sum[n];
    }
    ++counts.products;
    counts.flops += 2 * 16 * 8 * K;
}

namespace {

// Fibers end without returning, so AddressSanitizer still has marks around their last variables.
void forget_variables() {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(stacks.data(), stacks.size());
#endif
}

void prepare(unsigned thread) {
    auto top = reinterpret_cast<uintptr_t>(stacks.data() + (thread + 1) * STACK) & ~uintptr_t(15);
    void **pointer = reinterpret_cast<void **>(top - 8);
    *--pointer = reinterpret_cast<void *>(&entry);
    for (int i = 0; i < 6; ++i) *--pointer = nullptr;  // the registers that `switch_stacks` restores
    fibers[thread].stack_pointer = pointer;
    fibers[thread].thread = thread;
}

// Runs a warp until all its lanes wait at the barrier or have ended.
void run_warp(unsigned w, const std::vector<unsigned> &lanes) {
    Warp &warp = warps[w];
    for (int waiting = 0; waiting < 32;) {
        auto before = std::make_pair(warp.generation, warp.arrived);
        int stopped = 0, moved = 0;
        for (unsigned lane : lanes) {
            Fiber &fiber = fibers[w * 32 + lane];
            if (!fiber.done && !fiber.at_barrier) {
                resume(fiber);
                moved += fiber.done || fiber.at_barrier;
            }
            stopped += fiber.done || fiber.at_barrier;
        }
        if (!moved && before == std::make_pair(warp.generation, warp.arrived) && warp.arrived)
            fail(std::string("not all lanes of a warp come to ") + warp.operation);
        waiting = stopped;
    }
}

void run_block(unsigned order, std::mt19937 &random) {
    std::vector<unsigned> sequence(warps.size()), lanes(32);
    for (unsigned i = 0; i < sequence.size(); ++i) sequence[i] = i;
    for (unsigned i = 0; i < 32; ++i) lanes[i] = i;
    if (order == 1) std::reverse(sequence.begin(), sequence.end()), std::reverse(lanes.begin(), lanes.end());
    for (size_t ended = 0; ended < fibers.size();) {
        if (order > 1) {
            std::shuffle(sequence.begin(), sequence.end(), random);
            std::shuffle(lanes.begin(), lanes.end(), random);
        }
        for (unsigned w : sequence) run_warp(w, lanes);
        ended = 0;
        for (Fiber &fiber : fibers) {
            ended += fiber.done;
            fiber.at_barrier = false;
        }
        if (ended && ended < fibers.size()) fail("a barrier that not all threads come to");
        ++counts.barriers;
    }
}

}  // namespace

void launch(Dim g, Dim b, size_t bytes, unsigned order, std::function<void()> kernel) {
    if (b.x % 32) throw std::runtime_error("a block must be whole warps");
    grid = g, block = b, body = std::move(kernel), eager = order % 2, failure.clear();
    counts = {};
    forget_variables();
    stacks.resize(b.x * STACK);
    shared.reset(static_cast<unsigned char *>(::operator new(max(bytes, size_t(1)), std::align_val_t(128))));
    shared_bytes = bytes;
    std::mt19937 random(order);
    for (unsigned y = 0; y < g.y; ++y)
        for (unsigned x = 0; x < g.x; ++x) {
            block_index = {x, y, 0};
            std::memset(shared.get(), 0xFF, bytes);
            fibers.assign(b.x, {});
            warps.assign(b.x / 32, {});
            forget_variables();
            for (unsigned t = 0; t < b.x; ++t) prepare(t);
            run_block(order, random);
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
                                           {"flops", c.flops}};
    });
    m.def("problem_bytes", [] {
        std::map<std::string, size_t> bytes;
        for (const auto &[name, instance] : emulator::instances()) bytes[name] = instance.problem_bytes;
        return bytes;
    });
}
