// One layer's forward pass on tensor cores: bfloat16, float16 or TF32 operands, float32 sums, any shape.
//
//     a_bo = sum_i h_bi w_oi + bias_o,    out_bo = g(a_bo)
//
// Shapes: h (B, nI), w (nO, nI), a and out (B, nO) row by row with a pitch each; bias (nO) float32. Where g' is computed from
// a (gelu, silu), a is rounded to the operands' format before g reads it, and written. out is float32 for the output layer.
//
// A block computes one tile of 128 x 128 or 64 x 64: A = h, B = w transposed, K = nI. Tiles of one row of tiles follow each
// other, so that their rows of h are read from the level-2 cache. Rows that are not aligned to 16 bytes are read by plain loads.
//
// Compiled with layer_mma.cu: a network that goes one way layer by layer also goes the other. Variants as there. 128 threads.
#pragma once
#include "epilogue.cuh"
#include "mma_tile.cuh"

typedef MmaTile<OPERAND, TILE, TILE, 4, false, true> ForwardTile;

KERNEL __launch_bounds__(128, 2) forward_mma(const OPERAND* h_bi, int h_pitch, const OPERAND* w_oi, int w_pitch,
                                          const float* bias_o, OPERAND* a_bo, int a_pitch, void* out_bo, int out_pitch,
                                          int out_is_float32, int n_batch, int n_out, int n_in, int activation) {
  SHARED_MEMORY(memory);
  const int tiles_o = ceil_div(n_out, TILE), b0 = blockIdx.x / tiles_o * TILE, o0 = blockIdx.x % tiles_o * TILE;
  const Matrix<OPERAND> h = {h_bi, h_pitch, n_batch, n_in}, w = {w_oi, w_pitch, n_out, n_in};
  ForwardTile tile;
  tile.multiply((OPERAND*)memory, h, w, b0, o0, 0, n_in, false);
  float* sums = (float*)memory;
  tile.share(sums);

  const Output kept = {a_bo, a_pitch, n_batch, n_out, 0}, out = {out_bo, out_pitch, n_batch, n_out, out_is_float32};
  const bool aligned_kept = aligned_rows<OPERAND>(kept), aligned_out = aligned_rows<OPERAND>(out);
  // A warp to a row (or two), four columns a lane.
  const int lanes = TILE / 4, column = (int)threadIdx.x % lanes * 4, o = o0 + column;
  if (o >= n_out) return;
  const Four bias = load_group<4>(bias_o + o, n_out - o, false);
#pragma unroll 1
  for (int row = (int)threadIdx.x / lanes; row < TILE && b0 + row < n_batch; row += ForwardTile::THREADS / lanes) {
    Four a = *(const Four*)(sums + row * ForwardTile::PITCH_C + column);
#pragma unroll
    for (int j = 0; j < 4; ++j) a.at[j] += bias.at[j];
    if (derivative_from_a(activation)) a = widen(narrow<OPERAND>(a));
    if (a_bo) store<OPERAND>(kept, b0 + row, o, a, aligned_kept);
    activate(activation, a.at);
    store<OPERAND>(out, b0 + row, o, a, aligned_out);
  }
}
