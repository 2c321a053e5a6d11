// A block's tile of a matrix product C = A B without tensor cores: float32 or float64, any shape, any alignment.
//
//     A (M x K)                      B (K x N)
//     stored [m][k] or, transposed, [k][m]        stored [k][n] or, transposed, [n][k]
//
// 256 threads as 16 x 16. A step takes 8 of K: its slices of A and B lie in shared memory with k outside,
//
//     a_tile[k][m]  pitch M + 16 bytes      b_tile[k][n]  pitch N + 16 bytes
//
// and thread (row, column) of the 16 x 16 adds the outer products of its M/16 numbers of A and N/16 of B, four
// neighbours at a time, 64 apart: with M = 128 rows 4 row ... 4 row + 3 and 64 + 4 row .... The pitch puts
// the 8 k of 4 neighbouring m into 32 different banks, so that a slice stored [m][k], which threads read along k and write
// along m, is turned without conflicts. There are two slices: while one is multiplied, the next is on its way in registers.
//
// Every 128 of K the sums are added to the totals and begin at 0, so that no number passes through more than 128 + K / 128
// additions.
#pragma once
#include "types.cuh"

template <typename T, int M, int N>
struct SimtTile {
  static constexpr int STEP = 8, CHAIN = 128, THREADS = 256;
  static constexpr int PAD = 16 / sizeof(T);
  static constexpr int PITCH_A = M + PAD, PITCH_B = N + PAD;
  static constexpr int ROWS = M / 16, COLUMNS = N / 16;  // of C, held by a thread
  static constexpr int BLOCKS = ROWS * COLUMNS * sizeof(T) <= 64 ? 2 : 1;  // in flight on a multiprocessor: registers allow it
  static constexpr int SLICE = STEP * (PITCH_A + PITCH_B);
  static constexpr int SHARED = 2 * SLICE > M * N ? 2 * SLICE : M * N;  // numbers
  static_assert(M % 64 == 0 && N % 64 == 0, "threads hold four neighbours, 64 apart");

  // Where this thread's i-th row and j-th column lie in the tile.
  static DEVICE int row(int i) { return (int)threadIdx.x / 16 * 4 + i / 4 * 64 + i % 4; }
  static DEVICE int column(int j) { return (int)threadIdx.x % 16 * 4 + j / 4 * 64 + j % 4; }

  T* shared;  // SHARED numbers: two slices; later the tile of C
  T totals[ROWS][COLUMNS];
  T row_sum;

  // totals = A[m0 ..][k0 .. k1) B[k0 .. k1)[n0 ..], elements outside the matrices counting as 0.
  // If asked for, row_sum of the threads below M becomes the sum over k of A's row m0 + threadIdx.x.
  template <bool TRANSPOSED_A, bool TRANSPOSED_B>
  DEVICE void multiply(Matrix<T> a, Matrix<T> b, int m0, int n0, int k0, int k1, bool with_row_sum) {
    T sums[ROWS][COLUMNS], next_a[M * STEP / THREADS], next_b[N * STEP / THREADS];
    T slice_sum = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) totals[i][j] = sums[i][j] = 0;
    row_sum = 0;

    fetch<M, TRANSPOSED_A>(a, m0, k0, k1, next_a);
    fetch<N, !TRANSPOSED_B>(b, n0, k0, k1, next_b);
    for (int k = k0, slice = 0; k < k1; k += STEP, slice ^= 1) {
      T* a_tile = shared + slice * SLICE;
      T* b_tile = a_tile + STEP * PITCH_A;
      put<M, TRANSPOSED_A, PITCH_A>(a_tile, next_a);
      put<N, !TRANSPOSED_B, PITCH_B>(b_tile, next_b);
      __syncthreads();  // the slice is complete; and nobody still reads the one that the next step overwrites
      if (k + STEP < k1) {
        fetch<M, TRANSPOSED_A>(a, m0, k + STEP, k1, next_a);
        fetch<N, !TRANSPOSED_B>(b, n0, k + STEP, k1, next_b);
      }
#pragma unroll
      for (int kk = 0; kk < STEP; ++kk) {
        T a_part[ROWS], b_part[COLUMNS];
        neighbours<ROWS>(a_tile + kk * PITCH_A + threadIdx.x / 16 * 4, a_part);
        neighbours<COLUMNS>(b_tile + kk * PITCH_B + threadIdx.x % 16 * 4, b_part);
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) sums[i][j] += a_part[i] * b_part[j];
      }
      if (with_row_sum && threadIdx.x < M)
#pragma unroll
        for (int kk = 0; kk < STEP; ++kk) slice_sum += a_tile[kk * PITCH_A + threadIdx.x];
      if ((k - k0) % CHAIN == CHAIN - STEP || k + STEP >= k1) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) totals[i][j] += sums[i][j], sums[i][j] = 0;
        row_sum += slice_sum, slice_sum = 0;
      }
    }
    __syncthreads();  // shared memory is free again
  }

  // The totals into shared memory, row by row, for threads to walk along rows.
  DEVICE void share() {
    const int width = Pack<T>::count;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; j += width) {
        Pack<T> pack;
#pragma unroll
        for (int p = 0; p < width; ++p) pack.at[p] = totals[i][j + p];
        *(Pack<T>*)(shared + row(i) * N + column(j)) = pack;
      }
    __syncthreads();  // the tile is complete
  }

 private:
  // One slice of an operand from global memory into registers: STEP of k, WIDTH of the other index from `first` on.
  // K_OUTSIDE: the operand is stored [k][.], else [.][k]. Neighbouring threads read neighbouring addresses.
  template <int WIDTH, bool K_OUTSIDE>
  static DEVICE void fetch(const Matrix<T>& matrix, int first, int k0, int k1, T (&next)[WIDTH * STEP / THREADS]) {
#pragma unroll
    for (int i = 0; i < WIDTH * STEP / THREADS; ++i) {
      const int index = threadIdx.x + i * THREADS;
      const int k = k0 + (K_OUTSIDE ? index / WIDTH : index % STEP);
      const int other = first + (K_OUTSIDE ? index % WIDTH : index / STEP);
      const int row = K_OUTSIDE ? k : other, column = K_OUTSIDE ? other : k;
      const bool inside = k < k1 && row < matrix.rows && column < matrix.columns;
      next[i] = inside ? matrix.at[(int64)row * matrix.pitch + column] : T(0);
    }
  }

  // The same slice from registers into shared memory, k outside.
  template <int WIDTH, bool K_OUTSIDE, int PITCH>
  static DEVICE void put(T* tile, const T (&next)[WIDTH * STEP / THREADS]) {
#pragma unroll
    for (int i = 0; i < WIDTH * STEP / THREADS; ++i) {
      const int index = threadIdx.x + i * THREADS;
      const int k = K_OUTSIDE ? index / WIDTH : index % STEP;
      const int other = K_OUTSIDE ? index % WIDTH : index / STEP;
      tile[k * PITCH + other] = next[i];
    }
  }

  // Groups of four neighbours, 64 apart, 16 bytes at a time.
  template <int COUNT>
  static DEVICE void neighbours(const T* first, T (&part)[COUNT]) {
    const int width = Pack<T>::count;
#pragma unroll
    for (int i = 0; i < COUNT; i += width) {
      const Pack<T> pack = *(const Pack<T>*)(first + i / 4 * 64 + i % 4);
#pragma unroll
      for (int j = 0; j < width; ++j) part[i + j] = pack.at[j];
    }
  }
};
