// What a block does with a slab of samples on their way through a narrow network: forward pass, loss, backward pass, layer by layer, in
// shared memory. network_narrow.cu has the kernels.
//
// A slab has up to 128 rows, a multiple of 32, of which `valid` belong to the chain; the rest of the last 32 is zero. A warp takes 16 of
// its rows through a layer, so that with 128 of them warps need not wait for each other on the way up; of up to 64 rows, warps share
// a layer's columns. Fragments lie as fragments.cuh says.
#pragma once
#include "epilogue.cuh"
#include "network_memory.cuh"
#include "output_rows.cuh"

// How far products are unrolled: as far as registers last.
#ifdef MAX_WIDTH
const int WIDEST = MAX_WIDTH, UNROLLED = sizeof(OPERAND) == 2 ? 4 : MAX_WIDTH < 128 ? 2 : 1;
#else
const int WIDEST = 128, UNROLLED = sizeof(OPERAND) == 2 ? 2 : 1;
#endif
const int PAIRS = WIDEST < 64 ? WIDEST / 16 : 4;  // of fragments, 16 columns each, that a warp takes at a time
const int FRAGMENTS = 2 * PAIRS;

typedef float Tile[FRAGMENTS][4];  // 16 rows of a layer

// Which rows of a slab are this warp's, and which share of their columns.
struct Place {
  int row, turn, sharing_log2;

  explicit DEVICE Place(int valid) {
    const int strips = used_rows(valid) / 16, warp = __shfl_sync(0xffffffffu, warp_index(), 0);
    sharing_log2 = strips <= 2 ? 2 : strips <= 4 ? 1 : 0;  // of eight warps; to 6 strips there are two too many
    row = warp % strips * 16, turn = warp / strips;
  }
  DEVICE int columns_each(int columns) const { return (columns + (16 << sharing_log2) - 1) >> (4 + sharing_log2) << 4; }
  DEVICE int first(int columns) const { return turn >> sharing_log2 ? columns : turn * columns_each(columns); }
  DEVICE int last(int columns) const { return min(columns, first(columns) + columns_each(columns)); }

  // Behind it, the rows are complete.
  DEVICE void wait() const {
    if (sharing_log2)
      __syncthreads();
    else
      __syncwarp();
  }
};

template <bool VALUE> struct Constant { static constexpr bool value = VALUE; };

// Calls body(fragment, whether all of its columns count) for those of the first `pairs` pairs, of which `columns` columns count. Where
// all do, nothing branches between fragments.
template <typename Body>
DEVICE void each_fragment(int pairs, int columns, Body body) {
  if (pairs == PAIRS && columns >= 16 * PAIRS) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) body(f, Constant<true>());
    return;
  }
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f)
    if (f / 2 < pairs) body(f, Constant<false>());
}

// c += A B for 16 rows of A, stored [m][k], and `pairs` times 16 columns of B, stored [k][n] or, transposed, [n][k]: the step of K at k.
template <bool TRANSPOSED_B>
DEVICE void add_step(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int pairs, int k) {
  typename Unit::FragmentA a;
  Unit::template load_a<false>(a, a_tile, a_pitch, 0, k);
#pragma unroll
  for (int p = 0; p < PAIRS; ++p)
    if (p < pairs) {
      typename Unit::FragmentB b[2];
      Unit::template load_b<false, TRANSPOSED_B>(b[0], b[1], b_tile, b_pitch, p * 16, k);
      Unit::multiply(c[2 * p], a, b[0]);
      Unit::multiply(c[2 * p + 1], a, b[1]);
    }
}

// All steps up to k1, where k1 and the rows' numbers are WIDTH, so that the compiler knows every address; else none, and false.
template <bool TRANSPOSED_B, int WIDTH>
DEVICE bool add_whole_product(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int pairs, int k1) {
  const int pitch = WIDTH + Unit::PAD;
  if (pairs < PAIRS || k1 != WIDTH || a_pitch != pitch || b_pitch != pitch) return false;
#pragma unroll UNROLLED
  for (int k = 0; k < WIDTH; k += Unit::K) add_step<TRANSPOSED_B>(c, a_tile, pitch, b_tile, pitch, PAIRS, k);
  return true;
}

