// CUDA C++ for g++: the keywords, types and functions that NVRTC knows without any header.
//
// One-dimensional grids and blocks only, since that is all that launch plans have.
#pragma once
#include <math.h>

#include <cstring>

#include "runtime.h"

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(x, y, z) [[emulator::cluster(x)]]  // build.py takes it from there
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// What the kernel may inline but the checker must not see: the emulator's own reads and writes.
#define EMULATOR_UNSEEN __attribute__((noinline, no_sanitize("thread")))

// ---- Vector types

template <class Number>
struct alignas(2 * sizeof(Number)) Vector2 {
  Number x, y;
  Vector2() = default;
  Vector2(Number x, Number y) : x(x), y(y) {}
};

template <class Number>
struct alignas(4 * sizeof(Number)) Vector4 {
  Number x, y, z, w;
  Vector4() = default;
  Vector4(Number x, Number y, Number z, Number w) : x(x), y(y), z(z), w(w) {}
};

#define EMULATOR_VECTOR2(name, Number)                                                        \
  using name = Vector2<Number>;                                                               \
  __forceinline__ name make_##name(Number x, Number y) { return name(x, y); }
#define EMULATOR_VECTOR4(name, Number)                                                        \
  using name = Vector4<Number>;                                                               \
  __forceinline__ name make_##name(Number x, Number y, Number z, Number w) { return name(x, y, z, w); }

EMULATOR_VECTOR2(float2, float)
EMULATOR_VECTOR4(float4, float)
EMULATOR_VECTOR2(double2, double)
EMULATOR_VECTOR2(int2, int)
EMULATOR_VECTOR4(int4, int)
EMULATOR_VECTOR2(uint2, unsigned)
EMULATOR_VECTOR4(uint4, unsigned)
EMULATOR_VECTOR2(short2, short)
EMULATOR_VECTOR4(short4, short)
EMULATOR_VECTOR2(ushort2, unsigned short)
EMULATOR_VECTOR4(ushort4, unsigned short)
EMULATOR_VECTOR4(uchar4, unsigned char)
EMULATOR_VECTOR2(longlong2, long long)
EMULATOR_VECTOR2(ulonglong2, unsigned long long)

struct uint3 {
  unsigned x, y, z;
};

// ---- Built-in variables

#define threadIdx (::uint3{::emulator::thread_index(), 0u, 0u})
#define blockIdx (::uint3{::emulator::block_index(), 0u, 0u})
#define blockDim (::uint3{::emulator::block_size(), 1u, 1u})
#define gridDim (::uint3{::emulator::grid_size(), 1u, 1u})
constexpr int warpSize = 32;

// ---- Bits

