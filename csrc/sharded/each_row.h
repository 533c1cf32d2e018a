// A pass over one part of the classes from what is done with a row of it.
#pragma once
#include "rows.h"

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

template <SplitPlan (*Plan)(const double*), class T>
void stats_rows(const SplitProblem& p, int64_t begin, int64_t end) {
  static thread_local Scratch<T> scratch;
  const SplitPlan plan = Plan(p.params);
  for (int64_t row = begin; row < end; ++row) split_stats(p, plan, row, scratch);
}

template <SplitPlan (*Plan)(const double*)>
void split_stats_of(const SplitProblem& p, int64_t begin, int64_t end) {
  return p.wide ? stats_rows<Plan, double>(p, begin, end) : stats_rows<Plan, float>(p, begin, end);
}

template <class T, void (*Row)(const SplitProblem&, int64_t, Scratch<T>&)>
void split_rows(const SplitProblem& p, int64_t begin, int64_t end) {
  static thread_local Scratch<T> scratch;
  for (int64_t row = begin; row < end; ++row) {
    if (ignored(p, row)) {
      write_nothing(p, row);
    } else {
      Row(p, row, scratch);
    }
  }
}

template <void (*Float)(const SplitProblem&, int64_t, Scratch<float>&),
          void (*Double)(const SplitProblem&, int64_t, Scratch<double>&)>
void split_rows_of(const SplitProblem& p, int64_t begin, int64_t end) {
  return p.wide ? split_rows<double, Double>(p, begin, end) : split_rows<float, Float>(p, begin, end);
}

}  // namespace
}  // namespace kdfuse
