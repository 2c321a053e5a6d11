// One step of an optimizer over flat theta, in two launches.
//
// `begin_step` reads the loss and the gradient and decides: if one of them is not finite, theta and the optimizer's state stay as
// they are. Else it counts the step and works out by what the gradient is multiplied to bring its norm down to clip_norm. What it
// decides stays on the device, in `state`, so that the host never has to wait. Without a loss every step is made.
//
// `sgd` and `adam` then pass once over theta, its gradient and the optimizer's state, 16 bytes a thread at a time (update.cuh).
// All three read hyper-parameters from memory, where `set_hyper_parameters` puts them when they change.
//
// `mean_of_blocks` comes before them where a batch goes through the network in blocks: it makes one loss of the blocks'.
//
// `scale_weights`, `unscale` and `settle_scale` are a dynamic loss scale: a power of two that is put into the samples' weights, taken
// out of gradient and loss before `begin_step`, and settled after it by whether there was a step (gpuback/_backends/numpy/updates.py).
//
// Variants: REAL (float or double). 256 threads.
#include "block_sum.cuh"
#include "update.cuh"

// hyper <- the hyper-parameters, in the order of update.cuh. One block.
KERNEL __launch_bounds__(256) set_hyper_parameters(double learning_rate, double weight_decay, double momentum, double nesterov,
                                                   double beta_1, double beta_2, double eps, double decoupled,
                                                   double clip_norm, double halt, double* hyper) {
  if (threadIdx.x != 0) return;
  hyper[LEARNING_RATE] = learning_rate;
  hyper[WEIGHT_DECAY] = weight_decay;
  hyper[MOMENTUM] = momentum;
  hyper[NESTEROV] = nesterov;
  hyper[BETA_1] = beta_1;
  hyper[BETA_2] = beta_2;
  hyper[EPS] = eps;
  hyper[DECOUPLED] = decoupled;
  hyper[CLIP_NORM] = clip_norm;
  hyper[HALT] = halt;
}

// mean = the mean over n_batch rows, of which each block but the last has so many: sum_i rows_i means[i] / n_batch, in double and in
// index order. The products are exact for REAL = float, so that no contraction could change a bit. One thread: n_blocks is small
// beside what the blocks took.
KERNEL __launch_bounds__(256) mean_of_blocks(const REAL* means, int n_blocks, int rows, int n_batch, REAL* mean) {
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int i = 0; i < n_blocks; ++i) sum += (double)means[i] * min(rows, n_batch - i * rows);
  *mean = (REAL)(sum / n_batch);
}

enum Scaling { LOSS_SCALE = 0, GOOD_STEPS = 1, SKIPPED = 2 };

// out = weight times the scale, or the scale itself where there are no weights.
KERNEL __launch_bounds__(256) scale_weights(const REAL* weight_b, int64 n_batch, const double* scaling, REAL* out_b) {
  const REAL scale = (REAL)scaling[LOSS_SCALE];
  for (int64 b = (int64)blockIdx.x * 256 + threadIdx.x; b < n_batch; b += (int64)gridDim.x * 256)
    out_b[b] = weight_b ? weight_b[b] * scale : scale;
}

// gradient /= scale, unscaled_loss = loss / scale: powers of two.
KERNEL __launch_bounds__(256) unscale(REAL* gradient, int64 n, const REAL* loss, REAL* unscaled_loss, const double* scaling) {
  const REAL factor = (REAL)(1 / scaling[LOSS_SCALE]);
  for (int64 i = (int64)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64)gridDim.x * 256) gradient[i] *= factor;
  if (blockIdx.x == 0 && threadIdx.x == 0) *unscaled_loss = *loss * factor;
}

// Half the scale after no step, twice the scale after so many in a row. One block.
KERNEL __launch_bounds__(256) settle_scale(const double* state, double growth_interval, double* scaling) {
  if (threadIdx.x != 0) return;
  const double scale = scaling[LOSS_SCALE], good_steps = scaling[GOOD_STEPS] + 1;
  if (state[APPLY] == 0) {
    scaling[LOSS_SCALE] = max(scale * 0.5, 0x1p-24);
    scaling[GOOD_STEPS] = 0;
    scaling[SKIPPED] += 1;
  } else if (good_steps < growth_interval) {
    scaling[GOOD_STEPS] = good_steps;
  } else {
    scaling[LOSS_SCALE] = min(scale * 2, 0x1p24);
    scaling[GOOD_STEPS] = 0;
  }
}

