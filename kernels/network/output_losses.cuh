// The output layer of a batch tile, in shared memory: y^, the losses, da_L in place of a_L (common/loss_formulas.cuh).
//
// TOP_LANES lanes of a warp work on a row of a_L, each on every TOP_LANES-th number.
#pragma once
#include "../common/loss_formulas.cuh"
#include "network_memory.cuh"

const int TOP_LANES = 8;
const int PER_LANE = WIDEST / TOP_LANES;  // numbers of a row, at most
typedef Row<TOP_LANES, float> TopRow;

// Calls body(row, its pre-activations) for every row of the batch tile, including those beyond `valid`. A warp handles
// 8 rows in two passes of 4, even rows and then odd ones, which lie in different banks. The last two passes are for the
// rows that are left of 8 WARPS, and may find none.
template <typename Body>
DEVICE void each_top_row(const Network& net, int valid, Body body) {
#pragma unroll 1
  for (int turn = 0; turn < used_rows(valid) / (4 * WARPS) + 2; ++turn) {
    const int first = (turn / 2 * WARPS + warp_index()) * 8;
    const int r = first + (int)(threadIdx.x % 32 / TOP_LANES) * 2 + turn % 2;
    if (first < used_rows(valid)) body(r, TopRow{net.top() + r * net.pitch_top(), net[net.layers].n_in});
  }
}

// How a loss is computed.
struct LossOptions {
  int loss, output;
  float divisor;  // B over the scale that da carries
};

// A sample's loss, of the row `a` of its pre-activations, whose place da_L takes, not yet rounded.
// of_row(row, write): the loss without the sample's weight.
template <typename OfRow>
DEVICE float loss_in_place(float* a, int n, const Samples& samples, const LossOptions& options, int64 b, OfRow of_row) {
  const float weight = samples.weight_b ? samples.weight_b[b] : 1.0f, scale = weight / options.divisor;
  return of_row(TopRow{a, n}, [=](int j, float gradient) { a[j] = gradient * scale; }) * weight;
}

// Of the losses up to SQUARED_ERROR.
DEVICE float sample_loss(float* a, int n, const Samples& samples, const LossOptions& options, int64 b) {
  return loss_in_place(a, n, samples, options, b, [&](const TopRow& row, auto write) {
    return samples.labels_b ? label_loss_in_registers<PER_LANE>(row, samples.labels_b[b], write)
                            : loss_of_row(row, options.loss, options.output, nullptr,
                                          samples.targets_bj + b * row.n, write);
  });
}

// Writes the losses of a batch tile's samples behind the numbers of their rows, where nothing else is, and da_L in
// place of a_L. of_sample(row, n, b): a sample's loss. `first`: the batch tile's first sample.
template <typename OfSample>
DEVICE void write_each_loss(const Network& net, int first, int valid, OfSample of_sample) {
  each_top_row(net, valid, [&](int r, const TopRow& row) {
    float* a = net.top() + r * net.pitch_top();
    const float value = of_sample(a, row.n, (int64)first + min(r, valid - 1));
    if (TopRow::lane() == 0) a[round_up_16(row.n)] = value;
  });
}

// The losses up to SQUARED_ERROR.
DEVICE void write_losses(const Network& net, const Samples& samples, const LossOptions& options, int first, int valid) {
  write_each_loss(net, first, valid,
                  [&](float* a, int n, int64 b) { return sample_loss(a, n, samples, options, b); });
}

// The others, which are apart because they need registers.
DEVICE void write_further_losses(const Network& net, const Samples& samples, const LossOptions& options,
                                 const float* parameters, int first, int valid) {
  write_each_loss(net, first, valid, [&](float* a, int n, int64 b) {
    return loss_in_place(a, n, samples, options, b, [&](const TopRow& row, auto write) {
      return further_loss_of_row(row, options.loss, options.output, samples.labels_b ? samples.labels_b + b : nullptr,
                                 samples.targets_bj + b * row.n, parameters, write);
    });
  });
}

// Adds them to a split's sums. A lane adds every 32nd sample's, so that no bit depends on the rows of a batch tile.
// Warp 0.
DEVICE void add_losses(const Network& net, int valid) {
  const float* losses = net.top() + round_up_16(net[net.layers].n_in);
  double sum = net.loss_sums()[threadIdx.x];
#pragma unroll 1
  for (int r = threadIdx.x; r < valid; r += 32) sum += (double)losses[r * net.pitch_top()];
  net.loss_sums()[threadIdx.x] = sum;
}

// Rounds da_L to elements, rows in the same place.
DEVICE void round_top(const Network& net, int valid) {
  each_top_row(net, valid, [&](int r, const TopRow& row) {
    Element* to = net.inputs(net.layers) + r * net.pitch(net.layers);
    float gradients[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int j = TopRow::lane() + i * TOP_LANES;
      gradients[i] = r < valid && j < row.n ? row.a[j] : 0.0f;
    }
    __syncwarp();  // the other lanes have read theirs
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (i * TOP_LANES < round_up_16(row.n)) to_element(gradients[i], to[TopRow::lane() + i * TOP_LANES]);
  });
}
