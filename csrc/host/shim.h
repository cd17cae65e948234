// The device functions on the host: the threads of a block run as fibers (as system threads with APT_THREADS), shared
// memory holds NaN before every block, and the matrix instructions follow the PTX manual.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "block.h"

#define APT_DEVICE inline
#define APT_BOTH inline
#define APT_KERNEL(threads) void
#define APT_PROBLEM const Problem
#define APT_SHARED(name) char* const name = host::shared_memory()
#define APT_UNROLL
#define APT_UNROLL_BY_TWO

namespace apt {

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace host {
inline int half_step = 16;
inline int half_step_asked() {
    const char* step = std::getenv("APT_HALF_STEP");
    return step ? std::atoi(step) : 16;
}

// A vector access to an address that is not a multiple of 16 bytes ends the process, as it does on a device.
inline void check_aligned(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16) {
        std::fprintf(stderr, "apt_kernels: block %d, thread %d: a vector at an odd address\n", block(), thread());
        std::abort();
    }
}
}  // namespace host

using std::fmax;
inline int thread_index() { return host::thread(); }
inline int block_index() { return host::block(); }
inline void sync_block() { host::meet_block(); }
inline void sync_warp() { host::meet_warp(); }

// Exchange between the lanes of a warp: each passes `mine` and reads those of the others.
template <class Value>
const Value* exchange(const Value& mine) {
    static_assert(sizeof(Value) <= host::kExchangeBytes);
    char* slots = host::next_exchange();
    std::memcpy(slots + host::thread() % 32 * sizeof(Value), &mine, sizeof(Value));
    host::meet_warp();
    return reinterpret_cast<const Value*>(slots);
}

inline float shuffle_xor(float x, int mask) { return exchange(x)[(host::thread() % 32) ^ mask]; }

inline float to_float(float x) { return x; }
inline float to_float(half_t x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
inline float to_float(bfloat_t x) { return c10::detail::f32_from_bits(x.bits); }

template <class T>
T from_float(float x) {
    if constexpr (std::is_same_v<T, half_t>) {
        return {c10::detail::fp16_ieee_from_fp32_value(x)};
    } else if constexpr (std::is_same_v<T, bfloat_t>) {
        return {c10::detail::round_to_nearest_even(x)};
    } else {
        return x;
    }
}

template <class T>
uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
template <class T>
float unpack(uint32_t pair, int i) {
    return to_float(T{static_cast<uint16_t>(pair >> (16 * i))});
}
inline float reciprocal(float x) { return 1 / x; }
inline float exp2_flushed(float x) { return exp2f(x); }
inline float2 load_float2(const float* p) { return *reinterpret_cast<const float2*>(p); }
inline float4 load_float4(const float* p) {
    host::check_aligned(p);
    return *reinterpret_cast<const float4*>(p);
}

template <class T>
constexpr bool kRuns = true;
constexpr bool kAsynchronousCopies = true;
template <int STAGES>
constexpr bool kRunsStages = true;

// ldmatrix.x4, see device.cuh.
inline void load_matrices(uint32_t (&r)[4], const void* row) {
    host::check_aligned(row);
    const uint16_t* const* rows = reinterpret_cast<const uint16_t* const*>(exchange(row));
    const int lane = host::thread() % 32;
    for (int i = 0; i < 4; ++i) {
        const uint16_t* p = rows[8 * i + lane / 4] + lane % 4 * 2;
        r[i] = p[0] | uint32_t(p[1]) << 16;
    }
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    host::check_aligned(row);
    const uint16_t* const* rows = reinterpret_cast<const uint16_t* const*>(exchange(row));
    const int lane = host::thread() % 32;
    for (int i = 0; i < 4; ++i) {
        const uint16_t *const *p = rows + 8 * i + lane % 4 * 2;
        r[i] = p[0][lane / 4] | uint32_t(p[1][lane / 4]) << 16;
    }
}

// mma.m16n8kK with K = 8 * REGISTERS: lane i holds rows i / 4 and i / 4 + 8 of a, column i / 4 of b, and of the inner
// dimension elements 2 * (i % 4) and the next, of each group of eight.
template <class T, int GROUPS>
void multiply_groups(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    struct Operands {
        float a[GROUPS][2][2], b[GROUPS][2];
    } mine;
    for (int g = 0; g < GROUPS; ++g) {
        for (int e = 0; e < 2; ++e) {
            mine.a[g][0][e] = unpack<T>(a[2 * g], e);
            mine.a[g][1][e] = unpack<T>(a[2 * g + 1], e);
            mine.b[g][e] = unpack<T>(b[g], e);
        }
    }
    const Operands* all = exchange(mine);
    const int row = host::thread() % 32 / 4, column = host::thread() % 4 * 2;
    for (int e = 0; e < 4; ++e) {
        float sum = 0;
        for (int k = 0; k < 8 * GROUPS; ++k) {
            const Operands& left = all[4 * row + k % 8 / 2];
            const Operands& right = all[4 * (column + e % 2) + k % 8 / 2];
            sum += left.a[k / 8][e / 2][k % 2] * right.b[k / 8][k % 2];
        }
        c[e] += sum;
    }
}

// The float16 product of 7.5, used if the environment has APT_HALF_STEP=8.
template <class T>
bool by_eights() {
    return std::is_same_v<T, half_t> && host::half_step == 8;
}
template <class T>
void multiply_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    const uint32_t a[2] = {a0, a1};
    multiply_groups<T, 1>(c, a, &b);
}
template <class T>
void multiply_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    multiply_groups<T, 2>(c, a, b);
}

inline void copy_vector(void* shared, const void* global) {
    host::check_aligned(shared);
    host::check_aligned(global);
    std::memcpy(shared, global, 16);
}
// Bytes are written at the first moment at which a device may write them, with APT_HALF_STEP=8 at the last one.
struct Copy {
    char held[16];
    void issue(void* shared, const void* global, bool real) {
        host::check_aligned(shared);
        host::check_aligned(global);
        std::memset(held, 0, 16);
        if (real) {
            std::memcpy(held, global, 16);
        }
        if (host::half_step != 8) {
            std::memcpy(shared, held, 16);
        }
    }
    void complete(void* shared) const {
        if (host::half_step == 8) {
            std::memcpy(shared, held, 16);
        }
    }
};
inline void commit_copies() {}
template <int pending>
void wait_for_copies() {}

inline bool has_asynchronous_copies() { return host::half_step_asked() != 8; }

template <class Function>
void launch(Function* kernel, int64_t blocks, int threads, int shared, const Problem& problem, void*) {
    host::half_step = host::half_step_asked();
    host::run_blocks(static_cast<int>(blocks), threads, shared, [&] { kernel(problem); });
}

}  // namespace apt
