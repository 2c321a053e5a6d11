// One narrow layer's backward pass on tensor cores: nO <= MAX_OUT, nI <= MAX_IN (64 or 128 each), any batch.
//
//     dw_oi   (+)= factor  sum_b da_bo h_bi          outer products of each sample, summed over the batch
//     db_o    (+)= factor  sum_b da_bo
//     da_prev_bi = (sum_o da_bo w_oi) g'(source_bi)   or, at the network's input, (sum_o da_bo w_oi) da_prev_factor in float32
//
// Shapes, formats and arguments as layer_mma.cu. Such a layer moves more bytes than it multiplies, so each block reads its rows
// of da and h once for both products, and w once:
//
//        shared memory                     registers
//     w   [MAX_OUT][MAX_IN]            dw  MAX_OUT x MAX_IN over 16 warps, for the whole chain
//     ring of SLABS slabs:            da_prev  16 x 32 a warp, for one slab
//       da  [SLAB_ROWS][MAX_OUT]
//       h   [SLAB_ROWS][MAX_IN]
//     16 x [16][32] float32: da_prev on its way from fragments to rows
//
// A block takes one chain of the batch, slab by slab: dw += da^T h of the slab (and db: da^T times ones), then da_prev = da w,
// while the next slabs arrive. Then `reduce_chains` adds the chains' dw, warp by warp.
//
// With B = 65536 and nO = nI = 64: 128 blocks of 4 slabs of 128 rows.
//
// Variants: OPERAND (bfloat16, float16, float for TF32), MAX_OUT, MAX_IN, SLAB_ROWS, SLABS. 512 threads.
#include "epilogue.cuh"
#include "fragments.cuh"
#include "reduce.cuh"

typedef Mma<OPERAND> Unit;
const int WARPS = 16, THREADS = 32 * WARPS;
const int PITCH_W = MAX_IN + Unit::PAD_PAIRS, PITCH_DA = MAX_OUT + Unit::PAD, PITCH_H = MAX_IN + Unit::PAD;
const int SLAB = SLAB_ROWS * (PITCH_DA + PITCH_H);  // numbers in one stage

// dw: the warps stand 4 x 4 over it.
const int WARPS_O = 4, WARPS_I = 4;
const int FRAGMENTS_O = MAX_OUT / WARPS_O / 16, FRAGMENTS_I = MAX_IN / WARPS_I / 8;

// da_prev: each warp takes 16 rows of the slab and a share of the columns, 16 or 32 of them at a time.
const int ROW_GROUPS = SLAB_ROWS / 16, MOST_COLUMN_GROUPS = MAX_IN / 16;
const int COLUMN_GROUPS = WARPS / ROW_GROUPS < MOST_COLUMN_GROUPS ? WARPS / ROW_GROUPS : MOST_COLUMN_GROUPS;
const int SHARE = MAX_IN / COLUMN_GROUPS;
const int PASS = SHARE < 32 ? SHARE : 32, PITCH_PASS = PASS + 8;

// The reduction: a ring of DEPTH times 512 bytes for each warp, in the same shared memory.
const int SHARED_BYTES = (MAX_OUT * PITCH_W + SLABS * SLAB) * (int)sizeof(OPERAND) + WARPS * 16 * PITCH_PASS * 4;
const int DEPTH = SHARED_BYTES / (WARPS * 512) < 12 ? SHARED_BYTES / (WARPS * 512) : 12;

struct Slab {
  const OPERAND* da;
  const OPERAND* h;
  int row0;
};

DEVICE int warp_index() { return threadIdx.x / 32; }
DEVICE int warp_o() { return warp_index() / WARPS_I * (FRAGMENTS_O * 16); }
DEVICE int warp_i() { return warp_index() % WARPS_I * (FRAGMENTS_I * 8); }

// dw += da^T h over a slab, db += da^T 1.
DEVICE void add_weights(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], float (&db)[FRAGMENTS_O][4], const Slab& slab) {
#pragma unroll
  for (int k = 0; k < SLAB_ROWS; k += Unit::K) {
    uint32 a[FRAGMENTS_O][4];
#pragma unroll
    for (int i = 0; i < FRAGMENTS_O; ++i) Unit::load_a<true>(a[i], slab.da, PITCH_DA, warp_o() + i * 16, k);
#pragma unroll
    for (int j = 0; j < FRAGMENTS_I; j += 2) {
      uint32 b[2][2];
      Unit::load_b<true, false>(b[0], b[1], slab.h, PITCH_H, warp_i() + j * 8, k);
#pragma unroll
      for (int i = 0; i < FRAGMENTS_O; ++i) {
        Unit::multiply(dw[i][j], a[i], b[0]);
        Unit::multiply(dw[i][j + 1], a[i], b[1]);
      }
    }
    if (warp_i() == 0)
#pragma unroll
      for (int i = 0; i < FRAGMENTS_O; ++i)
        Unit::add_row_sums<true>(db[i], a[i], slab.da, PITCH_DA, warp_o() + i * 16, k);
  }
}

