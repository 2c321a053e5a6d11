// One narrow layer's backward pass on tensor cores: nO <= MAX_OUT, nI <= MAX_IN (64 or 128 each), any batch.
//
//     dw_oi   (+)= factor  sum_b da_bo h_bi          outer products of each sample, summed over the batch
//     db_o    (+)= factor  sum_b da_bo
//     da_prev_bi = (sum_o da_bo w_oi) g'(source_bi)
//                  or, at the network's input, (sum_o da_bo w_oi) da_prev_factor in float32
//
// Shapes, formats and arguments as layer_mma.cu. Such a layer moves more bytes than it multiplies, so each block reads
// its rows of da and h once for both products, and w once:
//
//        shared memory                     registers
//     w   [MAX_OUT][MAX_IN]            dw  MAX_OUT x MAX_IN over 16 warps, for the whole split
//     circular buffer of STAGES:      da_prev  16 x 32 a warp, for one batch tile
//       da  [TILE_B][MAX_OUT]
//       h   [TILE_B][MAX_IN]
//     16 x [16][32] float32: da_prev on its way from fragments to rows
//
// A block takes one split of the batch, batch tile by batch tile, while the next stages arrive: dw += da^T h of the
// tile (and db: da^T times ones), then da_prev = da w. Then `reduce_splits` adds the splits' dw, warp by warp. A thread
// holds numbers of its warp's fragments, as ptx.cuh says.
//
// A barrier of the block stands before a stage is used and before the reduction takes the stages' memory. Barriers of a
// warp stand around the rows that it stages for itself.
//
// With B = 65536 and nO = nI = 64: 128 blocks of 4 batch tiles of 128 rows.
//
// Variants: Element (bfloat16, float16, float for TF32), MAX_OUT, MAX_IN, TILE_B, STAGES. 512 threads.
#include "../common/split_k.cuh"
#include "../tiles/epilogue.cuh"
#include "../tiles/load_tile.cuh"
#include "../tiles/mma_fragments.cuh"

typedef Mma<Element> Unit;
const int WARPS = 16, THREADS = 32 * WARPS;
const int PITCH_W = MAX_IN + Unit::PAD_PAIRS, PITCH_DA = MAX_OUT + Unit::PAD, PITCH_H = MAX_IN + Unit::PAD;
const int STAGE = TILE_B * (PITCH_DA + PITCH_H);  // numbers in one stage

// dw: the warps stand 4 x 4 over it.
const int WARPS_O = 4, WARPS_I = 4;
const int FRAGMENTS_O = MAX_OUT / WARPS_O / 16, FRAGMENTS_I = MAX_IN / WARPS_I / 8;

// da_prev: each warp takes 16 rows of the batch tile and WARP_COLUMNS of its columns, 16 or 32 of them at a time.
const int ROW_GROUPS = TILE_B / 16, MOST_COLUMN_GROUPS = MAX_IN / 16;
const int COLUMN_GROUPS = WARPS / ROW_GROUPS < MOST_COLUMN_GROUPS ? WARPS / ROW_GROUPS : MOST_COLUMN_GROUPS;
const int WARP_COLUMNS = MAX_IN / COLUMN_GROUPS;
const int PASS_COLUMNS = WARP_COLUMNS < 32 ? WARP_COLUMNS : 32, PITCH_STAGED = PASS_COLUMNS + 8;

// The reduction: a circular buffer of PREFETCH times 512 bytes for each warp, in the same shared memory.
const int SHARED_BYTES = (MAX_OUT * PITCH_W + STAGES * STAGE) * (int)sizeof(Element) + WARPS * 16 * PITCH_STAGED * 4;
const int PREFETCH = SHARED_BYTES / (WARPS * 512) < 12 ? SHARED_BYTES / (WARPS * 512) : 12;

struct BatchTile {
  const Element* da;
  const Element* h;
  int row0;
};

DEVICE int warp_index() { return threadIdx.x / 32; }
DEVICE int warp_o() { return warp_index() / WARPS_I * (FRAGMENTS_O * 16); }
DEVICE int warp_i() { return warp_index() % WARPS_I * (FRAGMENTS_I * 8); }

