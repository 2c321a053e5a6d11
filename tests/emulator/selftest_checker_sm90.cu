// Small kernels for the checker: mistakes with the instructions of sm_90a that it must find. Run by
// tests/kernels/test_emulator_sm90.py.
#include "common/ptx_sm90.cuh"

// What a kernel does wrong. The comments say what it leaves out, or does instead.
enum Mistake {
  NONE,
  // Barriers and copies
  NO_WAIT_FOR_FULL,
  NO_WAIT_FOR_EMPTY,
  WRONG_PARITY,            // of the wait for an empty stage
  FEWER_ARRIVALS,          // the helpers neither count nor arrive
  MORE_ARRIVALS,           // the helpers arrive and do not count
  FEWER_BYTES,             // are announced than come
  MORE_BYTES,
  NO_FENCE_OF_BARRIERS,    // after their initialisation
  BARRIER_OVERWRITTEN,
  SKIPPED_PHASE,           // the helpers leave out every other use of a stage
  EMPTY_BEFORE_READ,       // the helpers arrive, then read the stage
  ENDS_BEFORE_COPY,        // a copy that nobody waits for
  // Products
  EMPTY_BEFORE_PRODUCTS,   // arrive, then wait for the products
  NO_WAIT_FOR_PRODUCT,
  ONE_GROUP_UNDER_WAY,     // waits for all but one, where it must for all
  NO_FENCE_OF_REGISTERS,   // after the accumulators were set to zero
  NO_FENCE_OF_A,           // after A's registers were written
  A_OVERWRITTEN,           // while the product is under way
  ACCUMULATOR_OVERWRITTEN,
  WRONG_STEP,              // of k, as if the operand were not transposed
  OUTSIDE,                 // a descriptor leads outside shared memory
  // Stores
  NO_FENCE_BEFORE_STORE,   // of what was written plainly
  NO_BARRIER_BEFORE_STORE,
  NO_WAIT_FOR_STAGING,     // before it is written again
  NO_BARRIER_FOR_STAGING,  // one thread waits, the others do not wait for it
  ENDS_BEFORE_STORE,
  // Parts of a block
  STAGES_REUSED,           // before the helpers have read them
};

constexpr int PANEL = 64 * 128, STAGES = 2;
constexpr int STAGE_AT = PANEL, STAGING_AT = STAGE_AT + STAGES * PANEL, BARRIERS_AT = STAGING_AT + PANEL;

// For stages of 64 rows of x (rows x 64): y = (x W) W, rounded to bfloat16 between the two and at the end; the sums
// x^T x; and each helper's sums of its columns. 256 threads: a warp that copies, two helpers, a warpgroup of products.
struct Pipeline {
  uint32 w, stage, staging, full, empty, w_full;
  const unsigned char* memory;
  int steps, mistake;

  DEVICE uint32 stage_of(int step) const { return stage + step % STAGES * PANEL; }

  DEVICE void copy(const TensorMap* map_x, const TensorMap* map_w) const {
    if (!elect_one()) return;
    mbarrier_arrive_expect_tx(w_full, PANEL);
    tma_load_2d(w, map_w, w_full, 0, 0);
    for (int step = 0; step < steps; ++step) {
      const int s = step % STAGES;
      if (step >= STAGES && mistake != NO_WAIT_FOR_EMPTY)
        mbarrier_wait(empty + 8 * s, step / STAGES + (mistake == WRONG_PARITY ? 0 : 1) & 1);
      mbarrier_arrive_expect_tx(full + 8 * s, PANEL + (mistake == FEWER_BYTES ? -16 : mistake == MORE_BYTES ? 16 : 0));
      tma_load_2d(stage_of(step), map_x, full + 8 * s, 0, step * 64);
    }
    if (mistake == ENDS_BEFORE_COPY) {
      mbarrier_wait(empty + 8 * ((steps - 1) % STAGES), (steps - 1) / STAGES & 1);
      mbarrier_arrive_expect_tx(full + 8 * ((steps - 1) % STAGES), PANEL);
      tma_load_2d(stage_of(steps - 1), map_x, full + 8 * ((steps - 1) % STAGES), 0, 0);
    }
  }

