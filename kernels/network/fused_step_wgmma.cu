// A training step of a narrow network in one launch, on Hopper's tensor cores (wgmma), for up to MAX_LAYERS layers of
// at most MAX_WIDTH. Equations, shapes and arguments are those of fused_step.cu.
//
// A block takes a split of the batch through the whole network, 128 samples at a time, a slab. Its warpgroups have
// roles:
//
//     warpgroups 0, 1  "passes": 64 rows of the slab each. x and then every h_k and da_k stays in registers, as A of
//                      the next product (ptx_sm90.cuh)
//                        up    h_{k+1} = g(h_k W_k^T + b_k)             top   the losses and da_L
//                        down  da_{k-1} = (da_k W_k) g'(h_{k-1})
//     warpgroups 2, 3  "sums": dW_k and db_k of every second layer each, in registers for the whole split
//                        dW_k += da_k^T h_{k-1} over the slab
//
//     shared memory, panels of MAX_WIDTH columns
//       W_1 ... W_L      for the whole launch
//       h_0 ... h_{L-1}  of the slab, for g' and for dW
//       two places       of da, from the passes to the sums, by turns; before that of a_L
//       ones             16 rows, 1 in the first of 8 columns: they stand beside h, and make db columns of dW
//
// Where g' is computed from a, the place of h_k holds a_k, as elements, until the way down; then h_k.
//
// Barriers in shared memory: `full[p]` (da has come to place p: a lane of each warp of passes), `empty[p]` (dW has read
// it) and `h_free[k]` (dW has read h_k: a lane of each warp of sums). Passes wait for `empty` two layers later, for
// `h_free` in the next slab. Nobody skips a phase: a place belongs to one warpgroup of sums.
//
// A product is issued before its own A is stored to shared memory: the stores, and the fence behind them, are hidden
// behind it. At the end of the split the sums are partial results, and all warps join pieces of them
// (reduce_and_step.cuh).
//
// With B = 65536 and seven layers of 64: 128 splits of 512 rows, 4 slabs each.
//
// Variants: Element (bfloat16, float16); MAX_WIDTH and MAX_LAYERS 64 and 7, 32 and 14. 512 threads.
// DB_APART 1 makes db by products of its own, 8 columns wide: for a device that does not take ones for columns beside
// h, which lie elsewhere.
#ifndef DB_APART
#define DB_APART 0
#endif
#define WARPS 16
#define TENSOR_CORES 1
#include "../tiles/warpgroup_products.cuh"
#include "output_losses.cuh"
#include "reduce_and_step.cuh"

const int COLUMNS = MAX_WIDTH, ROW_BYTES = 2 * COLUMNS, EIGHT_ROWS = 8 * ROW_BYTES;  // of a panel
const int SLAB = 128, STRIPS = SLAB / 16, STRIP = 16 * ROW_BYTES;  // a strip: the 16 rows of a warp of passes
const int PANEL = SLAB * ROW_BYTES, W_PANEL = COLUMNS * ROW_BYTES;
const int K_STEPS = COLUMNS / 16;  // of a product with W
const int COUNT = COLUMNS / 2;     // numbers that a lane holds of 64 x COLUMNS
const int SUMS = COUNT + 4;        // with db's 8 columns beside them
const int SUMS_WARPS = 4;          // of each of the two warpgroups
const int FIRST_LAYERS = (MAX_LAYERS + 1) / 2, SECOND_LAYERS = MAX_LAYERS / 2;  // whose sums these hold

// Registers of a thread: of passes, of the two warpgroups of sums, and before and after.
const int PASSES_REGISTERS = COLUMNS == 64 ? 96 : 80, FIRST_REGISTERS = 176;
const int SECOND_REGISTERS = COLUMNS == 64 ? 144 : 176, COMMON_REGISTERS = 65536 / THREADS;

// A strip's da in the two places, one behind the other. Before, its a_L is there, in rows of TOP_PITCH numbers.
const int TOP_PITCH = COLUMNS + 8, DA_STRIP = (16 * TOP_PITCH * 4 + EIGHT_ROWS - 1) / EIGHT_ROWS * EIGHT_ROWS;

