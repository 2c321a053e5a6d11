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

// ---- Where threads meet

EMULATOR_API void block_barrier();
EMULATOR_API void numbered_barrier(int number, int threads);
EMULATOR_API void warp_barrier(unsigned lanes);

// What `source_lane` of the warp brought along; `operation` is the CUDA function that asks, for messages.
enum class Shuffle { any, exclusive_or, down, up };
EMULATOR_API uint64_t shuffle(unsigned lanes, uint64_t value, unsigned source_lane, Shuffle operation);
EMULATOR_API unsigned ballot(unsigned lanes, bool predicate);

// ---- Memory

EMULATOR_API void memory_fence();

// Stands before every atomic operation. `code` is where the kernel called it.
EMULATOR_API void before_atomic(const void* address, size_t size, const void* code);

EMULATOR_API void copy_asynchronously(void* destination, const void* source, int valid);
EMULATOR_API void close_copy_group();
EMULATOR_API void wait_for_copies(int groups_under_way);

// ---- Tensor cores

EMULATOR_API void load_matrices(uint32_t* fragment, const void* row, bool transposed);
EMULATOR_API void multiply_bf16(float* c, const uint32_t* a, const uint32_t* b);
EMULATOR_API void multiply_f16(float* c, const uint32_t* a, const uint32_t* b);
EMULATOR_API void multiply_tf32(float* c, const uint32_t* a, const uint32_t* b);

}  // namespace emulator
