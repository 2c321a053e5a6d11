// What a block keeps in shared memory of a narrow network and of a slab of samples, and how it gets there and back. network_narrow.cu
// has the kernels.
//
// Widths are rounded up to whole numbers of 16; what lies outside a layer's widths, or outside the samples, is zero.
#pragma once
#include "fma_fragments.cuh"
#include "fragments.cuh"

#if TENSOR_CORES
typedef Mma<OPERAND> Unit;
#else
typedef Fma Unit;
#endif

const int WARPS = 8, THREADS = 32 * WARPS, TILE = 32;
#if defined(MAX_WIDTH) && MAX_WIDTH > 64
const int LOADS = 1;  // that a thread has on their way at a time: registers hold little beside dW
#else
const int LOADS = 2;
#endif
const int PAD = Unit::PAD;                           // of a row of operands, in numbers: no reads of fragments meet in a bank
const int PAD_TOP = sizeof(OPERAND) == 2 ? 4 : PAD;  // of a row of a_L, in float32, which becomes one of da_L

typedef Group<OPERAND, 2> Pair;

// A layer, as the host lays it out (gpuback/cuda/network_plans.py): widths, the activation behind it, and where things lie: in bytes
// of shared memory; in theta; and in the workspace of a network that writes its rows down, of which a batch has one matrix after
// the other: as the columns of those before. After the last layer follows an entry for what it gives.
struct Layer {
  int n_in, n_out, activation;
  int theta;                  // its weights' first number; its biases follow them
  int w, bias, db;            // weights as operands, biases, sums of db
  int h, a;                   // its inputs; and the pre-activations that they came from, where g' is computed from those, else 0
  int row_h, row_a, row_da;   // in the workspace: the same two, and the gradient of a
};

// Rows of operands in shared memory.
struct Rows {
  OPERAND* at;
  int pitch;
  int columns;  // a whole number of 16
};

DEVICE unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }  // orders NaN above infinity above all else
DEVICE int whole(int n) { return (n + 15) / 16 * 16; }  // what lies beyond a width, up to this, is zero
DEVICE int warp_index() { return (int)threadIdx.x / 32; }

struct Network {
  unsigned char* memory;
  int layers;

  DEVICE const Layer& operator[](int k) const { return ((const Layer*)memory)[k]; }
  DEVICE OPERAND* weights(int k) const { return (OPERAND*)(memory + (*this)[k].w); }
  DEVICE float* biases(int k) const { return (float*)(memory + (*this)[k].bias); }
  DEVICE float* bias_sums(int k) const { return (float*)(memory + (*this)[k].db); }
  DEVICE int pitch_w(int k) const { return whole((*this)[k].n_in) + PAD; }

  // The inputs of layer k, rows of operands, and later their gradient.
  DEVICE OPERAND* inputs(int k) const { return (OPERAND*)(memory + (*this)[k].h); }
  DEVICE int pitch(int k) const {
    return k < layers ? pitch_w(k) : pitch_top() * (int)(sizeof(float) / sizeof(OPERAND));
  }
  DEVICE Rows rows(int k) const { return {inputs(k), pitch(k), whole((*this)[k].n_in)}; }
  DEVICE OPERAND* kept(int k) const { return (*this)[k].a ? (OPERAND*)(memory + (*this)[k].a) : nullptr; }

  DEVICE float* top() const { return (float*)(memory + (*this)[layers].h); }
  DEVICE int pitch_top() const { return whole((*this)[layers].n_in) + PAD_TOP; }
};

struct Samples {
  const float* x_bi;
  const int64* labels_b;  // or null
  const float* targets_bj;
  const float* weight_b;  // or null
  int n_batch;
};

// ---- Before the first slab

DEVICE void load_layout(const Network& net, const int* layout) {
  const int numbers = (net.layers + 1) * (int)(sizeof(Layer) / sizeof(int));
  for (int i = threadIdx.x; i < numbers; i += THREADS) ((int*)net.memory)[i] = layout[i];
}

