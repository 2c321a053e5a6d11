// A whole training step of a narrow network in one launch: every layer at most WIDTH wide, forward pass, loss, backward pass, the
// gradient of theta, and the optimizer's update.
//
//     h_k = g_k(h_{k-1} W_k^T + b_k)            da_L = w dl/da / divisor          da_{k-1} = (da_k W_k) g'_{k-1}
//     dW_k = factor  sum_b da_k h_{k-1}^T       db_k = factor  sum_b da_k         theta <- the optimizer's step
//
// Shapes: x (B, n_0) float32; labels (B) or targets (B, n_L); weight (B) or null; theta, its gradient and the optimizer's state as
// gpuback/parameters.py lays them out, float32. Operands of products are OPERAND, sums float32.
//
// Samples meet only in the sums over the batch, so a block takes slabs of `rows` samples (32 ... 128) through the whole network:
//
//     shared memory                                   registers of 8 warps, for a whole chain of slabs
//       what the layers are, biases, sums of db         dW_1 ... dW_L   WIDTH/2 x WIDTH/4 of each a warp
//       W_1 ... W_L      for the whole launch
//       h_0 ... h_{L-1}  of the slab
//       a_L              of the slab, float32
//
// Nothing that a slab computes is written to global memory. da_k takes the place of h_k (da_L that of a_L) as soon as dW_{k+1}, the
// last that reads it, has been added to:
//
//     forward    h_k = g(h_{k-1} W_k^T + b_k)      tiles of 32 x 32, a warp each
//     loss       four lanes to a row
//     backward   dW_k += da_k^T h_{k-1}, db_k += sum da_k     all warps a part of dW_k
//                h_{k-1} <- (da_k W_k) g'                     tiles of 32 x 32, a warp each
//
// A block takes every gridDim-th chain of the batch. Behind a chain it writes its sums as partial results, and the last to arrive adds
// them up (reduce.cuh), warp by warp and layer by layer; blocks begin at different layers, so that the work spreads over all of them.
// Whoever has a total makes the optimizer's step with it. Whether there is a step has been settled by then: before a block arrives
// anywhere, it has noted the largest of its partial results in `highest`. If that many of them cannot add up to infinity, all
// gradients are finite; if one is not finite, neither is the gradient. In between, totals are kept until the last of them is known.
//
// With B = 65536 and seven layers of 64: 128 chains of 512 rows, 4 slabs of 128 each.
//
// Variants: OPERAND (bfloat16, float16, float), TENSOR_CORES (0: float32 products by fma; 1: float is TF32). 256 threads.
#include "epilogue.cuh"
#include "fma_fragments.cuh"
#include "fragments.cuh"
#include "output_rows.cuh"
#include "reduce.cuh"
#include "update.cuh"

#if TENSOR_CORES
typedef Mma<OPERAND> Unit;
#else
typedef Fma Unit;
#endif

const int WARPS = 8, THREADS = 32 * WARPS, TILE = 32;
const int PAD = Unit::PAD;                           // of a row of operands, in numbers: no reads of fragments meet in a bank
const int PAD_TOP = sizeof(OPERAND) == 2 ? 4 : PAD;  // of a row of a_L, in float32, which becomes one of da_L
const int DEPTH = 8;                             // of the ring through which partial results come

typedef Group<OPERAND, 2> Pair;

// A layer, as the host lays it out (gpuback/cuda/plans.py): widths, the activation behind it, and where things lie. After the
// last one follows an entry for what it gives: only n_in and h count, the outputs' width and the place of a_L.
struct Layer {
  int n_in, n_out, activation;
  int theta;        // its weights' first number in theta; its biases follow them
  int w, bias, db;  // bytes of shared memory from its beginning: weights as operands, biases, sums of db
  int h, a;         // its inputs; and the pre-activations that they came from, where g' is computed from those, else 0
};

DEVICE int whole(int n) { return (n + 15) / 16 * 16; }  // what lies beyond a width, up to this, is zero
DEVICE int warp_index() { return (int)threadIdx.x / 32; }

struct Samples {
  const float* x_bi;
  const int64* labels_b;  // or null
  const float* targets_bj;
  const float* weight_b;  // or null
  int n_batch;
};

struct Network {
  unsigned char* memory;
  int layers;

