// What the kernels share: the table of shards, dtypes and their conversions, staging, faults.
//
// Header-free CUDA C++17: NVRTC, nvcc and the emulator (tests/emulator/) compile the same text. Arguments of kernels
// are pointers, 64-bit integers and doubles. A value is converted once: integers must fit an integer dtype exactly,
// floats are rounded to nearest even; where the dtype stays, the bits stay.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
struct half { u16 bits; };
struct bfloat { u16 bits; };

#ifndef EMULATED
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define EXPORT_KERNEL(name)
#endif

constexpr u32 ALL_LANES = 0xffffffffu;

// shards.py has the same entry, codes and faults.
struct Shard {
    u64 indices, data, nnz;  // addresses, in whatever memory a kernel can read; elements
    u32 index_bytes, kind, is_sorted, reserved;
};
enum Kind : u32 { UINT8, UINT16, UINT32, UINT64, FLOAT16, FLOAT32, FLOAT64 };
enum Fault { OUT_OF_RANGE, DUPLICATE, UNFITTING, DAMAGED };

__device__ __forceinline__ u32 value_bytes(u32 kind) { return kind < FLOAT16 ? 1u << kind : 1u << (kind - 3); }

// Keep the first position in the batch at which there is a fault. Rare, so that the atomics cost nothing.
__device__ __forceinline__ void report(i32* faults, Fault fault, i64 position) { atomicMin(faults + fault, (i32)position); }

// ---- conversions --------------------------------------------------------------------------------------------

template <class T> constexpr bool is_integer = false;
template <> constexpr bool is_integer<u8> = true;
template <> constexpr bool is_integer<u16> = true;
template <> constexpr bool is_integer<u32> = true;
template <> constexpr bool is_integer<u64> = true;
template <> constexpr bool is_integer<i8> = true;
template <> constexpr bool is_integer<i16> = true;
template <> constexpr bool is_integer<i32> = true;
template <> constexpr bool is_integer<i64> = true;
template <class A, class B> constexpr bool is_same = false;
template <class A> constexpr bool is_same<A, A> = true;
template <class T> constexpr bool is_narrow_float = is_same<T, half> || is_same<T, bfloat>;
template <class T> constexpr bool is_signed = T(-1) < T(0);
template <class T> constexpr u64 largest = ~u64(0) >> (64 - 8 * sizeof(T) + is_signed<T>);

// A double in 1 + exponent_bits + mantissa_bits bits, to nearest even; a NaN becomes the quiet one.
template <int exponent_bits, int mantissa_bits> __device__ __forceinline__ u16 narrowed(double x) {
    constexpr i32 most = (1 << (exponent_bits - 1)) - 1, least = 1 - most;  // exponents of normal numbers
    constexpr u16 infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
    const u64 bits = (u64)__double_as_longlong(x);
    const u16 sign = (u16)(bits >> 63 << (exponent_bits + mantissa_bits));
    const i32 exponent = (i32)(bits >> 52 & 0x7ff) - 1023;
    const u64 fraction = bits & 0xfffffffffffffull;
    if (exponent == 1024) return sign | infinity | (fraction ? 1 << (mantissa_bits - 1) : 0);
    if (exponent > most) return sign | infinity;
    if (exponent < least - mantissa_bits - 1) return sign;
    const u32 drop = 52 - mantissa_bits + (exponent < least ? least - exponent : 0);
    const u64 whole = fraction | 1ull << 52, kept = whole >> drop, rest = whole & ((1ull << drop) - 1), tie = 1ull << (drop - 1);
    const u64 rounded = kept + (rest > tie || (rest == tie && (kept & 1)));
    return sign | (u16)(rounded + (exponent < least ? 0 : (u64)(exponent - least) << mantissa_bits));
}

__device__ __forceinline__ double widened(half h) {
    const u64 sign = (u64)(h.bits >> 15) << 63, fraction = h.bits & 0x3ff;
    const u32 exponent = h.bits >> 10 & 31;
    if (exponent == 0) {
        const double tiny = (double)fraction * (1.0 / 16777216.0);
        return sign ? -tiny : tiny;
    }
    const u64 wide = exponent == 31 ? 2047 : exponent - 15 + 1023;
    return __longlong_as_double((i64)(sign | wide << 52 | fraction << 42));
}

// What a stored number is worth, in a double: exactly, but for integers above 2^53. Those keep their leading bits and
// an odd last one for whatever was dropped, so that rounding the double once more gives what rounding once would.
__device__ __forceinline__ double worth(u64 x) { return x >> 53 ? (double)((x >> 11) | ((x & 0x7ff) != 0)) * 2048.0 : (double)x; }
__device__ __forceinline__ double worth(i64 x) { return x < 0 ? -worth(0 - (u64)x) : worth((u64)x); }
__device__ __forceinline__ double worth(half x) { return widened(x); }
__device__ __forceinline__ double worth(float x) {
#ifdef EMULATED
    return x;
#else  // CuPy compiles with -ftz=true, which would make the smallest numbers 0: these two conversions do not
    double wide;
    asm("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(x));
    return wide;
#endif
}
__device__ __forceinline__ double worth(double x) { return x; }

__device__ __forceinline__ float rounded(double x) {
#ifdef EMULATED
    return (float)x;
#else
    float narrow;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(narrow) : "d"(x));
    return narrow;
#endif
}