// dw += da^T h over a batch tile, db += da^T 1.
DEVICE void add_weights(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], float (&db)[FRAGMENTS_O][4], const BatchTile& tile) {
#pragma unroll
  for (int k = 0; k < TILE_B; k += Unit::K) {
    uint32 a[FRAGMENTS_O][4];
#pragma unroll
    for (int i = 0; i < FRAGMENTS_O; ++i) Unit::load_a<true>(a[i], tile.da, PITCH_DA, warp_o() + i * 16, k);
#pragma unroll
    for (int j = 0; j < FRAGMENTS_I; j += 2) {
      uint32 b[2][2];
      Unit::load_b<true, false>(b[0], b[1], tile.h, PITCH_H, warp_i() + j * 8, k);
#pragma unroll
      for (int i = 0; i < FRAGMENTS_O; ++i) {
        Unit::multiply(dw[i][j], a[i], b[0]);
        Unit::multiply(dw[i][j + 1], a[i], b[1]);
      }
    }
    if (warp_i() == 0)
#pragma unroll
      for (int i = 0; i < FRAGMENTS_O; ++i)
        Unit::add_row_sums<true>(db[i], a[i], tile.da, PITCH_DA, warp_o() + i * 16, k);
  }
}

// da_prev = da w of a batch tile.
DEVICE void write_da_prev(const BatchTile& tile, const Element* w_tile, float* staged, const Matrix<Element>& source,
                          bool source_in_tile, bool aligned_source, int activation, float factor, const Output& da_prev,
                          bool aligned_prev) {
  if (warp_index() >= ROW_GROUPS * COLUMN_GROUPS) return;
  const int row = warp_index() / COLUMN_GROUPS * 16, first = warp_index() % COLUMN_GROUPS * WARP_COLUMNS;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i0 = first; i0 < first + WARP_COLUMNS && i0 < da_prev.columns; i0 += PASS_COLUMNS) {
    float d[PASS_COLUMNS / 8][4];
#pragma unroll
    for (int j = 0; j < PASS_COLUMNS / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) d[j][e] = 0;
#pragma unroll
    for (int k = 0; k < MAX_OUT; k += Unit::K) {
      uint32 a[4];
      Unit::load_a<false>(a, tile.da, PITCH_DA, row, k);
#pragma unroll
      for (int j = 0; j < PASS_COLUMNS / 8; j += 2) {
        uint32 b[2][2];
        Unit::load_b<false, false>(b[0], b[1], w_tile, PITCH_W, i0 + j * 8, k);
        Unit::multiply(d[j], a, b[0]);
        Unit::multiply(d[j + 1], a, b[1]);
      }
    }
    __syncwarp();  // everyone has read what this warp staged last
#pragma unroll
    for (int j = 0; j < PASS_COLUMNS / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const Group<float, 2> pair = {d[j][e], d[j][e + 1]};
        *(Group<float, 2>*)(staged + fragment_row(e) * PITCH_STAGED + j * 8 + fragment_column(e)) = pair;
      }
    __syncwarp();  // the 16 rows are complete

    // PASS_COLUMNS / 4 lanes to a row. Rows are taken in the order 0 4 1 5 2 6 3 7, then the same from 8 on: h of rows
    // r and r + 4, which are read together, lies in different banks.
    const int lanes = PASS_COLUMNS / 4, at_once = 32 / lanes, STEPS = 16 / at_once, c = lane % lanes * 4, i = i0 + c;
    const auto row_of = [=](int step) {
      const int index = step * at_once + lane / lanes;
      const int half = index / 8 * 8, pair = index / 2 % 4, second_of_pair = index % 2;
      return half + second_of_pair * 4 + pair;
    };
    const int AT_ONCE = 2;
#pragma unroll
    for (int first_step = 0; first_step < STEPS; first_step += AT_ONCE) {
      Four v[AT_ONCE];
      Group<Element, 4> s[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const int r = row_of(first_step + k), b = tile.row0 + row + r;
        v[k] = *(const Four*)(staged + r * PITCH_STAGED + c);
        if (activation == IDENTITY) continue;
        if (source_in_tile)
          s[k] = *(const Group<Element, 4>*)(tile.h + (row + r) * PITCH_H + i);
        else if (b < da_prev.rows)
          s[k] = load_group<4>(source.at + (int64)b * source.pitch + i, da_prev.columns - i, aligned_source);
      }
      finish_delta(v, s, activation, factor);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const int b = tile.row0 + row + row_of(first_step + k);
        if (b < da_prev.rows && i < da_prev.columns) store<Element>(da_prev, b, i, v[k], aligned_prev);
      }
    }
  }
}