// Bytes of shared memory before each part. A sum of losses is a thread's.
const int H = MAX_LAYERS * W_PANEL, DA = H + MAX_LAYERS * PANEL, ONES = DA + STRIPS * DA_STRIP;
const int BIASES = ONES + STRIP, BARRIERS = BIASES + MAX_LAYERS * COLUMNS * 4;
const int TABLE = (BARRIERS + (4 + MAX_LAYERS) * 8 + 15) / 16 * 16;
const int ROWS = TABLE + (MAX_LAYERS + 1) * (int)sizeof(Layer) + THREADS / 2 * 8;

typedef Wgmma<Element> Products;
typedef uint32 Operand[K_STEPS][4];  // a strip as A of a product, pairs of elements
typedef float Tile64[COUNT];         // a lane's sums of a product, of 64 rows

// A part of a layer's dW and db: 16 rows, those of one warp of sums, and some of a lane's packs. The first is db's.
struct Piece {
  static constexpr int PACKS = 3, PARTS = (SUMS / 4 + PACKS - 1) / PACKS;
  static constexpr int SIZE = PACKS * 128, SLOTS = COLUMNS / 16 * PARTS;
  static constexpr int PREFETCH = 16;  // packs of partial results that are on their way to a lane
  int index;

  DEVICE int slot() const { return index; }
  DEVICE int strip() const { return index / PARTS; }
  DEVICE int first() const { return index % PARTS * PACKS; }
  static DEVICE int used(const Layer& layer) { return 1 + ceil_div(layer.n_in, 8); }
  DEVICE int packs(const Layer& layer) const {
    return strip() * 16 < layer.n_out ? max(0, min(PACKS, used(layer) - first())) : 0;
  }
  // Calls body(where a number of this lane belongs among the layer's parameters), if anywhere.
  template <typename Body>
  DEVICE void at_place(const Layer& layer, int index, Body body) const {
    const int pack = first() + index / 4, o = strip() * 16 + fragment_row(index % 4);
    if (o >= layer.n_out) return;
    if (pack == 0) {
      if (fragment_column(index % 4) == 0) body(layer.n_out * layer.n_in + o);
      return;
    }
    const int i = (pack - 1) * 8 + fragment_column(index % 4);
    if (i < layer.n_in) body(o * layer.n_in + i);
  }
};
static_assert(WARPS * Piece::PREFETCH * 512 <= ONES - H, "circular buffers take the places of h and da");

// Which rows of the batch a block takes. They are read again where they are needed, as registers do not last for them.
struct SplitRows {
  int first, end;

  DEVICE int slabs() const volatile { return ceil_div(end - first, SLAB); }
};

// Addresses in shared memory.
struct Places {
  uint32 base;

  DEVICE uint32 w(int k) const { return base + k * W_PANEL; }
  DEVICE uint32 h(int k, int strip) const { return base + H + k * PANEL + strip * STRIP; }
  DEVICE uint32 da(int place, int strip) const { return base + DA + strip * DA_STRIP + place * STRIP; }
  DEVICE uint32 ones() const { return base + ONES; }
  DEVICE uint32 full(int place) const { return base + BARRIERS + 8 * place; }
  DEVICE uint32 empty(int place) const { return full(2 + place); }
  DEVICE uint32 h_free(int k) const { return full(4 + k); }
};

// Where 16 bytes of a panel's row lie in it.
DEVICE int chunk_place(int row, int chunk) {
  return row * ROW_BYTES + ((chunk ^ row * ROW_BYTES / 128 & COLUMNS / 8 - 1) << 4);
}

DEVICE uint64 descriptor(uint32 start, uint32 leading) {
  return panel_descriptor(start, leading, EIGHT_ROWS, ROW_BYTES);
}

// ---- Before the first slab

// Loads a layer's weights, with zeros outside, and its biases.
DEVICE void load_panel(unsigned char* memory, const Network& net, int k, const float* theta) {
  const int n_in = net[k].n_in, n_out = net[k].n_out;
  const float* weights = theta + net[k].theta;
#pragma unroll 4
  for (int i = threadIdx.x; i < COLUMNS * COLUMNS / 2; i += THREADS) {
    const int o = i / (COLUMNS / 2), column = i % (COLUMNS / 2) * 2;
    const bool inside = o < n_out && column < n_in;
    const float first = inside ? weights[o * n_in + column] : 0.0f;
    const float second = inside && column + 1 < n_in ? weights[o * n_in + column + 1] : 0.0f;
    *(uint32*)(memory + k * W_PANEL + chunk_place(o, column / 8) + column % 8 * 2) = Products::pack(first, second);
  }
  const int o = threadIdx.x;
  if (o < COLUMNS) ((float*)(memory + BIASES))[k * COLUMNS + o] = o < n_out ? weights[n_out * n_in + o] : 0.0f;
}

