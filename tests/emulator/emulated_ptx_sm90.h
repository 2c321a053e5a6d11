// CPU twins of kernels/common/ptx_sm90.cuh: the same names and signatures; what each does is said there.
#pragma once
#include "emulated_ptx.h"

#define PANEL_MEMORY(name) SHARED_MEMORY(name)

// ---- Barriers in shared memory

DEVICE void mbarrier_init(uint32 barrier, int arrivals) { emulator::initialize_mbarrier(barrier, arrivals); }
DEVICE void fence_mbarrier_init() { emulator::fence_mbarriers(); }
DEVICE void mbarrier_arrive(uint32 barrier) { emulator::arrive_at_mbarrier(barrier, 0); }
DEVICE void mbarrier_arrive_expect_tx(uint32 barrier, int bytes) { emulator::arrive_at_mbarrier(barrier, bytes); }
DEVICE void mbarrier_wait(uint32 barrier, int parity) { emulator::wait_for_phase(barrier, parity); }

// ---- Copies of tiles

DEVICE void prefetch_tensormap(const TensorMap* map) { emulator::prefetch_map(map->words); }

DEVICE void tma_load_2d(uint32 destination, const TensorMap* map, uint32 barrier, int column, int row) {
  emulator::load_box(destination, map->words, barrier, column, row);
}

DEVICE void tma_store_2d(const TensorMap* map, uint32 source, int column, int row) {
  emulator::store_box(map->words, source, column, row);
}

DEVICE void bulk_commit() { emulator::close_store_group(); }

template <int Pending>
DEVICE void bulk_wait() {
  emulator::wait_for_stores(Pending, false);
}

template <int Pending>
DEVICE void bulk_wait_read() {
  emulator::wait_for_stores(Pending, true);
}

DEVICE void fence_proxy_async() { emulator::fence_proxies(); }

// ---- Parts of a block

DEVICE bool elect_one() { return emulator::elect(); }
DEVICE void bar_arrive(int barrier, int threads) { emulator::arrive_at_numbered_barrier(barrier, threads); }

template <int Count>
DEVICE void setmaxnreg_inc() {
  emulator::set_registers(Count, true);
}

template <int Count>
DEVICE void setmaxnreg_dec() {
  emulator::set_registers(Count, false);
}

// ---- Clusters of blocks

DEVICE int cluster_rank() { return emulator::cluster_rank(); }
DEVICE void cluster_arrive() { emulator::arrive_at_cluster_barrier(); }
DEVICE void cluster_wait() { emulator::wait_at_cluster_barrier(); }
DEVICE uint32 mapa(uint32 address, int rank) { return emulator::cluster_address(address, rank); }

DEVICE float4 ld_shared_cluster(uint32 address) {
  float4 value;
  emulator::read_cluster_memory(&value, address);
  return value;
}

// ---- Fragments from and to shared memory

DEVICE void ldmatrix_x4(uint32 (&fragment)[4], uint32 row) {
  emulator::load_matrices(fragment, emulator::shared_memory() + row, false);
}

DEVICE void stmatrix_x4(uint32 row, const uint32 (&fragment)[4]) {
  emulator::store_matrices(emulator::shared_memory() + row, fragment);
}

// ---- Two numbers of 16 bits at a time. Products of two are exact in float32, so they are rounded once.

DEVICE uint32 cvt_rn_bf16x2(float first, float second) {
  return cvt_rn_bf16(first) | (uint32)cvt_rn_bf16(second) << 16;
}

DEVICE uint32 cvt_rn_f16x2(float first, float second) { return cvt_rn_f16(first) | (uint32)cvt_rn_f16(second) << 16; }

DEVICE uint32 set_gt_bf16x2(uint32 a, uint32 b) {
  const uint32 one = 0x3f80u;
  return (cvt_f32_bf16((uint16)a) > cvt_f32_bf16((uint16)b) ? one : 0u) |
         (cvt_f32_bf16((uint16)(a >> 16)) > cvt_f32_bf16((uint16)(b >> 16)) ? one << 16 : 0u);
}

DEVICE uint32 set_gt_f16x2(uint32 a, uint32 b) {
  const uint32 one = 0x3c00u;
  return (cvt_f32_f16((uint16)a) > cvt_f32_f16((uint16)b) ? one : 0u) |
         (cvt_f32_f16((uint16)(a >> 16)) > cvt_f32_f16((uint16)(b >> 16)) ? one << 16 : 0u);
}

DEVICE uint32 mul_bf16x2(uint32 a, uint32 b) {
  return cvt_rn_bf16x2(cvt_f32_bf16((uint16)a) * cvt_f32_bf16((uint16)b),
                       cvt_f32_bf16((uint16)(a >> 16)) * cvt_f32_bf16((uint16)(b >> 16)));
}

DEVICE uint32 mul_f16x2(uint32 a, uint32 b) {
  return cvt_rn_f16x2(cvt_f32_f16((uint16)a) * cvt_f32_f16((uint16)b),
                      cvt_f32_f16((uint16)(a >> 16)) * cvt_f32_f16((uint16)(b >> 16)));
}

// ---- Matrix products of a warpgroup

DEVICE void wgmma_fence() { emulator::fence_registers(); }
DEVICE void wgmma_commit() { emulator::close_product_group(); }

template <int Pending>
DEVICE void wgmma_wait() {
  emulator::wait_for_products(Pending);
}

namespace emulator {

// Those for which ptx_sm90.cuh has an instruction.
constexpr bool has_wgmma(int registers) {
  return registers == 4 || registers == 16 || registers == 20 || registers == 32 || registers == 36 || registers == 64 ||
         registers == 96 || registers == 128;
}

}  // namespace emulator

#define EMULATOR_WGMMA(type, is_f16)                                                                            \
  template <int transpose_a, int transpose_b, int count>                                                        \
  DEVICE void wgmma_ss_##type(float (&d)[count], uint64 a, uint64 b, int accumulate) {                          \
    static_assert(emulator::has_wgmma(count), "no product of this width");                                      \
    emulator::multiply_warpgroup({d, count, nullptr, a, b, is_f16, transpose_a != 0, transpose_b != 0,          \
                                  accumulate != 0});                                                            \
  }                                                                                                             \
  template <int transpose_b, int count>                                                                         \
  DEVICE void wgmma_rs_##type(float (&d)[count], const uint32 (&a)[4], uint64 b, int accumulate) {              \
    static_assert(emulator::has_wgmma(count), "no product of this width");                                      \
    emulator::multiply_warpgroup({d, count, a, 0, b, is_f16, false, transpose_b != 0, accumulate != 0});        \
  }
EMULATOR_WGMMA(bf16, false)
EMULATOR_WGMMA(f16, true)
#undef EMULATOR_WGMMA
