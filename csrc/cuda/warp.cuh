// The instructions the kernels are made of, one function each. The kernels touch shared memory only through these, by 32-bit
// shared address, so that emulate/warp.h can stand in for this file and run the same kernels on the host.
#pragma once

#ifdef SMI_EMULATE
#include "../emulate/warp.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace smi {

struct bf16 {};  // tags: which of the two 16-bit formats a template computes in
struct fp16 {};

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int block_head() { return blockIdx.x; }
DEVICE int block_image() { return blockIdx.y; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_fast(float x) { return __log2f(x); }
DEVICE float reciprocal_fast(float x) { return __fdividef(1.f, x); }

DEVICE uint32_t shared_memory() {
    extern __shared__ __align__(1024) unsigned char smi_shared[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(smi_shared));
}

// 16 bytes from global to shared memory, in the background; zeros, and nothing read, when not real.
DEVICE void copy_async(uint32_t to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(real ? 16 : 0));
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most PENDING of this thread's committed groups are under way.
template <int PENDING>
DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory"); }

// Four 8x8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
DEVICE void load_matrices(uint32_t (&to)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

// c [16, 8] += a [16, 16] @ b [16, 8]
template <class T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DEVICE void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void mma<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded into one register, the first in the low half; and back.
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <>
DEVICE uint32_t pack<fp16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <class T>
DEVICE float2 unpack(uint32_t both);
template <>
DEVICE float2 unpack<bf16>(uint32_t both) { return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)}; }
template <>
DEVICE float2 unpack<fp16>(uint32_t both) { return __half22float2(*reinterpret_cast<const __half2*>(&both)); }

DEVICE void shared_store(uint32_t to, uint32_t x) { asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(to), "r"(x) : "memory"); }
DEVICE void shared_store(uint32_t to, float x) { asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(to), "f"(x) : "memory"); }
DEVICE float4 shared_load4(uint32_t from) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];\n" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(from) : "memory");
    return x;
}
DEVICE uint4 shared_load16(uint32_t from) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];\n" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}

DEVICE uint4 global_load16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }
DEVICE void global_store16(void* to, uint4 x) { *static_cast<uint4*>(to) = x; }

}  // namespace smi
#endif
