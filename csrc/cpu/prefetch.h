// Prefetching across rows on the CPU.
#pragma once
#include "../core/types.h"

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

// What the next row needs is asked for while this one is computed: rows are about a page long, and the
// hardware's own prefetch stops at each page.
struct Ahead {
  const char* at;  // this place of the next row ...
  int64_t bytes;  // ... an element of which has this size
  const char* written;  // and of the gradient row about to be written, or null
  int64_t written_bytes;

  void touch(int64_t i) const {
    __builtin_prefetch(at + i * bytes);
    if (written) __builtin_prefetch(written + i * written_bytes, 1);
  }
};

inline int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// After the last row there is nothing to fetch: the row itself is named, which is there already.
inline Ahead next_row(const Problem& p, const Matrix& m, int64_t row, int which = -1) {
  const int64_t next = row + 1 < p.rows ? row + 1 : row, bytes = size_of(m.type);
  Ahead ahead = {static_cast<const char*>(m.data) + next * m.stride * bytes, bytes, nullptr, 0};
  if (which >= 0 && p.gradients) {
    ahead.written_bytes = size_of(p.gradients[which].type);
    ahead.written = static_cast<char*>(p.gradients[which].data) + row * p.classes * ahead.written_bytes;
  }
  return ahead;
}

}  // namespace
}  // namespace kdfuse