// da_prev = da w of a slab.
DEVICE void write_delta(const Slab& slab, const OPERAND* w_tile, float* staged, const Matrix<OPERAND>& source,
                        bool source_in_slab, bool aligned_source, int activation, float factor, const Output& da_prev,
                        bool aligned_prev) {
  if (warp_index() >= ROW_GROUPS * COLUMN_GROUPS) return;
  const int row = warp_index() / COLUMN_GROUPS * 16, first = warp_index() % COLUMN_GROUPS * SHARE, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i0 = first; i0 < first + SHARE && i0 < da_prev.columns; i0 += PASS) {
    float d[PASS / 8][4];
#pragma unroll
    for (int j = 0; j < PASS / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) d[j][e] = 0;
#pragma unroll
    for (int k = 0; k < MAX_OUT; k += Unit::K) {
      uint32 a[4];
      Unit::load_a<false>(a, slab.da, PITCH_DA, row, k);
#pragma unroll
      for (int j = 0; j < PASS / 8; j += 2) {
        uint32 b[2][2];
        Unit::load_b<false, false>(b[0], b[1], w_tile, PITCH_W, i0 + j * 8, k);
        Unit::multiply(d[j], a, b[0]);
        Unit::multiply(d[j + 1], a, b[1]);
      }
    }
    __syncwarp();  // everyone has read what this warp staged last
#pragma unroll
    for (int j = 0; j < PASS / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const Group<float, 2> pair = {d[j][e], d[j][e + 1]};
        *(Group<float, 2>*)(staged + fragment_row(e) * PITCH_PASS + j * 8 + fragment_column(e)) = pair;
      }
    __syncwarp();  // the 16 rows are complete

    // PASS / 4 lanes to a row. Rows r and r + 4 follow each other: their pieces of h lie in different banks.
    const int lanes = PASS / 4, at_once = 32 / lanes, STEPS = 16 / at_once, c = lane % lanes * 4, i = i0 + c;
    const auto row_of = [=](int step) {
      const int index = step * at_once + lane / lanes;
      return index / 8 * 8 + index % 2 * 4 + index / 2 % 4;
    };
    const int TOGETHER = 2;
#pragma unroll
    for (int first_step = 0; first_step < STEPS; first_step += TOGETHER) {
      Four v[TOGETHER];
      Group<OPERAND, 4> s[TOGETHER];
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
        const int r = row_of(first_step + k), b = slab.row0 + row + r;
        v[k] = *(const Four*)(staged + r * PITCH_PASS + c);
        if (activation == IDENTITY) continue;
        if (source_in_slab)
          s[k] = *(const Group<OPERAND, 4>*)(slab.h + (row + r) * PITCH_H + i);
        else if (b < da_prev.rows)
          s[k] = load_group<4>(source.at + (int64)b * source.pitch + i, da_prev.columns - i, aligned_source);
      }
      finish_delta(v, s, activation, factor);
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
        const int b = slab.row0 + row + row_of(first_step + k);
        if (b < da_prev.rows && i < da_prev.columns) store<OPERAND>(da_prev, b, i, v[k], aligned_prev);
      }
    }
  }
}