// All steps up to k1, a whole number of 16.
template <bool TRANSPOSED_B>
DEVICE void add_product(Tile& c, const OPERAND* a_tile, int a_pitch, const OPERAND* b_tile, int b_pitch, int pairs, int k1) {
  if (add_whole_product<TRANSPOSED_B, WIDEST>(c, a_tile, a_pitch, b_tile, b_pitch, pairs, k1)) return;
#ifndef MAX_WIDTH
  if (add_whole_product<TRANSPOSED_B, WIDEST / 2>(c, a_tile, a_pitch, b_tile, b_pitch, pairs, k1)) return;
#endif
#pragma unroll 1
  for (int k = 0; k < k1; k += Unit::K) {
    add_step<TRANSPOSED_B>(c, a_tile, a_pitch, b_tile, b_pitch, pairs, 0);
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
  int pitch, left;
  uint32 counts[2];

  DEVICE TileRows(OPERAND* rows, int pitch, int m0, int n0, int valid, int n)
      : at(rows + (m0 + fragment_row(0)) * pitch + n0 + fragment_column(0)), pitch(pitch), left(n - n0 - fragment_column(0)) {
#pragma unroll
    for (int p = 0; p < 2; ++p) counts[p] = m0 + fragment_row(2 * p) < valid ? 0xffffffffu : 0;
  }

  DEVICE Words* pair(int f, int p) const { return (Words*)(at + p * 8 * pitch + f * 8); }

  DEVICE void load(float (&values)[4], int f) const {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      PairBits bits;
      bits.words = *pair(f, p);
      widen_pair(bits.pair, bits.words.at[0], values[2 * p], values[2 * p + 1]);
    }
  }

  // Numbers become what is stored.
  template <bool ALL_COLUMNS>
  DEVICE void store(int f, float (&values)[4]) const {
    const PairBits columns = first_of_pair(ALL_COLUMNS ? 2 : left - f * 8);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      PairBits bits;
      narrow(values[2 * p], bits.pair.at[0]), narrow(values[2 * p + 1], bits.pair.at[1]);
#pragma unroll
      for (int i = 0; i < PairBits::WORDS; ++i) bits.words.at[i] &= columns.words.at[i] & counts[p];
      *pair(f, p) = bits.words;
      values[2 * p] = widen(bits.pair.at[0]), values[2 * p + 1] = widen(bits.pair.at[1]);
    }
  }
};

