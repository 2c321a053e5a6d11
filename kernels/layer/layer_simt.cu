// One layer's backward pass in float32 or float64, any shape, without tensor cores:
//
//     dw_oi   (+)= factor  sum_b da_bo h_bi          outer products of each sample, summed over the batch
//     db_o    (+)= factor  sum_b da_bo
//     da_prev_bi = (sum_o da_bo w_oi) g'(source_bi)   or, at the network's input, (sum_o da_bo w_oi) factor
//
// Shapes: da (B, nO), h (B, nI), w (nO, nI), source and da_prev (B, nI) row by row with a pitch each; dw (nO, nI) and
// db (nO) contiguous.
//
// One launch computes two products. Their work tiles are one list, one for each block, the longer kind first so that
// the shorter fill the gaps at the end:
//
//     dw tile   tile (o, i) of dw over one split of the batch     A = da^T, B = h, K = rows of a split
//     da tile   tile (b, i) of da_prev                            A = da,   B = w, K = nO
//
// `reduce_splits` adds the splits of a dw tile, warp by warp; the last warp to arrive writes it. db comes from the dw
// tiles of the first column of tiles, whose stages of da are in shared memory anyway.
//
// A thread holds 8 x 8 of a tile of 128 x 128 (simt_tile.cuh, which also says why each barrier stands there).
//
// With B = 8192 and nO = nI = 1024: 8 x 8 dw tiles of 4 splits and 64 x 8 da tiles of 128 x 128, 768 blocks. On an H200
// that is 65 % of the FP32 peak.
//
// Variants: Accum (float or double), TILE (128, float only, or 64). 256 threads.
#include "../common/activations.cuh"
#include "../common/split_k.cuh"
#include "../tiles/simt_tile.cuh"
#include "forward_simt.cuh"

// A work tile of dw, and of db: their sums over one split.
DEVICE void dw_tile(Tile& tile, Matrix<Accum> da, Matrix<Accum> h, Accum* dw_oi, Accum* db_o, Accum factor,
                    int accumulate, int tiles_i, int work, int tiles, Splits splits, int rows_per_split,
                    Accum* partials, unsigned* arrivals) {
  const int split = work / tiles, which = work % tiles;
  const int o0 = which / tiles_i * TILE, i0 = which % tiles_i * TILE;
  const int warp = threadIdx.x / 32, warps = Tile::THREADS / 32;
  const bool with_db = i0 == 0;
  tile.template multiply<true, false>(da, h, o0, i0, split * rows_per_split, min((split + 1) * rows_per_split, da.rows),
                                      with_db);

  const auto write = [&](int o, int i, Accum sum) {
    if (o >= da.columns || i >= h.columns) return;
    Accum* address = dw_oi + (int64)o * h.columns + i;
    *address = (accumulate ? *address : Accum(0)) + sum * factor;
  };
  const auto write_db = [&](Accum sum) {
    const int o = o0 + (int)threadIdx.x;
    if (threadIdx.x < TILE && o < da.columns) db_o[o] = (accumulate ? db_o[o] : Accum(0)) + sum * factor;
  };
  const int width = Tile::WIDTH;
  if (splits.count == 1) {
#pragma unroll 1
    for (int index = threadIdx.x; index < TILE * TILE; index += Tile::THREADS) {
      const int r = index / TILE, c = index % TILE;
      write(o0 + r, i0 + c, tile.totals(r, c / width * width)->at[c % width]);
    }
    if (with_db) write_db(tile.row_sum);
    return;
  }

  // A thread's numbers of the tile, then its part of db, as one partial result.
  const int per_lane = Tile::ROWS * Tile::COLUMNS, per_lane_with_db = per_lane + width;
  Accum sums[per_lane_with_db];
#pragma unroll
  for (int i = 0; i < per_lane; i += width) {
    const typename Tile::Neighbours total = *tile.own_totals(i / Tile::COLUMNS, i % Tile::COLUMNS);
#pragma unroll
    for (int j = 0; j < width; ++j) sums[i + j] = total.at[j];
  }
#pragma unroll
  for (int i = per_lane + 1; i < per_lane_with_db; ++i) sums[i] = 0;
  sums[per_lane] = tile.row_sum;
  // The stages hold a circular buffer for each warp.
  const int PREFETCH = 2 * Tile::STAGE * sizeof(Accum) / (warps * 512);
  const int64 stride = (int64)tiles * warps * 32 * per_lane_with_db;
  const int64 place = (int64)which * warps + warp;
  Pack<Accum>* buffer = (Pack<Accum>*)(tile.shared + TILE * TILE) + warp * PREFETCH * 32;
  unsigned* arrived = arrivals + place * (split_groups(splits) + 1);
  reduce_splits<PREFETCH>(sums, with_db ? per_lane_with_db : per_lane, partials + place * 32 * per_lane_with_db, stride,
                          arrived, splits, split, buffer, [&](int index, Accum sum) {
    if (index < per_lane)
      write(o0 + Tile::row(index / Tile::COLUMNS), i0 + Tile::column(index % Tile::COLUMNS), sum);
    else if (index == per_lane && with_db)
      write_db(sum);
  });
}

