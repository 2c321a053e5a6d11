// A whole training step of a narrow network in one launch: forward pass, loss, backward pass, the gradient of theta, and the optimizer's
// update, for up to MAX_LAYERS layers of at most MAX_WIDTH.
//
//     h_k = g_k(h_{k-1} W_k^T + b_k)            da_L = w dl/da / divisor          da_{k-1} = (da_k W_k) g'_{k-1}
//     dW_k = factor  sum_b da_k h_{k-1}^T       db_k = factor  sum_b da_k         theta <- the optimizer's step
//
// Shapes: x (B, n_0) float32; labels (B) or targets (B, n_L); weight (B) or null; theta, its gradient and the optimizer's state as
// gpuback/_core/parameters.py lays them out, float32. Operands of products are OPERAND, sums float32.
//
// Samples meet only in the sums over the batch, so a block takes slabs of `rows` samples (32 ... 256) through the whole network
// (network_slab.cuh), chain by chain of the batch:
//
//     shared memory                                   registers of all warps, for a whole chain
//       what the layers are, biases                     dW_1 ... dW_L   a part of each a warp (Piece in network_totals.cuh)
//       W_1 ... W_L      for the whole launch
//       h_0 ... h_{L-1}  of the slab
//       a_L              of the slab, float32
//
// Nothing that a slab computes is written to global memory. da_k takes the place of h_k (da_L that of a_L) as soon as dW_{k+1}, the
// last that reads it, has been added to. Behind a chain a block writes its sums as partial results, and the last to arrive adds them
// up and makes the optimizer's step with the totals (network_totals.cuh).
//
// With B = 65536 and seven layers of 64: 128 chains of 512 rows, 4 slabs of 128 each.
//
// Variants: OPERAND (bfloat16, float16, float), TENSOR_CORES (0: float32 products by fma; 1: float is TF32), MAX_WIDTH, MAX_LAYERS,
// WARPS (8, 16) of a block.
#include "network_totals.cuh"

typedef Piece<MAX_WIDTH> Part;

// Where a layer's db is added up: behind its weights' rows, where 16 bytes of each are nothing else's.
DEVICE SumsDb behind_weights(const Network& net, int k) {
  return {(float*)(net.weights(k) + whole(net[k].n_in)), net.pitch(k) * (int)sizeof(OPERAND) / 4};
}

KERNEL __launch_bounds__(THREADS, 1) network_narrow(
    const int* layout, int layers, const float* x_bi, const int64* labels_b, const float* targets_bj, const float* weight_b,
    int n_batch, int loss, int output, float divisor, int tile_b, int rows_per_split, int n_splits, int group_size, float* theta,
    int n_parameters, int optimizer, float* first_state, float* second_state, const double* hyper, double* state,
    float* gradient, int accumulate, float factor, float* dx_bi, float* mean_loss, float* partials, double* losses,
    double* squares, unsigned* counters, int n_fragments) {
  SHARED_MEMORY(memory);
  const Network net = load_network(memory, layout, layers);
  const int64 slab = (unsigned char*)(net.top() + tile_b * net.pitch_top()) - (unsigned char*)net.inputs(0);  // bytes
  load_layers(net, theta, n_parameters, slab);
  const Samples samples = {x_bi, labels_b, targets_bj, weight_b, n_batch};
  const LossOptions options = {loss, output, divisor};
  const Update update = {optimizer, theta, n_parameters, first_state, second_state, hyper, state, gradient, accumulate,
                         factor};
  const Notes notes = {partials, losses, squares, counters, {n_splits, group_size}, n_splits, n_fragments, (double)n_splits};
  const int chain = blockIdx.x, row0 = chain * rows_per_split, row1 = min(row0 + rows_per_split, n_batch);
  Part::Sums dw[MAX_LAYERS];
#pragma unroll
  for (int k = 0; k < MAX_LAYERS; ++k) Part::clear(dw[k]);
  for (int k = 0; k < layers; ++k) Part::clear(behind_weights(net, k), whole(net[k].n_out));
  if (threadIdx.x < 32) net.loss_sums()[threadIdx.x] = 0;

#pragma unroll 1
  for (int first = row0; first < row1; first += tile_b) {
    const int valid = min(tile_b, row1 - first);
    load_samples(net, samples, first, valid, min(tile_b, row1 - first - valid));
    __syncthreads();  // the slab's samples are there; the first time, weights too
    const Place place(valid);
#pragma unroll 1
    for (int k = 0; k < layers; ++k) {
      forward_layer(net, k, place, valid);
      place.wait();
    }
    __syncthreads();  // a_L is complete
    write_losses(net, samples, options, first, valid);
    narrow_top(net, valid);
    __syncthreads();  // da_L and losses are complete
    if (threadIdx.x < 32) add_losses(net, valid);
#pragma unroll 1
    for (int k = layers - 1; k >= 0; --k) {
#pragma unroll
      for (int l = 0; l < MAX_LAYERS; ++l)  // registers have no index
        if (l == k) Part::add(dw[l], behind_weights(net, k), net.rows(k + 1), net.rows(k), first - row0, valid);
      if (k || dx_bi) {
        __syncthreads();  // nobody reads h_{k-1} any more, whose place da_{k-1} takes
        backward_layer<true>(net, k, Place(valid), valid, dx_bi, first, factor);
      }
      __syncthreads();  // da_{k-1} is complete; behind the first layer, the slab is done with
    }
  }

  unsigned most = 0;
#pragma unroll
  for (int k = 0; k < MAX_LAYERS; ++k)
    if (k < layers && Part::counts(net[k])) {
      float* to = notes.partials + ((int64)(chain * layers + k) * WARPS + warp_index()) * Part::SIZE;
      most = max(most, write_partial<MAX_WIDTH>(dw[k], behind_weights(net, k), net[k].n_out, to));
    }
  note(notes, OF_SUMS, most);
  note(notes, OF_INPUTS, magnitude(1.0f));  // it is sums that are noted
  if (threadIdx.x < 32) note_losses(net, notes, chain, n_batch);
  __syncthreads();  // all of this chain is noted, and the slab's memory is free for the rings
  publish();
#pragma unroll 1
  for (int step = 0; step < layers; ++step) {
    const int k = (chain + step) % layers;
    if (Part::counts(net[k]))
      finish_piece<MAX_WIDTH>(net, k, chain, update, notes, ring_of(net.inputs(0)), n_batch, mean_loss);
  }
}
