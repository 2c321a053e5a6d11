// dW += da^T h and db += sum_b da of a layer over a batch tile, in registers and in shared memory.
#pragma once
#include "network_memory.cuh"

// Sums of a layer's db in shared memory: a row for each output, with a number for each warp that adds to it.
struct BiasSums {
  float* at;
  int pitch;
};

// A warp's part of a layer's products over BAND rows. Fragments beyond a layer's widths are moved inside: what is added
// to them is not used.
template <int WIDTH, int FRAGMENTS_O, int FRAGMENTS_I>
struct BandProducts {
  static constexpr int LOADED = FRAGMENTS_I == 1 ? 8 : 16;  // columns of h at a time
  static constexpr int STEPS = FRAGMENTS_I == 1 ? 2 : 1;    // of K that one load brings
  const Element *da, *h;
  int pitch_da, pitch_h;
  int o[FRAGMENTS_O], i[FRAGMENTS_I * 8 / LOADED];

  DEVICE BandProducts(const Rows& da, const Rows& h, int o0, int i0)
      : da(da.at), h(h.at), pitch_da(da.pitch), pitch_h(h.pitch) {
#pragma unroll
    for (int n = 0; n < FRAGMENTS_O; ++n) o[n] = min(o0 + n * 16, da.columns - 16);
#pragma unroll
    for (int n = 0; n < FRAGMENTS_I * 8 / LOADED; ++n) i[n] = min(i0 + n * LOADED, h.columns - LOADED);
  }

  // dW += da^T h for the next BAND rows. With DB, db += sum_b da for `outputs` outputs from this warp's first on.
  template <bool DB>
  DEVICE void add(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], const BiasSums& db, int outputs) {
    const int pitch = WIDTH + Unit::PAD;
    const bool registers_left = WIDTH < 128 || (WARPS == 8 && sizeof(Element) == 2);
    if (pitch_da == pitch && pitch_h == pitch)  // the compiler knows every address
      add<DB, registers_left ? 2 : 1>(dw, db, outputs, pitch, pitch);
    else
      add<DB, 1>(dw, db, outputs, pitch_da, pitch_h);
    da += BAND * pitch_da, h += BAND * pitch_h;
  }

 private:
  template <bool DB, int UNROLL>
  DEVICE void add(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], const BiasSums& db, int outputs, int pitch_da,
                  int pitch_h) const {
    float sums[FRAGMENTS_O][4] = {};
#pragma unroll UNROLL
    for (int b0 = 0; b0 < BAND; b0 += STEPS * Unit::K) {
      typename Unit::FragmentB columns[STEPS][FRAGMENTS_I];
      if constexpr (STEPS == 2)
        Unit::load_b_steps(columns[0][0], columns[1][0], h + i[0], pitch_h, b0);
      else
#pragma unroll
        for (int n = 0; n < FRAGMENTS_I; n += 2)
          Unit::template load_b<true, false>(columns[0][n], columns[0][n + 1], h + i[n / 2], pitch_h, 0, b0);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int b = b0 + step * Unit::K;
#pragma unroll
        for (int n = 0; n < FRAGMENTS_O; ++n) {
          typename Unit::FragmentA rows;
          Unit::template load_a<true>(rows, da + o[n], pitch_da, 0, b);
#pragma unroll
          for (int m = 0; m < FRAGMENTS_I; ++m) Unit::multiply(dw[n][m], rows, columns[step][m]);
          if (DB) Unit::template add_row_sums<true>(sums[n], rows, da + o[n], pitch_da, 0, b);
        }
      }
    }
    if constexpr (DB) {
#pragma unroll
      for (int n = 0; n < FRAGMENTS_O; ++n) {
        Unit::finish_row_sums(sums[n]);
        // Four lanes have the same sums: the first two of them add to db.
        const int half = threadIdx.x % 4, output = n * 16 + half * 8 + fragment_row(0);
        if (half < 2 && output < outputs) db.at[output * db.pitch] += half ? sums[n][2] : sums[n][0];
      }
    }
  }
};

