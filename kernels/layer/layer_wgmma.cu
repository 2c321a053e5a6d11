// One layer's backward pass on Hopper's tensor cores (TMA and wgmma): bfloat16 or float16, any shape; for wide layers.
//
//     dw_oi   (+)= factor  sum_b da_bo h_bi          outer products of each sample, summed over the batch
//     db_o    (+)= factor  sum_b da_bo
//     da_prev_bi = (sum_o da_bo w_oi) g'(source_bi)
//                  or, at the network's input, (sum_o da_bo w_oi) da_prev_factor in float32
//
// Shapes, formats and arguments as layer_mma.cu, but that matrices come as maps; their rows begin at multiples of 16
// bytes. da_prev_bi tells whether da_prev is wanted (not null); float32 is written to it, elements by the map. With
// n_splits = 0 only da_prev is computed. Maps of what is not read or written are not looked at.
//
// One launch computes two products. Their work tiles of 128 x 256 (panel_tile.cuh) are one list. Block k of a persistent
// grid takes every gridDim-th of it, from the k-th on:
//
//     dw tile   tile (o, i) of dw over one split of the batch     A = da^T, B = h, K = rows of a split
//     da tile   tile (b, i) of da_prev                            A = da,   B = w, K = nO
//
// `reduce_in_registers` adds the splits of a dw tile, warp by warp, as the warps hold it; the last warp to arrive writes
// it. db comes from the dw tiles of the first column of tiles: two warps beside the one that asks for stages add the
// columns of their da.
//
// The epilogue of a da tile works in place: a consumer's buffers take `source`, 64 columns at a time, then da_prev
// instead, which is stored from there. The first two are asked for before the products.
//
// With B = 8192 and nO = nI = 1024: 8 x 4 dw tiles of 4 splits and 64 x 4 da tiles, 32 and 16 stages each.
//
// Variants: Element (bfloat16, float16). 384 threads.
#include "../common/split_k.cuh"
#include "../tiles/epilogue.cuh"
#include "../tiles/panel_tile.cuh"
#include "forward_wgmma.cuh"

const int DB_WARPS = 2;  // 64 columns of a dw tile's da each

// The list of work tiles: dw's first, split by split, since their sums wait for each other.
struct WorkTiles {
  int n_batch, n_out, n_in, n_splits, rows_per_split, of_dw, count;
};

struct WorkTile {
  bool weights;
  int row0, column0;  // in dw or da_prev
  int k0, steps;
  int split, tile;    // of dw
};

DEVICE WorkTile work_tile(const WorkTiles& all, int work) {
  if (work < all.of_dw) {
    const int tiles = all.of_dw / all.n_splits, split = work / tiles, tile = work % tiles;
    const int k0 = split * all.rows_per_split, rows = min(all.rows_per_split, all.n_batch - k0);
    const TilePlace place = tile_place(tile, all.n_out, all.n_in);
    return {true, place.row0, place.column0, k0, ceil_div(rows, TILE_K), split, tile};
  }
  const TilePlace place = tile_place(work - all.of_dw, all.n_batch, all.n_in);
  return {false, place.row0, place.column0, 0, ceil_div(all.n_out, TILE_K), 0, 0};
}

// Where partial results of dw and db lie, and the counters of those who have arrived. A dw tile has a place for each
// consumer's warp, and a row of dw tiles one for each of db's warps.
struct Partials {
  float* partials;
  unsigned* arrivals;
  Splits splits;
  int tiles, tiles_o;  // of dw, and rows of them

  static const int DW = 32 * COUNT, DB = 32 * 4;  // numbers at a place

  DEVICE int dw_places() const { return tiles * CONSUMER_WARPS; }
  DEVICE int db_places() const { return tiles_o * DB_WARPS; }
  DEVICE float* dw(int place) const { return partials + (int64)place * DW; }
  DEVICE int64 dw_stride() const { return (int64)dw_places() * DW; }
  DEVICE float* db(int place) const { return partials + splits.count * dw_stride() + (int64)place * DB; }
  DEVICE int64 db_stride() const { return (int64)db_places() * DB; }
  DEVICE unsigned* dw_arrivals(int place) const { return arrivals + (int64)place * (split_groups(splits) + 1); }
  DEVICE unsigned* db_arrivals(int place) const { return dw_arrivals(dw_places() + place); }
};

