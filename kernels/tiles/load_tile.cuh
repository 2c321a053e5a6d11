// Loads a tile from global to shared memory.
#pragma once
#include "../common/types.cuh"

// Copies a rectangle of a matrix into a tile, with zeros outside the matrix. Each of THREADS threads copies as much.
// Where the matrix's rows are aligned the copies are asynchronous, else they are done on return.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, typename T>
DEVICE void load_tile(T* tile, const Matrix<T>& matrix, int row0, int column0, bool aligned) {
  const int width = Pack<T>::count, packs = COLUMNS / width;
  const int at_once = THREADS / packs;  // rows that all threads copy at once
  static_assert(COLUMNS % width == 0 && PITCH % width == 0, "rows of the tile are copied 16 bytes at a time");
  static_assert(THREADS % packs == 0 && ROWS % at_once == 0, "every thread copies as much");
  const int r = (int)threadIdx.x / packs, c = (int)threadIdx.x % packs * width;
  T* to = tile + r * PITCH + c;
  const T* from = matrix.at + (int64)(row0 + r) * matrix.pitch + (column0 + c);
  const int64 stride = (int64)at_once * matrix.pitch;

  if (aligned && row0 + ROWS <= matrix.rows && column0 + COLUMNS <= matrix.columns) {
#pragma unroll
    for (int i = 0; i < ROWS / at_once; ++i) cp_async_16(to + i * at_once * PITCH, from + i * stride, 16);
    return;
  }
  const int columns = max(0, min(width, matrix.columns - (column0 + c)));
#pragma unroll 1
  for (int i = 0; i < ROWS / at_once; ++i) {
    const int valid = row0 + r + i * at_once < matrix.rows ? columns : 0;
    const T* source = valid ? from + i * stride : matrix.at;
    if (aligned)
      cp_async_16(to + i * at_once * PITCH, source, valid * (int)sizeof(T));
    else
      *(Group<T, width>*)(to + i * at_once * PITCH) = load_group<width>(source, valid, false);
  }
}
