// A row pass from what is done with a row. A row is read once from memory; what follows stays in the caches.
#pragma once
#include "row_parts.h"

namespace kdfuse {
namespace {

template <class T, void (*Row)(const Problem&, int64_t, Scratch<T>&)>
void each_row(const Problem& p, int64_t begin, int64_t end) {
  static thread_local Scratch<T> scratch;
  for (int64_t row = begin; row < end; ++row) {
    if (ignored(p, row)) {
      write_nothing(p, row);
    } else {
      Row(p, row, scratch);
    }
  }
}

template <void (*Float)(const Problem&, int64_t, Scratch<float>&),
          void (*Double)(const Problem&, int64_t, Scratch<double>&)>
void rows_of(const Problem& p, int64_t begin, int64_t end) {
  return p.wide ? each_row<double, Double>(p, begin, end) : each_row<float, Float>(p, begin, end);
}

}  // namespace
}  // namespace kdfuse
