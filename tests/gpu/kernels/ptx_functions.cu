// Every function of kernels/common/ptx.cuh on data that a test chooses. tests/gpu/test_ptx_on_gpu.py runs these on a GPU and in the
// emulator, and compares the bits.
#include "../../../kernels/common/ptx.cuh"

KERNEL conversions(const float* x, uint16* bf16, uint16* f16, uint32* tf32, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    bf16[i] = cvt_rn_bf16(x[i]);
    f16[i] = cvt_rn_f16(x[i]);
    tf32[i] = cvt_rna_tf32(x[i]);
  }
}

KERNEL widenings(const uint16* bits, float* from_bf16, float* from_f16, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    from_bf16[i] = cvt_f32_bf16(bits[i]);
    from_f16[i] = cvt_f32_f16(bits[i]);
  }
}

// Thread i copies 16 bytes, of which valid[i] count, to the mirrored place: the lower half of the threads in a first
// group, the upper half in a second. What the first wait promises is written to `first`, all of it to `both`.
KERNEL copies(const uint4* source, const int* valid, uint4* first, uint4* both) {
  SHARED_MEMORY(memory);
  uint4* const place = (uint4*)memory;
  const int n = blockDim.x, mine = threadIdx.x, mirrored = n - 1 - mine, block = blockIdx.x * n;
  const uint4 stale = {0xa5a5a5a5u, 0xa5a5a5a5u, 0xa5a5a5a5u, 0xa5a5a5a5u};
  place[mine] = stale;
  __syncthreads();  // every place is stale before any copy may land
  if (mine < n / 2) cp_async_16(place + mirrored, source + block + mine, valid[block + mine]);
  cp_async_commit();
  if (mine >= n / 2) cp_async_16(place + mirrored, source + block + mine, valid[block + mine]);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();  // the first group of every thread has landed
  if (mirrored < n / 2) first[block + mine] = place[mine];
  cp_async_wait<0>();
  __syncthreads();  // and the second
  both[block + mine] = place[mine];
}

// Groups of `warps` warps pass numbers around in shared memory, each behind a barrier of its own.
KERNEL barriers_of_warps(uint32* out, int warps) {
  SHARED_MEMORY(memory);
  uint32* const cells = (uint32*)memory;
  const int threads = warps * 32, group = threadIdx.x / threads, first = group * threads;
  uint32 value = blockIdx.x * blockDim.x + threadIdx.x;
  for (int step = 0; step < 100; ++step) {
    cells[threadIdx.x] = value;
    bar_sync(1 + group, threads);
    value = cells[first + (threadIdx.x - first + 33) % threads] * 3 + step;
    bar_sync(1 + group, threads);
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

// One warp. Lane 8i + r gives row `rows[8i + r]` of a table of 64 rows of 8 numbers.
KERNEL matrix_loads(const uint4* table, const int* rows, uint32* plain, uint32* transposed) {
  SHARED_MEMORY(memory);
  uint4* const place = (uint4*)memory;
  for (int i = threadIdx.x; i < 64; i += 32) place[i] = table[i];
  __syncwarp();
  uint32 fragment[4];
  ldmatrix_x4(fragment, place + rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i) plain[threadIdx.x * 4 + i] = fragment[i];
  ldmatrix_x4_trans(fragment, place + rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i) transposed[threadIdx.x * 4 + i] = fragment[i];
}

KERNEL cached_loads(const float* floats, const double* doubles, const uint4* words, float* floats_out, double* doubles_out,
                    uint4* words_out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  prefetch_l2(floats + i);
  floats_out[i] = load_cg(floats + i);
  doubles_out[i] = load_cg(doubles + i);
  words_out[i] = load_cg(words + i);
}

// Products: block t's warp multiplies the t-th A and B and adds to the t-th C, each row by row. Fragments are filled from
// the description in ptx.cuh.

DEVICE uint32 pair(const uint16* first, int stride) { return first[0] | (uint32)first[stride] << 16; }

DEVICE int place_in_c(int i) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  return (g + i / 2 * 8) * 8 + 2 * t + i % 2;
}

// A (16 x 16), B (16 x 8), C (16 x 8)
KERNEL products_16bit(const uint16* a_tmk, const uint16* b_tkn, float* c_tmn, int is_f16) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint16* a_mk = a_tmk + blockIdx.x * 256;
  const uint16* b_kn = b_tkn + blockIdx.x * 128;
  float* c_mn = c_tmn + blockIdx.x * 128;
  uint32 a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = pair(a_mk + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8, 1);
  for (int i = 0; i < 2; ++i) b[i] = pair(b_kn + (2 * t + i * 8) * 8 + g, 8);
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = c_mn[place_in_c(i)];
  if (is_f16) mma_m16n8k16_f16(c, a, b);
  else mma_m16n8k16_bf16(c, a, b);
  for (int i = 0; i < 4; ++i) c_mn[place_in_c(i)] = c[i];
}

// A (16 x 8), B (8 x 8), C (16 x 8)
KERNEL products_tf32(const float* a_tmk, const float* b_tkn, float* c_tmn) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float* a_mk = a_tmk + blockIdx.x * 128;
  const float* b_kn = b_tkn + blockIdx.x * 64;
  float* c_mn = c_tmn + blockIdx.x * 128;
  uint32 a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(a_mk[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) b[i] = __float_as_uint(b_kn[(t + i * 4) * 8 + g]);
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = c_mn[place_in_c(i)];
  mma_m16n8k8_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) c_mn[place_in_c(i)] = c[i];
}
