// A block's tile of a matrix product C = A B without tensor cores: float32 or float64, any shape, any alignment.
//
//     A (M x K)                      B (K x N)
//     stored [m][k] or, transposed, [k][m]        stored [k][n] or, transposed, [n][k]
//
// A step takes 16 of K: its slices of A and B lie in shared memory with k outside,
//
//     a_slice[k][m]  pitch M + 4      b_slice[k][n]  pitch N + 4
//
// in two places: while one slice is multiplied, the next is on its way in registers. 8 warps as 4 x 2 hold M/4 x N/2 of C
// each, and their lanes as 4 x 8 groups of neighbours (16 bytes: 4 float or 2 double) in both directions. With 128 x 128 and
// float a thread holds 8 x 8: 2 x 2 groups, 16 rows and 32 columns apart, for which a step of K reads 4 x 16 bytes and does 64
// multiplications. Lanes l and l ^ 1 differ in their row, l and l ^ 2 in their column: so half a warp's 16-byte reads are of at
// most 128 different bytes, one wavefront.
//
// Every 128 of K the sums are added to the tile of totals, in shared memory too, and begin at 0, so that no number passes
// through more than 128 + K / 128 additions.
#pragma once
#include "fragments.cuh"

template <typename T, int M, int N>
struct SimtTile {
  static constexpr int THREADS = M > 64 ? 128 : 256, STEP = 16, CHAIN = 128;
  static constexpr int WIDTH = Pack<T>::count;  // neighbours
  static constexpr int PITCH_A = M + 4, PITCH_B = N + 4, SLICE = STEP * (PITCH_A + PITCH_B);
  static constexpr int SHARED = M * N + 2 * SLICE;                            // numbers
  static constexpr int WARPS_N = THREADS / 32 / 4;                            // beside each other, 4 on top of each other
  static constexpr int WARP_M = M / 4, WARP_N = N / WARPS_N;                  // of C, held by a warp
  static constexpr int ROWS = WARP_M / 4, COLUMNS = WARP_N / 8;               // by a thread
  static constexpr int BLOCKS = sizeof(T) == 8 ? 2 : 3;                       // in flight on a multiprocessor: registers allow them
  static_assert(ROWS % WIDTH == 0 && COLUMNS % WIDTH == 0, "threads hold groups of neighbours");
  static_assert(M * STEP % (THREADS * WIDTH) == 0 && N * STEP % (THREADS * WIDTH) == 0, "every thread fetches as much");

  typedef Group<T, WIDTH> Neighbours;

  static DEVICE int warp() { return threadIdx.x / 32; }
  static DEVICE int lane_row() { return threadIdx.x / 16 % 2 * 2 + threadIdx.x % 2; }
  static DEVICE int lane_column() { return threadIdx.x / 2 % 8; }
  static DEVICE int offset_row(int i) { return i / WIDTH * 4 * WIDTH + i % WIDTH; }
  static DEVICE int offset_column(int j) { return j / WIDTH * 8 * WIDTH + j % WIDTH; }

  // Where this thread's i-th row and j-th column lie in the tile.
  static DEVICE int row(int i) { return warp() / WARPS_N * WARP_M + lane_row() * WIDTH + offset_row(i); }
  static DEVICE int column(int j) { return warp() % WARPS_N * WARP_N + lane_column() * WIDTH + offset_column(j); }

  T* shared;  // SHARED numbers: the tile of totals, then two slices
  T row_sum;

  // Where neighbours lie in the tile of totals: row by row, and in every other group of rows 16 columns changed place with
  // the next 16 (float), so that lanes of two rows reach all banks.
  DEVICE Neighbours* totals(int row, int column) const {
    return (Neighbours*)(shared + row * N + (column ^ (row & WIDTH) * 4));
  }

  // The same for a thread's own i-th row and j-th column, at a constant distance from its first.
  DEVICE Neighbours* held(int i, int j) const {
    return (Neighbours*)((T*)totals(row(0), column(0)) + offset_row(i) * N + offset_column(j));
  }

