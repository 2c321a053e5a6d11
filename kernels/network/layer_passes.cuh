// What a block does with a slab of samples on their way through a narrow network: forward pass, loss, backward pass, layer by layer, in
// shared memory. fused_step.cu has the kernels.
//
// A slab has up to 16 WARPS rows, a multiple of 32, of which `valid` belong to the chain; the rest of the last 32 is zero. A warp takes 16
// of its rows through a layer, so that in a full slab warps need not wait for each other on the way up; where there are half as many
// rows or fewer, warps share a layer's columns. Fragments lie as mma_fragments.cuh says.
#pragma once
#include "../tiles/epilogue.cuh"
#include "network_memory.cuh"
#include "../common/loss_formulas.cuh"

// How far products are unrolled: as far as registers last.
#ifdef MAX_WIDTH
const int WIDEST = MAX_WIDTH, UNROLLED = sizeof(OPERAND) == 4 ? (MAX_WIDTH < 128 ? 2 : 1) : WARPS > 8 && MAX_WIDTH > 64 ? 2 : 4;
#else
const int WIDEST = 128, UNROLLED = sizeof(OPERAND) == 2 ? 2 : 1;
#endif
const int PAIRS = WIDEST < 64 || WARPS > 8 ? 2 : 4;  // of fragments, 16 columns each, that a warp takes at a time
const int FRAGMENTS = 2 * PAIRS;
const int SMOOTH_PAIRS = WARPS > 8 ? 1 : PAIRS;  // where a smooth activation follows, which takes registers of its own
const int TOGETHER = WARPS > 8 ? 1 : 2;          // fragments that it takes at a time: more warps need less at once

typedef float Tile[FRAGMENTS][4];  // 16 rows of a layer

// Which rows of a slab are this warp's, and which share of their columns. Strips of 16 rows are taken for a power of two of them: some
// warps may be left over.
struct Place {
  int warp, strips_log2;

  explicit DEVICE Place(int valid) : warp(__shfl_sync(0xffffffffu, warp_index(), 0)), strips_log2(1) {
    while (16 << strips_log2 < used_rows(valid)) ++strips_log2;
  }
  DEVICE int row() const { return (warp & (1 << strips_log2) - 1) * 16; }
  DEVICE int sharing_log2() const { return WARPS_LOG2 - strips_log2; }
  DEVICE int share(int columns) const { return ((columns / 16 - 1 >> sharing_log2()) + 1) * 16; }
  DEVICE int first(int columns) const { return (warp >> strips_log2) * share(columns); }
  DEVICE int last(int columns) const { return min(columns, first(columns) + share(columns)); }

  // Behind it, the rows are complete.
  DEVICE void wait() const {
    if (sharing_log2())
      bar_sync(1 + row() / 16, 32 << sharing_log2());
    else
      __syncwarp();
  }
};

template <int VALUE> struct Constant { static constexpr int value = VALUE; };

// So many pairs are taken of `columns` that are left, a whole number of 16: all that can be taken at a time, or half as many, or ...
DEVICE int pairs_of(int columns, int activation) {
  int pairs = piecewise_linear(activation) ? PAIRS : SMOOTH_PAIRS;
  while (pairs * 16 > columns) pairs /= 2;
  return pairs;
}

// Calls body(`pairs`, known to the compiler): what is done with some fragments and not with others would take registers of all.
template <int COUNT = PAIRS, typename Body>
DEVICE void with_pairs(int pairs, Body body) {
  if constexpr (COUNT > 1)
    if (pairs < COUNT) return with_pairs<COUNT / 2>(pairs, body);
  body(Constant<COUNT>());
}

// c += A B for 16 rows of A, stored [m][k], and COUNT times 16 columns of B, stored [k][n] or, transposed, [n][k]: the step of K at k.
template <bool TRANSPOSED_B, int COUNT>
DEVICE void add_step(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int k) {
  typename Unit::FragmentA a;
  Unit::template load_a<false>(a, a_tile, a_pitch, 0, k);
#pragma unroll
  for (int p = 0; p < COUNT; ++p) {
    typename Unit::FragmentB b[2];
    Unit::template load_b<false, TRANSPOSED_B>(b[0], b[1], b_tile, b_pitch, p * 16, k);
    Unit::multiply(c[2 * p], a, b[0]);
    Unit::multiply(c[2 * p + 1], a, b[1]);
  }
}