// Smooth activations take much code, which stands once: body(values of the first pair of fragments) for each pair, which move up to where
// it finds them.
template <typename Body>
DEVICE void each_pair_in_turn(Tile& c, int pairs, Body body) {
#pragma unroll 1
  for (int p = 0; p < pairs; ++p) {
    body(p, c[0], c[1]);
#pragma unroll
    for (int f = 2; f < FRAGMENTS; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[f - 2][e] = c[f][e];
  }
}

// Calls body(an activation known to the compiler) for a piecewise linear one.
template <int ACTIVATION> struct KnownActivation { static constexpr int activation = ACTIVATION; };
template <typename Body>
DEVICE void with_linear(int activation, Body body) {
  switch (activation) {
    case IDENTITY: body(KnownActivation<IDENTITY>()); break;
    case RELU: body(KnownActivation<RELU>()); break;
    case LEAKY_RELU: body(KnownActivation<LEAKY_RELU>()); break;
  }
}

// h_{k+1} = g(h_k W^T + b), or a_L.
DEVICE void forward_layer(const Network& net, int k, const Place& place, int valid) {
  const int n_in = net[k].n_in, n_out = net[k].n_out, activation = net[k].activation, columns = whole(n_out);
  const bool last = k + 1 == net.layers;
#pragma unroll 1
  for (int n0 = place.first(columns); n0 < place.last(columns); n0 += 16 * PAIRS) {
    const int pairs = min(PAIRS, (place.last(columns) - n0) / 16);
    const float* bias = net.biases(k) + n0 + fragment_column(0);
    Tile c = {};
    add_product<true>(c, net.inputs(k) + place.row * net.pitch(k), net.pitch(k), net.weights(k) + n0 * net.pitch(k), net.pitch(k),
                      pairs, whole(n_in));
    each_fragment(pairs, columns - n0, [&](int f, auto) {
      const Group<float, 2> b = *(const Group<float, 2>*)(bias + f * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) c[f][e] += b.at[e % 2];
    });
    if (last) {
      float* top = net.top() + (place.row + fragment_row(0)) * net.pitch_top() + n0 + fragment_column(0);
      each_fragment(pairs, columns - n0, [&](int f, auto) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const Group<float, 2> pair = {c[f][2 * p], c[f][2 * p + 1]};
          *(Group<float, 2>*)(top + p * 8 * net.pitch_top() + f * 8) = pair;
        }
      });
      continue;
    }
    const TileRows out(net.inputs(k + 1), net.pitch(k + 1), place.row, n0, valid, n_out);
    if (piecewise_linear(activation)) {
      with_linear(activation, [&](auto known) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) activate_linear(decltype(known)::activation, c[f]);
      });
      each_fragment(pairs, n_out - n0, [&](int f, auto all) { out.store<decltype(all)::value>(f, c[f]); });
    } else {
      OPERAND* kept = net.kept(k + 1);
      const bool rounded = derivative_from_a(activation);  // so that g and g' see the same a
      const TileRows a_rows(kept ? kept : net.inputs(k + 1), net.pitch(k + 1), place.row, n0, valid, n_out);
      each_pair_in_turn(c, pairs, [&](int p, float (&first)[4], float (&second)[4]) {
        if (rounded) a_rows.store<false>(2 * p, first), a_rows.store<false>(2 * p + 1, second);
        float a[8];
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = first[e], a[4 + e] = second[e];
        activate_smooth(activation, a);
#pragma unroll
        for (int e = 0; e < 4; ++e) first[e] = a[e], second[e] = a[4 + e];
        out.store<false>(2 * p, first), out.store<false>(2 * p + 1, second);
      });
    }
  }
}

typedef Row<4, float> TopRow;
const int HELD = WIDEST / 4;  // of a row's numbers by a lane, at most

// The first row of this thread's in a slab: four lanes take every 64th row of a chain, however it is cut into slabs.
DEVICE int first_top_row(int offset) {
  const int at_once = THREADS / 4;
  return ((int)threadIdx.x / 4 + at_once - offset % at_once) % at_once;
}

// Calls body(row, its pre-activations) for every row of the slab that counts. `offset`: of the slab in its chain.
template <typename Body>
DEVICE void each_top_row(const Network& net, int offset, int valid, Body body) {
  for (int r = first_top_row(offset); r < valid; r += THREADS / 4)
    body(r, TopRow{net.top() + r * net.pitch_top(), net[net.layers].n_in});
}

// How a loss is computed.
struct LossOptions {
  int loss, output;
  float divisor;  // B over the scale that da carries
};

// Adds the losses of this thread's rows to `sum`, one by one, so that it does not depend on how a chain is cut into slabs; da_L, not
// yet rounded, in place of a_L. `first`: the slab's first sample.
DEVICE void add_losses(double& sum, const Network& net, const Samples& samples, const LossOptions& options, int first, int offset,
                       int valid) {
  each_top_row(net, offset, valid, [&](int r, const TopRow& row) {
    const int64 b = first + r;
    const float weight = samples.weight_b ? samples.weight_b[b] : 1.0f, scale = weight / options.divisor;
    float* a = net.top() + r * net.pitch_top();
    const auto write = [=](int j, float gradient) { a[j] = gradient * scale; };
    const int held = HELD < 16 ? HELD : 16;  // more would not fit into registers
    const bool holds = samples.labels_b && (HELD == held || row.n <= 4 * held);
    const int64* label = samples.labels_b && HELD > held ? samples.labels_b + b : nullptr;  // of a row that is not held
    const float value = holds ? label_loss<held>(row, samples.labels_b[b], write)
                              : loss_of_row(row, options.loss, options.output, label, samples.targets_bj + b * row.n, write);
    if (TopRow::lane() == 0) sum += (double)(value * weight);
  });
}

