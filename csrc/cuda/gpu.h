// What the kernels take from the hardware, as inline PTX, so that compiling them needs no header of CUDA. Beside each
// is its twin for tests/cuda/emulator.h, which runs the kernels on a CPU (ITM_EMULATE).
//
// DYNAMIC_SHARED(name, bytes) declares the block's shared memory, whose size the launch gives. The emulator compares
// that with `bytes`, which may be left out.
//
// In a warp, g = lane / 4 and t = lane % 4. A product has accumulators [16, 8]: lane (g, t) holds columns 2t and 2t + 1
// of row g, in d[0] and d[1], and of row g + 8, in d[2] and d[3].
#pragma once
#ifdef ITM_EMULATE
#include "emulator.h"
#define DYNAMIC_SHARED(name, ...) unsigned char *name = emulator::shared_memory(__VA_ARGS__)
#else
#define DYNAMIC_SHARED(name, ...) extern __shared__ __align__(1024) unsigned char name[]
#endif

// How the factors of matrix products are stored and multiplied.
//   F16, BF16: as float16 or bfloat16 numbers.
//   F16X3: float32 as the sum of two float16 numbers; three products. Memory holds 32 first and then 32 second halves.
//   TF32: float32 rounded to 11 bits. TF32X3: float32 as the sum of two such numbers; three products.
enum Kind { BF16, F16, TF32, TF32X3, F16X3 };

constexpr float LOG2E = 1.44269504088896f;
#define INFINITE as_float(0x7f800000u)

__device__ __forceinline__ float as_float(unsigned x) {
#ifdef ITM_EMULATE
    float y;
    std::memcpy(&y, &x, 4);
    return y;
#else
    return __uint_as_float(x);
#endif
}

__device__ __forceinline__ unsigned as_bits(float x) {
#ifdef ITM_EMULATE
    unsigned y;
    std::memcpy(&y, &x, 4);
    return y;
#else
    return __float_as_uint(x);
#endif
}

// x y, rounded. The compiler may make x * y - z one operation that rounds once, and then the difference of a product
// and its own copy is not 0. So may the emulator's, with -O3 -ffp-contract=fast.
__device__ __forceinline__ float rounded_product(float x, float y) {
#ifdef ITM_EMULATE
    float product = x * y;
    asm("" : "+x"(product));
    return product;
#else
    return __fmul_rn(x, y);
#endif
}

// x, of which the compiler knows nothing: what is computed from it in a loop holds no registers around the loop.
__device__ __forceinline__ int opaque(int x) {
#ifndef ITM_EMULATE
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// x of the lane whose number differs by `mask`.
__device__ __forceinline__ float shuffle_xor(float x, int mask) {
#ifdef ITM_EMULATE
    struct {
        float in, out;
    } mine{x, 0};
    emulator::together("shuffle", &mine, [mask](void **brought) {
        for (int i = 0; i < 32; ++i)
            static_cast<float *>(brought[i])[1] = static_cast<float *>(brought[i ^ mask])[0];
    });
    return mine.out;
#else
    return __shfl_xor_sync(0xffffffffu, x, mask);
#endif
}

// Lanes of the warp wait for each other, and see what each has written to memory before.
__device__ __forceinline__ void sync_warp() {
#ifdef ITM_EMULATE
    emulator::together("sync_warp", nullptr, [](void **) {});
#else
    __syncwarp();
#endif
}

// Starts to copy 16 bytes to shared memory, or zeros where there is nothing `real` to copy; `from` is valid all the
// same. Before sm_80 the copy has happened on return.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool real) {
#ifdef ITM_EMULATE
    emulator::start_copy(to, real ? from : nullptr);
#elif __CUDA_ARCH__ >= 800
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    int bytes = real ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
#else
    *static_cast<uint4 *>(to) = real ? *static_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
#endif
}

