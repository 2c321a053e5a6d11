// Every PTX instruction that the kernels use, one small function each, named after the instruction.
//
// Nothing here includes a CUDA header. A build for the CPU defines GPUBACK_EMULATOR and brings functions of the same
// names.
//
// Fragments. A warp holds a matrix tile spread over its lanes. With g = lane / 4 and t = lane % 4, for 16-bit operands
// (m16n8k16) a lane holds
//     A (16 x 16)  a[0] = A[g][2t, 2t+1]   a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, 2t+9]
//                  a[3] = A[g+8][2t+8, 2t+9]
//     B (16 x 8)   b[0] = B[2t, 2t+1][g]   b[1] = B[2t+8, 2t+9][g]
//     C (16 x 8)   c[0], c[1] = C[g][2t, 2t+1]    c[2], c[3] = C[g+8][2t, 2t+1]
// and for TF32 (m16n8k8), one number to a register,
//     A (16 x 8)   a[0] = A[g][t]   a[1] = A[g+8][t]   a[2] = A[g][t+4]   a[3] = A[g+8][t+4]
//     B (8 x 8)    b[0] = B[t][g]   b[1] = B[t+4][g]
//     C (16 x 8)   as above.
// Source: PTX ISA, "Matrix fragments for mma.m16n8k16 / mma.m16n8k8".
#pragma once

#ifdef GPUBACK_EMULATOR
#include "emulated_ptx.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void

// The block's dynamic shared memory, aligned for 16-byte copies.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

typedef unsigned short uint16;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

DEVICE uint32 shared_address(const void* pointer) { return (uint32)__cvta_generic_to_shared(pointer); }

// ---- Global memory

// Reads through the level-2 cache only: for what other blocks of this launch have written.
DEVICE double load_cg(const double* address) {
  double value;
  asm volatile("ld.global.cg.f64 %0, [%1];" : "=d"(value) : "l"(address) : "memory");
  return value;
}

DEVICE float load_cg(const float* address) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

DEVICE uint4 load_cg(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(address) : "memory");
  return value;
}

// Brings the 128 bytes around an address into the level-2 cache, if they are not there: for what is read later.
DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// ---- Asynchronous copies from global to shared memory (sm_80 and later; before, they are done on return)

// Copies 16 bytes: the first `valid` (0 ... 16) from `source`, zeros for the rest. Both addresses are multiples of 16.
DEVICE void cp_async_16(void* destination, const void* source, int valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(destination)), "l"(source), "r"(valid) : "memory");
#else
  if (valid == 16)
    *(uint4*)destination = load_cg((const uint4*)source);
  else
    for (int i = 0; i < 16; ++i) ((unsigned char*)destination)[i] = i < valid ? ((const unsigned char*)source)[i] : 0;
#endif
}

// Closes this thread's group of copies.
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's latest groups are still under way.
template <int Pending>
DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" :: "n"(Pending) : "memory");
#endif
}

// ---- Barriers of some of a block's warps

// Waits until `threads` of the block, whole warps, have come to this barrier, 1 ... 15. __syncthreads has barrier 0.
DEVICE void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}

// ---- Fragments from shared memory (16-bit elements)

// Four 8 x 8 matrices; lane 8i + r gives the address (a multiple of 16) of row r of matrix i. Lane l receives, of each
// matrix, row l / 4, columns 2 (l % 4) and the next.
DEVICE void ldmatrix_x4(uint32 (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row)) : "memory");
}

// The same, each matrix transposed: lane l receives column l / 4, rows 2 (l % 4) and the next.
DEVICE void ldmatrix_x4_trans(uint32 (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row)) : "memory");
}

// ---- Matrix products of a warp: c += A B with float32 sums (sm_80 and later)

DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void mma_m16n8k16_f16(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The hardware reads only the upper 19 bits of each operand: round with `cvt_rna_tf32` first.
DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Conversions

// The float's bits rounded to TF32 (11 significant bits), ties away from zero (sm_80 and later).
DEVICE uint32 cvt_rna_tf32(float value) {
  uint32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Rounds to bfloat16, ties to even.
DEVICE uint16 cvt_rn_bf16(float value) {
#if __CUDA_ARCH__ >= 800
  uint16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const uint32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  // Adds half of the last bit that stays, a little less where that bit is 0: ties go to even.
  return (uint16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

// Rounds to float16, ties to even; beyond 65504 to infinity.
DEVICE uint16 cvt_rn_f16(float value) {
  uint16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

DEVICE float cvt_f32_bf16(uint16 bits) { return __uint_as_float((uint32)bits << 16); }

DEVICE float cvt_f32_f16(uint16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

#endif
