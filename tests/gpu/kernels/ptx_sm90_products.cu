// Products of a warpgroup (kernels/common/ptx_sm90.cuh) on operands that a test lays out in shared memory.
// tests/gpu/test_ptx_sm90_on_gpu.py computes with NumPy what must come out. Compiled for WIDTH (N) and FORMAT (bf16, f16).
#include "../../../kernels/common/ptx_sm90.cuh"

#define PASTE(a, b) a##b
#define IN_FORMAT(name, format) PASTE(name, format)
#define WGMMA_SS IN_FORMAT(wgmma_ss_, FORMAT)
#define WGMMA_RS IN_FORMAT(wgmma_rs_, FORMAT)

// What descriptors say of an operand: where it begins in shared memory, the leading and the stride offset in bytes; of
// the first two how much they grow with each step of K = 16.
struct Operand {
  uint32 start, start_step, leading, leading_step, stride;
  int swizzle;

  DEVICE uint64 descriptor(uint32 memory, int k) const {
    return panel_descriptor(memory + start + k * start_step, leading + k * leading_step, stride, swizzle);
  }
};

DEVICE Operand operand(const uint32* numbers, int swizzle) {
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], swizzle};
}

// The place in C (64 x WIDTH, row by row) of a thread's i-th sum.
DEVICE int place_in_c(int i) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  return (16 * warp + g + i / 2 % 2 * 8) * WIDTH + i / 4 * 8 + 2 * t + i % 2;
}

DEVICE void load_sums(float (&d)[WIDTH / 2], const float* c_mn) {
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) d[i] = c_mn[place_in_c(i)];
  wgmma_fence();  // they have been written
}

DEVICE void store_sums(float (&d)[WIDTH / 2], float* c_mn) {
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) c_mn[place_in_c(i)] = d[i];
}

template <int TransposeA, int TransposeB>
DEVICE void product_ss(uint32 memory, Operand a, Operand b, float* c_mn, int steps, int accumulate) {
  float d[WIDTH / 2];
  load_sums(d, c_mn);
  for (int k = 0; k < steps; ++k) {
    WGMMA_SS<TransposeA, TransposeB>(d, a.descriptor(memory, k), b.descriptor(memory, k), accumulate || k);
  }
  store_sums(d, c_mn);
}

// A (64 x 16 steps, row by row) goes through registers.
template <int TransposeB>
DEVICE void product_rs(uint32 memory, const uint32* a_mk, Operand b, float* c_mn, int steps, int accumulate) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float d[WIDTH / 2];
  load_sums(d, c_mn);
  for (int k = 0; k < steps; ++k) {
    uint32 a[4];
    for (int i = 0; i < 4; ++i) a[i] = a_mk[(16 * warp + g + i % 2 * 8) * steps * 8 + k * 8 + t + i / 2 * 4];
    wgmma_fence();  // A has been written
    WGMMA_RS<TransposeB>(d, a, b.descriptor(memory, k), accumulate || k);
    wgmma_commit();
    wgmma_wait<0>();  // A is about to change
  }
  store_sums(d, c_mn);
}

// Block t: C_t (64 x WIDTH) (+)= A_t B_t over `steps` times 16 of K. Shared memory holds the t-th image of `packs` packs,
// in which the operands lie as `operands` says: numbers of an Operand for A, then for B. Where a_mk is given, A comes from
// there.
KERNEL __launch_bounds__(128) products(const uint4* images, int packs, const uint32* operands, int swizzle, int transpose_a,
                                       int transpose_b, const uint32* a_mk, float* c_mn, int steps, int accumulate) {
  PANEL_MEMORY(memory);
  const uint32 base = shared_address(memory);
  for (int i = threadIdx.x; i < packs; i += 128) ((uint4*)memory)[i] = images[blockIdx.x * packs + i];
  fence_proxy_async();
  __syncthreads();  // all of the image is there
  const Operand a = operand(operands, swizzle), b = operand(operands + 5, swizzle);
  float* const c = c_mn + blockIdx.x * 64 * WIDTH;
  if (a_mk) {
    const uint32* const rows = a_mk + blockIdx.x * 64 * steps * 8;
    if (transpose_b) product_rs<1>(base, rows, b, c, steps, accumulate);
    else product_rs<0>(base, rows, b, c, steps, accumulate);
    return;
  }
  if (transpose_a && transpose_b) product_ss<1, 1>(base, a, b, c, steps, accumulate);
  else if (transpose_a) product_ss<1, 0>(base, a, b, c, steps, accumulate);
  else if (transpose_b) product_ss<0, 1>(base, a, b, c, steps, accumulate);
  else product_ss<0, 0>(base, a, b, c, steps, accumulate);
}
