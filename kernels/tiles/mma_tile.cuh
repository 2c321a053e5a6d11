// A block's tile of a matrix product C = A B on tensor cores: bfloat16, float16 or TF32 operands, float32 sums.
//
//     A (M x K)                                   B (K x N)
//     stored [m][k] or, transposed, [k][m]        stored [k][n] or, transposed, [n][k]
//
// Tiles of A and B lie in shared memory as they lie in global memory, 64 bytes of K at a time (32 or 16 numbers), in a
// circular buffer of STAGES: while one stage is multiplied, the next ones are on their way. 4 warps as 2 x 2 hold M/2 x
// N/2 of C each: with 128 x 128, 4 x 8 fragments of 16 x 8, for which a step of K loads 4 fragments of A and 8 of B. So
// large a part of C keeps shared memory ahead of the tensor cores. So few warps leave room for a second block, which
// works while this one waits.
#pragma once
#include "load_tile.cuh"
#include "mma_fragments.cuh"

template <typename T, int M, int N, int STAGES, bool TRANSPOSED_A, bool TRANSPOSED_B>
struct MmaTile {
  typedef Mma<T> Unit;
  static constexpr int THREADS = 128, STEP = 64 / sizeof(T);
  static constexpr int ROWS_A = TRANSPOSED_A ? STEP : M, COLUMNS_A = TRANSPOSED_A ? M : STEP;
  static constexpr int ROWS_B = TRANSPOSED_B ? N : STEP, COLUMNS_B = TRANSPOSED_B ? STEP : N;
  static constexpr int PITCH_A = COLUMNS_A + Unit::PAD;
  static constexpr int PITCH_B = COLUMNS_B + (TRANSPOSED_A || TRANSPOSED_B ? Unit::PAD : Unit::PAD_PAIRS);
  static constexpr int STAGE = ROWS_A * PITCH_A + ROWS_B * PITCH_B;  // numbers
  static constexpr int WARP_M = M / 2, WARP_N = N / 2, FRAGMENTS_M = WARP_M / 16, FRAGMENTS_N = WARP_N / 8;
  static constexpr int PITCH_C = N + 8;
  static_assert(M % 32 == 0 && N % 32 == 0, "a warp holds whole pairs of fragments");

  float sums[FRAGMENTS_M][FRAGMENTS_N][4];
  float row_sums[FRAGMENTS_M][4];  // sums over k of A's rows, in elements 0 and 2

  static DEVICE int warp_m() { return (int)threadIdx.x / 32 / 2 * WARP_M; }
  static DEVICE int warp_n() { return (int)threadIdx.x / 32 % 2 * WARP_N; }

  // sums = A[m0 ...][k0 ... k1) B[k0 ... k1)[n0 ...], elements outside the matrices counting as 0; k0 is a multiple of
  // STEP, k1 too or K's end. row_sums too, if asked for, in the warps with warp_n() = 0.
  DEVICE void multiply(T* shared, const Matrix<T>& a, const Matrix<T>& b, int m0, int n0, int k0, int k1,
                       bool with_row_sums) {
    const bool aligned_a = aligned_rows(a.at, a.pitch), aligned_b = aligned_rows(b.at, b.pitch);
    const int steps = ceil_div(k1 - k0, STEP);
    with_row_sums = with_row_sums && warp_n() == 0;
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) row_sums[i][e] = 0;
#pragma unroll
      for (int j = 0; j < FRAGMENTS_N; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
    }

#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
      if (step < steps) load_stage(shared + step * STAGE, a, b, m0, n0, k0 + step * STEP, aligned_a, aligned_b);
      cp_async_commit();  // empty groups too, so that the count of groups is the count of steps
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // this stage has arrived for everyone; and everyone is done with the one before it, loaded next
      const int next = step + STAGES - 1;
      if (next < steps)
        load_stage(shared + next % STAGES * STAGE, a, b, m0, n0, k0 + next * STEP, aligned_a, aligned_b);
      cp_async_commit();
      multiply_stage(shared + step % STAGES * STAGE, with_row_sums);
    }
    if (with_row_sums)
#pragma unroll
      for (int i = 0; i < FRAGMENTS_M; ++i) Unit::finish_row_sums(row_sums[i]);
    cp_async_wait<0>();
    __syncthreads();  // shared memory is free again
  }

  // Stores the sums to shared memory, row by row, PITCH_C apart.
  DEVICE void store_to_shared(float* tile) const {
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; ++i)
#pragma unroll
      for (int j = 0; j < FRAGMENTS_N; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int row = warp_m() + i * 16 + fragment_row(e), column = warp_n() + j * 8 + fragment_column(e);
          const Group<float, 2> pair = {sums[i][j][e], sums[i][j][e + 1]};
          *(Group<float, 2>*)(tile + row * PITCH_C + column) = pair;
        }
    __syncthreads();  // the tile is complete
  }

 private:
  static DEVICE void load_stage(T* stage, const Matrix<T>& a, const Matrix<T>& b, int m0, int n0, int k, bool aligned_a,
                                bool aligned_b) {
    load_tile<ROWS_A, COLUMNS_A, PITCH_A, THREADS>(stage, a, TRANSPOSED_A ? k : m0, TRANSPOSED_A ? m0 : k, aligned_a);
    load_tile<ROWS_B, COLUMNS_B, PITCH_B, THREADS>(stage + ROWS_A * PITCH_A, b, TRANSPOSED_B ? n0 : k,
                                                   TRANSPOSED_B ? k : n0, aligned_b);
  }

  DEVICE void multiply_stage(const T* stage, bool with_row_sums) {
    const T* a_tile = stage;
    const T* b_tile = stage + ROWS_A * PITCH_A;
#pragma unroll
    for (int k = 0; k < STEP; k += Unit::K) {
      uint32 a[FRAGMENTS_M][4];
#pragma unroll
      for (int i = 0; i < FRAGMENTS_M; ++i)
        Unit::template load_a<TRANSPOSED_A>(a[i], a_tile, PITCH_A, warp_m() + i * 16, k);
#pragma unroll
      for (int j = 0; j < FRAGMENTS_N; j += 2) {
        uint32 b[2][2];
        Unit::template load_b<TRANSPOSED_A, TRANSPOSED_B>(b[0], b[1], b_tile, PITCH_B, warp_n() + j * 8, k);
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M; ++i) {
          Unit::multiply(sums[i][j], a[i], b[0]);
          Unit::multiply(sums[i][j + 1], a[i], b[1]);
        }
      }
      if (with_row_sums)
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M; ++i)
          Unit::template add_row_sums<TRANSPOSED_A>(row_sums[i], a[i], a_tile, PITCH_A, warp_m() + i * 16, k);
    }
  }
};
