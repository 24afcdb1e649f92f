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

// The number of a product's factor B of a column and a place k: eight rows take 1024 bytes, each 128, and the chunks of
// 16 bytes of a row are exchanged by its number.
float number_of(const Product &product, size_t column, size_t k) {
    const size_t row = product.transposed ? k : column, at = product.transposed ? column : k;
    size_t place = product.lane[0].b + row / 8 * 1024 + row % 8 * 128 + at * 2;
    place ^= (place >> 7 & 7) << 4;
    if (place + 2 > shared_bytes) fail("a product reads outside of shared memory");
    if (unseen[place / 16]) fail("a product reads what was copied without a fence");
    unsigned short bits;
    std::memcpy(&bits, shared.get() + place, 2);
    if (product.numbers == Numbers::FLOAT16) return from_half(bits);
    const unsigned word = unsigned(bits) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

// The sums of 16 rows, of which a lane has those that mma gives it.
void run_product(const Product &product, std::vector<float> (&sums)[32]) {
    std::vector<float> B(16 * product.columns);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < product.columns; ++n) B[k * product.columns + n] = number_of(product, n, k);
    std::vector<float> row(product.columns);
    for (int m = 0; m < 16; ++m) {
        std::fill(row.begin(), row.end(), 0.f);
        for (int k = 0; k < 16; ++k) {
            const unsigned word = product.lane[m % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + m / 8];
            const auto bits = static_cast<unsigned short>(word >> k % 2 * 16);
            const unsigned wide = unsigned(bits) << 16;
            float a = product.numbers == Numbers::FLOAT16 ? from_half(bits) : 0;
            if (product.numbers == Numbers::BFLOAT16) std::memcpy(&a, &wide, 4);
            const float *b = &B[k * product.columns];
            for (int n = 0; n < product.columns; ++n) row[n] += a * b[n];
        }
        for (int n = 0; n < product.columns; ++n) {
            float &sum = sums[m % 8 * 4 + n % 8 / 2][n / 8 * 4 + m / 8 * 2 + n % 2];
            sum = product.add ? sum + row[n] : row[n];
        }
    }
}

}  // namespace

void group_multiply(void *const (&operands)[32], Numbers numbers, int columns, bool add, bool transposed) {
    Warp &warp = own_warp();
    if (!warp.fenced) fail("a product of a group of warps without a fence before");
    Product product{{}, numbers, columns, add, transposed};
    for (int i = 0; i < 32; ++i) {
        product.lane[i] = *static_cast<GroupOperands *>(operands[i]);
        if (product.lane[i].b != product.lane[0].b) fail("lanes of a warp name different factors of a product");
    }
    const size_t within = product.lane[0].b % 1024;
    if (within % 16 || within >= (transposed ? 1 : 128)) fail("a factor that does not begin at a multiple of 1024");
    warp.started.push_back(product.lane[0].b);
    counts.flops += 2 * 16 * columns * 16;
    counts.group_flops += 2 * 16 * columns * 16;
    std::vector<float> sums[32];
    const size_t size = columns / 2;
    for (int i = 0; i < 32; ++i) {
        float *d = product.lane[i].d;
        if (eager)
            sums[i].assign(d, d + size);
        else if (warp.sums.try_emplace(d, d, d + size).second)
            std::fill(d, d + size, NAN);
    }
    if (eager) {
        run_product(product, sums);
        for (int i = 0; i < 32; ++i) std::copy(sums[i].begin(), sums[i].end(), product.lane[i].d);
    }
    warp.products.push_back(product);
    ++warp.open;
}

void wait_group(size_t most) {
    Warp &warp = own_warp();
    warp.fenced = false;
    while (warp.groups.size() > most) {
        for (size_t i = 0; i < warp.groups[0] && !eager; ++i) {
            const Product &product = warp.products[i];
            std::vector<float> sums[32];
            for (int lane = 0; lane < 32; ++lane) sums[lane].swap(warp.sums[product.lane[lane].d]);
            run_product(product, sums);
            for (int lane = 0; lane < 32; ++lane) sums[lane].swap(warp.sums[product.lane[lane].d]);
        }
        warp.products.erase(warp.products.begin(), warp.products.begin() + warp.groups[0]);
        warp.groups.erase(warp.groups.begin());
    }
    auto pending = [&](float *d) {
        return std::any_of(warp.products.begin(), warp.products.end(), [=](const Product &product) {
            return std::any_of(product.lane, product.lane + 32, [=](const GroupOperands &lane) { return lane.d == d; });
        });
    };
    for (auto found = warp.sums.begin(); found != warp.sums.end();)
        if (pending(found->first))
            ++found;
        else {
            std::copy(found->second.begin(), found->second.end(), found->first);
            found = warp.sums.erase(found);
        }
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
        for (size_t w = 0; w < warps.size(); ++w)
            if (warps[w].started != warps[w / 4 * 4].started) fail("the warps of a group start different products");
        for (Warp &warp : warps) warp.started.clear();
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
    shared.reset(static_cast<unsigned char *>(::operator new(max(bytes, size_t(1)), std::align_val_t(1024))));
    shared_bytes = bytes;
    std::mt19937 random(order);
    for (unsigned y = 0; y < g.y; ++y)
        for (unsigned x = 0; x < g.x; ++x) {
            block_index = {x, y, 0};
            std::memset(shared.get(), 0xFF, bytes);
            unseen.assign(bytes / 16 + 1, false);
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
                                           {"flops", c.flops},                   {"group_flops", c.group_flops}};
    });
    m.def("problem_bytes", [] {
        std::map<std::string, size_t> bytes;
        for (const auto &[name, instance] : emulator::instances()) bytes[name] = instance.problem_bytes;
        return bytes;
    });
}
