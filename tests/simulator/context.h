// From one stack of the host to another, and what the address sanitizer has to be told of that. Under it the accesses
// are its own affair: memory.cpp looks at none.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

#if defined(KDFUSE_SANITIZED)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulator {

inline void prepare(ucontext_t& at, char* stack, size_t bytes, void (*run)()) {
  getcontext(&at);
  at.uc_stack.ss_sp = stack, at.uc_stack.ss_size = bytes, at.uc_link = nullptr;
  makecontext(&at, run, 0);
}

#if defined(KDFUSE_SANITIZED)

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

#endif

}  // namespace simulator
