// The passes of a narrow network in one launch, any depth, every layer at most 128 wide: forward pass and loss and,
// asked for, the backward pass down to every da. With fused_weight_gradients.cu it is a training step in two launches,
// where fused_step.cu has no room. By itself it is also the forward pass, y^ = O(a_L).
//
//     h_k = g_k(h_{k-1} W_k^T + b_k)     da_L = w dl/da / divisor     da_{k-1} = (da_k W_k) g'_{k-1}
//
// Shapes as in fused_step.cu. The workspace holds one matrix of the batch behind the other, (B, n rounded up to a
// multiple of 16) each.
//
// A block takes every gridDim-th split of the batch through the whole network, batch tile by batch tile, as
// fused_step.cu does. Shared memory holds the rows of two layers, and only W_k where not all weights fit. Every h and
// da is written once, as elements. A thread computes its part of its warp's fragments: 16 rows of a batch tile, some
// columns (warp_products.cuh).
//
// Barriers of the block stand before a layer reads its inputs and weights, and before their places are used again.
//
// With B = 65536 and ten layers of 64: 128 splits of 512 rows.
//
// Variants: Element (bfloat16, float16, float), TENSOR_CORES (0: float32 products by fma; 1: float is TF32). 256
// threads.
#define WARPS 8
#include "layer_passes.cuh"
#include "output_losses.cuh"
#include "reduce_and_step.cuh"

// How much the launch computes.
enum Wanted { OUTPUTS = 0, LOSS = 1, GRADIENTS = 2 };

KERNEL __launch_bounds__(THREADS, 2) fused_passes(
    const int* layout, int layers, int all_weights, const float* x_bi, const int64* labels_b, const float* targets_bj,
    const float* weight_b, int n_batch, int wanted, int loss, int output, const float* parameters,
    float divisor, float factor, int tile_b, int rows_per_split, int n_splits, const float* theta, float* out_bj,
    float* dx_bi, float* mean_loss, Element* workspace, double* losses, unsigned* counters) {
  SHARED_MEMORY(memory);
  const Network net = load_network(memory, layout, layers);
  for (int k = 0; k < (all_weights ? layers : 0); ++k) load_layer(net, k, theta);
  const Samples samples = {x_bi, labels_b, targets_bj, weight_b, n_batch};
  const LossOptions options = {loss, output, divisor};
  const GridResults results = {nullptr, losses, nullptr, counters, {n_splits, n_splits}, n_splits, 0, 0.0};
  const Workspace written = {workspace, n_batch};
  const bool backward = wanted == GRADIENTS;
  const int n_top = net[layers].n_in;
  unsigned most_inputs = magnitude(1.0f), most_deltas = 0;  // db, too, is a sum of products: with 1

#pragma unroll 1
  for (int split = blockIdx.x; split < n_splits; split += gridDim.x) {
    const int row0 = split * rows_per_split, row1 = min(row0 + rows_per_split, n_batch);
    if (warp_index() == 0) net.loss_sums()[threadIdx.x] = 0;
#pragma unroll 1
    for (int first = row0; first < row1; first += tile_b) {
      const int valid = min(tile_b, row1 - first);
      const WarpRows warp_rows(valid);
      load_samples(net, samples, first, valid, min(tile_b, row1 - first - valid));
#pragma unroll 1
      for (int k = 0; k < layers; ++k) {
        if (!all_weights) load_layer(net, k, theta);
        __syncthreads();  // the layer's inputs and weights are there
        const Rows h = net.rows(k);
        if (backward) {
          most_inputs = max(most_inputs, write_rows(written.rows(net[k].row_h, h.columns, first), h, valid));
          const Rows a = {net.pre_activations(k), h.pitch, h.columns};
          if (a.at) write_rows(written.rows(net[k].row_a, h.columns, first), a, valid);
        }
        forward_layer(net, k, warp_rows, valid);
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
        if (loss <= SQUARED_ERROR)
          write_losses(net, samples, options, first, valid);
        else
          write_further_losses(net, samples, options, parameters, first, valid);
      }
      if (backward) {
        round_top(net, valid);
        __syncthreads();  // da_L is complete
#pragma unroll 1
        for (int k = layers - 1; k >= 0; --k) {
          const Rows da = net.rows(k + 1), h = net.rows(k);
          most_deltas = max(most_deltas, write_rows(written.rows(net[k + 1].row_da, da.columns, first), da, valid));
          if (!k && !dx_bi) break;
          if (k)  // what g' is computed from, into the place that da_{k-1} takes
            load_rows(h, written.rows(net.pre_activations(k) ? net[k].row_a : net[k].row_h, h.columns, first),
                      valid, used_rows(valid));
          if (!all_weights) load_layer(net, k, theta);
          cp_async_wait<0>();
          __syncthreads();  // it is there, and so are the weights
          backward_layer<false>(net, k, warp_rows, valid, dx_bi, first, factor);
          __syncthreads();  // da_{k-1} is complete
        }
      }
      __syncthreads();  // the batch tile is done with, and its losses are complete
      if (wanted != OUTPUTS && warp_index() == 0) add_losses(net, valid);
    }
    if (wanted != OUTPUTS && warp_index() == 0) {
      record_losses(net, results, split, n_batch);
      if (wanted == LOSS) {
        publish();
        if (arrive_last(results.finished(), n_splits)) {
          const float mean = mean_of_losses(results, n_batch);
          if (threadIdx.x == 0) {
            *mean_loss = mean;
            for (int i = 0; i <= LARGEST_COUNT; ++i) atomicExch(counters + i, 0u);  // ready for the next launch
          }
        }
      }
    }
  }
  if (backward) {
    record_largest(results, OF_INPUTS, most_inputs);
    record_largest(results, OF_SUMS, most_deltas);
  }
}
