// What the thread sanitizer has to be told: the order that barriers, fences and atomics make, what memory is the
// simulator's own, and accesses that no compiler sees. Without it nothing is told.
#pragma once
#include <cstddef>

#if defined(KDFUSE_SANITIZED_THREAD)
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* at, unsigned long bytes);
void __tsan_write_range(void* at, unsigned long bytes);
}
#endif

namespace simulator {

// Under a sanitizer accesses are its own affair: memory.cpp looks at none.
#if defined(KDFUSE_SANITIZED_ADDRESS) || defined(KDFUSE_SANITIZED_THREAD)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

#if defined(KDFUSE_SANITIZED_THREAD)

// Whoever acquires a place comes after all who have released it.
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }

// In whose scope this thread touches what is the simulator's, which one fibre at a time does.
class Unwatched {
 public:
  Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unwatched() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

inline void tell(const void* at, size_t bytes, bool write) {
  (write ? __tsan_write_range : __tsan_read_range)(const_cast<void*>(at), bytes);
}

#else

inline void release(void*) {}
inline void acquire(void*) {}
struct Unwatched {
  Unwatched() {}
};
inline void tell(const void*, size_t, bool) {}

#endif

}  // namespace simulator
