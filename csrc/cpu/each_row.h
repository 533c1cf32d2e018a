// A row pass from what is done with a row. A row is read once from memory; what follows stays in the caches.
#pragma once
#include "row_parts.h"

namespace kdfuse {
namespace {

template <class P, class T, void (*Row)(const P&, int64_t, Scratch<T>&)>
void each_row(const P& p, int64_t begin, int64_t end) {
  static thread_local Scratch<T> scratch;
  for (int64_t row = begin; row < end; ++row) {
    if (ignored(p, row)) {
      write_nothing(p, row);
    } else {
      Row(p, row, scratch);
    }
  }
}

// P: Problem, or the SplitProblem of rows in parts.
template <class P, void (*Float)(const P&, int64_t, Scratch<float>&),
          void (*Double)(const P&, int64_t, Scratch<double>&)>
void rows_of(const P& p, int64_t begin, int64_t end) {
  return p.wide ? each_row<P, double, Double>(p, begin, end) : each_row<P, float, Float>(p, begin, end);
}

}  // namespace
}  // namespace kdfuse