  DEVICE const Layer& operator[](int k) const { return ((const Layer*)memory)[k]; }
  DEVICE OPERAND* weights(int k) const { return (OPERAND*)(memory + (*this)[k].w); }
  DEVICE float* biases(int k) const { return (float*)(memory + (*this)[k].bias); }
  DEVICE float* bias_sums(int k) const { return (float*)(memory + (*this)[k].db); }
  DEVICE int pitch_w(int k) const { return whole((*this)[k].n_in) + PAD; }

  // The inputs of layer k, rows of operands, and later their gradient.
  DEVICE OPERAND* inputs(int k) const { return (OPERAND*)(memory + (*this)[k].h); }
  DEVICE int pitch(int k) const {
    return k < layers ? pitch_w(k) : pitch_top() * (int)(sizeof(float) / sizeof(OPERAND));
  }
  DEVICE OPERAND* kept(int k) const { return (*this)[k].a ? (OPERAND*)(memory + (*this)[k].a) : nullptr; }

  DEVICE float* top() const { return (float*)(memory + (*this)[layers].h); }
  DEVICE int pitch_top() const { return whole((*this)[layers].n_in) + PAD_TOP; }
};

// ---- Before the first slab

DEVICE void load_layout(const Network& net, const int* layout) {
  const int numbers = (net.layers + 1) * (int)(sizeof(Layer) / sizeof(int));
  for (int i = threadIdx.x; i < numbers; i += THREADS) ((int*)net.memory)[i] = layout[i];
}

DEVICE void load_theta(const Network& net, const float* theta) {
  for (int k = 0; k < net.layers; ++k) {
    const Layer& layer = net[k];
    const float* weights = theta + layer.theta;
    OPERAND* w = net.weights(k);
    const int pitch = net.pitch_w(k), n_in = layer.n_in, n_out = layer.n_out;
    for (int o = warp_index(); o < whole(n_out); o += WARPS)
      for (int i = threadIdx.x % 32; i < whole(n_in); i += 32)
        narrow(o < n_out && i < n_in ? weights[o * n_in + i] : 0.0f, w[o * pitch + i]);
    for (int o = threadIdx.x; o < whole(n_out); o += THREADS)
      net.biases(k)[o] = o < n_out ? weights[n_out * n_in + o] : 0.0f;
  }
}

// ---- A slab: `valid` of its rows belong to the chain, the rest of the last 32 is zero

DEVICE int used_rows(int valid) { return ceil_div(valid, TILE) * TILE; }

DEVICE void load_samples(const Network& net, const float* x, int valid) {
  const int n = net[0].n_in, pitch = net.pitch(0);
  OPERAND* h = net.inputs(0);
#pragma unroll 4
  for (int r = warp_index(); r < used_rows(valid); r += WARPS)
    for (int i = threadIdx.x % 32; i < whole(n); i += 32)
      narrow(r < valid && i < n ? x[(int64)r * n + i] : 0.0f, h[r * pitch + i]);
}

// c = A B for a tile of 32 x 32; A stored [m][k], B stored [k][n] or, transposed, [n][k]; k and n reach up to whole numbers of 16.
template <bool TRANSPOSED_B>
DEVICE void multiply(float (&c)[2][4][4], const OPERAND* a_tile, int a_pitch, int m0, const OPERAND* b_tile, int b_pitch, int n0,
                     int n1, int k1) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
#pragma unroll 1
  for (int k = 0; k < k1; k += Unit::K) {
    typename Unit::FragmentA a[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) Unit::template load_a<false>(a[i], a_tile, a_pitch, m0 + i * 16, k);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      if (n0 + j * 8 >= n1) continue;
      typename Unit::FragmentB b[2];
      Unit::template load_b<false, TRANSPOSED_B>(b[0], b[1], b_tile, b_pitch, n0 + j * 8, k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Unit::multiply(c[i][j], a[i], b[0]);
        Unit::multiply(c[i][j + 1], a[i], b[1]);
      }
    }
  }
}

// Pairs of neighbours in 16 rows and columns of a tile, a warp's tile of C in two fragments: body(index of the pair, its row, its column).
template <typename Body>
DEVICE void each_pair(int m0, int n0, Body body) {
#pragma unroll
  for (int p = 0; p < 4; ++p) body(p, m0 + fragment_row(p % 2 * 2), n0 + p / 2 * 8 + fragment_column(0));
}

