// One layer's backward pass on tensor cores: bfloat16, float16 or TF32 operands, float32 sums, any shape.
//
//     dw_oi   (+)= factor  sum_b da_bo h_bi          outer products of each sample, summed over the batch
//     db_o    (+)= factor  sum_b da_bo
//     da_prev_bi = (sum_o da_bo w_oi) g'(source_bi)
//                  or, at the network's input, (sum_o da_bo w_oi) da_prev_factor in float32
//
// Shapes: da (B, nO), h (B, nI), w (nO, nI), source and da_prev (B, nI) row by row with a pitch each; dw (nO, nI) and
// db (nO) float32, contiguous.
//
// One launch computes two products. Their work tiles are one list, the longer kind first, which a persistent grid works
// off (tile_scheduler.cuh):
//
//     dw tile   tile (o, i) of dw over one split of the batch     A = da^T, B = h, K = rows of a split
//     da tile   tile (b, i) of da_prev                            A = da,   B = w, K = nO
//
// `reduce_splits` adds the splits of a dw tile, warp by warp, as the tensor cores hold it; the last warp to arrive
// writes it. db comes from the dw tiles of the first column of tiles: their stages of da are also multiplied by ones.
//
// A block computes one work tile after the other. A thread holds a quarter of a warp's rows and columns, as ptx.cuh
// says. Barriers stand between a stage's arrival and its use (mma_tile.cuh) and around the shared number of the next
// work tile.
//
// With B = 8192 and nO = nI = 1024: 8 x 8 dw tiles of 5 splits and 64 x 8 da tiles of 128 x 128.
//
// Variants: Element (bfloat16, float16, float for TF32), TILE. 128 threads.
#include "../common/split_k.cuh"
#include "../tiles/epilogue.cuh"
#include "../tiles/mma_tile.cuh"
#include "../tiles/tile_scheduler.cuh"
#include "forward_mma.cuh"

typedef MmaTile<Element, TILE, TILE, 4, true, false> DwTile;
typedef MmaTile<Element, TILE, TILE, 4, false, false> DaPrevTile;

// A work tile of dw, and of db: their sums over one split.
DEVICE void dw_tile(Element* shared, const Matrix<Element>& da, const Matrix<Element>& h, const Gradient& gradient,
                    int work, Splits splits, int rows_per_split, float* partials, unsigned* arrivals) {
  typedef DwTile Tile;
  const int tiles_i = ceil_div(h.columns, TILE), tiles = ceil_div(da.columns, TILE) * tiles_i;
  const int split = work / tiles, which = work % tiles, o0 = which / tiles_i * TILE, i0 = which % tiles_i * TILE;
  const int warps = Tile::THREADS / 32, warp = threadIdx.x / 32;
  Tile tile;
  tile.multiply(shared, da, h, o0, i0, split * rows_per_split, min((split + 1) * rows_per_split, da.rows), i0 == 0);

  // A lane's numbers of dw; in the first column of tiles also of db, one number for each row of a fragment.
  const int per_lane = Tile::FRAGMENTS_M * Tile::FRAGMENTS_N * 4, db_per_lane = Tile::FRAGMENTS_M * 2;
  const int used = i0 == 0 && Tile::warp_n() == 0 ? per_lane + round_up_4(db_per_lane) : per_lane;
  float sums[per_lane + round_up_4(db_per_lane)];
#pragma unroll
  for (int i = 0; i < per_lane; ++i) sums[i] = tile.sums[i / 4 / Tile::FRAGMENTS_N][i / 4 % Tile::FRAGMENTS_N][i % 4];
#pragma unroll
  for (int i = 0; i < round_up_4(db_per_lane); ++i)
    sums[per_lane + i] = i < db_per_lane ? tile.row_sums[i / 2][i % 2 * 2] : 0.0f;
  const int PREFETCH = TILE == 128 ? 32 : 16;  // the stages' memory is free for 4 buffers of 512 PREFETCH bytes
  static_assert(4 * 512 * PREFETCH <= 4 * Tile::STAGE * sizeof(Element), "four stages hold the circular buffers");
  const int64 size = sizeof(sums) / sizeof(float) * 32, place = which * warps + warp;
  Pack<float>* buffer = (Pack<float>*)shared + warp * PREFETCH * 32;
  unsigned* arrived = arrivals + place * (split_groups(splits) + 1);
  reduce_splits<PREFETCH>(sums, used, partials + place * size, tiles * warps * size, arrived, splits, split, buffer,
                          [&](int index, float sum) {
    if (index < per_lane) {
      const int i = index / 4 / Tile::FRAGMENTS_N, j = index / 4 % Tile::FRAGMENTS_N, e = index % 4;
      add_weight(gradient, o0 + Tile::warp_m() + i * 16 + fragment_row(e),
                 i0 + Tile::warp_n() + j * 8 + fragment_column(e), sum);
    } else if (index < per_lane + db_per_lane && fragment_column(0) == 0) {
      const int i = (index - per_lane) / 2, e = (index - per_lane) % 2 * 2;
      add_bias(gradient, o0 + Tile::warp_m() + i * 16 + fragment_row(e), sum);
    }
  });
}

