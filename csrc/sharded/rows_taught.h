// The parts of rows of one student under teachers, for any loss of losses/taught.h: the loss of each row from the
// statistics of all its classes, and the gradient of one part of them.
#pragma once
#include "../cpu/rows_taught.h"
#include "each_row.h"

namespace kdfuse {
namespace {  // each level compiles its own copy, none may leak into another

template <class Loss>
SplitPlan taught_plan(const double* params) {
  return {own_temperature<Loss>(params), params[0], Loss::kTeacherAt1, Loss::kEntropy, false, Loss::reads};
}

template <class Loss, class T>
void split_taught_row(const SplitProblem& p, int64_t row, Scratch<T>& scratch) {
  const double temperature = p.params[0], own = own_temperature<Loss>(p.params);
  const int64_t length = padded(p.classes);
  T* const base = scratch.rows(p.num_teachers + 2, length);
  const double* const in = p.merged + row * p.layout.width();
  const auto target = split_target<T>(p, row);
  const Merged whole = merged(in + p.layout.of_set(0), own);
  auto z = known(p, whole, base);

  Gradient<T> g;
  Lesson<double, Loss::kTerms> found;
  for (int k = 0; k < p.num_teachers; ++k) {
    if (!Loss::reads(p.params, k)) continue;
    auto t = known(p, merged(in + p.layout.of_set(1 + k), temperature), base + (2 + k) * length);
    const double mixed = in[p.layout.of_pair(k)];
    const double b =
        Loss::template add<true>(Loss::template factors<double>(p.params, k), taught_by(z, t, mixed), found);
    if (b == 0 || !p.gradients) continue;
    const Factors factors = make_part(p, t, p.teachers[k], row, target, temperature, false, base + length);
    g.add(t.x, b * factors.at);
  }
  g.a = found.a, g.c = found.c, g.label[0] = found.label;
  const double label = whole.label - whole.peak;
  const double ce = p.labels ? add_cross_entropy(z, target, label, p.params[Loss::kCeWeight], g) : 0;
  const SplitHits hit = hits(in + p.layout.of_ranks(0));
  write_taught<Loss>(p, row, found, ce, hit.top1, hit.top5);
  if (!p.gradients) return;
  const Factors factors = make_part(p, z, p.students[0], row, target, own, p.labels != nullptr, base + length, 0);
  write_part(p, 0, row, own, z, g, target, factors);
}

}  // namespace
}  // namespace kdfuse