// dW += da^T h over the batch tile, a warp's part of it: rows o0 ..., columns i0 ... . The warps that have the same
// rows of dW take turns at db: each adds every WARPS_PER_ROW-th BAND of a split, so that no bit depends on the rows of
// a batch tile, which begins at row `offset` of the split. `db`: from o0 on.
template <int WIDTH, int WARPS_PER_ROW, int FRAGMENTS_O, int FRAGMENTS_I>
DEVICE void add_weights(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], const BiasSums& db, const Rows& da, const Rows& h,
                        int valid, int o0, int i0, unsigned offset) {
  if (o0 >= da.columns) return;
  BandProducts<WIDTH, FRAGMENTS_O, FRAGMENTS_I> sums(da, h, o0, i0);
#pragma unroll 1
  for (int first = 0; first < valid; first += BAND)
    if ((offset + first) / BAND % WARPS_PER_ROW == warp_index() % WARPS_PER_ROW)
      sums.template add<true>(dw, db, da.columns - o0);
    else
      sums.template add<false>(dw, db, da.columns - o0);
}

// The part of a layer's dW that a warp holds in registers. WARPS / 4 x 4 of them make up dW; 32 x 32 has no more than 2
// x 4. The warps that stand side by side each have a part of db's sum over a split, in shared memory.
template <int WIDTH>
struct WeightFragment {
  static constexpr int ROWS = WIDTH / (WARPS / 4) < 16 ? 16 : WIDTH / (WARPS / 4), ACROSS = 4, COLUMNS = WIDTH / ACROSS;
  static constexpr int FRAGMENTS_O = ROWS / 16, FRAGMENTS_I = COLUMNS / 8;
  static constexpr int PER_LANE = FRAGMENTS_O * FRAGMENTS_I * 4;      // numbers of dW
  static constexpr int DB_PER_LANE = (ROWS + 31) / 32;                // of db, in the first column of warps
  static constexpr int COUNT = PER_LANE + round_up_4(DB_PER_LANE);    // of a partial result
  static constexpr int SIZE = COUNT * 32, SLOTS = WARPS;
  static constexpr int PREFETCH = 64 / WARPS;  // packs of partial results that are on their way to a lane
  typedef float Sums[FRAGMENTS_O][FRAGMENTS_I][4];

  static DEVICE int o0() { return warp_index() / ACROSS * ROWS; }
  static DEVICE int i0() { return warp_index() % ACROSS * COLUMNS; }
  static DEVICE int slot() { return warp_index(); }
  static DEVICE int packs(const Layer&) { return (i0() == 0 ? COUNT : PER_LANE) / Pack<float>::count; }
  static DEVICE bool is_used(const Layer& layer) { return o0() < layer.n_out && i0() < layer.n_in; }

  // Calls body(where a number of this lane's partial result belongs among the layer's parameters), if anywhere.
  template <typename Body>
  static DEVICE void at_place(const Layer& layer, int index, Body body) {
    const int e = index - PER_LANE;
    if (e < 0) {
      const int o = o0() + index / 4 / FRAGMENTS_I * 16 + fragment_row(index % 4);
      const int i = i0() + index / 4 % FRAGMENTS_I * 8 + fragment_column(index % 4);
      if (o < layer.n_out && i < layer.n_in) body(o * layer.n_in + i);
    } else {
      const int r = (int)(threadIdx.x % 32) + 32 * e, o = o0() + r;
      if (r < ROWS && o < layer.n_out) body(layer.n_out * layer.n_in + o);
    }
  }

  static DEVICE void clear(Sums& dw) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) dw[i / 4 / FRAGMENTS_I][i / 4 % FRAGMENTS_I][i % 4] = 0;
  }
  static DEVICE void clear(const BiasSums& db, int outputs) {
    for (int o = threadIdx.x; o < outputs; o += THREADS)
#pragma unroll
      for (int i = 0; i < ACROSS; ++i) db.at[o * db.pitch + i] = 0;
  }

  // Adds a batch tile of a layer's da and h that begins at row `offset` of its split.
  static DEVICE void add(Sums& dw, const BiasSums& db, const Rows& da, const Rows& h, int offset, int valid) {
    const BiasSums own = {db.at + o0() * db.pitch + warp_index() % ACROSS, db.pitch};
    add_weights<WIDTH, ACROSS>(dw, own, da, h, valid, o0(), i0(), offset);
  }

  static DEVICE float total(const BiasSums& db, int o) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < ACROSS; ++i) sum += db.at[o * db.pitch + i];
    return sum;
  }
};
