// A work tile of a matrix product on Hopper: C (128 x 256) = A B over any K, by TMA and wgmma, for a persistent grid.
//
// A block has three warpgroups. One thread of the first asks for stages, 64 of K each. The other two, the consumers,
// multiply: each has 64 rows of the tile, 128 sums a thread. Then they store them, while stages of the next work tile
// arrive.
//
//     shared memory, in panels (ptx_sm90.cuh)
//       circular buffer of STAGES:  A  two panels     K-major: rows 0 ... 63 and 64 ... 127 of 64 of K
//                                                     MN-major: columns 0 ... 63 and 64 ... 127 of 64 rows of K
//                                   B  four panels    K-major or MN-major in the same way
//       buffers, two for a consumer                   results on their way, 64 x 64 at a time
//
// Barriers in shared memory: `full` (a stage has arrived), `empty` (its readers are done), `source_full` (what a buffer
// was asked for has arrived). `use` counts stages over all work tiles of the block. Everyone who waits for a stage waits
// for each.
#pragma once
#include "panel_epilogue.cuh"

const int THREADS = 384, CONSUMERS = 2, CONSUMER_WARPS = 8;
const int TILE_M = 128, TILE_N = 256, TILE_K = 64, COUNT = TILE_N / 2, PANELS_N = TILE_N / 64;
const int A_BYTES = TILE_M / 64 * PANEL_BYTES, STAGE = A_BYTES + PANELS_N * PANEL_BYTES, STAGES = 4, BUFFERS = 2;

// Registers of a thread of the first warpgroup and of the consumers: 128 and 256 threads share 65,536.
const int REGISTERS_OF_FIRST = 56, REGISTERS_OF_CONSUMERS = 224;

const int BARRIERS = STAGES * STAGE + CONSUMERS * BUFFERS * PANEL_BYTES;

struct Places {
  uint32 memory;

  DEVICE uint32 a(int use) const { return memory + use % STAGES * STAGE; }
  DEVICE uint32 b(int use) const { return a(use) + A_BYTES; }
  DEVICE uint32 buffer(int consumer, int n) const {
    return memory + STAGES * STAGE + (consumer * BUFFERS + n % BUFFERS) * PANEL_BYTES;
  }
  DEVICE uint32 full(int use) const { return barrier(use % STAGES); }
  DEVICE uint32 empty(int use) const { return barrier(STAGES + use % STAGES); }
  DEVICE uint32 source_full(int consumer, int n) const {
    return barrier(2 * STAGES + consumer * BUFFERS + n % BUFFERS);
  }
  DEVICE uint32 barrier(int index) const { return memory + BARRIERS + 8 * index; }
};

// Parity of the phase of `full` and of `empty` that ends with this use of a stage.
DEVICE int parity_of(int use) { return use / STAGES & 1; }

// One thread initialises the barriers; all see them afterwards. `readers`: warps that read each stage.
DEVICE void begin_block(const Places& at, int readers) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) mbarrier_init(at.full(s), 1), mbarrier_init(at.empty(s), readers);
    for (int n = 0; n < CONSUMERS * BUFFERS; ++n) mbarrier_init(at.source_full(n / BUFFERS, n), 1);
    fence_mbarrier_init();
  }
  __syncthreads();
}

// Waits until a stage may be asked for again, and announces its bytes: the thread that asks.
DEVICE void begin_stage(const Places& at, int use) {
  if (use >= STAGES) mbarrier_wait(at.empty(use), parity_of(use - STAGES));
  mbarrier_arrive_expect_tx(at.full(use), STAGE);
}

// A warp is done with a stage: all its lanes have seen it, their plain reads are over, and products have been waited for.
DEVICE void end_stage(const Places& at, int use) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(use));
}

// Where a work tile lies in C.
struct TilePlace { int row0, column0; };

// The place of a tile of C. Tiles follow each other down 8 rows of tiles, column by column, so that those under way at
// the same time read the same rows and columns, through the level-2 cache.
DEVICE TilePlace tile_place(int index, int rows, int columns) {
  const int BAND = 8, tiles_m = ceil_div(rows, TILE_M), in_band = BAND * ceil_div(columns, TILE_N);
  const int first = index / in_band * BAND, high = min(BAND, tiles_m - first), rest = index % in_band;
  return {(first + rest % high) * TILE_M, rest / high * TILE_N};
}

DEVICE int count_tiles(int rows, int columns) { return ceil_div(rows, TILE_M) * ceil_div(columns, TILE_N); }

// d += A B of `steps` stages; transposed where MN-major. A consumer.
template <int TRANSPOSED_A, int TRANSPOSED_B>
DEVICE void multiply_tile(float (&d)[COUNT], const Places& at, int consumer, int steps, int& use) {
#pragma unroll 1
  for (int step = 0; step < steps; ++step, ++use) {
    const uint32 a = at.a(use) + consumer * PANEL_BYTES, b = at.b(use);
    mbarrier_wait(at.full(use), parity_of(use));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILE_K; k += 16)
      Wgmma<Element>::ss<TRANSPOSED_A, TRANSPOSED_B>(
          d, panel_descriptor(a + k * (TRANSPOSED_A ? 128 : 2), PANEL_BYTES, 1024),
          panel_descriptor(b + k * (TRANSPOSED_B ? 128 : 2), PANEL_BYTES, 1024), 1);
    wgmma_commit();
    wgmma_wait<1>();  // the step before is over
    if (step) end_stage(at, use - 1);
  }
  wgmma_wait<0>();
  end_stage(at, use - 1);
}

// All threads of a consumer wait for each other.
DEVICE void consumer_sync(int consumer) { bar_sync(1 + consumer, 128); }

// True for the thread of a consumer that copies.
DEVICE bool copies() { return threadIdx.x % 128 == 0; }

// Waits until the buffer that was stored before the last one has been read.
DEVICE void wait_for_buffer(int consumer) {
  if (copies()) bulk_wait_read<BUFFERS - 1>();
  consumer_sync(consumer);
}

// Stores a buffer, once all threads of the consumer have written theirs.
DEVICE void store_buffer(int consumer, uint32 buffer, const TensorMap* map, int row, int column) {
  fence_proxy_async();
  consumer_sync(consumer);
  if (copies()) {
    tma_store_2d(map, buffer, column, row);
    bulk_commit();
  }
}

const int SMOOTH = -1;  // stands for all activations that are not piecewise linear

// Calls finish(panel, sums) for 64 columns after the other. Code for smooth activations is long: there one copy of it,
// and the sums are shifted down.
template <int ACTIVATION, typename Finish>
DEVICE void each_panel(float (&d)[COUNT], Finish finish) {
  const int AT_ONCE = ACTIVATION == SMOOTH ? 1 : PANELS_N;
#pragma unroll AT_ONCE
  for (int panel = 0; panel < PANELS_N; ++panel) {
    float sums[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i] = d[(ACTIVATION == SMOOTH ? 0 : panel * 32) + i];
    finish(panel, sums);
    if (ACTIVATION == SMOOTH)
#pragma unroll
      for (int i = 32; i < COUNT; ++i) d[i - 32] = d[i];
  }
}
