// What only GPUs of compute capability 9.0 have: products by a group of four warps (wgmma; compiled for sm_90a), which
// read one factor from shared memory themselves and run while the warps go on. Beside each its twin for the emulator.
//
// A factor in shared memory lies as `place<8>` of tile.h puts it: rows of 128 bytes, whose chunks of 16 are exchanged
// by the row's number modulo 8 ("128-byte swizzle"), from a multiple of 1024 bytes on.
//
// The order of calls: `group_fence` after registers of a product were last written or read and before the product;
// products; `group_commit`; `group_wait`. Until then neither the accumulators nor the other factor's registers may be
// touched, nor what is read of shared memory be overwritten. What threads copied to shared memory is seen by products
// once each has called `fence_products` after its wait, and all have passed a barrier.
#pragma once
#include "gpu.h"

constexpr int GROUP = 128;  // threads of a group of warps

// Keeps the compiler from computing with registers on one side of this place what stands on the other: it does not know
// when products read and write them.
template <int N, int M> __device__ __forceinline__ void pin(float (&x)[N][M]) {
#ifndef ITM_EMULATE
#pragma unroll
    for (int i = 0; i < N * M; ++i) asm volatile("" : "+f"(x[i / M][i % M])::"memory");
#endif
}
template <int N, int M> __device__ __forceinline__ void pin(unsigned (&x)[N][M]) {
#ifndef ITM_EMULATE
#pragma unroll
    for (int i = 0; i < N * M; ++i) asm volatile("" : "+r"(x[i / M][i % M])::"memory");
#endif
}

// The registers of the products that follow have been written.
template <class... Registers> __device__ __forceinline__ void group_fence(Registers &...registers) {
    (pin(registers), ...);
#ifdef ITM_EMULATE
    emulator::together("group_fence", nullptr, [](void **) { emulator::fence_group(); });
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Makes a group of the products since the last one.
__device__ __forceinline__ void group_commit() {
#ifdef ITM_EMULATE
    emulator::together("group_commit", nullptr, [](void **) { emulator::commit_group(); });
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until all but the last N groups of products are done, whose registers are not among those given.
template <int N, class... Registers> __device__ __forceinline__ void group_wait(Registers &...registers) {
#ifdef ITM_EMULATE
    emulator::together("group_wait", nullptr, [](void **) { emulator::wait_group(N); });
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
    (pin(registers), ...);
}

// What this thread has copied to shared memory comes before what products read there.
__device__ __forceinline__ void fence_products() {
#ifdef ITM_EMULATE
    emulator::fence_products();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Describes a factor from `at` on, 1024 bytes from each eight rows to the next. PTX calls that the stride offset of
// factors whose rows are multiplied number by number, and of others the same where a row has 64 numbers; the leading
// offset is then without effect, and has the same value.
__device__ __forceinline__ unsigned long long described(const unsigned char *at) {
#ifdef ITM_EMULATE
    return at - emulator::own_shared();
#else
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(at));
    return 1ull << 62 | 64ull << 32 | 64ull << 16 | (address & 0x3ffff) >> 4;
#endif
}

#ifndef ITM_EMULATE
// Operands of the accumulators of 8 or 64 columns, and their names, ten or eight from a number on.
#define ITM_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ITM_D4(n) ITM_D(n), ITM_D(n + 1), ITM_D(n + 2), ITM_D(n + 3)
#define ITM_D8(n) ITM_D4(n), ITM_D4(n + 4)
#define ITM_8(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7"
#define ITM_10(t) ITM_8(t) ",%" #t "8,%" #t "9"
#define ITM_TO_29 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," ITM_10(1) "," ITM_10(2)
#define ITM_TO_59 ITM_TO_29 "," ITM_10(3) "," ITM_10(4) "," ITM_10(5)
#define ITM_TO_119 ITM_TO_59 "," ITM_10(6) "," ITM_10(7) "," ITM_10(8) "," ITM_10(9) "," ITM_10(10) "," ITM_10(11)
#define ITM_PRODUCT(columns, dtype, names, a0, a1, a2, a3, at, add, transposed, ...)                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns         \
                 "k16.f32." dtype "." dtype " {" names "}, {" a0 "," a1 "," a2 "," a3 "}, " at ", p, 1, 1, "        \
                 transposed ";\n}"                                                                                  \
                 : __VA_ARGS__                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)), "n"(int(TRANSPOSED)))
