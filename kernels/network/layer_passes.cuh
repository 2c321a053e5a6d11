// A layer's forward and backward pass over a batch tile, in shared memory:
//
//     forward_layer      h_k = g_k(h_{k-1} W_k^T + b_k), or a_L in float32
//     backward_layer     da_{k-1} = (da_k W_k) g'_{k-1} in place of h_{k-1}, or dx in global memory
//
// A warp computes some of the columns of 16 rows (warp_products.cuh), and stores them as elements, pairs of neighbours
// at a time. Numbers outside a layer or a batch are masked, four bytes at a time: a branch would cost registers.
#pragma once
#include "../common/activations.cuh"
#include "warp_products.cuh"

// Two neighbouring elements, and their bits.
union PairBits {
  static constexpr int WORDS = sizeof(Pair) / 4;
  Pair pair;
  Group<uint32, WORDS> words;
};

DEVICE void pair_to_float(const Group<bfloat16, 2>&, uint32 word, float& first, float& second) {
  first = __uint_as_float(word << 16), second = __uint_as_float(word & 0xffff0000u);
}
template <typename T>
DEVICE void pair_to_float(const Group<T, 2>& pair, uint32, float& first, float& second) {
  first = to_accum(pair.at[0]), second = to_accum(pair.at[1]);
}

// A mask of the first `count` of two neighbours.
DEVICE PairBits first_of_pair(int count) {
  PairBits bits;
#pragma unroll
  for (int i = 0; i < PairBits::WORDS; ++i)
    bits.words.at[i] = count >= 2 ? 0xffffffffu : count < 1 || i ? 0 : PairBits::WORDS == 1 ? 0xffffu : 0xffffffffu;
  return bits;
}

// Rows of elements to which this lane stores pairs, with zeros outside of `valid` rows and `n` columns.
struct TileRows {
  typedef Group<uint32, PairBits::WORDS> Words;
  Element* at;  // this lane's first pair
  int pitch, columns, left;  // of n: from the tile's first column on, and from the lane's
  uint32 row_masks[2];

  DEVICE TileRows(Element* rows, int pitch, const WarpRows& warp_rows, int n0, int valid, int n)
      : at(rows + (warp_rows.row() + fragment_row(0)) * pitch + n0 + fragment_column(0)),
        pitch(pitch),
        columns(n - n0),
        left(n - n0 - fragment_column(0)) {
#pragma unroll
    for (int p = 0; p < 2; ++p) row_masks[p] = warp_rows.row() + fragment_row(2 * p) < valid ? 0xffffffffu : 0;
  }

  DEVICE Words* pair(int f, int p) const { return (Words*)(at + p * 8 * pitch + f * 8); }

  DEVICE void load(float* values, int f) const {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      PairBits bits;
      bits.words = *pair(f, p);
      pair_to_float(bits.pair, bits.words.at[0], values[2 * p], values[2 * p + 1]);
    }
  }

  // Stores four numbers of a fragment, and rounds them to what is stored.
  template <bool ALL_COLUMNS>
  DEVICE void store(int f, float* values) const {
    const PairBits column_mask = first_of_pair(ALL_COLUMNS ? 2 : left - f * 8);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      PairBits bits;
      to_element(values[2 * p], bits.pair.at[0]), to_element(values[2 * p + 1], bits.pair.at[1]);
#pragma unroll
      for (int i = 0; i < PairBits::WORDS; ++i) bits.words.at[i] &= column_mask.words.at[i] & row_masks[p];
      *pair(f, p) = bits.words;
      values[2 * p] = to_accum(bits.pair.at[0]), values[2 * p + 1] = to_accum(bits.pair.at[1]);
    }
  }

  // The same for several fragments, from f on.
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

  // Stores all fragments of a tile.
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

