// One layer's forward pass on Hopper's tensor cores (TMA and wgmma): nO <= OUT, nI <= IN, any batch.
//
//     a_bo = sum_i h_bi w_oi + bias_o,    out_bo = g(a_bo)
//
// Shapes, formats and arguments as forward_mma.cuh, but that matrices come as maps; their rows begin at multiples of 16
// bytes. a_bo tells whether a is wanted (not null); float32 is written to out_bo, elements by the map.
//
// A block takes rows of the batch that follow each other, 64 at a time, a stage, with all of w in shared memory. It has
// three warpgroups: one whose first warp asks for stages (one lane), and two consumers, which take every second stage:
//
//     shared memory                             registers of a consumer
//     w      [OUT][IN]                          a  64 x OUT of a stage
//     circular buffer of STAGES:
//       h    [64][IN], then a and out [64][OUT] in its place, on their way
//     bias   [OUT]                              w and stages in panels (ptx_sm90.cuh)
//
// Barriers in shared memory: `full` (a stage has arrived), `empty` (what came in its place has been read), `w_full`.
// Barriers of a consumer stand before its warps write over h, and before one thread stores what all have written.
//
// With B = 65536 and nO = nI = 64: 128 blocks of 8 stages.
//
// Variants: Element (bfloat16, float16); OUT x IN 64 x 64, 128 x 128, 256 x 256; STAGES. 384 threads.
#include "../tiles/epilogue.cuh"
#include "../tiles/panel_epilogue.cuh"

const int THREADS = 384, CONSUMERS = 2;
const int W_PANEL = OUT * 128, W_BYTES = IN / 64 * W_PANEL, H_BYTES = IN / 64 * PANEL_BYTES;
const int STAGE = (IN > OUT ? IN : OUT) / 64 * PANEL_BYTES, BIAS = W_BYTES + STAGES * STAGE, BARRIERS = BIAS + OUT * 4;
const int COUNT = OUT / 2;  // sums of a consumer's thread

// Two for a stage, in turn: a consumer takes every second step, and must wait for each phase of what it waits for.
const int FULL_BARRIERS = CONSUMERS * STAGES;

struct Places {
  uint32 w;  // first in shared memory

  DEVICE uint32 stage(int s) const { return w + W_BYTES + s * STAGE; }
  DEVICE uint32 full(int step) const { return barrier(step % FULL_BARRIERS); }
  DEVICE uint32 empty(int s) const { return barrier(FULL_BARRIERS + s); }
  DEVICE uint32 w_full() const { return barrier(FULL_BARRIERS + STAGES); }
  DEVICE uint32 barrier(int index) const { return w + BARRIERS + 8 * index; }
};

// Parities of the phase of `full` that ends when a step has arrived, and of that of `empty` which ends when it is read.
DEVICE int full_parity(int step) { return step / FULL_BARRIERS & 1; }
DEVICE int empty_parity(int step) { return step / STAGES & 1; }

// All threads of a consumer wait for each other.
DEVICE void consumer_sync(int consumer) { bar_sync(1 + consumer, 128); }

// Stores 64 rows of panels, once all threads of the consumer have written theirs; until they have been read.
DEVICE void store_panels(int consumer, uint32 panels, const TensorMap* map, int row) {
  fence_proxy_async();
  consumer_sync(consumer);
  if (threadIdx.x % 128) return;
#pragma unroll
  for (int p = 0; p < OUT / 64; ++p) tma_store_2d(map, panels + p * PANEL_BYTES, p * 64, row);
  bulk_commit();
  bulk_wait_read<0>();
}

KERNEL __launch_bounds__(THREADS, 1) forward_wgmma_narrow(
    const __grid_constant__ TensorMap h_map, const __grid_constant__ TensorMap w_map,
    const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap out_map, const float* bias_o,
    const Element* a_bo, int a_pitch, void* out_bo, int out_pitch, int out_is_float32, int n_batch, int n_out, int n_in,
    int activation) {
  PANEL_MEMORY(memory);
  const Places at = {shared_address(memory)};
  float* bias = (float*)(memory + BIAS);
  const int all_steps = ceil_div(n_batch, PANEL_ROWS), steps_per_block = ceil_div(all_steps, gridDim.x);
  const int first = blockIdx.x * steps_per_block, steps = max(0, min(steps_per_block, all_steps - first));
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for the warp, as ptxas then knows
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  for (int o = threadIdx.x; o < OUT; o += THREADS) bias[o] = o < n_out ? bias_o[o] : 0.0f;
  if (threadIdx.x == 0) {
    for (int step = 0; step < FULL_BARRIERS; ++step) mbarrier_init(at.full(step), 1);
    for (int s = 0; s < STAGES; ++s) mbarrier_init(at.empty(s), 1);
    mbarrier_init(at.w_full(), 1);
    fence_mbarrier_init();
  }
  if (threadIdx.x == 32) {  // before they are needed
    prefetch_tensormap(&h_map);
    prefetch_tensormap(&w_map);
  }
  __syncthreads();  // barriers are initialised, and the bias is there

  if (warpgroup == 0) {
    setmaxnreg_dec<40>();
    if (warp || !steps || !elect_one()) return;
    mbarrier_arrive_expect_tx(at.w_full(), W_BYTES);
    for (int p = 0; p < IN / 64; ++p) tma_load_2d(at.w + p * W_PANEL, &w_map, at.w_full(), p * 64, 0);
    for (int step = 0; step < steps; ++step) {
      const int s = step % STAGES;
      if (step >= STAGES) mbarrier_wait(at.empty(s), empty_parity(step - STAGES));
      mbarrier_arrive_expect_tx(at.full(step), H_BYTES);
#pragma unroll
      for (int p = 0; p < IN / 64; ++p)
        tma_load_2d(at.stage(s) + p * PANEL_BYTES, &h_map, at.full(step), p * 64, (first + step) * PANEL_ROWS);
    }
  } else {
    setmaxnreg_inc<232>();
    const int consumer = warpgroup - 1;
    if (steps) mbarrier_wait(at.w_full(), 0);
#pragma unroll 1
    for (int step = consumer; step < steps; step += CONSUMERS) {
      const int s = step % STAGES, row = (first + step) * PANEL_ROWS;
      const uint32 stage = at.stage(s);
      float a[COUNT];
      mbarrier_wait(at.full(step), full_parity(step));
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < IN; i += 16)
        Wgmma<Element>::ss<0, 0>(a, panel_descriptor(stage + i / 64 * PANEL_BYTES + i % 64 * 2, 16, 1024),
                                 panel_descriptor(at.w + i / 64 * W_PANEL + i % 64 * 2, 16, 1024), i > 0);
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int j = 0; j < COUNT / 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) a[4 * j + e] += bias[8 * j + fragment_column(e)];
      consumer_sync(consumer);  // h has been read by all
      if (out_is_float32) {
        if (threadIdx.x % 128 == 0) mbarrier_arrive(at.empty(s));
        sums_to_global(a, (float*)out_bo, out_pitch, n_batch, n_out, row, 0, 1.0f);
        continue;
      }
      if (a_bo) {
        sums_to_panels<Element>(a, stage);
        store_panels(consumer, stage, &a_map, row);
        consumer_sync(consumer);  // a has been read
      }
      activations_to_panels<Element>(a, stage, activation);
      store_panels(consumer, stage, &out_map, row);
      if (threadIdx.x % 128 == 0) mbarrier_arrive(at.empty(s));
    }
  }
}
