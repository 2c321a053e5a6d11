// The functions of kernels/common/ptx_sm90.cuh beside products, on data that a test chooses: copies of boxes, parts of a
// block, clusters, fragments, pairs of numbers. tests/gpu/test_ptx_sm90_on_gpu.py computes with NumPy what must come out.
#include "../../../kernels/common/ptx_sm90.cuh"

// ---- Copies of boxes

// For each of `count` boxes, of which `places` says where it begins in the source and in the target (column, row, column,
// row): copies it from the source, writes it to `images` as it lies in shared memory, and copies it with all bits inverted
// to the target.
KERNEL __launch_bounds__(128) boxes(const __grid_constant__ TensorMap source, const __grid_constant__ TensorMap target,
                                    uint4* images, int bytes, const int* places, int count) {
  PANEL_MEMORY(memory);
  const uint32 base = shared_address(memory), full = base + bytes;
  const int packs = bytes / 16;
  uint4* const box = (uint4*)memory;
  if (threadIdx.x == 0) {
    prefetch_tensormap(&source);
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();  // the barrier is initialised
  for (int n = 0; n < count; ++n) {
    const int* place = places + 4 * n;
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(full, bytes);
      tma_load_2d(base, &source, full, place[0], place[1]);
    }
    mbarrier_wait(full, n % 2);
    for (int i = threadIdx.x; i < packs; i += 128) {
      const uint4 pack = box[i];
      images[n * packs + i] = pack;
      box[i] = {~pack.x, ~pack.y, ~pack.z, ~pack.w};
    }
    fence_proxy_async();
    __syncthreads();  // all of the box is inverted
    if (threadIdx.x == 0) {
      tma_store_2d(&target, base, place[2], place[3]);
      bulk_commit();
      bulk_wait_read<0>();  // the next box takes its place
    }
    __syncthreads();  // it has been read
  }
  if (threadIdx.x == 0) bulk_wait<0>();
}

// ---- Parts of a block

// Warpgroup 0 copies `count` boxes {64, 64}, one below the other, into four stages. Warpgroups 1 and 2 take every other one
// and add up its words, thread i those in places i + 128 k. A stage is free once four warps have arrived.
KERNEL __launch_bounds__(384, 1) pipeline(const __grid_constant__ TensorMap source, uint32* sums, uint32* elected,
                                          int count) {
  PANEL_MEMORY(memory);
  const int stages = 4, bytes = 64 * 128;
  const uint32 base = shared_address(memory), full = base + stages * bytes, empty = full + stages * 8;
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      mbarrier_init(full + s * 8, 1);
      mbarrier_init(empty + s * 8, 4);
    }
    fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are initialised
  if (warpgroup == 0) {
    setmaxnreg_dec<40>();
    if (threadIdx.x < 32 && elect_one()) {
      atomicAdd(elected, 1);
      for (int n = 0; n < count; ++n) {
        const int stage = n % stages;
        if (n >= stages) mbarrier_wait(empty + stage * 8, (n / stages - 1) % 2);
        mbarrier_arrive_expect_tx(full + stage * 8, bytes);
        tma_load_2d(base + stage * bytes, &source, full + stage * 8, 0, n * 64);
      }
    }
    bar_arrive(1, 384);
  } else {
    setmaxnreg_inc<232>();
    uint32 sum = 0;
    for (int n = warpgroup - 1; n < count; n += 2) {
      const int stage = n % stages;
      mbarrier_wait(full + stage * 8, n / stages % 2);
      const uint32* words = (const uint32*)(memory + stage * bytes);
      for (int i = threadIdx.x % 128; i < bytes / 4; i += 128) sum += words[i];
      __syncwarp();  // the whole warp has read
      if (lane == 0) mbarrier_arrive(empty + stage * 8);
    }
    bar_sync(1, 384);  // behind the producer
    sums[threadIdx.x - 128] = sum;
  }
}

// ---- Clusters

// Each block of a cluster of 4 adds the numbers of all, in the order of their ranks.
KERNEL __launch_bounds__(64) __cluster_dims__(4, 1, 1) sums_of_clusters(const float4* x, float4* sums, int* ranks) {
  SHARED_MEMORY(memory);
  float4* const own = (float4*)memory;
  const int i = blockIdx.x * 64 + threadIdx.x;
  own[threadIdx.x] = x[i];
  cluster_arrive();
  cluster_wait();  // every block's numbers are there
  float4 sum = {0, 0, 0, 0};
  for (int rank = 0; rank < 4; ++rank) {
    const float4 other = ld_shared_cluster(mapa(shared_address(own + (threadIdx.x + rank) % 64), rank));
    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
  }
  cluster_arrive();
  sums[i] = sum;
  ranks[i] = cluster_rank();
  cluster_wait();  // no block ends before all have read its numbers
}

// ---- Fragments

// One warp. Lane 8 i + r gives row rows[8 i + r], of 64 rows of 16 bytes, for row r of the i-th matrix.
KERNEL matrix_stores(const uint32* fragments, const int* rows, uint4* table, uint32* back) {
  SHARED_MEMORY(memory);
  uint4* const place = (uint4*)memory;
  for (int i = threadIdx.x; i < 64; i += 32) place[i] = {0, 0, 0, 0};
  uint32 fragment[4];
  for (int i = 0; i < 4; ++i) fragment[i] = fragments[threadIdx.x * 4 + i];
  __syncwarp();  // the table is empty
  stmatrix_x4(shared_address(place + rows[threadIdx.x]), fragment);
  __syncwarp();  // all rows are stored
  for (int i = threadIdx.x; i < 64; i += 32) table[i] = place[i];
  ldmatrix_x4(fragment, shared_address(place + rows[threadIdx.x]));
  for (int i = 0; i < 4; ++i) back[threadIdx.x * 4 + i] = fragment[i];
}

// ---- Pairs of numbers. Row f of each result is of one format: bfloat16, then float16.

KERNEL pairs_of_floats(const float* x, uint32* pairs, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    pairs[i] = cvt_rn_bf16x2(x[2 * i], x[2 * i + 1]);
    pairs[n + i] = cvt_rn_f16x2(x[2 * i], x[2 * i + 1]);
  }
}

KERNEL pairs_of_pairs(const uint32* a, const uint32* b, uint32* greater, uint32* product, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    greater[i] = set_gt_bf16x2(a[i], b[i]);
    greater[n + i] = set_gt_f16x2(a[i], b[i]);
    product[i] = mul_bf16x2(a[i], b[i]);
    product[n + i] = mul_f16x2(a[i], b[i]);
  }
}
