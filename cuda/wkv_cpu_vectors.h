// Vectors of floats as wide as the instruction set that this file is compiled for, in GCC's and Clang's notation.
//
// Included by one kernel per instruction set: all is local to its file, and no header with templates or inline
// functions of its own is included, so that the linker never gives one kernel's code to another.

#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WKV_LANES 16
#define WKV_LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif defined(__AVX__)
#define WKV_LANES 8
#define WKV_LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#else
#define WKV_LANES 4
#define WKV_LANE_NUMBERS 0, 1, 2, 3
#endif

// The lanes numbered `...` of a then b. GCC has Clang's notation only since version 12.
#if defined(__clang__)
#define WKV_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define WKV_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Before a loop whose body is to be in line, every time round.
#if defined(__clang__)
#define WKV_UNROLL _Pragma("unroll")
#else
#define WKV_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

constexpr int LANES = WKV_LANES;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <int...>
struct Indices {};
typedef Indices<WKV_LANE_NUMBERS> Lanes;

inline Vec load(const float* x) {
    Vec out;
    __builtin_memcpy(&out, x, sizeof out);
    return out;
}

inline void store(float* x, Vec value) { __builtin_memcpy(x, &value, sizeof value); }

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec either(Ints condition, Vec yes, Vec no) { return condition ? yes : no; }

// Holds x in a register. With only 16 of them GCC would read it from memory wherever it is used, and a product of small
// matrices be as slow as its reads.
inline void hold(Vec& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm volatile("" : "+x"(x));
#else
    (void)x;
#endif
}

// exp(x) for x from -87.3 to 88, to 1e-7: 2^(n + f) with n the nearest integer to x log2(e).
inline Vec exp(Vec x) {
    constexpr float log2_e = 1.44269502f;
    constexpr float round = 12582912.0f;  // 1.5 * 2^23: a sum with it ends at the units
    Vec n = x * log2_e + round;
    Bits exponent = (Bits)n << 23;
    n -= round;
    Vec f = x * log2_e - n;
    Vec power = f * 1.53211236e-4f + 1.33901846e-3f;  // 2^f: 1 + log(2) f + ..., the rest fitted
    power = power * f + 9.61852632e-3f;
    power = power * f + 5.55036217e-2f;
    power = power * f + 2.40226477e-1f;
    power = power * f + 6.93147182e-1f;
    power = power * f + 1.0f;
    return (Vec)((Bits)power + exponent);
}

// One step of a butterfly between vectors a and b, in blocks of 2 H lanes: the lower (upper) halves of both.
template <int H, int... I>
inline Vec lower_halves(Vec a, Vec b, Indices<I...>) {
    return WKV_SHUFFLE(a, b, (I % (2 * H) < H ? I : LANES + I - H)...);
}

template <int H, int... I>
inline Vec upper_halves(Vec a, Vec b, Indices<I...>) {
    return WKV_SHUFFLE(a, b, (I % (2 * H) < H ? I + H : LANES + I)...);
}

// LANES vectors into one: lane i is the sum of x[i]'s lanes.
template <int H>
struct Sum {
    static inline Vec of(Vec* x) {
        for (int i = 0; i < H; i++)
            x[i] = lower_halves<H>(x[i], x[i + H], Lanes()) + upper_halves<H>(x[i], x[i + H], Lanes());
        return Sum<H / 2>::of(x);
    }
};

template <>
struct Sum<0> {
    static inline Vec of(Vec* x) { return x[0]; }
};

inline Vec sums(const Vec* rows) {
    Vec x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = rows[i];
    return Sum<LANES / 2>::of(x);
}

// LANES x LANES numbers, transposed in place.
template <int H>
struct Transpose {
    static inline void of(Vec* x) {
        for (int i = 0; i < LANES; i++) {
            if (i & H) continue;
            Vec lower = lower_halves<H>(x[i], x[i + H], Lanes());
            x[i + H] = upper_halves<H>(x[i], x[i + H], Lanes());
            x[i] = lower;
        }
        Transpose<H / 2>::of(x);
    }
};

template <>
struct Transpose<0> {
    static inline void of(Vec*) {}
};

// One block of a matrix with rows of `from_stride`, into rows of `to_stride`.
inline void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    Vec x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = load(from + i * from_stride);
    Transpose<LANES / 2>::of(x);
    for (int i = 0; i < LANES; i++) store(to + i * to_stride, x[i]);
}

// Types in memory.

struct Float32 {
    typedef float Element;
    static inline Vec get(const float* x) { return load(x); }
    static inline void put(float* x, Vec value) { store(x, value); }
};

// Widening in the generic notation takes GCC twice the instructions, or more.
inline Bits load_halves(const uint16_t* x) {
#if defined(__AVX512F__)
    return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__AVX2__)
    return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
#else
    Halves out;
    __builtin_memcpy(&out, x, sizeof out);
    return __builtin_convertvector(out, Bits);
#endif
}

inline void store_halves(uint16_t* x, Bits value) {
    Halves out = __builtin_convertvector(value, Halves);
    __builtin_memcpy(x, &out, sizeof out);
}

struct Bfloat16 {
    typedef uint16_t Element;
    static inline Vec get(const uint16_t* x) { return (Vec)(load_halves(x) << 16); }

    // To nearest, ties to even; NaN stays NaN.
    static inline void put(uint16_t* x, Vec value) {
        Bits bits = (Bits)value;
        Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        store_halves(x, value == value ? rounded : (bits >> 16) | 0x40);
    }
};

struct Int8 {
    typedef int8_t Element;
    static inline Vec get(const int8_t* x) {
#if defined(__AVX512F__)
        return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
#elif defined(__AVX2__)
        return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)));
#else
        typedef int8_t Bytes __attribute__((vector_size(LANES)));
        Bytes out;
        __builtin_memcpy(&out, x, sizeof out);
        return __builtin_convertvector(__builtin_convertvector(out, Ints), Vec);
#endif
    }
};

// No subnormal float32 comes up on the way: the caller may have them flushed to zero.
struct Float16 {
    typedef uint16_t Element;

    static inline Vec get(const uint16_t* x) {
        Bits half = load_halves(x), magnitude = half & 0x7fff, wide = magnitude << 13;
        Bits smallest = Bits{} + (113u << 23);  // 2^-14; below it float16 is subnormal
        Bits subnormal = (Bits)((Vec)(wide + smallest) - (Vec)smallest);
        Bits normal = wide + (magnitude >= 0x7c00 ? Bits{} + (224u << 23) : Bits{} + (112u << 23));
        return (Vec)((magnitude < 0x400 ? subnormal : normal) | (half & 0x8000) << 16);
    }

    // To nearest, ties to even.
    static inline void put(uint16_t* x, Vec value) {
        Bits bits = (Bits)value, magnitude = bits & 0x7fffffff;
        Bits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
        Vec half = broadcast(0.5f);  // its last bit is float16's smallest number
        Bits subnormal = (Bits)((Vec)magnitude + half) - (Bits)half;
        Bits finite = magnitude < (113u << 23) ? subnormal : normal;
        Bits special = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
        store_halves(x, (magnitude < 0x477ff000u ? finite : special) | ((bits >> 16) & 0x8000));
    }
};

}  // namespace