// A work tile of da_prev.
DEVICE void da_prev_tile(Tile& tile, Matrix<Accum> da, Matrix<Accum> w, const Accum* source_bi, int source_pitch,
                         int activation, Accum factor, Accum* da_prev_bi, int da_prev_pitch, int tiles_i, int work) {
  const int b0 = work / tiles_i * TILE, i0 = work % tiles_i * TILE;
  tile.template multiply<false, false>(da, w, b0, i0, 0, da.columns, false);

  const int width = Pack<Accum>::count, packs = TILE / width;
  const bool aligned = aligned_rows(da_prev_bi, da_prev_pitch) && aligned_rows(source_bi, source_pitch);
#pragma unroll 1
  for (int index = threadIdx.x; index < TILE * packs; index += Tile::THREADS) {
    const int b = b0 + index / packs, c = index % packs * width, valid = min(width, w.columns - (i0 + c));
    if (b >= da.rows || valid <= 0) continue;
    Group<Accum, width> d = *tile.totals(b - b0, c);
#pragma unroll
    for (int j = 0; j < width; ++j) d.at[j] *= factor;
    if (activation != IDENTITY) {
      const Group<Accum, width> source = load_group<width>(
          source_bi + (int64)b * source_pitch + i0 + c, valid, aligned);
      times_derivative(activation, d.at, source.at);
    }
    store_group(da_prev_bi + (int64)b * da_prev_pitch + i0 + c, d, valid, aligned);
  }
}

KERNEL __launch_bounds__(256, Tile::BLOCKS) layer_simt(
    const Accum* da_bo, int da_pitch, const Accum* h_bi, int h_pitch, const Accum* w_oi, int w_pitch,
    const Accum* source_bi, int source_pitch, Accum* da_prev_bi, int da_prev_pitch, Accum* dw_oi, Accum* db_o,
    int n_batch, int n_out, int n_in, int activation, Accum da_prev_factor, Accum factor, int accumulate, int n_splits,
    int group_size, int rows_per_split, Accum* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  Tile tile;
  tile.shared = (Accum*)memory;

  const Matrix<Accum> da = {da_bo, da_pitch, n_batch, n_out}, h = {h_bi, h_pitch, n_batch, n_in};
  const Matrix<Accum> w = {w_oi, w_pitch, n_out, n_in};
  const int tiles_i = ceil_div(n_in, TILE), dw_tiles = ceil_div(n_out, TILE) * tiles_i;
  const int dw_work = dw_tiles * n_splits, da_work = da_prev_bi ? ceil_div(n_batch, TILE) * tiles_i : 0;
  const bool dw_first = rows_per_split >= n_out;

  const int work = blockIdx.x, dw_index = dw_first ? work : work - da_work;
  if (0 <= dw_index && dw_index < dw_work)
    dw_tile(tile, da, h, dw_oi, db_o, factor, accumulate, tiles_i, dw_index, dw_tiles, {n_splits, group_size},
            rows_per_split, partials, arrivals);
  else
    da_prev_tile(tile, da, w, source_bi, source_pitch, activation, da_prev_factor, da_prev_bi, da_prev_pitch, tiles_i,
                 dw_first ? work - dw_work : work);
}
