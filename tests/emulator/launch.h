// What Python hands to the runtime and gets back. launcher.py mirrors every struct, field by field.
#pragma once
#include "runtime.h"

namespace emulator {

struct Parameter {
  bool is_pointer;
  bool is_const;  // for a pointer: what it points to
  char kind;      // as in NumPy: f, i, u, V; for a pointer: of what it points to
  int size;       // in bytes; for a pointer: of what it points to
};

// A variant's compiled entry point.
struct Entry {
  void (*call)(void** arguments);
  int parameter_count;
  const Parameter* parameters;
  const char* parameter_names;  // with blanks between
  int cluster;                  // blocks of a cluster
  const char* library_begin;
  const char* library_end;
};

enum class Order : int { fifo, lifo, random };
enum class Landing : int { late, early, random };

// Sums over launches.
struct Counters {
  int64_t barriers;
  int64_t matrix_products;
  int64_t matrix_loads;
  int64_t asynchronous_copies;
  int64_t warpgroup_products;
  int64_t bulk_loads;
  int64_t bulk_stores;
  int64_t extra_wavefronts_read;
  int64_t extra_wavefronts_written;
};

// A launcher's choices, and what it has counted.
struct Settings {
  Order order;
  Landing landing;
  int resident_blocks;
  bool checked;
  bool truncate;
  uint64_t random_state;  // goes on from launch to launch, so that each has a schedule of its own
  Counters counters;
};

// An instruction of a kernel whose accesses to shared memory had to be repeated for bank conflicts, in one launch.
struct ConflictSite {
  const void* code;
  int64_t extra_wavefronts_read;
  int64_t extra_wavefronts_written;
};

// An array that a launch may touch, and how it was.
struct Array {
  const char* begin;
  const char* end;
  bool writable;
  int64_t bytes_read;
  int64_t bytes_written;
  int64_t atomics;
};

struct Launch {
  const Entry* entry;
  int grid;
  int block;
  int cluster;
  int64_t shared_bytes;
  void** arguments;
  Array* arrays;  // in checked launches only
  int array_count;
  Settings* settings;
};

struct Failure {
  char message[1000];
  int block;   // -1: no single thread is to blame
  int thread;
  const void* address;  // of memory that must not be touched, or null
  const void* code;     // where in the kernel it happened, or null
};

}  // namespace emulator

extern "C" {

// 0, or 1 when the launch failed; then emulator_failure says why.
EMULATOR_API int emulator_launch(emulator::Launch* launch);
EMULATOR_API const emulator::Failure* emulator_failure();
// Of the latest checked launch; returns how many.
EMULATOR_API int64_t emulator_conflict_sites(const emulator::ConflictSite** sites);
}
