// One layer's forward pass in float32 or float64, any shape, without tensor cores:
//
//     a_bo = sum_i h_bi w_oi + bias_o,    out_bo = g(a_bo)
//
// Shapes: h (B, nI), w (nO, nI), a and out (B, nO) row by row with a pitch each; bias (nO). a is written where it is
// not null (g' of gelu and silu is computed from it).
//
// A block computes one tile, a thread 8 x 8 of it (simt_tile.cuh): A = h, B = w transposed, K = nI. Tiles of one row of
// tiles follow each other, so that their rows of h are read from the level-2 cache. With B = 8192 and nO = nI = 1024:
// 64 x 8 tiles of 128 x 128. On an H200 that is 60 % of the FP32 peak.
//
// Compiled with layer_simt.cu: a network that goes one way layer by layer also goes the other. Variants as there. 256
// threads.
#pragma once
#include "../common/activations.cuh"
#include "../tiles/simt_tile.cuh"

typedef SimtTile<Accum, TILE, TILE> Tile;

KERNEL __launch_bounds__(256, Tile::BLOCKS) forward_simt(
    const Accum* h_bi, int h_pitch, const Accum* w_oi, int w_pitch, const Accum* bias_o, Accum* a_bo, int a_pitch,
    Accum* out_bo, int out_pitch, int n_batch, int n_out, int n_in, int activation) {
  SHARED_MEMORY(memory);
  Tile tile;
  tile.shared = (Accum*)memory;
  const int tiles_o = ceil_div(n_out, TILE), b0 = blockIdx.x / tiles_o * TILE, o0 = blockIdx.x % tiles_o * TILE;
  const Matrix<Accum> h = {h_bi, h_pitch, n_batch, n_in}, w = {w_oi, w_pitch, n_out, n_in};
  tile.template multiply<false, true>(h, w, b0, o0, 0, n_in, false);

  const int width = Pack<Accum>::count, packs = TILE / width;
  const bool aligned = aligned_rows(out_bo, out_pitch) && aligned_rows(a_bo, a_pitch);
#pragma unroll 1
  for (int index = threadIdx.x; index < TILE * packs; index += Tile::THREADS) {
    const int b = b0 + index / packs, o = o0 + index % packs * width, valid = min(width, n_out - o);
    if (b >= n_batch || valid <= 0) continue;
    Group<Accum, width> a = *tile.totals(b - b0, o - o0);
    const Group<Accum, width> bias = load_group<width>(bias_o + o, valid, false);
#pragma unroll
    for (int j = 0; j < width; ++j) a.at[j] += bias.at[j];
    if (a_bo) store_group(a_bo + (int64)b * a_pitch + o, a, valid, aligned);
    activate(activation, a.at);
    store_group(out_bo + (int64)b * out_pitch + o, a, valid, aligned);
  }
}