// Asks for one stage after the other, as soon as it is empty: one thread.
DEVICE void ask_for_stages(const Places& at, const WorkTiles& all, const TensorMap* da, const TensorMap* h,
                           const TensorMap* w) {
  int use = 0;
  for (int work = blockIdx.x; work < all.count; work += gridDim.x) {
    const WorkTile tile = work_tile(all, work);
    for (int step = 0; step < tile.steps; ++step, ++use) {
      const int k = tile.k0 + step * TILE_K;
      const uint32 full = at.full(use);
      begin_stage(at, use);
#pragma unroll
      for (int p = 0; p < TILE_M / 64; ++p) {
        const int m = tile.row0 + p * 64;
        tma_load_2d(at.a(use) + p * PANEL_BYTES, da, full, tile.weights ? m : k, tile.weights ? k : m);
      }
#pragma unroll
      for (int p = 0; p < PANELS_N; ++p)
        tma_load_2d(at.b(use) + p * PANEL_BYTES, tile.weights ? h : w, full, tile.column0 + p * 64, k);
    }
  }
}

// db of a dw tile's split: a warp adds 64 columns, a lane 8 of every fourth row. It waits for the stages of all tiles.
DEVICE void add_bias_sums(const Places& at, const WorkTiles& all, const unsigned char* memory, int warp,
                          const Partials& partials, const Gradient& gradient) {
  const int lane = threadIdx.x % 32, column = lane % 8, row0 = lane / 8;
  int use = 0, work = blockIdx.x;
#pragma unroll 1
  for (; work < all.of_dw; work += gridDim.x) {
    const WorkTile tile = work_tile(all, work);
    const bool adds = tile.column0 == 0;
    float sums[8] = {};
#pragma unroll 1
    for (int step = 0; step < tile.steps; ++step, ++use) {
      mbarrier_wait(at.full(use), parity_of(use));
      if (adds) {
        const unsigned char* panel = memory + (at.a(use) - at.memory) + warp * PANEL_BYTES;
#pragma unroll 2
        for (int row = row0; row < TILE_K; row += 4) {
          const Pack<Element> pack = *(const Pack<Element>*)(panel + row * 128 + (column ^ row) % 8 * 16);
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[i] += to_accum(pack.at[i]);
        }
      }
      end_stage(at, use);
    }
    if (!adds) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 8);
      sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 16);
    }
    float own[4];  // in the first 16 lanes
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = row0 == 0 ? sums[i] : sums[4 + i];
    const int place = tile.row0 / 64 + warp;
    if (!reduce_in_registers(own, partials.db(place), partials.db_stride(), partials.db_arrivals(place), partials.splits,
                             tile.split))
      continue;
    if (row0 < 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) add_bias(gradient, tile.row0 + warp * 64 + column * 8 + row0 * 4 + i, own[i]);
  }
  const int steps = ceil_div(all.n_out, TILE_K);
#pragma unroll 1
  for (; work < all.count; work += gridDim.x)
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ++use) {
      mbarrier_wait(at.full(use), parity_of(use));
      end_stage(at, use);
    }
}

// Asks for 64 columns of `source`, into the buffer that will take da_prev's.
DEVICE void ask_for_source(const Places& at, const WorkTile& tile, const TensorMap* source, int consumer, int panel) {
  const uint32 full = at.source_full(consumer, panel);
  mbarrier_arrive_expect_tx(full, PANEL_BYTES);
  tma_load_2d(at.buffer(consumer, panel), source, full, tile.column0 + panel * 64, tile.row0 + consumer * 64);
}

// A consumer's sums of a da tile times g'(source), to da_prev.
template <int ACTIVATION>
DEVICE void store_delta(float (&d)[COUNT], const Places& at, const WorkTile& tile, int consumer, int activation,
                        const TensorMap* source, const TensorMap* da_prev) {
  each_panel<ACTIVATION>(d, [&](int panel, float (&sums)[32]) {
    const uint32 buffer = at.buffer(consumer, panel);
    if (ACTIVATION == IDENTITY) {
      wait_for_buffer(consumer);
      sums_to_panels<Element>(sums, buffer);
    } else {
      mbarrier_wait(at.source_full(consumer, panel), panel / BUFFERS & 1);  // PANELS_N / BUFFERS phases in each tile
      if (ACTIVATION == SMOOTH)
        smooth_delta_to_panels<Element>(sums, buffer, buffer, activation);
      else
        linear_delta_to_panels<Element, ACTIVATION>(sums, buffer, buffer);
    }
    store_buffer(consumer, buffer, da_prev, tile.row0 + consumer * 64, tile.column0 + panel * 64);
    if (ACTIVATION != IDENTITY && panel + BUFFERS < PANELS_N && copies()) {
      bulk_wait_read<0>();
      ask_for_source(at, tile, source, consumer, panel + BUFFERS);
    }
  });
}

