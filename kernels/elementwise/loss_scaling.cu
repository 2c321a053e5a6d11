// Powers of two that keep float16's gradients within its range. A dynamic loss scale adapts from step to step:
//
//     scale_weights   out_b = weight_b scale                      so that da, and with it every gradient, has the scale
//     unscale         gradient /= scale, unscaled_loss = loss / scale                               before `begin_step`
//     update_scale    scale /= 2 after a skipped step, scale *= 2 after `growth_interval` good ones          after it
//
// The scale of a backward pass from a given gradient dy of the outputs follows from dy alone:
//
//     choose_scale    scale = 2^-e with 2^(e-1) <= max |dy| < 2^e, weight_b = scale       so that da has the scale
//     add_unscaled    out (+)= values / scale                                             after the backward pass
//
// gpuback/_backends/numpy/updates.py and gradient_scale.py compute the same. A scale is a power of two, so multiplying
// by it rounds nothing.
//
// A thread takes every 256 gridDim-th number. With B = 1024: `scale_weights` is 4 blocks.
//
// Variants: Accum (float or double). 256 threads.
#include "../common/optimizer_formulas.cuh"

enum Scaling { LOSS_SCALE = 0, GOOD_STEPS = 1, SKIPPED = 2 };

// out = weight times the scale, or the scale itself where there are no weights.
KERNEL __launch_bounds__(256) scale_weights(const Accum* weight_b, int64 n_batch, const double* scaling, Accum* out_b) {
  const Accum scale = (Accum)scaling[LOSS_SCALE];
  for (int64 b = (int64)blockIdx.x * 256 + threadIdx.x; b < n_batch; b += (int64)gridDim.x * 256)
    out_b[b] = weight_b ? weight_b[b] * scale : scale;
}

// gradient /= scale, unscaled_loss = loss / scale: powers of two.
KERNEL __launch_bounds__(256) unscale(
    Accum* gradient, int64 n, const Accum* loss, Accum* unscaled_loss, const double* scaling) {
  const Accum factor = (Accum)(1 / scaling[LOSS_SCALE]);
  for (int64 i = (int64)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64)gridDim.x * 256) gradient[i] *= factor;
  if (blockIdx.x == 0 && threadIdx.x == 0) *unscaled_loss = *loss * factor;
}

// Half the scale after no step, twice the scale after so many in a row. One block.
KERNEL __launch_bounds__(256) update_scale(const double* state, double growth_interval, double* scaling) {
  if (threadIdx.x != 0) return;
  const double scale = scaling[LOSS_SCALE], good_steps = scaling[GOOD_STEPS] + 1;
  if (state[APPLY] == 0) {
    scaling[LOSS_SCALE] = max(scale * 0.5, 0x1p-24);
    scaling[GOOD_STEPS] = 0;
    scaling[SKIPPED] += 1;
  } else if (good_steps < growth_interval) {
    scaling[GOOD_STEPS] = good_steps;
  } else {
    scaling[LOSS_SCALE] = min(scale * 2, 0x1p24);
    scaling[GOOD_STEPS] = 0;
  }
}

// The power of two that brings `largest` to between 1/2 and 1, or 1 if that is 0 or not finite. A float holds the scale
// and its inverse.
KERNEL __launch_bounds__(256) choose_scale(const double* largest, int64 n_batch, double* scale, Accum* weight_b) {
  int exponent = 0;
  if (is_finite(*largest)) frexp(*largest, &exponent);
  const double chosen = power_of_two(-max(-126, min(exponent, 126)));
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale = chosen;
  for (int64 b = (int64)blockIdx.x * 256 + threadIdx.x; b < n_batch; b += (int64)gridDim.x * 256)
    weight_b[b] = (Accum)chosen;
}

// out = values / scale, or out += values / scale. out may be values.
KERNEL __launch_bounds__(256) add_unscaled(
    const Accum* values, int64 n, const double* scale, int accumulate, Accum* out) {
  const Rounded<Accum> factor = (Accum)(1 / *scale);
  for (int64 i = (int64)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64)gridDim.x * 256) {
    const Rounded<Accum> value = factor * values[i];
    out[i] = canonical_nan(accumulate ? value + out[i] : value);
  }
}