#define ITM_PRODUCT_OF_SHARED(dtype)                                                                                \
    asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." dtype "."   \
                 dtype " {" ITM_TO_29 ",%30,%31}, %32, %33, p, 1, 1, 0, 1;\n}"                                      \
                 : ITM_D8(0)                                                                                        \
                 : "l"(a), "l"(b))
#define ITM_PRODUCT_64(dtype)                                                                                       \
    ITM_PRODUCT(64, dtype, ITM_TO_29 ",%30,%31", "%32", "%33", "%34", "%35", "%36", "%37", "%38", ITM_D8(0))
#define ITM_PRODUCT_144(dtype)                                                                                      \
    ITM_PRODUCT(144, dtype, ITM_TO_59 "," ITM_10(6) ",%70,%71", "%72", "%73", "%74", "%75", "%76", "%77", "%78",    \
                ITM_D8(0), ITM_D8(8), ITM_D(16), ITM_D(17))
#define ITM_PRODUCT_256(dtype)                                                                                      \
    ITM_PRODUCT(256, dtype, ITM_TO_119 "," ITM_8(12), "%128", "%129", "%130", "%131", "%132", "%133", "%134",       \
                ITM_D8(0), ITM_D8(8), ITM_D8(16), ITM_D8(24))
#endif

// Calls multiply(a, b) for all products of the numbers 16 a to 16 a + 15 of one factor's rows in a stage by those from
// 16 b on of the other's. A row has 64 numbers; F16X3: 32 first halves and then 32 second ones.
template <Kind KIND, class Multiply> __device__ __forceinline__ void for_products(Multiply multiply) {
#pragma unroll
    for (int k = 0; k < (KIND == F16X3 ? 2 : 4); ++k) {
        if constexpr (KIND == F16X3) multiply(2 + k, k), multiply(k, 2 + k);
        multiply(k, k);
    }
}

// Starts d = a B^T, or += where ADD, of 16-bit numbers: a group's a [64, 16] and B [COLUMNS, 16], of which a warp has
// 16 rows of a and d as for `multiply`, all columns. B begins at a described place: its rows have 64 numbers, of which
// 16 are multiplied; or TRANSPOSED, 16 rows of B^T [16, 64].
template <Kind KIND, int COLUMNS, bool ADD, bool TRANSPOSED>
__device__ __forceinline__ void group_multiply(float (&d)[COLUMNS / 8][4], const unsigned (&a)[4],
                                               unsigned long long b) {
    static_assert((KIND == F16 || KIND == BF16) && (COLUMNS == 64 || !TRANSPOSED));
#ifdef ITM_EMULATE
    emulator::GroupOperands mine{&d[0][0], a, 0, b};
    emulator::together("group_multiply", &mine, [](void *const(&brought)[32]) {
        constexpr auto NUMBERS = KIND == F16 ? emulator::Numbers::FLOAT16 : emulator::Numbers::BFLOAT16;
        emulator::group_multiply(brought, NUMBERS, COLUMNS, ADD, TRANSPOSED);
    });
#else
    if constexpr (COLUMNS == 64) {
        if constexpr (KIND == F16)
            ITM_PRODUCT_64("f16");
        else
            ITM_PRODUCT_64("bf16");
    } else if constexpr (COLUMNS == 144) {
        if constexpr (KIND == F16)
            ITM_PRODUCT_144("f16");
        else
            ITM_PRODUCT_144("bf16");
    } else {
        static_assert(COLUMNS == 256);
        if constexpr (KIND == F16)
            ITM_PRODUCT_256("f16");
        else
            ITM_PRODUCT_256("bf16");
    }
#endif
}

// d += a B^T with 64 columns and TRANSPOSED of a [64, 16] in shared memory too, which begins at a described place.
template <Kind KIND>
__device__ __forceinline__ void group_multiply_shared(float (&d)[8][4], unsigned long long a, unsigned long long b) {
    static_assert(KIND == F16 || KIND == BF16);
#ifdef ITM_EMULATE
    emulator::GroupOperands mine{&d[0][0], nullptr, a, b};
    emulator::together("group_multiply_shared", &mine, [](void *const(&brought)[32]) {
        constexpr auto NUMBERS = KIND == F16 ? emulator::Numbers::FLOAT16 : emulator::Numbers::BFLOAT16;
        emulator::group_multiply(brought, NUMBERS, 64, true, true);
    });
#else
    if constexpr (KIND == F16)
        ITM_PRODUCT_OF_SHARED("f16");
    else
        ITM_PRODUCT_OF_SHARED("bf16");
#endif
}
