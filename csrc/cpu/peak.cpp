// The arithmetic peak that the other files are measured against: multiply-adds between registers and nothing else,
// with the instructions this file is compiled for. Flops of one step: 2 per lane, 4 per float32 lane for bfloat16.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "tiles.h"

namespace {

// Enough independent sums to cover the latency of two pipes (4 cycles x 2, 6 x 2 for bfloat16), with two registers
// to spare for the operands.
#if defined(__AVX512F__)
constexpr int BYTES = 64, SUMS = 16;
#elif defined(__AVX2__)
constexpr int BYTES = 32, SUMS = 12;
#else
constexpr int BYTES = 16, SUMS = 12;
#endif

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(BYTES)));
};

// sum * x + y: without a fused instruction it is the multiplication and the addition that the machine has.
template <class T>
struct Fma {
    using V = typename Vector<T>::type;
    static constexpr double FLOPS = 2.0 * BYTES / sizeof(T);
    V x, y;
    explicit Fma(double seed) : x(V{} + T(1 - seed)), y(V{} + T(seed)) {}
    V operator()(V sum) const {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4)
            return V(_mm512_fmadd_ps(__m512(sum), __m512(x), __m512(y)));
        else
            return V(_mm512_fmadd_pd(__m512d(sum), __m512d(x), __m512d(y)));
#elif defined(__AVX2__) && defined(__FMA__)
        if constexpr (sizeof(T) == 4)
            return V(_mm256_fmadd_ps(__m256(sum), __m256(x), __m256(y)));
        else
            return V(_mm256_fmadd_pd(__m256d(sum), __m256d(x), __m256d(y)));
#else
        return sum * x + y;
#endif
    }
};

#if defined(__AMX_BF16__)
// The four products of a block of tiles.h, and no loads: a step has a quarter of one each.
struct Dot {
    static constexpr double FLOPS = 4.0 * 2 * itm_fast::TILE_ROWS * 16 * 32 / SUMS;
    explicit Dot(double) {}
};

__attribute__((noinline)) double loop(const Dot&, int64_t iterations) {
    auto tiles = itm_fast::AmxTiles::ready();  // of zeros
    for (int64_t i = 0; i < iterations; ++i) {
        tiles.multiply_add<0, 4, 6>();
        tiles.multiply_add<1, 4, 7>();
        tiles.multiply_add<2, 5, 6>();
        tiles.multiply_add<3, 5, 7>();
    }
    tiles.release();
    return 0;
}
#elif defined(__AVX512BF16__)
// sum += the products of two bfloat16 pairs, in every float32 lane.
struct Dot {
    using V = __m512;
    static constexpr double FLOPS = 64;
    __m512bh x, y;
    explicit Dot(double) : x(__m512bh(_mm512_set1_epi32(0x3f80bf80))), y(__m512bh(_mm512_set1_epi16(0x3f81))) {}
    V operator()(V sum) const { return _mm512_dpbf16_ps(sum, x, y); }
};
#endif

template <class Step>
__attribute__((noinline)) double loop(const Step& given, int64_t iterations) {
    const Step step = given;
    typename Step::V sum[SUMS];
    for (int k = 0; k < SUMS; ++k) sum[k] = typename Step::V{} + float(k + 1);
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
        for (int k = 0; k < SUMS; ++k) sum[k] = step(sum[k]);
    }
    double total = 0;
    for (int k = 0; k < SUMS; ++k) total += double(sum[k][0]);
    return total;
}

template <class Step>
void measure(int64_t iterations, int64_t threads, double* seconds, double* flops) {
    using Clock = std::chrono::steady_clock;
    std::vector<Clock::time_point> start(threads), end(threads);
    std::vector<double> kept(threads);
    std::atomic<int64_t> ready{0};
    auto work = [&](int64_t t) {
        const Step step(1e-3 * double(t + 1));
        kept[t] = loop(step, iterations / 8);  // the clock of a core rises while it works
        ready.fetch_add(1);
        while (ready.load() < threads) {
        }
        start[t] = Clock::now();
        kept[t] += loop(step, iterations);
        end[t] = Clock::now();
    };
    std::vector<std::thread> others;
    try {
        for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, t);
    } catch (...) {
        ready = threads;  // the others wait for one that never starts
        for (auto& other : others) other.join();
        throw;
    }
    work(0);
    for (auto& other : others) other.join();
    const volatile double use = kept[0];  // else the loop computes nothing that is needed
    (void)use;
    const auto first = *std::min_element(start.begin(), start.end());
    const auto last = *std::max_element(end.begin(), end.end());
    *seconds = std::chrono::duration<double>(last - first).count();
    *flops = Step::FLOPS * SUMS * double(iterations) * double(threads);
}

}  // namespace

// dtype: 0 float32, 1 float64, 2 bfloat16. Writes the time of the slowest thread and what all of them computed.
extern "C" const char* itm_peak(int64_t dtype, int64_t iterations, int64_t threads, double* seconds, double* flops) {
    try {
        if (iterations < 1 || threads < 1) return "peak: iterations and threads must be at least 1";
        if (dtype == 0)
            measure<Fma<float>>(iterations, threads, seconds, flops);
        else if (dtype == 1)
            measure<Fma<double>>(iterations, threads, seconds, flops);
#if defined(__AVX512BF16__)
        else if (dtype == 2)
            measure<Dot>(iterations, threads, seconds, flops);
#endif
        else
            return "peak: the processor has no dot product of this dtype";
    } catch (...) {
        return "peak: no memory or no thread left";
    }
    return nullptr;
}
