// What blocks do with the sums of their chains: partial results, totals, and the optimizer's step.
//
// The last warp to arrive with its part of a layer's sums adds them up (split_k.cuh); blocks begin at different layers, so that the work
// spreads over all of them. Whoever has a total makes the optimizer's step with it. Whether there is a step has been settled by then:
// before a block arrives anywhere, it has noted the largest of its numbers. If that many of them cannot add up to infinity, the gradient
// is finite; if one is not finite, neither is the gradient. In between, totals are kept until the last of them is known.
#pragma once
#include "../common/block_sum.cuh"
#include "../common/optimizer_formulas.cuh"
#include "../common/split_k.cuh"
#include "weight_gradients.cuh"

const int DEPTH = 64 / WARPS;  // of the ring through which partial results come

enum OptimizerKind { KEEP_GRADIENT = 0, DECIDE = 1, SGD = 2, ADAM = 3 };  // DECIDE: the gradient is kept, and the step is settled

// What is done with the totals.
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

// What blocks note of their numbers, before they arrive anywhere: the largest magnitudes, as a float's bits.
enum Noted { OF_SUMS = 0, OF_INPUTS = 1, OF_LOSSES = 2, NOTED = 3 };

// What blocks tell each other.
struct Notes {
  float* partials;     // (chains, layers, warps, numbers of a piece)
  double* losses;      // (loss_count): of chains of rows
  double* squares;     // (layers, warps): of the gradient, where it is kept; 0 of what is no piece
  unsigned* counters;  // all 0 between steps: finished pieces, what is noted, then (layers, warps, groups + 1) arrivals
  Chains chains;
  int loss_count;
  int pieces;          // that have anything to add
  double terms;        // no total is larger than this many times what is noted of sums, or of the product of gradients and inputs

  DEVICE unsigned* finished() const { return counters; }
  DEVICE unsigned* noted(int which) const { return counters + 1 + which; }
  DEVICE unsigned* arrivals(int piece) const { return counters + 1 + NOTED + piece * (chain_groups(chains) + 1); }
};

// Called by whole warps.
DEVICE void note(const Notes& notes, Noted which, unsigned magnitude) {
  magnitude = warp_combined(magnitude, Larger());
  if (threadIdx.x % 32 == 0) atomicMax(notes.noted(which), magnitude);
}

// Puts a lane's numbers together, writes them, and returns the largest magnitude among them. Of db there are n_out.
template <int WIDTH>
DEVICE unsigned write_partial(const typename Piece<WIDTH>::Sums& dw, const SumsDb& db, int n_out, float* to) {
  typedef Piece<WIDTH> P;
  float sums[P::COUNT];
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < P::COUNT; ++i) {
    const int r = (int)(threadIdx.x % 32) + 32 * (i - P::HELD), o = P::o0() + r;
    if (i < P::HELD)
      sums[i] = dw[i / 4 / P::FRAGMENTS_I][i / 4 % P::FRAGMENTS_I][i % 4];
    else
      sums[i] = r < P::ROWS && o < n_out && P::i0() == 0 ? P::total(db, o) : 0.0f;
    most = max(most, magnitude(sums[i]));
  }
  store_partial(sums, P::packs(), to);
  return most;
}

// What can be said of loss and gradient before all totals are known.
enum Known { FINITE, NOT_FINITE, UNKNOWN };

// Called by whole warps, once all chains have noted their numbers. A total of finite numbers is finite if so many of the largest are,
// and if none of them becomes infinite as it is rounded to TF32.
DEVICE Known what_is_known(const Notes& notes) {
  const int lane = threadIdx.x % 32;
  unsigned bits = 0;
  if (lane < NOTED) bits = atomicMax(notes.noted(lane), 0u);
  if (__any_sync(0xffffffffu, bits >= 0x7f800000u)) return NOT_FINITE;
  const double value = __uint_as_float(bits), most = 1.5e38;
  const double of_sums = __shfl_sync(0xffffffffu, value, OF_SUMS), of_inputs = __shfl_sync(0xffffffffu, value, OF_INPUTS);
  const double of_losses = __shfl_sync(0xffffffffu, value, OF_LOSSES);
  const bool finite = of_sums * of_inputs * notes.terms < most && of_inputs < most && of_losses * notes.loss_count < most;
  return finite ? FINITE : UNKNOWN;
}

// What is done with a total: kept as the gradient, put into a step, or nothing.
enum Decision { KEEP, STEP, NO_STEP };

DEVICE Decision decide(const Update& update, Known known) {
  if (update.optimizer < SGD || known == UNKNOWN) return KEEP;
  return applies(update.state, known == FINITE, update.hyper[HALT] != 0) ? STEP : NO_STEP;
}

// The optimizer's step with numbers of theta.
struct Stepper {
  const Update& update;
  Sgd<float> sgd;
  Adam<float> adam;