// da_L as operands, rows in the same place.
DEVICE void narrow_top(const Network& net, int offset, int valid) {
  const int n = net[net.layers].n_in, pitch = net.pitch_top();
  for (int r = first_top_row(offset); r < used_rows(valid); r += THREADS / 4) {
    const float* from = net.top() + r * pitch;
    OPERAND* to = net.inputs(net.layers) + r * net.pitch(net.layers);
    float gradients[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int j = TopRow::lane() + i * 4;
      gradients[i] = r < valid && j < n ? from[j] : 0.0f;
    }
    __syncwarp();  // the other lanes have read theirs
#pragma unroll
    for (int i = 0; i < HELD; ++i)
      if (i * 4 < whole(n)) narrow(gradients[i], to[TopRow::lane() + i * 4]);
  }
}

// A warp's part of a layer's sums over 32 rows. What lies beyond a layer's widths is not used: anything may be added to it.
template <int WIDTH, int FRAGMENTS_O, int FRAGMENTS_I>
struct RowSums {
  const OPERAND *da, *h;
  int pitch_da, pitch_h;
  int o[FRAGMENTS_O], i[FRAGMENTS_I / 2];

  DEVICE RowSums(const Rows& da, const Rows& h, int o0, int i0) : da(da.at), h(h.at), pitch_da(da.pitch), pitch_h(h.pitch) {
#pragma unroll
    for (int n = 0; n < FRAGMENTS_O; ++n) o[n] = min(o0 + n * 16, da.columns - 16);
#pragma unroll
    for (int n = 0; n < FRAGMENTS_I / 2; ++n) i[n] = min(i0 + n * 16, h.columns - 16);
  }

  // dW += da^T h for the next 32 rows; with DB, `db` += sum_b da, of which every fourth lane has a share.
  template <bool DB, int HELD_DB>
  DEVICE void add(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], float (&db)[HELD_DB]) {
    const int pitch = WIDTH + Unit::PAD;
    if (pitch_da == pitch && pitch_h == pitch)  // the compiler knows every address
      add<DB, sizeof(OPERAND) == 2 || WIDTH < 128 ? 2 : 1>(dw, db, pitch, pitch);
    else
      add<DB, 1>(dw, db, pitch_da, pitch_h);
    da += BAND * pitch_da, h += BAND * pitch_h;
  }

 private:
  template <bool DB, int UNROLL, int HELD_DB>
  DEVICE void add(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], float (&db)[HELD_DB], int pitch_da, int pitch_h) const {
    float sums[FRAGMENTS_O][4] = {};
#pragma unroll UNROLL
    for (int b = 0; b < BAND; b += Unit::K) {
      typename Unit::FragmentB columns[FRAGMENTS_I];
#pragma unroll
      for (int n = 0; n < FRAGMENTS_I; n += 2)
        Unit::template load_b<true, false>(columns[n], columns[n + 1], h + i[n / 2], pitch_h, 0, b);
#pragma unroll
      for (int n = 0; n < FRAGMENTS_O; ++n) {
        typename Unit::FragmentA rows;
        Unit::template load_a<true>(rows, da + o[n], pitch_da, 0, b);
#pragma unroll
        for (int m = 0; m < FRAGMENTS_I; ++m) Unit::multiply(dw[n][m], rows, columns[m]);
        if (DB) Unit::template add_row_sums<true>(sums[n], rows, da + o[n], pitch_da, 0, b);
      }
    }
#pragma unroll
    for (int v = 0; v < (DB ? 2 * FRAGMENTS_O : 0); ++v) {  // four lanes have the same sums
      if (v % 2 == 0) Unit::finish_row_sums(sums[v / 2]);
      db[v / 4] += (int)threadIdx.x % 4 == v % 4 ? sums[v / 2][v % 2 * 2] : 0.0f;
    }
  }
};