// Two numbers as operands; zeros outside the slab's rows and the layer's columns.
DEVICE Pair narrow_pair(float first, float second, bool row_counts, int column, int n) {
  Pair pair;
  narrow(row_counts && column < n ? first : 0.0f, pair.at[0]);
  narrow(row_counts && column + 1 < n ? second : 0.0f, pair.at[1]);
  return pair;
}

// h_{k+1} = g(h_k W^T + b), or a_L.
DEVICE void forward_layer(const Network& net, int k, int valid) {
  const int n_in = net[k].n_in, n_out = net[k].n_out, activation = net[k].activation, n1 = whole(n_out);
  const bool last = k + 1 == net.layers;
  const float* bias = net.biases(k);
  OPERAND* out = net.inputs(k + 1);
  OPERAND* kept = net.kept(k + 1);
  const int pitch = net.pitch(k + 1), across = ceil_div(n1, TILE);
#pragma unroll 1
  for (int tile = warp_index(); tile < used_rows(valid) / TILE * across; tile += WARPS) {
    const int m0 = tile / across * TILE, n0 = tile % across * TILE;
    float c[2][4][4];
    multiply<true>(c, net.inputs(k), net.pitch(k), m0, net.weights(k), net.pitch_w(k), n0, n1, whole(n_in));
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int i = part / 2, j = part % 2 * 2, m = m0 + i * 16, n = n0 + j * 8;
      if (n >= n1) continue;
      float a[8];
      each_pair(m, n, [&](int p, int row, int column) {
        const Group<float, 2> b = *(const Group<float, 2>*)(bias + column);
#pragma unroll
        for (int e = 0; e < 2; ++e) a[p * 2 + e] = c[i][j + p / 2][p % 2 * 2 + e] + b.at[e];
        if (last) {
          const Group<float, 2> pair = {a[p * 2], a[p * 2 + 1]};
          *(Group<float, 2>*)(net.top() + row * net.pitch_top() + column) = pair;
        }
        if (kept) {
          const Pair pair = narrow_pair(a[p * 2], a[p * 2 + 1], row < valid, column, n_out);
          *(Pair*)(kept + row * pitch + column) = pair;
          a[p * 2] = widen(pair.at[0]), a[p * 2 + 1] = widen(pair.at[1]);
        }
      });
      if (last) continue;
      activate(activation, a);
      each_pair(m, n, [&](int p, int row, int column) {
        *(Pair*)(out + row * pitch + column) = narrow_pair(a[p * 2], a[p * 2 + 1], row < valid, column, n_out);
      });
    }
  }
}

typedef Row<4, float> TopRow;

// Calls body(row, its pre-activations) for every row of the slab that counts.
template <typename Body>
DEVICE void each_top_row(const Network& net, int valid, Body body) {
  for (int r = (int)threadIdx.x / 4; r < valid; r += THREADS / 4)
    body(r, TopRow{net.top() + r * net.pitch_top(), net[net.layers].n_in});
}

// The losses of this thread's rows, added; dl/da in place of a.
DEVICE double losses_of_slab(const Network& net, const Samples& samples, int row0, int valid, int loss, int output,
                             float divisor) {
  double sum = 0;
  each_top_row(net, valid, [&](int r, const TopRow& row) {
    const int64 b = row0 + r;
    const float weight = samples.weight_b ? samples.weight_b[b] : 1.0f;
    float* a = net.top() + r * net.pitch_top();
    const float value = loss_of_row(row, loss, output, samples.labels_b ? samples.labels_b + b : nullptr,
                                    samples.targets_bj + b * row.n,
                                    [=](int j, float gradient) { a[j] = gradient * weight / divisor; });
    if (TopRow::lane() == 0) sum += (double)(value * weight);
  });
  return sum;
}

// dl/da as operands da_L, rows in the same place. What is written in a round of four columns has been read in an earlier one.
DEVICE void narrow_top(const Network& net, int valid) {
  const int n = net[net.layers].n_in, pitch = net.pitch_top();
  for (int r = (int)threadIdx.x / 4; r < used_rows(valid); r += THREADS / 4) {
    const float* from = net.top() + r * pitch;
    OPERAND* to = net.inputs(net.layers) + r * net.pitch(net.layers);
    for (int j = TopRow::lane(); j < whole(n); j += 4) {
      const float gradient = r < valid && j < n ? from[j] : 0.0f;
      __syncwarp();  // the other lanes have read theirs
      narrow(gradient, to[j]);
    }
  }
}