  DEVICE void help(float* column_sums) const {
    const int column = threadIdx.x - 64;
    float sum = 0;
    for (int step = 0; step < steps; ++step) {
      const int s = step % STAGES;
      const bool arrives = threadIdx.x % 32 == 0 && mistake != FEWER_ARRIVALS;
      if (mistake == SKIPPED_PHASE && step / STAGES % 2) {
        if (arrives) mbarrier_arrive(empty + 8 * s);
        continue;
      }
      mbarrier_wait(full + 8 * s, step / STAGES & 1);
      if (arrives && mistake == EMPTY_BEFORE_READ) mbarrier_arrive(empty + 8 * s);
      const unsigned char* const panel = memory + STAGE_AT + s * PANEL;
      for (int row = 0; row < 64; ++row)
        sum += cvt_f32_bf16(*(const uint16*)(panel + row * 128 + (column / 8 ^ row % 8) * 16 + column % 8 * 2));
      __syncwarp();
      if (arrives && mistake != EMPTY_BEFORE_READ) mbarrier_arrive(empty + 8 * s);
    }
    if (mistake != STAGES_REUSED) bar_arrive(2, 192);
    column_sums[column] = sum;
  }

  // The sums as bfloat16 into the staging, 16 rows a warp.
  DEVICE void stage_sums(const float (&d)[32]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint32 row = staging + (warp * 16 + lane % 16) * 128, chunk = (lane / 16 ^ lane % 8) << 4;
    for (int p = 0; p < 4; ++p) {
      uint32 fragment[4];
      for (int i = 0; i < 4; ++i) fragment[i] = cvt_rn_bf16x2(d[8 * p + 2 * i], d[8 * p + 2 * i + 1]);
      stmatrix_x4(row + (chunk ^ p << 5), fragment);
    }
  }

  DEVICE void store_staging(const TensorMap* map_y, int step) const {
    if (mistake != NO_FENCE_BEFORE_STORE) fence_proxy_async();
    if (mistake != NO_BARRIER_BEFORE_STORE) bar_sync(1, 128);
    if (threadIdx.x % 128 == 0) {
      tma_store_2d(map_y, staging, 0, step * 64);
      bulk_commit();
    }
  }

