// One layer's backward pass on Hopper's tensor cores (TMA and wgmma): nO <= OUT, any nI, any batch.
//
//     dw_oi   (+)= factor  sum_b da_bo h_bi          outer products of each sample, summed over the batch
//     db_o    (+)= factor  sum_b da_bo
//     da_prev_bi = (sum_o da_bo w_oi) g'(source_bi)
//                  or, at the network's input, (sum_o da_bo w_oi) da_prev_factor in float32
//
// Shapes, formats and arguments as layer_mma_narrow.cu, but that matrices come as maps; their rows begin at multiples
// of 16 bytes. da_prev_bi tells whether da_prev is wanted (not null); float32 is written to it, elements by the map.
// Without SOURCE g' is computed from h. Without dw_oi only da_prev is computed, and h is what g' is computed from. Maps
// of what is not read or written are not looked at.
//
// A block takes IN columns of nI and one chain: rows of the batch that follow each other, 64 at a time, a stage. It has
// three warpgroups:
//
//        shared memory                        registers
//     w        [OUT][IN]                      dw       OUT x IN over the two consumers, for the whole chain
//     circular buffer of STAGES:              da_prev  64 x IN of a consumer, for one stage
//       da     [64][OUT]
//       h      [64][IN]
//       source [64][IN], if SOURCE
//     staging  [64][IN]: da_prev on its way   everything in panels (ptx_sm90.cuh)
//
//     warpgroup 0     warp 0 asks for stages (one lane); warps 2, 3 add db from da
//     warpgroups 1, 2 consumers: da_prev = da w and dw += da^T h of a stage; while dw is multiplied, da_prev times g'
//                     goes to staging and is stored from there
//
// OUT <= 128: a stage belongs to one consumer, which has dw of its stages and a staging of its own. OUT = 256: dw has
// no room in one, so each consumer has half of dw's rows and reads every stage; da_prev of stage s is of consumer s % 2
// and the staging goes from hand to hand.
//
// Barriers in shared memory: `full` (a stage has arrived), `empty` (its readers are done), `w_full`, `staging_free[c]`
// (what consumer c staged last has been read). Barriers of a consumer stand around its staging. Afterwards the stages'
// memory takes the block's sums, once all readers of stages are there. Blocks of a cluster, CLUSTER chains that follow
// each other, add theirs up, and `reduce_splits` adds the clusters'.
//
// With B = 65536 and nO = nI = 64: 128 blocks of 8 stages.
//
// Variants: Element (bfloat16, float16); OUT x IN 64 x 64, 128 x 128, 256 x 128; STAGES; SOURCE (0, 1); CLUSTER. 384
// threads.
#include "../common/reduce_cluster.cuh"
#include "../tiles/epilogue.cuh"
#include "../tiles/panel_epilogue.cuh"

const int THREADS = 384, CONSUMERS = 2, CONSUMER_WARPS = 4 * CONSUMERS, DB_WARPS = 2, DB_THREADS = 32 * DB_WARPS;
const bool SHARES_STAGES = OUT > 128;

// A panel of w has OUT rows, the others have 64.
const int PANELS_OUT = OUT / 64, PANELS_IN = IN / 64, W_PANEL = OUT * 128;
const int W_BYTES = PANELS_IN * W_PANEL, DA_BYTES = PANELS_OUT * PANEL_BYTES, H_BYTES = PANELS_IN * PANEL_BYTES;
const int STAGE = DA_BYTES + (SOURCE ? 2 : 1) * H_BYTES, STAGINGS = SHARES_STAGES ? 1 : CONSUMERS;
const int PANELS = W_BYTES + STAGES * STAGE + STAGINGS * H_BYTES;  // bytes of all of them

// A consumer's sums: TILES_O times 64 rows of dw; IN / 2 numbers a thread for 64 x IN.
const int TILES_O = SHARES_STAGES ? PANELS_OUT / CONSUMERS : PANELS_OUT, COUNT = IN / 2;