// All steps up to k1, where k1 and the rows' numbers are WIDTH, so that the compiler knows every address; else none, and false.
template <bool TRANSPOSED_B, int WIDTH, int COUNT>
DEVICE bool add_whole_product(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int k1) {
  const int pitch = WIDTH + Unit::PAD;
  if (k1 != WIDTH || a_pitch != pitch || b_pitch != pitch) return false;
#pragma unroll UNROLLED
  for (int k = 0; k < WIDTH; k += Unit::K) add_step<TRANSPOSED_B, COUNT>(c, a_tile, pitch, b_tile, pitch, k);
  return true;
}

// All steps up to k1, a whole number of 16.
template <bool TRANSPOSED_B, int COUNT>
DEVICE void add_product(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int k1) {
  if (COUNT == PAIRS || WARPS > 8) {
    if (add_whole_product<TRANSPOSED_B, WIDEST, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, k1)) return;
#ifndef MAX_WIDTH
    if (add_whole_product<TRANSPOSED_B, WIDEST / 2, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, k1)) return;
#endif
  }
#pragma unroll 1
  for (int k = 0; k < k1; k += Unit::K) {
    add_step<TRANSPOSED_B, COUNT>(c, a_tile, a_pitch, b_tile, b_pitch, 0);
    a_tile += Unit::K, b_tile += TRANSPOSED_B ? Unit::K : Unit::K * b_pitch;
  }
}

// Two neighbours among operands, and the bits of them that count.
union PairBits {
  static constexpr int WORDS = sizeof(Pair) / 4;
  Pair pair;
  Group<uint32, WORDS> words;
};

DEVICE void widen_pair(const Group<bfloat16, 2>&, uint32 word, float& first, float& second) {
  first = __uint_as_float(word << 16), second = __uint_as_float(word & 0xffff0000u);
}
template <typename T>
DEVICE void widen_pair(const Group<T, 2>& pair, uint32, float& first, float& second) {
  first = widen(pair.at[0]), second = widen(pair.at[1]);
}

// All bits of as many of two neighbours.
DEVICE PairBits first_of_pair(int count) {
  PairBits bits;
#pragma unroll
  for (int i = 0; i < PairBits::WORDS; ++i)
    bits.words.at[i] = count >= 2 ? 0xffffffffu : count < 1 || i ? 0 : PairBits::WORDS == 1 ? 0xffffu : 0xffffffffu;
  return bits;
}

// Rows of operands of which this lane writes pairs; outside of `valid` rows and `n` columns, zeros.
struct TileRows {
  typedef Group<uint32, PairBits::WORDS> Words;
  OPERAND* at;  // this lane's first pair
  int pitch, columns, left;  // that count: of all, and from the lane's first on
  uint32 counts[2];

  DEVICE TileRows(OPERAND* rows, int pitch, const Place& place, int n0, int valid, int n)
      : at(rows + (place.row() + fragment_row(0)) * pitch + n0 + fragment_column(0)),
        pitch(pitch),
        columns(n - n0),
        left(n - n0 - fragment_column(0)) {
#pragma unroll
    for (int p = 0; p < 2; ++p) counts[p] = place.row() + fragment_row(2 * p) < valid ? 0xffffffffu : 0;
  }

  DEVICE Words* pair(int f, int p) const { return (Words*)(at + p * 8 * pitch + f * 8); }

  DEVICE void load(float* values, int f) const {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      PairBits bits;
      bits.words = *pair(f, p);
      widen_pair(bits.pair, bits.words.at[0], values[2 * p], values[2 * p + 1]);
    }
  }

  // Four numbers of a fragment, which become what is stored.
  template <bool ALL_COLUMNS>
  DEVICE void store(int f, float* values) const {
    const PairBits counted = first_of_pair(ALL_COLUMNS ? 2 : left - f * 8);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      PairBits bits;
      narrow(values[2 * p], bits.pair.at[0]), narrow(values[2 * p + 1], bits.pair.at[1]);
#pragma unroll
      for (int i = 0; i < PairBits::WORDS; ++i) bits.words.at[i] &= counted.words.at[i] & counts[p];
      *pair(f, p) = bits.words;
      values[2 * p] = widen(bits.pair.at[0]), values[2 * p + 1] = widen(bits.pair.at[1]);
    }
  }

  // Of several fragments, from f on.
  template <int N>
  DEVICE void load_all(float (&values)[N], int f) const {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) load(values + 4 * i, f + i);
  }
  template <int N>
  DEVICE void store_all(int f, float (&values)[N]) const {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) store<false>(f + i, values + 4 * i);
  }

  // All of a tile.
  DEVICE void store_tile(Tile& c, int pairs) const {
    with_pairs(pairs, [&](auto count) {
      if (columns >= 16 * count.value) {
#pragma unroll
        for (int f = 0; f < 2 * count.value; ++f) store<true>(f, c[f]);
      } else {
#pragma unroll
        for (int f = 0; f < 2 * count.value; ++f) store<false>(f, c[f]);
      }
    });
  }
};

