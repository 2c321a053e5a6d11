// A training step of a narrow network in one launch: forward pass, loss, backward pass, the gradient of theta, and the
// optimizer's update, for up to MAX_LAYERS layers of at most MAX_WIDTH.
//
//     h_k = g_k(h_{k-1} W_k^T + b_k)            da_L = w dl/da / divisor          da_{k-1} = (da_k W_k) g'_{k-1}
//     dW_k = factor  sum_b da_k h_{k-1}^T       db_k = factor  sum_b da_k         theta <- the optimizer's step
//
// Shapes: x (B, n_0) float32; labels (B) or targets (B, n_L); weight (B) or null; theta, its gradient and the
// optimizer's state as gpuback/_core/parameters.py lays them out, float32. Products read elements, sums are float32.
//
// Samples meet only in the sums over the batch. So a block takes a split of the batch through the whole network, batch
// tile by batch tile of `tile_b` samples (32 ... 256):
//
//     shared memory                                   registers of all warps, for the whole split
//       the layout, biases, sums of db                  dW_1 ... dW_L   a WeightFragment of each a warp
//       W_1 ... W_L      for the whole launch
//       h_0 ... h_{L-1}  of the batch tile
//       a_L              of the batch tile, float32
//
// Nothing that a batch tile computes is written to global memory. da_k takes the place of h_k (da_L that of a_L) as
// soon as dW_{k+1}, the last that reads it, has been added to. At the end of its split a block writes its sums as
// partial results. The last to arrive adds them up and makes the optimizer's step with the totals
// (reduce_and_step.cuh).
//
// A thread computes its part of its warp's fragments: 16 rows of a batch tile, some columns (warp_products.cuh).
//
// Barriers of the block stand where one warp reads what others wrote (samples, a_L, da) or writes where others read (da
// in place of h). On the way up only the warps of the same rows meet.
//
// With B = 65536 and seven layers of 64: 128 splits of 512 rows, 4 batch tiles of 128 each.
//
// Variants: Element (bfloat16, float16, float), TENSOR_CORES (0: float32 products by fma; 1: float is TF32), MAX_WIDTH,
// MAX_LAYERS, WARPS (8, 16) of a block.
#include "layer_passes.cuh"
#include "output_losses.cuh"
#include "reduce_and_step.cuh"

typedef WeightFragment<MAX_WIDTH> Fragment;

// A layer's sums of db lie in the padding of its weights' rows, 16 bytes of each.
DEVICE BiasSums behind_weights(const Network& net, int k) {
  return {(float*)(net.weights(k) + round_up_16(net[k].n_in)), net.pitch(k) * (int)sizeof(Element) / 4};
}

KERNEL __launch_bounds__(THREADS, 1) fused_step(
    const int* layout, int layers, const float* x_bi, const int64* labels_b, const float* targets_bj,
    const float* weight_b, int n_batch, int loss, int output, float divisor, int tile_b, int rows_per_split,
    int n_splits, int group_size, float* theta, int n_parameters, int optimizer, float* first_state,
    float* second_state, const double* hyper, double* state, float* gradient, int accumulate, float factor,
    float* dx_bi, float* mean_loss, float* partials, double* losses, double* squares, unsigned* counters,
    int n_fragments) {
  SHARED_MEMORY(memory);
  const Network net = load_network(memory, layout, layers);
  const int64 tile_bytes = (unsigned char*)(net.top() + tile_b * net.pitch_top()) - (unsigned char*)net.inputs(0);
  load_layers(layers, theta, n_parameters, (float*)net.inputs(0), tile_bytes,
              [&](int k, const float* from) { load_layer(net, k, from); });
  const Samples samples = {x_bi, labels_b, targets_bj, weight_b, n_batch};
  const LossOptions options = {loss, output, divisor};
  const Update update = {optimizer, theta, n_parameters, first_state, second_state, hyper, state, gradient, accumulate,
                         factor};
  const Splits splits = {n_splits, group_size};
  const GridResults results = {partials, losses, squares, counters, splits, n_splits, n_fragments, (double)n_splits};
  const int split = blockIdx.x, row0 = split * rows_per_split, row1 = min(row0 + rows_per_split, n_batch);
  Fragment::Sums dw[MAX_LAYERS];
#pragma unroll
  for (int k = 0; k < MAX_LAYERS; ++k) Fragment::clear(dw[k]);
  for (int k = 0; k < layers; ++k) Fragment::clear(behind_weights(net, k), round_up_16(net[k].n_out));
  if (threadIdx.x < 32) net.loss_sums()[threadIdx.x] = 0;

#pragma unroll 1
  for (int first = row0; first < row1; first += tile_b) {
    const int valid = min(tile_b, row1 - first);
    load_samples(net, samples, first, valid, min(tile_b, row1 - first - valid));
    __syncthreads();  // the batch tile's samples are there; the first time, weights too
    const WarpRows warp_rows(valid);
#pragma unroll 1
    for (int k = 0; k < layers; ++k) {
      forward_layer(net, k, warp_rows, valid);
      warp_rows.wait();
    }
    __syncthreads();  // a_L is complete
    write_losses(net, samples, options, first, valid);
    round_top(net, valid);
    __syncthreads();  // da_L and losses are complete
    if (threadIdx.x < 32) add_losses(net, valid);
#pragma unroll 1
    for (int k = layers - 1; k >= 0; --k) {
#pragma unroll
      for (int l = 0; l < MAX_LAYERS; ++l)  // registers have no index
        if (l == k) Fragment::add(dw[l], behind_weights(net, k), net.rows(k + 1), net.rows(k), first - row0, valid);
      if (k || dx_bi) {
        __syncthreads();  // nobody reads h_{k-1} any more, whose place da_{k-1} takes
        backward_layer<true>(net, k, WarpRows(valid), valid, dx_bi, first, factor);
      }
      __syncthreads();  // da_{k-1} is complete; behind the first layer, the batch tile is done with
    }
  }

  unsigned most = 0;
#pragma unroll
  for (int k = 0; k < MAX_LAYERS; ++k)
    if (k < layers && Fragment::is_used(net[k])) {
      float* to = results.partials + ((int64)(split * layers + k) * WARPS + warp_index()) * Fragment::SIZE;
      most = max(most, write_partial<MAX_WIDTH>(dw[k], behind_weights(net, k), net[k], to));
    }
  record_largest(results, OF_SUMS, most);
  record_largest(results, OF_INPUTS, magnitude(1.0f));  // sums are recorded, not factors of products
  if (threadIdx.x < 32) record_losses(net, results, split, n_batch);
  __syncthreads();  // all of this split is recorded, and the batch tile's memory is free for the circular buffers
  publish();
#pragma unroll 1
  for (int step = 0; step < layers; ++step) {
    const int k = (split + step) % layers;
    if (Fragment::is_used(net[k]))
      finish_fragment(Fragment(), net, k, split, update, results, prefetch_buffer<Fragment>(net.inputs(0)), n_batch,
                      mean_loss);
  }
}