// A block's sums as rows of 32 packs, a pack for each lane: those of dw as a warp's lanes hold them, four rows (warps)
// for each fragment of 64 x 8; then db, 128 numbers a row. Warps take them in turn.
const int DW_ROWS = OUT / 64 * (IN / 8) * 4, DB_ROWS = (OUT + 127) / 128, UNITS = CLUSTER * CONSUMER_WARPS;
const int DB_GROUPS = DB_THREADS / (OUT / 8);  // threads that add the same 8 columns of da
const int DB_PITCH = DB_THREADS + 4;           // of their sums on the way to db: no bank is met twice
const int ROWS_PER_UNIT = (DW_ROWS + DB_ROWS + UNITS - 1) / UNITS;
static_assert((DW_ROWS + DB_ROWS) * 512 + 8 * DB_PITCH * 4 <= PANELS - W_BYTES, "sums take the stages' memory");

const int PREFETCH = 12;  // of the reduction: 512 PREFETCH bytes for each warp, in the same memory
static_assert(CONSUMER_WARPS * PREFETCH * 512 <= PANELS, "the reduction takes shared memory");

// Barriers of the block by number, beside __syncthreads: of one consumer, of both, of all who read stages, of db's.
enum { OF_CONSUMER = 1, OF_CONSUMERS = 3, OF_READERS = 4, OF_DB = 5 };

// Two for a stage, in turn: a consumer takes every second step, and must wait for each phase of what it waits for.
const int FULL_BARRIERS = CONSUMERS * STAGES;

struct Places {
  uint32 w;  // first in shared memory

  DEVICE uint32 stage(int s) const { return w + W_BYTES + s * STAGE; }
  DEVICE uint32 staging(int consumer) const { return stage(STAGES) + (SHARES_STAGES ? 0 : consumer * H_BYTES); }
  DEVICE uint32 full(int step) const { return barrier(step % FULL_BARRIERS); }
  DEVICE uint32 empty(int s) const { return barrier(FULL_BARRIERS + s); }
  DEVICE uint32 staging_free(int consumer) const { return barrier(FULL_BARRIERS + STAGES + consumer); }
  DEVICE uint32 w_full() const { return barrier(FULL_BARRIERS + STAGES + CONSUMERS); }
  DEVICE uint32 barrier(int index) const { return w + PANELS + 8 * index; }
};

// Which columns and rows a block takes, and what is computed.
struct Task {
  int column0, row0, steps;
  bool weights, bias, da_prev, reads_h;
};

// Parities of the phase of `full` that ends when a step has arrived, and of that of `empty` which ends when it is read.
DEVICE int full_parity(int step) { return step / FULL_BARRIERS & 1; }
DEVICE int empty_parity(int step) { return step / STAGES & 1; }

// d = da w of a stage.
DEVICE void multiply_delta(float (&d)[COUNT], uint32 da, uint32 w) {
  wgmma_fence();
#pragma unroll
  for (int o = 0; o < OUT; o += 16)
    Wgmma<Element>::ss<0, 1>(d, panel_descriptor(da + o / 64 * PANEL_BYTES + o % 64 * 2, 16, 1024),
                             panel_descriptor(w + o * 128, W_PANEL, 1024), o > 0);
}

// dw += da^T h of a stage.
DEVICE void multiply_weights(float (&dw)[TILES_O][COUNT], uint32 da, uint32 h) {
  wgmma_fence();
#pragma unroll
  for (int b = 0; b < PANEL_ROWS; b += 16)
#pragma unroll
    for (int m = 0; m < TILES_O; ++m)
      Wgmma<Element>::ss<1, 1>(dw[m], panel_descriptor(da + m * PANEL_BYTES + b * 128, PANEL_BYTES, 1024),
                               panel_descriptor(h + b * 128, PANEL_BYTES, 1024), 1);
}

