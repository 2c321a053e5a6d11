// One step of an optimizer over flat theta, in two launches.
//
//     begin_step   decides whether a step is made, counts it, and computes the clipping factor
//     sgd, adam    theta <- the optimizer's step with factor * gradient (optimizer_formulas.cuh)
//
// `begin_step` reads the loss and the gradient. If one of them is not finite, theta and the optimizer's state stay as
// they are. Without a loss every step is made. The decision stays on the device, in `state`, so that the host never has
// to wait.
//
// All three read hyper-parameters from memory, where `set_hyper_parameters` writes them when they change.
// `mean_of_blocks` comes before them where a batch goes through the network in micro-batches: it makes one loss of
// theirs.
//
// Shapes: theta, gradient and states (n), contiguous. A thread takes 16 bytes at a time, then those of gridDim blocks
// later. Sums over the gradient end in `grid_sum`, whose barriers are the only ones. With n = 2^20 in float: 1024
// blocks, 4 numbers a thread.
//
// Variants: Accum (float or double). 256 threads.
#include "../common/block_sum.cuh"
#include "../common/optimizer_formulas.cuh"

// hyper <- the hyper-parameters, in the order of optimizer_formulas.cuh. One block.
KERNEL __launch_bounds__(256) set_hyper_parameters(
    double learning_rate, double weight_decay, double momentum, double nesterov, double beta_1, double beta_2,
    double eps, double decoupled, double clip_norm, double stop_after_nonfinite,
    double* hyper) {
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
  hyper[STOP_AFTER_NONFINITE] = stop_after_nonfinite;
}

// mean = sum_i rows_i means[i] / n_batch, where every block but the last has `rows` rows. In double and in index order.
// The products are exact for Accum = float, so that no contraction could change a bit. One thread: n_blocks is small.
KERNEL __launch_bounds__(256) mean_of_blocks(const Accum* means, int n_blocks, int rows, int n_batch, Accum* mean) {
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int i = 0; i < n_blocks; ++i) sum += (double)means[i] * min(rows, n_batch - i * rows);
  *mean = (Accum)(sum / n_batch);
}

// Adds the squares of this block's part of the numbers that count; see `each_number`.
DEVICE void sum_squares(double (&sums)[3], const Accum* x, int64 n, const int64* spans, int n_spans) {
  each_number(n, spans, n_spans, [&](int64 i) { add_square(sums, x[i]); });
}

//   spans  the numbers of the gradient that are not frozen; see `each_number`
//   norm   of the gradient if it is known, infinite if a double cannot hold it; null: it is computed here.
KERNEL __launch_bounds__(256) begin_step(const Accum* gradient, int64 n, const int64* spans, int n_spans,
                                         const Accum* loss, const double* norm, const double* hyper, double* state,
                                         double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[3] = {0, 0, 0};
  sum_squares(sums, gradient, n, spans, n_spans);
  if (!grid_sum(sums, (double*)memory, partials, arrivals)) return;
  const bool finite = !loss || (is_finite(*loss) && is_finite(sums[0]) && is_finite(sums[1]));
  const double clip_norm = hyper[CLIP_NORM];
  const bool made = record_step(state, finite, hyper[STOP_AFTER_NONFINITE] != 0, hyper[BETA_1], hyper[BETA_2]);
  if (!made || !(clip_norm > 0)) return;
  if (norm && is_finite(*norm))
    set_factor_for(state, *norm, clip_norm);
  else
    set_factor_for(state, sums, clip_norm);
}

// result = sqrt(sum_i x_i^2); NaN or infinity if one of them is.
KERNEL __launch_bounds__(256) vector_norm(
    const Accum* x, int64 n, double* result, double* partials, unsigned* arrivals) {
  SHARED_MEMORY(memory);
  double sums[3] = {0, 0, 0};
  sum_squares(sums, x, n, nullptr, 0);
  if (!grid_sum(sums, (double*)memory, partials, arrivals)) return;
  const double scale = 0x1p600;
  if (sums[1] > 0)
    *result = sqrt(sums[1] + sums[0] / scale / scale) * scale;
  else if (sums[0] > 0)
    *result = sqrt(sums[0]);
  else
    *result = sums[0] + sqrt(sums[2]) / scale;
}

const int WIDTH = Pack<Accum>::count;
typedef Group<Accum, WIDTH> Some;

// What an optimizer keeps for each number of theta, and its step with the numbers of a group or with one of them.
struct SgdPass {
  Accum *theta, *velocity;
  const Accum* gradient;
  bool aligned;  // theta and the state are
  Scale<Accum> scale;

  DEVICE void group(const Sgd<Accum>& step, int64 i, int valid) const {
    Some thetas = load_group<WIDTH>(theta + i, valid, true);
    const Some given = load_group<WIDTH>(gradient + i, valid, aligned);
    Some velocities = velocity ? load_group<WIDTH>(velocity + i, valid, true) : Some();
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) step(thetas.at[j], velocity ? &velocities.at[j] : nullptr, scale(given.at[j]));
    if (velocity) store_group(velocity + i, velocities, valid, true);
    store_group(theta + i, thetas, valid, true);
  }

  DEVICE void one(const Sgd<Accum>& step, int64 i) const {
    step(theta[i], velocity ? velocity + i : nullptr, scale(gradient[i]));
  }
};

