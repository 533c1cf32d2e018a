// The pass that makes the statistics of one part of the classes.
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

}  // namespace
}  // namespace kdfuse