// dW += da^T h, a warp's part of it: rows o0 ..., columns i0 ... .
template <int FRAGMENTS_O, int FRAGMENTS_I>
DEVICE void add_weights(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], const Network& net, int k, int valid, int o0, int i0) {
  const OPERAND* da = net.inputs(k + 1);
  const OPERAND* h = net.inputs(k);
  const int pitch_da = net.pitch(k + 1), pitch_h = net.pitch(k), o1 = whole(net[k].n_out), i1 = whole(net[k].n_in);
  if (o0 >= o1 || i0 >= i1) return;
#pragma unroll 1
  for (int b = 0; b < whole(valid); b += Unit::K) {
    typename Unit::FragmentA a[FRAGMENTS_O];
#pragma unroll
    for (int i = 0; i < FRAGMENTS_O; ++i)
      if (o0 + i * 16 < o1) Unit::template load_a<true>(a[i], da, pitch_da, o0 + i * 16, b);
#pragma unroll
    for (int j = 0; j < FRAGMENTS_I; j += 2) {
      if (i0 + j * 8 >= i1) continue;
      typename Unit::FragmentB columns[2];
      Unit::template load_b<true, false>(columns[0], columns[1], h, pitch_h, i0 + j * 8, b);
#pragma unroll
      for (int i = 0; i < FRAGMENTS_O; ++i)
        if (o0 + i * 16 < o1) {
          Unit::multiply(dw[i][j], a[i], columns[0]);
          Unit::multiply(dw[i][j + 1], a[i], columns[1]);
        }
    }
  }
}

// db += sum_b da. Eight lanes to a pair of columns, every eighth row each; no two rows of theirs meet in a bank.
DEVICE void add_biases(const Network& net, int k, int valid) {
  const OPERAND* da = net.inputs(k + 1);
  const int pitch = net.pitch(k + 1), n = whole(net[k].n_out), lane = threadIdx.x % 32;
  float* sums = net.bias_sums(k);
#pragma unroll 1
  for (int first = warp_index() * 8; first < n; first += WARPS * 8) {
    const int column = first + lane % 4 * 2;
    float sum[2] = {0, 0};
    for (int r = lane / 4; r < used_rows(valid); r += 8) {
      const Pair pair = *(const Pair*)(da + r * pitch + column);
      sum[0] += widen(pair.at[0]), sum[1] += widen(pair.at[1]);
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], step);
    if (lane < 4) sums[column] += sum[0], sums[column + 1] += sum[1];
  }
}

// da_{k-1} = (da_k W) g' in place of the layer's inputs; or, of the first layer, ∂loss/∂x to global memory.
DEVICE void backward_layer(const Network& net, int k, int valid, float* dx, float factor) {
  const int n_in = net[k].n_in, n1 = whole(n_in), n_out = net[k].n_out, activation = k ? net[k - 1].activation : IDENTITY;
  OPERAND* h = net.inputs(k);
  const OPERAND* source = net.kept(k) ? net.kept(k) : h;
  const int pitch = net.pitch(k), across = ceil_div(n1, TILE);
#pragma unroll 1
  for (int tile = warp_index(); tile < used_rows(valid) / TILE * across; tile += WARPS) {
    const int m0 = tile / across * TILE, n0 = tile % across * TILE;
    float c[2][4][4];
    multiply<false>(c, net.inputs(k + 1), net.pitch(k + 1), m0, net.weights(k), net.pitch_w(k), n0, n1, whole(n_out));
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int i = part / 2, j = part % 2 * 2, m = m0 + i * 16, n = n0 + j * 8;
      if (n >= n1) continue;
      float d[8], sources[8];
      each_pair(m, n, [&](int p, int row, int column) {
        const Pair pair = *(const Pair*)(source + row * pitch + column);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          d[p * 2 + e] = c[i][j + p / 2][p % 2 * 2 + e];
          sources[p * 2 + e] = widen(pair.at[e]);
          if (k == 0 && row < valid && column + e < n_in) dx[(int64)row * n_in + column + e] = d[p * 2 + e] * factor;
        }
      });
      if (k == 0) continue;
      times_derivative(activation, d, sources);
      each_pair(m, n, [&](int p, int row, int column) {
        *(Pair*)(h + row * pitch + column) = narrow_pair(d[p * 2], d[p * 2 + 1], row < valid, column, n_in);
      });
    }
  }
}

// ---- Behind the last slab of a chain

