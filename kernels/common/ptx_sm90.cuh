// The instructions of compute capability 9.0 (sm_90a), one small function each, named after the instruction: barriers
// in shared memory, copies of tiles (TMA), matrix products of a warpgroup (wgmma), clusters of blocks.
//
// Addresses in shared memory are 32-bit numbers here, `shared_address(memory) + offset`: descriptors are made of them.
//
// Panels. A matrix in shared memory lies as panels of 64 columns of 16 bits (128 bytes) times R rows, each beginning at
// a multiple of 1024 bytes. Row r, 16-byte chunk c of a panel lies at byte r * 128 + ((c ^ r % 8) * 16): the 128-byte
// swizzle. One panel is a box {64, R} of a TMA copy, and an operand of wgmma in both ways: with its columns as K
// ("K-major") and with its rows as K ("MN-major"). So da serves da W and da^T h without being transposed.
//
//   operand                               start address, step k of 16               leading      stride
//   K-major: A of da W, B of h W^T        panel(k / 64) + row * 128 + k % 64 * 2    unused       1024
//   MN-major, 64 wide: A of da^T h        panel(m / 64) + k * 128                   unused       1024
//   MN-major, wider: B of da^T h, da W    panel(0) + k * 128                        of a panel   1024
//
// Sums. With g = lane / 4 and t = lane % 4, a lane of warp w (0 ... 3) of the warpgroup holds of C (64 x N)
//     d[4 j], d[4 j + 1] = C[16 w + g][8 j + 2 t, + 1]    d[4 j + 2], d[4 j + 3] = C[16 w + g + 8][8 j + 2 t, + 1]
// and of A in registers (64 x 16) what ptx.cuh says of m16n8k16, for the warp's 16 rows. So d[8 i ... 8 i + 7], rounded
// and packed in pairs, are A of step i of the next product.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "Strides and matrix descriptors".
#pragma once
#include "ptx.cuh"

// A matrix in global memory as a TMA copy sees it; the driver fills it in. Kernels take it by value,
// `const __grid_constant__ TensorMap map`, and use its address.
struct __align__(64) TensorMap { uint64 words[16]; };

#ifdef GPUBACK_EMULATOR
#include "emulated_ptx_sm90.h"
#else

// Dynamic shared memory that begins at a multiple of 1024 bytes, as panels do.
#define PANEL_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

// ---- Barriers in shared memory. A phase ends when all arrivals and all announced bytes have come.

DEVICE void mbarrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to asynchronous copies and to the cluster.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void mbarrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces so many bytes of copies to this phase.
DEVICE void mbarrier_arrive_expect_tx(uint32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended: 0 for the first, then 1, 0, ... Whoever waits must wait for each
// phase, since the one after the next looks like this one.
DEVICE void mbarrier_wait(uint32 barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

// ---- Copies of tiles

DEVICE void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box whose first element is (column, row) to shared memory; zeros where it lies outside the matrix.
// The bytes of the whole box count for the barrier.
DEVICE void tma_load_2d(uint32 destination, const TensorMap* map, uint32 barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(destination), "l"(map), "r"(barrier), "r"(column), "r"(row) : "memory");
}

// Copies a box from shared memory; what lies outside the matrix is left out. Belongs to this thread's open bulk group.
DEVICE void tma_store_2d(const TensorMap* map, uint32 source, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::
                   "l"(map), "r"(source), "r"(column), "r"(row) : "memory");
}

DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's latest groups have not been written yet.
template <int Pending>
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// Waits until at most `Pending` of them still read shared memory.
template <int Pending>
DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Orders this thread's plain writes to shared memory before asynchronous reads of TMA and wgmma that follow it, here or
// behind a barrier.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Parts of a block

// True for one lane of a warp that has converged.
DEVICE bool elect_one() {
  uint32 elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, one;\n"
      "}" : "=r"(elected));
  return elected;
}

// Arrives at a barrier of `threads` threads (see bar_sync) without waiting.
DEVICE void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Moves this warpgroup's registers to `Count` a thread, a multiple of 8: up once others have gone down.
template <int Count>
DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- Clusters of blocks

DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The barrier of all threads of the cluster, in two halves: what came before an arrival is known after the wait.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address, for ld_shared_cluster, of what lies at this address in the shared memory of another block.
DEVICE uint32 mapa(uint32 address, int rank) {
  uint32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

DEVICE float4 ld_shared_cluster(uint32 address) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(address) : "memory");
  return value;
}

// ---- Fragments from and to shared memory

// As ldmatrix_x4 of ptx.cuh.
DEVICE void ldmatrix_x4(uint32 (&fragment)[4], uint32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(row) : "memory");
}

