// Small kernels that show what the emulator does and what it catches. Run by tests/kernels/test_emulator.py.
#include "common/ptx.cuh"

// ---- Threads, warps, blocks

// One row of 32 for each function.
KERNEL warp_functions(int* out) {
  const int lane = threadIdx.x;
  out[0 * 32 + lane] = __shfl_sync(0xffffffffu, lane, 5);
  out[1 * 32 + lane] = __shfl_sync(0xffffffffu, lane, 9, 8);
  out[2 * 32 + lane] = __shfl_xor_sync(0xffffffffu, lane, 3);
  out[3 * 32 + lane] = __shfl_down_sync(0xffffffffu, lane, 4, 16);
  out[4 * 32 + lane] = __shfl_up_sync(0xffffffffu, lane, 4, 16);
  out[5 * 32 + lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
  out[6 * 32 + lane] = __any_sync(0xffffffffu, lane == 7) + 2 * __any_sync(0xffffffffu, lane == 32);
  out[7 * 32 + lane] = __all_sync(0xffffffffu, lane < 32) + 2 * __all_sync(0xffffffffu, lane < 31);
}

KERNEL partial_masks(double* out) {
  const int lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const double other = __shfl_xor_sync(half, lane + 0.5, 1);
  // Lanes that have returned, as odd ones do here, are not waited for.
  if (lane % 2 == 1) return;
  out[lane] = other + __popc(__ballot_sync(0xffffffffu, 1));
}

KERNEL early_exit(int* sum, int n) {
  SHARED_MEMORY(memory);
  int* values = (int*)memory;
  values[threadIdx.x] = threadIdx.x;
  if (threadIdx.x >= n) return;
  __syncthreads();
  atomicAdd(sum, values[n - 1 - threadIdx.x]);
}

KERNEL atomics(int* signed_cells, unsigned* unsigned_cells) {
  atomicAdd(&signed_cells[0], 2);
  atomicSub(&signed_cells[1], 1);
  atomicMax(&signed_cells[2], (int)threadIdx.x);
  atomicMin(&signed_cells[3], -(int)threadIdx.x);
  atomicOr(&unsigned_cells[0], 1u << threadIdx.x % 32);
  atomicAnd(&unsigned_cells[1], ~(1u << threadIdx.x % 32));
  atomicExch(&unsigned_cells[2], 7u);
  atomicCAS(&unsigned_cells[3], threadIdx.x, threadIdx.x + 1);
  atomicInc(&unsigned_cells[4], 9u);
}

// The order in which threads come to the first atomic.
KERNEL order_of_arrival(unsigned* counter, int* thread_of) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  thread_of[atomicAdd(counter, 1u)] = thread;
}

KERNEL divergence(int* out) {
  if (threadIdx.x < 16) __syncwarp();
  else out[0] = __shfl_sync(0xffffffffu, 1, 0);
}

KERNEL deadlock(int* out) {
  if (threadIdx.x < 64) __syncthreads();
  else if (threadIdx.x < 80) __syncwarp();
  else __syncthreads();
  out[threadIdx.x] = 1;
}

// Warps that share a barrier pass on numbers, once around; the last warp is in none.
KERNEL barriers_of_warps(int* out, int warps) {
  SHARED_MEMORY(memory);
  int* cells = (int*)memory;
  const int warp = threadIdx.x / 32, group = warp / warps, threads = warps * 32, first = group * threads;
  if (first + threads > blockDim.x) return;
  int value = threadIdx.x;
  for (int step = 0; step < warps; ++step) {
    cells[threadIdx.x] = value;
    bar_sync(1 + group, threads);
    value = cells[first + (threadIdx.x - first + 32) % threads] + step;
    bar_sync(1 + group, threads);
  }
  out[threadIdx.x] = value;
}

KERNEL barrier_of_warps_waited_for_in_vain() {
  if (threadIdx.x < 64) bar_sync(2, 96);
}

KERNEL barrier_of_warps(int barrier, int threads) { bar_sync(barrier, threads + (int)threadIdx.x / 32 * 32); }

KERNEL foreign_mask() { __syncwarp(1u); }