KERNEL __launch_bounds__(THREADS, 1) layer_wgmma(
    const __grid_constant__ TensorMap da_map, const __grid_constant__ TensorMap h_map,
    const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap source_map,
    const __grid_constant__ TensorMap da_prev_map, void* da_prev_bi, int da_prev_pitch, int da_prev_is_float32,
    float* dw_oi, float* db_o, int n_batch, int n_out, int n_in, int activation, float da_prev_factor, float factor,
    int accumulate, int n_splits, int group_size, int rows_per_split, float* partials, unsigned* arrivals) {
  PANEL_MEMORY(memory);
  const Places at = {shared_address(memory)};
  const int tiles = count_tiles(n_out, n_in), of_dw = tiles * n_splits;
  const int count = of_dw + (da_prev_bi ? count_tiles(n_batch, n_in) : 0);
  const WorkTiles all = {n_batch, n_out, n_in, n_splits, rows_per_split, of_dw, count};
  const Partials results = {partials, arrivals, {n_splits, group_size}, tiles, ceil_div(n_out, TILE_M)};
  const Gradient gradient = {dw_oi, db_o, n_out, n_in, factor, accumulate};
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for the warp, as ptxas then knows
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  begin_block(at, CONSUMER_WARPS + (n_splits ? DB_WARPS : 0));

  if (warpgroup == 0) {
    setmaxnreg_dec<REGISTERS_OF_FIRST>();
    if (warp == 0) {
      if (elect_one()) ask_for_stages(at, all, &da_map, &h_map, &w_map);
      __syncwarp();
    }
    if (warp >= 2 && n_splits) add_bias_sums(at, all, memory, warp - 2, results, gradient);
  } else {
    setmaxnreg_inc<REGISTERS_OF_CONSUMERS>();
    const int consumer = warpgroup - 1;
    int use = 0;
#pragma unroll 1
    for (int work = blockIdx.x; work < count; work += gridDim.x) {
      const WorkTile tile = work_tile(all, work);
      float d[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) d[i] = 0;
      if (tile.weights) {
        multiply_tile<1, 1>(d, at, consumer, tile.steps, use);
        const int place = tile.tile * CONSUMER_WARPS + warp - 4;
        if (reduce_in_registers(d, results.dw(place), results.dw_stride(), results.dw_arrivals(place), results.splits,
                                tile.split))
          add_weights(d, gradient, tile.row0 + consumer * 64, tile.column0);
        continue;
      }
      const bool reads_source = activation != IDENTITY && !da_prev_is_float32;
      if (reads_source && copies()) {
        bulk_wait_read<0>();
        for (int panel = 0; panel < BUFFERS; ++panel) ask_for_source(at, tile, &source_map, consumer, panel);
      }
      multiply_tile<0, 1>(d, at, consumer, tile.steps, use);
      if (da_prev_is_float32) {
        sums_to_global(d, (float*)da_prev_bi, da_prev_pitch, n_batch, n_in, tile.row0 + consumer * 64, tile.column0,
                       da_prev_factor);
        continue;
      }
      switch (activation) {
        case IDENTITY: store_delta<IDENTITY>(d, at, tile, consumer, activation, &source_map, &da_prev_map); break;
        case RELU: store_delta<RELU>(d, at, tile, consumer, activation, &source_map, &da_prev_map); break;
        case LEAKY_RELU: store_delta<LEAKY_RELU>(d, at, tile, consumer, activation, &source_map, &da_prev_map); break;
        default: store_delta<SMOOTH>(d, at, tile, consumer, activation, &source_map, &da_prev_map);
      }
    }
    if (copies()) bulk_wait_read<0>();  // the memory stays until then
  }
}
