// The epilogue: what happens to sums before they are stored, four neighbours at a time.
#pragma once
#include "../common/activations.cuh"

typedef Group<float, 4> Four;

template <typename T>
DEVICE Four to_accum(const Group<T, 4>& values) {
  return {to_accum(values.at[0]), to_accum(values.at[1]), to_accum(values.at[2]), to_accum(values.at[3])};
}

template <typename T>
DEVICE Group<T, 4> to_elements(const Four& values) {
  Group<T, 4> elements;
#pragma unroll
  for (int j = 0; j < 4; ++j) to_element(values.at[j], elements.at[j]);
  return elements;
}

// A matrix that is written, as elements or as float32.
struct Output {
  void* at;
  int pitch, rows, columns;
  int is_float32;
};

template <typename T>
DEVICE void store(const Output& out, int row, int column, const Four& values, bool aligned) {
  const int64 index = (int64)row * out.pitch + column;
  const int valid = min(4, out.columns - column);
  if (out.is_float32)
    store_group((float*)out.at + index, values, valid, aligned);
  else
    store_group((T*)out.at + index, to_elements<T>(values), valid, aligned);
}

// Whether four elements of a row of an output may be stored in one access.
template <typename T>
DEVICE bool aligned_rows(const Output& out) {
  return out.is_float32 ? aligned_rows((const float*)out.at, out.pitch) : aligned_rows((const T*)out.at, out.pitch);
}

// d <- d factor g'(source), for N groups of four at once: one look at `activation`, and nothing waits for its
// neighbour.
template <typename T, int N>
DEVICE void finish_delta(Four (&d)[N], const Group<T, 4> (&source)[N], int activation, float factor) {
  float values[4 * N], sources[4 * N];
#pragma unroll
  for (int k = 0; k < 4 * N; ++k) {
    values[k] = d[k / 4].at[k % 4] * factor;
    sources[k] = to_accum(source[k / 4].at[k % 4]);
  }
  times_derivative(activation, values, sources);
#pragma unroll
  for (int k = 0; k < 4 * N; ++k) d[k / 4].at[k % 4] = values[k];
}

// Where dw and db go: (+)= factor times the sum.
struct Gradient {
  float* dw_oi;  // (n_out, n_in)
  float* db_o;   // (n_out)
  int n_out, n_in;
  float factor;
  int accumulate;
};

DEVICE void add_weight(const Gradient& to, int o, int i, float sum) {
  if (o >= to.n_out || i >= to.n_in) return;
  float* address = to.dw_oi + (int64)o * to.n_in + i;
  *address = (to.accumulate ? *address : 0.0f) + sum * to.factor;
}

DEVICE void add_bias(const Gradient& to, int o, float sum) {
  if (o < to.n_out) to.db_o[o] = (to.accumulate ? to.db_o[o] : 0.0f) + sum * to.factor;
}
