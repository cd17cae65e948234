// The device functions that the kernels use. host/shim.h defines the same names for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#define APT_DEVICE __device__ __forceinline__
#define APT_BOTH __host__ __device__ inline
// One block per multiprocessor: with more, the compiler spills registers to reach a higher occupancy.
#define APT_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define APT_PROBLEM const __grid_constant__ Problem
#define APT_SHARED(name) extern __shared__ __align__(16) char name[]
#define APT_UNROLL _Pragma("unroll")
#define APT_UNROLL_BY_TWO _Pragma("unroll 2")

namespace apt {

APT_DEVICE int thread_index() { return threadIdx.x; }
APT_DEVICE int block_index() { return blockIdx.x; }
APT_DEVICE void sync_block() { __syncthreads(); }
APT_DEVICE void sync_warp() { __syncwarp(); }
APT_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

APT_DEVICE float to_float(float x) { return x; }
APT_DEVICE float to_float(half_t x) { return __half2float(__ushort_as_half(x.bits)); }
APT_DEVICE float to_float(bfloat_t x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <class T>
APT_DEVICE T from_float(float x);
template <>
APT_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
APT_DEVICE half_t from_float<half_t>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}
template <>
APT_DEVICE bfloat_t from_float<bfloat_t>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// Two numbers rounded to T, the first one in the low half.
template <class T>
APT_DEVICE uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, half_t>) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

// One instruction each, exact to about one unit in the last place: 1 / x, and 2^x. Results below the normal numbers are
// zero.
APT_DEVICE float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
APT_DEVICE float exp2_flushed(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

APT_DEVICE float2 load_float2(const float* p) { return *reinterpret_cast<const float2*>(p); }
APT_DEVICE float4 load_float4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Whether kernels of a type run on the architecture being compiled: bfloat16 needs 8.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool kRuns = !std::is_same_v<T, bfloat_t>;
constexpr bool kAsynchronousCopies = false;
#else
template <class T>
constexpr bool kRuns = true;
constexpr bool kAsynchronousCopies = true;
#endif
// Whether kernels that have this number of tiles in memory at once run on it.
template <int STAGES>
constexpr bool kRunsStages = STAGES == (kAsynchronousCopies ? 2 : 1);

// Four 8x8 tiles of 16-bit elements; lane i names row i % 8 of tile i / 8. Register r takes elements 2 * (lane % 4) and
// the next of row lane / 4 of tile r (of its transpose).
APT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
APT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Whether the tensor cores multiply a type in steps of eight inner elements: float16 on 7.5.
template <class T>
APT_DEVICE constexpr bool by_eights() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return std::is_same_v<T, half_t>;
#else
    return false;
#endif
}

// c += a b, with a [16, 8], b [8, 8]; float16 only.
template <class T>
APT_DEVICE void multiply_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// c += a b, with a [16, 16], b [16, 8]; from 8.0.
template <class T>
APT_DEVICE void multiply_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, half_t>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#endif
}

// Copy sixteen bytes from global to shared memory, zeros where they are not `real`; asynchronous until `wait_for_copies`
// on 8.0 and newer.
APT_DEVICE void copy_vector(void* shared, const void* global, bool real = true) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(real ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(shared) = real ? *static_cast<const uint4*>(global) : uint4{};
#endif
}
APT_DEVICE void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Wait until at most the last `pending` groups of copies are incomplete.
template <int pending>
APT_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Sixteen bytes on their way from global to shared memory; zeros where they are not `real`. They arrive after
// `complete` and `wait_for_copies`: from 8.0 on the copy is asynchronous, before that a register holds them.
struct Copy {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    uint4 held;
    APT_DEVICE void issue(void*, const void* global, bool real) {
        held = real ? *static_cast<const uint4*>(global) : uint4{};
    }
    APT_DEVICE void complete(void* shared) { *static_cast<uint4*>(shared) = held; }
#else
    APT_DEVICE void issue(void* shared, const void* global, bool real) { copy_vector(shared, global, real); }
    APT_DEVICE void complete(void*) {}
#endif
};

// `kAsynchronousCopies` of the current device.
inline bool has_asynchronous_copies() {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8;
}

template <class Function>
void launch(Function* kernel, int64_t blocks, int threads, int shared, const Problem& problem, void* stream) {
    if (blocks > 0x7fffffff) {
        throw std::runtime_error("apt_kernels: the inputs need more than 2^31 - 1 blocks");
    }
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    }
    if (error == cudaSuccess) {
        kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(problem);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("apt_kernels: a kernel was not launched: ") + cudaGetErrorString(error));
    }
}

}  // namespace apt
