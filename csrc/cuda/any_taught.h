// The rows of one student under teachers, for any loss of losses/taught.h and any team of threads. `row` is one that
// counts.
#pragma once
#include "../losses/taught.h"
#include "any_row.h"

namespace kdfuse {

template <class Loss, class T, class Team>
KDFUSE_DEVICE void taught_row(const Team& team, const Task& p, int64_t row, const Span& span) {
  const T temperature = T(p.params[0]), ce_weight = T(p.params[Loss::kCeWeight]);
  const T weight = row_weight<T>(team, p, row);
  const auto y = read_target<T>(team, p, row, span, 1);
  fill_teachers(team, p, row, span, temperature);
  auto z = read_logits<T>(team, p, 0, row, y, span, Loss::kStudentAt1 ? T(1) : temperature);
#pragma unroll 1
  for (int k = 0; k < p.num_teachers; ++k) {
    if (!Loss::reads(p.params, k)) continue;
    const T peak = read_first(team, p, open_teacher<T>(team, p, k, row, span), y, span);
    if (team.rank() == 0) notes<T>(team, k)[0] = peak;
  }
  const auto seen = see(team, p, y, span, z, y.count > 0);
  Gradient<T> g = {};
  const T ce = y.count > 0 ? add_cross_entropy(z, y, seen.dot, ce_weight, g) : T(0);

  team.sync();
  Lesson<T, Loss::kTerms> found;
#pragma unroll 1
  for (int k = 0; k < p.num_teachers; ++k) {
    T* const note = notes<T>(team, k);
    T scale = 0, peak = 0;
    if (Loss::reads(p.params, k)) {
      auto t = open_logits(open_teacher<T>(team, p, k, row, span), y);
      set_peak(t, y, temperature, note[0]);
      const T mixed = teach<Loss::kEntropy>(team, p, y, span, t, z, Loss::kTeacherAt1);
      const Taught<T> x = {z.stats, t.stats, z.at, t.at, z.at1, t.at1, mixed};
      scale = Loss::template add<true>(Loss::template factors<T>(p.params, k), x, found);
      peak = t.units.peak;
    }
    if (team.rank() == 0) note[1] = peak, note[2] = weight * scale;
  }
  g.a = found.a, g.c += found.c, g.label[0] += found.label;

  write_values(team, p, row, 0, {found.value + gated(ce_weight, ce)});
  write_values(team, p, row, 1, found.terms_of_row);
  write_values(team, p, row, 1 + Loss::kTerms, {ce, seen.top1, seen.top5});
  if (!p.with_gradient) return;
  team.sync();
  const T step = units(temperature, T(0)).step;
  write_gradient(team, p, 0, row, y, span, z, g, weight, [&](int i, const T(&)[kChunk], T(&out)[kChunk]) {
#pragma unroll 1
    for (int k = 0; k < p.num_teachers; ++k) {
      const T* const note = notes<T>(team, k);
      if (note[2] == T(0)) continue;
      T x[kChunk];
      read(team, p, open_teacher<T>(team, p, k, row, span), y, span, i, x);
      add_exponentials(out, note[2], Units<T>{note[1], step}, x);
    }
  });
}

}  // namespace kdfuse