// Convert a stored number (u8 to u64, i64, half, float, double) to the dtype of the batch; false if that does not hold it.
template <class Out, class In> __device__ __forceinline__ bool convert(In x, Out& out) {
    if constexpr (is_same<In, Out>) {
        out = x;
    } else if constexpr (is_same<In, i64> && is_narrow_float<Out>) {
        return convert(worth(x), out);
    } else if constexpr (is_same<In, i64>) {
        out = (Out)x;
        if constexpr (is_integer<Out>) return x < 0 ? is_signed<Out> && 0 - (u64)x <= largest<Out> + 1 : (u64)x <= largest<Out>;
    } else if constexpr (is_integer<In> && is_narrow_float<Out>) {
        return convert(worth((u64)x), out);
    } else if constexpr (is_integer<In>) {
        out = (Out)x;
        if constexpr (is_integer<Out> && (u64)(In)~In(0) > largest<Out>) return (u64)x <= largest<Out>;
    } else if constexpr (is_integer<Out>) {
        const double value = worth(x), limit = (double)largest<Out> + (sizeof(Out) < 8 ? 1.0 : 0.0);
        const bool fits = value < limit && value >= (is_signed<Out> ? -limit : 0.0) && value == trunc(value);
        out = fits ? (Out)value : (Out)0;
        return fits;
    } else if constexpr (is_same<Out, half>) {
        out.bits = narrowed<5, 10>(worth(x));
    } else if constexpr (is_same<Out, bfloat>) {
        out.bits = narrowed<8, 7>(worth(x));
    } else if constexpr (is_same<Out, float>) {
        out = rounded(worth(x));
    } else {
        out = worth(x);
    }
    return true;
}

// ---- stored elements ----------------------------------------------------------------------------------------

// Call `work` with `at` as a pointer to columns, or values, of the stored type.
template <class Work> __device__ __forceinline__ void with_columns(u32 bytes, const void* at, Work work) {
    switch (bytes) {
        case 1: return work((const u8*)at);
        case 2: return work((const u16*)at);
        case 4: return work((const u32*)at);
        default: return work((const u64*)at);
    }
}
template <class Work> __device__ __forceinline__ void with_values(u32 kind, const void* at, Work work) {
    switch (kind) {
        case UINT8: return work((const u8*)at);
        case UINT16: return work((const u16*)at);
        case UINT32: return work((const u32*)at);
        case UINT64: return work((const u64*)at);
        case FLOAT16: return work((const half*)at);
        case FLOAT32: return work((const float*)at);
        default: return work((const double*)at);
    }
}

// Element k of an array of 1, 2, 4 or 8 bytes an element, its bits zero-extended.
__device__ __forceinline__ u64 word_at(u64 address, u32 bytes, u64 k) {
    switch (bytes) {
        case 1: return ((const u8*)address)[k];
        case 2: return ((const u16*)address)[k];
        case 4: return ((const u32*)address)[k];
        default: return ((const u64*)address)[k];
    }
}

// The number that the bits of a word are, in whatever form `work` takes: u64, half, float or double.
template <class Work> __device__ __forceinline__ auto with_number(u32 kind, u64 word, Work work) {
    if (kind < FLOAT16) return work(word);
    if (kind == FLOAT16) return work(half{(u16)word});
    if (kind == FLOAT32) return work(__uint_as_float((u32)word));
    return work(__longlong_as_double((i64)word));
}

// ---- staging ------------------------------------------------------------------------------------------------

// Begin to copy 16 bytes into shared memory, both aligned to 16; where the GPU can, without passing through registers.
__device__ __forceinline__ void copy_async(void* shared, const void* from) {
#ifdef EMULATED
    emulated_copy_async(shared, from);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(from) : "memory");
#else
    *(uint4*)shared = *(const uint4*)from;
#endif
}

// Wait for this thread's own copies; __syncwarp or __syncthreads then shows them to the others.
__device__ __forceinline__ void wait_for_copies() {
#ifdef EMULATED
    emulated_copies_wait();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ __forceinline__ u64 floor16(u64 x) { return x & ~15ull; }
__device__ __forceinline__ u64 ceil16(u64 x) { return (x + 15) & ~15ull; }

// Begin to copy the bytes first..last-1, both multiples of 16, as a warp or several. Lanes start at a line of 128 bytes, so
// that each request but the first and last is for whole lines: over PCIe that is worth 5 to 10 % (dgl#3254).
__device__ __forceinline__ void stage(u8* shared, u64 first, u64 last, u32 lane, u32 n_lanes = 32) {
#pragma unroll 4
    for (u64 at = (first & ~127ull) + lane * 16; at < last; at += n_lanes * 16)
        if (at >= first) copy_async(shared + (at - first), (const void*)at);
}

// ---- warps and blocks ---------------------------------------------------------------------------------------

// The sum of x over this lane and those below it.
__device__ __forceinline__ u32 running_sum(u32 x, u32 lane) {
#pragma unroll
    for (u32 by = 1; by < 32; by <<= 1) {
        const u32 below = __shfl_up_sync(ALL_LANES, x, by);
        if (lane >= by) x += below;
    }
    return x;
}

// The last i in 0..n-1 with sums[i] <= x, by a whole warp, 32 guesses at a time; sums[0] <= x, sums never fall.
template <class Index> __device__ __forceinline__ u64 last_at_most(const Index* sums, u64 n, u64 x, u32 lane) {
    u64 low = 0, high = n;
    while (high - low > 1) {
        const u64 step = (high - low + 31) / 32, guess = low + lane * step;
        const u32 hits = __ballot_sync(ALL_LANES, guess < high && (u64)sums[guess] <= x);
        low += (u64)(__popc(hits) - 1) * step;
        high = min(high, low + step);
    }
    return low;
}