// Smooth activations take much code, which stands once: body(fragment, the values of TOGETHER fragments from it on) for each TOGETHER of
// them, which move up to where it finds them.
template <typename Body>
DEVICE void each_in_turn(Tile& c, int pairs, Body body) {
#pragma unroll 1
  for (int first = 0; first < 2 * pairs; first += TOGETHER) {
    float values[4 * TOGETHER];
#pragma unroll
    for (int e = 0; e < 4 * TOGETHER; ++e) values[e] = c[e / 4][e % 4];
    body(first, values);
#pragma unroll
    for (int f = TOGETHER; f < 2 * SMOOTH_PAIRS; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[f - TOGETHER][e] = c[f][e];
  }
}

// Calls body(an activation known to the compiler) for a piecewise linear one.
template <typename Body>
DEVICE void with_linear(int activation, Body body) {
  switch (activation) {
    case IDENTITY: body(Constant<IDENTITY>()); break;
    case RELU: body(Constant<RELU>()); break;
    case LEAKY_RELU: body(Constant<LEAKY_RELU>()); break;
  }
}

// h_{k+1} = g(h_k W^T + b), or a_L.
DEVICE void forward_layer(const Network& net, int k, const Place& place, int valid) {
  const int n_in = net[k].n_in, n_out = net[k].n_out, activation = net[k].activation, columns = whole(n_out);
  const bool last = k + 1 == net.layers;
  if (place.row() >= used_rows(valid)) return;
  int pairs;
#pragma unroll 1
  for (int n0 = place.first(columns); n0 < place.last(columns); n0 += 16 * pairs) {
    pairs = pairs_of(place.last(columns) - n0, activation);
    Tile c = {};
    with_pairs(pairs, [&](auto count) {
      add_product<true, count.value>(c, net.inputs(k) + place.row() * net.pitch(k), net.pitch(k), net.weights(k) + n0 * net.pitch(k),
                                     net.pitch(k), whole(n_in));
      const float* bias = net.biases(k) + n0 + fragment_column(0);
#pragma unroll
      for (int f = 0; f < 2 * count.value; ++f) {
        const Group<float, 2> b = *(const Group<float, 2>*)(bias + f * 8);
#pragma unroll
        for (int e = 0; e < 4; ++e) c[f][e] += b.at[e % 2];
      }
    });
    if (last) {
      float* top = net.top() + (place.row() + fragment_row(0)) * net.pitch_top() + n0 + fragment_column(0);
      with_pairs(pairs, [&](auto count) {
#pragma unroll
        for (int f = 0; f < 2 * count.value; ++f)
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            const Group<float, 2> pair = {c[f][2 * p], c[f][2 * p + 1]};
            *(Group<float, 2>*)(top + p * 8 * net.pitch_top() + f * 8) = pair;
          }
      });
      continue;
    }
    const TileRows out(net.inputs(k + 1), net.pitch(k + 1), place, n0, valid, n_out);
    if (piecewise_linear(activation)) {
      with_linear(activation, [&](auto known) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) activate_linear(known.value, c[f]);
      });
      out.store_tile(c, pairs);
    } else {
      const bool rounded = derivative_from_a(activation);  // so that g and g' see the same a
      const TileRows a_rows(net.kept_or_inputs(k + 1), net.pitch(k + 1), place, n0, valid, n_out);
      each_in_turn(c, pairs, [&](int f, float (&a)[4 * TOGETHER]) {
        if (rounded) a_rows.store_all(f, a);
        activate_smooth(activation, a);
        out.store_all(f, a);
      });
    }
  }
}

const int TOP_LANES = 8;              // that work on a row
const int HELD = WIDEST / TOP_LANES;  // of its numbers by a lane, at most
typedef Row<TOP_LANES, float> TopRow;

