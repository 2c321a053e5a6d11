// The epilogue of a warpgroup's product: from sums in registers to panels, or to float32 in global memory.
//
// A warp holds 16 rows of 64. It takes 16 columns at a time, a lane's 8 sums of them: piecewise linear activations
// where the sums lie, smooth ones, whose code is long, in a loop that shifts the sums down.
#pragma once
#include "epilogue.cuh"
#include "mma_fragments.cuh"
#include "warpgroup_products.cuh"

const int PANEL_ROWS = 64, PANEL_BYTES = PANEL_ROWS * 128;  // of a panel with a row for each of a warpgroup's

// This warp's first row among its warpgroup's 64.
DEVICE int warpgroup_row() { return threadIdx.x / 32 % 4 * 16; }

// This lane's row of the warp's 16 rows and columns 16 p ... 16 p + 15, where panels follow each other.
DEVICE uint32 piece(uint32 panels, int p) {
  return panel_fragment(panels + p / 4 * PANEL_BYTES, warpgroup_row(), p % 4 * 16);
}

template <typename T>
DEVICE void unpack(const uint32 (&pairs)[4], float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) Wgmma<T>::unpack(pairs[i], values[2 * i], values[2 * i + 1]);
}

template <typename T>
DEVICE void pack(const float (&values)[8], uint32 (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = Wgmma<T>::pack(values[2 * i], values[2 * i + 1]);
}

// Sums d of 64 rows into panels, rounded.
template <typename T, int Count>
DEVICE void sums_to_panels(const float (&d)[Count], uint32 to) {
#pragma unroll
  for (int p = 0; p < Count / 8; ++p) {
    float values[8];
    uint32 pairs[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = d[p * 8 + i];
    pack<T>(values, pairs);
    stmatrix_x4(piece(to, p), pairs);
  }
}

// Sums d of 64 rows times g'(source) into panels, for a piecewise linear activation with a kink. ReLU's are rounded
// first: where its g' is 0, a sum too large for an element makes NaN.
template <typename T, int ACTIVATION, int Count>
DEVICE void linear_delta_to_panels(const float (&d)[Count], uint32 source, uint32 to) {
#pragma unroll
  for (int p = 0; p < Count / 8; ++p) {
    float values[8];
    uint32 from[4], pairs[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = d[p * 8 + i];
    ldmatrix_x4(from, piece(source, p));
    if (ACTIVATION == RELU) {
      pack<T>(values, pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = Wgmma<T>::mul(pairs[i], Wgmma<T>::set_gt(from[i], 0));
    } else {
      float numbers[8];
      unpack<T>(from, numbers);
      times_derivative_linear(ACTIVATION, values, numbers);
      pack<T>(values, pairs);
    }
    stmatrix_x4(piece(to, p), pairs);
  }
}

// The same for a smooth activation. Shifts d down.
template <typename T, int Count>
DEVICE void smooth_delta_to_panels(float (&d)[Count], uint32 source, uint32 to, int activation) {
#pragma unroll 1
  for (int p = 0; p < Count / 8; ++p) {
    float values[8], from[8];
    uint32 pairs[4];
    ldmatrix_x4(pairs, piece(source, p));
    unpack<T>(pairs, from);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = d[i];
    times_derivative_smooth(activation, values, from);
    pack<T>(values, pairs);
    stmatrix_x4(piece(to, p), pairs);
#pragma unroll
    for (int i = 8; i < Count; ++i) d[i - 8] = d[i];
  }
}

// Sums d of 64 rows times g'(source) into panels, as elements.
template <typename T, int Count>
DEVICE void delta_to_panels(float (&d)[Count], uint32 source, uint32 to, int activation) {
  switch (activation) {
    case IDENTITY: return sums_to_panels<T>(d, to);
    case RELU: return linear_delta_to_panels<T, RELU>(d, source, to);
    case LEAKY_RELU: return linear_delta_to_panels<T, LEAKY_RELU>(d, source, to);
    default: smooth_delta_to_panels<T>(d, source, to, activation);
  }
}

template <typename T, int ACTIVATION, int Count>
DEVICE void linear_activations_to_panels(const float (&d)[Count], uint32 to) {
#pragma unroll
  for (int p = 0; p < Count / 8; ++p) {
    float values[8];
    uint32 pairs[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = d[p * 8 + i];
    activate_linear(ACTIVATION, values);
    pack<T>(values, pairs);
    stmatrix_x4(piece(to, p), pairs);
  }
}

// g(d) of 64 rows into panels for a smooth activation. Where g' is computed from a, g reads what is rounded, as g' will.
// Shifts d down.
template <typename T, int Count>
DEVICE void smooth_activations_to_panels(float (&d)[Count], uint32 to, int activation) {
#pragma unroll 1
  for (int p = 0; p < Count / 8; ++p) {
    float values[8];
    uint32 pairs[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = d[i];
    if (derivative_from_a(activation)) {
      pack<T>(values, pairs);
      unpack<T>(pairs, values);
    }
    activate_smooth(activation, values);
    pack<T>(values, pairs);
    stmatrix_x4(piece(to, p), pairs);
#pragma unroll
    for (int i = 8; i < Count; ++i) d[i - 8] = d[i];
  }
}

// g(d) of 64 rows into panels, as elements.
template <typename T, int Count>
DEVICE void activations_to_panels(float (&d)[Count], uint32 to, int activation) {
  switch (activation) {
    case IDENTITY: return sums_to_panels<T>(d, to);
    case RELU: return linear_activations_to_panels<T, RELU>(d, to);
    case LEAKY_RELU: return linear_activations_to_panels<T, LEAKY_RELU>(d, to);
    default: smooth_activations_to_panels<T>(d, to, activation);
  }
}

// Sums d of 64 rows from (row0, column0) on, times a factor, as float32: a quad's stores fill 32 bytes.
template <int Count>
DEVICE void sums_to_global(const float (&d)[Count], float* to, int pitch, int rows, int columns, int row0, int column0,
                           float factor) {
  const bool aligned = (uint64)to % 8 == 0 && pitch % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + warpgroup_row() + fragment_row(2 * half);
    float* line = to + (int64)row * pitch;
#pragma unroll
    for (int j = 0; j < Count / 4; ++j) {
      const int column = column0 + j * 8 + fragment_column(0);
      const Group<float, 2> pair = {d[4 * j + 2 * half] * factor, d[4 * j + 2 * half + 1] * factor};
      if (row < rows && column < columns) store_group(line + column, pair, min(2, columns - column), aligned);
    }
  }
}

// Sums of 64 x 2 Count of dw from (o0, i0) on, to where it goes.
template <int Count>
DEVICE void add_weights(const float (&sums)[Count], const Gradient& to, int o0, int i0) {
  const int AT_ONCE = 8;  // earlier values on their way together
  const bool aligned = (uint64)to.dw_oi % 8 == 0 && to.n_in % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int o = o0 + warpgroup_row() + fragment_row(2 * half), i = i0 + fragment_column(0);
    float* line = to.dw_oi + (int64)o * to.n_in + i;
    const int valid = o < to.n_out ? to.n_in - i : 0;
#pragma unroll
    for (int first = 0; first < Count / 4; first += AT_ONCE) {
      Group<float, 2> pairs[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        pairs[j] = load_group<2>(line + (first + j) * 8, to.accumulate ? valid - (first + j) * 8 : 0, aligned);
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const float* pair = sums + (first + j) * 4 + 2 * half;
#pragma unroll
        for (int e = 0; e < 2; ++e) pairs[j].at[e] += pair[e] * to.factor;
        store_group(line + (first + j) * 8, pairs[j], valid - (first + j) * 8, aligned);
      }
    }
  }
}
