// The output layer, row by row, in one pass: y^ = O(a), each sample's loss, and da (output_rows.cuh has the formulas).
//
// Shapes: a (B, n) of sums, da (B, n) of operands, row by row with a pitch each; labels (B) or targets (B, n); weight (B) or null.
//
// A warp takes a row, its lanes every 32nd column; a block of 8 warps takes every gridDim-th group of 8 rows. The batch's loss is
// summed by `grid_sum`; the last block divides by B and writes it.
//
// Variants: REAL (float or double) of sums, OPERAND of da. 256 threads.
#include "output_rows.cuh"

// A row of any length, spread over the lanes of a warp.
struct WarpRow {
  const REAL* a;
  int n;
  OPERAND* da;  // null: only the loss is wanted
  REAL weight, divisor;

  template <typename Body>
  DEVICE void each(Body body) const {
    for (int j = threadIdx.x % 32; j < n; j += 32) body(j, a[j]);
  }

  // A lane adds 64 of its columns at a time.
  template <typename Term>
  DEVICE REAL sum(Term term) const {
    REAL total = 0;
    for (int first = threadIdx.x % 32; first < n; first += 32 * 64) {
      REAL sum = 0;
      for (int j = first; j < min(n, first + 32 * 64); j += 32) sum += term(j, a[j]);
      total += sum;
    }
    return warp_sum(total);
  }

  DEVICE REAL largest() const {
    REAL most = a[threadIdx.x % 32 < n ? threadIdx.x % 32 : 0];
    for (int j = threadIdx.x % 32; j < n; j += 32) most = a[j] > most || a[j] != a[j] ? a[j] : most;
    return warp_max(most);
  }

  DEVICE REAL at(int j) const { return a[j]; }

  DEVICE void store(int j, REAL gradient) const {
    if (da) narrow(gradient * weight / divisor, da[j]);
  }
};

KERNEL __launch_bounds__(256, 2) loss_rows(const REAL* a_bj, int a_pitch, const int64* labels_b, const REAL* targets_bj,
                                        const REAL* weight_b, OPERAND* da_bj, int da_pitch, REAL* mean_loss, int n_batch,
                                        int n, int loss, int output, REAL divisor, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[1] = {0};
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const WarpRow row = {a_bj + (int64)b * a_pitch, n, da_bj ? da_bj + (int64)b * da_pitch : nullptr,
                         weight_b ? weight_b[b] : REAL(1), divisor};
    const REAL value = loss_and_delta(row, loss, output, labels_b ? labels_b + b : nullptr, targets_bj + (int64)b * n);
    if (threadIdx.x % 32 == 0) sums[0] += (double)(value * row.weight);
  }
  if (grid_sum(sums, (double*)memory, partials, arrivals)) *mean_loss = (REAL)(sums[0] / n_batch);
}

// y^ = O(a): (B, n) of sums, row by row with a pitch each.
KERNEL __launch_bounds__(256, 2) output_rows(const REAL* a_bj, int a_pitch, REAL* out_bj, int out_pitch, int n_batch, int n,
                                          int output) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8) {
    const WarpRow row = {a_bj + (int64)b * a_pitch, n, nullptr, 1, 1};
    REAL* out = out_bj + (int64)b * out_pitch;
    apply_output_function<REAL>(row, output, [=](int j, REAL value) { out[j] = value; });
  }
}