enum OptimizerKind { KEEP_GRADIENT = 0, DECIDE = 1, SGD = 2, ADAM = 3 };  // DECIDE: the gradient is kept, and the step is settled

// What is done with the totals.
struct Update {
  int optimizer;
  float* theta;
  float* first;         // velocity or null, or first moment
  float* second;        // second moment
  const double* hyper;  // see HyperParameter in update.cuh
  double* state;        // see State there
  double clip_norm;     // 0: none
  int halt;
  float* gradient;
  int accumulate;
  float factor;
};

// What blocks tell each other.
struct Notes {
  float* partials;     // (chains, pieces, numbers of a piece)
  double* losses;      // (chains): of each chain's rows
  double* squares;     // (pieces): of the gradient, where it is kept
  unsigned* arrivals;  // (pieces, groups + 1), at 0
  unsigned* finished;  // pieces whose totals are dealt with, at 0
  unsigned* highest;   // magnitude of the largest partial result or loss, as bits, at 0
  Chains chains;
  int pieces;          // that have anything to add
};

// The part of dW that a warp holds, and of db: a piece for each layer.
template <int WIDTH>
struct Piece {
  static constexpr int FRAGMENTS = WIDTH / 32;                 // in both directions
  static constexpr int HELD = FRAGMENTS * FRAGMENTS * 4;       // of dW by a lane
  static constexpr int HELD_DB = (WIDTH / 64 + 3) / 4 * 4;     // of db by a lane of the first column of warps, in whole packs
  static constexpr int COUNT = HELD + HELD_DB;
  static constexpr int SIZE = COUNT * 32;

  static DEVICE int o0() { return warp_index() / 4 * (WIDTH / 2); }
  static DEVICE int i0() { return warp_index() % 4 * (WIDTH / 4); }
  static DEVICE int used() { return i0() == 0 ? COUNT : HELD; }
  static DEVICE int packs() { return used() / Pack<float>::count; }
  static DEVICE bool counts(const Layer& layer) { return o0() < layer.n_out && i0() < layer.n_in; }
};

DEVICE unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }  // orders NaN above infinity above all else

// Puts a lane's numbers together, writes them, and returns the largest magnitude among them.
template <int WIDTH>
DEVICE unsigned write_partial(const float (&dw)[WIDTH / 32][WIDTH / 32][4], const float* db, float* to) {
  typedef Piece<WIDTH> P;
  float sums[P::COUNT];
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < P::COUNT; ++i) {
    const int e = i - P::HELD;
    if (e < 0)
      sums[i] = dw[i / 4 / P::FRAGMENTS % P::FRAGMENTS][i / 4 % P::FRAGMENTS][i % 4];
    else
      sums[i] = e < WIDTH / 64 && P::i0() == 0 ? db[P::o0() + (int)threadIdx.x % 32 + 32 * e] : 0.0f;
    most = max(most, magnitude(sums[i]));
  }
  store_partial(sums, P::packs(), to);
  return most;
}

// Whether a step is made, as far as it can be said before all totals are known.
enum Decision { KEEP, STEP, NO_STEP };

// The largest that any chain has noted.
DEVICE float highest_noted(const Notes& notes) {
  unsigned bits = 0;
  if (threadIdx.x % 32 == 0) bits = atomicMax(notes.highest, 0u);
  return __uint_as_float(__shfl_sync(0xffffffffu, bits, 0));
}

