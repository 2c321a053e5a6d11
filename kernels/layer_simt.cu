// One layer's backward pass in float32 or float64, any shape, without tensor cores:
//
//     dw_oi   (+)= factor  sum_b da_bo h_bi          outer products of each sample, summed over the batch
//     db_o    (+)= factor  sum_b da_bo
//     da_prev_bi = (sum_o da_bo w_oi) g'(source_bi)   or, at the network's input, (sum_o da_bo w_oi) factor
//
// Shapes: da (B, nO), h (B, nI), w (nO, nI), source and da_prev (B, nI) row by row with a pitch each; dw (nO, nI) and db
// (nO) contiguous.
//
// One launch holds two products. Their tiles are one list of work, an item for each block, the longer kind first so that the
// shorter fill the gaps at the end:
//
//     dw item   tile (o, i) of dw over one chain of the batch     A = da^T, B = h, K = chain_rows
//     da item   tile (b, i) of da_prev                            A = da,   B = w, K = nO
//
// A dw tile of several chains is summed by `reduce_chains`, warp by warp; the last warp to arrive writes it. db comes from
// the dw items of the first column of tiles, whose slices of da are in shared memory anyway.
//
// With B = 8192 and nO = nI = 1024: 8 x 8 dw tiles of 4 chains and 64 x 8 da tiles of 128 x 128, 768 blocks. On an H200 that is
// 65 % of the FP32 peak.
//
// Variants: REAL (float or double), TILE (128, float only, or 64). 256 threads.
#include "activations.cuh"
#include "forward_simt.cuh"
#include "reduce.cuh"
#include "simt_tile.cuh"

// dw and db over one chain.
DEVICE void weights_item(Tile& tile, Matrix<REAL> da, Matrix<REAL> h, REAL* dw_oi, REAL* db_o, REAL factor, int accumulate,
                         int tiles_i, int item, int tiles, Chains chains, int chain_rows, REAL* partials,
                         unsigned* arrivals) {
  const int chain = item / tiles, which = item % tiles;
  const int o0 = which / tiles_i * TILE, i0 = which % tiles_i * TILE;
  const int warp = threadIdx.x / 32, warps = Tile::THREADS / 32;
  const bool with_db = i0 == 0;
  tile.template multiply<true, false>(da, h, o0, i0, chain * chain_rows, min((chain + 1) * chain_rows, da.rows),
                                      with_db);

  const auto write = [&](int o, int i, REAL sum) {
    if (o >= da.columns || i >= h.columns) return;
    REAL* address = dw_oi + (int64)o * h.columns + i;
    *address = (accumulate ? *address : REAL(0)) + sum * factor;
  };
  const auto write_db = [&](REAL sum) {
    const int o = o0 + (int)threadIdx.x;
    if (threadIdx.x < TILE && o < da.columns) db_o[o] = (accumulate ? db_o[o] : REAL(0)) + sum * factor;
  };
  const int width = Tile::WIDTH;
  if (chains.count == 1) {
#pragma unroll 1
    for (int index = threadIdx.x; index < TILE * TILE; index += Tile::THREADS) {
      const int r = index / TILE, c = index % TILE;
      write(o0 + r, i0 + c, tile.totals(r, c / width * width)->at[c % width]);
    }
    if (with_db) write_db(tile.row_sum);
    return;
  }

  // What a thread holds of the tile, then its share of db, as one partial result.
  const int held = Tile::ROWS * Tile::COLUMNS, with_sum = held + width;
  REAL sums[with_sum];
#pragma unroll
  for (int i = 0; i < held; i += width) {
    const typename Tile::Neighbours total = *tile.held(i / Tile::COLUMNS, i % Tile::COLUMNS);
#pragma unroll
    for (int j = 0; j < width; ++j) sums[i + j] = total.at[j];
  }
#pragma unroll
  for (int i = held + 1; i < with_sum; ++i) sums[i] = 0;
  sums[held] = tile.row_sum;
  const int DEPTH = 2 * Tile::SLICE * sizeof(REAL) / (warps * 512);  // the slices hold a ring for each warp
  const int64 stride = (int64)tiles * warps * 32 * with_sum;
  const int64 place = (int64)which * warps + warp;
  Pack<REAL>* ring = (Pack<REAL>*)(tile.shared + TILE * TILE) + warp * DEPTH * 32;
  unsigned* arrived = arrivals + place * (chain_groups(chains) + 1);
  reduce_chains<DEPTH>(sums, with_db ? with_sum : held, partials + place * 32 * with_sum, stride, arrived, chains, chain, ring,
                       [&](int index, REAL sum) {
    if (index < held)
      write(o0 + Tile::row(index / Tile::COLUMNS), i0 + Tile::column(index % Tile::COLUMNS), sum);
    else if (index == held && with_db)
      write_db(sum);
  });
}

