// Shared memory of a block: a network's weights and the rows of one batch tile, and copies of both from and to global
// memory. fused_step.cu and fused_passes.cu have the kernels.
//
// Widths are rounded up to multiples of 16. Numbers outside a layer's widths, or outside the samples, are zero.
#pragma once
#include "../tiles/fma_fragments.cuh"
#include "../tiles/mma_fragments.cuh"

#if TENSOR_CORES
typedef Mma<Element> Unit;
#else
typedef Fma Unit;
#endif

#ifdef MAX_WIDTH
const int WIDEST = MAX_WIDTH;
#else
const int WIDEST = 128;  // of all layers
#endif

const int THREADS = 32 * WARPS;  // WARPS, of a block, are 8 or 16
const int BAND = 32;  // rows that are added to db at a time; a batch tile has a multiple of them
const int LOADS = 64 / WARPS;  // of a thread that are on their way at a time

typedef Group<Element, 2> Pair;

// A layer, as the host lays it out (gpuback/_backends/cuda/network_layout.py): its widths, its activation, and places.
// Places are bytes of shared memory, numbers of theta, or columns of the workspace, which holds one matrix of the batch
// after the other. After the last layer follows an entry for the network's output.
struct Layer {
  int n_in, n_out, activation;
  int theta;                  // its weights' first number; its biases follow them
  int w, bias;                // weights as elements, biases
  int h, a;                   // its inputs; their pre-activations if g' is computed from those, else 0
  int pitch;                  // elements from one row of its inputs to the next, and of its weights
  int row_h, row_a, row_da;   // in the workspace: the same two, and the gradient of a
};

// Rows of elements in shared memory.
struct Rows {
  Element* at;
  int pitch;
  int columns;  // a multiple of 16
};

// |x| as bits, which are ordered as magnitudes are, with NaN above infinity above all else.
DEVICE unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
DEVICE int round_up_16(int n) { return (n + 15) & ~15; }  // numbers beyond a width, up to this, are zero
DEVICE int warp_index() { return threadIdx.x / 32; }

struct Network {
  unsigned char* memory;
  int layers;

  DEVICE const Layer& operator[](int k) const { return ((const Layer*)memory)[k]; }
  DEVICE Element* weights(int k) const { return (Element*)(memory + (*this)[k].w); }
  DEVICE float* biases(int k) const { return (float*)(memory + (*this)[k].bias); }

  // The inputs of layer k, rows of elements, and later their gradient.
  DEVICE Element* inputs(int k) const { return (Element*)(memory + (*this)[k].h); }
  DEVICE int pitch(int k) const { return (*this)[k].pitch; }
  DEVICE Rows rows(int k) const { return {inputs(k), pitch(k), round_up_16((*this)[k].n_in)}; }
  DEVICE Element* pre_activations(int k) const { return (*this)[k].a ? (Element*)(memory + (*this)[k].a) : nullptr; }
  DEVICE Element* pre_activations_or_inputs(int k) const {
    return (Element*)(memory + ((*this)[k].a ? (*this)[k].a : (*this)[k].h));
  }

  // 32 sums of a split's losses, behind the layers.
  DEVICE double* loss_sums() const { return (double*)(memory + (layers + 1) * sizeof(Layer)); }

  DEVICE float* top() const { return (float*)(memory + (*this)[layers].h); }
  DEVICE int pitch_top() const { return pitch(layers) / (int)(sizeof(float) / sizeof(Element)); }
};

struct Samples {
  const float* x_bi;
  const int64* labels_b;  // or null
  const float* targets_bj;
  const float* weight_b;  // or null
  int n_batch;
};

// ---- Before the first batch tile

// Begins a launch: loads the layout.
DEVICE Network load_network(unsigned char* memory, const int* layout, int layers) {
  const int numbers = (layers + 1) * (int)(sizeof(Layer) / sizeof(int));
  for (int i = threadIdx.x; i < numbers; i += THREADS) ((int*)memory)[i] = layout[i];
  __syncthreads();  // the layout is there
  return {memory, layers};
}

// The numbers of rows that a thread moves, N at a time. A power of two of threads covers a row; a thread moves the same
// columns of every row that it takes.
template <int N>
struct Column {
  int at, row, rows;  // its first number, the first of its rows, and the step from one to the next

  explicit DEVICE Column(int columns) {
    int across_log2 = 0;
    while (N << across_log2 < columns) ++across_log2;
    at = (threadIdx.x & (1 << across_log2) - 1) * N, row = threadIdx.x >> across_log2, rows = THREADS >> across_log2;
  }
};

