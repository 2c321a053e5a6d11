// What a block does with a slab of samples on their way through a narrow network: forward pass, loss, backward pass, layer by layer, in
// shared memory. network_narrow.cu has the kernels.
//
// A slab has up to 128 rows, a multiple of 32, of which `valid` belong to the chain; the rest of the last 32 is zero. A layer's product is
// made of tiles of 32 x 32, a warp each. Fragments lie as fragments.cuh says.
#pragma once
#include "epilogue.cuh"
#include "network_memory.cuh"
#include "output_rows.cuh"

// c = A B for a tile of 32 x 32; A stored [m][k], B stored [k][n] or, transposed, [n][k]; k and n reach up to whole numbers of 16.
template <bool TRANSPOSED_B>
DEVICE void multiply(float (&c)[2][4][4], const OPERAND* a_tile, int a_pitch, int m0, const OPERAND* b_tile, int b_pitch, int n0,
                     int n1, int k1) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
#pragma unroll 1
  for (int k = 0; k < k1; k += Unit::K) {
    typename Unit::FragmentA a[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) Unit::template load_a<false>(a[i], a_tile, a_pitch, m0 + i * 16, k);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      if (n0 + j * 8 >= n1) continue;
      typename Unit::FragmentB b[2];
      Unit::template load_b<false, TRANSPOSED_B>(b[0], b[1], b_tile, b_pitch, n0 + j * 8, k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Unit::multiply(c[i][j], a[i], b[0]);
        Unit::multiply(c[i][j + 1], a[i], b[1]);
      }
    }
  }
}

// A lane's two pairs of neighbours in a fragment of C: body(index of the pair, its row, its column).
template <typename Body>
DEVICE void each_pair(int m0, int n0, Body body) {
#pragma unroll
  for (int p = 0; p < 2; ++p) body(p, m0 + fragment_row(p * 2), n0 + fragment_column(0));
}

// Which code an activation takes, known to the compiler.
struct Linear {
  template <int N>
  static DEVICE void activate(int activation, float (&a)[N]) { activate_linear(activation, a); }
  template <int N>
  static DEVICE void times_derivative(int activation, float (&d)[N], const float (&source)[N]) {
    times_derivative_linear(activation, d, source);
  }
};
struct Smooth {
  template <int N>
  static DEVICE void activate(int activation, float (&a)[N]) { activate_smooth(activation, a); }
  template <int N>
  static DEVICE void times_derivative(int activation, float (&d)[N], const float (&source)[N]) {
    times_derivative_smooth(activation, d, source);
  }
};

// A tile's eight fragments: body(kind, fragment, its first row, its first column), for columns below n1. The code of smooth activations
// stands once: fragments move up to where it finds them.
template <typename Body>
DEVICE void each_fragment(float (&c)[2][4][4], int activation, int m0, int n0, int n1, Body body) {
  if (piecewise_linear(activation)) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (n0 + j * 8 < n1) body(Linear(), c[i][j], m0 + i * 16, n0 + j * 8);
    return;
  }
#pragma unroll 1
  for (int f = 0; f < 8; ++f) {
    if (n0 + f % 4 * 8 < n1) body(Smooth(), c[0][0], m0 + f / 4 * 16, n0 + f % 4 * 8);
#pragma unroll
    for (int i = 0; i < 7; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i / 4][i % 4][e] = c[(i + 1) / 4][(i + 1) % 4][e];
  }
}

// Two numbers as operands; zeros outside the slab's rows and the layer's columns.
DEVICE Pair narrow_pair(float first, float second, bool row_counts, int column, int n) {
  Pair pair;
  narrow(row_counts && column < n ? first : 0.0f, pair.at[0]);
  narrow(row_counts && column + 1 < n ? second : 0.0f, pair.at[1]);
  return pair;
}

// h_{k+1} = g(h_k W^T + b), or a_L.
DEVICE void forward_layer(const Network& net, int k, int valid) {
  const int n_in = net[k].n_in, n_out = net[k].n_out, activation = net[k].activation, n1 = whole(n_out);
  const bool last = k + 1 == net.layers, rounded = !last && derivative_from_a(activation);  // so that g and g' see the same a
  const float* bias = net.biases(k);
  OPERAND* out = net.inputs(k + 1);
  OPERAND* kept = net.kept(k + 1);
  const int pitch = net.pitch(k + 1), across = ceil_div(n1, TILE);
#pragma unroll 1
  for (int tile = warp_index(); tile < used_rows(valid) / TILE * across; tile += WARPS) {
    const int m0 = tile / across * TILE, n0 = tile % across * TILE;
    float c[2][4][4];
    multiply<true>(c, net.inputs(k), net.pitch(k), m0, net.weights(k), net.pitch_w(k), n0, n1, whole(n_in));
    each_fragment(c, last ? IDENTITY : activation, m0, n0, n1, [&](auto kind, const float (&sums)[4], int m, int n) {
      float a[4];
      each_pair(m, n, [&](int p, int row, int column) {
        const Group<float, 2> b = *(const Group<float, 2>*)(bias + column);
#pragma unroll
        for (int e = 0; e < 2; ++e) a[p * 2 + e] = sums[p * 2 + e] + b.at[e];
        if (last) {
          const Group<float, 2> pair = {a[p * 2], a[p * 2 + 1]};
          *(Group<float, 2>*)(net.top() + row * net.pitch_top() + column) = pair;
        }
        if (rounded) {
          const Pair pair = narrow_pair(a[p * 2], a[p * 2 + 1], row < valid, column, n_out);
          if (kept) *(Pair*)(kept + row * pitch + column) = pair;
          a[p * 2] = widen(pair.at[0]), a[p * 2 + 1] = widen(pair.at[1]);
        }
      });
      if (last) return;
      kind.activate(activation, a);
      each_pair(m, n, [&](int p, int row, int column) {
        *(Pair*)(out + row * pitch + column) = narrow_pair(a[p * 2], a[p * 2 + 1], row < valid, column, n_out);
      });
    });
  }
}