// Asks for w and for one stage after the other, as soon as it is empty: one thread.
DEVICE void ask_for_stages(const Places& at, const Task& task, const TensorMap* da, const TensorMap* h,
                           const TensorMap* w, const TensorMap* source) {
  if (task.da_prev && task.steps) {
    mbarrier_arrive_expect_tx(at.w_full(), W_BYTES);
    for (int p = 0; p < PANELS_IN; ++p) tma_load_2d(at.w + p * W_PANEL, w, at.w_full(), task.column0 + p * 64, 0);
  }
  const bool reads_source = SOURCE && task.da_prev;
  for (int step = 0; step < task.steps; ++step) {
    const int s = step % STAGES, row = task.row0 + step * PANEL_ROWS;
    const uint32 full = at.full(step), stage = at.stage(s);
    if (step >= STAGES) mbarrier_wait(at.empty(s), empty_parity(step - STAGES));
    mbarrier_arrive_expect_tx(full, DA_BYTES + (task.reads_h + reads_source) * H_BYTES);
#pragma unroll
    for (int p = 0; p < PANELS_OUT; ++p) tma_load_2d(stage + p * PANEL_BYTES, da, full, p * 64, row);
#pragma unroll
    for (int p = 0; p < PANELS_IN; ++p) {
      const uint32 to = stage + DA_BYTES + p * PANEL_BYTES;
      if (task.reads_h) tma_load_2d(to, h, full, task.column0 + p * 64, row);
      if (reads_source) tma_load_2d(to + H_BYTES, source, full, task.column0 + p * 64, row);
    }
  }
}

// Where da_prev goes.
struct DeltaOutput {
  const TensorMap* map;  // of elements
  float* at;             // of float32, if not null
  int pitch, n_batch, n_in, activation;
  float factor;
};

// Stores da_prev of a step, in elements by way of the staging.
DEVICE void write_da_prev(const Places& at, const Task& task, float (&d)[COUNT], uint32 source, int step, int consumer,
                          const DeltaOutput& to) {
  const int row = task.row0 + step * PANEL_ROWS;
  if (to.at) {
    sums_to_global(d, to.at, to.pitch, to.n_batch, to.n_in, row, task.column0, to.factor);
    return;
  }
  const bool stores = threadIdx.x % 128 == 0;
  const uint32 staging = at.staging(consumer);
  if (!SHARES_STAGES) {
    if (stores) bulk_wait_read<0>();
    bar_sync(OF_CONSUMER + consumer, 128);  // what this consumer staged last has been read
  } else if (step > 0) {
    mbarrier_wait(at.staging_free(1 - consumer), (step - 1) / CONSUMERS & 1);
  }
  delta_to_panels<Element>(d, source, staging, to.activation);
  fence_proxy_async();
  bar_sync(OF_CONSUMER + consumer, 128);  // all rows are staged
  if (!stores) return;
#pragma unroll
  for (int p = 0; p < PANELS_IN; ++p)
    tma_store_2d(to.map, staging + p * PANEL_BYTES, task.column0 + p * 64, row);
  bulk_commit();
  if (SHARES_STAGES) {
    bulk_wait_read<0>();
    mbarrier_arrive(at.staging_free(consumer));
  }
}

// db of the chain: a thread adds 8 columns of every DB_GROUPS-th row. Leaves DB_ROWS rows of 128 sums in `db`.
DEVICE void add_bias_sums(const Places& at, const Task& task, const unsigned char* memory, float* db) {
  const int thread = threadIdx.x % 128 - 64, column = thread % (OUT / 8), group = thread / (OUT / 8);
  float sums[8] = {};
#pragma unroll 1
  for (int step = 0; step < task.steps; ++step) {
    const int s = step % STAGES;
    mbarrier_wait(at.full(step), full_parity(step));
    const unsigned char* panel = memory + (at.stage(s) - at.w) + column / 8 * PANEL_BYTES;
#pragma unroll 2
    for (int row = group; row < PANEL_ROWS; row += DB_GROUPS) {
      const Pack<Element> pack = *(const Pack<Element>*)(panel + row * 128 + (column ^ row) % 8 * 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] += to_accum(pack.at[i]);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(s));
  }
  bar_sync(OF_READERS, 32 * CONSUMER_WARPS + DB_THREADS);  // the stages have been read
  float* of_threads = db + DB_ROWS * 128;
#pragma unroll
  for (int i = 0; i < 8; ++i) of_threads[i * DB_PITCH + thread] = sums[i];
  bar_sync(OF_DB, DB_THREADS);  // all threads' sums are there
  for (int o = thread; o < DB_ROWS * 128; o += DB_THREADS) {
    float sum = 0;
    if (o < OUT)
      for (int g = 0; g < DB_GROUPS; ++g) sum += of_threads[o % 8 * DB_PITCH + g * (OUT / 8) + o / 8];
    db[o] = sum;
  }
}