// Loads `valid` contiguous rows of n numbers as elements, with zeros up to `to.columns` columns and `rows` rows.
template <int N>
DEVICE void load_numbers(const Rows& to, const float* from, int n, int valid, int rows) {
  const Column<N> column(to.columns);
  if (column.at >= to.columns) return;
#pragma unroll 1
  for (int row = column.row; row < rows; row += LOADS * column.rows) {
    Group<float, N> loaded[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int r = row + i * column.rows;
      loaded[i] = {};
      if (r < valid && column.at < n) loaded[i] = *(const Group<float, N>*)(from + r * n + column.at);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int r = row + i * column.rows;
      Group<Element, N> operands;
#pragma unroll
      for (int j = 0; j < N; ++j) to_element(loaded[i].at[j], operands.at[j]);
      if (r < rows) *(Group<Element, N>*)(to.at + r * to.pitch + column.at) = operands;
    }
  }
}

DEVICE void load_numbers(const Rows& to, const float* from, int n, int valid, int rows) {
  if (n % 4 == 0 && (uint64)from % 16 == 0)
    load_numbers<4>(to, from, n, valid, rows);
  else
    load_numbers<1>(to, from, n, valid, rows);
}

DEVICE void load_layer(const Network& net, int k, const float* theta) {
  const int n_in = net[k].n_in, n_out = net[k].n_out;
  const float* weights = theta + net[k].theta;
  load_numbers(Rows{net.weights(k), net.pitch(k), round_up_16(n_in)}, weights, n_in, n_out, round_up_16(n_out));
  for (int o = threadIdx.x; o < round_up_16(n_out); o += THREADS)
    net.biases(k)[o] = o < n_out ? weights[n_out * n_in + o] : 0.0f;
}

// Calls load(k, theta) for all layers, whose theta has `count` numbers. It comes in one go, through `copy` in the place
// of the batch tile, if there is room in `bytes`.
template <typename Load>
DEVICE void load_layers(int layers, const float* theta, int count, float* copy, int64 bytes, Load load) {
  const bool copied = ceil_div(count, 4) * 16 <= bytes && (uint64)theta % 16 == 0;
  if (copied) {
    for (int i = threadIdx.x * 4; i < count; i += THREADS * 4)
      cp_async_16(copy + i, theta + i, min(16, (count - i) * 4));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // everyone's part is there
  }
#pragma unroll 1
  for (int k = 0; k < layers; ++k) load(k, copied ? copy : theta);
  __syncthreads();  // the batch tile's place is free
}

// Prefetches numbers that are read later.
template <typename T>
DEVICE void prefetch(const T* from, int count) {
  for (int at = threadIdx.x * 128; at < count * (int)sizeof(T); at += THREADS * 128)
    prefetch_l2((const unsigned char*)from + at);
}

// ---- Samples: `valid` rows of a batch tile belong to the split, the rest of the last 32 is zero

DEVICE int used_rows(int valid) { return ceil_div(valid, BAND) * BAND; }

// Loads `valid` samples from `first` on. Prefetches what is read next: their targets, and the next batch tile's
// samples.
DEVICE void load_samples(const Network& net, const Samples& samples, int first, int valid, int next) {
  const int n = net[0].n_in, n_top = net[net.layers].n_in;
  const float* x = samples.x_bi + (int64)first * n;
  if (samples.labels_b) prefetch(samples.labels_b + first, valid);
  if (samples.targets_bj) prefetch(samples.targets_bj + (int64)first * n_top, valid * n_top);
  prefetch(x + (int64)valid * n, next * n);
  load_numbers(net.rows(0), x, n, valid, used_rows(valid));
}

// ---- Rows to the workspace and back

// Where a network's rows are written: one matrix of the batch behind the other, columns rounded up to multiples of 16.
struct Workspace {
  Element* at;
  int n_batch;

  DEVICE Element* rows(int columns_before, int columns, int first) const {
    return at + (int64)columns_before * n_batch + (int64)first * columns;
  }
};

// Writes rows; returns the largest magnitude among them, as a float's bits.
DEVICE unsigned write_rows(Element* to, const Rows& from, int valid) {
  const Column<Pack<Element>::count> column(from.columns);
  unsigned most = 0;
  if (column.at >= from.columns) return most;
#pragma unroll 4
  for (int r = column.row; r < valid; r += column.rows) {
    const Pack<Element> pack = *(const Pack<Element>*)(from.at + r * from.pitch + column.at);
#pragma unroll
    for (int j = 0; j < Pack<Element>::count; ++j) most = max(most, magnitude(to_accum(pack.at[j])));
    *(Pack<Element>*)(to + r * from.columns + column.at) = pack;
  }
  return most;
}

// Begins to load rows. Rows from `valid` on, up to `rows`, become zero.
DEVICE void load_rows(const Rows& to, const Element* from, int valid, int rows) {
  const Column<Pack<Element>::count> column(to.columns);
  if (column.at < to.columns)
#pragma unroll 4
    for (int r = column.row; r < rows; r += column.rows)
      cp_async_16(to.at + r * to.pitch + column.at, from + (r < valid ? r * to.columns + column.at : 0),
                  r < valid ? 16 : 0);
  cp_async_commit();
}
