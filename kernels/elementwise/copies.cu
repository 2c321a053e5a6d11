// Copies as elements, rows padded to 16 bytes: what products read.
//
//     copy_rows      out_bi = x_bi, rounded
//     copy_elements  out_bi = x_bi, elements both: to padded rows, or back from them
//     copy_weights   every layer's W out of theta, in one launch
//
// What is rounded has one pattern of bits for NaN. A warp takes a row, its lanes every 32nd column. With 1024 rows: 128 blocks of 8
// warps.
//
// Variants: Accum (float or double) of what is copied, Element. 256 threads.
#include "../common/canonical_nan.cuh"

// x and out (B, n) row by row with a pitch each.
KERNEL __launch_bounds__(256) copy_rows(
    const Accum* x_bi, int x_pitch, Element* out_bi, int out_pitch, int n_batch, int n) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8)
    for (int i = threadIdx.x % 32; i < n; i += 32)
      to_element_canonical(x_bi[(int64)b * x_pitch + i], out_bi[(int64)b * out_pitch + i]);
}

KERNEL __launch_bounds__(256) copy_elements(
    const Element* x_bi, int x_pitch, Element* out_bi, int out_pitch, int n_batch, int n) {
  for (int b = blockIdx.x * 8 + threadIdx.x / 32; b < n_batch; b += gridDim.x * 8)
    for (int i = threadIdx.x % 32; i < n; i += 32) out_bi[(int64)b * out_pitch + i] = x_bi[(int64)b * x_pitch + i];
}

// For each layer `table` holds: the first of its rows among the rows of all layers; n_in; where its weights begin in
// theta; where its copy begins; the copy's pitch. After the last layer stands the number of all rows.
KERNEL __launch_bounds__(256) copy_weights(const Accum* theta, Element* copies, const int64* table, int layers) {
  const int64 rows = table[layers * 5];
  for (int64 row = blockIdx.x * 8 + threadIdx.x / 32; row < rows; row += gridDim.x * 8) {
    int layer = 0;
    while (row >= table[(layer + 1) * 5]) ++layer;
    const int64* entry = table + layer * 5;
    const int64 r = row - entry[0], n_in = entry[1];
    const Accum* from = theta + entry[2] + r * n_in;
    Element* to = copies + entry[3] + r * entry[4];
    for (int i = threadIdx.x % 32; i < n_in; i += 32) to_element_canonical(from[i], to[i]);
  }
}