// Initialises barriers and ones.
DEVICE void begin(unsigned char* memory, const Places& at) {
  if (threadIdx.x == 0) {
    for (int place = 0; place < 2; ++place) {
      mbarrier_init(at.full(place), STRIPS);
      mbarrier_init(at.empty(place), SUMS_WARPS);
    }
    for (int k = 0; k < MAX_LAYERS; ++k) mbarrier_init(at.h_free(k), SUMS_WARPS);
    fence_mbarrier_init();
  }
  for (int i = threadIdx.x; i < 16 * COLUMNS / 2; i += THREADS) {
    const int row = i / (COLUMNS / 2), word = i % (COLUMNS / 2);
    *(uint32*)(memory + ONES + chunk_place(row, word / 4) + word % 4 * 4) = word ? 0 : Products::pack(1, 0);
  }
}

// ---- Passes

// The strip of a slab that a warp takes through the network. A lane holds numbers of two of its rows.
struct PassesWarp {
  Places at;
  unsigned char* memory;
  int strip;
  int sample;  // of the strip's first row
  int valid;   // of its rows, those that are samples; may be less than 0
  uint32 own;  // this lane's part of an address for ldmatrix and stmatrix

  DEVICE PassesWarp(const Places& at, unsigned char* memory, int strip, int first, int end)
      : at(at),
        memory(memory),
        strip(strip),
        sample(first + strip * 16),
        valid(min(16, end - sample)),
        own(chunk_place(threadIdx.x % 16, threadIdx.x % 32 / 16)) {}

  DEVICE const volatile SplitRows& rows() const { return *(const volatile SplitRows*)(memory + ROWS); }
  DEVICE bool has_row(int p) const { return fragment_row(2 * p) < valid; }
  DEVICE uint32 h(int k) const { return at.h(k, strip); }

  // This lane's address for ldmatrix and stmatrix of a strip that lies at `rows`, columns 16 p ... .
  DEVICE uint32 fragment(uint32 rows, int p) const { return rows + (own ^ p << 5); }

  // Sets to zero what lies outside of the samples and of n columns.
  DEVICE void keep_inside(uint32 (&pairs)[4], int p, int n) const {
    if (n == COLUMNS && valid >= 16) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int left = n - p * 16 - i / 2 * 8 - fragment_column(0);
      pairs[i] &= !has_row(i % 2) ? 0 : left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0;
    }
  }

  DEVICE void store(uint32 to, const Operand& rows) const {
#pragma unroll
    for (int p = 0; p < K_STEPS; ++p) stmatrix_x4(fragment(to, p), rows[p]);
  }

  // Tells that all lanes have written what is read asynchronously.
  DEVICE void arrive(uint32 barrier) const {
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  }
};

// Reads x as the first product's A, N neighbours at a time.
template <int N>
DEVICE void load_inputs(const PassesWarp& warp, const float* x_bi, int n, Operand& to) {
  Group<float, N> loaded[4 * K_STEPS][2 / N];
  const float* from = x_bi + (int64)warp.sample * n;
  const int own = fragment_row(0) * n + fragment_column(0);
#pragma unroll
  for (int i = 0; i < 4 * K_STEPS; ++i)
#pragma unroll
    for (int j = 0; j < 2 / N; ++j) {
      const int column = i / 2 * 8 + j;
      loaded[i][j] = {};
      if (warp.has_row(i % 2) && fragment_column(0) + column < n)
        loaded[i][j] = *(const Group<float, N>*)(from + (own + i % 2 * 8 * n + column));
    }
#pragma unroll
  for (int i = 0; i < 4 * K_STEPS; ++i)
    to[i / 4][i % 4] = Products::pack(loaded[i][0].at[0], loaded[i][(2 / N) - 1].at[N - 1]);
}

DEVICE void load_inputs(const PassesWarp& warp, const float* x_bi, int n, Operand& to) {
  if (n % 2 == 0 && (uint64)x_bi % 8 == 0)
    load_inputs<2>(warp, x_bi, n, to);
  else
    load_inputs<1>(warp, x_bi, n, to);
}

// Prefetches rows of n numbers that a warp reads later.
template <typename T>
DEVICE void prefetch_rows(const T* from, int sample, int rows, int n) {
  const unsigned char* first = (const unsigned char*)(from + (int64)sample * n);
  for (int i = threadIdx.x % 32 * 128; i < rows * n * (int)sizeof(T); i += 32 * 128) prefetch_l2(first + i);
}

