// A whole training step of a narrow network, in one launch or in two: every layer at most 128 wide, forward pass, loss, backward pass,
// the gradient of theta, and the optimizer's update. Also the forward pass or the loss alone.
//
//     h_k = g_k(h_{k-1} W_k^T + b_k)            da_L = w dl/da / divisor          da_{k-1} = (da_k W_k) g'_{k-1}
//     dW_k = factor  sum_b da_k h_{k-1}^T       db_k = factor  sum_b da_k         theta <- the optimizer's step
//
// Shapes: x (B, n_0) float32; labels (B) or targets (B, n_L); weight (B) or null; theta, its gradient and the optimizer's state as
// gpuback/parameters.py lays them out, float32. Operands of products are OPERAND, sums float32.
//
// Samples meet only in the sums over the batch, so a block takes slabs of `rows` samples (32 ... 128) through the whole network
// (network_slab.cuh), chain by chain of the batch.
//
// In one launch, `network_step_...`, for networks whose dW fit into a block's registers:
//
//     shared memory                                   registers of 8 warps, for a whole chain
//       what the layers are, biases, sums of db         dW_1 ... dW_L   a half by a quarter of each a warp
//       W_1 ... W_L      for the whole launch
//       h_0 ... h_{L-1}  of the slab
//       a_L              of the slab, float32
//
// Nothing that a slab computes is written to global memory. da_k takes the place of h_k (da_L that of a_L) as soon as dW_{k+1}, the
// last that reads it, has been added to. Behind a chain a block writes its sums as partial results, and the last to arrive adds them
// up (reduce.cuh), warp by warp and layer by layer; blocks begin at different layers, so that the work spreads over all of them.
// Whoever has a total makes the optimizer's step with it. Whether there is a step has been settled by then: before a block arrives
// anywhere, it has noted the largest of its numbers. If that many of them cannot add up to infinity, the gradient is finite; if one is
// not finite, neither is the gradient. In between, totals are kept until the last of them is known.
//
// With B = 65536 and seven layers of 64: 128 chains of 512 rows, 4 slabs of 128 each.
//
// In two launches otherwise. `network_chain` writes every h and da down, once, as operands: shared memory holds what two layers need, and
// W_k where not all of them fit. `network_weights_...` adds up dW and db of all layers, a block to a layer's chain, and makes the step.
// `network_chain` alone is also the forward pass and the loss.
//
// Variants: OPERAND (bfloat16, float16, float), TENSOR_CORES (0: float32 products by fma; 1: float is TF32). 256 threads.
#include "network_totals.cuh"

// Begins a launch: the layout, and all weights if there is room for them.
DEVICE Network load_network(unsigned char* memory, const int* layout, int layers, const float* theta, bool all_weights) {
  const Network net = {memory, layers};
  load_layout(net, layout);
  __syncthreads();  // the layout is there
  if (all_weights)
    for (int k = 0; k < layers; ++k) load_layer(net, k, theta);
  return net;
}

DEVICE Pack<float>* ring_of(void* memory) { return (Pack<float>*)memory + warp_index() * DEPTH * 32; }

template <int WIDTH, int LAYERS>
DEVICE void train(const Network& net, const Samples& samples, const LossOptions& options, const Update& update,
                  const Notes& notes, int chain_rows, int rows, float* dx_bi, float* mean_loss) {
  typedef Piece<WIDTH> P;
  const int layers = net.layers;
#pragma unroll 1
  for (int chain = blockIdx.x; chain < notes.chains.count; chain += gridDim.x) {
    const int row0 = chain * chain_rows, row1 = min(row0 + chain_rows, samples.n_batch);
    typename P::Sums dw[LAYERS];
#pragma unroll
    for (int k = 0; k < LAYERS; ++k) P::clear(dw[k]);
    for (int k = 0; k < layers; ++k)
      for (int o = threadIdx.x; o < whole(net[k].n_out); o += THREADS) net.bias_sums(k)[o] = 0;
    double losses = 0;

#pragma unroll 1
    for (int first = row0; first < row1; first += rows) {
      const int valid = min(rows, row1 - first), n_in = net[0].n_in;
      load_samples(net, samples.x_bi + (int64)first * n_in, valid);
      __syncthreads();  // the slab's samples are there; the first time, weights and zeros too
#pragma unroll 1
      for (int k = 0; k < layers; ++k) {
        forward_layer(net, k, valid);
        __syncthreads();  // the next layer's inputs are complete
      }
      losses += losses_of_slab(net, samples, options, first, first - row0, valid);
      narrow_top(net, first - row0, valid);
      __syncthreads();  // da_L is complete
#pragma unroll 1
      for (int k = layers - 1; k >= 0; --k) {
#pragma unroll
        for (int l = 0; l < LAYERS; ++l)  // registers have no index
          if (l == k) add_weights(dw[l], net.rows(k + 1), net.rows(k), valid, P::o0(), P::i0());
        add_biases(net.bias_sums(k), net.rows(k + 1), valid);
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
    note(notes, OF_SUMS, most);
    note(notes, OF_INPUTS, magnitude(1.0f));  // it is sums that are noted
    note_losses(losses, notes, chain, (double*)net.inputs(0), samples.n_batch);
    __syncthreads();  // all of this chain is noted, and the slab's memory is free for the rings
#pragma unroll 1
    for (int step = 0; step < layers; ++step) {
      const int k = (chain + step) % layers;
      if (P::counts(net[k]))
        finish_piece<WIDTH>(net, k, chain, update, notes, ring_of(net.inputs(0)), samples.n_batch, mean_loss);
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
    train<WIDTH, LAYERS>(                                                                                                       \
        load_network(memory, layout, layers, theta, true), Samples{x_bi, labels_b, targets_bj, weight_b, n_batch},              \
        LossOptions{loss, output, divisor},                                                                                     \
        Update{optimizer, theta, n_parameters, first, second, hyper, state, clip_norm, halt, gradient, accumulate, factor},    \
        Notes{partials, losses, squares, counters, Chains{chains, group_size}, chains, pieces, (double)chains}, chain_rows,    \
        rows, dx_bi, mean_loss);                                                                                                \
  }

NETWORK_STEP(network_step_32x16, 32, 16)
NETWORK_STEP(network_step_64x8, 64, 8)
NETWORK_STEP(network_step_128x2, 128, 2)