// dW += da^T h over the slab, a warp's part of it: rows o0 ..., columns i0 ... . Of db, a warp adds the rows of every SHARING-th 32 of a
// chain, so that sums do not depend on how it is cut into slabs: `mine` of the first 32 here is this warp's.
template <int WIDTH, int SHARING, int FRAGMENTS_O, int FRAGMENTS_I, int HELD_DB>
DEVICE void add_weights(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], float (&db)[HELD_DB], const Rows& da, const Rows& h, int valid, int o0,
                        int i0, int mine) {
  if (o0 >= da.columns) return;
  RowSums<WIDTH, FRAGMENTS_O, FRAGMENTS_I> sums(da, h, o0, i0);
#pragma unroll 1
  for (int first = 0; first < valid; first += BAND, --mine)
    if (mine % SHARING == 0)
      sums.template add<true>(dw, db);
    else
      sums.template add<false>(dw, db);
}

// da_{k-1} = (da_k W) g' in place of the layer's inputs, g' computed from `source`, rows as these; or, of the first layer,
// dx = (da_1 W) factor to global memory.
DEVICE void backward_layer(const Network& net, int k, const Place& place, int valid, OPERAND* source, float* dx, float factor) {
  const int n_in = net[k].n_in, columns = whole(n_in), n_out = net[k].n_out, activation = k ? net[k - 1].activation : IDENTITY;
#pragma unroll 1
  for (int n0 = place.first(columns); n0 < place.last(columns); n0 += 16 * PAIRS) {
    const int pairs = min(PAIRS, (place.last(columns) - n0) / 16);
    Tile c = {};
    add_product<false>(c, net.inputs(k + 1) + place.row * net.pitch(k + 1), net.pitch(k + 1), net.weights(k) + n0, net.pitch(k), pairs,
                       whole(n_out));
    if (!k) {
      each_fragment(pairs, columns - n0, [&](int f, auto) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = place.row + fragment_row(e), column = n0 + f * 8 + fragment_column(e);
          if (row < valid && column < n_in) dx[(int64)row * n_in + column] = c[f][e] * factor;
        }
      });
      continue;
    }
    const TileRows out(net.inputs(k), net.pitch(k), place.row, n0, valid, n_in);
    const TileRows sources(source, net.pitch(k), place.row, n0, valid, n_in);
    if (piecewise_linear(activation)) {
      with_linear(activation, [&](auto known) {
        each_fragment(pairs, columns - n0, [&](int f, auto) {
          float values[4];
          sources.load(values, f);
          times_derivative_linear(decltype(known)::activation, c[f], values);
        });
      });
      each_fragment(pairs, n_in - n0, [&](int f, auto all) { out.store<decltype(all)::value>(f, c[f]); });
    } else {
      each_pair_in_turn(c, pairs, [&](int p, float (&first)[4], float (&second)[4]) {
        float d[8], from[2][4], all[8];
        sources.load(from[0], 2 * p), sources.load(from[1], 2 * p + 1);
#pragma unroll
        for (int e = 0; e < 8; ++e) all[e] = from[e / 4][e % 4], d[e] = e < 4 ? first[e] : second[e - 4];
        times_derivative_smooth(activation, d, all);
#pragma unroll
        for (int e = 0; e < 4; ++e) first[e] = d[e], second[e] = d[4 + e];
        out.store<false>(2 * p, first), out.store<false>(2 * p + 1, second);
      });
    }
  }
}
