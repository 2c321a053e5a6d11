#define WARPS 8
#include "reduce_and_step.cuh"

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
      const int* layout, int layers, OPERAND* workspace, int n_batch, int rows, int chain_rows, int chains, int group_size,    \
      float* theta, int n_parameters, int optimizer, float* first, float* second, const double* hyper, double* state,          \
      float* gradient, int accumulate, float factor, float* mean_loss, float* partials, double* losses, int loss_count,        \
      double* squares, unsigned* counters, int pieces) {                                                                       \
    SHARED_MEMORY(memory);                                                                                                     \
    add_up<WIDTH>(                                                                                                             \
        load_network(memory, layout, layers), Workspace{workspace, n_batch}, rows, chain_rows,                                 \
        Update{optimizer, theta, n_parameters, first, second, hyper, state, gradient, accumulate, factor},                     \
        Notes{partials, losses, squares, counters, Chains{chains, group_size}, loss_count, pieces, (double)n_batch * factor},  \
        mean_loss);                                                                                                            \
  }

NETWORK_WEIGHTS(network_weights_64, 64, 2)
NETWORK_WEIGHTS(network_weights_128, 128, 1)
