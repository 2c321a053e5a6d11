// Small kernels for the checker: mistakes that it must find, and accesses that it must count. Run by
// tests/kernels/test_emulator.py.
#include "common/ptx.cuh"

// ---- Mistakes. `mistake` 0 makes none, so the checker must be silent.

// Each thread passes a number to its neighbour, twice, through the same shared memory.
KERNEL exchange(float* out, int mistake) {
  SHARED_MEMORY(memory);
  float* cells = (float*)memory;
  const int left = threadIdx.x, right = (threadIdx.x + 1) % blockDim.x;
  if (mistake != 1) cells[left] = left;
  if (mistake != 2) __syncthreads();
  float sum = cells[right];
  if (mistake != 3) __syncthreads();
  cells[left] = sum;
  if (mistake == 4) cells[right] = sum;
  if (mistake == 5) __syncwarp();
  else __syncthreads();
  out[left] = sum + cells[right];
}

// Warps 0 and 2 pass numbers on to each other, and so do 1 and 3. `mistake` 1: they meet as 0 and 1, 2 and 3.
KERNEL exchange_between_warps(float* out, int mistake) {
  SHARED_MEMORY(memory);
  float* cells = (float*)memory;
  const int warp = threadIdx.x / 32;
  cells[threadIdx.x] = threadIdx.x;
  bar_sync(1 + (mistake ? warp / 2 : warp % 2), 64);
  out[threadIdx.x] = cells[threadIdx.x ^ 64];
}

// A shuffle orders no memory; __syncwarp does.
KERNEL exchange_in_warp(float* out, int mistake) {
  SHARED_MEMORY(memory);
  float* cells = (float*)memory;
  cells[threadIdx.x] = threadIdx.x;
  const float other = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  if (!mistake) __syncwarp();
  out[threadIdx.x] = cells[threadIdx.x ^ 1] + other;
}

// Every block adds a partial sum; the last to arrive adds them all.
KERNEL sum_of_blocks(const double* x, double* partials, unsigned* arrivals, double* total, int mistake) {
  SHARED_MEMORY(memory);
  unsigned& is_last = *(unsigned*)memory;
  if (mistake != 4) partials[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (mistake != 1) __syncthreads();
  if (threadIdx.x == 0) {
    if (mistake != 2) __threadfence();
    is_last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
    if (mistake != 3) __threadfence();
    if (is_last) *arrivals = 0;  // ready for the next launch
  }
  if (mistake == 4) partials[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  if (!is_last || threadIdx.x > 0) return;
  double sum = 0;
  for (int i = 0; i < gridDim.x * blockDim.x; ++i) sum += load_cg(partials + i);
  *total = sum;
}

// Each thread copies 16 bytes to shared memory and reads its own and its neighbour's.
KERNEL copied_neighbours(const float4* x, float* out, int mistake) {
  SHARED_MEMORY(memory);
  float4* cells = (float4*)memory;
  const int own = threadIdx.x, next = (threadIdx.x + 1) % blockDim.x;
  cp_async_16(cells + own, x + own, 16);
  cp_async_commit();
  if (mistake != 1) cp_async_wait<0>();
  float sum = cells[own].x;
  if (mistake != 2) __syncthreads();
  sum += cells[next].y;
  if (mistake != 3) __syncthreads();
  cp_async_16(cells + own, x + own, 8);
  cp_async_commit();
  if (mistake == 4) cells[own] = make_float4(0, 0, 0, 0);
  cp_async_wait<0>();
  out[own] = sum + cells[own].z;
}

KERNEL touches(const float* x, float* y, int read, int written) {
  SHARED_MEMORY(memory);
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x > 0) return;
  if (read) y[0] = x[read];
  if (written) y[written] = 1;
}

KERNEL touches_shared(float* y, int index) {
  SHARED_MEMORY(memory);
  ((float*)memory)[index] = 1;
  y[0] = ((float*)memory)[index];
}

KERNEL writes_const(const float* x) { const_cast<float*>(x)[threadIdx.x] = 1; }
KERNEL misaligned(const float* x, float* y) { *(float4*)y = *(const float4*)(x + 1); }

KERNEL copies_out_of_bounds(const float* x, int offset, int valid) {
  SHARED_MEMORY(memory);
  cp_async_16(memory, x + offset, valid);
  cp_async_commit();
  cp_async_wait<0>();
}

// Copies, a group each, that nobody waits for.
KERNEL copies_never_waited_for(const float4* x, int groups) {
  SHARED_MEMORY(memory);
  for (int i = 0; i < groups; ++i) {
    cp_async_16((float4*)memory + i, x, 16);
    cp_async_commit();
  }
}

// Blocks that write the same number to the same place race, even if they never run at once.
KERNEL same_place(float* y) {
  if (threadIdx.x == 0) y[0] = 1;
}

// ---- Counts

// Known numbers of bytes, atomics, copies.
KERNEL counted(const float4* x, float4* y, int* sum, const float* more) {
  SHARED_MEMORY(memory);
  float4* cells = (float4*)memory;
  cp_async_16(cells + threadIdx.x, more, 12);
  cp_async_commit();
  cp_async_wait<0>();
  const uint4 first = load_cg((const uint4*)x);
  float4 four = x[threadIdx.x];
  four.x += __uint_as_float(first.x);
  y[threadIdx.x] = four;
  __syncthreads();
  atomicAdd(sum, 1);
}

// Lane l writes and reads number l * stride of shared memory.
template <typename Number>
DEVICE void strided(unsigned char* memory, int stride, float* out) {
  Number* cells = (Number*)memory;
  const Number zero = *(const Number*)out;
  cells[threadIdx.x * stride] = zero;
  __syncwarp();
  const Number value = cells[threadIdx.x * stride];
  __syncwarp();
  if (threadIdx.x == 0) *(Number*)out = value;
}

KERNEL strided_access(float* out, int stride, int bytes) {
  SHARED_MEMORY(memory);
  if (bytes == 2) strided<uint16>(memory, stride, out);
  if (bytes == 4) strided<float>(memory, stride, out);
  if (bytes == 8) strided<float2>(memory, stride, out);
  if (bytes == 16) strided<float4>(memory, stride, out);
}

// All lanes read the same word.
KERNEL broadcast_access(float* out) {
  SHARED_MEMORY(memory);
  float* cells = (float*)memory;
  cells[threadIdx.x] = 1;
  __syncwarp();
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += cells[i];
  out[threadIdx.x] = sum;
}

// ldmatrix from rows that are `pitch` bytes apart.
KERNEL tile_access(uint32* out, int pitch) {
  SHARED_MEMORY(memory);
  for (int i = threadIdx.x; i < 32 * pitch / 4; i += 32) ((uint32*)memory)[i] = 0;
  __syncwarp();
  uint32 fragment[4];
  ldmatrix_x4(fragment, memory + threadIdx.x * pitch);
  out[threadIdx.x] = fragment[0];
}
