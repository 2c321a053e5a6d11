// A training step of a narrow network in two launches, where `network_narrow` has no room: every layer at most 128 wide, any depth.
//
// `network_chain` takes slabs of samples through the whole network as fused_step.cu does, but writes every h and da down, once, as
// operands: shared memory holds what two layers need, and W_k where not all of them fit. `network_weights_...` adds up dW and db of all
// layers from these rows, a block to a layer's chain, and makes the optimizer's step.
//
//     network_chain      h_k = g_k(h_{k-1} W_k^T + b_k)     da_L = w dl/da / divisor     da_{k-1} = (da_k W_k) g'_{k-1}
//     network_weights    dW_k = factor  sum_b da_k h_{k-1}^T      db_k = factor  sum_b da_k      theta <- the optimizer's step
//
// `network_chain` alone is also the forward pass, y^ = O(a_L), and the loss.
//
// Shapes as in fused_step.cu. The workspace holds one matrix of the batch behind the other, (B, n rounded up to whole 16) each.
//
// With B = 65536 and ten layers of 64: 128 chains of 512 rows; then 10 times 26 chains of 2560 rows' sums.
//
// Variants: OPERAND (bfloat16, float16, float), TENSOR_CORES (0: float32 products by fma; 1: float is TF32). 256 threads.
#define WARPS 8
#include "layer_passes.cuh"
#include "output_losses.cuh"
#include "reduce_and_step.cuh"

// What `network_chain` is asked for.
enum Wanted { OUTPUTS = 0, LOSS = 1, GRADIENTS = 2 };

KERNEL __launch_bounds__(THREADS, 2) network_chain(
    const int* layout, int layers, int all_weights, const float* x_bi, const int64* labels_b, const float* targets_bj,
    const float* weight_b, int n_batch, int wanted, int loss, int output, float divisor, float factor, int rows, int chain_rows,
    int chains, const float* theta, float* out_bj, float* dx_bi, float* mean_loss, OPERAND* workspace, double* losses,
    unsigned* counters) {
  SHARED_MEMORY(memory);
  const Network net = load_network(memory, layout, layers);
  for (int k = 0; k < (all_weights ? layers : 0); ++k) load_layer(net, k, theta);
  const Samples samples = {x_bi, labels_b, targets_bj, weight_b, n_batch};
  const LossOptions options = {loss, output, divisor};
  const Notes notes = {nullptr, losses, nullptr, counters, {chains, chains}, chains, 0, 0.0};
  const Workspace written = {workspace, n_batch};
  const bool backward = wanted == GRADIENTS;
  const int n_top = net[layers].n_in;
  unsigned most_inputs = magnitude(1.0f), most_deltas = 0;  // db, too, is a sum of products: with 1

#pragma unroll 1
  for (int chain = blockIdx.x; chain < chains; chain += gridDim.x) {
    const int row0 = chain * chain_rows, row1 = min(row0 + chain_rows, n_batch);
    if (warp_index() == 0) net.loss_sums()[threadIdx.x] = 0;
#pragma unroll 1
    for (int first = row0; first < row1; first += rows) {
      const int valid = min(rows, row1 - first);
      const Place place(valid);
      load_samples(net, samples, first, valid, min(rows, row1 - first - valid));
#pragma unroll 1
      for (int k = 0; k < layers; ++k) {
        if (!all_weights) load_layer(net, k, theta);
        __syncthreads();  // the layer's inputs and weights are there
        const Rows h = net.rows(k);
        if (backward) {
          most_inputs = max(most_inputs, store_rows(written.rows(net[k].row_h, h.columns, first), h, valid));
          const Rows a = {net.kept(k), h.pitch, h.columns};
          if (a.at) store_rows(written.rows(net[k].row_a, h.columns, first), a, valid);
        }
        forward_layer(net, k, place, valid);
        __syncthreads();  // nobody reads the layer's inputs and weights any more, whose places are used again
      }

      if (wanted == OUTPUTS) {
        each_top_row(net, valid, [&](int r, const TopRow& row) {
          float* out = out_bj + (int64)(first + r) * n_top;
          output_of_row(row, output, [=](int j, float value) {
            if (r < valid) out[j] = value;
          });
        });
      } else {
        write_losses(net, samples, options, first, valid);
      }
      if (backward) {
        narrow_top(net, valid);
        __syncthreads();  // da_L is complete
#pragma unroll 1
        for (int k = layers - 1; k >= 0; --k) {
          const Rows da = net.rows(k + 1), h = net.rows(k);
          most_deltas = max(most_deltas, store_rows(written.rows(net[k + 1].row_da, da.columns, first), da, valid));
          if (!k && !dx_bi) break;
          if (k)  // what g' is computed from, into the place that da_{k-1} takes
            load_rows(h, written.rows(net.kept(k) ? net[k].row_a : net[k].row_h, h.columns, first), valid, used_rows(valid));
          if (!all_weights) load_layer(net, k, theta);
          cp_async_wait<0>();
          __syncthreads();  // it is there, and so are the weights
          backward_layer<false>(net, k, place, valid, dx_bi, first, factor);
          __syncthreads();  // da_{k-1} is complete
        }
      }
      __syncthreads();  // the slab is done with, and its losses are complete
      if (wanted != OUTPUTS && warp_index() == 0) add_losses(net, valid);
    }
    if (wanted != OUTPUTS && warp_index() == 0) {
      note_losses(net, notes, chain, n_batch);
      if (wanted == LOSS) {
        publish();
        if (arrive_last(notes.finished(), chains)) {
          const float mean = mean_of_losses(notes, n_batch);
          if (threadIdx.x == 0) {
            *mean_loss = mean;
            for (int i = 0; i <= NOTED; ++i) atomicExch(counters + i, 0u);  // ready for the next launch
          }
        }
      }
    }
  }
  if (backward) {
    note(notes, OF_INPUTS, most_inputs);
    note(notes, OF_SUMS, most_deltas);
  }
}
