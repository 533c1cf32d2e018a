// What -fsanitize=thread has the compiler call. This file itself is compiled without it, and no sanitizer is linked.
#include "world.h"

using simulator::access;

#define KDFUSE_HOOKS(bytes)                                                                                        \
  void __tsan_read##bytes(void* at) { access(static_cast<char*>(at), bytes, false, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* at) { access(static_cast<char*>(at), bytes, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* at) { __tsan_read##bytes(at); }                                          \
  void __tsan_unaligned_write##bytes(void* at) { __tsan_write##bytes(at); }

extern "C" {
KDFUSE_HOOKS(1)
KDFUSE_HOOKS(2)
KDFUSE_HOOKS(4)
KDFUSE_HOOKS(8)
KDFUSE_HOOKS(16)
void __tsan_read_range(void* at, size_t bytes) {
  access(static_cast<char*>(at), static_cast<unsigned>(bytes), false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  access(static_cast<char*>(at), static_cast<unsigned>(bytes), true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