// A consumer's thread puts its sums of dw to the block's: `rows` holds packs, those of a warp's lanes next to each
// other. Where both consumers have sums of all of dw, the second writes and the first adds.
DEVICE void gather_weights(const float (&dw)[TILES_O][COUNT], float4* rows, int consumer) {
  float4* own = rows + threadIdx.x % 128;
  if (SHARES_STAGES) own += consumer * TILES_O * (COUNT / 4) * 128;
  const auto put = [&](bool add) {
#pragma unroll
    for (int i = 0; i < TILES_O * COUNT / 4; ++i) {
      const float* four = dw[i / (COUNT / 4)] + i % (COUNT / 4) * 4;
      float4 sum = make_float4(four[0], four[1], four[2], four[3]);
      if (add) {
        const float4 other = own[i * 128];
        sum = sum + other;
      }
      own[i * 128] = sum;
    }
  };
  if (SHARES_STAGES) {
    put(false);
    return;
  }
  if (consumer == 1) put(false);
  bar_sync(OF_CONSUMERS, 32 * CONSUMER_WARPS);  // the second's sums are there
  if (consumer == 0) put(true);
}

// Adds the sums of the cluster's blocks, then those of all clusters: a warp of the consumers its rows of `rows`.
DEVICE void reduce_sums(const Task& task, const float4* rows, const Gradient& gradient, const Splits& splits, int split,
                        float* partials, unsigned* arrivals, Pack<float>* buffers) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
  const int unit = rank_in_cluster<CLUSTER>() * CONSUMER_WARPS + warp, all_rows = DW_ROWS + (task.bias ? DB_ROWS : 0);
  float sums[ROWS_PER_UNIT * 4];
  cluster_sync<CLUSTER>(THREADS);  // all sums are there
#pragma unroll
  for (int i = 0; i < ROWS_PER_UNIT; ++i) {
    const int row = i * UNITS + unit;
    float4 sum = make_float4(0, 0, 0, 0);
    if (row < all_rows) sum = sum_of_cluster<CLUSTER>(rows + row * 32 + lane);
    sums[4 * i] = sum.x, sums[4 * i + 1] = sum.y, sums[4 * i + 2] = sum.z, sums[4 * i + 3] = sum.w;
  }
  cluster_sync<CLUSTER>(THREADS);  // they have been read: the reduction takes the memory, and blocks may end
  if (unit >= all_rows) return;

  const int used = ceil_div(all_rows - unit, UNITS) * 4, place = task.column0 / IN * UNITS + unit;
  const int64 size = ROWS_PER_UNIT * 4 * 32, stride = ceil_div(gradient.n_in, IN) * UNITS * size;
  reduce_splits<PREFETCH>(sums, used, partials + place * size, stride, arrivals + place * (split_groups(splits) + 1),
                          splits, split, buffers + warp * PREFETCH * 32, [&](int index, float sum) {
    const int row = index / 4 * UNITS + unit, e = index % 4;
    if (row < DW_ROWS) {
      const int fragment = row / 4, o = fragment / (IN / 8) * 64 + row % 4 * 16, i = fragment % (IN / 8) * 8;
      add_weight(gradient, o + fragment_row(e), task.column0 + i + fragment_column(e), sum);
    } else {
      add_bias(gradient, (row - DW_ROWS) * 128 + lane * 4 + e, sum);
    }
  });
}