// Calls body(fragment, the values of AT_ONCE fragments from it on) for all fragments, in a loop that is not unrolled:
// smooth activations take much code. The values of later fragments move to where the next turn finds them.
template <typename Body>
DEVICE void each_fragment_in_turn(Tile& c, int pairs, Body body) {
#pragma unroll 1
  for (int first = 0; first < 2 * pairs; first += AT_ONCE) {
    float values[4 * AT_ONCE];
#pragma unroll
    for (int e = 0; e < 4 * AT_ONCE; ++e) values[e] = c[e / 4][e % 4];
    body(first, values);
#pragma unroll
    for (int f = AT_ONCE; f < 2 * SMOOTH_PAIRS; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[f - AT_ONCE][e] = c[f][e];
  }
}

// Calls body(activation, as a constant) for a piecewise linear one.
template <typename Body>
DEVICE void with_linear(int activation, Body body) {
  switch (activation) {
    case IDENTITY: body(Constant<IDENTITY>()); break;
    case RELU: body(Constant<RELU>()); break;
    case LEAKY_RELU: body(Constant<LEAKY_RELU>()); break;
  }
}

// h_{k+1} = g(h_k W^T + b), or a_L.
DEVICE void forward_layer(const Network& net, int k, const WarpRows& warp_rows, int valid) {
  const int n_in = net[k].n_in, n_out = net[k].n_out, activation = net[k].activation, columns = round_up_16(n_out);
  const bool last = k + 1 == net.layers;
  if (warp_rows.row() >= used_rows(valid)) return;
  int pairs;
#pragma unroll 1
  for (int n0 = warp_rows.first(columns); n0 < warp_rows.last(columns); n0 += 16 * pairs) {
    pairs = pairs_of(warp_rows.last(columns) - n0, activation);
    Tile c = {};
    with_pairs(pairs, [&](auto count) {
      add_product<true, count.value>(c, net.inputs(k) + warp_rows.row() * net.pitch(k), net.pitch(k),
                                     net.weights(k) + n0 * net.pitch(k), net.pitch(k), round_up_16(n_in));
      const float* bias = net.biases(k) + n0 + fragment_column(0);
#pragma unroll
      for (int f = 0; f < 2 * count.value; ++f) {
        const Group<float, 2> b = *(const Group<float, 2>*)(bias + f * 8);
#pragma unroll
        for (int e = 0; e < 4; ++e) c[f][e] += b.at[e % 2];
      }
    });
    if (last) {
      float* top = net.top() + (warp_rows.row() + fragment_row(0)) * net.pitch_top() + n0 + fragment_column(0);
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
    const TileRows out(net.inputs(k + 1), net.pitch(k + 1), warp_rows, n0, valid, n_out);
    if (piecewise_linear(activation)) {
      with_linear(activation, [&](auto constant) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) activate_linear(constant.value, c[f]);
      });
      out.store_tile(c, pairs);
    } else {
      const bool rounded = derivative_from_a(activation);  // so that g and g' see the same a
      const TileRows a_rows(net.pre_activations_or_inputs(k + 1), net.pitch(k + 1), warp_rows, n0, valid, n_out);
      each_fragment_in_turn(c, pairs, [&](int f, float (&a)[4 * AT_ONCE]) {
        if (rounded) a_rows.store_all(f, a);
        activate_smooth(activation, a);
        out.store_all(f, a);
      });
    }
  }
}

// da_{k-1} = (da_k W) g' in place of the layer's inputs. g' is computed from what lies there or, with
// FROM_PRE_ACTIVATIONS, from the pre-activations if the layer has them. For the first layer: dx = (da_1 W) factor, to
// global memory. `first`: the batch tile's first sample.
template <bool FROM_PRE_ACTIVATIONS>
DEVICE void backward_layer(const Network& net, int k, const WarpRows& warp_rows, int valid, float* dx_bi, int first,
                           float factor) {
  const int n_in = net[k].n_in, columns = round_up_16(n_in), n_out = net[k].n_out;
  const int activation = k ? net[k - 1].activation : IDENTITY;
  if (warp_rows.row() >= used_rows(valid)) return;
  int pairs;
#pragma unroll 1
  for (int n0 = warp_rows.first(columns); n0 < warp_rows.last(columns); n0 += 16 * pairs) {
    pairs = pairs_of(warp_rows.last(columns) - n0, activation);
    Tile c = {};
    with_pairs(pairs, [&](auto count) {
      add_product<false, count.value>(c, net.inputs(k + 1) + warp_rows.row() * net.pitch(k + 1), net.pitch(k + 1),
                                      net.weights(k) + n0, net.pitch(k), round_up_16(n_out));
    });
    if (!k) {
      float* dx = dx_bi + (int64)first * n_in;
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = warp_rows.row() + fragment_row(e), column = n0 + f * 8 + fragment_column(e);
          if (f < 2 * pairs && row < valid && column < n_in) dx[row * n_in + column] = c[f][e] * factor;
        }
      continue;
    }
    const TileRows out(net.inputs(k), net.pitch(k), warp_rows, n0, valid, n_in);
    const TileRows sources(FROM_PRE_ACTIVATIONS ? net.pre_activations_or_inputs(k) : net.inputs(k), net.pitch(k),
                           warp_rows, n0, valid, n_in);
    if (piecewise_linear(activation)) {
      with_linear(activation, [&](auto constant) {
        with_pairs(pairs, [&](auto count) {
#pragma unroll
          for (int f = 0; f < 2 * count.value; ++f) {
            float values[4];
            sources.load(values, f);
            times_derivative_linear(constant.value, c[f], values);
          }
        });
      });
      out.store_tile(c, pairs);
    } else {
      each_fragment_in_turn(c, pairs, [&](int f, float (&d)[4 * AT_ONCE]) {
        float from[4 * AT_ONCE];
        sources.load_all(from, f);
        times_derivative_smooth(activation, d, from);
        out.store_all(f, d);
      });
    }
  }
}
