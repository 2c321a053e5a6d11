// One layer's backward pass on tensor cores: bfloat16, float16 or TF32 operands, float32 sums, any shape.
//
//     dw_oi   (+)= factor  sum_b da_bo h_bi          outer products of each sample, summed over the batch
//     db_o    (+)= factor  sum_b da_bo
//     da_prev_bi = (sum_o da_bo w_oi) g'(source_bi)   or, at the network's input, (sum_o da_bo w_oi) da_prev_factor in float32
//
// Shapes: da (B, nO), h (B, nI), w (nO, nI), source and da_prev (B, nI) row by row with a pitch each; dw (nO, nI) and db
// (nO) float32, contiguous.
//
// One launch holds two products. Their tiles are one list of work, the longer kind first, from which blocks draw:
//
//     dw item   tile (o, i) of dw over one chain of the batch     A = da^T, B = h, K = chain_rows
//     da item   tile (b, i) of da_prev                            A = da,   B = w, K = nO
//
// A dw tile of several chains is summed by `reduce_chains`, warp by warp, as the tensor cores hold it; the last warp to arrive
// writes it. db comes from the dw items of the first column of tiles: their slices of da are also multiplied by ones.
//
// With B = 8192 and nO = nI = 1024: 8 x 8 dw tiles of 5 chains and 64 x 8 da tiles of 128 x 128.
//
// Variants: OPERAND (bfloat16, float16, float for TF32), TILE. 128 threads.
#include "epilogue.cuh"
#include "forward_mma.cuh"
#include "mma_tile.cuh"
#include "reduce.cuh"
#include "schedule.cuh"

typedef MmaTile<OPERAND, TILE, TILE, 4, true, false> WeightsTile;
typedef MmaTile<OPERAND, TILE, TILE, 4, false, false> DeltaTile;

// dw and db over one chain.
DEVICE void weights_item(OPERAND* shared, const Matrix<OPERAND>& da, const Matrix<OPERAND>& h, const Gradient& gradient,
                         int item, Chains chains, int chain_rows, float* partials, unsigned* arrivals) {
  typedef WeightsTile Tile;
  const int tiles_i = ceil_div(h.columns, TILE), tiles = ceil_div(da.columns, TILE) * tiles_i;
  const int chain = item / tiles, which = item % tiles, o0 = which / tiles_i * TILE, i0 = which % tiles_i * TILE;
  const int warps = Tile::THREADS / 32, warp = threadIdx.x / 32;
  Tile tile;
  tile.multiply(shared, da, h, o0, i0, chain * chain_rows, min((chain + 1) * chain_rows, da.rows), i0 == 0);

  // What this warp holds of dw, and in the first column of tiles of db: one number for each row of a fragment.
  const int held = Tile::FRAGMENTS_M * Tile::FRAGMENTS_N * 4, held_db = Tile::FRAGMENTS_M * 2;
  const int used = i0 == 0 && Tile::warp_n() == 0 ? held + (held_db + 3) / 4 * 4 : held;
  float sums[held + (held_db + 3) / 4 * 4];
#pragma unroll
  for (int i = 0; i < held; ++i) sums[i] = tile.sums[i / 4 / Tile::FRAGMENTS_N][i / 4 % Tile::FRAGMENTS_N][i % 4];
#pragma unroll
  for (int i = 0; i < (held_db + 3) / 4 * 4; ++i) sums[held + i] = i < held_db ? tile.row_sums[i / 2][i % 2 * 2] : 0.0f;
  const int DEPTH = TILE == 128 ? 32 : 16;  // shared memory is free, and has room for 4 rings of 512 DEPTH bytes
  static_assert(4 * 512 * DEPTH <= 4 * Tile::STAGE * sizeof(OPERAND), "four stages hold the rings");
  const int64 size = sizeof(sums) / sizeof(float) * 32, place = which * warps + warp;
  Pack<float>* ring = (Pack<float>*)shared + warp * DEPTH * 32;
  unsigned* arrived = arrivals + place * (chain_groups(chains) + 1);
  reduce_chains<DEPTH>(sums, used, partials + place * size, tiles * warps * size, arrived, chains, chain, ring,
                       [&](int index, float sum) {
    if (index < held) {
      const int i = index / 4 / Tile::FRAGMENTS_N, j = index / 4 % Tile::FRAGMENTS_N, e = index % 4;
      add_weight(gradient, o0 + Tile::warp_m() + i * 16 + fragment_row(e),
                 i0 + Tile::warp_n() + j * 8 + fragment_column(e), sum);
    } else if (index < held + held_db && fragment_column(0) == 0) {
      const int i = (index - held) / 2, e = (index - held) % 2 * 2;
      add_bias(gradient, o0 + Tile::warp_m() + i * 16 + fragment_row(e), sum);
    }
  });
}