// `valid` rows of n numbers that lie behind each other, as operands; zeros up to whole columns and `rows` rows, N numbers
// at a time.
template <int N>
DEVICE void load_numbers(const Rows& to, const float* from, int n, int valid, int rows) {
  const int packs = n / N, total = valid * packs;
  const int step_row = THREADS / packs, step_pack = THREADS % packs;
  int r = threadIdx.x / packs, c = threadIdx.x % packs;
#pragma unroll 1
  for (int first = threadIdx.x; first < total; first += THREADS * LOADS) {
    Group<float, N> loaded[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (first + i * THREADS < total) loaded[i] = *(const Group<float, N>*)(from + (first + i * THREADS) * N);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      Group<OPERAND, N> operands;
#pragma unroll
      for (int j = 0; j < N; ++j) narrow(loaded[i].at[j], operands.at[j]);
      if (first + i * THREADS < total) *(Group<OPERAND, N>*)(to.at + r * to.pitch + c * N) = operands;
      r += step_row, c += step_pack;
      if (c >= packs) c -= packs, ++r;
    }
  }
  if (n == to.columns && valid == rows) return;
  for (int row = warp_index(); row < rows; row += WARPS)
    for (int i = threadIdx.x % 32; i < to.columns; i += 32)
      if (row >= valid || i >= n) narrow(0.0f, to.at[row * to.pitch + i]);
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
  load_numbers(Rows{net.weights(k), net.pitch_w(k), whole(n_in)}, weights, n_in, n_out, whole(n_out));
  for (int o = threadIdx.x; o < whole(n_out); o += THREADS) net.biases(k)[o] = o < n_out ? weights[n_out * n_in + o] : 0.0f;
}

// Has numbers on their way that are read later.
template <typename T>
DEVICE void prefetch(const T* from, int count) {
  for (int at = threadIdx.x * 128; at < count * (int)sizeof(T); at += THREADS * 128)
    prefetch_l2((const unsigned char*)from + at);
}

// ---- Samples: `valid` rows of a slab belong to the chain, the rest of the last 32 is zero

DEVICE int used_rows(int valid) { return ceil_div(valid, TILE) * TILE; }

// The samples from `first` on, of which `valid` count. What is read next is on its way then: their targets, and the next slab's samples.
DEVICE void load_samples(const Network& net, const Samples& samples, int first, int valid, int next) {
  const int n = net[0].n_in, n_top = net[net.layers].n_in;
  const float* x = samples.x_bi + (int64)first * n;
  if (samples.labels_b) prefetch(samples.labels_b + first, valid);
  if (samples.targets_bj) prefetch(samples.targets_bj + (int64)first * n_top, valid * n_top);
  prefetch(x + (int64)valid * n, next * n);
  load_numbers(net.rows(0), x, n, valid, used_rows(valid));
}

// ---- Rows on their way to the workspace and back

// Where a network's rows are written down: one matrix of the batch behind the other, rows of whole numbers of 16.
struct Workspace {
  OPERAND* at;
  int n_batch;

  DEVICE OPERAND* rows(int columns_before, int columns, int first) const {
    return at + (int64)columns_before * n_batch + (int64)first * columns;
  }
};

// Writes rows; returns the largest magnitude among them, as a float's bits.
DEVICE unsigned store_rows(OPERAND* to, const Rows& from, int valid) {
  const int width = Pack<OPERAND>::count, packs = from.columns / width;
  unsigned most = 0;
  for (int i = threadIdx.x; i < valid * packs; i += THREADS) {
    const int r = i / packs, column = i % packs * width;
    const Pack<OPERAND> pack = *(const Pack<OPERAND>*)(from.at + r * from.pitch + column);
#pragma unroll
    for (int j = 0; j < width; ++j) most = max(most, magnitude(widen(pack.at[j])));
    *(Pack<OPERAND>*)(to + (int64)r * from.columns + column) = pack;
  }
  return most;
}

// Begins to read rows; those beyond `valid`, up to `rows`, become zero.
DEVICE void load_rows(const Rows& to, const OPERAND* from, int valid, int rows) {
  const int width = Pack<OPERAND>::count, packs = to.columns / width;
  for (int i = threadIdx.x; i < rows * packs; i += THREADS) {
    const int r = i / packs, column = i % packs * width;
    const bool counts = r < valid;
    cp_async_16(to.at + r * to.pitch + column, counts ? from + (int64)r * to.columns + column : from, counts ? 16 : 0);
  }
  cp_async_commit();
}
