// The output layer, row by row, in one pass: prediction, loss and the gradient of the pre-activations.
//
//     loss_rows           da_bj = w_b dl/da_bj / divisor, mean_loss = sum_b w_b l_b / B
//     output_rows         out_bj = O(a_bj)
//     output_delta_rows   da_bj = w_b / divisor sum_i dy_bi dO(a)_bi/da_bj, and of given losses mean_loss as above
//
// loss_formulas.cuh has O and l.
//
// Shapes: a, dy and out (B, n) of sums, da (B, n) of elements, row by row with a pitch each; labels (B) or targets
// (B, n); weight (B) or null; losses (B) or null. `source` is what O' is computed from: y^, or a for an activation that
// needs it, or null for the identity.
//
// A warp takes a row, its lanes every 32nd column. A block of 8 warps takes every gridDim-th group of 8 rows.
// `grid_sum` adds the batch's loss; the last block divides by B and writes it. Its barriers are the only ones. With B =
// 1024: 128 blocks, a row a warp.
//
// Variants: Accum (float or double) of sums, Element of da. 256 threads.
#include "../common/loss_formulas.cuh"

KERNEL __launch_bounds__(256, 2) loss_rows(
    const Accum* a_bj, int a_pitch, const int64* labels_b, const Accum* targets_bj, const Accum* weight_b,
    Element* da_bj, int da_pitch, Accum* mean_loss, int n_batch, int n, int loss, int output, const Accum* parameters,
    Accum divisor, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[1] = {0};
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const Row<32, Accum> row = {a_bj + (int64)b * a_pitch, n};
    Element* da = da_bj ? da_bj + (int64)b * da_pitch : nullptr;
    const Accum weight = weight_b ? weight_b[b] : Accum(1);
    const int64* label = labels_b ? labels_b + b : nullptr;
    const Accum* y = targets_bj + (int64)b * n;
    const auto write = [=](int j, Accum gradient) {
      if (da) to_element(gradient * weight / divisor, da[j]);
    };
    const Accum value = loss <= SQUARED_ERROR ? loss_of_row(row, loss, output, label, y, write)
                                              : further_loss_of_row(row, loss, output, label, y, parameters, write);
    if (threadIdx.x % 32 == 0) sums[0] += (double)(value * weight);
  }
  if (grid_sum(sums, (double*)memory, partials, arrivals)) *mean_loss = (Accum)(sums[0] / n_batch);
}

KERNEL __launch_bounds__(256, 2) output_rows(
    const Accum* a_bj, int a_pitch, Accum* out_bj, int out_pitch, int n_batch, int n, int output) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const Row<32, Accum> row = {a_bj + (int64)b * a_pitch, n};
    Accum* out = out_bj + (int64)b * out_pitch;
    output_of_row(row, output, [=](int j, Accum value) { out[j] = value; });
  }
}

KERNEL __launch_bounds__(256, 2) output_delta_rows(
    const Accum* dy_bj, int dy_pitch, const Accum* source_bj, int source_pitch, const Accum* weight_b, Element* da_bj,
    int da_pitch, int n_batch, int n, int output, Accum divisor, const Accum* losses_b, Accum* mean_loss,
    double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[1] = {0};
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const Row<32, Accum> row = {dy_bj + (int64)b * dy_pitch, n};
    const Accum* source = source_bj ? source_bj + (int64)b * source_pitch : nullptr;
    Element* da = da_bj + (int64)b * da_pitch;
    const Accum weight = weight_b ? weight_b[b] : Accum(1);
    through_output(row, output, source, [=](int j, Accum gradient) { to_element(gradient * weight / divisor, da[j]); });
    if (losses_b && threadIdx.x % 32 == 0) sums[0] += (double)(losses_b[b] * weight);
  }
  if (losses_b && grid_sum(sums, (double*)memory, partials, arrivals)) *mean_loss = (Accum)(sums[0] / n_batch);
}