// A tile of da_prev.
DEVICE void delta_item(OPERAND* shared, const Matrix<OPERAND>& da, const Matrix<OPERAND>& w, const Matrix<OPERAND>& source,
                       int activation, float factor, const Output& da_prev, int item) {
  typedef DeltaTile Tile;
  const int tiles_i = ceil_div(w.columns, TILE), b0 = item / tiles_i * TILE, i0 = item % tiles_i * TILE;
  Tile tile;
  tile.multiply(shared, da, w, b0, i0, 0, da.columns, false);
  float* sums = (float*)shared;
  tile.share(sums);

  // A warp to a row (or two), four columns a lane, four rows at a time: their sources are on their way together.
  const bool aligned_source = aligned_rows(source.at, source.pitch), aligned_prev = aligned_rows<OPERAND>(da_prev);
  const int AT_ONCE = 4, lanes = TILE / 4, rows = Tile::THREADS / lanes, column = (int)threadIdx.x % lanes * 4, i = i0 + column;
  if (i >= da_prev.columns) return;
#pragma unroll 1
  for (int row = (int)threadIdx.x / lanes; row < TILE; row += AT_ONCE * rows) {
    Four d[AT_ONCE];
    Group<OPERAND, 4> s[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const int b = b0 + row + k * rows;
      if (activation != IDENTITY && b < da_prev.rows)
        s[k] = load_group<4>(source.at + (int64)b * source.pitch + i, da_prev.columns - i, aligned_source);
      d[k] = *(const Four*)(sums + (row + k * rows) * Tile::PITCH_C + column);
    }
    finish_delta(d, s, activation, factor);
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k)
      if (b0 + row + k * rows < da_prev.rows) store<OPERAND>(da_prev, b0 + row + k * rows, i, d[k], aligned_prev);
  }
}

KERNEL __launch_bounds__(128, 2) layer_mma(
    const OPERAND* da_bo, int da_pitch, const OPERAND* h_bi, int h_pitch, const OPERAND* w_oi, int w_pitch,
    const OPERAND* source_bi, int source_pitch, void* da_prev_bi, int da_prev_pitch, int da_prev_is_float32, float* dw_oi, float* db_o,
    int n_batch, int n_out, int n_in, int activation, float da_prev_factor, float factor, int accumulate, int n_splits,
    int group_size, int rows_per_split, float* partials, unsigned* arrivals, unsigned* next_tile) {
  SHARED_MEMORY(memory);
  OPERAND* shared = (OPERAND*)(memory + 128);
  int* drawn = (int*)memory;

  const Matrix<OPERAND> da = {da_bo, da_pitch, n_batch, n_out}, h = {h_bi, h_pitch, n_batch, n_in};
  const Matrix<OPERAND> w = {w_oi, w_pitch, n_out, n_in}, source = {source_bi, source_pitch, n_batch, n_in};
  const Gradient gradient = {dw_oi, db_o, n_out, n_in, factor, accumulate};
  const Output da_prev = {da_prev_bi, da_prev_pitch, n_batch, n_in, da_prev_is_float32};
  const int tiles_i = ceil_div(n_in, TILE);
  const int dw_items = ceil_div(n_out, TILE) * tiles_i * n_splits, da_items = da_prev_bi ? ceil_div(n_batch, TILE) * tiles_i : 0;
  const int items = dw_items + da_items, first_dw = rows_per_split >= n_out ? 0 : da_items, first_da = first_dw ? 0 : dw_items;

  for (int item; (item = draw_item(next_tile, items, drawn)) < items;) {
    if (first_dw <= item && item < first_dw + dw_items)
      weights_item(shared, da, h, gradient, item - first_dw, {n_splits, group_size}, rows_per_split, partials, arrivals);
    else
      delta_item(shared, da, w, source, activation, da_prev_factor, da_prev, item - first_da);
  }
}
