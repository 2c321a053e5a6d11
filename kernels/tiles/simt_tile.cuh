// A block's tile of a matrix product C = A B without tensor cores: float32 or float64, any shape, any alignment.
//
//     A (M x K)                                   B (K x N)
//     stored [m][k] or, transposed, [k][m]        stored [k][n] or, transposed, [n][k]
//
// A step takes 16 of K. Its stages of A and B lie K-major in shared memory,
//
//     a_stage[k][m]  pitch M + 4      b_stage[k][n]  pitch N + 4
//
// in two stages: while one is multiplied, the next is on its way. An operand that is stored K-major comes by
// asynchronous copies. Else it comes through registers, since it has to be transposed.
//
// 256 threads. 8 warps as 4 x 2 hold M/4 x N/2 of C each, and their lanes as 4 x 8 groups of neighbours (16 bytes: 4
// float or 2 double) in both directions. With 128 x 128 and float a thread holds 8 x 8: 2 x 2 groups, 16 rows and 32
// columns apart, for which a k reads 4 times 16 bytes and does 64 multiplications. Lanes l and l ^ 1 differ in their
// row only, l and l ^ 2 in their column: so the 16-byte reads of half a warp are of at most 128 different bytes, which
// shared memory delivers at once.
//
// Every 128 of K the sums are added to the tile of totals, in shared memory too, and begin at 0, so that no number
// passes through more than 128 + K / 128 additions. In registers the totals would cost the second block on a
// multiprocessor.
//
// 128 x 128 in float with (B, nO, nI) = (8192, 4096, 4096) on an H200: 68 % of the FP32 peak, 90 % of cuBLAS's speed. A
// scheduler issues 4 instructions in 5 cycles, 6 of 7 of them multiplications. In the fifth its warps wait, for
// register banks among others.
#pragma once
#include "load_tile.cuh"

template <typename T, int M, int N>
struct SimtTile {
  static constexpr int THREADS = 256, STEP = 16, FLUSH_K = 128;
  static constexpr int WIDTH = Pack<T>::count;  // neighbours
  static constexpr int PITCH_A = M + 4, PITCH_B = N + 4, STAGE = STEP * (PITCH_A + PITCH_B);
  static constexpr int SHARED = M * N + 2 * STAGE;                      // numbers
  static constexpr int WARP_M = M / 4, WARP_N = N / 2;                  // of C, held by a warp
  static constexpr int ROWS = WARP_M / 4, COLUMNS = WARP_N / 8;         // by a thread
  static constexpr int BLOCKS = sizeof(T) == 8 || M * N > 128 * 64 ? 2 : 3;  // that registers allow on a multiprocessor
  static_assert(ROWS % WIDTH == 0 && COLUMNS % WIDTH == 0, "threads hold groups of neighbours");
  static_assert(M * STEP % (THREADS * WIDTH) == 0 && N * STEP % (THREADS * WIDTH) == 0, "every thread fetches as much");
  static_assert(THREADS % (2 * M) == 0 && THREADS % (2 * N) == 0, "two threads to a row that is transposed");
  static_assert(FLUSH_K % STEP == 0, "sums are flushed after a whole step");

  typedef Group<T, WIDTH> Neighbours;

  static DEVICE int warp() { return threadIdx.x / 32; }
  static DEVICE int lane_row() { return threadIdx.x / 16 % 2 * 2 + threadIdx.x % 2; }
  static DEVICE int lane_column() { return threadIdx.x / 2 % 8; }
  static DEVICE int offset_row(int i) { return i / WIDTH * 4 * WIDTH + i % WIDTH; }
  static DEVICE int offset_column(int j) { return j / WIDTH * 8 * WIDTH + j % WIDTH; }

  // Where this thread's i-th row and j-th column lie in the tile.
  static DEVICE int row(int i) { return warp() / 2 * WARP_M + lane_row() * WIDTH + offset_row(i); }
  static DEVICE int column(int j) { return warp() % 2 * WARP_N + lane_column() * WIDTH + offset_column(j); }

