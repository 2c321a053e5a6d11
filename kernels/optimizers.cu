// One step of an optimizer over flat theta, in two launches.
//
// `begin_step` reads the loss and the gradient and decides: if one of them is not finite, theta and the optimizer's state stay as
// they are. Else it counts the step and works out by what the gradient is multiplied to bring its norm down to clip_norm. What it
// decides stays on the device, in `state`, so that the host never has to wait. Without a loss every step is made.
enum State {
  STEPS = 0,        // updates made so far
  DIVERGED_AT = 1,  // how many there were when a loss or gradient was first not finite; -1: never
  APPLY = 2,        // 1 if this step makes an update
  PRESCALE = 3,     // what the gradient is multiplied by, in two parts: together they may be too small for a double
  FACTOR = 4,
  BETA_POWER_1 = 5, BETA_POWER_2 = 6  // Adam's beta^t
};
// `sgd` and `adam` then pass once over theta, its gradient and the optimizer's state, 16 bytes a thread at a time.
//
// Variants: REAL (float or double). 256 threads.
#include "block_sum.cuh"

// Squares of doubles that lie beyond 2^500 or below 2^-500 are summed apart, scaled, so that none overflows or vanishes.
DEVICE void add_square(double (&sums)[3], float x) { sums[0] += (double)x * x; }
DEVICE void add_square(double (&sums)[3], double x) {
  const double size = fabs(x), huge = 0x1p500, scale = 0x1p600;
  if (size > huge)
    sums[1] += (x / scale) * (x / scale);
  else if (size < 1 / huge)
    sums[2] += (x * scale) * (x * scale);
  else
    sums[0] += x * x;
}

// By what to multiply the gradient for its norm, that of the three sums, to be at most clip_norm.
DEVICE void set_factor(double* state, const double (&sums)[3], double clip_norm) {
  const double scale = 0x1p600;
  double factor;
  if (sums[1] > 0) {
    const double scaled_norm = sqrt(sums[1] + sums[0] / scale / scale);
    state[PRESCALE] = 1 / scale;
    state[FACTOR] = clip_norm / scaled_norm < scale ? clip_norm / scaled_norm : scale;
    return;
  }
  if (sums[0] > 0)
    factor = clip_norm / (sqrt(sums[0]) + 1e-6);
  else
    factor = clip_norm / (sqrt(sums[2]) / scale + 1e-6);
  state[FACTOR] = factor < 1 ? factor : 1;
}

// The sums of squares of what this block reads of n numbers.
DEVICE void sum_squares(double (&sums)[3], const REAL* x, int64 n) {
  for (int64 i = (int64)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64)gridDim.x * 256) add_square(sums, x[i]);
}

KERNEL __launch_bounds__(256) begin_step(const REAL* gradient, int64 n, const REAL* loss, double clip_norm, double beta_1,
                                         double beta_2, int halt, double* state, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[3] = {0, 0, 0};
  sum_squares(sums, gradient, n);
  if (!grid_sum(sums, (double*)memory, partials, arrivals)) return;
  const bool finite = !loss || (is_finite(*loss) && is_finite(sums[0]) && is_finite(sums[1]));
  if (!finite && state[DIVERGED_AT] < 0) state[DIVERGED_AT] = state[STEPS];
  state[APPLY] = finite && !(halt && state[DIVERGED_AT] >= 0);
  if (state[APPLY] == 0) return;
  state[PRESCALE] = state[FACTOR] = 1;
  if (clip_norm > 0) set_factor(state, sums, clip_norm);
  state[STEPS] += 1;
  state[BETA_POWER_1] *= beta_1;
  state[BETA_POWER_2] *= beta_2;
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

// v <- momentum v + g, theta <- theta - learning_rate (v, or g + momentum v with Nesterov, or g without momentum), with
// g = factor gradient + weight_decay theta.
KERNEL __launch_bounds__(256) sgd(REAL* theta, REAL* velocity, const REAL* gradient, int64 n, double learning_rate,
                                  double momentum, int nesterov, double weight_decay, const double* state) {
  if (state[APPLY] == 0) return;
  const double prescale = state[PRESCALE], factor = state[FACTOR];
  const REAL rate = (REAL)learning_rate, keep = (REAL)momentum, decay = (REAL)weight_decay;
  const bool aligned = (uint64)gradient % 16 == 0;
  for (int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * WIDTH; i < n; i += (int64)gridDim.x * 256 * WIDTH) {
    const int valid = (int)min(n - i, (int64)WIDTH);
    Some t = load_group<WIDTH>(theta + i, valid, true);
    const Some given = load_group<WIDTH>(gradient + i, valid, aligned);
    Some v = velocity ? load_group<WIDTH>(velocity + i, valid, true) : Some();
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      REAL g = (REAL)(given.at[j] * prescale * factor) + decay * t.at[j];
      if (velocity) {
        v.at[j] = keep * v.at[j] + g;
        g = nesterov ? g + keep * v.at[j] : v.at[j];
      }
      t.at[j] -= rate * g;
    }
    if (velocity) store_group(velocity + i, v, valid, true);
    store_group(theta + i, t, valid, true);
  }
}

DEVICE float root(float x) { return sqrtf(x); }
DEVICE double root(double x) { return sqrt(x); }

// m <- m + (1 - beta_1)(g - m), v <- beta_2 v + (1 - beta_2) g^2, theta <- theta - (learning_rate / c_1) m / (sqrt(v / c_2) + eps),
// with c = 1 - beta^t and g = factor gradient + weight_decay theta; decoupled, theta is first multiplied by
// 1 - learning_rate weight_decay instead.
KERNEL __launch_bounds__(256) adam(REAL* theta, REAL* first_moment, REAL* second_moment, const REAL* gradient, int64 n,
                                   double learning_rate, double beta_1, double beta_2, double eps, double weight_decay,
                                   int decoupled, const double* state) {
  if (state[APPLY] == 0) return;
  const double prescale = state[PRESCALE], factor = state[FACTOR];
  const REAL rate = (REAL)(learning_rate / (1 - state[BETA_POWER_1]));
  const REAL root_correction = (REAL)sqrt(1 - state[BETA_POWER_2]);
  const REAL gain_1 = (REAL)(1 - beta_1), keep_2 = (REAL)beta_2, gain_2 = (REAL)(1 - beta_2), epsilon = (REAL)eps;
  const REAL decay = decoupled ? REAL(0) : (REAL)weight_decay;
  const REAL shrink = decoupled ? (REAL)(1 - learning_rate * weight_decay) : REAL(1);
  const bool aligned = (uint64)gradient % 16 == 0;
  for (int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * WIDTH; i < n; i += (int64)gridDim.x * 256 * WIDTH) {
    const int valid = (int)min(n - i, (int64)WIDTH);
    Some t = load_group<WIDTH>(theta + i, valid, true), m = load_group<WIDTH>(first_moment + i, valid, true);
    Some v = load_group<WIDTH>(second_moment + i, valid, true);
    const Some given = load_group<WIDTH>(gradient + i, valid, aligned);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      t.at[j] *= shrink;
      const REAL g = (REAL)(given.at[j] * prescale * factor) + decay * t.at[j];
      m.at[j] += gain_1 * (g - m.at[j]);
      v.at[j] = keep_2 * v.at[j] + gain_2 * (g * g);
      t.at[j] -= rate * (m.at[j] / (root(v.at[j]) / root_correction + epsilon));
    }
    store_group(first_moment + i, m, valid, true);
    store_group(second_moment + i, v, valid, true);
    store_group(theta + i, t, valid, true);
  }
}