// The targets of a warp's rows, and the inputs of those that it has in the next slab.
DEVICE void prefetch_samples(const PassesWarp& warp, const Network& net, const Samples& samples) {
  if (samples.labels_b) prefetch_rows(samples.labels_b, warp.sample, warp.valid, 1);
  if (samples.targets_bj) prefetch_rows(samples.targets_bj, warp.sample, warp.valid, net[net.layers].n_in);
  const int next = warp.sample + SLAB;
  prefetch_rows(samples.x_bi, next, min(16, warp.rows().end - next), net[0].n_in);
}

// Begins c = A W^T, and A W.
DEVICE void multiply_up(Tile64& c, const Operand& a, uint32 w) {
  wgmma_fence();
#pragma unroll
  for (int p = 0; p < K_STEPS; ++p) Products::rs<0>(c, a[p], descriptor(w + p * 32, 16), 1);
  wgmma_commit();
}

DEVICE void multiply_down(Tile64& c, const Operand& a, uint32 w) {
  wgmma_fence();
#pragma unroll
  for (int p = 0; p < K_STEPS; ++p) Products::rs<1>(c, a[p], descriptor(w + p * 16 * ROW_BYTES, W_PANEL), 1);
  wgmma_commit();
}

DEVICE void pack(const float (&values)[8], uint32 (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = Products::pack(values[2 * i], values[2 * i + 1]);
}

DEVICE void unpack(const uint32 (&pairs)[4], float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) Products::unpack(pairs[i], values[2 * i], values[2 * i + 1]);
}

// Calls body(p, eight sums, their pairs) for the columns 16 p ... of a product, from which it makes the next one's A.
template <typename Body>
DEVICE void each_step(const Tile64& c, Operand& a, Body body) {
#pragma unroll
  for (int p = 0; p < K_STEPS; ++p) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = c[8 * p + i];
    body(p, values, a[p]);
  }
}