  T* shared;  // SHARED numbers: the tile of totals, then two stages
  T row_sum;

  // Where neighbours lie in the tile of totals: row by row, and in every other group of rows 16 columns changed place
  // with the next 16 (float), so that lanes of two rows reach all banks.
  DEVICE Neighbours* totals(int row, int column) const {
    return (Neighbours*)(shared + row * N + (column ^ (row & WIDTH) * 4));
  }

  // The same for a thread's own i-th row and j-th column, at a constant distance from its first.
  DEVICE Neighbours* own_totals(int i, int j) const {
    return (Neighbours*)((T*)totals(row(0), column(0)) + offset_row(i) * N + offset_column(j));
  }

  // totals = A[m0 ..][k0 .. k1) B[k0 .. k1)[n0 ..], elements outside the matrices counting as 0; k0 < k1.
  // If asked for, row_sum of the threads below M becomes the sum over k of A's row m0 + threadIdx.x.
  template <bool TRANSPOSED_A, bool TRANSPOSED_B>
  DEVICE void multiply(const Matrix<T>& a, const Matrix<T>& b, int m0, int n0, int k0, int k1, bool with_row_sum) {
    Operand<M, TRANSPOSED_A, PITCH_A> operand_a(a, m0, k0);
    Operand<N, !TRANSPOSED_B, PITCH_B> operand_b(b, n0, k0);
    operand_a.fetch(stage(0), k0, k1);
    operand_b.fetch(stage(0) + STEP * PITCH_A, k0, k1);
    cp_async_commit();
    row_sum = 0;
    int k = k0;
#pragma unroll 1
    while (k < k1) {
      const bool first = k == k0;
      const int end = min(k + FLUSH_K, k1);
      T sums[ROWS][COLUMNS], flush_sum = 0;
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) sums[i][j] = 0;
#pragma unroll 1
      for (; k < end; k += STEP) {
        const int which = (k - k0) / STEP % 2;
        T* a_stage = stage(which);
        T* b_stage = a_stage + STEP * PITCH_A;
        operand_a.put(a_stage);
        operand_b.put(b_stage);
        cp_async_wait<0>();
        __syncthreads();  // the stage is complete, and nobody still reads the one that is fetched next
        if (k + STEP < k1) {
          operand_a.fetch(stage(which ^ 1), k + STEP, k1);
          operand_b.fetch(stage(which ^ 1) + STEP * PITCH_A, k + STEP, k1);
          cp_async_commit();
        }
        multiply_stage(a_stage + row(0), b_stage + column(0), sums);
        if (with_row_sum && threadIdx.x < M)
#pragma unroll
          for (int kk = 0; kk < STEP; ++kk) flush_sum += a_stage[kk * PITCH_A + threadIdx.x];
      }
      add_to_totals(sums, first);
      row_sum += flush_sum;
    }
    __syncthreads();  // the tile of totals is complete
  }

 private:
  // Pairs of columns are walked down and up in turn, so that each multiplication shares an operand with the one before
  // it: a scheduler's registers deliver two numbers a cycle, and the third comes from what the last instruction kept.
  static DEVICE void multiply_stage(const T* a_stage, const T* b_stage, T (&sums)[ROWS][COLUMNS]) {
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      Neighbours a[ROWS / WIDTH], b[COLUMNS / WIDTH];
#pragma unroll
      for (int i = 0; i < ROWS; i += WIDTH) a[i / WIDTH] = *(const Neighbours*)(a_stage + k * PITCH_A + offset_row(i));
#pragma unroll
      for (int j = 0; j < COLUMNS; j += WIDTH)
        b[j / WIDTH] = *(const Neighbours*)(b_stage + k * PITCH_B + offset_column(j));
#pragma unroll
      for (int walked = 0; walked < ROWS * COLUMNS; ++walked) {
        const int pair = walked / (2 * ROWS), down = walked / 2 % ROWS;
        const int i = pair % 2 ? ROWS - 1 - down : down, j = 2 * pair + (walked + down) % 2;
        sums[i][j] += a[i / WIDTH].at[i % WIDTH] * b[j / WIDTH].at[j % WIDTH];
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
        if (!first) total = *own_totals(i, j);
#pragma unroll
        for (int p = 0; p < WIDTH; ++p) total.at[p] += sums[i][j + p];
        *own_totals(i, j) = total;
      }
  }

  DEVICE T* stage(int which) const { return shared + M * N + which * STAGE; }

  // A thread's part of an operand's stages: STEP of k and SIZE of the other index from `first` on. With K_MAJOR, which
  // is how the operand is stored, stages are copied, 512 bytes by a warp. Else a thread fetches neighbours along k, a
  // warp 32 bytes of 16 rows, into registers, and stores them to shared memory transposed, in 32 different banks.
  template <int SIZE, bool K_MAJOR, int PITCH>
  struct Operand {
    static constexpr int PER_THREAD = SIZE * STEP / (THREADS * WIDTH);  // groups of neighbours that a thread brings
    static constexpr int APART = THREADS * WIDTH / SIZE;           // along k

    Matrix<T> matrix;
    int first;
    bool aligned, inside;  // 16 bytes at a time; for every k, the interior SIZE lies in the matrix
    const T* from;         // the first neighbours of the next fetch
    Neighbours next[PER_THREAD];

    DEVICE Operand(const Matrix<T>& matrix, int first, int k0) : matrix(matrix), first(first) {
      aligned = aligned_rows(matrix.at, matrix.pitch);
      inside = first + SIZE <= (K_MAJOR ? matrix.columns : matrix.rows);
      const int row = K_MAJOR ? k0 + k() : first + other(), column = K_MAJOR ? first + other() : k0 + k();
      from = matrix.at + (int64)row * matrix.pitch + column;
    }

    // Where in a stage a thread's first neighbours lie.
    static DEVICE int k() {
      return K_MAJOR ? threadIdx.x / (SIZE / WIDTH) : (threadIdx.x / (2 * SIZE) * 2 + threadIdx.x % 2) * WIDTH;
    }
    static DEVICE int other() { return K_MAJOR ? threadIdx.x % (SIZE / WIDTH) * WIDTH : threadIdx.x / 2 % SIZE; }

    // Begins to load a stage; called for one stage after the other.
    DEVICE void fetch(T* stage, int k0, int k1) {
      const bool interior = aligned && inside && k0 + STEP <= k1;
      if (K_MAJOR) {
        T* to = stage + k() * PITCH + other();
        if (interior) {
#pragma unroll
          for (int i = 0; i < PER_THREAD; ++i)
            cp_async_16(to + i * APART * PITCH, from + (int64)(i * APART) * matrix.pitch, 16);
        } else {
          load_tile<STEP, SIZE, PITCH, THREADS>(stage, matrix, k0, first, aligned);
        }
        from += (int64)STEP * matrix.pitch;
      } else {
        if (interior) {
#pragma unroll
          for (int i = 0; i < PER_THREAD; ++i) next[i] = *(const Neighbours*)(from + i * APART);
        } else {
#pragma unroll
          for (int i = 0; i < PER_THREAD; ++i) {
            const int valid = first + other() < matrix.rows ? k1 - k0 - k() - i * APART : 0;
            next[i] = load_group<WIDTH>(from + i * APART, valid, aligned);
          }
        }
        from += STEP;
      }
    }

    // Stores what was fetched into registers, if it was, to the same stage.
    DEVICE void put(T* stage) const {
      if (K_MAJOR) return;
      T* to = stage + k() * PITCH + other();
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) to[(i * APART + j) * PITCH] = next[i].at[j];
    }
  };
};
