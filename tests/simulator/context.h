// From one stack of the host to another, and what a sanitizer has to be told of that.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

#if defined(KDFUSE_SANITIZED_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(KDFUSE_SANITIZED_THREAD)
#include <sanitizer/tsan_interface.h>
#include <sys/mman.h>
#endif

namespace simulator {

inline void prepare(ucontext_t& at, char* stack, size_t bytes, void (*run)()) {
  getcontext(&at);
  at.uc_stack.ss_sp = stack, at.uc_stack.ss_size = bytes, at.uc_link = nullptr;
  makecontext(&at, run, 0);
}

#if defined(KDFUSE_SANITIZED_ADDRESS)

struct Context {
  ucontext_t at;
  const void* bottom = nullptr;  // of its stack
  size_t bytes = 0;
  void* kept = nullptr;  // the sanitizer's, while another stack is in use
};

inline void go(Context& from, Context& to, bool for_ever) {
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.kept, to.bottom, to.bytes);
  swapcontext(&from.at, &to.at);
  __sanitizer_finish_switch_fiber(from.kept, nullptr, nullptr);
}

// run: it calls arrive() first and never returns.
inline void begin(Context& from, Context& to, char* stack, size_t bytes, void (*run)()) {
  to.bottom = stack, to.bytes = bytes;
  prepare(to.at, stack, bytes, run);
  go(from, to, false);
}

inline void arrive(Context& from) { __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.bytes); }
inline void discard(Context&) {}

#elif defined(KDFUSE_SANITIZED_THREAD)

// To the sanitizer a thread of its own: to come to run after others makes no order.
struct Context {
  ucontext_t at;
  void* fibre = nullptr;
};

inline void go(Context& from, Context& to, bool) {
  if (!from.fibre) from.fibre = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.fibre, __tsan_switch_to_fiber_no_sync);
  swapcontext(&from.at, &to.at);
}

inline void begin(Context& from, Context& to, char* stack, size_t bytes, void (*run)()) {
  // No longer the stack of another fibre: of memory that is mapped the sanitizer knows nothing.
  mmap(stack, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  prepare(to.at, stack, bytes, run);
  to.fibre = __tsan_create_fiber(0);
  go(from, to, false);
}

inline void arrive(Context&) {}
inline void discard(Context& over) { __tsan_destroy_fiber(over.fibre); }

#else

struct Context {
  jmp_buf at;
};

// Jumps, as swapcontext asks the system for the signal mask.
inline void go(Context& from, Context& to, bool) {
  if (!_setjmp(from.at)) _longjmp(to.at, 1);
}

inline void begin(Context& from, Context&, char* stack, size_t bytes, void (*run)()) {
  if (_setjmp(from.at)) return;
  ucontext_t at;
  prepare(at, stack, bytes, run);
  setcontext(&at);
}

inline void arrive(Context&) {}
inline void discard(Context&) {}

#endif

}  // namespace simulator