// Calls body(row, its pre-activations) for every row of the slab, whether or not it counts. A warp takes eight of them in two turns, every
// other at a time: those lie in different banks. The last two turns are for what is left of 8 WARPS rows, and may find none.
template <typename Body>
DEVICE void each_top_row(const Network& net, int valid, Body body) {
#pragma unroll 1
  for (int turn = 0; turn < used_rows(valid) / (4 * WARPS) + 2; ++turn) {
    const int first = (turn / 2 * WARPS + warp_index()) * 8, r = first + (int)(threadIdx.x % 32 / TOP_LANES) * 2 + turn % 2;
    if (first < used_rows(valid)) body(r, TopRow{net.top() + r * net.pitch_top(), net[net.layers].n_in});
  }
}

// How a loss is computed.
struct LossOptions {
  int loss, output;
  float divisor;  // B over the scale that da carries
};

// The losses of a slab's samples, behind the numbers of their rows, where nothing else is; da_L, not yet rounded, in place of a_L.
// `first`: the slab's first sample.
DEVICE void write_losses(const Network& net, const Samples& samples, const LossOptions& options, int first, int valid) {
  each_top_row(net, valid, [&](int r, const TopRow& row) {
    const int64 b = first + min(r, valid - 1);
    const float weight = samples.weight_b ? samples.weight_b[b] : 1.0f, scale = weight / options.divisor;
    float* a = net.top() + r * net.pitch_top();
    const auto write = [=](int j, float gradient) { a[j] = gradient * scale; };
    const float value = samples.labels_b
                            ? held_label_loss<HELD>(row, samples.labels_b[b], write)
                            : loss_of_row(row, options.loss, options.output, nullptr, samples.targets_bj + b * row.n, write);
    if (TopRow::lane() == 0) a[whole(row.n)] = value * weight;
  });
}

// Adds them to a chain's sums, of which a lane has every 32nd sample's, so that none depends on how it is cut into slabs. Warp 0.
DEVICE void add_losses(const Network& net, int valid) {
  const float* losses = net.top() + whole(net[net.layers].n_in);
  double sum = net.loss_sums()[threadIdx.x];
#pragma unroll 1
  for (int r = threadIdx.x; r < valid; r += 32) sum += (double)losses[r * net.pitch_top()];
  net.loss_sums()[threadIdx.x] = sum;
}

// da_L as operands, rows in the same place.
DEVICE void narrow_top(const Network& net, int valid) {
  each_top_row(net, valid, [&](int r, const TopRow& row) {
    OPERAND* to = net.inputs(net.layers) + r * net.pitch(net.layers);
    float gradients[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int j = TopRow::lane() + i * TOP_LANES;
      gradients[i] = r < valid && j < row.n ? row.a[j] : 0.0f;
    }
    __syncwarp();  // the other lanes have read theirs
#pragma unroll
    for (int i = 0; i < HELD; ++i)
      if (i * TOP_LANES < whole(row.n)) narrow(gradients[i], to[TopRow::lane() + i * TOP_LANES]);
  });
}

// Where a layer's sums of db are added up: a row for each output, with a number for each of the warps that share it.
struct SumsDb {
  float* at;
  int pitch;
};

// A warp's part of a layer's sums over 32 rows. What lies beyond a layer's widths is not used: anything may be added to its dW.
template <int WIDTH, int FRAGMENTS_O, int FRAGMENTS_I>
struct RowSums {
  static constexpr int LOADED = FRAGMENTS_I == 1 ? 8 : 16;  // columns of h at a time
  static constexpr int STEPS = FRAGMENTS_I == 1 ? 2 : 1;    // of K, with them
  const OPERAND *da, *h;
  int pitch_da, pitch_h;
  int o[FRAGMENTS_O], i[FRAGMENTS_I * 8 / LOADED];

  DEVICE RowSums(const Rows& da, const Rows& h, int o0, int i0) : da(da.at), h(h.at), pitch_da(da.pitch), pitch_h(h.pitch) {
#pragma unroll
    for (int n = 0; n < FRAGMENTS_O; ++n) o[n] = min(o0 + n * 16, da.columns - 16);
#pragma unroll
    for (int n = 0; n < FRAGMENTS_I * 8 / LOADED; ++n) i[n] = min(i0 + n * LOADED, h.columns - LOADED);
  }