  DEVICE void multiply(const TensorMap* map_y, float* sums_ii) const {
    float sums[32], d[32], y[32];
    uint32 a[4][4];
    if (mistake == NO_FENCE_OF_REGISTERS) wgmma_fence();
    for (int i = 0; i < 32; ++i) sums[i] = 0;
    mbarrier_wait(w_full, 0);
    for (int step = 0; step < steps; ++step) {
      const int s = step % STAGES;
      const uint32 x = stage_of(step);
      if (mistake != NO_WAIT_FOR_FULL) mbarrier_wait(full + 8 * s, step / STAGES & 1);
      if (mistake != NO_FENCE_OF_REGISTERS) wgmma_fence();
      for (int k = 0; k < 64; k += 16)
        wgmma_ss_bf16<0, 1>(d, panel_descriptor(x + k * 2, 16, 1024), panel_descriptor(w + k * 128, PANEL, 1024),
                            k > 0);
      wgmma_commit();
      for (int k = 0; k < 64; k += 16) {
        const uint32 start = x + k * (mistake == WRONG_STEP ? 2 : 128) + (mistake == OUTSIDE ? 8 * PANEL : 0);
        const uint64 rows = panel_descriptor(start, PANEL, 1024);
        wgmma_ss_bf16<1, 1>(sums, rows, rows, 1);
      }
      wgmma_commit();
      if (mistake != NO_WAIT_FOR_PRODUCT) wgmma_wait<1>();
      for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = cvt_rn_bf16x2(d[2 * i], d[2 * i + 1]);
      if (mistake != NO_FENCE_OF_A) wgmma_fence();
      for (int k = 0; k < 4; ++k)
        wgmma_rs_bf16<1>(y, a[k], panel_descriptor(w + k * 16 * 128, PANEL, 1024), k > 0);
      wgmma_commit();
      if (mistake == A_OVERWRITTEN) a[0][0] = 0;
      if (mistake == ACCUMULATOR_OVERWRITTEN) y[5] = 0;
      if (mistake == EMPTY_BEFORE_PRODUCTS && threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * s);
      if (mistake == ONE_GROUP_UNDER_WAY) wgmma_wait<1>();
      else wgmma_wait<0>();
      if (mistake != EMPTY_BEFORE_PRODUCTS && threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * s);
      if (threadIdx.x % 128 == 0 && mistake != NO_WAIT_FOR_STAGING) bulk_wait_read<0>();
      if (mistake != NO_BARRIER_FOR_STAGING) bar_sync(1, 128);
      if (mistake == BARRIER_OVERWRITTEN && threadIdx.x == 128) *(float*)(memory + BARRIERS_AT) = 0;
      stage_sums(y);
      store_staging(map_y, step);
      if (mistake == ONE_GROUP_UNDER_WAY) wgmma_wait<0>();
    }
    if (threadIdx.x % 128 == 0 && mistake != ENDS_BEFORE_STORE) bulk_wait<0>();
    if (mistake != STAGES_REUSED) bar_sync(2, 192);
    // Through the stages, 16 KB, so that rows of the result are stored by neighbours.
    float* const own = (float*)(memory + STAGE_AT);
    const int t = threadIdx.x % 128;
    for (int i = 0; i < 32; ++i) own[i * 128 + t] = sums[i];
    bar_sync(1, 128);
    for (int i = t; i < 64 * 64; i += 128) {
      const int row = i / 64, column = i % 64;
      const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const int number = column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
      sums_ii[i] = own[number * 128 + thread];
    }
  }
};

KERNEL pipeline(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w,
                const __grid_constant__ TensorMap map_y, float* sums_ii, float* column_sums, int steps, int mistake) {
  PANEL_MEMORY(memory);
  const uint32 base = shared_address(memory), full = base + BARRIERS_AT;
  const Pipeline own = {base, base + STAGE_AT, base + STAGING_AT, full, full + 8 * STAGES, full + 16 * STAGES, memory,
                        steps, mistake};
  if (threadIdx.x == 0) {
    const int helpers = mistake == FEWER_ARRIVALS || mistake == MORE_ARRIVALS ? 0 : 2;
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(own.full + 8 * s, 1);
      mbarrier_init(own.empty + 8 * s, 4 + helpers);
    }
    mbarrier_init(own.w_full, 1);
    if (mistake != NO_FENCE_OF_BARRIERS) fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp < 4) {
    setmaxnreg_dec<40>();
    if (warp == 0) own.copy(&map_x, &map_w);
    if (warp >= 2) own.help(column_sums);
  } else {
    setmaxnreg_inc<216>();
    own.multiply(&map_y, sums_ii);
  }
}

// ---- Clusters

enum ClusterMistake {
  CORRECT,
  NO_FIRST_BARRIER,   // other blocks' numbers are read before they are written
  NO_SECOND_BARRIER,  // a block ends before others have read its numbers
  RANK_OUTSIDE,
  WAITS_ONLY,
  ARRIVES_TWICE,
};