KERNEL __launch_bounds__(THREADS, 1) CLUSTER_OF(CLUSTER) layer_wgmma_narrow(
    const __grid_constant__ TensorMap da_map, const __grid_constant__ TensorMap h_map,
    const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap source_map,
    const __grid_constant__ TensorMap da_prev_map, void* da_prev_bi, int da_prev_pitch, int da_prev_is_float32,
    float* dw_oi, float* db_o, int n_batch, int n_out, int n_in, int activation, float da_prev_factor, float factor,
    int accumulate, int n_splits, int group_size, int rows_per_split, float* partials, unsigned* arrivals) {
  PANEL_MEMORY(memory);
  const Places at = {shared_address(memory)};
  const int chains = n_splits * CLUSTER, column = blockIdx.x / chains, chain = blockIdx.x % chains;
  const int rows_per_chain = rows_per_split / CLUSTER, row0 = chain * rows_per_chain;
  const int steps = ceil_div(max(0, min(rows_per_chain, n_batch - row0)), PANEL_ROWS);
  const bool weights = dw_oi != nullptr, wants_da_prev = da_prev_bi != nullptr;
  const Task task = {column * IN, row0, steps, weights, weights && column == 0, wants_da_prev,
                     weights || activation != IDENTITY};
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for the warp, as ptxas then knows
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) {
    for (int step = 0; step < FULL_BARRIERS; ++step) mbarrier_init(at.full(step), 1);
    for (int s = 0; s < STAGES; ++s)
      mbarrier_init(at.empty(s), (SHARES_STAGES ? CONSUMER_WARPS : 4) + (task.bias ? DB_WARPS : 0));
    for (int c = 0; c < CONSUMERS; ++c) mbarrier_init(at.staging_free(c), 1);
    mbarrier_init(at.w_full(), 1);
    fence_mbarrier_init();
  }
  if (threadIdx.x == 32) {  // before they are needed
    prefetch_tensormap(&da_map);
    if (task.reads_h) prefetch_tensormap(&h_map);
    if (wants_da_prev) prefetch_tensormap(&w_map);
  }
  __syncthreads();  // barriers are initialised

  float4* rows = (float4*)(memory + W_BYTES);  // the block's sums, once the stages have been read
  if (warpgroup == 0) {
    setmaxnreg_dec<40>();
    if (warp == 0) {
      if (elect_one()) ask_for_stages(at, task, &da_map, &h_map, &w_map, &source_map);
      __syncwarp();
    }
    if (warp >= 2 && task.bias) add_bias_sums(at, task, memory, (float*)(rows + DW_ROWS * 32));
    if (weights) {
      cluster_sync<CLUSTER>(THREADS);  // as in reduce_sums
      cluster_sync<CLUSTER>(THREADS);
    }
  } else {
    setmaxnreg_inc<232>();
    const int consumer = warpgroup - 1;
    const DeltaOutput da_prev = {&da_prev_map, da_prev_is_float32 ? (float*)da_prev_bi : nullptr, da_prev_pitch, n_batch,
                                 n_in, activation, da_prev_factor};
    float dw[TILES_O][COUNT];
#pragma unroll
    for (int m = 0; m < TILES_O; ++m)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) dw[m][i] = 0;

    if (wants_da_prev && steps) mbarrier_wait(at.w_full(), 0);
#pragma unroll 1
    for (int step = SHARES_STAGES ? 0 : consumer; step < steps; step += SHARES_STAGES ? 1 : CONSUMERS) {
      const int s = step % STAGES;
      const uint32 da = at.stage(s), h = da + DA_BYTES, own_da = da + (SHARES_STAGES ? consumer * DA_BYTES / 2 : 0);
      mbarrier_wait(at.full(step), full_parity(step));
      if (wants_da_prev && (!SHARES_STAGES || step % CONSUMERS == consumer)) {
        float d[COUNT];
        multiply_delta(d, da, at.w);
        wgmma_commit();
        if (weights) {
          multiply_weights(dw, own_da, h);
          wgmma_commit();
          wgmma_wait<1>();  // d is there
        } else {
          wgmma_wait<0>();
        }
        write_da_prev(at, task, d, SOURCE ? h + H_BYTES : h, step, consumer, da_prev);
      } else if (weights) {
        multiply_weights(dw, own_da, h);
        wgmma_commit();
      }
      wgmma_wait<0>();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(s));
    }
    if (threadIdx.x % 128 == 0) bulk_wait_read<0>();
    if (!weights) return;
    bar_sync(OF_READERS, 32 * CONSUMER_WARPS + (task.bias ? DB_THREADS : 0));  // stages and staging have been read

    gather_weights(dw, rows, consumer);
    const Gradient gradient = {dw_oi, db_o, n_out, n_in, factor, accumulate};
    reduce_sums(task, rows, gradient, {n_splits, group_size}, chain / CLUSTER, partials, arrivals, (Pack<float>*)memory);
  }
}