// A work tile of da_prev.
DEVICE void da_prev_tile(Element* shared, const Matrix<Element>& da, const Matrix<Element>& w,
                         const Matrix<Element>& source, int activation, float factor, const Output& da_prev, int work) {
  typedef DaPrevTile Tile;
  const int tiles_i = ceil_div(w.columns, TILE), b0 = work / tiles_i * TILE, i0 = work % tiles_i * TILE;
  Tile tile;
  tile.multiply(shared, da, w, b0, i0, 0, da.columns, false);
  float* sums = (float*)shared;
  tile.store_to_shared(sums);

  // A warp to a row (or two), four columns a lane, four rows at a time: their sources are on their way together.
  const bool aligned_source = aligned_rows(source.at, source.pitch), aligned_prev = aligned_rows<Element>(da_prev);
  const int AT_ONCE = 4, lanes = TILE / 4, rows = Tile::THREADS / lanes, column = (int)threadIdx.x % lanes * 4;
  const int i = i0 + column;
  if (i >= da_prev.columns) return;
#pragma unroll 1
  for (int row = (int)threadIdx.x / lanes; row < TILE; row += AT_ONCE * rows) {
    Four d[AT_ONCE];
    Group<Element, 4> s[AT_ONCE];
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
      if (b0 + row + k * rows < da_prev.rows) store<Element>(da_prev, b0 + row + k * rows, i, d[k], aligned_prev);
  }
}

KERNEL __launch_bounds__(128, 2) layer_mma(
    const Element* da_bo, int da_pitch, const Element* h_bi, int h_pitch, const Element* w_oi, int w_pitch,
    const Element* source_bi, int source_pitch, void* da_prev_bi, int da_prev_pitch, int da_prev_is_float32,
    float* dw_oi, float* db_o, int n_batch, int n_out, int n_in, int activation, float da_prev_factor, float factor,
    int accumulate, int n_splits, int group_size, int rows_per_split, float* partials, unsigned* arrivals,
    unsigned* next_tile) {
  SHARED_MEMORY(memory);
  Element* shared = (Element*)(memory + 128);

  const Matrix<Element> da = {da_bo, da_pitch, n_batch, n_out}, h = {h_bi, h_pitch, n_batch, n_in};
  const Matrix<Element> w = {w_oi, w_pitch, n_out, n_in}, source = {source_bi, source_pitch, n_batch, n_in};
  const Gradient gradient = {dw_oi, db_o, n_out, n_in, factor, accumulate};
  const Output da_prev = {da_prev_bi, da_prev_pitch, n_batch, n_in, da_prev_is_float32};
  const int tiles_i = ceil_div(n_in, TILE);
  const int dw_tiles = ceil_div(n_out, TILE) * tiles_i * n_splits;
  const int da_tiles = da_prev_bi ? ceil_div(n_batch, TILE) * tiles_i : 0;
  const int tiles = dw_tiles + da_tiles, first_dw = rows_per_split >= n_out ? 0 : da_tiles;
  const int first_da = first_dw ? 0 : dw_tiles;

  const TileScheduler scheduler = {next_tile, tiles, (int*)memory};
  for (int work; (work = scheduler.next()) < tiles;) {
    if (first_dw <= work && work < first_dw + dw_tiles)
      dw_tile(shared, da, h, gradient, work - first_dw, {n_splits, group_size}, rows_per_split, partials, arrivals);
    else
      da_prev_tile(shared, da, w, source, activation, da_prev_factor, da_prev, work - first_da);
  }
}
