// The products of emulator.h: those of a warp, and those of a group of warps.
#include "emulator.h"

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

float value_of(Numbers numbers, unsigned short bits) {
    if (numbers == Numbers::FLOAT16) return from_half(bits);
    const unsigned word = unsigned(bits) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

// Number `at` of a row of a product's factor that begins at `place`: eight rows take 1024 bytes, each 128, and the
// chunks of 16 bytes of a row are exchanged by its number.
float number_of(const Product &product, size_t place, size_t row, size_t at) {
    place += row / 8 * 1024 + row % 8 * 128 + at * 2;
    place ^= (place >> 7 & 7) << 4;
    if (place + 2 > shared_bytes) fail("a product reads outside of shared memory");
    place += own_shared() - shared.get();
    if (unseen[place / 16]) fail("a product reads what was copied without a fence");
    unsigned short bits;
    std::memcpy(&bits, shared.get() + place, 2);
    return value_of(product.numbers, bits);
}

// The sums of 16 rows, of which a lane has those that mma gives it.
void run_product(const Product &product, std::vector<float> (&sums)[32]) {
    std::vector<float> B(16 * product.columns);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < product.columns; ++n) {
            const int row = product.transposed ? k : n, at = product.transposed ? n : k;
            B[k * product.columns + n] = number_of(product, product.lane[0].b, row, at);
        }
    std::vector<float> row(product.columns);
    for (int m = 0; m < 16; ++m) {
        std::fill(row.begin(), row.end(), 0.f);
        for (int k = 0; k < 16; ++k) {
            const GroupOperands &lane = product.lane[m % 8 * 4 + k % 8 / 2];
            const unsigned word = lane.a ? lane.a[k / 8 * 2 + m / 8] >> k % 2 * 16 : 0;
            const float a = lane.a ? value_of(product.numbers, static_cast<unsigned short>(word))
                                   : number_of(product, lane.a_place, current->thread / 32 % 4 * 16 + m, k);
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
        if (product.lane[i].b != product.lane[0].b || product.lane[i].a_place != product.lane[0].a_place)
            fail("lanes of a warp name different factors of a product");
    }
    const size_t within = product.lane[0].b % 1024, a_within = product.lane[0].a_place % 1024;
    if (within % 16 || within >= (transposed ? 1 : 128) || a_within % 16 || a_within >= 128)
        fail("a factor that does not begin at a multiple of 1024");
    warp.started.push_back(product.lane[0].b);
    warp.started.push_back(product.lane[0].a_place);
    counts.flops += 2 * 16 * columns * 16;
    counts.group_flops += 2 * 16 * columns * 16;
    counts.shared += columns * 16 * 2 / 4 + (product.lane[0].a ? 0 : 16 * 16 * 2);  // four warps read B once
    std::vector<float> sums[32];
    const size_t size = columns / 2;
    for (int i = 0; i < 32; ++i) {
        float *d = product.lane[i].d;
        if (eager_products)
            sums[i].assign(d, d + size);
        else if (warp.sums.try_emplace(d, d, d + size).second)
            std::fill(d, d + size, NAN);
    }
    if (eager_products) {
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
        for (size_t i = 0; i < warp.groups[0] && !eager_products; ++i) {
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

}  // namespace emulator