// The same in a loop that is not unrolled: smooth activations take much code. Sums move to where the next turn finds
// them, and pairs to where they were.
template <typename Body>
DEVICE void each_step_in_turn(Tile64& c, Operand& a, Body body) {
#pragma unroll 1
  for (int p = 0; p < K_STEPS; ++p) {
    float values[8];
    uint32 pairs[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = c[i];
    body(p, values, pairs);
#pragma unroll
    for (int i = 8; i < COUNT; ++i) c[i - 8] = c[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) c[COUNT - 8 + i] = __uint_as_float(pairs[i]);
  }
#pragma unroll
  for (int i = 0; i < 4 * K_STEPS; ++i) a[i / 4][i % 4] = __float_as_uint(c[i / 4 * 8 + i % 4]);
}

// Sums begin with the biases.
DEVICE void begin_with(Tile64& c, const float* biases) {
#pragma unroll
  for (int j = 0; j < COUNT / 4; ++j) {
    const Group<float, 2> b = *(const Group<float, 2>*)(biases + j * 8 + fragment_column(0));
#pragma unroll
    for (int e = 0; e < 4; ++e) c[4 * j + e] = b.at[e % 2];
  }
}

// The next A = g(c), n columns of it. Where g' is computed from a, g reads what is rounded, as g' will, and a is stored
// in the place of h.
DEVICE void activate_rows(const PassesWarp& warp, Tile64& c, Operand& a, int activation, int n, uint32 h) {
  if (piecewise_linear(activation)) {
    each_step(c, a, [&](int p, float (&values)[8], uint32 (&pairs)[4]) {
      activate_linear(activation, values);
      pack(values, pairs);
      warp.keep_inside(pairs, p, n);
    });
    return;
  }
  each_step_in_turn(c, a, [&](int p, float (&values)[8], uint32 (&pairs)[4]) {
    if (derivative_from_a(activation)) {
      pack(values, pairs);
      stmatrix_x4(warp.fragment(h, p), pairs);
      unpack(pairs, values);
    }
    activate_smooth(activation, values);
    pack(values, pairs);
    warp.keep_inside(pairs, p, n);
  });
}

// The next A = c g', n columns of it. ReLU's are rounded first: where g' is 0, a sum that is too large for an element
// makes NaN. Where g' is computed from a, h takes a's place.
DEVICE void times_derivative_rows(const PassesWarp& warp, Tile64& c, Operand& a, int activation, int n, uint32 h) {
  if (piecewise_linear(activation)) {
    each_step(c, a, [&](int p, float (&values)[8], uint32 (&pairs)[4]) {
      uint32 sources[4];
      ldmatrix_x4(sources, warp.fragment(h, p));
      if (activation == RELU) {
        pack(values, pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = Products::mul(pairs[i], Products::set_gt(sources[i], 0));
      } else {
        float from[8];
        unpack(sources, from);
        times_derivative_linear(activation, values, from);
        pack(values, pairs);
      }
      warp.keep_inside(pairs, p, n);
    });
    return;
  }
  each_step_in_turn(c, a, [&](int p, float (&values)[8], uint32 (&pairs)[4]) {
    float from[8];
    ldmatrix_x4(pairs, warp.fragment(h, p));
    unpack(pairs, from);
    times_derivative_smooth(activation, values, from);
    if (derivative_from_a(activation)) {
      activate_smooth(activation, from);
      pack(from, pairs);
      warp.keep_inside(pairs, p, n);
      stmatrix_x4(warp.fragment(h, p), pairs);
    }
    pack(values, pairs);
    warp.keep_inside(pairs, p, n);
  });
}

// A strip's losses from its a_L, c, and da_L as the next A. The rows go through the places of da, where eight lanes
// work on each. Adds a lane's part of the losses to `sum`.
DEVICE void losses_of_rows(const PassesWarp& warp, const Tile64& c, Operand& a, int n, const Samples& samples,
                           const LossOptions& options, double* sum) {
  float* rows = (float*)(warp.memory + DA + warp.strip * DA_STRIP);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* own = rows + fragment_row(2 * half) * TOP_PITCH + fragment_column(0);
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j) {
      const Group<float, 2> pair = {c[4 * j + 2 * half], c[4 * j + 2 * half + 1]};
      *(Group<float, 2>*)(own + j * 8) = pair;
    }
  }
  __syncwarp();  // a_L is there
#pragma unroll 1
  for (int first = 0; first < 16; first += 32 / TOP_LANES) {
    const int r = first + (int)(threadIdx.x % 32) / TOP_LANES;
    const float loss = sample_loss(rows + r * TOP_PITCH, n, samples, options, warp.sample + min(r, warp.valid - 1));
    if (TopRow::lane() == 0 && r < warp.valid) *sum += (double)loss;
  }
  __syncwarp();  // da_L is complete
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* own = rows + fragment_row(2 * half) * TOP_PITCH + fragment_column(0);
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j) {
      const Group<float, 2> pair = *(const Group<float, 2>*)(own + j * 8);
      a[j / 2][j % 2 * 2 + half] = Products::pack(pair.at[0], pair.at[1]);
    }
  }
  __syncwarp();  // it is read
#pragma unroll
  for (int p = 0; p < K_STEPS; ++p) warp.keep_inside(a[p], p, n);
}

// dx = c factor, for n inputs.
DEVICE void write_input_gradients(const PassesWarp& warp, int slab, const Tile64& c, float* dx_bi, int n,
                                  float factor) {
  float* to = dx_bi + (int64)(warp.rows().first + warp.strip * 16) * n + (int64)slab * SLAB * n;
  const int own = fragment_row(0) * n + fragment_column(0);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int column = i / 4 * 8 + i % 2, row = i / 2 % 2;
    if (warp.has_row(row) && fragment_column(0) + column < n) to[own + row * 8 * n + column] = c[i] * factor;
  }
}