// The sums of squares of what this block reads of n numbers.
DEVICE void sum_squares(double (&sums)[3], const REAL* x, int64 n) {
  for (int64 i = (int64)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64)gridDim.x * 256) add_square(sums, x[i]);
}

//   norm  the gradient's, where it is known; null: it is found here. Infinite is what a double cannot hold of it.
KERNEL __launch_bounds__(256) begin_step(const REAL* gradient, int64 n, const REAL* loss, const double* norm,
                                         const double* hyper, double* state, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[3] = {0, 0, 0};
  sum_squares(sums, gradient, n);
  if (!grid_sum(sums, (double*)memory, partials, arrivals)) return;
  const bool finite = !loss || (is_finite(*loss) && is_finite(sums[0]) && is_finite(sums[1]));
  const double clip_norm = hyper[CLIP_NORM];
  if (!note_step(state, finite, hyper[HALT] != 0, hyper[BETA_1], hyper[BETA_2]) || !(clip_norm > 0)) return;
  if (norm && is_finite(*norm))
    set_factor_for(state, *norm, clip_norm);
  else
    set_factor_for(state, sums, clip_norm);
}

// The root of the sum of squares of n numbers; NaN or infinity where one of them is.
KERNEL __launch_bounds__(256) vector_norm(const REAL* x, int64 n, double* result, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[3] = {0, 0, 0};
  sum_squares(sums, x, n);
  if (!grid_sum(sums, (double*)memory, partials, arrivals)) return;
  const double scale = 0x1p600;
  if (sums[1] > 0)
    *result = sqrt(sums[1] + sums[0] / scale / scale) * scale;
  else if (sums[0] > 0)
    *result = sqrt(sums[0]);
  else
    *result = sums[0] + sqrt(sums[2]) / scale;
}

const int WIDTH = Pack<REAL>::count;
typedef Group<REAL, WIDTH> Some;

KERNEL __launch_bounds__(256) sgd(REAL* theta, REAL* velocity, const REAL* gradient, int64 n, const double* hyper,
                                  const double* state) {
  if (state[APPLY] == 0) return;
  const Scale<REAL> scale(state);
  const Sgd<REAL> step(hyper[LEARNING_RATE], hyper[MOMENTUM], hyper[NESTEROV] != 0, hyper[WEIGHT_DECAY]);
  const bool aligned = (uint64)gradient % 16 == 0;
  for (int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * WIDTH; i < n; i += (int64)gridDim.x * 256 * WIDTH) {
    const int valid = (int)min(n - i, (int64)WIDTH);
    Some thetas = load_group<WIDTH>(theta + i, valid, true);
    const Some given = load_group<WIDTH>(gradient + i, valid, aligned);
    Some velocities = velocity ? load_group<WIDTH>(velocity + i, valid, true) : Some();
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) step(thetas.at[j], velocity ? &velocities.at[j] : nullptr, scale(given.at[j]));
    if (velocity) store_group(velocity + i, velocities, valid, true);
    store_group(theta + i, thetas, valid, true);
  }
}

KERNEL __launch_bounds__(256) adam(REAL* theta, REAL* first_moment, REAL* second_moment, const REAL* gradient, int64 n,
                                   const double* hyper, const double* state) {
  if (state[APPLY] == 0) return;
  const Scale<REAL> scale(state);
  const Adam<REAL> step(hyper[LEARNING_RATE], hyper[BETA_1], hyper[BETA_2], hyper[EPS], hyper[WEIGHT_DECAY],
                        hyper[DECOUPLED] != 0, state[BETA_POWER_1], state[BETA_POWER_2]);
  const bool aligned = (uint64)gradient % 16 == 0;
  for (int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * WIDTH; i < n; i += (int64)gridDim.x * 256 * WIDTH) {
    const int valid = (int)min(n - i, (int64)WIDTH);
    Some thetas = load_group<WIDTH>(theta + i, valid, true), firsts = load_group<WIDTH>(first_moment + i, valid, true);
    Some seconds = load_group<WIDTH>(second_moment + i, valid, true);
    const Some given = load_group<WIDTH>(gradient + i, valid, aligned);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) step(thetas.at[j], firsts.at[j], seconds.at[j], scale(given.at[j]));
    store_group(first_moment + i, firsts, valid, true);
    store_group(second_moment + i, seconds, valid, true);
    store_group(theta + i, thetas, valid, true);
  }
}
