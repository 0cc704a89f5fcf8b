// What the kernels ask of the machine: each primitive has a device form and a host form with the same face.
//
// nvcc takes primitives_device.h. A C++ compiler takes primitives_host.h, which runs the very source of the kernels
// on a CPU: the threads of a block step from barrier to barrier, warps meet in shuffles and matrix products.

#pragma once

#include <stdint.h>

#include "wkv.h"

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

#ifdef __CUDACC__
#include "primitives_device.h"
#else
#include "primitives_host.h"
#endif

constexpr int kWarp = 32;
constexpr float kLog2E = 1.44269504088896341f;

DEVICE float to_float(float x) { return x; }

DEVICE float to_float(Bfloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

// The two Bfloat16 or Float16 values of one word, lower address first.
template <class In>
DEVICE void unpack(uint32_t word, float& first, float& second) {
    first = to_float(In{static_cast<uint16_t>(word)});
    second = to_float(In{static_cast<uint16_t>(word >> 16)});
}

// Four neighbours in memory, aligned to their size, in one access.
struct alignas(16) Float4 {
    float x[4];
};

struct alignas(8) Float2 {
    float x[2];
};

struct alignas(8) Words {
    uint32_t x[2];
};

DEVICE void load4(const float* from, float (&x)[4]) {
    const Float4 four = *reinterpret_cast<const Float4*>(from);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = four.x[i];
    }
}

DEVICE void store4(float* to, const float (&x)[4]) {
    *reinterpret_cast<Float4*>(to) = {{x[0], x[1], x[2], x[3]}};
}

template <class In>
DEVICE void load4(const In* from, float (&x)[4]) {
    const Words words = *reinterpret_cast<const Words*>(from);
    unpack<In>(words.x[0], x[0], x[1]);
    unpack<In>(words.x[1], x[2], x[3]);
}

template <class In>
DEVICE void store4(In* to, const float (&x)[4]) {
    *reinterpret_cast<Words*>(to) = {{pack<In>(x[0], x[1]), pack<In>(x[2], x[3])}};
}

// Element `index` of an array of type In, or of float32 if `type` says so.
template <class In>
DEVICE float load_either(const void* data, int64_t index, int32_t type) {
    return type == WKV_FLOAT32 ? static_cast<const float*>(data)[index]
                                : to_float(static_cast<const In*>(data)[index]);
}

template <class In>
DEVICE void store_either(void* data, int64_t index, int32_t type, float value) {
    if (type == WKV_FLOAT32) {
        static_cast<float*>(data)[index] = value;
    } else {
        from_float(static_cast<In*>(data)[index], value);
    }
}