DEVICE Decision decide(const Update& update, const Notes& notes) {
  if (update.optimizer < SGD) return KEEP;
  const float highest = highest_noted(notes);
  if (!is_finite(highest)) return NO_STEP;
  if (highest > 1.5e38f / notes.chains.count) return KEEP;  // so many might add up to infinity
  return applies(update.state, true, update.halt) ? STEP : NO_STEP;
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

// Called by the one warp that has dealt with the last piece: the loss, and what is left to do of the step.
DEVICE void finish(const Network& net, const Update& update, const Notes& notes, int n_parameters, int n_batch, float* mean_loss) {
  const int lane = threadIdx.x % 32;
  const Decision decision = decide(update, notes);
  double sum = 0, squares[3] = {0, 0, 0};
  for (int i = lane; i < notes.chains.count; i += 32) sum += load_cg(notes.losses + i);
  const float loss = (float)(warp_sum(sum) / n_batch);
  if (decision == KEEP)
    for (int i = lane; i < net.layers * WARPS; i += 32) squares[0] += load_cg(notes.squares + i);
  squares[0] = warp_sum(squares[0]);
  // A float's square is finite as a double, and so is a sum of them.
  const bool finite = decision == KEEP ? is_finite(squares[0]) && is_finite(loss) : is_finite(highest_noted(notes));
  if (decision == KEEP && update.optimizer >= SGD && applies(update.state, finite, update.halt)) {
    const Stepper step(update);
    for (int i = lane; i < n_parameters; i += 32) step(i, load_cg(update.gradient + i));
  }
  __syncwarp();  // the state is read
  if (lane > 0) return;
  *mean_loss = loss;
  atomicExch(notes.finished, 0u);  // ready for the next launch
  atomicExch(notes.highest, 0u);
  if (update.optimizer == KEEP_GRADIENT) return;
  if (note_step(update.state, finite, update.halt, update.hyper[BETA_1], update.hyper[BETA_2]) && update.clip_norm > 0)
    set_factor_for(update.state, squares, update.clip_norm);
}

// This warp's piece of a layer: adds up if it is the last to arrive, and makes the step.
template <int WIDTH>
DEVICE void finish_piece(const Network& net, int k, int chain, const Update& update, const Notes& notes, Pack<float>* ring,
                         int n_parameters, int n_batch, float* mean_loss) {
  typedef Piece<WIDTH> P;
  const Layer& layer = net[k];
  const int piece = k * WARPS + warp_index();
  float* partials = notes.partials + (int64)piece * P::SIZE;
  const int64 stride = (int64)net.layers * WARPS * P::SIZE;
  unsigned* arrivals = notes.arrivals + piece * (chain_groups(notes.chains) + 1);
  const LastSum<float> last = join_chains<DEPTH>(partials, stride, P::packs(), arrivals, notes.chains, chain, ring);
  if (!last.count) return;

  const auto each_total = [&](auto body) {  // body(its place in theta, a number of the gradient)
    write_totals<DEPTH>(last, P::packs(), ring, [&](int index, float sum) {
      const int e = index - P::HELD;
      if (e < 0) {
        const int o = P::o0() + index / 4 / P::FRAGMENTS * 16 + fragment_row(index % 4);
        const int i = P::i0() + index / 4 % P::FRAGMENTS * 8 + fragment_column(index % 4);
        if (o < layer.n_out && i < layer.n_in) body(layer.theta + o * layer.n_in + i, sum * update.factor);
      } else if (e < WIDTH / 64) {
        const int o = P::o0() + (int)threadIdx.x % 32 + 32 * e;
        if (o < layer.n_out) body(layer.theta + layer.n_out * layer.n_in + o, sum * update.factor);
      }
    });
  };
  const Decision decision = decide(update, notes);
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
  if (arrive_last(notes.finished, notes.pieces)) finish(net, update, notes, n_parameters, n_batch, mean_loss);
}

// The sum of a chain's losses, noted.
DEVICE void note_losses(double sum, const Notes& notes, int chain, double* shared, int n_batch) {
  double sums[1] = {sum};
  block_combine(sums, shared, Add());
  if (threadIdx.x > 0) return;
  notes.losses[chain] = sums[0];
  const double mean = fabs(sums[0]) / n_batch, most = 3.4e38;
  // What float cannot hold may still cancel.
  atomicMax(notes.highest, magnitude(is_finite(mean) && mean > most ? (float)most : (float)mean));
}

struct Passes {
  int loss, output;
  float divisor;  // B over the scale of da
  int rows;       // of a slab
  int chain_rows;
};

template <int WIDTH, int LAYERS>
DEVICE void train(unsigned char* memory, const int* layout, int layers, const Samples& samples, const Passes& passes,
                  const Update& update, const Notes& notes, int n_parameters, float* dx_bi, float* mean_loss) {
  typedef Piece<WIDTH> P;
  const Network net = {memory, layers};
  load_layout(net, layout);
  __syncthreads();  // the layout is there
  load_theta(net, update.theta);

#pragma unroll 1
  for (int chain = blockIdx.x; chain < notes.chains.count; chain += gridDim.x) {
    const int row0 = chain * passes.chain_rows, row1 = min(row0 + passes.chain_rows, samples.n_batch);
    float dw[LAYERS][P::FRAGMENTS][P::FRAGMENTS][4];
#pragma unroll
    for (int k = 0; k < LAYERS; ++k)
#pragma unroll
      for (int i = 0; i < P::FRAGMENTS * P::FRAGMENTS * 4; ++i)
        dw[k][i / 4 / P::FRAGMENTS][i / 4 % P::FRAGMENTS][i % 4] = 0;
    for (int k = 0; k < layers; ++k)
      for (int o = threadIdx.x; o < whole(net[k].n_out); o += THREADS) net.bias_sums(k)[o] = 0;
    double losses = 0;

#pragma unroll 1
    for (int first = row0; first < row1; first += passes.rows) {
      const int valid = min(passes.rows, row1 - first), n_in = net[0].n_in;
      load_samples(net, samples.x_bi + (int64)first * n_in, valid);
      __syncthreads();  // the slab's samples are there; the first time, weights and zeros too
#pragma unroll 1
      for (int k = 0; k < layers; ++k) {
        forward_layer(net, k, valid);
        __syncthreads();  // the next layer's inputs are complete
      }
      losses += losses_of_slab(net, samples, first, valid, passes.loss, passes.output, passes.divisor);
      narrow_top(net, valid);
      __syncthreads();  // da_L is complete
#pragma unroll 1
      for (int k = layers - 1; k >= 0; --k) {
#pragma unroll
        for (int l = 0; l < LAYERS; ++l)  // registers have no index
          if (l == k) add_weights(dw[l], net, k, valid, P::o0(), P::i0());
        add_biases(net, k, valid);
        if (k || dx_bi) {
          __syncthreads();  // nobody reads h_{k-1} any more, whose place da_{k-1} takes
          backward_layer(net, k, valid, dx_bi + (int64)first * n_in, update.factor);
        }
        __syncthreads();  // da_{k-1} is complete; behind the first layer, the slab is done with
      }
    }

    unsigned most = 0;
#pragma unroll
    for (int k = 0; k < LAYERS; ++k)
      if (k < layers && P::counts(net[k])) {
        float* to = notes.partials + ((int64)(chain * layers + k) * WARPS + warp_index()) * P::SIZE;
        most = max(most, write_partial<WIDTH>(dw[k], net.bias_sums(k), to));
      }
    most = warp_combined(most, Larger());
    if (threadIdx.x % 32 == 0) atomicMax(notes.highest, most);
    note_losses(losses, notes, chain, (double*)net.inputs(0), samples.n_batch);
    __syncthreads();  // all of this chain is noted, and the slab's memory is free for the rings
    Pack<float>* ring = (Pack<float>*)net.inputs(0) + warp_index() * DEPTH * 32;
#pragma unroll 1
    for (int step = 0; step < layers; ++step) {
      const int k = (chain + step) % layers;
      if (P::counts(net[k]))
        finish_piece<WIDTH>(net, k, chain, update, notes, ring, n_parameters, samples.n_batch, mean_loss);
    }
    __syncthreads();  // the rings are done with, and so are the sums of db
  }
}

#define NETWORK_STEP(name, WIDTH, LAYERS)                                                                                       \
  KERNEL __launch_bounds__(THREADS, 1) name(                                                                                    \
      const int* layout, int layers, const float* x_bi, const int64* labels_b, const float* targets_bj, const float* weight_b, \
      int n_batch, int loss, int output, float divisor, int rows, int chain_rows, int chains, int group_size, float* theta,    \
      int n_parameters, int optimizer, float* first, float* second, const double* hyper, double* state, double clip_norm,      \
      int halt, float* gradient, int accumulate, float factor, float* dx_bi, float* mean_loss, float* partials,                 \
      double* losses, double* squares, unsigned* counters, int pieces) {                                                       \
    SHARED_MEMORY(memory);                                                                                                      \
    const Chains all = {chains, group_size};                                                                                    \
    unsigned* arrivals = counters + 2;                                                                                          \
    train<WIDTH, LAYERS>(                                                                                                       \
        memory, layout, layers, Samples{x_bi, labels_b, targets_bj, weight_b, n_batch},                                         \
        Passes{loss, output, divisor, rows, chain_rows},                                                                        \
        Update{optimizer, theta, first, second, hyper, state, clip_norm, halt, gradient, accumulate, factor},                  \
        Notes{partials, losses, squares, arrivals, counters, counters + 1, all, pieces}, n_parameters, dx_bi, mean_loss);       \
  }

NETWORK_STEP(network_step_64x8, 64, 8)
NETWORK_STEP(network_step_128x2, 128, 2)