// A tile of da_prev.
DEVICE void delta_item(Tile& tile, Matrix<REAL> da, Matrix<REAL> w, const REAL* source_bi, int source_pitch, int activation,
                       REAL factor, REAL* da_prev_bi, int prev_pitch, int tiles_i, int item) {
  const int b0 = item / tiles_i * TILE, i0 = item % tiles_i * TILE;
  tile.template multiply<false, false>(da, w, b0, i0, 0, da.columns, false);

  const int width = Pack<REAL>::count, packs = TILE / width;
  const bool aligned = aligned_rows(da_prev_bi, prev_pitch) && aligned_rows(source_bi, source_pitch);
#pragma unroll 1
  for (int index = threadIdx.x; index < TILE * packs; index += Tile::THREADS) {
    const int b = b0 + index / packs, c = index % packs * width, valid = min(width, w.columns - (i0 + c));
    if (b >= da.rows || valid <= 0) continue;
    Group<REAL, width> d = *tile.totals(b - b0, c);
#pragma unroll
    for (int j = 0; j < width; ++j) d.at[j] *= factor;
    if (activation != IDENTITY) {
      const Group<REAL, width> source = load_group<width>(source_bi + (int64)b * source_pitch + i0 + c, valid, aligned);
      times_derivative(activation, d.at, source.at);
    }
    store_group(da_prev_bi + (int64)b * prev_pitch + i0 + c, d, valid, aligned);
  }
}

KERNEL __launch_bounds__(256, Tile::BLOCKS) layer_simt(
    const REAL* da_bo, int da_pitch, const REAL* h_bi, int h_pitch, const REAL* w_oi, int w_pitch, const REAL* source_bi,
    int source_pitch, REAL* da_prev_bi, int da_prev_pitch, REAL* dw_oi, REAL* db_o, int n_batch, int n_out, int n_in,
    int activation, REAL da_prev_factor, REAL factor, int accumulate, int n_splits, int group_size, int rows_per_split,
    REAL* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  Tile tile;
  tile.shared = (REAL*)memory;

  const Matrix<REAL> da = {da_bo, da_pitch, n_batch, n_out}, h = {h_bi, h_pitch, n_batch, n_in};
  const Matrix<REAL> w = {w_oi, w_pitch, n_out, n_in};
  const int tiles_i = ceil_div(n_in, TILE), dw_tiles = ceil_div(n_out, TILE) * tiles_i;
  const int dw_items = dw_tiles * n_splits, da_items = da_prev_bi ? ceil_div(n_batch, TILE) * tiles_i : 0;
  const bool dw_first = rows_per_split >= n_out;

  const int item = blockIdx.x, dw_item = dw_first ? item : item - da_items;
  if (0 <= dw_item && dw_item < dw_items)
    weights_item(tile, da, h, dw_oi, db_o, factor, accumulate, tiles_i, dw_item, dw_tiles, {n_splits, group_size}, rows_per_split,
                 partials, arrivals);
  else
    delta_item(tile, da, w, source_bi, source_pitch, activation, da_prev_factor, da_prev_bi, da_prev_pitch, tiles_i,
               dw_first ? item - dw_items : item);
}
