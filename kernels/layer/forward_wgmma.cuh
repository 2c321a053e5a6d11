// One layer's forward pass on Hopper's tensor cores (TMA and wgmma), any shape; for wide layers.
//
//     a_bo = sum_i h_bi w_oi + bias_o,    out_bo = g(a_bo)
//
// Shapes, formats and arguments as forward_mma.cuh, but that matrices come as maps; their rows begin at multiples of 16
// bytes. a_bo tells whether a is wanted (not null); float32 is written to out_bo, elements by the map.
//
// The work tiles of 128 x 256 (panel_tile.cuh) have A = h and B = w transposed, K = nI. Block k of a persistent grid
// takes every gridDim-th of them, from the k-th on. Sums begin as the bias. a and out go through a consumer's buffers,
// 64 columns at a time.
//
// With B = 8192 and nO = nI = 1024: 64 x 4 work tiles of 16 stages.
//
// Compiled with layer_wgmma.cu. Variants as there. 384 threads.
#pragma once
#include "../tiles/panel_tile.cuh"

// Asks for one stage after the other, as soon as it is empty: one thread.
DEVICE void ask_for_forward_stages(const Places& at, int n_batch, int n_out, int n_in, const TensorMap* h,
                                   const TensorMap* w) {
  int use = 0;
  for (int work = blockIdx.x; work < count_tiles(n_batch, n_out); work += gridDim.x) {
    const TilePlace tile = tile_place(work, n_batch, n_out);
    for (int i = 0; i < n_in; i += TILE_K, ++use) {
      begin_stage(at, use);
      tma_load_2d(at.a(use), h, at.full(use), i, tile.row0);
      tma_load_2d(at.b(use), w, at.full(use), i, tile.column0);
    }
  }
}

// A consumer's sums from (row, column0) on: a, if a_bo, and g of them. `stored` counts the buffers that were stored.
template <int ACTIVATION>
DEVICE void store_forward(float (&d)[COUNT], const Places& at, int consumer, int row, int column0, int activation,
                          bool stores_a, const TensorMap* a, const TensorMap* out, int& stored) {
  each_panel<ACTIVATION>(d, [&](int panel, float (&sums)[32]) {
    if (stores_a) {
      const uint32 buffer = at.buffer(consumer, stored++);
      wait_for_buffer(consumer);
      sums_to_panels<Element>(sums, buffer);
      store_buffer(consumer, buffer, a, row, column0 + panel * 64);
    }
    const uint32 buffer = at.buffer(consumer, stored++);
    wait_for_buffer(consumer);
    if (ACTIVATION == IDENTITY)
      sums_to_panels<Element>(sums, buffer);
    else if (ACTIVATION == SMOOTH)
      smooth_activations_to_panels<Element>(sums, buffer, activation);
    else
      linear_activations_to_panels<Element, ACTIVATION>(sums, buffer);
    store_buffer(consumer, buffer, out, row, column0 + panel * 64);
  });
}

KERNEL __launch_bounds__(THREADS, 1) forward_wgmma(
    const __grid_constant__ TensorMap h_map, const __grid_constant__ TensorMap w_map,
    const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap out_map, const float* bias_o,
    const Element* a_bo, int a_pitch, void* out_bo, int out_pitch, int out_is_float32, int n_batch, int n_out, int n_in,
    int activation) {
  PANEL_MEMORY(memory);
  const Places at = {shared_address(memory)};
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for the warp, as ptxas then knows
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  begin_block(at, CONSUMER_WARPS);

  if (warpgroup == 0) {
    setmaxnreg_dec<REGISTERS_OF_FIRST>();
    if (warp == 0 && elect_one()) ask_for_forward_stages(at, n_batch, n_out, n_in, &h_map, &w_map);
  } else {
    setmaxnreg_inc<REGISTERS_OF_CONSUMERS>();
    const int consumer = warpgroup - 1;
    int use = 0, stored = 0;
#pragma unroll 1
    for (int work = blockIdx.x; work < count_tiles(n_batch, n_out); work += gridDim.x) {
      const TilePlace tile = tile_place(work, n_batch, n_out);
      const int row = tile.row0 + consumer * 64, column = tile.column0;
      float d[COUNT];
#pragma unroll
      for (int j = 0; j < COUNT / 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int o = column + 8 * j + fragment_column(e);
          d[4 * j + e] = d[4 * j + 2 + e] = o < n_out ? bias_o[o] : 0.0f;
        }
      multiply_tile<0, 0>(d, at, consumer, ceil_div(n_in, TILE_K), use);
      if (out_is_float32) {
        sums_to_global(d, (float*)out_bo, out_pitch, n_batch, n_out, row, column, 1.0f);
        continue;
      }
      const bool stores_a = a_bo != nullptr;
      switch (activation) {
        case IDENTITY:
          store_forward<IDENTITY>(d, at, consumer, row, column, activation, stores_a, &a_map, &out_map, stored);
          break;
        case RELU:
          store_forward<RELU>(d, at, consumer, row, column, activation, stores_a, &a_map, &out_map, stored);
          break;
        case LEAKY_RELU:
          store_forward<LEAKY_RELU>(d, at, consumer, row, column, activation, stores_a, &a_map, &out_map, stored);
          break;
        default: store_forward<SMOOTH>(d, at, consumer, row, column, activation, stores_a, &a_map, &out_map, stored);
      }
    }
    if (copies()) bulk_wait_read<0>();  // the memory stays until then
  }
}
