// What the address sanitizer has to be told of fibres. Under it the accesses are its own affair: memory.cpp looks at
// none.
#pragma once
#include <cstddef>

#if defined(KDFUSE_SANITIZED)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulator {

// A stack, and what the sanitizer keeps of it while another one is in use.
struct Stack {
#if defined(KDFUSE_SANITIZED)
  const void* bottom = nullptr;
  size_t size = 0;
  void* kept = nullptr;
#endif
};

#if defined(KDFUSE_SANITIZED)

inline void leave_for(Stack& from, const Stack& to, bool for_ever) {
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.kept, to.bottom, to.size);
}

inline void arrive_at(Stack& at, Stack* came_from) {
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(at.kept, &bottom, &size);
  if (came_from && !came_from->bottom) came_from->bottom = bottom, came_from->size = size;
}

#endif

}  // namespace simulator
