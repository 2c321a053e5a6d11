// The output layer, row by row, in one pass: y^ = O(a), each sample's loss l, and da = w dl/da / divisor. loss_formulas.cuh has the
// formulas.
//
// Shapes: a (B, n) of sums, da (B, n) of operands, row by row with a pitch each; labels (B) or targets (B, n); weight (B) or null.
//
// A warp takes a row, its lanes every 32nd column; a block of 8 warps takes every gridDim-th group of 8 rows. The batch's loss is
// summed by `grid_sum`; the last block divides by B and writes it.
//
// Variants: REAL (float or double) of sums, OPERAND of da. 256 threads.
#include "../common/loss_formulas.cuh"

KERNEL __launch_bounds__(256, 2) loss_rows(const REAL* a_bj, int a_pitch, const int64* labels_b, const REAL* targets_bj,
                                        const REAL* weight_b, OPERAND* da_bj, int da_pitch, REAL* mean_loss, int n_batch,
                                        int n, int loss, int output, REAL divisor, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[1] = {0};
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const Row<32, REAL> row = {a_bj + (int64)b * a_pitch, n};
    OPERAND* da = da_bj ? da_bj + (int64)b * da_pitch : nullptr;
    const REAL weight = weight_b ? weight_b[b] : REAL(1);
    const REAL value = loss_of_row(row, loss, output, labels_b ? labels_b + b : nullptr, targets_bj + (int64)b * n,
                                   [=](int j, REAL gradient) {
      if (da) narrow(gradient * weight / divisor, da[j]);
    });
    if (threadIdx.x % 32 == 0) sums[0] += (double)(value * weight);
  }
  if (grid_sum(sums, (double*)memory, partials, arrivals)) *mean_loss = (REAL)(sums[0] / n_batch);
}

// y^ = O(a): (B, n) of sums, row by row with a pitch each.
KERNEL __launch_bounds__(256, 2) output_rows(const REAL* a_bj, int a_pitch, REAL* out_bj, int out_pitch, int n_batch, int n,
                                          int output) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const Row<32, REAL> row = {a_bj + (int64)b * a_pitch, n};
    REAL* out = out_bj + (int64)b * out_pitch;
    output_of_row(row, output, [=](int j, REAL value) { out[j] = value; });
  }
}