KERNEL __launch_bounds__(THREADS, 1) layer_mma_narrow(
    const OPERAND* da_bo, int da_pitch, const OPERAND* h_bi, int h_pitch, const OPERAND* w_oi, int w_pitch,
    const OPERAND* source_bi, int source_pitch, void* da_prev_bi, int da_prev_pitch, int da_prev_is_float32, float* dw_oi, float* db_o,
    int n_batch, int n_out, int n_in, int activation, float da_prev_factor, float factor, int accumulate, int n_splits,
    int group_size, int rows_per_split, float* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  OPERAND* w_tile = (OPERAND*)memory;
  OPERAND* slabs = w_tile + MAX_OUT * PITCH_W;
  float* staged = (float*)(slabs + SLABS * SLAB) + warp_index() * 16 * PITCH_PASS;

  // The chain's rows; what lies behind them counts as zero, like all that lies outside a matrix.
  const int chain = blockIdx.x, row0 = chain * rows_per_split, row1 = min(row0 + rows_per_split, n_batch);
  const int steps = ceil_div(row1 - row0, SLAB_ROWS);
  const Matrix<OPERAND> da = {da_bo, da_pitch, row1, n_out}, h = {h_bi, h_pitch, row1, n_in};
  const Matrix<OPERAND> w = {w_oi, w_pitch, n_out, n_in}, source = {source_bi, source_pitch, row1, n_in};
  const Output da_prev = {da_prev_bi, da_prev_pitch, row1, n_in, da_prev_is_float32};
  const bool aligned_da = aligned_rows(da_bo, da_pitch), aligned_h = aligned_rows(h_bi, h_pitch);
  const bool aligned_source = aligned_rows(source_bi, source_pitch), aligned_prev = aligned_rows<OPERAND>(da_prev);
  const bool source_in_slab = source_bi == h_bi;

  float dw[FRAGMENTS_O][FRAGMENTS_I][4], db[FRAGMENTS_O][4];
#pragma unroll
  for (int i = 0; i < FRAGMENTS_O; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      db[i][e] = 0;
#pragma unroll
      for (int j = 0; j < FRAGMENTS_I; ++j) dw[i][j][e] = 0;
    }

  if (da_prev_bi) load_tile<MAX_OUT, MAX_IN, PITCH_W, THREADS>(w_tile, w, 0, 0, aligned_rows(w_oi, w_pitch));
  for (int step = 0; step < steps + SLABS - 1; ++step) {
    if (step >= SLABS - 1) {
      cp_async_wait<SLABS - 2>();
      __syncthreads();  // this slab has arrived for everyone; and everyone is done with the one before it, loaded next
    }
    if (step < steps) {
      OPERAND* slab = slabs + step % SLABS * SLAB;
      load_tile<SLAB_ROWS, MAX_OUT, PITCH_DA, THREADS>(slab, da, row0 + step * SLAB_ROWS, 0, aligned_da);
      load_tile<SLAB_ROWS, MAX_IN, PITCH_H, THREADS>(slab + SLAB_ROWS * PITCH_DA, h, row0 + step * SLAB_ROWS, 0, aligned_h);
    }
    cp_async_commit();  // empty groups too, so that the count of groups is the count of slabs
    if (step < SLABS - 1) continue;
    const OPERAND* now = slabs + (step - (SLABS - 1)) % SLABS * SLAB;
    const Slab slab = {now, now + SLAB_ROWS * PITCH_DA, row0 + (step - (SLABS - 1)) * SLAB_ROWS};
    add_weights(dw, db, slab);
    if (da_prev_bi)
      write_delta(slab, w_tile, staged, source, source_in_slab, aligned_source, activation, da_prev_factor, da_prev, aligned_prev);
  }

  __syncthreads();  // everyone is done with the last slab: shared memory is free for the reduction
  if (warp_i() == 0)
#pragma unroll
    for (int i = 0; i < FRAGMENTS_O; ++i) Unit::finish_row_sums(db[i]);

  // What this warp holds of dw, and some of them of db: one number for each row of a fragment.
  const int held = FRAGMENTS_O * FRAGMENTS_I * 4, held_db = FRAGMENTS_O * 2, warp = warp_index();
  float sums[held + (held_db + 3) / 4 * 4];
#pragma unroll
  for (int i = 0; i < held; ++i) sums[i] = dw[i / 4 / FRAGMENTS_I][i / 4 % FRAGMENTS_I][i % 4];
#pragma unroll
  for (int i = 0; i < (held_db + 3) / 4 * 4; ++i) sums[held + i] = i < held_db ? db[i / 2][i % 2 * 2] : 0.0f;
  const Gradient gradient = {dw_oi, db_o, n_out, n_in, factor, accumulate};
  const Chains all = {n_splits, group_size};
  const int64 size = sizeof(sums) / sizeof(float) * 32;
  const int used = warp_i() == 0 ? (int)(sizeof(sums) / sizeof(float)) : held;
  Pack<float>* ring = (Pack<float>*)memory + warp * DEPTH * 32;
  unsigned* arrived = arrivals + warp * (chain_groups(all) + 1);
  reduce_chains<DEPTH>(sums, used, partials + warp * size, WARPS * size, arrived, all, chain, ring,
                       [&](int index, float sum) {
    if (index < held) {
      const int i = index / 4 / FRAGMENTS_I, j = index / 4 % FRAGMENTS_I, e = index % 4;
      add_weight(gradient, warp_o() + i * 16 + fragment_row(e), warp_i() + j * 8 + fragment_column(e), sum);
    } else if (index < held + held_db && fragment_column(0) == 0) {
      const int i = (index - held) / 2, e = (index - held) % 2 * 2;
      add_bias(gradient, warp_o() + i * 16 + fragment_row(e), sum);
    }
  });
}