  // dW += da^T h for the next 32 rows; with DB, `db` += sum_b da, from this warp's first output on, of which `outputs` count.
  template <bool DB>
  DEVICE void add(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], const SumsDb& db, int outputs) {
    const int pitch = WIDTH + Unit::PAD;
    if (pitch_da == pitch && pitch_h == pitch)  // the compiler knows every address
      add<DB, WIDTH < 128 || WARPS == 8 && sizeof(OPERAND) == 2 ? 2 : 1>(dw, db, outputs, pitch, pitch);
    else
      add<DB, 1>(dw, db, outputs, pitch_da, pitch_h);
    da += BAND * pitch_da, h += BAND * pitch_h;
  }

 private:
  template <bool DB, int UNROLL>
  DEVICE void add(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], const SumsDb& db, int outputs, int pitch_da, int pitch_h) const {
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
    if (!DB) return;
#pragma unroll
    for (int n = 0; n < FRAGMENTS_O; ++n) {
      Unit::finish_row_sums(sums[n]);
      const int half = threadIdx.x % 4, output = n * 16 + half * 8 + fragment_row(0);  // the first two of four lanes with the same sums
      if (half < 2 && output < outputs) db.at[output * db.pitch] += half ? sums[n][2] : sums[n][0];
    }
  }
};

// dW += da^T h over the slab, a warp's part of it: rows o0 ..., columns i0 ... . Of db, a warp adds the rows of every SHARING-th 32 of a
// chain, so that sums do not depend on how it is cut into slabs, of which this one begins at row `offset`. `db`: from o0 on.
template <int WIDTH, int SHARING, int FRAGMENTS_O, int FRAGMENTS_I>
DEVICE void add_weights(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], const SumsDb& db, const Rows& da, const Rows& h, int valid, int o0, int i0,
                        unsigned offset) {
  if (o0 >= da.columns) return;
  RowSums<WIDTH, FRAGMENTS_O, FRAGMENTS_I> sums(da, h, o0, i0);
#pragma unroll 1
  for (int first = 0; first < valid; first += BAND)
    if ((offset + first) / BAND % SHARING == warp_index() % SHARING)
      sums.template add<true>(dw, db, da.columns - o0);
    else
      sums.template add<false>(dw, db, da.columns - o0);
}

// da_{k-1} = (da_k W) g' in place of the layer's inputs, g' computed from what lies there or, with KEPT, from pre-activations if they
// are kept; or, of the first layer, dx = (da_1 W) factor to global memory. `first`: the slab's first sample.
template <bool KEPT>
DEVICE void backward_layer(const Network& net, int k, const Place& place, int valid, float* dx_bi, int first, float factor) {
  const int n_in = net[k].n_in, columns = whole(n_in), n_out = net[k].n_out, activation = k ? net[k - 1].activation : IDENTITY;
  if (place.row() >= used_rows(valid)) return;
  int pairs;
#pragma unroll 1
  for (int n0 = place.first(columns); n0 < place.last(columns); n0 += 16 * pairs) {
    pairs = pairs_of(place.last(columns) - n0, activation);
    Tile c = {};
    with_pairs(pairs, [&](auto count) {
      add_product<false, count.value>(c, net.inputs(k + 1) + place.row() * net.pitch(k + 1), net.pitch(k + 1), net.weights(k) + n0,
                                      net.pitch(k), whole(n_out));
    });
    if (!k) {
      float* dx = dx_bi + (int64)first * n_in;
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = place.row() + fragment_row(e), column = n0 + f * 8 + fragment_column(e);
          if (f < 2 * pairs && row < valid && column < n_in) dx[row * n_in + column] = c[f][e] * factor;
        }
      continue;
    }
    const TileRows out(net.inputs(k), net.pitch(k), place, n0, valid, n_in);
    const TileRows sources(KEPT ? net.kept_or_inputs(k) : net.inputs(k), net.pitch(k), place, n0, valid, n_in);
    if (piecewise_linear(activation)) {
      with_linear(activation, [&](auto known) {
        with_pairs(pairs, [&](auto count) {
#pragma unroll
          for (int f = 0; f < 2 * count.value; ++f) {
            float values[4];
            sources.load(values, f);
            times_derivative_linear(known.value, c[f], values);
          }
        });
      });
      out.store_tile(c, pairs);
    } else {
      each_in_turn(c, pairs, [&](int f, float (&d)[4 * TOGETHER]) {
        float from[4 * TOGETHER];
        sources.load_all(from, f);
        times_derivative_smooth(activation, d, from);
        out.store_all(f, d);
      });
    }
  }
}