// Each block of a cluster adds the numbers of all, in the order of their ranks.
KERNEL __cluster_dims__(4, 1, 1) __launch_bounds__(64) cluster_sums(const float4* x, float4* sums, int mistake) {
  SHARED_MEMORY(memory);
  float4* own = (float4*)memory;
  own[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (mistake != NO_FIRST_BARRIER) {
    if (mistake != WAITS_ONLY) cluster_arrive();
    if (mistake == ARRIVES_TWICE) cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  float4 sum = make_float4(0, 0, 0, 0);
  const uint32 place = shared_address(own + (threadIdx.x + 1) % blockDim.x);
  for (int rank = 0; rank < 4; ++rank) {
    const float4 other = ld_shared_cluster(mapa(place, mistake == RANK_OUTSIDE ? rank + 1 : rank));
    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += cluster_rank();
  }
  const float4 all = sum;
  sums[blockIdx.x * blockDim.x + threadIdx.x] = all;
  if (mistake == NO_SECOND_BARRIER) return;
  cluster_arrive();
  cluster_wait();
}

// ---- One product of numbers that threads have written

enum ProductMistake {
  RIGHT,
  NO_PROXY_FENCE,         // between what threads wrote and the product that reads it
  PROXY_FENCE_TOO_EARLY,  // before it was written
  FENCE_OF_ANOTHER,       // one thread fences for all, after the barrier
  NO_BARRIER,             // after the fences
  NEVER_FENCED,           // no wgmma.fence at all
  DIFFERENT_PRODUCTS,     // among the warps
  HALF_A_WARPGROUP,       // the rest does not take part
  NOT_WAITED_FOR,
  OVERLAPPING,            // two accumulators that share registers
  WRITTEN_WHILE_READ,     // plainly, before the product has been waited for
  FREED_BY_ONE_WARP,      // whose own wait says nothing about the others' products
  LOAD_OVER_PLAIN,        // a copy of a box over what was written without a fence
};

// d = x x^T for x (64 x 16) of ones in the first 16 columns of a panel.
KERNEL product_of_ones(const __grid_constant__ TensorMap map, float* out, int mistake) {
  PANEL_MEMORY(memory);
  const uint32 base = shared_address(memory), freed = base + PANEL;
  if (threadIdx.x == 0) {
    mbarrier_init(freed, 1);
    fence_mbarrier_init();
  }
  if (mistake == PROXY_FENCE_TOO_EARLY) fence_proxy_async();
  for (int i = threadIdx.x; i < PANEL / 4; i += blockDim.x) ((uint32*)memory)[i] = 0x3f803f80u;
  const bool fences = mistake != NO_PROXY_FENCE && mistake != PROXY_FENCE_TOO_EARLY && mistake != FENCE_OF_ANOTHER;
  if (fences && mistake != LOAD_OVER_PLAIN) fence_proxy_async();
  if (mistake != NO_BARRIER) __syncthreads();
  if (mistake == FENCE_OF_ANOTHER) {
    if (threadIdx.x == 0) fence_proxy_async();
    __syncthreads();
  }
  if (mistake == LOAD_OVER_PLAIN) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(freed, PANEL);
      tma_load_2d(base, &map, freed, 0, 0);
    }
    mbarrier_wait(freed, 0);
  }
  const uint64 panel = panel_descriptor(base, 16, 1024);
  float d[40];
  if (mistake == HALF_A_WARPGROUP && threadIdx.x >= 64) return;
  if (mistake != NEVER_FENCED) wgmma_fence();
  if (mistake == DIFFERENT_PRODUCTS && threadIdx.x >= 96) wgmma_ss_bf16<0, 0>(*(float(*)[32])d, panel, panel + 2, 0);
  else wgmma_ss_bf16<0, 0>(*(float(*)[32])d, panel, panel, 0);
  if (mistake == OVERLAPPING) wgmma_ss_bf16<0, 0>(*(float(*)[32])(d + 8), panel, panel, 0);
  wgmma_commit();
  if (mistake == WRITTEN_WHILE_READ) ((uint32*)memory)[threadIdx.x] = 0;
  if (mistake == NOT_WAITED_FOR) return;
  wgmma_wait<0>();
  if (mistake == FREED_BY_ONE_WARP) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(freed, PANEL);
      tma_load_2d(base, &map, freed, 0, 0);
    }
    mbarrier_wait(freed, 0);
  }
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
}