// The reverse: writes four 8 x 8 matrices.
DEVICE void stmatrix_x4(uint32 row, const uint32 (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(fragment[0]),
               "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3]) : "memory");
}

// ---- Two numbers of 16 bits at a time, the first in the lower half

DEVICE uint32 cvt_rn_bf16x2(float first, float second) {
  uint32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

DEVICE uint32 cvt_rn_f16x2(float first, float second) {
  uint32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// 1 where a > b, else 0 (also for NaN).
DEVICE uint32 set_gt_bf16x2(uint32 a, uint32 b) {
  uint32 pair;
  asm("set.gt.bf16x2.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

DEVICE uint32 set_gt_f16x2(uint32 a, uint32 b) {
  uint32 pair;
  asm("set.gt.f16x2.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

DEVICE uint32 mul_bf16x2(uint32 a, uint32 b) {
  uint32 pair;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

DEVICE uint32 mul_f16x2(uint32 a, uint32 b) {
  uint32 pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// ---- Matrix products of a warpgroup (four warps): d (+)= A B with float32 sums, asynchronous
//
// A warpgroup's products run in the order of their issue. Until wgmma_wait, d and A in registers belong to them.

// Before the first product, and whenever registers of d or A have been written otherwise since.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the warpgroup's latest groups are under way.
template <int Pending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// wgmma_ss_bf16<transpose_a, transpose_b>(d, a, b, accumulate): A and B in shared memory, by descriptor; `transpose`
// is 1 for an MN-major operand. wgmma_rs_bf16<transpose_b>(d, a, b, accumulate): A in registers. The product is 64 x N
// over K = 16, N twice the length of d. Without `accumulate` d's earlier content counts as zero.

// The operands' numbers in the instruction's text: registers of d first.
#define WGMMA_0_4 "%0, %1, %2, %3"
#define WGMMA_0_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_16_20 \
  "%16, %17, %18, %19"
#define WGMMA_16_32 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_32_36 \
  "%32, %33, %34, %35"
#define WGMMA_32_64 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_64_96 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_96_128 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_0_20 WGMMA_0_16 ", " WGMMA_16_20
#define WGMMA_0_32 WGMMA_0_16 ", " WGMMA_16_32
#define WGMMA_0_36 WGMMA_0_32 ", " WGMMA_32_36
#define WGMMA_0_64 WGMMA_0_32 ", " WGMMA_32_64
#define WGMMA_0_96 WGMMA_0_64 ", " WGMMA_64_96
#define WGMMA_0_128 WGMMA_0_96 ", " WGMMA_96_128

#define WGMMA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 4), WGMMA_4(d, i + 8), WGMMA_4(d, i + 12)
#define WGMMA_20(d, i) WGMMA_16(d, i), WGMMA_4(d, i + 16)
#define WGMMA_32(d, i) WGMMA_16(d, i), WGMMA_16(d, i + 16)
#define WGMMA_36(d, i) WGMMA_32(d, i), WGMMA_4(d, i + 32)
#define WGMMA_64(d, i) WGMMA_32(d, i), WGMMA_32(d, i + 32)
#define WGMMA_96(d, i) WGMMA_64(d, i), WGMMA_32(d, i + 64)
#define WGMMA_128(d, i) WGMMA_64(d, i), WGMMA_64(d, i + 64)

// COUNT registers of d; A0 ... A6 are COUNT ... COUNT + 6.
#define WGMMA(TYPE, N, COUNT, A0, A1, A2, A3, A4, A5, A6)                                                          \
  template <int transpose_a, int transpose_b>                                                                      \
  DEVICE void wgmma_ss_##TYPE(float (&d)[COUNT], uint64 a, uint64 b, int accumulate) {                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2 ", 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" WGMMA_0_##COUNT "}, %" #A0  \
                 ", %" #A1 ", p, 1, 1, %" #A3 ", %" #A4 ";\n}"                                                      \
                 : WGMMA_##COUNT(d, 0) : "l"(a), "l"(b), "r"(accumulate), "n"(transpose_a), "n"(transpose_b));      \
  }                                                                                                                \
  template <int transpose_b>                                                                                       \
  DEVICE void wgmma_rs_##TYPE(float (&d)[COUNT], const uint32 (&a)[4], uint64 b, int accumulate) {                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A5 ", 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" WGMMA_0_##COUNT "}, {%" #A0 \
                 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4 ", p, 1, 1, %" #A6 ";\n}"                                 \
                 : WGMMA_##COUNT(d, 0)                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(transpose_b));          \
  }

#define WGMMA_BOTH(N, COUNT, ...) WGMMA(bf16, N, COUNT, __VA_ARGS__) WGMMA(f16, N, COUNT, __VA_ARGS__)
WGMMA_BOTH(8, 4, 4, 5, 6, 7, 8, 9, 10)
WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21, 22)
WGMMA_BOTH(40, 20, 20, 21, 22, 23, 24, 25, 26)
WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37, 38)
WGMMA_BOTH(72, 36, 36, 37, 38, 39, 40, 41, 42)
WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69, 70)
WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101, 102)
WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133, 134)

#endif

// A descriptor of an operand with the 128-byte swizzle (64-byte rows: 64); bytes as the table above says.
DEVICE uint64 panel_descriptor(uint32 start, uint32 leading, uint32 stride, int swizzle = 128) {
  const uint64 units[3] = {start >> 4 & 0x3fffu, leading >> 4 & 0x3fffu, stride >> 4 & 0x3fffu};  // of 16 bytes
  return units[0] | units[1] << 16 | units[2] << 32 | (swizzle == 128 ? 1ull : 2ull) << 62;
}