namespace emulator {

template <class To, class From>
__forceinline__ To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a number of the same size");
  To result;
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace emulator

__forceinline__ unsigned __float_as_uint(float value) { return emulator::same_bits<unsigned>(value); }
__forceinline__ int __float_as_int(float value) { return emulator::same_bits<int>(value); }
__forceinline__ float __uint_as_float(unsigned bits) { return emulator::same_bits<float>(bits); }
__forceinline__ float __int_as_float(int bits) { return emulator::same_bits<float>(bits); }
__forceinline__ long long __double_as_longlong(double value) { return emulator::same_bits<long long>(value); }
__forceinline__ double __longlong_as_double(long long bits) { return emulator::same_bits<double>(bits); }
__forceinline__ int __popc(unsigned bits) { return __builtin_popcount(bits); }
__forceinline__ int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
__forceinline__ int __ffs(int bits) { return __builtin_ffs(bits); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}

// ---- Arithmetic
//
// Compiled with -ffp-contract=off, plain + - * / already are the rounded operations.

__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__forceinline__ float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
__forceinline__ float __frcp_rn(float a) { return 1.0f / a; }
__forceinline__ double __dadd_rn(double a, double b) { return a + b; }
__forceinline__ double __dsub_rn(double a, double b) { return a - b; }
__forceinline__ double __dmul_rn(double a, double b) { return a * b; }
__forceinline__ double __ddiv_rn(double a, double b) { return a / b; }
__forceinline__ double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
__forceinline__ double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
__forceinline__ float __double2float_rn(double a) { return (float)a; }
__forceinline__ float __int2float_rn(int a) { return (float)a; }
__forceinline__ double __int2double_rn(int a) { return (double)a; }
__forceinline__ double __ll2double_rn(long long a) { return (double)a; }
__forceinline__ int __float2int_rn(float a) { return (int)__builtin_rintf(a); }
__forceinline__ long long __double2ll_rn(double a) { return (long long)__builtin_rint(a); }

// The fast functions have no twin with the same error: here they are the accurate ones.
__forceinline__ float __expf(float a) { return expf(a); }
__forceinline__ float __logf(float a) { return logf(a); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float rsqrtf(float a) { return 1.0f / sqrtf(a); }
__forceinline__ double rsqrt(double a) { return 1.0 / sqrt(a); }

#define EMULATOR_MIN_MAX(Number)                                                     \
  __forceinline__ Number min(Number a, Number b) { return b < a ? b : a; }           \
  __forceinline__ Number max(Number a, Number b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__forceinline__ double min(double a, double b) { return fmin(a, b); }
__forceinline__ double max(double a, double b) { return fmax(a, b); }

// ---- Barriers, fences and what a warp does together

__forceinline__ void __syncthreads() { emulator::block_barrier(); }
__forceinline__ void __syncwarp(unsigned lanes = 0xffffffffu) { emulator::warp_barrier(lanes); }
__forceinline__ void __threadfence() { emulator::memory_fence(); }

namespace emulator {

template <class Number>
__forceinline__ Number shuffled(unsigned lanes, Number value, unsigned source_lane, Shuffle operation) {
  static_assert(sizeof(Number) <= 8, "a number");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = shuffle(lanes, bits, source_lane, operation);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

// `width` parts the warp into segments; a lane whose source would lie outside its segment keeps its own value.

template <class Number>
__forceinline__ Number __shfl_sync(unsigned lanes, Number value, int source, int width = 32) {
  const unsigned lane = threadIdx.x % 32, first = lane & ~(width - 1u);
  return emulator::shuffled(lanes, value, first | (source & (width - 1)), emulator::Shuffle::any);
}

template <class Number>
__forceinline__ Number __shfl_xor_sync(unsigned lanes, Number value, int flip, int width = 32) {
  const unsigned lane = threadIdx.x % 32, source = lane ^ flip, end = (lane & ~(width - 1u)) + width;
  return emulator::shuffled(lanes, value, source < end ? source : lane, emulator::Shuffle::exclusive_or);
}

template <class Number>
__forceinline__ Number __shfl_down_sync(unsigned lanes, Number value, unsigned delta, int width = 32) {
  const unsigned lane = threadIdx.x % 32, position = lane % width;
  return emulator::shuffled(lanes, value, position + delta < (unsigned)width ? lane + delta : lane,
                            emulator::Shuffle::down);
}

template <class Number>
__forceinline__ Number __shfl_up_sync(unsigned lanes, Number value, unsigned delta, int width = 32) {
  const unsigned lane = threadIdx.x % 32, position = lane % width;
  return emulator::shuffled(lanes, value, position >= delta ? lane - delta : lane, emulator::Shuffle::up);
}

__forceinline__ unsigned __ballot_sync(unsigned lanes, int predicate) {
  return emulator::ballot(lanes, predicate != 0);
}

__forceinline__ int __any_sync(unsigned lanes, int predicate) { return emulator::ballot(lanes, predicate != 0) != 0; }
__forceinline__ int __all_sync(unsigned lanes, int predicate) { return emulator::ballot(lanes, predicate == 0) == 0; }

// ---- Atomics
//
// One operating-system thread runs everything, so a plain read and write cannot be interrupted.

namespace emulator {

// A parameter of this type takes part in no deduction: atomicAdd(unsigned*, 1) works as in CUDA.
template <class Type>
struct Same {
  using type = Type;
};
template <class Type>
using same = typename Same<Type>::type;

}  // namespace emulator

#define EMULATOR_ATOMIC(name, new_value)                                               \
  template <class Number>                                                              \
  EMULATOR_UNSEEN Number name(Number* address, emulator::same<Number> operand) {       \
    emulator::before_atomic(address, sizeof(Number), __builtin_return_address(0));     \
    const Number old = *address;                                                       \
    *address = new_value;                                                              \
    return old;                                                                        \
  }
EMULATOR_ATOMIC(atomicAdd, old + operand)
EMULATOR_ATOMIC(atomicSub, old - operand)
EMULATOR_ATOMIC(atomicExch, operand)
EMULATOR_ATOMIC(atomicMax, old < operand ? operand : old)
EMULATOR_ATOMIC(atomicMin, operand < old ? operand : old)
EMULATOR_ATOMIC(atomicAnd, old & operand)
EMULATOR_ATOMIC(atomicOr, old | operand)
EMULATOR_ATOMIC(atomicXor, old ^ operand)
EMULATOR_ATOMIC(atomicInc, old >= operand ? 0 : old + 1)
#undef EMULATOR_ATOMIC

template <class Number>
EMULATOR_UNSEEN Number atomicCAS(Number* address, emulator::same<Number> expected, emulator::same<Number> desired) {
  emulator::before_atomic(address, sizeof(Number), __builtin_return_address(0));
  const Number old = *address;
  if (old == expected) *address = desired;
  return old;
}

template <class Number>
__forceinline__ Number __ldg(const Number* address) {
  return *address;
}