// Takes the rows of a slab up and down. `slab`: its number in the split.
DEVICE void take_through(const PassesWarp& warp, const Network& net, const Samples& samples, const LossOptions& options,
                         int slab, float* dx_bi, float factor) {
  const Places& at = warp.at;
  const int layers = net.layers;
  // Uses of a place in a slab, and the wait for the end of the last one before `use`.
  const auto uses = [=](int place) { return layers + 1 - place >> 1; };
  const auto wait_empty = [=](int place, int use) {
    if (use) mbarrier_wait(at.empty(place), use - 1 & 1);
  };
  const auto wait_h_free = [=](int k) {
    if (slab) mbarrier_wait(at.h_free(k), slab - 1 & 1);
  };
  Operand a;
  Tile64 c;
  load_inputs(warp, samples.x_bi, net[0].n_in, a);
#pragma unroll
  for (int p = 0; p < K_STEPS; ++p) warp.keep_inside(a[p], p, net[0].n_in);
  bool keeps_a = false;  // in the place of the layer's inputs
#pragma unroll 1
  for (int k = 0;; ++k) {
    begin_with(c, (const float*)(warp.memory + BIASES) + k * COLUMNS);
    multiply_up(c, a, at.w(k));
    if (!keeps_a) {
      wait_h_free(k);
      warp.store(warp.h(k), a);
    }
    const bool last = k + 1 == layers;
    keeps_a = !last && derivative_from_a(net[k].activation);
    if (keeps_a) wait_h_free(k + 1);
    wgmma_wait<0>();
    if (last) break;
    activate_rows(warp, c, a, net[k].activation, net[k].n_out, warp.h(k + 1));
  }

  const int n_top = net[layers].n_in;
  // The places of da are free: dW has read every h of the slab before, and so every da.
  losses_of_rows(warp, c, a, n_top, samples, options, net.loss_sums() + threadIdx.x);

#pragma unroll 1
  for (int k = layers - 1;; --k) {
    const int which = layers - 1 - k, place = which & 1;
    Tile64 d = {};
    if (k || dx_bi) multiply_down(d, a, at.w(k));
    wait_empty(place, slab * uses(place) + (which >> 1));
    warp.store(at.da(place, warp.strip), a);
    const int activation = k ? net[k - 1].activation : IDENTITY;
    const bool h_is_late = derivative_from_a(activation);
    if (!h_is_late) warp.arrive(at.full(place));
    wgmma_wait<0>();
    if (!k) {
      if (dx_bi) write_input_gradients(warp, slab, d, dx_bi, net[0].n_in, factor);
      break;
    }
    times_derivative_rows(warp, d, a, activation, net[k].n_in, warp.h(k));
    if (h_is_late) warp.arrive(at.full(place));
  }
}

// ---- Sums

// Adds dW and db of every second layer, from the last (FIRST = 0) or the last but one (1) down, over a split of `slabs`
// slabs. Writes them as partial results, and returns the largest magnitude among them.
template <int LAYERS, int FIRST>
DEVICE unsigned add_layers(Places at, const Network& net, int slabs, float* partials) {
  const int layers = net.layers, lane = threadIdx.x % 32, warp = warp_index() % SUMS_WARPS;
  const int uses = layers + 1 - FIRST >> 1;
  float sums[LAYERS][SUMS];
#pragma unroll
  for (int j = 0; j < LAYERS; ++j)
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums[j][i] = 0;
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    asm volatile("" : "+r"(at.base));  // else all descriptors are computed beforehand, and registers do not last
#pragma unroll
    for (int j = 0; j < LAYERS; ++j) {
      const int k = layers - 1 - FIRST - 2 * j;
      if (k < 0) continue;
      mbarrier_wait(at.full(FIRST), slab * uses + j & 1);
      wgmma_fence();
#pragma unroll
      for (int strip = 0; strip < STRIPS; ++strip) {
        // Columns of B beyond h's are those of ones. With 32 outputs, dW's other 32 rows repeat them.
        const uint32 h = at.h(k, strip);
        const uint64 da = descriptor(at.da(FIRST, strip), 0);
        if (DB_APART) {
          Products::ss<1, 1>(*(float (*)[COUNT])sums[j], da, descriptor(h, 0), 1);
          Products::ss<1, 1>(*(float (*)[4])(sums[j] + COUNT), da, descriptor(at.ones(), 0), 1);
        } else {
          Products::ss<1, 1>(sums[j], da, descriptor(h, at.ones() - h), 1);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (lane == 0) {
        mbarrier_arrive(at.empty(FIRST));
        mbarrier_arrive(at.h_free(k));
      }
    }
  }
  unsigned most = 0;
#pragma unroll
  for (int j = 0; j < LAYERS; ++j) {
    const int k = layers - 1 - FIRST - 2 * j;
    if (k < 0 || warp * 16 >= net[k].n_out) continue;
    Pack<float>* to = (Pack<float>*)(partials + (k * Piece::SLOTS + warp * Piece::PARTS) * Piece::SIZE) + lane;
#pragma unroll
    for (int pack = 0; pack < SUMS / 4; ++pack) {
      const int from = pack ? 4 * pack - 4 : COUNT;
      Pack<float> numbers;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        numbers.at[i] = sums[j][from + i];
        most = max(most, magnitude(numbers.at[i]));
      }
      if (pack < Piece::used(net[k])) to[pack * 32] = numbers;
    }
  }
  return most;
}

