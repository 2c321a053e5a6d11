// One step of an optimizer over flat theta, in two launches.
//
// `begin_step` reads the loss and the gradient and decides: if one of them is not finite, theta and the optimizer's state stay as
// they are. Else it counts the step and works out by what the gradient is multiplied to bring its norm down to clip_norm. What it
// decides stays on the device, in `state`, so that the host never has to wait. Without a loss every step is made.
enum State {
  STEPS = 0,        // updates made so far
  DIVERGED_AT = 1,  // how many there were when a loss or gradient was first not finite; -1: never
  APPLY = 2,        // 1 if this step makes an update
  PRESCALES = 3,    // how many times the gradient is multiplied by 2^-100, and then by the factor,
  FACTOR = 4,       // which is not smaller: a float holds it as a normal number
  BETA_POWER_1 = 5, BETA_POWER_2 = 6  // Adam's beta^t
};
// `sgd` and `adam` then pass once over theta, its gradient and the optimizer's state, 16 bytes a thread at a time. Every operation
// rounds by itself, in the sequence of gpuback/ops/numpy_updates.py: from the same gradient and factor come the same bits.
//
// Variants: REAL (float or double). 256 threads.
#include "block_sum.cuh"
#include "rounded.cuh"

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

DEVICE void set_factor(double* state, double factor, int prescales) {
  for (; 0 < factor && factor < 0x1p-100; ++prescales) factor *= 0x1p100;
  state[PRESCALES] = prescales;
  state[FACTOR] = factor;
}

// By what to multiply a gradient of that norm for it to be at most clip_norm.
DEVICE void set_factor_for(double* state, double norm, double clip_norm) {
  const Double factor = Double(clip_norm) / (Double(norm) + 1e-6);
  set_factor(state, factor < 1.0 ? factor.value : 1.0, 0);
}

// The same for the norm that the three sums give, be it larger than any double.
DEVICE void set_factor_for(double* state, const double (&sums)[3], double clip_norm) {
  const double scale = 0x1p600, scaled_norm = sqrt(sums[1] + sums[0] / scale / scale), norm = scaled_norm * scale;
  if (sums[1] == 0) {
    set_factor_for(state, sums[0] > 0 ? sqrt(sums[0]) : sqrt(sums[2]) / scale, clip_norm);
  } else if (is_finite(norm)) {
    set_factor_for(state, norm, clip_norm);
  } else {
    const double factor = clip_norm / (scaled_norm * 0x1p500);
    set_factor(state, factor < 0x1p100 ? factor : 0x1p100, 1);
  }
}

// The sums of squares of what this block reads of n numbers.
DEVICE void sum_squares(double (&sums)[3], const REAL* x, int64 n) {
  for (int64 i = (int64)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64)gridDim.x * 256) add_square(sums, x[i]);
}

