// A training step of a narrow network in two launches, where `network_narrow` has no room: every layer at most 128 wide, any depth.
//
// `network_chain` takes slabs of samples through the whole network as network_narrow.cu does, but writes every h and da down, once, as
// operands: shared memory holds what two layers need, and W_k where not all of them fit. `network_weights_...` adds up dW and db of all
// layers from these rows, a block to a layer's chain, and makes the optimizer's step.
//
//     network_chain      h_k = g_k(h_{k-1} W_k^T + b_k)     da_L = w dl/da / divisor     da_{k-1} = (da_k W_k) g'_{k-1}
//     network_weights    dW_k = factor  sum_b da_k h_{k-1}^T      db_k = factor  sum_b da_k      theta <- the optimizer's step
//
// `network_chain` alone is also the forward pass, y^ = O(a_L), and the loss.
//
// Shapes as in network_narrow.cu. The workspace holds one matrix of the batch behind the other, (B, n rounded up to whole 16) each.
//
// With B = 65536 and ten layers of 64: 128 chains of 512 rows; then 10 times 26 chains of 2560 rows' sums.
//
// Variants: OPERAND (bfloat16, float16, float), TENSOR_CORES (0: float32 products by fma; 1: float is TF32). 256 threads.
#define WARPS 8
#include "network_totals.cuh"

// What `network_chain` is asked for.
enum Wanted { OUTPUTS = 0, LOSS = 1, GRADIENTS = 2 };

KERNEL __launch_bounds__(THREADS, 2) network_chain(
    const int* layout, int layers, int all_weights, const float* x_bi, const int64* labels_b, const float* targets_bj,
    const float* weight_b, int n_batch, int wanted, int loss, int output, float divisor, float factor, int tile_b, int rows_per_split,
    int n_splits, const float* theta, float* out_bj, float* dx_bi, float* mean_loss, OPERAND* workspace, double* losses,
    unsigned* counters) {
  SHARED_MEMORY(memory);
  const Network net = load_network(memory, layout, layers);
  for (int k = 0; k < (all_weights ? layers : 0); ++k) load_layer(net, k, theta);
  const Samples samples = {x_bi, labels_b, targets_bj, weight_b, n_batch};
  const LossOptions options = {loss, output, divisor};
  const Notes notes = {nullptr, losses, nullptr, counters, {n_splits, n_splits}, n_splits, 0, 0.0};
  const Workspace written = {workspace, n_batch};
  const bool backward = wanted == GRADIENTS;
  const int n_top = net[layers].n_in;
  unsigned most_inputs = magnitude(1.0f), most_deltas = 0;  // db, too, is a sum of products: with 1

#pragma unroll 1
  for (int chain = blockIdx.x; chain < n_splits; chain += gridDim.x) {
    const int row0 = chain * rows_per_split, row1 = min(row0 + rows_per_split, n_batch);
    if (warp_index() == 0) net.loss_sums()[threadIdx.x] = 0;
#pragma unroll 1
    for (int first = row0; first < row1; first += tile_b) {
      const int valid = min(tile_b, row1 - first);
      const Place place(valid);
      load_samples(net, samples, first, valid, min(tile_b, row1 - first - valid));
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
        if (arrive_last(notes.finished(), n_splits)) {
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

// dW and db of layers up to WIDTH wide from the rows that `network_chain` has written down, and the step. A block takes every
// gridDim-th of all layers' chains, slab by slab, one slab being on its way while another is added.
template <int WIDTH>
DEVICE void add_up(const Network& net, const Workspace& written, int rows, int chain_rows, const Update& update,
                   const Notes& notes, float* mean_loss) {
  typedef Piece<WIDTH> P;
  const int PITCH = WIDTH + Unit::PAD, layers = net.layers;
  const SumsDb db = {(float*)(net.memory + ceil_div((layers + 1) * (int)sizeof(Layer), 16) * 16), P::ACROSS};
  OPERAND* slabs = (OPERAND*)(db.at + P::ACROSS * WIDTH);
#pragma unroll 1
  for (int item = blockIdx.x; item < layers * notes.chains.count; item += gridDim.x) {
    const int k = item % layers, chain = item / layers;
    const int row0 = chain * chain_rows, row1 = min(row0 + chain_rows, written.n_batch), steps = ceil_div(row1 - row0, rows);
    typename P::Sums dw;
    P::clear(dw);
    P::clear(db, WIDTH);
    const auto slab = [&](int step, bool of_da) -> Rows {
      OPERAND* at = slabs + (step % 2 * 2 + of_da) * rows * PITCH;
      return {at, PITCH, whole(of_da ? net[k].n_out : net[k].n_in)};
    };
    const auto load = [&](int step) {
      const int first = row0 + step * rows, valid = min(rows, row1 - first);
      const Rows da = slab(step, true), h = slab(step, false);
      load_rows(da, written.rows(net[k + 1].row_da, da.columns, first), valid, used_rows(valid));
      load_rows(h, written.rows(net[k].row_h, h.columns, first), valid, used_rows(valid));
    };
    load(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        load(step + 1);
        cp_async_wait<2>();  // a slab is two groups of copies
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();  // the slab is there for everyone
      const int valid = min(rows, row1 - row0 - step * rows);
      P::add(dw, db, slab(step, true), slab(step, false), step * rows, valid);
      __syncthreads();  // its place is free for the next but one
    }
    if (P::counts(net[k])) {
      float* to = notes.partials + ((int64)(chain * layers + k) * WARPS + warp_index()) * P::SIZE;
      write_partial<WIDTH>(dw, db, net[k].n_out, to);
      publish();
      finish_piece<WIDTH>(net, k, chain, update, notes, ring_of(slabs), written.n_batch, mean_loss);
    }
    __syncthreads();  // the rings are done with, and so are the sums of db
  }
}

#define NETWORK_WEIGHTS(name, WIDTH, BLOCKS)                                                                                   \
  KERNEL __launch_bounds__(THREADS, BLOCKS) name(                                                                              \
      const int* layout, int layers, OPERAND* workspace, int n_batch, int tile_b, int rows_per_split, int n_splits, int group_size, \
      float* theta, int n_parameters, int optimizer, float* first_state, float* second_state, const double* hyper, double* state, \
      float* gradient, int accumulate, float factor, float* mean_loss, float* partials, double* losses, int loss_count,        \
      double* squares, unsigned* counters, int n_fragments) {                                                                  \
    SHARED_MEMORY(memory);                                                                                                     \
    add_up<WIDTH>(                                                                                                             \
        load_network(memory, layout, layers), Workspace{workspace, n_batch}, tile_b, rows_per_split,                           \
        Update{optimizer, theta, n_parameters, first_state, second_state, hyper, state, gradient, accumulate, factor},         \
        Notes{partials, losses, squares, counters, Chains{n_splits, group_size}, loss_count, n_fragments, (double)n_batch * factor}, \
        mean_loss);                                                                                                            \
  }

NETWORK_WEIGHTS(network_weights_64, 64, 2)
NETWORK_WEIGHTS(network_weights_128, 128, 1)