KERNEL __launch_bounds__(THREADS, 1) fused_step_wgmma(
    const int* layout, int layers, const float* x_bi, const int64* labels_b, const float* targets_bj,
    const float* weight_b, int n_batch, int loss, int output, float divisor, int rows_per_split, int n_splits,
    int group_size, float* theta, int n_parameters, int optimizer, float* first_state, float* second_state,
    const double* hyper, double* state, float* gradient, int accumulate, float factor, float* dx_bi, float* mean_loss,
    float* partials, double* losses, double* squares, unsigned* counters, int n_fragments) {
  PANEL_MEMORY(memory);
  const Places at = {shared_address(memory)};
  begin(memory, at);
  const Network net = load_network(memory + TABLE, layout, layers);
  load_layers(layers, theta, n_parameters, (float*)(memory + H), ONES - H,
              [&](int k, const float* from) { load_panel(memory, net, k, from); });
  const int split = blockIdx.x, warpgroup = __shfl_sync(0xffffffffu, warp_index() / 4, 0);
  if (warpgroup < 2) net.loss_sums()[threadIdx.x] = 0;
  if (threadIdx.x == 0)
    *(SplitRows*)(memory + ROWS) = {split * rows_per_split, min((split + 1) * rows_per_split, n_batch)};
  fence_proxy_async();
  __syncthreads();  // weights and ones are there for products
  const Samples samples = {x_bi, labels_b, targets_bj, weight_b, n_batch};
  const LossOptions options = {loss, output, divisor};
  const Update update = {optimizer, theta, n_parameters, first_state, second_state, hyper, state, gradient, accumulate,
                         factor};
  const Splits splits = {n_splits, group_size};
  const GridResults results = {partials, losses, squares, counters, splits, n_splits, n_fragments, (double)n_splits};
  const volatile SplitRows& rows = *(const volatile SplitRows*)(memory + ROWS);
  float* own = partials + (int64)split * layers * Piece::SLOTS * Piece::SIZE;

  // A warpgroup's warps meet between two changes of its registers, as PTX asks.
  if (warpgroup < 2) {
    setmaxnreg_dec<PASSES_REGISTERS>();
#pragma unroll 1
    for (int slab = 0; slab < rows.slabs(); ++slab) {
      const PassesWarp warp(at, memory, warp_index(), rows.first + slab * SLAB, rows.end);
      prefetch_samples(warp, net, samples);
      take_through(warp, net, samples, options, slab, dx_bi, factor);
    }
    bar_sync(1 + warpgroup, 128);
    setmaxnreg_inc<COMMON_REGISTERS>();
  } else if (warpgroup == 2) {
    setmaxnreg_inc<FIRST_REGISTERS>();
    record_largest(results, OF_SUMS, add_layers<FIRST_LAYERS, 0>(at, net, rows.slabs(), own));
    bar_sync(1 + warpgroup, 128);
    setmaxnreg_dec<COMMON_REGISTERS>();
  } else {
    setmaxnreg_inc<SECOND_REGISTERS>();
    record_largest(results, OF_SUMS, add_layers<SECOND_LAYERS, 1>(at, net, rows.slabs(), own));
    bar_sync(1 + warpgroup, 128);
    setmaxnreg_dec<COMMON_REGISTERS>();
  }
  __syncthreads();  // losses are there, and the panels' memory is free for the circular buffers
  if (warp_index() == 0) {
    double* sums = net.loss_sums() + threadIdx.x;
    for (int i = 32; i < THREADS / 2; i += 32) sums[0] += sums[i];
    record_losses(net, results, split, n_batch);
    record_largest(results, OF_INPUTS, magnitude(1.0f));  // sums are recorded, not factors of products
  }
  __syncthreads();  // all of this split is recorded
  publish();
  const int pieces = layers * Piece::SLOTS;
#pragma unroll 1
  for (int i = warp_index(); i < pieces; i += WARPS) {
    const int number = (split * Piece::SLOTS + i) % pieces, k = number / Piece::SLOTS;
    const Piece piece = {number % Piece::SLOTS};
    if (piece.packs(net[k]))
      finish_fragment(piece, net, k, split, update, results, prefetch_buffer<Piece>(memory + H), n_batch, mean_loss);
  }
}