KERNEL shuffle_from_absent_lane(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

KERNEL divides(int* out, int divisor) { out[0] = 7 / divisor; }

KERNEL deep_stack(int* out, int n) {
  volatile int local[100000];
  for (int i = 0; i < n; ++i) local[i] = i;
  out[0] = local[n - 1];
}

KERNEL product_of_part_of_a_warp(float* out) {
  if (threadIdx.x == 7) return;
  const uint32 a[4] = {}, b[2] = {};
  float c[4] = {};
  mma_m16n8k16_bf16(c, a, b);
  out[threadIdx.x] = c[0];
}

KERNEL scalars(double* out, int a, unsigned b, float c, double d, int64 e) { out[0] = (double)a + b + c + d + e; }

// As large as a tensor map: a parameter of this kind is one.
struct __align__(64) MapWords { uint64 words[16]; };

// Writes down both maps, reads the first one's first element and writes it to the second one's.
KERNEL map_words(const MapWords x, int unrelated, const MapWords y, uint64* out) {
  const int i = threadIdx.x;
  out[i] = i < 16 ? x.words[i] : y.words[i - 16];
  if (i == 0 && x.words[0] && y.words[0])
    *reinterpret_cast<uint16*>(y.words[0]) = *reinterpret_cast<const uint16*>(x.words[0]);
}

// ---- Functions of ptx.cuh

KERNEL conversions(const float* x, uint16* bf16, uint16* f16, uint32* tf32, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    bf16[i] = cvt_rn_bf16(x[i]);
    f16[i] = cvt_rn_f16(x[i]);
    tf32[i] = cvt_rna_tf32(x[i]);
  }
}

KERNEL widening(float* from_bf16, float* from_f16) {
  for (int i = threadIdx.x; i < 65536; i += blockDim.x) {
    from_bf16[i] = cvt_f32_bf16((uint16)i);
    from_f16[i] = cvt_f32_f16((uint16)i);
  }
}

KERNEL cached_loads(const double* doubles, const float* singles, double* out) {
  const uint4 bits = load_cg((const uint4*)singles + threadIdx.x);
  out[threadIdx.x] = load_cg(doubles + threadIdx.x) + __uint_as_float(bits.x) + __uint_as_float(bits.y) +
                     __uint_as_float(bits.z) + __uint_as_float(bits.w);
}

// 17 copies of 16 bytes, of which 0 ... 16 are valid, in two groups.
KERNEL copies(const unsigned char* source, unsigned char* out) {
  SHARED_MEMORY(memory);
  const int valid = threadIdx.x, first = valid * 16;
  if (valid < 8) cp_async_16(memory + first, source + first, valid);
  cp_async_commit();
  if (valid >= 8 && valid < 17) cp_async_16(memory + first, source + first, valid);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  for (int i = threadIdx.x; i < 128; i += blockDim.x) out[i] = memory[i];
  cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x + 128; i < 272; i += blockDim.x) out[i] = memory[i];
}

DEVICE void load_tile(unsigned char* memory, const uint16* source, int count) {
  for (int i = threadIdx.x; i < count; i += 32) ((uint16*)memory)[i] = source[i];
  __syncwarp();
}

// `matrices` are four of 8 x 8, one after the other.
KERNEL matrix_loads(const uint16* matrices, uint32* plain, uint32* transposed) {
  SHARED_MEMORY(memory);
  load_tile(memory, matrices, 256);
  uint32 fragment[4];
  ldmatrix_x4(fragment, memory + threadIdx.x * 16);
  for (int i = 0; i < 4; ++i) plain[threadIdx.x * 4 + i] = fragment[i];
  ldmatrix_x4_trans(fragment, memory + threadIdx.x * 16);
  for (int i = 0; i < 4; ++i) transposed[threadIdx.x * 4 + i] = fragment[i];
}

DEVICE uint32 two(const uint16* first, int stride) { return first[0] | (uint32)first[stride] << 16; }

DEVICE void store_c(float* c_mn, const float (&c)[4]) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) c_mn[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

DEVICE void load_c(float (&c)[4], const float* c_mn) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) c[i] = c_mn[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
}

// C += A B with A 16 x 16 and B 16 x 8, fragments filled from the description in ptx.cuh.
KERNEL product_16bit(const uint16* a_mk, const uint16* b_kn, float* c_mn, int is_f16) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32 a[4] = {two(a_mk + g * 16 + 2 * t, 1), two(a_mk + (g + 8) * 16 + 2 * t, 1),
                       two(a_mk + g * 16 + 2 * t + 8, 1), two(a_mk + (g + 8) * 16 + 2 * t + 8, 1)};
  const uint32 b[2] = {two(b_kn + 2 * t * 8 + g, 8), two(b_kn + (2 * t + 8) * 8 + g, 8)};
  float c[4];
  load_c(c, c_mn);
  if (is_f16) mma_m16n8k16_f16(c, a, b);
  else mma_m16n8k16_bf16(c, a, b);
  store_c(c_mn, c);
}

KERNEL product_tf32(const float* a_mk, const float* b_kn, float* c_mn) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32 a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(a_mk[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) b[i] = __float_as_uint(b_kn[(t + i * 4) * 8 + g]);
  float c[4];
  load_c(c, c_mn);
  mma_m16n8k8_tf32(c, a, b);
  store_c(c_mn, c);
}