  // totals = A[m0 ..][k0 .. k1) B[k0 .. k1)[n0 ..], elements outside the matrices counting as 0; k0 < k1.
  // If asked for, row_sum of the threads below M becomes the sum over k of A's row m0 + threadIdx.x.
  template <bool TRANSPOSED_A, bool TRANSPOSED_B>
  DEVICE void multiply(const Matrix<T>& a, const Matrix<T>& b, int m0, int n0, int k0, int k1, bool with_row_sum) {
    Operand<M, TRANSPOSED_A, PITCH_A> operand_a(a, m0, k0);
    Operand<N, !TRANSPOSED_B, PITCH_B> operand_b(b, n0, k0);
    operand_a.fetch(slice(0), k0, k1);
    operand_b.fetch(slice(0) + STEP * PITCH_A, k0, k1);
    cp_async_commit();
    row_sum = 0;
    int k = k0;
#pragma unroll 1
    while (k < k1) {
      const bool first = k == k0;
      const int end = min(k + CHAIN, k1);
      T sums[ROWS][COLUMNS], chain_sum = 0;
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) sums[i][j] = 0;
#pragma unroll 1
      for (; k < end; k += STEP) {
        const int which = (k - k0) / STEP % 2;
        T* a_slice = slice(which);
        T* b_slice = a_slice + STEP * PITCH_A;
        operand_a.put(a_slice);
        operand_b.put(b_slice);
        cp_async_wait<0>();
        __syncthreads();  // the slice is complete; and nobody still reads the one that is fetched next
        if (k + STEP < k1) {
          operand_a.fetch(slice(which ^ 1), k + STEP, k1);
          operand_b.fetch(slice(which ^ 1) + STEP * PITCH_A, k + STEP, k1);
          cp_async_commit();
        }
        multiply_slice(a_slice + row(0), b_slice + column(0), sums);
        if (with_row_sum && threadIdx.x < M)
#pragma unroll
          for (int kk = 0; kk < STEP; ++kk) chain_sum += a_slice[kk * PITCH_A + threadIdx.x];
      }
      add_to_totals(sums, first);
      row_sum += chain_sum;
    }
    __syncthreads();  // the tile of totals is complete
  }

 private:
  static DEVICE void load_fragments(const T* a_slice, const T* b_slice, int k, Neighbours (&a)[ROWS / WIDTH],
                                    Neighbours (&b)[COLUMNS / WIDTH]) {
#pragma unroll
    for (int i = 0; i < ROWS; i += WIDTH) a[i / WIDTH] = *(const Neighbours*)(a_slice + k * PITCH_A + offset_row(i));
#pragma unroll
    for (int j = 0; j < COLUMNS; j += WIDTH) b[j / WIDTH] = *(const Neighbours*)(b_slice + k * PITCH_B + offset_column(j));
  }

  static DEVICE void multiply_slice(const T* a_slice, const T* b_slice, T (&sums)[ROWS][COLUMNS]) {
    Neighbours a[2][ROWS / WIDTH], b[2][COLUMNS / WIDTH];
    load_fragments(a_slice, b_slice, 0, a[0], b[0]);
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k + 1 < STEP) load_fragments(a_slice, b_slice, k + 1, a[(k + 1) % 2], b[(k + 1) % 2]);
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
          const int j = i % 2 ? COLUMNS - 1 - n : n;  // back and forth: each multiplication shares an operand with the one before it
          sums[i][j] += a[k % 2][i / WIDTH].at[i % WIDTH] * b[k % 2][j / WIDTH].at[j % WIDTH];
        }
    }
  }

  // Each thread adds to what it holds, so no barrier is needed.
  DEVICE void add_to_totals(const T (&sums)[ROWS][COLUMNS], bool first) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; j += WIDTH) {
        Neighbours total = {};
        if (!first) total = *held(i, j);
#pragma unroll
        for (int p = 0; p < WIDTH; ++p) total.at[p] += sums[i][j + p];
        *held(i, j) = total;
      }
  }

  DEVICE T* slice(int which) const { return shared + M * N + which * SLICE; }

  // What a thread brings of an operand's slices, STEP of k and SIZE of the other index from `first` on. K_OUTSIDE: that is how the
  // operand is stored, and slices are copied, 512 bytes by a warp. Else a thread fetches neighbours along k, a warp 32 bytes
  // of 16 rows, into registers, and puts them into shared memory turned, in 32 different banks.
  template <int SIZE, bool K_OUTSIDE, int PITCH>
  struct Operand {
    static constexpr int SHARE = SIZE * STEP / (THREADS * WIDTH);  // neighbours that a thread brings
    static constexpr int REPEAT = 2 * SIZE > THREADS ? 2 * SIZE / THREADS : 1;  // how often along the other index, if not K_OUTSIDE

    Matrix<T> matrix;
    int first;
    bool aligned, inside;  // 16 bytes at a time; for every k, the whole SIZE lies in the matrix
    const T* from;         // the first neighbours of the next fetch
    Neighbours next[SHARE];

    DEVICE Operand(const Matrix<T>& matrix, int first, int k0) : matrix(matrix), first(first) {
      aligned = aligned_rows(matrix.at, matrix.pitch);
      inside = first + SIZE <= (K_OUTSIDE ? matrix.columns : matrix.rows);
      const int row = K_OUTSIDE ? k0 + k() : first + other(), column = K_OUTSIDE ? first + other() : k0 + k();
      from = matrix.at + (int64)row * matrix.pitch + column;
    }

    // Where in a slice a thread's first neighbours lie, and its i-th ones behind these.
    static DEVICE int k() { return K_OUTSIDE ? threadIdx.x / (SIZE / WIDTH) : (threadIdx.x / (2 * SIZE) * 2 + threadIdx.x % 2) * WIDTH; }
    static DEVICE int other() { return K_OUTSIDE ? threadIdx.x % (SIZE / WIDTH) * WIDTH : threadIdx.x / 2 % SIZE; }
    static DEVICE int k_behind(int i) { return K_OUTSIDE ? i * (THREADS * WIDTH / SIZE) : i / REPEAT * (THREADS * REPEAT / SIZE * WIDTH); }
    static DEVICE int other_behind(int i) { return K_OUTSIDE ? 0 : i % REPEAT * (THREADS / 2); }

    DEVICE void fetch(T* slice, int k0, int k1) {
      const bool whole = aligned && inside && k0 + STEP <= k1;
      if (K_OUTSIDE) {
        T* to = slice + k() * PITCH + other();
        if (whole) {
#pragma unroll
          for (int i = 0; i < SHARE; ++i) cp_async_16(to + k_behind(i) * PITCH, from + (int64)k_behind(i) * matrix.pitch, 16);
        } else {
          load_tile<STEP, SIZE, PITCH, THREADS>(slice, matrix, k0, first, aligned);
        }
        from += (int64)STEP * matrix.pitch;
      } else {
        if (whole) {
#pragma unroll
          for (int i = 0; i < SHARE; ++i)
            next[i] = *(const Neighbours*)(from + (int64)other_behind(i) * matrix.pitch + k_behind(i));
        } else {
#pragma unroll
          for (int i = 0; i < SHARE; ++i) {
            const int valid = first + other() + other_behind(i) < matrix.rows ? k1 - k0 - k() - k_behind(i) : 0;
            next[i] = load_group<WIDTH>(from + (int64)other_behind(i) * matrix.pitch + k_behind(i), valid, aligned);
          }
        }
        from += STEP;
      }
    }

    DEVICE void put(T* slice) const {
      if (K_OUTSIDE) return;
      T* to = slice + k() * PITCH + other();
#pragma unroll
      for (int i = 0; i < SHARE; ++i)
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) to[(k_behind(i) + j) * PITCH + other_behind(i)] = next[i].at[j];
    }
  };
};