// Makes a group of the thread's copies since the last one.
__device__ __forceinline__ void commit() {
#ifdef ITM_EMULATE
    emulator::commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last N groups of the thread's copies have landed. Other threads see them after a barrier.
template <int N> __device__ __forceinline__ void wait_groups() {
#ifdef ITM_EMULATE
    emulator::wait(N);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#ifdef ITM_EMULATE
namespace emulator {
struct Rows {
    const void *row;
    unsigned *out;
};
// Of the four matrices, lane i gets words i % 4 of row i / 4; or numbers 2 (i % 4) and 2 (i % 4) + 1 of column i / 4.
template <bool TRANSPOSED> void load_matrices(void *const (&brought)[32]) {
    auto lane = [&](int i) { return static_cast<Rows *>(brought[i]); };
    for (int m = 0; m < 4; ++m) {
        const void *row[8];
        for (int i = 0; i < 8; ++i) row[i] = lane(m * 8 + i)->row;
        count_conflicts(row);
        for (int i = 0; i < 32; ++i) {
            auto number = [&](int y, int x) { return unsigned(static_cast<const unsigned short *>(row[y])[x]); };
            int y = i / 4, x = i % 4 * 2;
            lane(i)->out[m] = TRANSPOSED ? number(x, y) | number(x + 1, y) << 16
                                         : number(y, x) | number(y, x + 1) << 16;
        }
    }
    ++counts.matrices, counts.shared += 512;
}
}  // namespace emulator
#endif

// Loads four matrices of 8 rows of 16 bytes each from shared memory: lane i brings the address of row i % 8 of matrix
// i / 8, and gets of matrix m the four bytes t of row g in r[m].
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void *row) {
#ifdef ITM_EMULATE
    emulator::Rows mine{row, r};
    emulator::together("load_matrices", &mine, emulator::load_matrices<false>);
#else
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#endif
}

// The same of the transposed matrices of 16-bit numbers: a lane gets numbers 2t and 2t + 1 of column g.
__device__ __forceinline__ void load_transposed(unsigned (&r)[4], const void *row) {
#ifdef ITM_EMULATE
    emulator::Rows mine{row, r};
    emulator::together("load_transposed", &mine, emulator::load_matrices<true>);
#else
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#endif
}

// Two numbers as the nearest float16 numbers, `low` in the lower half.
__device__ __forceinline__ unsigned to_halves(float low, float high) {
#ifdef ITM_EMULATE
    return emulator::to_half(low) | unsigned(emulator::to_half(high)) << 16;
#else
    unsigned short l, h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
    return l | unsigned(h) << 16;
#endif
}

// The float16 number in the lower or upper half.
__device__ __forceinline__ float half_of(unsigned halves, bool upper) {
    unsigned short bits = static_cast<unsigned short>(upper ? halves >> 16 : halves);
#ifdef ITM_EMULATE
    return emulator::from_half(bits);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}

// Two numbers rounded to bfloat16 or float16, `low` in the lower half.
template <Kind KIND> __device__ __forceinline__ unsigned rounded(float low, float high) {
    if constexpr (KIND == F16)
        return to_halves(low, high);
    else {
#ifdef ITM_EMULATE
        auto bits = [](float x) {
            unsigned b = as_bits(x);
            return x == x ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : 0x7fffu;
        };
        return bits(low) | bits(high) << 16;
#else
        unsigned y;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
#endif
    }
}

// The nearest TF32 number, ties away from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
#ifdef ITM_EMULATE
    unsigned y = as_bits(x);
    if ((y & 0x7f800000u) != 0x7f800000u) y += 0x1000u;
#else
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#endif
    return y & ~0x1fffu;  // PTX does not say what these bits are
}

// d += a b^T of 16-bit numbers a [16, 8] and b [8, 8], float16: a product of every GPU from sm_75 on.
__device__ __forceinline__ void multiply_short(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
#ifdef ITM_EMULATE
    unsigned a[2] = {a0, a1};
    emulator::Operands mine{d, a, &b};
    emulator::together("multiply_short", &mine, [](void *const(&brought)[32]) {
        emulator::multiply(brought, emulator::Numbers::FLOAT16, 8);
    });
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
#endif
}

// d += a b^T of a [16, K] and b [8, K], K = 16 float16 or bfloat16 numbers or 8 of TF32. A lane's words: a[0] has row g
// of a's first half and a[1] row g + 8, a[2] and a[3] the same of the second half; b0 and b1 row g of b's two halves.
template <Kind KIND>
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef ITM_EMULATE
    unsigned b[2] = {b0, b1};
    emulator::Operands mine{d, a, b};
    emulator::together("multiply", &mine, [](void *const(&brought)[32]) {
        using emulator::Numbers;
        constexpr Numbers NUMBERS = KIND == BF16 ? Numbers::BFLOAT16 : KIND == F16 ? Numbers::FLOAT16 : Numbers::TF32;
        emulator::multiply(brought, NUMBERS, NUMBERS == Numbers::TF32 ? 8 : 16);
    });
#else
    if constexpr (KIND == BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else if constexpr (KIND == F16) {
#if __CUDA_ARCH__ >= 800
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
        multiply_short(d, a[0], a[1], b0);
        multiply_short(d, a[2], a[3], b1);
#endif
    } else
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The same of float32 numbers as they lie in memory: rounded to TF32, or as the sum of two TF32 numbers (TF32X3).
template <Kind KIND>
__device__ __forceinline__ void multiply_floats(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned A[4], B[2] = {to_tf32(as_float(b0)), to_tf32(as_float(b1))};
#pragma unroll
    for (int i = 0; i < 4; ++i) A[i] = to_tf32(as_float(a[i]));
    if constexpr (KIND == TF32X3) {
        unsigned rest[4], less[2] = {to_tf32(as_float(b0) - as_float(B[0])), to_tf32(as_float(b1) - as_float(B[1]))};
#pragma unroll
        for (int i = 0; i < 4; ++i) rest[i] = to_tf32(as_float(a[i]) - as_float(A[i]));
        multiply<TF32>(d, rest, B[0], B[1]);
        multiply<TF32>(d, A, less[0], less[1]);
    }
    multiply<TF32>(d, A, B[0], B[1]);
}

// The two 16-bit numbers of a word.
template <Kind KIND> __device__ __forceinline__ float low(unsigned word) {
    return KIND == BF16 ? as_float(word << 16) : half_of(word, false);
}
template <Kind KIND> __device__ __forceinline__ float high(unsigned word) {
    return KIND == BF16 ? as_float(word & 0xffff0000u) : half_of(word, true);
}

// Over the four lanes that hold a row of a product.
__device__ __forceinline__ float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    float y = shuffle_xor(x, 1);
    x = y > x ? y : x;
    y = shuffle_xor(x, 2);
    return y > x ? y : x;
}

// The sum of x over all lanes of a warp.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// *at = max(*at, x), in shared memory.
__device__ __forceinline__ void raise_to(unsigned *at, unsigned x) {
#ifdef ITM_EMULATE
    if (x > *at) *at = x;
#else
    atomicMax(at, x);
#endif
}
