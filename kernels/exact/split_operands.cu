// Before an exact product: splits each operand into two slices of few bits, by the scales of its rows or columns.
//
//     largest_i = max_k |x_ik|, or max_i |x_ik| of a column; sigma = the power of two just above it
//     first  = rint(2^s x / sigma)                              integers of up to 2^s
//     second = rint(2^s (2^s x / sigma - first))                up to 2^(s-1)
//
// Every operation but the two rint is exact, so their order decides nothing. A row or column that holds a NaN or an
// infinity has a scale of NaN, and so have its slices.
//
// Shapes: x (rows, columns) of elements, slices (rows, columns) of doubles, row by row with a pitch each.
//
// A warp takes a row or up to 256 columns of one, its lanes every 32nd column; a block has 8 warps. Elements are
// independent, so there is no barrier. With 1024 x 256: 128 blocks, a row a warp.
//
// Variants: Element. 256 threads.
#include "exact_products.cuh"

// |x| as bits, which are ordered as magnitudes are, with infinity above every number and NaN above that.
DEVICE uint32 magnitude(Element x) { return __float_as_uint(to_accum(x)) & 0x7fffffffu; }

// largest_r = max_c |x_rc|. A warp to a row.
KERNEL __launch_bounds__(256) largest_of_rows(
    const Element* x_rc, int x_pitch, float* largest_r, int rows, int columns) {
  const int lane = threadIdx.x % 32;
  for (int row = blockIdx.x * 8 + threadIdx.x / 32; row < rows; row += gridDim.x * 8) {
    const Element* x = x_rc + (int64)row * x_pitch;
    uint32 largest = 0;
#pragma unroll 4
    for (int column = lane; column < columns; column += 32) largest = max(largest, magnitude(x[column]));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    if (lane == 0) largest_r[row] = __uint_as_float(largest);
  }
}

// largest_c = max_r |x_rc|, onto zeros. A block takes 32 columns, its warps a row each at a time; of several blocks on
// the same columns each takes some of the rows. The maximum of a column is the same number in whatever order they come.
KERNEL __launch_bounds__(256) largest_of_columns(
    const Element* x_rc, int x_pitch, float* largest_c, int rows, int columns) {
  const int groups = ceil_div(columns, 32), blocks = gridDim.x / groups;
  const int column = blockIdx.x % groups * 32 + threadIdx.x % 32;
  if (column >= columns) return;
  uint32 largest = 0;
#pragma unroll 4
  for (int row = blockIdx.x / groups * 8 + threadIdx.x / 32; row < rows; row += blocks * 8)
    largest = max(largest, magnitude(x_rc[(int64)row * x_pitch + column]));
  atomicMax((uint32*)largest_c + column, largest);
}

// Splits x by the scales of its rows, or with `by_columns` of its columns.
KERNEL __launch_bounds__(256) split_operands(
    const Element* x_rc, int x_pitch, const float* largest, int by_columns, int bits, double* first_rc, int first_pitch,
    double* second_rc, int second_pitch, int rows, int columns) {
  each_element(rows, columns, [=](int row, int column) {
    const Double x = to_accum(x_rc[(int64)row * x_pitch + column]);
    const Double scaled = x * inverse_scale(largest[by_columns ? column : row], bits);
    const Double first = rint(scaled.value);
    first_rc[(int64)row * first_pitch + column] = first.value;
    second_rc[(int64)row * second_pitch + column] = rint(((scaled - first) * power_of_two(bits)).value);
  });
}
