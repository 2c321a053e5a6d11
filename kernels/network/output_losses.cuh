#pragma once
#include "../common/loss_formulas.cuh"
#include "network_memory.cuh"
#include "warp_products.cuh"

const int TOP_LANES = 8;              // that work on a row
const int HELD = WIDEST / TOP_LANES;  // of its numbers by a lane, at most
typedef Row<TOP_LANES, float> TopRow;

// Calls body(row, its pre-activations) for every row of the slab, whether or not it counts. A warp takes eight of them in two turns, every
// other at a time: those lie in different banks. The last two turns are for what is left of 8 WARPS rows, and may find none.
template <typename Body>
DEVICE void each_top_row(const Network& net, int valid, Body body) {
#pragma unroll 1
  for (int turn = 0; turn < used_rows(valid) / (4 * WARPS) + 2; ++turn) {
    const int first = (turn / 2 * WARPS + warp_index()) * 8, r = first + (int)(threadIdx.x % 32 / TOP_LANES) * 2 + turn % 2;
    if (first < used_rows(valid)) body(r, TopRow{net.top() + r * net.pitch_top(), net[net.layers].n_in});
  }
}

// How a loss is computed.
struct LossOptions {
  int loss, output;
  float divisor;  // B over the scale that da carries
};

// The losses of a slab's samples, behind the numbers of their rows, where nothing else is; da_L, not yet rounded, in place of a_L.
// `first`: the slab's first sample.
DEVICE void write_losses(const Network& net, const Samples& samples, const LossOptions& options, int first, int valid) {
  each_top_row(net, valid, [&](int r, const TopRow& row) {
    const int64 b = first + min(r, valid - 1);
    const float weight = samples.weight_b ? samples.weight_b[b] : 1.0f, scale = weight / options.divisor;
    float* a = net.top() + r * net.pitch_top();
    const auto write = [=](int j, float gradient) { a[j] = gradient * scale; };
    const float value = samples.labels_b
                            ? held_label_loss<HELD>(row, samples.labels_b[b], write)
                            : loss_of_row(row, options.loss, options.output, nullptr, samples.targets_bj + b * row.n, write);
    if (TopRow::lane() == 0) a[whole(row.n)] = value * weight;
  });
}

// Adds them to a chain's sums, of which a lane has every 32nd sample's, so that none depends on how it is cut into slabs. Warp 0.
DEVICE void add_losses(const Network& net, int valid) {
  const float* losses = net.top() + whole(net[net.layers].n_in);
  double sum = net.loss_sums()[threadIdx.x];
#pragma unroll 1
  for (int r = threadIdx.x; r < valid; r += 32) sum += (double)losses[r * net.pitch_top()];
  net.loss_sums()[threadIdx.x] = sum;
}

// da_L as operands, rows in the same place.
DEVICE void narrow_top(const Network& net, int valid) {
  each_top_row(net, valid, [&](int r, const TopRow& row) {
    OPERAND* to = net.inputs(net.layers) + r * net.pitch(net.layers);
    float gradients[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int j = TopRow::lane() + i * TOP_LANES;
      gradients[i] = r < valid && j < row.n ? row.a[j] : 0.0f;
    }
    __syncwarp();  // the other lanes have read theirs
#pragma unroll
    for (int i = 0; i < HELD; ++i)
      if (i * TOP_LANES < whole(row.n)) narrow(gradients[i], to[TopRow::lane() + i * TOP_LANES]);
  });
}
