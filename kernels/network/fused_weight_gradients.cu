// dW and db of all layers of a narrow network from the rows that fused_passes.cu has written, and the optimizer's step:
//
//     dW_k = factor  sum_b da_k h_{k-1}^T      db_k = factor  sum_b da_k      theta <- the optimizer's step
//
// Shapes: the workspace holds every h and da, (B, n rounded up to a multiple of 16) each; theta and the rest as in
// fused_step.cu.
//
// A block takes every gridDim-th of all layers' splits, batch tile by batch tile; one is on its way while another is
// added. A thread holds its part of its warp's fragment of dW (weight_gradients.cuh). Then reduce_and_step.cuh adds the
// splits up.
//
// Barriers of the block stand before a batch tile is read and before its place is used again.
//
// With B = 65536 and ten layers of 64: 10 times 26 splits of 2560 rows.
//
// Variants: Element (bfloat16, float16, float), TENSOR_CORES (0: float32 products by fma; 1: float is TF32). 256
// threads.
#define WARPS 8
#include "reduce_and_step.cuh"

// For layers up to WIDTH wide.
template <int WIDTH>
DEVICE void add_weight_gradients(const Network& net, const Workspace& written, int tile_b, int rows_per_split,
                                 const Update& update, const GridResults& results, float* mean_loss) {
  typedef WeightFragment<WIDTH> P;
  const int PITCH = WIDTH + Unit::PAD, layers = net.layers;
  const BiasSums db = {(float*)(net.memory + ceil_div((layers + 1) * (int)sizeof(Layer), 16) * 16), P::ACROSS};
  Element* stages = (Element*)(db.at + P::ACROSS * WIDTH);
#pragma unroll 1
  for (int work = blockIdx.x; work < layers * results.splits.count; work += gridDim.x) {
    const int k = work % layers, split = work / layers;
    const int row0 = split * rows_per_split, row1 = min(row0 + rows_per_split, written.n_batch);
    const int steps = ceil_div(row1 - row0, tile_b);
    typename P::Sums dw;
    P::clear(dw);
    P::clear(db, WIDTH);
    const auto stage = [&](int step, bool of_da) -> Rows {
      Element* at = stages + (step % 2 * 2 + of_da) * tile_b * PITCH;
      return {at, PITCH, round_up_16(of_da ? net[k].n_out : net[k].n_in)};
    };
    const auto load = [&](int step) {
      const int first = row0 + step * tile_b, valid = min(tile_b, row1 - first);
      const Rows da = stage(step, true), h = stage(step, false);
      load_rows(da, written.rows(net[k + 1].row_da, da.columns, first), valid, used_rows(valid));
      load_rows(h, written.rows(net[k].row_h, h.columns, first), valid, used_rows(valid));
    };
    load(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        load(step + 1);
        cp_async_wait<2>();  // a batch tile is two groups of copies
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();  // the batch tile is there for everyone
      const int valid = min(tile_b, row1 - row0 - step * tile_b);
      P::add(dw, db, stage(step, true), stage(step, false), step * tile_b, valid);
      __syncthreads();  // its place is free for the next but one
    }
    if (P::is_used(net[k])) {
      float* to = results.partials + ((int64)(split * layers + k) * WARPS + warp_index()) * P::SIZE;
      write_partial<WIDTH>(dw, db, net[k], to);
      publish();
      finish_fragment(P(), net, k, split, update, results, prefetch_buffer<P>(stages), written.n_batch, mean_loss);
    }
    __syncthreads();  // the circular buffers are done with, and so are the sums of db
  }
}

#define FUSED_WEIGHT_GRADIENTS(name, WIDTH, BLOCKS)                                                                    \
  KERNEL __launch_bounds__(THREADS, BLOCKS) name(                                                                      \
      const int* layout, int layers, Element* workspace, int n_batch, int tile_b, int rows_per_split, int n_splits,    \
      int group_size, float* theta, int n_parameters, int optimizer, float* first_state, float* second_state,          \
      const double* hyper, double* state, float* gradient, int accumulate, float factor, float* mean_loss,             \
      float* partials, double* losses, int loss_count, double* squares, unsigned* counters, int n_fragments) {         \
    SHARED_MEMORY(memory);                                                                                             \
    const Network net = load_network(memory, layout, layers);                                                          \
    const Splits splits = {n_splits, group_size};                                                                      \
    const double terms = (double)n_batch * factor;                                                                     \
    const GridResults results = {partials, losses, squares, counters, splits, loss_count, n_fragments, terms};         \
    const Update update = {optimizer, theta, n_parameters, first_state, second_state, hyper, state,                    \
                           gradient, accumulate, factor};                                                              \
    add_weight_gradients<WIDTH>(net, {workspace, n_batch}, tile_b, rows_per_split, update, results, mean_loss);        \
  }

FUSED_WEIGHT_GRADIENTS(fused_weight_gradients_64, 64, 2)
FUSED_WEIGHT_GRADIENTS(fused_weight_gradients_128, 128, 1)