struct AdamPass {
  Accum *theta, *first_moment, *second_moment;
  const Accum* gradient;
  bool aligned;
  Scale<Accum> scale;

  DEVICE void group(const Adam<Accum>& step, int64 i, int valid) const {
    Some thetas = load_group<WIDTH>(theta + i, valid, true);
    Some firsts = load_group<WIDTH>(first_moment + i, valid, true);
    Some seconds = load_group<WIDTH>(second_moment + i, valid, true);
    const Some given = load_group<WIDTH>(gradient + i, valid, aligned);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) step(thetas.at[j], firsts.at[j], seconds.at[j], scale(given.at[j]));
    store_group(first_moment + i, firsts, valid, true);
    store_group(second_moment + i, seconds, valid, true);
    store_group(theta + i, thetas, valid, true);
  }

  DEVICE void one(const Adam<Accum>& step, int64 i) const {
    step(theta[i], first_moment[i], second_moment[i], scale(gradient[i]));
  }
};

// Makes the same step everywhere.
template <typename Pass, typename Step>
DEVICE void everywhere(const Pass& pass, const Step& step, int64 n) {
  for (int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * WIDTH; i < n; i += (int64)gridDim.x * 256 * WIDTH)
    pass.group(step, i, (int)min(n - i, (int64)WIDTH));
}

// Makes the step of each range of theta. A thread goes through the ranges once. A group that lies in one range goes as
// it does without ranges, others number by number.
//   ends         (n_ranges) the index after each range's last number
//   factors      (n_ranges, 2) the multiplier of the learning rate, negative for a frozen range, and that of the decay
//   make_step    a function of two such factors
template <typename Pass, typename MakeStep>
DEVICE void range_by_range(const Pass& pass, MakeStep make_step, int64 n, const int64* ends, const double* factors) {
  int range = 0;
  int64 end = ends[0];
  double multiplier = factors[0];
  auto step = make_step(multiplier, factors[1]);
  for (int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * WIDTH; i < n; i += (int64)gridDim.x * 256 * WIDTH) {
    const int64 after = min(i + WIDTH, n);
    for (int64 at = i; at < after;) {
      if (at >= end) {
        do end = ends[++range];
        while (at >= end);
        multiplier = factors[2 * range];
        step = make_step(multiplier, factors[2 * range + 1]);
      }
      const bool together = at == i && after <= end;
      if (multiplier >= 0) {
        if (together)
          pass.group(step, i, (int)(after - i));
        else
          pass.one(step, at);
      }
      at = together ? after : at + 1;
    }
  }
}

KERNEL __launch_bounds__(256) sgd(Accum* theta, Accum* velocity, const Accum* gradient, int64 n, const double* hyper,
                                  const double* state) {
  if (state[APPLY] == 0) return;
  const SgdPass pass = {theta, velocity, gradient, (uint64)gradient % 16 == 0, Scale<Accum>(state)};
  everywhere(pass, Sgd<Accum>(hyper[LEARNING_RATE], hyper[MOMENTUM], hyper[NESTEROV] != 0, hyper[WEIGHT_DECAY]), n);
}

KERNEL __launch_bounds__(256) adam(
    Accum* theta, Accum* first_moment, Accum* second_moment, const Accum* gradient, int64 n, const double* hyper,
    const double* state) {
  if (state[APPLY] == 0) return;
  const AdamPass pass = {theta, first_moment, second_moment, gradient, (uint64)gradient % 16 == 0, Scale<Accum>(state)};
  const Adam<Accum> step(hyper[LEARNING_RATE], hyper[BETA_1], hyper[BETA_2], hyper[EPS], hyper[WEIGHT_DECAY],
                        hyper[DECOUPLED] != 0, state[BETA_POWER_1], state[BETA_POWER_2]);
  everywhere(pass, step, n);
}

KERNEL __launch_bounds__(256) sgd_in_ranges(
    Accum* theta, Accum* velocity, const Accum* gradient, int64 n, const double* hyper, const double* state,
    const int64* ends, const double* factors) {
  if (state[APPLY] == 0) return;
  const SgdPass pass = {theta, velocity, gradient, (uint64)gradient % 16 == 0, Scale<Accum>(state)};
  const auto make_step = [&](Double multiplier, Double decay) {
    return Sgd<Accum>((multiplier * hyper[LEARNING_RATE]).value, hyper[MOMENTUM], hyper[NESTEROV] != 0,
                      (decay * hyper[WEIGHT_DECAY]).value);
  };
  range_by_range(pass, make_step, n, ends, factors);
}

KERNEL __launch_bounds__(256) adam_in_ranges(
    Accum* theta, Accum* first_moment, Accum* second_moment, const Accum* gradient, int64 n, const double* hyper,
    const double* state, const int64* ends, const double* factors) {
  if (state[APPLY] == 0) return;
  const AdamPass pass = {theta, first_moment, second_moment, gradient, (uint64)gradient % 16 == 0, Scale<Accum>(state)};
  const auto make_step = [&](Double multiplier, Double decay) {
    return Adam<Accum>((multiplier * hyper[LEARNING_RATE]).value, hyper[BETA_1], hyper[BETA_2], hyper[EPS],
                       (decay * hyper[WEIGHT_DECAY]).value, hyper[DECOUPLED] != 0, state[BETA_POWER_1],
                       state[BETA_POWER_2]);
  };
  range_by_range(pass, make_step, n, ends, factors);
}
