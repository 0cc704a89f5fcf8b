// The primitives on an NVIDIA GPU, compute capability 8.0 or newer.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

using Stream = cudaStream_t;

DEVICE int64_t block_index() { return blockIdx.x; }

DEVICE int thread_index() {
    const int index = static_cast<int>(threadIdx.x);
    __builtin_assume(index >= 0);  // or else each division by a power of two takes care of the sign
    return index;
}

DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

template <class T>
DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Accurate, for the kernel whose results are compared in float32.
DEVICE float exp_accurate(float x) { return expf(x); }

DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
DEVICE void from_float(float& out, float x) { out = x; }
DEVICE void from_float(Bfloat16& out, float x) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
DEVICE void from_float(Float16& out, float x) { out.bits = __half_as_ushort(__float2half_rn(x)); }

// Two numbers in one word, the first at the lower address.
template <class In>
DEVICE uint32_t pack(float first, float second);

template <>
DEVICE uint32_t pack<Bfloat16>(float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <>
DEVICE uint32_t pack<Float16>(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&both);
}

// Round to the 10 bits of mantissa that the tensor cores read.
DEVICE float to_tf32(float x) {
    uint32_t bits;
#if __CUDA_ARCH__ >= 900
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));  // there several instructions
#endif
    return __uint_as_float(bits);
}

// 16 bytes from global to shared memory behind the threads' backs; zeros if not `valid`.
DEVICE void copy_async(void* shared, const void* global, bool valid) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes));
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Until all but the newest `kPending` groups of this thread have arrived.
template <int kPending>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// c (16 x 8) += a (16 x 8) b (8 x 8) by one warp, operands in TF32. Lane 4 g + t holds a: (g, t) (g + 8, t) (g, t + 4)
// (g + 8, t + 4); b: (t, g) (t + 4, g); c: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1).
DEVICE void matmul(float (&c)[4], const float (&a)[4], float b0, float b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// c (16 x 8) += a (16 x 16) b (16 x 8) in bfloat16, with two neighbours of the inner index in a word:
// a: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8); b: (2t, g) (2t + 8, g).
DEVICE void matmul(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit numbers by one warp: lane 8 m + i has the address of row i of matrix m, and lane 4 g +
// t gets of each (g, 2t) and (g, 2t + 1) in one word; transposed (2t, g) and (2t + 1, g).
template <bool kTransposed>
DEVICE void load_matrices(const void* row, uint32_t (&x)[4]) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(address)
                     : "memory");
    }
}

// Transposes an 8 x 8 matrix of 16-bit numbers by one warp; lane 4 g + t has (g, 2t) and (g, 2t + 1) in one word.
DEVICE uint32_t transpose_matrix(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Starts `kernel`; the code of the first CUDA error, 0 for none.
template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, Stream stream, const Params& params) {
    if (blocks == 0) {
        return 0;
    }
    if (blocks > INT32_MAX) {
        return cudaErrorInvalidConfiguration;
    }
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) {
        return error;
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params);
    return cudaGetLastError();
}
