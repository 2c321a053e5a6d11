// What the headers that a kernel includes ask of the emulator: the boundary between a compiled kernel and the runtime.
#pragma once
#include <cstddef>
#include <cstdint>

#define EMULATOR_API __attribute__((visibility("default")))

namespace emulator {

// ---- Where the running thread stands
//
// None of these changes while a thread lives. `const` lets the compiler ask once and keep the answer, as CUDA's special
// registers would be kept; returning numbers instead of references keeps them out of the checker's sight.

EMULATOR_API __attribute__((const)) unsigned thread_index() noexcept;
EMULATOR_API __attribute__((const)) unsigned block_index() noexcept;
EMULATOR_API __attribute__((const)) unsigned block_size() noexcept;
EMULATOR_API __attribute__((const)) unsigned grid_size() noexcept;
EMULATOR_API __attribute__((const)) unsigned char* shared_memory() noexcept;
EMULATOR_API __attribute__((const)) int cluster_rank() noexcept;

// ---- Where threads meet

EMULATOR_API void block_barrier();
EMULATOR_API void numbered_barrier(int number, int threads);
EMULATOR_API void arrive_at_numbered_barrier(int number, int threads);
EMULATOR_API void warp_barrier(unsigned lanes);

// What `source_lane` of the warp brought along; `operation` is the CUDA function that asks, for messages.
enum class Shuffle { any, exclusive_or, down, up };
EMULATOR_API uint64_t shuffle(unsigned lanes, uint64_t value, unsigned source_lane, Shuffle operation);
EMULATOR_API unsigned ballot(unsigned lanes, bool predicate);
EMULATOR_API bool elect();

// ---- Memory

EMULATOR_API void memory_fence();

// Stands before every atomic operation. `code` is where the kernel called it.
EMULATOR_API void before_atomic(const void* address, size_t size, const void* code);

EMULATOR_API void copy_asynchronously(void* destination, const void* source, int valid);
EMULATOR_API void close_copy_group();
EMULATOR_API void wait_for_copies(int groups_under_way);

// ---- Tensor cores

EMULATOR_API void load_matrices(uint32_t* fragment, const void* row, bool transposed);
EMULATOR_API void store_matrices(void* row, const uint32_t* fragment);
EMULATOR_API void multiply_bf16(float* c, const uint32_t* a, const uint32_t* b);
EMULATOR_API void multiply_f16(float* c, const uint32_t* a, const uint32_t* b);
EMULATOR_API void multiply_tf32(float* c, const uint32_t* a, const uint32_t* b);

// ---- sm_90a: barriers and copies in shared memory. Addresses there are numbers of bytes from its beginning.

EMULATOR_API void initialize_mbarrier(uint32_t barrier, int arrivals);
EMULATOR_API void fence_mbarriers();
EMULATOR_API void arrive_at_mbarrier(uint32_t barrier, int announced_bytes);
EMULATOR_API void wait_for_phase(uint32_t barrier, int parity);

// `map`: the 16 words of a TensorMap.
EMULATOR_API void prefetch_map(const unsigned long long* map);
EMULATOR_API void load_box(uint32_t destination, const unsigned long long* map, uint32_t barrier, int column, int row);
EMULATOR_API void store_box(const unsigned long long* map, uint32_t source, int column, int row);
EMULATOR_API void close_store_group();
EMULATOR_API void wait_for_stores(int groups_under_way, bool only_reads);
EMULATOR_API void fence_proxies();

// ---- sm_90a: warpgroups

struct WarpgroupProduct {
  float* d;
  int registers;                // of d; the product is 64 x 2 registers
  const uint32_t* a_registers;  // null: A lies in shared memory
  uint64_t a, b;                // descriptors
  bool is_f16, transpose_a, transpose_b, accumulate;
};

EMULATOR_API void fence_registers();
EMULATOR_API void multiply_warpgroup(const WarpgroupProduct& product);
EMULATOR_API void close_product_group();
EMULATOR_API void wait_for_products(int groups_under_way);
EMULATOR_API void set_registers(int count, bool increase);

// ---- sm_90a: clusters

EMULATOR_API void arrive_at_cluster_barrier();
EMULATOR_API void wait_at_cluster_barrier();
EMULATOR_API uint32_t cluster_address(uint32_t address, int rank);
EMULATOR_API void read_cluster_memory(void* value, uint32_t address);  // 16 bytes

}  // namespace emulator
