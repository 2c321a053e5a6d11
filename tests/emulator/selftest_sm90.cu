// Small kernels that show what the emulator does with the instructions of sm_90a. Run by
// tests/kernels/test_emulator_sm90.py.
#include "common/ptx_sm90.cuh"

// ---- Copies of boxes

// Copies a box of `bytes` to shared memory, shows how it lies there, and copies it on.
KERNEL copied_box(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_y, uint16* shown,
                  int bytes, int column, int row, int column_y, int row_y) {
  PANEL_MEMORY(memory);
  const uint32 base = shared_address(memory), full = base + bytes;
  if (threadIdx.x == 0) {
    prefetch_tensormap(&map_x);
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, bytes);
    tma_load_2d(base, &map_x, full, column, row);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) shown[i] = ((const uint16*)memory)[i];
  if (threadIdx.x == 0) {
    tma_store_2d(&map_y, base, column_y, row_y);
    bulk_commit();
    bulk_wait<0>();
  }
}

// ---- Products of a warpgroup

// One operand of a product over K = 64 in panels of `swizzle` bytes, which stand one after the other.
struct Operand {
  uint32 base;
  int swizzle;    // bytes of a panel's row
  int rows;       // of A; columns of B
  int transposed;  // rows lie along a panel's rows

  DEVICE int width() const { return swizzle / 2; }
  DEVICE int panel_rows() const { return transposed ? 64 : rows; }
  DEVICE int panels() const { return ((transposed ? rows : 64) + width() - 1) / width(); }
  DEVICE int panel_bytes() const { return (panel_rows() * swizzle + 1023) / 1024 * 1024; }

  DEVICE void load(const TensorMap* map, uint32 full) const {
    for (int i = 0; i < panels(); ++i) {
      mbarrier_arrive_expect_tx(full, panel_rows() * swizzle);
      tma_load_2d(base + i * panel_bytes(), map, full, i * width(), 0);
    }
  }

  DEVICE uint64 descriptor(int k) const {
    if (transposed) return panel_descriptor(base + k * swizzle, panel_bytes(), 8 * swizzle, swizzle);
    return panel_descriptor(base + k / width() * panel_bytes() + k % width() * 2, 16, 8 * swizzle, swizzle);
  }
};

template <int transpose_a, int transpose_b, int count>
DEVICE void multiply_ss(float (&d)[count], Operand a, Operand b, int is_f16, int accumulate) {
  for (int k = 0; k < 64; k += 16) {
    if (is_f16) wgmma_ss_f16<transpose_a, transpose_b>(d, a.descriptor(k), b.descriptor(k), accumulate || k > 0);
    else wgmma_ss_bf16<transpose_a, transpose_b>(d, a.descriptor(k), b.descriptor(k), accumulate || k > 0);
  }
}

template <int transpose_b, int count>
DEVICE void multiply_rs(float (&d)[count], const uint32 (&a)[4][4], Operand b, int is_f16, int accumulate) {
  for (int k = 0; k < 64; k += 16) {
    if (is_f16) wgmma_rs_f16<transpose_b>(d, a[k / 16], b.descriptor(k), accumulate || k > 0);
    else wgmma_rs_bf16<transpose_b>(d, a[k / 16], b.descriptor(k), accumulate || k > 0);
  }
}

