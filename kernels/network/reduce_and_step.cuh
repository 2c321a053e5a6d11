// From the partial results of all splits to dW, db and the optimizer's step, in the launch that computes them.
//
// The last warp to arrive with its fragment of a layer's dW adds them up (common/split_k.cuh) and makes the optimizer's
// step with the totals. Blocks begin at different layers, so that this work spreads over all of them.
//
// Whether loss and gradient are finite must be known before the first step. So before a block arrives anywhere, it
// records the largest magnitude of its numbers. If one is not finite, neither is the gradient. If so many numbers of
// that size cannot add up to infinity, the gradient is finite. In between, totals are kept as the gradient until the
// last of them is known.
#pragma once
#include "../common/block_sum.cuh"
#include "../common/optimizer_formulas.cuh"
#include "../common/split_k.cuh"
#include "weight_gradients.cuh"

// KEEP_GRADIENT: no step. DECIDE: the gradient is kept and the step is decided, for a launch that clips.
enum OptimizerKind { KEEP_GRADIENT = 0, DECIDE = 1, SGD = 2, ADAM = 3 };

// How the totals are used.
struct Update {
  int optimizer;
  float* theta;
  int n_parameters;
  float* first;         // velocity or null, or first moment
  float* second;        // second moment
  const double* hyper;  // see HyperParameter in optimizer_formulas.cuh
  double* state;        // see State there
  float* gradient;
  int accumulate;
  float factor;
};

// The largest magnitudes that blocks record before they arrive anywhere, as a float's bits.
enum Largest { OF_SUMS = 0, OF_INPUTS = 1, OF_LOSSES = 2, LARGEST_COUNT = 3 };

// Results that the blocks of a launch share, in global memory. A fragment is a warp's part of a layer's dW.
struct GridResults {
  float* partials;     // (splits, layers, warps, numbers of a fragment)
  double* losses;      // (loss_count): sums of the splits
  double* squares;     // (layers, warps): of the gradient, where it is kept; 0 for a fragment that is not used
  // All 0 between steps: finished fragments, largest magnitudes, then (layers, warps, groups + 1) arrivals.
  unsigned* counters;
  Splits splits;
  int loss_count;
  int fragments;       // that are used
  double terms;        // a total is at most OF_SUMS times OF_INPUTS times this

  DEVICE unsigned* finished() const { return counters; }
  DEVICE unsigned* largest(int which) const { return counters + 1 + which; }
  DEVICE unsigned* arrivals(int fragment) const {
    return counters + 1 + LARGEST_COUNT + fragment * (split_groups(splits) + 1);
  }
};

// Called by whole warps.
DEVICE void record_largest(const GridResults& results, Largest which, unsigned magnitude) {
  magnitude = warp_combined(magnitude, Larger());
  if (threadIdx.x % 32 == 0) atomicMax(results.largest(which), magnitude);
}

// Writes a lane's numbers of dW and db as its partial result, and returns the largest magnitude among them.
template <int WIDTH>
DEVICE unsigned write_partial(const typename WeightFragment<WIDTH>::Sums& dw, const BiasSums& db, const Layer& layer,
                              float* to) {
  typedef WeightFragment<WIDTH> P;
  float sums[P::COUNT];
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < P::COUNT; ++i) {
    const int r = (int)(threadIdx.x % 32) + 32 * (i - P::PER_LANE), o = P::o0() + r;
    if (i < P::PER_LANE)
      sums[i] = dw[i / 4 / P::FRAGMENTS_I][i / 4 % P::FRAGMENTS_I][i % 4];
    else
      sums[i] = r < P::ROWS && o < layer.n_out && P::i0() == 0 ? P::total(db, o) : 0.0f;
    most = max(most, magnitude(sums[i]));
  }
  store_partial(sums, P::packs(layer), to);
  return most;
}

// Whether loss and gradient are finite, as far as it is known before all totals are.
enum Finiteness { FINITE, NOT_FINITE, UNKNOWN };

// Called by whole warps, once all splits have recorded their largest magnitudes. A total of finite numbers is finite if
// so many of the largest are, and if none of them becomes infinite as it is rounded to TF32.
DEVICE Finiteness finiteness(const GridResults& results) {
  const int lane = threadIdx.x % 32;
  unsigned bits = 0;
  if (lane < LARGEST_COUNT) bits = atomicMax(results.largest(lane), 0u);
  if (__any_sync(0xffffffffu, bits >= 0x7f800000u)) return NOT_FINITE;
  const double value = __uint_as_float(bits), most = 1.5e38;
  const double of_sums = __shfl_sync(0xffffffffu, value, OF_SUMS);
  const double of_inputs = __shfl_sync(0xffffffffu, value, OF_INPUTS);
  const double of_losses = __shfl_sync(0xffffffffu, value, OF_LOSSES);
  const bool finite = of_sums * of_inputs * results.terms < most && of_inputs < most &&
                      of_losses * results.loss_count < most;
  return finite ? FINITE : UNKNOWN;
}

// A total is kept as the gradient, makes a step, or is left.
enum Decision { KEEP, STEP, NO_STEP };

DEVICE Decision decide(const Update& update, Finiteness known) {
  if (update.optimizer < SGD || known == UNKNOWN) return KEEP;
  return applies(update.state, known == FINITE, update.hyper[STOP_AFTER_NONFINITE] != 0) ? STEP : NO_STEP;
}

// The optimizer's step with numbers of theta.
struct Stepper {
  const Update& update;
  Sgd<float> sgd;
  Adam<float> adam;