  explicit DEVICE Stepper(const Update& update)
      : update(update),
        sgd(update.hyper[LEARNING_RATE], update.hyper[MOMENTUM], (int)update.hyper[NESTEROV], update.hyper[WEIGHT_DECAY]),
        adam(update.hyper[LEARNING_RATE], update.hyper[BETA_1], update.hyper[BETA_2], update.hyper[EPS],
             update.hyper[WEIGHT_DECAY], (int)update.hyper[DECOUPLED], update.state[BETA_POWER_1] * update.hyper[BETA_1],
             update.state[BETA_POWER_2] * update.hyper[BETA_2]) {}

  DEVICE void operator()(int i, float gradient) const {
    if (update.optimizer == SGD)
      sgd(update.theta[i], update.first ? update.first + i : nullptr, gradient);
    else
      adam(update.theta[i], update.first[i], update.second[i], gradient);
  }
};

DEVICE float mean_of_losses(const Notes& notes, int n_batch) {
  double sum = 0;
  for (int i = threadIdx.x % 32; i < notes.loss_count; i += 32) sum += load_cg(notes.losses + i);
  return (float)(warp_sum(sum) / n_batch);
}

// Called by the one warp that has dealt with the last piece: the loss, and what is left to do of the step.
DEVICE void finish_step(const Network& net, const Update& update, const Notes& notes, int n_batch, float* mean_loss) {
  const int lane = threadIdx.x % 32;
  const Known known = what_is_known(notes);
  const float loss = mean_of_losses(notes, n_batch);
  double squares[3] = {0, 0, 0};
  bool finite = known == FINITE;
  if (decide(update, known) == KEEP) {
    for (int i = lane; i < net.layers * WARPS; i += 32) squares[0] += load_cg(notes.squares + i);
    squares[0] = warp_sum(squares[0]);
    finite = is_finite(squares[0]) && is_finite(loss);  // a float's square is finite as a double, and so is a sum of them
    if (update.optimizer >= SGD && applies(update.state, finite, update.hyper[HALT] != 0)) {
      const Stepper step(update);
      for (int i = lane; i < update.n_parameters; i += 32) step(i, load_cg(update.gradient + i));
    }
  }
  __syncwarp();  // the state is read
  if (lane > 0) return;
  *mean_loss = loss;
  for (int i = 0; i <= NOTED; ++i) atomicExch(notes.counters + i, 0u);  // ready for the next launch
  if (update.optimizer == KEEP_GRADIENT) return;
  const double* hyper = update.hyper;
  if (note_step(update.state, finite, hyper[HALT] != 0, hyper[BETA_1], hyper[BETA_2]) && hyper[CLIP_NORM] > 0)
    set_factor_for(update.state, squares, hyper[CLIP_NORM]);
}

// This warp's piece of a layer, which is published: adds up if it is the last to arrive, and deals with the totals.
template <int WIDTH>
DEVICE void finish_piece(const Network& net, int k, int chain, const Update& update, const Notes& notes, Pack<float>* ring,
                         int n_batch, float* mean_loss) {
  typedef Piece<WIDTH> P;
  const Layer& layer = net[k];
  const int piece = k * WARPS + warp_index();
  float* partials = notes.partials + (int64)piece * P::SIZE;
  const int64 stride = (int64)net.layers * WARPS * P::SIZE;
  unsigned* arrivals = notes.arrivals(piece);
  const LastSum<float> last = join_chains<DEPTH>(partials, stride, P::packs(), arrivals, notes.chains, chain, ring);
  if (!last.count) return;

  const auto each_total = [&](auto body) {  // body(its place in theta, a number of the gradient)
    write_totals<DEPTH>(last, P::packs(), ring, [&](int index, float sum) {
      const int e = index - P::HELD;
      if (e < 0) {
        const int o = P::o0() + index / 4 / P::FRAGMENTS_I * 16 + fragment_row(index % 4);
        const int i = P::i0() + index / 4 % P::FRAGMENTS_I * 8 + fragment_column(index % 4);
        if (o < layer.n_out && i < layer.n_in) body(layer.theta + o * layer.n_in + i, sum * update.factor);
      } else {
        const int r = (int)(threadIdx.x % 32) + 32 * e, o = P::o0() + r;
        if (r < P::ROWS && o < layer.n_out) body(layer.theta + layer.n_out * layer.n_in + o, sum * update.factor);
      }
    });
  };
  const Decision decision = decide(update, what_is_known(notes));
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
  if (threadIdx.x % 32 == 0) notes.squares[piece] = squares;
  publish();
  if (arrive_last(notes.finished(), notes.pieces)) finish_step(net, update, notes, n_batch, mean_loss);
}

// The sum of a chain's losses, noted. Warp 0.
DEVICE void note_losses(const Network& net, const Notes& notes, int chain, int n_batch) {
  const double sum = warp_sum(net.loss_sums()[threadIdx.x]);
  if (threadIdx.x > 0) return;
  notes.losses[chain] = sum;
  const double mean = fabs(sum) / n_batch, most = 3.4e38;
  // What float cannot hold may still cancel.
  atomicMax(notes.noted(OF_LOSSES), magnitude(is_finite(mean) && mean > most ? (float)most : (float)mean));
}

// A warp's part of the memory through which partial results come.
DEVICE Pack<float>* ring_of(void* memory) { return (Pack<float>*)memory + warp_index() * DEPTH * 32; }