typedef Row<4, float> TopRow;

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
    const float weight = samples.weight_b ? samples.weight_b[b] : 1.0f, divisor = options.divisor;
    float* a = net.top() + r * net.pitch_top();
    const float value = loss_of_row(row, options.loss, options.output, samples.labels_b ? samples.labels_b + b : nullptr,
                                    samples.targets_bj + b * row.n,
                                    [=](int j, float gradient) { a[j] = gradient * weight / divisor; });
    if (TopRow::lane() == 0) sum += (double)(value * weight);
  });
}

// da_L as operands, rows in the same place. What is written in a round of four columns has been read in an earlier one.
DEVICE void narrow_top(const Network& net, int offset, int valid) {
  const int n = net[net.layers].n_in, pitch = net.pitch_top();
  for (int r = first_top_row(offset); r < used_rows(valid); r += THREADS / 4) {
    const float* from = net.top() + r * pitch;
    OPERAND* to = net.inputs(net.layers) + r * net.pitch(net.layers);
    for (int j = TopRow::lane(); j < whole(n); j += 4) {
      const float gradient = r < valid && j < n ? from[j] : 0.0f;
      __syncwarp();  // the other lanes have read theirs
      narrow(gradient, to[j]);
    }
  }
}

// dW += da^T h over `valid` rows, a warp's part of it: rows o0 ..., columns i0 ... .
template <int FRAGMENTS_O, int FRAGMENTS_I>
DEVICE void add_weights(float (&dw)[FRAGMENTS_O][FRAGMENTS_I][4], const Rows& da, const Rows& h, int valid, int o0, int i0) {
  if (o0 >= da.columns || i0 >= h.columns) return;
#pragma unroll 1
  for (int b = 0; b < whole(valid); b += Unit::K) {
    typename Unit::FragmentB columns[FRAGMENTS_I];
#pragma unroll
    for (int j = 0; j < FRAGMENTS_I; j += 2)
      if (i0 + j * 8 < h.columns)
        Unit::template load_b<true, false>(columns[j], columns[j + 1], h.at, h.pitch, i0 + j * 8, b);
#pragma unroll
    for (int i = 0; i < FRAGMENTS_O; ++i) {
      if (o0 + i * 16 >= da.columns) continue;
      typename Unit::FragmentA rows;
      Unit::template load_a<true>(rows, da.at, da.pitch, o0 + i * 16, b);
#pragma unroll
      for (int j = 0; j < FRAGMENTS_I; ++j)
        if (i0 + j * 8 < h.columns) Unit::multiply(dw[i][j], rows, columns[j]);
    }
  }
}

// db += sum_b da, 32 rows at a time, so that the sum does not depend on how a chain is cut into slabs.
DEVICE void add_biases(float* db, const Rows& da, int valid) {
#pragma unroll 1
  for (int o = warp_index() * 16; o < da.columns; o += WARPS * 16)
#pragma unroll 1
    for (int first = 0; first < valid; first += 32) {
      float sums[4] = {0, 0, 0, 0};
#pragma unroll 2
      for (int b = first; b < first + 32; b += Unit::K) {
        typename Unit::FragmentA rows;
        Unit::template load_a<true>(rows, da.at, da.pitch, o, b);
        Unit::template add_row_sums<true>(sums, rows, da.at, da.pitch, o, b);
      }
      Unit::finish_row_sums(sums);
      if (fragment_column(0) == 0) db[o + fragment_row(0)] += sums[0], db[o + fragment_row(2)] += sums[2];
    }
}

// da_{k-1} = (da_k W) g' in place of the layer's inputs, g' computed from `source`, rows as these; or, of the first layer,
// dx = (da_1 W) factor to global memory.
DEVICE void backward_layer(const Network& net, int k, int valid, const OPERAND* source, float* dx, float factor) {
  const int n_in = net[k].n_in, n1 = whole(n_in), n_out = net[k].n_out, activation = k ? net[k - 1].activation : IDENTITY;
  OPERAND* h = net.inputs(k);
  const int pitch = net.pitch(k), across = ceil_div(n1, TILE);
#pragma unroll 1
  for (int tile = warp_index(); tile < used_rows(valid) / TILE * across; tile += WARPS) {
    const int m0 = tile / across * TILE, n0 = tile % across * TILE;
    float c[2][4][4];
    multiply<false>(c, net.inputs(k + 1), net.pitch(k + 1), m0, net.weights(k), net.pitch_w(k), n0, n1, whole(n_out));
    each_fragment(c, activation, m0, n0, n1, [&](auto kind, const float (&sums)[4], int m, int n) {
      float d[4], sources[4];
      each_pair(m, n, [&](int p, int row, int column) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          d[p * 2 + e] = sums[p * 2 + e];
          if (!k && row < valid && column + e < n_in) dx[(int64)row * n_in + column + e] = d[p * 2 + e] * factor;
        }
        if (!k) return;
        const Pair pair = *(const Pair*)(source + row * pitch + column);
        sources[p * 2] = widen(pair.at[0]), sources[p * 2 + 1] = widen(pair.at[1]);
      });
      if (!k) return;
      kind.times_derivative(activation, d, sources);
      each_pair(m, n, [&](int p, int row, int column) {
        *(Pair*)(h + row * pitch + column) = narrow_pair(d[p * 2], d[p * 2 + 1], row < valid, column, n_in);
      });
    });
  }
}
