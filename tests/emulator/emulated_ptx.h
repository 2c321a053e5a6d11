// CPU twins of kernels/common/ptx.cuh: the same names and signatures; what each does is said there.
#pragma once
#include "cuda_language.h"

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void

#define SHARED_MEMORY(name) unsigned char* const name = ::emulator::shared_memory()

typedef unsigned short uint16;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

DEVICE uint32 shared_address(const void* pointer) {
  return (uint32)(static_cast<const unsigned char*>(pointer) - emulator::shared_memory());
}

// ---- Asynchronous copies from global to shared memory

DEVICE void cp_async_16(void* destination, const void* source, int valid) {
  emulator::copy_asynchronously(destination, source, valid);
}

DEVICE void cp_async_commit() { emulator::close_copy_group(); }

template <int Pending>
DEVICE void cp_async_wait() {
  emulator::wait_for_copies(Pending);
}

// ---- Barriers of some of a block's warps

DEVICE void bar_sync(int barrier, int threads) { emulator::numbered_barrier(barrier, threads); }

// ---- Fragments from shared memory

DEVICE void ldmatrix_x4(uint32 (&fragment)[4], const void* row) { emulator::load_matrices(fragment, row, false); }
DEVICE void ldmatrix_x4_trans(uint32 (&fragment)[4], const void* row) { emulator::load_matrices(fragment, row, true); }

// ---- Matrix products of a warp

DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  emulator::multiply_bf16(c, a, b);
}

DEVICE void mma_m16n8k16_f16(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  emulator::multiply_f16(c, a, b);
}

DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  emulator::multiply_tf32(c, a, b);
}

// ---- Conversions: PTX turns every NaN into one canonical NaN

DEVICE uint32 cvt_rna_tf32(float value) {
  const uint32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  // Half of the last kept bit added to the magnitude, the rest cut off. An infinity keeps its bits.
  return (bits + 0x1000u) & 0xffffe000u;
}

DEVICE uint16 cvt_rn_bf16(float value) {
  const uint32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  // Just less than half of the last kept bit, and a little more where that bit is odd: ties go to even.
  return (uint16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

DEVICE uint16 cvt_rn_f16(float value) {
  const uint32 bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7fff;
  // From halfway between the largest float16, 65504, and the next power of two.
  if (magnitude >= 0x477ff000u) return (uint16)(sign | 0x7c00u);
  // Below the least normal float16, 2^-14: adding 1/2 makes the hardware round to a multiple of 2^-24.
  const float shifted = __uint_as_float(magnitude) + 0.5f;
  if (magnitude < 0x38800000u) return (uint16)(sign | (__float_as_uint(shifted) - __float_as_uint(0.5f)));
  // The exponent's bias goes from 127 to 15; ties go to even as above.
  return (uint16)(sign | ((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

DEVICE float cvt_f32_bf16(uint16 bits) { return __uint_as_float((uint32)bits << 16); }

DEVICE float cvt_f32_f16(uint16 bits) {
  const uint32 sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(magnitude == 0x7c00u ? sign | 0x7f800000u : 0x7fffffffu);
  // As a float's bits these are the number times 2^-112, subnormals included, and the product is exact.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

// ---- Global memory

DEVICE void prefetch_l2(const void*) {}

DEVICE float load_cg(const float* address) { return *address; }
DEVICE double load_cg(const double* address) { return *address; }
DEVICE uint4 load_cg(const uint4* address) { return *address; }