  explicit DEVICE Stepper(const Update& update)
      : update(update),
        sgd(update.hyper[LEARNING_RATE], update.hyper[MOMENTUM], (int)update.hyper[NESTEROV],
            update.hyper[WEIGHT_DECAY]),
        adam(update.hyper[LEARNING_RATE], update.hyper[BETA_1], update.hyper[BETA_2], update.hyper[EPS],
             update.hyper[WEIGHT_DECAY], (int)update.hyper[DECOUPLED],
             update.state[BETA_POWER_1] * update.hyper[BETA_1], update.state[BETA_POWER_2] * update.hyper[BETA_2]) {}

  DEVICE void operator()(int i, float gradient) const {
    if (update.optimizer == SGD)
      sgd(update.theta[i], update.first ? update.first + i : nullptr, gradient);
    else
      adam(update.theta[i], update.first[i], update.second[i], gradient);
  }
};

DEVICE float mean_of_losses(const GridResults& results, int n_batch) {
  double sum = 0;
  for (int i = threadIdx.x % 32; i < results.loss_count; i += 32) sum += load_cg(results.losses + i);
  return (float)(warp_sum(sum) / n_batch);
}

// Called by the one warp that has finished the last fragment: writes the loss, and completes the step. `slots`:
// fragments that all layers could have.
DEVICE void finish_step(int slots, const Update& update, const GridResults& results, int n_batch, float* mean_loss) {
  const int lane = threadIdx.x % 32;
  const Finiteness known = finiteness(results);
  const float loss = mean_of_losses(results, n_batch);
  double squares[3] = {0, 0, 0};
  bool finite = known == FINITE;
  if (decide(update, known) == KEEP) {
    for (int i = lane; i < slots; i += 32) squares[0] += load_cg(results.squares + i);
    squares[0] = warp_sum(squares[0]);
    // A float's square is finite as a double, and so is a sum of them.
    finite = is_finite(squares[0]) && is_finite(loss);
    if (update.optimizer >= SGD && applies(update.state, finite, update.hyper[STOP_AFTER_NONFINITE] != 0)) {
      const Stepper step(update);
      for (int i = lane; i < update.n_parameters; i += 32) step(i, load_cg(update.gradient + i));
    }
  }
  __syncwarp();  // the state is read
  if (lane > 0) return;
  *mean_loss = loss;
  for (int i = 0; i <= LARGEST_COUNT; ++i) atomicExch(results.counters + i, 0u);  // ready for the next launch
  if (update.optimizer == KEEP_GRADIENT) return;
  const double* hyper = update.hyper;
  if (record_step(update.state, finite, hyper[STOP_AFTER_NONFINITE] != 0, hyper[BETA_1], hyper[BETA_2]) &&
      hyper[CLIP_NORM] > 0)
    set_factor_for(update.state, squares, hyper[CLIP_NORM]);
}

// Joins a fragment of layer k's dW and db, whose partial result of this split is published. The last warp to arrive
// adds up and uses the totals. A Fragment has SIZE numbers for a warp's lanes, and a layer has SLOTS of them, of which
// this is one; at_place(layer, index, body) calls body(the place of this lane's number among the layer's parameters), if
// it has one.
template <typename Fragment>
DEVICE void finish_fragment(const Fragment& own, const Network& net, int k, int split, const Update& update,
                            const GridResults& results, Pack<float>* buffer, int n_batch, float* mean_loss) {
  const int PREFETCH = Fragment::PREFETCH, slots = net.layers * Fragment::SLOTS;
  const Layer& layer = net[k];
  const int fragment = k * Fragment::SLOTS + own.slot(), packs = own.packs(layer);
  float* partials = results.partials + (int64)fragment * Fragment::SIZE;
  const int64 stride = (int64)slots * Fragment::SIZE;
  unsigned* arrivals = results.arrivals(fragment);
  const LastSum<float> last = join_splits<PREFETCH>(partials, stride, packs, arrivals, results.splits, split, buffer);
  if (!last.count) return;

  const auto each_total = [&](auto body) {  // body(its place in theta, a number of the gradient)
    write_totals<PREFETCH>(last, packs, buffer, [&](int index, float sum) {
      own.at_place(layer, index, [&](int at) { body(layer.theta + at, sum * update.factor); });
    });
  };
  const Decision decision = decide(update, finiteness(results));
  double squares = 0;
  if (decision == STEP) {
    const Stepper step(update);
    each_total([&](int i, float gradient) { step(i, gradient); });
  } else if (decision == KEEP) {
    each_total([&](int i, float gradient) {
      update.gradient[i] = (update.accumulate ? update.gradient[i] : 0.0f) + gradient;
      squares += (double)gradient * gradient;
    });
  }
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) results.squares[fragment] = squares;
  publish();
  if (arrive_last(results.finished(), results.fragments)) finish_step(slots, update, results, n_batch, mean_loss);
}

// Records the sum of a split's losses. Warp 0.
DEVICE void record_losses(const Network& net, const GridResults& results, int split, int n_batch) {
  const double sum = warp_sum(net.loss_sums()[threadIdx.x]);
  if (threadIdx.x > 0) return;
  results.losses[split] = sum;
  const double mean = fabs(sum) / n_batch, most = 3.4e38;
  // A sum beyond float's range may still cancel against another.
  atomicMax(results.largest(OF_LOSSES), magnitude(is_finite(mean) && mean > most ? (float)most : (float)mean));
}

// A warp's circular buffer, through which partial results come.
template <typename Fragment>
DEVICE Pack<float>* prefetch_buffer(void* memory) {
  return (Pack<float>*)memory + warp_index() * Fragment::PREFETCH * 32;
}
