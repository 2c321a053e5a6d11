// Makes an entry point callable with a launch's table of argument addresses, and describes its parameters.
//
// The emulator compiles a kernel's source with a line at its end for each entry point,
//     extern "C" const emulator::Entry emulator_entry_NAME = emulator::make_entry<&NAME>("names of the parameters", 1);
#pragma once
#include <type_traits>
#include <utility>

#include "launch.h"

// The library's first and last byte, set by the linker: what lies between is the kernel's own constant data.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;

namespace emulator {

template <class Type>
constexpr char kind_of() {
  if (std::is_floating_point<Type>::value) return 'f';
  if (std::is_integral<Type>::value) return std::is_signed<Type>::value ? 'i' : 'u';
  return 'V';
}

template <class Type>
constexpr int size_of() {
  if constexpr (std::is_void<Type>::value) return 1;
  else return sizeof(Type);
}

template <class Type>
constexpr Parameter describe() {
  using Value = std::remove_pointer_t<Type>;
  return {std::is_pointer<Type>::value, std::is_const<Value>::value, kind_of<std::remove_cv_t<Value>>(),
          size_of<Value>()};
}

template <auto kernel>
struct EntryPoint;

template <class... Types, void (*kernel)(Types...)>
struct EntryPoint<kernel> {
  // One more than there are, since an array of none cannot be.
  static constexpr Parameter parameters[sizeof...(Types) + 1] = {describe<Types>()..., Parameter{}};

  template <size_t... positions>
  __attribute__((no_sanitize("thread"))) static void call(void** arguments, std::index_sequence<positions...>) {
    kernel(*static_cast<std::remove_cv_t<Types>*>(arguments[positions])...);
  }

  __attribute__((no_sanitize("thread"))) static void call(void** arguments) {
    call(arguments, std::index_sequence_for<Types...>{});
  }

  static constexpr Entry entry(const char* names, int cluster) {
    return {call, sizeof...(Types), parameters, names, cluster, &__ehdr_start, &_end};
  }
};

template <auto kernel>
constexpr Entry make_entry(const char* names, int cluster) {
  return EntryPoint<kernel>::entry(names, cluster);
}

}  // namespace emulator