//   norm  the gradient's, where it is known; null: it is found here. Infinite is what a double cannot hold of it.
KERNEL __launch_bounds__(256) begin_step(const REAL* gradient, int64 n, const REAL* loss, double clip_norm, const double* norm,
                                         double beta_1, double beta_2, int halt, double* state, double* partials,
                                         unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[3] = {0, 0, 0};
  sum_squares(sums, gradient, n);
  if (!grid_sum(sums, (double*)memory, partials, arrivals)) return;
  const bool finite = !loss || (is_finite(*loss) && is_finite(sums[0]) && is_finite(sums[1]));
  if (!finite && state[DIVERGED_AT] < 0) state[DIVERGED_AT] = state[STEPS];
  state[APPLY] = finite && !(halt && state[DIVERGED_AT] >= 0);
  if (state[APPLY] == 0) return;
  set_factor(state, 1, 0);
  if (clip_norm > 0) {
    if (norm && is_finite(*norm))
      set_factor_for(state, *norm, clip_norm);
    else
      set_factor_for(state, sums, clip_norm);
  }
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
typedef Rounded<REAL> Number;

// What the gradient is multiplied by, as `begin_step` has decided.
struct Scale {
  int prescales;
  REAL factor;

  DEVICE Scale(const double* state) : prescales((int)state[PRESCALES]), factor((REAL)state[FACTOR]) {}

  DEVICE Number operator()(Number g) const {
#pragma unroll 1  // hardly ever even once
    for (int i = 0; i < prescales; ++i) g = g * REAL(0x1p-100);
    return g * factor;
  }
};

// What is stored: of all NaN the one that every backend stores.
DEVICE float settled(Rounded<float> x) { return is_nan(x) ? __uint_as_float(0x7fc00000u) : x.value; }
DEVICE double settled(Rounded<double> x) { return is_nan(x) ? __longlong_as_double(0x7ff8000000000000) : x.value; }

// v <- momentum v + g, theta <- theta - learning_rate (v, or g + momentum v with Nesterov, or g without momentum), with
// g = factor gradient + weight_decay theta. Without weight decay nothing is added, not even 0, which would turn -0 into 0.
KERNEL __launch_bounds__(256) sgd(REAL* theta, REAL* velocity, const REAL* gradient, int64 n, double learning_rate,
                                  double momentum, int nesterov, double weight_decay, const double* state) {
  if (state[APPLY] == 0) return;
  const Scale scale(state);
  const Number rate = (REAL)learning_rate, keep = (REAL)momentum, decay = (REAL)weight_decay;
  const bool decays = decay.value != 0;
  const bool aligned = (uint64)gradient % 16 == 0;
  for (int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * WIDTH; i < n; i += (int64)gridDim.x * 256 * WIDTH) {
    const int valid = (int)min(n - i, (int64)WIDTH);
    Some thetas = load_group<WIDTH>(theta + i, valid, true);
    const Some given = load_group<WIDTH>(gradient + i, valid, aligned);
    Some velocities = velocity ? load_group<WIDTH>(velocity + i, valid, true) : Some();
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const Number t = thetas.at[j];
      Number g = scale(given.at[j]);
      if (decays) g = g + decay * t;
      if (velocity) {
        const Number v = keep * velocities.at[j] + g;
        g = nesterov ? g + keep * v : v;
        velocities.at[j] = settled(v);
      }
      thetas.at[j] = settled(t - rate * g);
    }
    if (velocity) store_group(velocity + i, velocities, valid, true);
    store_group(theta + i, thetas, valid, true);
  }
}

// m <- m + (1 - beta_1)(g - m), v <- beta_2 v + (1 - beta_2) g^2, theta <- theta - (learning_rate / c_1) m / (sqrt(v / c_2) + eps),
// with c = 1 - beta^t and g = factor gradient + weight_decay theta; decoupled, theta is first multiplied by
// 1 - learning_rate weight_decay instead. Numerator and denominator of that quotient are both multiplied by sqrt(c_2).
KERNEL __launch_bounds__(256) adam(REAL* theta, REAL* first_moment, REAL* second_moment, const REAL* gradient, int64 n,
                                   double learning_rate, double beta_1, double beta_2, double eps, double weight_decay,
                                   int decoupled, const double* state) {
  if (state[APPLY] == 0) return;
  const Scale scale(state);
  const Double one = 1.0;
  const Double root_2 = root(one - state[BETA_POWER_2]);
  const Number rate = (REAL)(learning_rate * root_2 / (one - state[BETA_POWER_1])).value;
  const Number gain_1 = (REAL)(one - beta_1).value, gain_2 = (REAL)(one - beta_2).value;
  const Number keep_2 = (REAL)beta_2, epsilon = (REAL)(eps * root_2).value;
  const Number decay = (REAL)weight_decay, shrink = (REAL)(one - Double(learning_rate) * weight_decay).value;
  const bool decays = decay.value != 0;
  const bool aligned = (uint64)gradient % 16 == 0;
  for (int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * WIDTH; i < n; i += (int64)gridDim.x * 256 * WIDTH) {
    const int valid = (int)min(n - i, (int64)WIDTH);
    Some thetas = load_group<WIDTH>(theta + i, valid, true), firsts = load_group<WIDTH>(first_moment + i, valid, true);
    Some seconds = load_group<WIDTH>(second_moment + i, valid, true);
    const Some given = load_group<WIDTH>(gradient + i, valid, aligned);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      Number t = thetas.at[j], g = scale(given.at[j]), m = firsts.at[j], v = seconds.at[j];
      if (decays && decoupled) t = t * shrink;
      if (decays && !decoupled) g = g + decay * t;
      m = m + gain_1 * (g - m);
      v = keep_2 * v + gain_2 * (g * g);
      thetas.at[j] = settled(t - rate * (m / (root(v) + epsilon)));
      firsts.at[j] = settled(m);
      seconds.at[j] = settled(v);
    }
    store_group(first_moment + i, firsts, valid, true);
    store_group(second_moment + i, seconds, valid, true);
    store_group(theta + i, thetas, valid, true);
  }
}