template <int N>
DEVICE void multiply(const TensorMap* map_a, const TensorMap* map_b, const uint16* a_mk, float* c_mn, int swizzle,
                     int transpose_a, int transpose_b, int is_f16, int accumulate) {
  PANEL_MEMORY(memory);
  const uint32 full = shared_address(memory);
  const Operand a = {full + 1024, swizzle, 64, transpose_a};
  const Operand b = {a.base + a.panels() * a.panel_bytes(), swizzle, N, transpose_b};
  if (threadIdx.x == 0) {
    mbarrier_init(full, (a_mk ? 0 : a.panels()) + b.panels());
    fence_mbarrier_init();
    if (!a_mk) a.load(map_a, full);
    b.load(map_b, full);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  float d[N / 2];
  uint32 registers[4][4];
  for (int i = 0; i < N / 2; ++i) d[i] = c_mn[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2];
  if (a_mk)
    for (int i = 0; i < 16; ++i)
      registers[i / 4][i % 4] = *(const uint32*)&a_mk[(row + i % 2 * 8) * 64 + i / 4 * 16 + i % 4 / 2 * 8 + column];
  wgmma_fence();
  if (a_mk) {
    if (transpose_b) multiply_rs<1>(d, registers, b, is_f16, accumulate);
    else multiply_rs<0>(d, registers, b, is_f16, accumulate);
  } else if (transpose_a) {
    if (transpose_b) multiply_ss<1, 1>(d, a, b, is_f16, accumulate);
    else multiply_ss<1, 0>(d, a, b, is_f16, accumulate);
  } else {
    if (transpose_b) multiply_ss<0, 1>(d, a, b, is_f16, accumulate);
    else multiply_ss<0, 0>(d, a, b, is_f16, accumulate);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) c_mn[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
}

// C (+)= A B with C 64 x N and K = 64. A from a_mk (then through registers) or its map, transposed there or not.
KERNEL product(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const uint16* a_mk,
               float* c_mn, int n, int swizzle, int transpose_a, int transpose_b, int is_f16, int accumulate) {
#define CASE(N) \
  if (n == N) multiply<N>(&map_a, &map_b, a_mk, c_mn, swizzle, transpose_a, transpose_b, is_f16, accumulate);
  CASE(32) CASE(40) CASE(64) CASE(72) CASE(128) CASE(192) CASE(256)
#undef CASE
}

// ---- Fragments and pairs

// Writes four 8 x 8 matrices that lanes hold, in rows that are `pitch` bytes apart, and reads them back.
KERNEL matrix_stores(const uint32* fragments, uint16* matrices, uint32* read, int pitch) {
  PANEL_MEMORY(memory);
  uint32 fragment[4];
  for (int i = 0; i < 4; ++i) fragment[i] = fragments[threadIdx.x * 4 + i];
  const uint32 row = shared_address(memory) + threadIdx.x * pitch;
  stmatrix_x4(row, fragment);
  __syncwarp();
  for (int i = threadIdx.x; i < 256; i += 32) matrices[i] = *(const uint16*)(memory + i / 8 * pitch + i % 8 * 2);
  ldmatrix_x4(fragment, row);
  for (int i = 0; i < 4; ++i) read[threadIdx.x * 4 + i] = fragment[i];
}

// One row for each function.
KERNEL pairs(const uint32* a, const uint32* b, const float* x, uint32* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    out[0 * n + i] = cvt_rn_bf16x2(x[2 * i], x[2 * i + 1]);
    out[1 * n + i] = cvt_rn_f16x2(x[2 * i], x[2 * i + 1]);
    out[2 * n + i] = set_gt_bf16x2(a[i], b[i]);
    out[3 * n + i] = set_gt_f16x2(a[i], b[i]);
    out[4 * n + i] = mul_bf16x2(a[i], b[i]);
    out[5 * n + i] = mul_f16x2(a[i], b[i]);
  }
}

// ---- Parts of a block

// Which threads elect_one chooses. Two warpgroups take the registers that the first gives up, if it does.
KERNEL parts_of_a_block(int* elected, int gives_up) {
  if (threadIdx.x >= 128) setmaxnreg_inc<232>();
  else if (gives_up) setmaxnreg_dec<40>();
  elected[threadIdx.x] = elect_one();
}

// Every warp but the first hands a number to the first, and goes on without it.
KERNEL numbers_handed_over(int* out) {
  SHARED_MEMORY(memory);
  int* cells = (int*)memory;
  if (threadIdx.x >= 32) {
    cells[threadIdx.x] = threadIdx.x;
    bar_arrive(1, blockDim.x);
    return;
  }
  bar_sync(1, blockDim.x);
  for (int i = 32 + threadIdx.x; i < blockDim.x; i += 32) out[i] = cells[i];
}