KERNEL __launch_bounds__(THREADS, 1) layer_mma_narrow(
    const Element* da_bo, int da_pitch, const Element* h_bi, int h_pitch, const Element* w_oi, int w_pitch,
    const Element* source_bi, int source_pitch, void* da_prev_bi, int da_prev_pitch, int da_prev_is_float32,
    float* dw_oi, float* db_o, int n_batch, int n_out, int n_in, int activation, float da_prev_factor, float factor,
    int accumulate, int n_splits, int group_size, int rows_per_split, float* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  Element* w_tile = (Element*)memory;
  Element* stages = w_tile + MAX_OUT * PITCH_W;
  float* staged = (float*)(stages + STAGES * STAGE) + warp_index() * 16 * PITCH_STAGED;

  // The split's rows. Rows behind them count as zero, like all that lies outside a matrix.
  const int split = blockIdx.x, row0 = split * rows_per_split, row1 = min(row0 + rows_per_split, n_batch);
  const int steps = ceil_div(row1 - row0, TILE_B);
  const Matrix<Element> da = {da_bo, da_pitch, row1, n_out}, h = {h_bi, h_pitch, row1, n_in};
  const Matrix<Element> w = {w_oi, w_pitch, n_out, n_in}, source = {source_bi, source_pitch, row1, n_in};
  const Output da_prev = {da_prev_bi, da_prev_pitch, row1, n_in, da_prev_is_float32};
  const bool aligned_da = aligned_rows(da_bo, da_pitch), aligned_h = aligned_rows(h_bi, h_pitch);
  const bool aligned_source = aligned_rows(source_bi, source_pitch), aligned_prev = aligned_rows<Element>(da_prev);
  const bool source_in_tile = source_bi == h_bi;

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
  for (int step = 0; step < steps + STAGES - 1; ++step) {
    if (step >= STAGES - 1) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // this tile has arrived for everyone; and everyone is done with the one before it, loaded next
    }
    if (step < steps) {
      Element* tile = stages + step % STAGES * STAGE;
      load_tile<TILE_B, MAX_OUT, PITCH_DA, THREADS>(tile, da, row0 + step * TILE_B, 0, aligned_da);
      load_tile<TILE_B, MAX_IN, PITCH_H, THREADS>(tile + TILE_B * PITCH_DA, h, row0 + step * TILE_B, 0, aligned_h);
    }
    cp_async_commit();  // empty groups too, so that the count of groups is the count of stages
    if (step < STAGES - 1) continue;
    const Element* now = stages + (step - (STAGES - 1)) % STAGES * STAGE;
    const BatchTile tile = {now, now + TILE_B * PITCH_DA, row0 + (step - (STAGES - 1)) * TILE_B};
    add_weights(dw, db, tile);
    if (da_prev_bi)
      write_da_prev(tile, w_tile, staged, source, source_in_tile, aligned_source, activation, da_prev_factor, da_prev,
                    aligned_prev);
  }

  __syncthreads();  // everyone is done with the last tile: shared memory is free for the reduction
  if (warp_i() == 0)
#pragma unroll
    for (int i = 0; i < FRAGMENTS_O; ++i) Unit::finish_row_sums(db[i]);

  // A lane's numbers of dw; in the first column of warps also of db, one number for each row of a fragment.
  const int per_lane = FRAGMENTS_O * FRAGMENTS_I * 4, db_per_lane = FRAGMENTS_O * 2, warp = warp_index();
  float sums[per_lane + round_up_4(db_per_lane)];
#pragma unroll
  for (int i = 0; i < per_lane; ++i) sums[i] = dw[i / 4 / FRAGMENTS_I][i / 4 % FRAGMENTS_I][i % 4];
#pragma unroll
  for (int i = 0; i < round_up_4(db_per_lane); ++i) sums[per_lane + i] = i < db_per_lane ? db[i / 2][i % 2 * 2] : 0.0f;
  const Gradient gradient = {dw_oi, db_o, n_out, n_in, factor, accumulate};
  const Splits all = {n_splits, group_size};
  const int64 size = sizeof(sums) / sizeof(float) * 32;
  const int used = warp_i() == 0 ? (int)(sizeof(sums) / sizeof(float)) : per_lane;
  Pack<float>* buffer = (Pack<float>*)memory + warp * PREFETCH * 32;
  unsigned* arrived = arrivals + warp * (split_groups(all) + 1);
  reduce_splits<PREFETCH>(sums, used, partials + warp * size, WARPS * size, arrived, all, split, buffer,
                          [&](int index, float sum) {
    if (index < per_lane) {
      const int i = index / 4 / FRAGMENTS_I, j = index / 4 % FRAGMENTS_I, e = index % 4;
      add_weight(gradient, warp_o() + i * 16 + fragment_row(e), warp_i() + j * 8 + fragment_column(e), sum);
    } else if (index < per_lane + db_per_lane && fragment_column(0) == 0) {
      const int i = (index - per_lane) / 2, e = (index - per_lane) % 2 * 2;
      add_bias(gradient, warp_o() + i * 16 + fragment_row(e), sum);
    }
  });
}
